"""The past of a simulation: running sums that are what adding up all closed segments anew would come to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import Tier
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.snapshot import NO_PAST
from gpu_tenancy.core.tenancy import decayed, faded
from gpu_tenancy.simulate.past import Past

BEGAN: Final = datetime(2026, 1, 1, tzinfo=UTC)
HALF_LIFE: Final = timedelta(hours=1)


def segment(namespace: str, begins: datetime, seconds: int, *, closed: bool = True) -> UsageRecordSpec:
    return UsageRecordSpec(
        contract="lease",
        segment=1,
        lease_namespace=namespace,
        lease_name="l",
        tier=Tier.ON_DEMAND,
        model="A100-SXM4-80GB",
        profile="full",
        devices=[BilledDevice(device="gpu0", gpu="GPU-0", node="n")],
        billable_from=begins,
        billable_to=begins + timedelta(seconds=seconds) if closed else None,
    )


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300_000), st.integers(1, 90_000)), min_size=1, max_size=20)
)
def test_the_sums_are_those_of_all_segments(drawn: list[tuple[str, int, int]]) -> None:
    past, gaps = Past(HALF_LIFE), BEGAN
    segments = []
    for namespace, gap, seconds in drawn:
        segments.append(segment(namespace, gaps + timedelta(seconds=gap), seconds))
        gaps = segments[-1].billable_to or gaps
    for one in segments:
        past.note(one)
    at = gaps + timedelta(hours=5)
    for namespace in {one.lease_namespace for one in segments}:
        usage = past.usage()
        found = faded(usage.slice_seconds[namespace], usage.at, at, HALF_LIFE)
        whole = sum(
            decayed(8, one.billable_from, one.billable_to or at, at, HALF_LIFE)
            for one in segments
            if one.lease_namespace == namespace
        )
        assert found == pytest.approx(whole, rel=1e-6, abs=1e-6)


def test_the_same_object_until_another_segment_is_closed() -> None:
    past = Past(HALF_LIFE)
    assert past.usage() is NO_PAST
    past.note(segment("a", BEGAN, 60))
    first = past.usage()
    assert past.usage() is first
    past.note(segment("a", BEGAN, 60))
    assert past.usage() is not first


def test_an_open_segment_is_not_past() -> None:
    with pytest.raises(AssertionError, match="an open segment is not past"):
        Past(HALF_LIFE).note(segment("a", BEGAN, 60, closed=False))
