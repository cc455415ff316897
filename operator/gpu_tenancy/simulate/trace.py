"""What is asked for, and when: a CSV file with a documented header, or any other CSV through a mapping file.

Every row becomes a request for a lease, or a complaint that names its line; nothing is dropped in silence.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator

from gpu_tenancy.api.base import PROFILES, parse_duration
from gpu_tenancy.api.lease import GpuLeaseSpec, GpusSpec, Term, Tier
from gpu_tenancy.mig.profiles import FULL
from gpu_tenancy.simulate.description import Part, in_words

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""What times that are mere numbers count from."""
HEADER: Final = (
    "name", "namespace", "submitted", "duration", "gpus", "profile", "pods", "tier", "model", "notice",
)  # fmt: skip
"""Columns of a trace: submitted, duration and gpus are needed."""
ENDED: Final = "ended"
"""The column that a mapping may name instead of `duration`: a time."""
NEEDED: Final = ("submitted", "gpus")
LONGEST: Final = 10 * 365 * 86_400
"""Seconds of a term; what is longer is no duration but a mistake."""
T = TypeVar("T")
Unit = Literal["s", "ms", "min", "h", "time", "duration"]
SECONDS: Final[Mapping[str, float]] = {"s": 1.0, "ms": 0.001, "min": 60.0, "h": 3600.0}


class Fractions(Part):
    """A column with the part of one GPU that a row asks for."""

    column: str
    """Its name."""
    whole: float = Field(default=1000, gt=0)
    """The number that stands for a whole GPU."""
    profiles: list[str] = Field(min_length=1)
    """Profiles from the smallest up: a part becomes the first that has as many sevenths, or a whole GPU."""

    @field_validator("profiles")
    @classmethod
    def _are_known(cls, profiles: list[str]) -> list[str]:
        if unknown := [one for one in profiles if one not in PROFILES]:
            raise ValueError(_unknown_profile(unknown[0]))
        return profiles


class Mapped(Part):
    """What the columns of a foreign file are."""

    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Between two fields."""
    columns: dict[str, str] = {name: name for name in HEADER}
    """Name of the file's column, by name of a trace's; also `ended`, where there is a time instead of a duration."""
    units: dict[Literal["submitted", "duration", "ended"], Unit] = {}
    """Of `submitted`, `ended` and `duration`: s (unless set), ms, min, h; `time`: ISO 8601, or `timeFormat`;
    `duration`: 1h30m."""
    time_format: str | None = None
    """As in strptime, of columns with the unit time."""
    constants: dict[str, str] = {}
    """What every row has that no column says, by name of a trace's column."""
    values: dict[str, dict[str, str]] = {}
    """What a column's values mean, by name of a trace's column."""
    gpus_per_pod: int = Field(default=8, ge=1, le=16)
    """A row of more GPUs is a gang of equal pods of at most so many, where no column says how many pods."""
    fractions: Fractions | None = None
    """Parts of a GPU."""

    @field_validator("columns", "constants", "values")
    @classmethod
    def _are_columns(cls, named: dict[str, T]) -> dict[str, T]:
        if unknown := [name for name in named if name not in (*HEADER, ENDED)]:
            raise ValueError(f'a trace has no column "{unknown[0]}"; it has {", ".join((*HEADER, ENDED))}')
        return named

    @classmethod
    def load(cls, path: Path) -> Self:
        """A mapping from a file. Raises ValueError with a sentence that names the file and the field."""
        try:
            values = yaml.safe_load(path.read_text())
            if not isinstance(values, dict):
                raise ValueError(f"{path} is not a mapping: write `columns:` and, under it, trace column: its column")  # noqa: TRY004
            return cls.model_validate(values)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        except ValidationError as error:
            raise ValueError(f"{path}: {in_words(error)}") from error


class Request(NamedTuple):
    """A lease that is asked for."""

    line: int
    name: str
    namespace: str
    submitted: datetime
    spec: GpuLeaseSpec


class Complaint(NamedTuple):
    """A row that is no request."""

    line: int
    why: str
    """A sentence."""


class Trace(NamedTuple):
    """What is asked for, in order of time, and the rows that could not be read."""

    requests: tuple[Request, ...]
    complaints: tuple[Complaint, ...]


class _RowError(ValueError):
    """A row cannot be read."""


def read(path: Path, mapped: Mapped | None = None) -> Trace:
    """A trace from a file. Raises ValueError where the file as a whole is none: no header, a column is missing."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return parse(file, mapped or Mapped(), str(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not CSV: {error}") from error


def parse(lines: Iterable[str], mapped: Mapped, name: str = "the trace") -> Trace:
    """A trace from the lines of a file."""
    rows = csv.reader(lines, delimiter=mapped.delimiter)
    header = next(rows, None)
    if header is None:
        raise ValueError(f"{name} is empty; its first line names the columns: {', '.join(HEADER)}")
    reader = _Reader(_positions(header, mapped, name), len(header), mapped)
    requests: list[Request] = []
    complaints: list[Complaint] = []
    for row in rows:
        if not any(row):
            continue  # an empty line is no row
        try:
            requests.append(reader.request(rows.line_num, row))
        except _RowError as error:
            complaints.append(Complaint(rows.line_num, str(error)))
    requests.sort(key=lambda one: (one.submitted, one.line))
    return Trace(tuple(requests), tuple(complaints))


def _positions(header: list[str], mapped: Mapped, name: str) -> dict[str, int]:
    """Where each column of a trace stands in a row."""
    there = {title.strip(): number for number, title in enumerate(header)}
    optional = mapped.columns == Mapped().columns
    found = {ours: there[theirs] for ours, theirs in mapped.columns.items() if theirs in there}
    missing = [] if optional else [theirs for theirs in mapped.columns.values() if theirs not in there]
    missing += [ours for ours in NEEDED if ours not in found and ours not in mapped.constants and not missing]
    if mapped.fractions and mapped.fractions.column not in there:
        missing.append(mapped.fractions.column)
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; it has {', '.join(there)}")
    if mapped.fractions:
        found["part"] = there[mapped.fractions.column]
    return found


class _Reader:
    """Rows of one file to requests."""

    def __init__(self, positions: Mapping[str, int], width: int, mapped: Mapped) -> None:
        self._positions, self._width, self._mapped = positions, width, mapped
        self._names: set[tuple[str, str]] = set()
        self._specs: dict[tuple[object, ...], GpuLeaseSpec] = {}

    def request(self, line: int, row: list[str]) -> Request:
        """What a row asks for."""
        if len(row) != self._width:
            raise _RowError(f"it has {len(row)} fields, and the header {self._width}")
        fields = self._fields(row)
        submitted = self._time(fields, "submitted")
        spec = self._spec(fields, self._duration(fields, submitted))
        namespace = _label(fields.get("namespace") or "default")
        name = _label(fields.get("name") or f"job-{line}")
        if (namespace, name) in self._names:
            raise _RowError(f"lease {namespace}/{name} is there already; give each row its own name")
        self._names.add((namespace, name))
        return Request(line, name, namespace, submitted, spec)

    def _fields(self, row: list[str]) -> dict[str, str]:
        fields = dict(self._mapped.constants)
        for name, position in self._positions.items():
            if text := row[position].strip():
                fields[name] = text
        for name, meant in self._mapped.values.items():
            if name in fields:
                fields[name] = meant.get(fields[name], fields[name])
        return fields

    def _time(self, fields: Mapping[str, str], name: str) -> datetime:
        text, unit = fields.get(name), self._mapped.units.get(name, "s")  # type: ignore[call-overload]  # its keys
        if text is None:
            raise _RowError(f"{name} is empty")
        if unit == "time" or (unit == "s" and not _is_number(text)):
            return self._instant(name, text)
        try:
            return EPOCH + timedelta(seconds=_number(name, text) * SECONDS[unit])
        except OverflowError as error:
            raise _RowError(f'{name} "{text}" is beyond all times') from error

    def _instant(self, name: str, text: str) -> datetime:
        form = self._mapped.time_format
        try:
            found = datetime.strptime(text, form) if form else datetime.fromisoformat(text)  # noqa: DTZ007  (below)
        except ValueError as error:
            raise _RowError(f'{name} "{text}" is no time; write 2026-01-31T12:00:00Z, or seconds') from error
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)

    def _duration(self, fields: Mapping[str, str], submitted: datetime) -> int | None:
        """Whole seconds; None where the lease runs until it is deleted, which is to the end of the simulation."""
        if ENDED in fields:
            seconds = (self._time(fields, ENDED) - submitted).total_seconds()
        elif (text := fields.get("duration")) is None:
            return None
        elif (unit := self._mapped.units.get("duration", "s")) == "duration" or not _is_number(text):
            seconds = _length(text)
        else:
            seconds = _number("duration", text) * SECONDS[unit]
        if not 0 < seconds <= LONGEST:
            raise _RowError(f"its duration is {seconds:g} s; it must be longer than zero, and no longer than ten years")
        return math.ceil(seconds)

    def _spec(self, fields: Mapping[str, str], duration: int | None) -> GpuLeaseSpec:
        profile, count, pods = self._shape(fields)
        tier, model, notice = fields.get("tier", Tier.ON_DEMAND), fields.get("model"), fields.get("notice")
        key = (profile, count, pods, tier, model, notice, duration)
        if key not in self._specs:
            self._specs[key] = _lease_spec(profile, count, pods, fields, duration)
        return self._specs[key]

    def _shape(self, fields: Mapping[str, str]) -> tuple[str, int, int]:
        """Profile, GPUs per pod, pods."""
        asked = _whole("gpus", fields.get("gpus"))
        if asked == 0:
            raise _RowError("it asks for no GPU")
        profile = fields.get("profile") or self._part(fields, asked)
        if profile not in PROFILES:
            raise _RowError(_unknown_profile(profile))
        if "pods" in fields:
            return profile, asked, _whole("pods", fields["pods"])
        if profile != FULL:
            return profile, 1, asked
        pods = next(n for n in range(math.ceil(asked / self._mapped.gpus_per_pod), asked + 1) if asked % n == 0)
        return profile, asked // pods, pods

    def _part(self, fields: Mapping[str, str], asked: int) -> str:
        """The profile of a row that asks for a part of one GPU."""
        parts = self._mapped.fractions
        if parts is None or "part" not in fields or asked > 1:
            return FULL
        share = _number(parts.column, fields["part"]) / parts.whole
        fitting = (one for one in parts.profiles if share <= _sevenths(one) / 7)
        return next(fitting, FULL) if share < 1 else FULL


def _unknown_profile(name: str) -> str:
    return f'profile "{name}" is not known; there are {", ".join(PROFILES)}'


def _lease_spec(profile: str, count: int, pods: int, fields: Mapping[str, str], duration: int | None) -> GpuLeaseSpec:
    tier = fields.get("tier", Tier.ON_DEMAND)
    try:
        return GpuLeaseSpec(
            gpus=GpusSpec(profile=profile, count=count, model=fields.get("model")),
            pods=pods,
            tier=Tier(tier),
            term=Term(
                duration=None if duration is None else f"{duration}s",
                notice="0s",
                preemption_notice=fields.get("notice") if tier == Tier.SPOT else None,
            ),
        )
    except ValidationError as error:
        raise _RowError(in_words(error)) from error
    except ValueError as error:
        raise _RowError(f'tier "{tier}" is not known; there are {", ".join(Tier)}') from error


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(name: str, text: str) -> float:
    if not _is_number(text) or float(text) < 0:
        raise _RowError(f'{name} "{text}" is no number of zero or more')
    return float(text)


def _whole(name: str, text: str | None) -> int:
    if text is None:
        raise _RowError(f"{name} is empty")
    value = _number(name, text)
    if not value.is_integer():
        raise _RowError(f'{name} "{text}" is no whole number')
    return int(value)


def _length(text: str) -> float:
    try:
        return parse_duration(text).total_seconds()
    except ValueError as error:
        raise _RowError(str(error)) from error


def _sevenths(profile: str) -> int:
    return 7 if profile == FULL else int(profile.partition("g")[0])


_NO_LABEL: Final = re.compile(r"[^a-z0-9-]+")


def _label(text: str) -> str:
    """The text as the name of a Kubernetes object."""
    name = _NO_LABEL.sub("-", text.lower())[:63].strip("-")
    if not name:
        raise _RowError(f'"{text}" makes no name')
    return name


def by_line(complaints: Iterable[Complaint]) -> Iterator[str]:
    """Complaints as sentences."""
    return (f"line {one.line}: {one.why}." for one in complaints)
