"""Segments and slice-seconds: what is billed, and in whose hand every slice of every GPU is.

Pure arithmetic: whole seconds, Decimal money, never floats. The conservation law: every memory slice of every GPU is in
exactly one of the states below at any instant; their sum is 8 × GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from enum import StrEnum
from typing import Final

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.lease import Cost, Price
from gpu_tenancy.api.node import Gpu, ObservedSlot, Slot, SlotState
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, RecordFacts
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


def slice_states(node: NodeFacts, billed: frozenset[tuple[str, str]], now: datetime) -> Counter[SliceState]:
    """Slices of a node by state; the values add up to 8 × its GPUs. `billed`: (node, device) pairs of open segments."""
    states: Counter[SliceState] = Counter()
    wanted = {slot.device: slot for slot in node.slots}
    unreachable = bool(node.agent_objection(now)) or not node.ready
    for gpu in node.gpus:
        taken = _gpu_states(node, gpu, wanted, billed, unreachable)
        states.update(taken)
        rest = MEMORY_SLICES - taken.total()
        states[SliceState.FAULTY if unreachable or not gpu.healthy else SliceState.IDLE] += rest
    return states


def _gpu_states(
    node: NodeFacts,
    gpu: Gpu,
    wanted: dict[str, Slot],
    billed: frozenset[tuple[str, str]],
    unreachable: bool,
) -> Counter[SliceState]:
    """States of the slices of one GPU that some device takes. Where a device being taken away overlaps its successor
    the slices count once, for whoever is billed or published, else as hand-over."""
    by_slice: dict[int, SliceState] = {}
    observed = {slot.device: slot for slot in node.observed if slot.gpu == gpu.uuid}
    devices: dict[str, Slot | ObservedSlot] = {**observed, **{d: s for d, s in wanted.items() if s.gpu == gpu.uuid}}
    for device, slot in devices.items():
        state = _state(node, device, slot, observed.get(device), billed, unreachable or not gpu.healthy)
        for index in _slices(gpu, slot):
            by_slice[index] = min(by_slice.get(index, state), state, key=_PRECEDENCE.index)
    return Counter(by_slice.values())


def _slices(gpu: Gpu, slot: Slot | ObservedSlot) -> range:
    """Memory slices that a device takes of its GPU: all of them where the profile is not one of the model."""
    profile = of_model(gpu.model).get(slot.profile)
    return range(slot.start, min(slot.start + profile.size, MEMORY_SLICES)) if profile else range(MEMORY_SLICES)


_PRECEDENCE: Final = (SliceState.LEASED, SliceState.MINING, SliceState.FAULTY, SliceState.HAND_OVER, SliceState.IDLE)


def _state(
    node: NodeFacts,
    device: str,
    slot: Slot | ObservedSlot,
    observed: ObservedSlot | None,
    billed: frozenset[tuple[str, str]],
    faulty: bool,
) -> SliceState:
    if (node.name, device) in billed:
        return SliceState.LEASED
    if faulty or (observed is not None and observed.state is SlotState.FAILED):
        return SliceState.FAULTY
    if slot.holder.kind is HolderKind.MINING_POOL and observed is not None and observed.state is SlotState.READY:
        return SliceState.MINING
    return SliceState.HAND_OVER
