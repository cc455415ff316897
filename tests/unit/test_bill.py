"""The bill that the demo makes of UsageRecords: whole seconds, exact money, one rounding for each line."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core import ledger
from tests.cluster import bill
from tests.cluster.api import Object

BEGAN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def record(
    lease: str = "train", seconds: int | None = 60, *, devices: int = 1, rate: str | None = "145.00", segment: int = 1
) -> Object:
    """A UsageRecord; open where `seconds` is None, unpriced where `rate` is."""
    spec: Object = {
        "contract": f"1f0c9a2e-{lease}",
        "segment": segment,
        "leaseNamespace": "team-a",
        "leaseName": lease,
        "tier": "OnDemand",
        "model": "A100-SXM4-80GB",
        "profile": "full",
        "devices": [{"node": "n", "device": f"d{index}", "gpu": f"GPU-{index}"} for index in range(devices)],
        "billableFrom": format_time(BEGAN),
    }
    if rate is not None:
        spec["price"] = {"perHour": rate, "currency": "RUB", "book": "list"}
    if seconds is not None:
        end = format_time(BEGAN + timedelta(seconds=seconds))
        spec |= {"billableTo": end, "seconds": seconds, "reason": "Completed"}
    return {"spec": spec}


def one(of: Object, now: datetime = BEGAN) -> bill.Line:
    [line] = bill.lines([of], now)
    return line


@pytest.mark.parametrize(
    ("rate", "seconds", "amount"),
    [
        ("145.00", 24, "0.97"),  # 0.9666…
        ("18.00", 1, "0.00"),  # 0.005, and 0 is even
        ("18.00", 3, "0.02"),  # 0.015, and 2 is even
        ("18.00", 5, "0.02"),  # 0.025, and 2 is even
        ("145.00", 3600, "145.00"),
    ],
)
def test_a_line_is_rounded_half_to_even_once(rate: str, seconds: int, amount: str) -> None:
    assert f"{one(record(seconds=seconds, rate=rate)).amount}" == amount


def test_devices_are_multiplied_before_the_rounding() -> None:
    assert one(record(seconds=1, devices=4, rate="18.00")).amount == Decimal("0.02")


def test_an_open_segment_costs_what_has_passed() -> None:
    line = one(record(seconds=None), BEGAN + timedelta(seconds=90, milliseconds=900))
    assert (line.seconds, line.ended, line.amount) == (90, None, Decimal("3.62"))


def test_a_segment_that_begins_in_a_moment_costs_nothing_yet() -> None:
    assert one(record(seconds=None), BEGAN - timedelta(seconds=1)).seconds == 0


def test_an_unpriced_segment_costs_nothing() -> None:
    assert one(record(rate=None)).amount == 0


def test_the_total_and_the_sums_by_lease_are_of_rounded_lines() -> None:
    records = [record(seconds=24), record(seconds=24, segment=2), record("other", 3600)]
    lines = bill.lines(records, BEGAN)
    assert bill.by_lease(lines) == {"train": Decimal("1.94"), "other": Decimal("145.00")}
    assert bill.total(lines) == Decimal("146.94")


def test_the_table_fits_a_small_terminal_and_names_every_figure() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(bill.table(bill.lines([record("a" * 12, 86_399, devices=12)], BEGAN)))
    heading, line, total = captured.get().splitlines()
    assert heading.split() == ["contract", "lease", "profile", "×", "from", "to", "s", "per", "hour", "amount", "RUB"]
    assert line.split() == [
        "1f0c9a2e-1", "a" * 12, "full", "12", "12:00:00", "11:59:59", "86399", "145.00", "41759.52",
    ]  # fmt: skip
    assert total.split() == ["total", "41759.52"]


@given(
    seconds=st.none() | st.integers(0, 10**6),
    devices=st.integers(1, 16),
    cents=st.integers(0, 10**6),
    passed=st.integers(0, 10**6),
)
def test_it_agrees_with_the_operators_running_cost(seconds: int | None, devices: int, cents: int, passed: int) -> None:
    of = record(seconds=seconds, devices=devices, rate=f"{Decimal(cents) / 100:.2f}")
    now = BEGAN + timedelta(seconds=passed)
    cost = ledger.running_cost([UsageRecordSpec.model_validate(of["spec"])], now)
    assert cost is not None
    assert (f"{one(of, now).amount:f}", one(of, now).seconds) == (cost.amount, cost.seconds)
