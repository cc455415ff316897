"""Building blocks of every kind: model settings, conditions, durations, quantities, money, times.

Pure data: parsing and formatting only. Wire formats are Kubernetes' own (RFC 3339 times, duration and quantity
strings); money is a decimal string beside an ISO 4217 currency.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

from gpu_tenancy.api.kinds import Extra, rule, rules


class ApiModel(BaseModel):
    """Base of everything that appears in a manifest; the attribute docstrings become ``kubectl explain``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready mapping with API field names; absent fields are left out, never null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _to_utc(value: object) -> object:
    """Accept RFC 3339 strings and aware datetimes; refuse naive times, which have no place on the wire."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError(f"time {value.isoformat()} has no time zone; write it as UTC with a trailing Z")
        try:
            return value.astimezone(UTC)
        except OverflowError as error:  # which pydantic would not turn into its own report
            remedy = "write it as UTC with a trailing Z"
            raise ValueError(f"time {value.isoformat()} is not within the years 1 to 9999 of UTC; {remedy}") from error
    return value


def format_time(value: datetime) -> str:
    """RFC 3339 UTC with whole seconds, as in metav1.Time."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_micro_time(value: datetime) -> str:
    """RFC 3339 UTC with microseconds, as in metav1.MicroTime."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Time = Annotated[
    datetime,
    BeforeValidator(_to_utc),
    PlainSerializer(format_time, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""Instant in UTC, whole seconds on the wire (metav1.Time)."""

EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(3000, 1, 1, tzinfo=UTC)
"""Instants that something may be planned for: far enough from the ends of the calendar for every sum."""


def _is_planned(value: datetime) -> datetime:
    if not EARLIEST <= value < LATEST:
        raise ValueError(f"time {format_time(value)} is not within the years {EARLIEST.year} to {LATEST.year - 1}")
    return value


PlannedTime = Annotated[Time, AfterValidator(_is_planned)]
"""Instant that people plan for, in UTC."""

MicroTime = Annotated[
    datetime,
    BeforeValidator(_to_utc),
    PlainSerializer(format_micro_time, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""Instant in UTC, microseconds on the wire (metav1.MicroTime)."""


def _cut_to(limit: int) -> BeforeValidator:
    """Cuts what is longer: a sentence from elsewhere (a Job's, the API server's) may be of any length."""
    return BeforeValidator(
        lambda text: f"{text[: limit - 1]}…" if isinstance(text, str) and len(text) > limit else text
    )


LABEL_KEY_PATTERN: Final = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
LabelKey = Annotated[str, Field(pattern=LABEL_KEY_PATTERN, max_length=317)]
"""Key of a label, with its prefix if it has one."""

Message = Annotated[str, _cut_to(1024), Field(max_length=1024)]
"""A sentence in a status, cut to what a condition takes."""

ShortMessage = Annotated[str, _cut_to(512), Field(max_length=512)]
"""A short one, of which a status holds many."""

DURATION_PATTERN: Final = r"^(?:([0-9]{1,5})h)?(?:([0-9]{1,7})m)?(?:([0-9]{1,9})s)?$"
"""Bounded so that the sum stays below 292 years, which is what CEL's and Go's durations hold."""
_DURATION: Final = re.compile(DURATION_PATTERN)
_DURATION_REMEDY: Final = "write hours, minutes and seconds in that order, e.g. 4h, 1h30m or 90s"


@lru_cache(maxsize=4096)
def parse_duration(text: str) -> timedelta:
    """Length of a duration string. Raises ValueError with the remedy where it is not one."""
    match = _DURATION.fullmatch(text)
    if not match or not text:
        raise ValueError(f'duration "{text}" is not understood; {_DURATION_REMEDY}')
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return timedelta(hours=hours, minutes=minutes, seconds=seconds)


def format_duration(length: timedelta) -> str:
    """Shortest duration string of whole seconds, e.g. ``1h30m``; zero is ``0s``. A fraction of a second is cut off."""
    minutes, seconds = divmod(int(length.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (seconds, "s"))
    return "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"


_QUANTITY_SUFFIX: Final = {
    "": Decimal(1), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12),
    "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
QUANTITY_PATTERN: Final = r"^([0-9]{1,18}(?:[.][0-9]{1,9})?)(?:[eE]([0-9]{1,2})|([numkMGTPE]|[KMGTPE]i))?$"
_QUANTITY: Final = re.compile(QUANTITY_PATTERN)
_QUANTITY_REMEDY: Final = "write a number with an optional suffix, e.g. 16, 500m or 128Gi"


def parse_quantity(text: str | float) -> Decimal:
    """Value of a resource quantity in its base unit (cores, bytes). Raises ValueError where it is not one.

    Source: Kubernetes ``resource.Quantity`` suffixes (binary Ki…Ei, decimal n…E, exponent); signs are not accepted.
    """
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise ValueError(f'quantity "{text}" is not understood; {_QUANTITY_REMEDY}')
    number, exponent, suffix = match.groups()
    return Decimal(number).scaleb(int(exponent or 0)) * _QUANTITY_SUFFIX[suffix or ""]


_MONEY: Final = re.compile(r"^[0-9]{1,12}(?:[.][0-9]{1,12})?$")
_MONEY_REMEDY: Final = "write a decimal number in quotes, without sign, exponent or currency, e.g. 145.00"
_CURRENCY: Final = re.compile(r"^[A-Z]{3}$")
_CURRENCY_REMEDY: Final = "write the three capital letters of ISO 4217, e.g. RUB or USD"


def _checked_duration(text: str) -> str:
    parse_duration(text)
    return text


def _checked_quantity(value: object) -> str:
    """The quantity as it was written: plain numbers are quantities too, but true is none."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        # Not a TypeError, which pydantic would not turn into its own report.
        raise ValueError(f"quantity {value!r} is not understood; {_QUANTITY_REMEDY}")  # noqa: TRY004
    parse_quantity(value)
    return str(value)


def _matching(pattern: re.Pattern[str], noun: str, remedy: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f'{noun} "{text}" is not understood; {remedy}')
        return text

    return AfterValidator(check)


def _understood(pattern: str, noun: str, remedy: str, value: str = "self") -> Extra:
    """The same check for the API server, in place of `pattern`, whose message would be the bare expression."""
    said = f"is not understood; {remedy}"
    computed = f"'{noun} \"' + {value} + '\" {said}'"
    return rules(rule(f"{value}.matches('{pattern}')", f"the {noun} {said}", computed=computed))


Duration = Annotated[
    str,
    AfterValidator(_checked_duration),
    Field(min_length=2, max_length=24, json_schema_extra=_understood(DURATION_PATTERN, "duration", _DURATION_REMEDY)),
]
"""Kubernetes-style duration in hours, minutes, seconds: "4h", "1h30m", "90s". Whole seconds only."""

Quantity = Annotated[
    str,
    BeforeValidator(_checked_quantity),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            **_understood(QUANTITY_PATTERN, "quantity", _QUANTITY_REMEDY, "string(self)"),
        }
    ),
]
"""Kubernetes resource quantity ("16", "500m", "128Gi"); plain numbers are accepted too."""

DecimalString = Annotated[
    str,
    _matching(_MONEY, "amount", _MONEY_REMEDY),
    Field(min_length=1, max_length=25, json_schema_extra=_understood(_MONEY.pattern, "amount", _MONEY_REMEDY)),
]
"""Non-negative decimal number as a string, e.g. "123.45": money is never a float."""

Currency = Annotated[
    str,
    _matching(_CURRENCY, "currency", _CURRENCY_REMEDY),
    Field(max_length=8, json_schema_extra=_understood(_CURRENCY.pattern, "currency", _CURRENCY_REMEDY)),
]
"""ISO 4217 code, e.g. "RUB", "USD"."""

PROFILES: Final = (
    "full",
    "1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb",
    "1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb",
)  # fmt: skip
"""Shapes that can be rented: a whole GPU, or a MIG profile of an A100 with 40 GB or 80 GB. A test holds this list
against the geometry in ``gpu_tenancy.mig``, which the API may not import."""

Profile = Annotated[str, Field(max_length=16, json_schema_extra={"enum": list(PROFILES)})]
"""`full` or a MIG profile. The API server knows which exist; a newer one than this program is no parse error."""


class ConditionStatus(StrEnum):
    """Value of a condition, as in metav1.Condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class HolderKind(StrEnum):
    """Kinds that can hold a device."""

    GPU_LEASE = "GpuLease"
    MINING_POOL = "MiningPool"


class Holder(ApiModel):
    """Who a device belongs to."""

    kind: HolderKind
    """GpuLease or MiningPool."""
    namespace: str = Field(max_length=63)
    """Namespace of the holder; claims of other namespaces are refused on the device."""
    name: str = Field(max_length=253)
    """Name of the holder."""
    uid: str = Field(max_length=64)
    """UID of the holder: the value of the device's `holder` attribute."""
