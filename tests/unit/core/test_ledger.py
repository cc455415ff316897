"""Seconds, money and slices: the arithmetic by itself."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseStatus, Price, Tier
from gpu_tenancy.api.node import ObservedSlot, Slot, SlotState
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core import ledger
from gpu_tenancy.core.ledger import SliceState, slice_states
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


HOLDERS = st.sampled_from(
    [
        Holder(kind=kind, namespace="n", name=str(kind), uid=str(kind))
        for kind in (HolderKind.GPU_LEASE, HolderKind.MINING_POOL)
    ]
)
PLACES = st.tuples(st.integers(0, 2), st.sampled_from(["full", "bogus", *of_model(MODEL)]), st.integers(0, 7), HOLDERS)


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
    states = slice_states(node, frozenset(("a", f"w{number}") for number in billed), START)
    assert states.total() == 24
    if not slots and not seen:
        assert set(+states) <= {SliceState.IDLE, SliceState.FAULTY}
    if not ready:
        assert not states[SliceState.IDLE] + states[SliceState.MINING] + states[SliceState.HAND_OVER]
