"""Segments and slice-seconds: what is billed, and in whose hand every slice of every GPU is.

Pure arithmetic: whole seconds, Decimal money, never floats. The conservation law: every memory slice of every GPU is in
exactly one hand at any instant. The states below add up to 8 × GPUs by their making; that says nothing. The law holds
where no slice is CONTESTED and no two segments bill the same slices at the same time (`double_billings`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from functools import cache
from typing import Final, NamedTuple, TypeVar

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.lease import Cost, Price
from gpu_tenancy.api.node import Gpu, ObservedSlot, Slot, SlotState
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.devices import start_of
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, RecordFacts, Snapshot
from gpu_tenancy.core.terms import ceil_second, floor_second, seconds_between
from gpu_tenancy.mig.profiles import MEMORY_SLICES, of_model

CENT: Final = Decimal("0.01")
SECONDS_PER_HOUR: Final = 3600


class SliceState(StrEnum):
    """In whose hand a slice is."""

    LEASED = "leased"
    """Published for a lease and billed."""
    MINING = "mining"
    """Published for a pool."""
    HAND_OVER = "hand-over"
    """Being prepared, or drained from its former holder: nobody pays."""
    IDLE = "idle"
    FAULTY = "faulty"
    """The GPU is not healthy, its device failed, or its node or agent cannot be reached and nobody is billed for it."""
    CONTESTED = "contested"
    """More than one has it: two devices are promised, or ready, or billed on it. Never, where all is well."""


def record_name(contract: str, segment: int) -> str:
    """Name of a segment's UsageRecord: creating it twice is impossible."""
    return f"{contract}-{segment}"


def segment_start(
    slots: Iterable[tuple[NodeFacts, Slot]], ready_at: Iterable[datetime], lease: LeaseFacts, now: datetime
) -> datetime:
    """First billed second: the latest readyAt, not before the operator's decision, not after its first sight of the
    devices; a started second is free. On devices that an earlier segment was billed for already (a suspension that was
    taken back before they were) it is now: nobody knows since when they are used again."""
    held = list(slots)
    if any(held_by(record) == {(node.name, slot.device) for node, slot in held} for record in lease.records):
        return ceil_second(now)
    decided = max(slot.since for _, slot in held)
    start = ceil_second(min(max(decided, *ready_at), now))
    previous = lease.records[-1].spec.billable_to if lease.records else None
    return max(start, previous) if previous else start


def held_by(record: RecordFacts) -> set[tuple[str, str]]:
    """(node, device) pairs that a segment is billed for."""
    return {(one.node, one.device) for one in record.spec.devices}


def segment(lease: LeaseFacts, slots: list[tuple[NodeFacts, Slot]], start: datetime) -> UsageRecordSpec:
    """The open segment that begins at `start`."""
    node, first = slots[0]
    model = next((gpu.model for gpu in node.gpus if gpu.uuid == first.gpu), lease.spec.gpus.model or "")
    return UsageRecordSpec(
        contract=lease.status.contract or lease.uid,
        segment=lease.records[-1].spec.segment + 1 if lease.records else 1,
        lease_namespace=lease.key.namespace,
        lease_name=lease.key.name,
        tier=lease.spec.tier,
        model=model,
        profile=lease.spec.gpus.profile,
        devices=[BilledDevice(node=one.name, device=slot.device, gpu=slot.gpu) for one, slot in slots],
        price=lease.status.price,
        billable_from=start,
    )


def segment_end(record: RecordFacts, at: datetime) -> tuple[datetime, int]:
    """Last billed instant and the seconds of the segment: a started second is free, and never less than zero."""
    end = max(record.spec.billable_from, floor_second(at))
    return end, seconds_between(record.spec.billable_from, end)


def amount(price: Price, devices: int, seconds: int) -> Decimal:
    """Price of `devices` for `seconds`, to 28 digits; divided last, so that hours are exact."""
    return Decimal(price.per_hour) * devices * seconds / SECONDS_PER_HOUR


def running_cost(specs: Iterable[UsageRecordSpec], now: datetime) -> Cost | None:
    """What the segments cost up to now; None where nothing is priced. Summed exactly, divided and rounded once."""
    price_seconds, seconds, currency = Decimal(0), 0, None
    for spec in specs:
        if spec.price is None:
            continue
        run = spec.seconds if spec.seconds is not None else seconds_between(spec.billable_from, now)
        price_seconds += Decimal(spec.price.per_hour) * len(spec.devices) * run
        seconds += run
        currency = spec.price.currency
    if currency is None:
        return None
    shown = (price_seconds / SECONDS_PER_HOUR).quantize(CENT, ROUND_HALF_EVEN)
    return Cost(amount=f"{shown:f}", currency=currency, seconds=seconds, as_of=floor_second(now))


# --- the same slices billed twice ---------------------------------------------------------------------------------


class DoubleBilling(NamedTuple):
    """Two segments that bill the same slices of a GPU at the same time; or one that bills them twice."""

    first: str
    """Name of the record that began earlier."""
    second: str
    gpu: str
    since: datetime
    until: datetime | None
    """None: both are still open."""


def double_billings(segments: Iterable[UsageRecordSpec]) -> Iterator[DoubleBilling]:
    """Every pair of segments, open or closed, that bills the same slices at the same time; none, where all is well.

    A segment counts once by its name: beside a record its archived copy may exist.
    """
    billing: dict[str, list[tuple[UsageRecordSpec, int]]] = defaultdict(list)
    named = {record_name(one.contract, one.segment): one for one in segments}
    bills = [one for one in named.values() if not _is_over(one, one.billable_from)]  # of no length: nothing is billed
    for spec in sorted(bills, key=lambda one: (one.billable_from, one.contract, one.segment)):
        for device in spec.devices:
            mask = _billed_mask(spec, device)
            others = [one for one in billing[device.gpu] if not _is_over(one[0], spec.billable_from)]
            yield from (_double(other, spec, device.gpu) for other, taken in others if taken & mask)
            billing[device.gpu] = [*others, (spec, mask)]


def _is_over(segment: UsageRecordSpec, at: datetime) -> bool:
    """The end itself is not billed any more."""
    return segment.billable_to is not None and segment.billable_to <= at


def _double(first: UsageRecordSpec, second: UsageRecordSpec, gpu: str) -> DoubleBilling:
    ends = [one.billable_to for one in (first, second) if one.billable_to is not None]
    return DoubleBilling(
        record_name(first.contract, first.segment),
        record_name(second.contract, second.segment),
        gpu,
        second.billable_from,
        min(ends, default=None),
    )


# --- in whose hand every slice is ---------------------------------------------------------------------------------


class Bill(NamedTuple):
    """A device that an open segment is billed for, and the slices of its GPU that it takes."""

    device: str
    gpu: str
    mask: int


Bills = Mapping[str, Sequence[Bill]]
"""By name of the node."""


def open_bills(segments: Iterable[UsageRecordSpec]) -> Bills:
    """What the open ones among these segments are billed for. A device that two of them bill is there twice."""
    bills: dict[str, list[Bill]] = defaultdict(list)
    for spec in segments:
        for device in spec.devices if spec.billable_to is None else ():
            bills[device.node].append(Bill(device.device, device.gpu, _billed_mask(spec, device)))
    return bills


def segments_of(snapshot: Snapshot) -> Iterator[UsageRecordSpec]:
    """Every segment that a snapshot has, also those whose lease no longer exists."""
    for lease in snapshot.leases:
        for record in lease.records:
            yield record.spec
    for record in snapshot.orphans:
        yield record.spec


def slice_states(node: NodeFacts, bills: Bills, now: datetime) -> Counter[SliceState]:
    """Slices of a node by state; the values add up to 8 × its GPUs."""
    states: Counter[SliceState] = Counter()
    unreachable = bool(node.agent_objection(now)) or not node.ready
    wanted, observed, billed = _by_gpu(node.slots), _by_gpu(node.observed), _bills_by_gpu(bills.get(node.name, ()))
    for gpu in node.gpus:
        on_gpu = wanted.get(gpu.uuid, {}), observed.get(gpu.uuid, {}), billed.get(gpu.uuid, ())
        for state, mask in _masks_by_state(gpu, *on_gpu, faulty=unreachable or not gpu.healthy).items():
            states[state] += mask.bit_count()
    return states


S = TypeVar("S", Slot, ObservedSlot)


def _by_gpu(slots: Iterable[S]) -> dict[str, dict[str, S]]:
    """Slots by UUID of their GPU and name of their device."""
    found: dict[str, dict[str, S]] = defaultdict(dict)
    for slot in slots:
        found[slot.gpu][slot.device] = slot
    return found


def _bills_by_gpu(bills: Iterable[Bill]) -> dict[str, list[Bill]]:
    found: dict[str, list[Bill]] = defaultdict(list)
    for bill in bills:
        found[bill.gpu].append(bill)
    return found


def _masks_by_state(
    gpu: Gpu, wanted: Mapping[str, Slot], observed: Mapping[str, ObservedSlot], billed: Sequence[Bill], *, faulty: bool
) -> dict[SliceState, int]:
    """The slices of one GPU in each state, as bits; each slice in one. Where a device being taken away overlaps its
    successor, a hand-over, they count for whoever is billed or published, else as hand-over."""
    devices: dict[str, Slot | ObservedSlot] = {**observed, **wanted}
    masks = {device: _mask(gpu.model, slot.profile, slot.start) for device, slot in devices.items()}
    paid = {bill.device: bill.mask for bill in billed}
    by_state = dict.fromkeys(_PRECEDENCE, 0)
    by_state[SliceState.CONTESTED] = _contested(masks, wanted, observed, billed)
    for device, mask in masks.items():
        state = SliceState.LEASED if device in paid else _unbilled_state(device, wanted, observed, faulty=faulty)
        by_state[state] |= mask
    left = ALL_SLICES
    for state, mask in by_state.items():
        by_state[state] = mask & left
        left &= ~mask
    by_state[SliceState.FAULTY if faulty else SliceState.IDLE] |= left
    return by_state


def _contested(
    masks: Mapping[str, int],
    wanted: Mapping[str, Slot],
    observed: Mapping[str, ObservedSlot],
    billed: Sequence[Bill],
) -> int:
    """Slices of a GPU that more than one device has. In a hand-over one is promised what another still uses; but no two
    are promised it, no two are ready on it, and what is billed is neither promised to another nor used by it."""
    paid = {bill.device: bill.mask for bill in billed}
    promised = {device: masks[device] for device in wanted}
    used = {device: masks[device] for device, slot in observed.items() if slot.state is SlotState.READY}
    return (
        _more_than_once(bill.mask for bill in billed)
        | _more_than_once({**promised, **paid}.values())
        | _more_than_once({**used, **paid}.values())
    )


def _more_than_once(masks: Iterable[int]) -> int:
    """Bits that more than one of the masks has."""
    once = twice = 0
    for mask in masks:
        twice |= once & mask
        once |= mask
    return twice


ALL_SLICES: Final = (1 << MEMORY_SLICES) - 1


@cache
def _mask(model: str, profile: str, start: int) -> int:
    """Memory slices that a device takes of its GPU, as bits: all of them where the profile is not one of the model."""
    shape = of_model(model).get(profile)
    return shape.mask(start) & ALL_SLICES if shape else ALL_SLICES


def _billed_mask(spec: UsageRecordSpec, device: BilledDevice) -> int:
    """The same of a device on record, whose place is in its name; all slices where the name does not tell."""
    start = start_of(device.device)
    return ALL_SLICES if start is None else _mask(spec.model, spec.profile, start)


_PRECEDENCE: Final = (
    SliceState.CONTESTED, SliceState.LEASED, SliceState.MINING,
    SliceState.FAULTY, SliceState.HAND_OVER, SliceState.IDLE,
)  # fmt: skip
"""Which state a slice is in that several would claim."""


def _unbilled_state(
    device: str, wanted: Mapping[str, Slot], observed: Mapping[str, ObservedSlot], *, faulty: bool
) -> SliceState:
    report, promise = observed.get(device), wanted.get(device)
    if faulty or (report is not None and report.state is SlotState.FAILED):
        return SliceState.FAULTY
    holder = promise.holder if promise is not None else observed[device].holder
    ready = report is not None and report.state is SlotState.READY
    return SliceState.MINING if ready and holder.kind is HolderKind.MINING_POOL else SliceState.HAND_OVER
