"""Durations, quantities, amounts and times: what is understood, what it means, and what is refused how."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gpu_tenancy.api.base import (
    Currency,
    DecimalString,
    Duration,
    Message,
    MicroTime,
    Quantity,
    ShortMessage,
    Time,
    format_duration,
    format_micro_time,
    format_time,
    parse_duration,
    parse_quantity,
)

SECONDS = st.integers(min_value=0, max_value=99_999 * 3600)


@given(SECONDS)
def test_a_formatted_duration_is_parsed_as_the_same_length(seconds: int) -> None:
    assert parse_duration(format_duration(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@given(
    hours=st.integers(0, 99_999),
    minutes=st.integers(0, 9_999_999),
    seconds=st.integers(0, 999_999_999),
)
def test_a_duration_is_the_sum_of_its_parts(hours: int, minutes: int, seconds: int) -> None:
    expected = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == expected


@given(SECONDS, SECONDS)
def test_longer_durations_have_no_shorter_reading(one: int, other: int) -> None:
    texts = [format_duration(timedelta(seconds=seconds)) for seconds in sorted((one, other))]
    assert parse_duration(texts[0]) <= parse_duration(texts[1])


@pytest.mark.parametrize(("length", "text"), [(0, "0s"), (90, "1m30s"), (3600, "1h"), (5400, "1h30m"), (86_400, "24h")])
def test_durations_are_written_shortest(length: int, text: str) -> None:
    assert format_duration(timedelta(seconds=length)) == text


@pytest.mark.parametrize("text", ["", "4", "h", "4 h", "1m1h", "-1h", "1.5h", "1d", "4h\n", "٤h", "100000h", "1h1h"])
def test_what_is_no_duration_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="write hours, minutes and seconds in that order"):
        parse_duration(text)


def test_models_refuse_a_duration_in_the_same_words() -> None:
    with pytest.raises(ValidationError, match='duration "1 day" is not understood; write hours, minutes and seconds'):
        TypeAdapter(Duration).validate_python("1 day")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", "16"),
        ("500m", "0.5"),
        ("1.5Gi", str(3 * 2**29)),
        ("128Gi", str(2**37)),
        ("1k", "1000"),
        ("2e3", "2000"),
        ("1.5E3", "1500"),
        ("1E", str(10**18)),
        ("100n", "1e-7"),
    ],
)
def test_quantities_mean_what_kubernetes_means(text: str, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@given(st.integers(0, 10**9), st.sampled_from(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]))
def test_a_binary_suffix_is_a_power_of_1024(number: int, suffix: str) -> None:
    power = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].index(suffix) + 1
    assert parse_quantity(f"{number}{suffix}") == number * 1024**power


@given(st.integers(0, 10**15))
def test_a_plain_number_is_the_quantity_that_it_is_as_text(number: int) -> None:
    assert TypeAdapter(Quantity).validate_python(number) == str(number)
    assert parse_quantity(number) == parse_quantity(str(number)) == number


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1 Gi", "Gi", "1gi", "1.", ".5", "1e", "two", "1e3Ki", "1Gi\n", "NaN"]
)
def test_what_is_no_quantity_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match="write a number with an optional suffix"):
        parse_quantity(text)


@pytest.mark.parametrize("value", [True, None, ["1"], {"cpu": "1"}, -1])
def test_models_refuse_what_is_no_quantity(value: object) -> None:
    with pytest.raises(ValidationError, match="is not understood; write a number with an optional suffix"):
        TypeAdapter(Quantity).validate_python(value)


@pytest.mark.parametrize("text", ["0", "145.00", "999999999999.999999999999"])
def test_amounts_are_plain_decimal_numbers(text: str) -> None:
    assert TypeAdapter(DecimalString).validate_python(text) == text


@pytest.mark.parametrize("text", ["-1", "1e3", "1,5", "1.", ".5", "145 RUB", "1\n", "1234567890123"])
def test_other_amounts_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValidationError, match="write a decimal number in quotes, without sign, exponent or currency"):
        TypeAdapter(DecimalString).validate_python(text)


@pytest.mark.parametrize("text", ["rub", "RUBLES", "RU", "R1B", "RUB\n"])
def test_currencies_that_are_no_codes_are_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValidationError, match="write the three capital letters of ISO 4217"):
        TypeAdapter(Currency).validate_python(text)


INSTANTS = st.datetimes(
    min_value=datetime(1970, 1, 1), max_value=datetime(9999, 1, 1), timezones=st.just(UTC)  # noqa: DTZ001 — hypothesis adds it
)  # fmt: skip


@given(INSTANTS)
def test_a_micro_time_survives_the_wire(instant: datetime) -> None:
    assert TypeAdapter(MicroTime).validate_python(format_micro_time(instant)) == instant


@given(INSTANTS)
def test_a_time_survives_the_wire_to_the_second(instant: datetime) -> None:
    assert TypeAdapter(Time).validate_python(format_time(instant)) == instant.replace(microsecond=0)


@given(INSTANTS, st.integers(-14 * 60, 14 * 60))
def test_a_time_is_the_same_instant_in_every_zone(instant: datetime, minutes: int) -> None:
    elsewhere = instant.replace(year=2026).astimezone(timezone(timedelta(minutes=minutes)))
    read = TypeAdapter(Time).validate_python(elsewhere.isoformat())
    assert read == elsewhere
    assert read.tzinfo is UTC


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00"])
def test_a_time_beyond_what_utc_can_hold_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValidationError, match="within the years 1 to 9999 of UTC; write it as UTC with a trailing Z"):
        TypeAdapter(Time).validate_python(text)


@pytest.mark.parametrize(("kind", "limit"), [(TypeAdapter(Message), 1024), (TypeAdapter(ShortMessage), 512)])
def test_a_message_is_cut_to_what_the_api_takes(kind: TypeAdapter[str], limit: int) -> None:
    assert kind.validate_python("x" * limit) == "x" * limit
    assert kind.validate_python("x" * (limit + 1)) == "x" * (limit - 1) + "…"


@pytest.mark.parametrize("value", ["2026-01-01T00:00:00", datetime(2026, 1, 1)])  # noqa: DTZ001 — that is the point
def test_a_time_without_a_zone_is_refused_with_the_remedy(value: object) -> None:
    with pytest.raises(ValidationError, match="has no time zone; write it as UTC with a trailing Z"):
        TypeAdapter(Time).validate_python(value)
