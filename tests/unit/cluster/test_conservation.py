"""The conservation law as tests and the demo hold it: what keeps it, and that each way of breaking it is told."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import Tier
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.slices import SliceState
from tests.cluster.conservation import DELIVERY_SECONDS, Reading, Stand, breaches, sampling_seconds

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
BOUNDS = (0.05, 0.1, 0.25, float("inf"))
NOTHING = dict.fromkeys(map(str, SliceState), 0.0)


def reading(states: Mapping[str, float], cycles: tuple[float, ...] = (10, 20, 20, 20)) -> Reading:
    return Reading({**NOTHING, **states}, dict(zip(BOUNDS, cycles, strict=True)), 0.0, 0.0)


BEFORE = reading({"leased": 1000.0}, (0, 0, 0, 0))
LAG = 0.1 + DELIVERY_SECONDS
"""No cycle took longer than 0.1 s."""


def stand(seconds: int, seconds_open: float, lease: str = "train", begin: int = 0) -> Stand:
    """Two whole GPUs: 16 slices."""
    start = START + timedelta(seconds=begin)
    segment = UsageRecordSpec(
        contract=lease,
        segment=1,
        lease_namespace="team-a",
        lease_name=lease,
        tier=Tier.ON_DEMAND,
        model="A100-SXM4-80GB",
        profile="full",
        devices=[BilledDevice(node="a", device=f"gpu{index}-9f2c41", gpu=f"GPU-{index}") for index in range(2)],
        billable_from=start,
        billable_to=start + timedelta(seconds=seconds),
        seconds=seconds,
    )
    return Stand(segment, seconds_open)


def told(leased: float, *segments: Stand, contested: float = 0.0) -> list[str]:
    return breaches(BEFORE, reading({"leased": 1000.0 + leased, "contested": contested}), segments)


@given(
    seconds=st.integers(1, 100),
    free=st.floats(0, 1.99),
    late=st.floats(-0.99 * LAG, 0.99 * LAG),
    noticed=st.floats(-0.99 * LAG, 0.99 * LAG),
)
def test_whole_seconds_and_cycles_that_come_late_keep_the_law(
    seconds: int, free: float, late: float, noticed: float
) -> None:
    one = stand(seconds, seconds + free + late)
    assert told(one.width * (one.seconds_open + noticed), one) == []


def test_several_segments_are_counted_together() -> None:
    first, second = stand(10, 11.0), stand(20, 21.5, "other", begin=10)
    assert told(16 * (11.0 + 21.5), first, second) == []


def test_a_contested_slice_breaks_it_however_short() -> None:
    assert told(16 * 10.5, stand(10, 10.5), contested=0.1) == ["0.1 slice-seconds were contested"]


def test_two_records_that_bill_the_same_gpus_break_it() -> None:
    first, second = stand(10, 10.5), stand(10, 10.5, "other", begin=9)
    assert told(16 * 21.0, first, second) == [
        "records train-1 and other-1 both bill GPU-0",
        "records train-1 and other-1 both bill GPU-1",
    ]


def test_a_segment_that_is_billed_for_longer_than_its_record_stood_open_breaks_it() -> None:
    assert told(16 * 9.0, stand(10, 9.0)) == [
        "train is billed 10 s, but its record stood open for 9.00 s (6.65 to 9.35 s were due)"
    ]


def test_a_segment_that_leaves_out_more_than_its_started_seconds_breaks_it() -> None:
    assert told(16 * 13.0, stand(10, 13.0)) == [
        "train is billed 10 s, but its record stood open for 13.00 s (10.65 to 13.35 s were due)"
    ]


@pytest.mark.parametrize("seconds", [10.0, 11.0])
def test_slices_that_are_counted_as_leased_for_another_time_than_they_are_billed_break_it(seconds: float) -> None:
    [sentence] = told(16 * seconds, stand(10, 10.5))
    assert sentence.startswith(f"{16 * seconds:.1f} slice-seconds were counted as leased; records stood open for 168.0")


def test_a_whole_gpu_that_nobody_is_billed_for_breaks_it() -> None:
    assert told(8.0) == ["8.0 slice-seconds were counted as leased; records stood open for 0.0, ± 0.0"]


def test_the_metric_may_be_as_late_as_the_longest_cycle_between_the_readings() -> None:
    earlier = reading({}, (0, 0, 0, 1))  # a first cycle that took very long is over
    assert sampling_seconds(earlier, reading({}, (10, 20, 20, 21))) == pytest.approx(0.1 + DELIVERY_SECONDS)
    assert sampling_seconds(earlier, reading({}, (10, 20, 25, 26))) == pytest.approx(0.25 + DELIVERY_SECONDS)


def test_a_cycle_longer_than_can_be_told_excuses_no_more_than_the_longest_that_can() -> None:
    assert sampling_seconds(BEFORE, reading({}, (1, 1, 1, 2))) == pytest.approx(0.25 + DELIVERY_SECONDS)
