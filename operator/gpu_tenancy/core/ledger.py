"""Segments: what is billed, from when to when, at which price. Pure arithmetic: whole seconds, Decimal money, never
floats. No two segments bill the same slices at the same time (`double_billings`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final, NamedTuple

from gpu_tenancy.api.lease import Cost, Price
from gpu_tenancy.api.node import Slot
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.slices import billed_mask
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, RecordFacts
from gpu_tenancy.core.terms import ceil_second, floor_second, seconds_between

CENT: Final = Decimal("0.01")
SECONDS_PER_HOUR: Final = 3600


def record_name(contract: str, segment: int) -> str:
    """Name of a segment's UsageRecord: creating it twice is impossible."""
    return f"{contract}-{segment}"


def segment_start(
    slots: Iterable[tuple[NodeFacts, Slot]], ready_at: Iterable[datetime], lease: LeaseFacts, now: datetime
) -> datetime:
    """First billed second: the latest readyAt, not before the operator's decision or the lease's own start, not after
    its first sight of the devices; a started second is free. On devices that an earlier segment was billed for already
    (a suspension that was taken back before they were) it is now: nobody knows since when they are used again."""
    held = list(slots)
    if any(held_by(record) == {(node.name, slot.device) for node, slot in held} for record in lease.records):
        return ceil_second(now)
    decided = max(slot.since for _, slot in held)
    start = ceil_second(min(max(decided, *ready_at), now))
    previous = lease.records[-1].spec.billable_to if lease.records else lease.spec.term.start
    return max(start, previous) if previous else start


def held_by(record: RecordFacts) -> set[tuple[str, str]]:
    """(node, device) pairs that a segment is billed for."""
    return {(one.node, one.device) for one in record.spec.devices}


def segment(lease: LeaseFacts, slots: list[tuple[NodeFacts, Slot]], start: datetime) -> UsageRecordSpec:
    """The open segment that begins at `start`."""
    node, first = slots[0]
    gpu = node.gpu_of.get(first.gpu)
    model = gpu.model if gpu else lease.spec.gpus.model or ""
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
            mask = billed_mask(spec, device)
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
