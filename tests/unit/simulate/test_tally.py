"""A tally: every slice-microsecond counts once, in one state and one stretch, however often stretches are joined."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import Price, Reason, Tier
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.simulate.room import Room
from gpu_tenancy.simulate.tally import MICROSECOND, MOST_POINTS, Tally

BEGAN: Final = datetime(2026, 1, 1, tzinfo=UTC)
ROOM: Final = Room({"full": 8}, 8, 1)
STATES: Final = (SliceState.LEASED, SliceState.MINING, SliceState.HAND_OVER, SliceState.IDLE)


def segment(number: int = 1, *, price: str | None = None) -> UsageRecordSpec:
    """A segment of a lease of two whole GPUs."""
    return UsageRecordSpec(
        contract="lease",
        segment=number,
        lease_namespace="team",
        lease_name="l",
        tier=Tier.ON_DEMAND,
        model="A100-SXM4-80GB",
        profile="full",
        devices=[BilledDevice(device=f"gpu{index}", gpu=f"GPU-{index}", node="n") for index in range(2)],
        price=None if price is None else Price(currency="USD", per_hour=price, book="b"),
        billable_from=BEGAN,
    )


WAITS: Final = st.sampled_from(
    [timedelta(0), MICROSECOND, timedelta(seconds=1.1), timedelta(hours=7), timedelta(days=30)]
)


@given(st.lists(st.tuples(WAITS, st.integers(0, 3), st.lists(st.integers(0, 8), min_size=4, max_size=4)), max_size=30))
def test_every_slice_microsecond_is_in_one_state_and_one_stretch(steps: list[tuple[timedelta, int, list[int]]]) -> None:
    tally, hands = Tally(BEGAN), {place: {SliceState.IDLE: 8} for place in range(4)}
    expected = dict.fromkeys(STATES, 0)
    for place, slices in hands.items():
        tally.has(("n", str(place)), slices)
    for passes, place, numbers in steps:
        for slices in hands.values():
            for state, number in slices.items():
                expected[state] += number * (passes // MICROSECOND)
        tally.advance(tally.now + passes, lambda: ROOM)
        hands[place] = dict(zip(STATES, numbers, strict=True))
        tally.has(("n", str(place)), hands[place])
    assert {state: tally.states[state] for state in STATES} == expected
    assert {state: sum(point.states[state] for point in tally.points) for state in STATES} == expected
    assert len(tally.points) <= MOST_POINTS
    assert tally.now - BEGAN <= len(tally.points) * tally.width


def test_stretches_are_joined_in_pairs_when_there_are_too_many() -> None:
    tally = Tally(BEGAN)
    tally.advance(BEGAN + MOST_POINTS * tally.width, lambda: ROOM)
    assert (tally.width, len(tally.points)) == (timedelta(minutes=1), MOST_POINTS)
    tally.advance(tally.now + MICROSECOND, lambda: ROOM)
    assert (tally.width, len(tally.points)) == (timedelta(minutes=2), MOST_POINTS // 2 + 1)


def test_what_there_is_room_for_is_found_out_once_for_a_time_in_which_nothing_changes() -> None:
    asked = []

    def room() -> Room:
        asked.append(True)
        return ROOM

    Tally(BEGAN).advance(BEGAN + timedelta(days=3), room)
    assert len(asked) == 1


def test_leases_wait_from_being_asked_for_until_they_are_billed_or_refused() -> None:
    tally = Tally(BEGAN)
    for _ in range(2):
        tally.asked(Tier.ON_DEMAND, "team", 600)
    tally.advance(BEGAN + timedelta(seconds=10), lambda: ROOM)
    tally.opened(segment(), "team", timedelta(seconds=10))
    tally.advance(BEGAN + timedelta(seconds=30), lambda: ROOM)
    tally.refused(Tier.ON_DEMAND, "team")
    tally.advance(BEGAN + timedelta(seconds=40), lambda: ROOM)
    assert sum(point.waiting for point in tally.points) == (2 * 10 + 20) * 1_000_000
    [side] = tally.sides.values()
    assert (side.asked, side.started, side.refused, side.waits) == (2, 1, 1, [10.0])
    assert side.asked_slice_seconds == 1200


def test_a_lease_that_lost_its_devices_waits_again_and_its_next_segment_is_no_second_start() -> None:
    tally = Tally(BEGAN)
    tally.asked(Tier.ON_DEMAND, "team", 600)
    tally.opened(segment(), "team", timedelta())
    for reason, number in ((Reason.PREEMPTED, 2), (Reason.NODE_LOST, 3)):
        tally.closed(segment(number - 1), 5, reason, "team")
        tally.advance(tally.now + timedelta(seconds=7), lambda: ROOM)
        tally.opened(segment(number), "team", timedelta(seconds=7))
    tally.closed(segment(3), 5, Reason.EXPIRED, "team")
    tally.advance(tally.now + timedelta(seconds=7), lambda: ROOM)
    [side] = tally.sides.values()
    assert (side.started, side.ended, side.preempted, side.lost, side.waits) == (1, 1, 1, 1, [0.0])
    assert sum(point.waiting for point in tally.points) == 2 * 7 * 1_000_000


def test_money_is_summed_before_it_is_divided() -> None:
    tally = Tally(BEGAN)
    for _ in range(3):
        tally.opened(segment(price="0.01"), "team", timedelta())
        tally.closed(segment(price="0.01"), 1, Reason.EXPIRED, "team")
    [side] = tally.sides.values()
    assert {currency: str(amount) for currency, amount in side.money.items()} == {"USD": "0.06"}
    assert side.slice_seconds == 3 * 2 * 8
