"""Seconds, money and slices: the arithmetic by itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseStatus, Price, Tier
from gpu_tenancy.api.node import ObservedSlot, Slot, SlotState
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core import ledger, slices
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.ledger import DoubleBilling
from gpu_tenancy.core.slices import SliceState, slice_states
from gpu_tenancy.core.snapshot import Key, LeaseFacts, NodeFacts, RecordFacts
from gpu_tenancy.core.terms import ceil_second, floor_second, seconds_between
from gpu_tenancy.mig.profiles import of_model
from tests.unit.core.builders import MODEL, START, gpus, lease_spec

INSTANTS = st.datetimes(START.replace(tzinfo=None), START.replace(tzinfo=None, year=2027)).map(
    lambda naive: naive.replace(tzinfo=START.tzinfo)
)
PRICE = Price(per_hour="145.00", currency="USD", book="book")


def segment(start: datetime, seconds: int | None, price: Price | None = PRICE, devices: int = 1) -> UsageRecordSpec:
    return UsageRecordSpec(
        contract="contract",
        segment=1,
        lease_namespace="team",
        lease_name="train",
        tier=Tier.ON_DEMAND,
        model=MODEL,
        profile="full",
        devices=[BilledDevice(node="a", device=f"gpu{index}", gpu=f"GPU-{index}") for index in range(devices)],
        price=price,
        billable_from=start,
        billable_to=None if seconds is None else start + timedelta(seconds=seconds),
        seconds=seconds,
    )


@given(instant=INSTANTS)
def test_started_seconds_are_never_charged(instant: datetime) -> None:
    second = timedelta(seconds=1)
    assert instant - second < floor_second(instant) <= instant <= ceil_second(instant) < instant + second


@given(start=INSTANTS.map(floor_second), end=INSTANTS)
def test_a_segment_never_ends_before_it_began_nor_after_its_end(start: datetime, end: datetime) -> None:
    billable_to, seconds = ledger.segment_end(RecordFacts("team", "r", segment(start, None)), end)
    assert billable_to == start + timedelta(seconds=seconds)
    assert seconds == 0 if end < start else billable_to <= end
    assert seconds_between(start, end) == seconds


def test_a_segment_never_begins_inside_the_one_before_whatever_the_clock_says() -> None:
    """Another operator takes over, and its clock is behind."""
    earlier = RecordFacts("team", "r", segment(START, 100))
    facts = LeaseFacts(Key("team", "train"), "uid", 1, START, lease_spec(), GpuLeaseStatus(), records=(earlier,))
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace="team", name="train", uid="uid")
    slot = Slot(device="new", gpu="GPU-a-0", profile="full", holder=holder, since=START + timedelta(seconds=40))
    node = NodeFacts("a", 1, tuple(gpus("a", 1)), (slot,), ())
    now = START + timedelta(seconds=50)
    assert ledger.segment_start([(node, slot)], [now], facts, now) == START + timedelta(seconds=100)


@given(price=st.decimals("0", "99999", places=4), devices=st.integers(1, 1024), seconds=st.integers(0, 10**8))
def test_an_amount_is_exact(price: Decimal, devices: int, seconds: int) -> None:
    exact = ledger.amount(Price(per_hour=f"{price:f}", currency="USD", book="b"), devices, seconds)
    assert abs(exact * 3600 - price * devices * seconds) < Decimal("1e-6")


@given(parts=st.lists(st.integers(0, 10_000), min_size=1, max_size=8))
def test_the_running_cost_of_segments_is_rounded_once(parts: list[int]) -> None:
    cost = ledger.running_cost([segment(START, seconds) for seconds in parts], START)
    assert cost is not None
    assert cost.seconds == sum(parts)
    assert cost.amount == str((Decimal("145.00") * sum(parts) / 3600).quantize(Decimal("0.01")))


def test_half_a_cent_goes_to_the_even_cent() -> None:
    half = Price(per_hour="18.00", currency="USD", book="b")
    amounts = [ledger.running_cost([segment(START, seconds, half)], START) for seconds in (1, 3)]
    assert [cost.amount for cost in amounts if cost] == ["0.00", "0.02"]


def test_an_open_segment_costs_up_to_now_and_an_unpriced_one_nothing() -> None:
    now = START + timedelta(seconds=36, microseconds=900_000)
    cost = ledger.running_cost([segment(START, None, devices=2)], now)
    assert cost is not None
    assert (cost.amount, cost.seconds, cost.as_of) == ("2.90", 36, floor_second(now))
    assert ledger.running_cost([segment(START, None, None)], now) is None
    assert ledger.running_cost([], now) is None


# --- the same slices billed twice ---------------------------------------------------------------------------------


def slice_segment(contract: str, gpu: int, profile: str, start: int, begin: int, end: int | None) -> UsageRecordSpec:
    """One device for some seconds after START."""
    name = device_name(gpu, profile, start, contract, 1)
    return segment(START + timedelta(seconds=begin), None if end is None else end - begin).model_copy(
        update={
            "contract": contract,
            "profile": profile,
            "devices": [BilledDevice(node="a", device=name, gpu=f"GPU-{gpu}")],
        }
    )


def doubles(*segments: UsageRecordSpec) -> list[tuple[str, str]]:
    return [(one.first, one.second) for one in ledger.double_billings(segments)]


def test_two_leases_billed_for_one_gpu_at_the_same_time_are_found() -> None:
    first, second = (slice_segment("a", 0, "full", 0, 0, 10), slice_segment("b", 0, "full", 0, 9, None))
    assert list(ledger.double_billings([second, first])) == [
        DoubleBilling("a-1", "b-1", "GPU-0", START + timedelta(seconds=9), START + timedelta(seconds=10))
    ]


def test_two_open_segments_have_no_end_of_their_overlap() -> None:
    first, second = (slice_segment("a", 0, "full", 0, 0, None), slice_segment("b", 0, "3g.40gb", 4, 5, None))
    assert [one.until for one in ledger.double_billings([first, second])] == [None]


def test_a_segment_that_has_a_device_twice_bills_it_twice() -> None:
    one = slice_segment("a", 0, "full", 0, 0, 10)
    assert doubles(one.model_copy(update={"devices": one.devices * 2})) == [("a-1", "a-1")]


def test_neighbours_successors_and_empty_segments_bill_nothing_twice() -> None:
    assert not doubles(
        slice_segment("left", 0, "4g.40gb", 0, 0, None),
        slice_segment("right", 0, "3g.40gb", 4, 0, 10),
        slice_segment("successor", 0, "3g.40gb", 4, 10, None),
        slice_segment("empty", 0, "3g.40gb", 4, 20, 20),
        slice_segment("elsewhere", 1, "full", 0, 0, None),
    )


def test_a_record_and_its_archived_copy_are_one_segment() -> None:
    one = slice_segment("a", 0, "full", 0, 0, 10)
    assert not doubles(one, one)


def test_a_device_whose_name_does_not_tell_its_place_takes_the_whole_gpu() -> None:
    left, right = (slice_segment("a", 0, "4g.40gb", 0, 0, 10), slice_segment("b", 0, "3g.40gb", 4, 0, 10))
    [device] = right.devices
    renamed = device.model_copy(update={"device": "somebody-elses"})
    assert doubles(left, right.model_copy(update={"devices": [renamed]})) == [("a-1", "b-1")]


SOME_SLICES = st.sampled_from(
    [("full", 0), *((name, start) for name, shape in of_model(MODEL).items() for start in shape.starts)]
)
HELD = st.tuples(st.integers(0, 1), SOME_SLICES, st.integers(0, 12), st.none() | st.integers(0, 12))


def slices_of(profile: str, start: int) -> range:
    return range(8) if profile == "full" else range(start, start + of_model(MODEL)[profile].size)


@given(held=st.lists(HELD, max_size=8))
def test_a_double_billing_is_found_exactly_where_a_slice_second_is_billed_twice(
    held: list[tuple[int, tuple[str, int], int, int | None]],
) -> None:
    segments, billed, pairs = [], defaultdict[tuple[int, int, int], list[str]](list), set()
    for number, (gpu, place, begin, length) in enumerate(held):
        end = None if length is None else begin + length
        segments.append(slice_segment(f"c{number}", gpu, *place, begin, end))
        for second in range(begin, 30 if end is None else end):
            for index in slices_of(*place):
                pairs |= {frozenset((f"c{number}-1", other)) for other in billed[gpu, index, second]}
                billed[gpu, index, second].append(f"c{number}-1")
    assert {frozenset(pair) for pair in doubles(*segments)} == pairs
    for one in ledger.double_billings(segments):
        assert one.until is None or one.since < one.until


# --- in whose hand every slice is ---------------------------------------------------------------------------------


HOLDERS = st.sampled_from(
    [
        Holder(kind=kind, namespace="n", name=str(kind), uid=str(kind))
        for kind in (HolderKind.GPU_LEASE, HolderKind.MINING_POOL)
    ]
)
PLACES = st.tuples(st.integers(0, 2), st.sampled_from(["full", "bogus", *of_model(MODEL)]), st.integers(0, 7), HOLDERS)


def a_slot(device: str, place: tuple[str, int], holder: Holder) -> Slot:
    profile, start = place
    return Slot(device=device, gpu="GPU-a-0", profile=profile, start=start, holder=holder, since=START)


def a_report(slot: Slot, state: SlotState) -> ObservedSlot:
    return ObservedSlot(**slot.model_dump(exclude={"attempt", "since"}), state=state)


def one_gpu(wanted: Sequence[Slot], observed: Sequence[ObservedSlot], *billed: UsageRecordSpec) -> Counter[SliceState]:
    """States of the slices of a node's one GPU, without those that no slice is in."""
    node = NodeFacts("a", 1, tuple(gpus("a", 1)), tuple(wanted), tuple(observed), agent_until=START)
    return +Counter(slice_states(node, slices.open_bills(billed), START))


def bill_of(*slots: Slot) -> UsageRecordSpec:
    """An open segment for these devices."""
    devices = [BilledDevice(node="a", device=slot.device, gpu=slot.gpu) for slot in slots]
    return segment(START, None).model_copy(update={"profile": slots[0].profile, "devices": devices})


POOL = Holder(kind=HolderKind.MINING_POOL, namespace="mining", name="pool", uid="pool")
ONE, OTHER = (Holder(kind=HolderKind.GPU_LEASE, namespace="team", name=name, uid=name) for name in ("one", "other"))
RIGHT, WHOLE = ("3g.40gb", 4), ("7g.80gb", 0)
LEASED = a_slot(device_name(0, *RIGHT, "one", 1), RIGHT, ONE)
TAKEN = a_slot(device_name(0, *RIGHT, "other", 1), RIGHT, OTHER)
MINED = a_slot(device_name(0, *WHOLE, "pool", 1), WHOLE, POOL)
RIVAL = a_slot(device_name(0, *WHOLE, "rival", 1), WHOLE, POOL.model_copy(update={"uid": "rival"}))
READY, PREPARING, DRAINING = SlotState.READY, SlotState.PREPARING, SlotState.DRAINING


@pytest.mark.parametrize(
    ("states", "contested"),
    [
        (one_gpu([LEASED, TAKEN], []), 4),
        (one_gpu([LEASED, MINED], []), 4),
        (one_gpu([MINED, RIVAL], []), 8),
        (one_gpu([], [a_report(LEASED, READY), a_report(TAKEN, READY)]), 4),
        (one_gpu([LEASED], [a_report(LEASED, READY), a_report(MINED, READY)], bill_of(LEASED)), 4),
        (one_gpu([TAKEN], [a_report(LEASED, DRAINING)], bill_of(LEASED)), 4),
        (one_gpu([MINED], [a_report(MINED, READY)], bill_of(LEASED)), 4),
        (one_gpu([], [], bill_of(LEASED), bill_of(TAKEN).model_copy(update={"contract": "other"})), 4),
        (one_gpu([LEASED], [a_report(LEASED, READY)], bill_of(LEASED, LEASED)), 4),
    ],
    ids=[
        "promised to two leases",
        "promised to a lease and a pool",
        "promised to two pools",
        "ready for two leases",
        "billed, and ready for a pool as well",
        "billed, and promised to another lease",
        "billed to a lease whose device is gone, and mined on",
        "billed to two leases, wherever their devices are",
        "billed twice to one lease",
    ],
)
def test_a_slice_in_two_hands_is_contested_and_in_no_other_state(states: Counter[SliceState], contested: int) -> None:
    assert states[SliceState.CONTESTED] == contested
    assert states.total() == 8
    assert not states[SliceState.LEASED]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (one_gpu([LEASED], [a_report(MINED, READY)]), {SliceState.MINING: 8}),
        (one_gpu([LEASED], [a_report(MINED, DRAINING)]), {SliceState.HAND_OVER: 8}),
        (
            one_gpu([LEASED], [a_report(MINED, DRAINING), a_report(LEASED, PREPARING)]),
            {SliceState.HAND_OVER: 8},
        ),
        (
            one_gpu([LEASED], [a_report(LEASED, READY)], bill_of(LEASED)),
            {SliceState.LEASED: 4, SliceState.IDLE: 4},
        ),
        (one_gpu([TAKEN], [a_report(LEASED, READY)]), {SliceState.HAND_OVER: 4, SliceState.IDLE: 4}),
    ],
    ids=["asked for", "draining", "preparing", "leased", "asked for by the next lease"],
)
def test_a_hand_over_is_not_contested(states: Counter[SliceState], expected: dict[SliceState, int]) -> None:
    assert states == expected


@given(
    wanted=st.lists(PLACES, max_size=12),
    observed=st.lists(st.tuples(PLACES, st.sampled_from(SlotState)), max_size=12),
    broken=st.booleans(),
    ready=st.booleans(),
    billed=st.sets(st.integers(0, 11)),
)
def test_every_slice_is_counted_once_whatever_is_wanted_and_reported(
    wanted: list[tuple[int, str, int, Holder]],
    observed: list[tuple[tuple[int, str, int, Holder], SlotState]],
    broken: bool,
    ready: bool,
    billed: set[int],
) -> None:
    there = gpus("a", 3)
    there[0] = there[0].model_copy(update={"healthy": not broken})
    slots = tuple(
        Slot(device=f"w{number}", gpu=there[gpu].uuid, profile=profile, start=start, holder=holder, since=START)
        for number, (gpu, profile, start, holder) in enumerate(wanted)
    )
    seen = tuple(
        ObservedSlot(device=f"w{number}", gpu=there[gpu].uuid, profile=profile, start=start, holder=holder, state=state)
        for number, ((gpu, profile, start, holder), state) in enumerate(observed)
    )
    node = NodeFacts("a", 1, tuple(there), slots, seen, ready=ready, agent_until=START)
    bills = {"a": [slices.Bill(f"w{number}", there[number % 3].uuid, 0xF0) for number in billed]}
    states = Counter(slice_states(node, bills, START))
    assert states.total() == 24
    assert min(states.values()) >= 0
    if not billed:
        assert not states[SliceState.LEASED]
    if not slots and not seen and not billed:
        assert set(+states) <= {SliceState.IDLE, SliceState.FAULTY}
    if not ready:
        assert not states[SliceState.IDLE] + states[SliceState.MINING] + states[SliceState.HAND_OVER]
