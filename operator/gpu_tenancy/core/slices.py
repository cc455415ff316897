"""In whose hand every slice of every GPU is, and the law that it is in exactly one.

The states below add up to 8 × GPUs by their making; that says nothing. The law holds where no slice is CONTESTED and no
two segments bill the same slices at the same time (`ledger.double_billings`). Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple, TypeVar

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.node import BROKEN, Gpu, ObservedSlot, Slot, SlotState
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.devices import start_of
from gpu_tenancy.core.snapshot import NodeFacts, Snapshot, once_per_node
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask


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
    """The GPU is not healthy, the slice is fenced, its device failed, or node or agent cannot be reached; and nobody is
    billed for it."""
    CONTESTED = "contested"
    """More than one has it: two devices are promised, or ready, or billed on it. Never, where all is well."""


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
            bills[device.node].append(Bill(device.device, device.gpu, billed_mask(spec, device)))
    return bills


def segments_of(snapshot: Snapshot) -> Iterator[UsageRecordSpec]:
    """Every segment that a snapshot has, also those whose lease no longer exists."""
    for lease in snapshot.leases:
        for record in lease.records:
            yield record.spec
    for record in snapshot.orphans:
        yield record.spec


def slice_states(node: NodeFacts, bills: Bills, now: datetime) -> Mapping[SliceState, int]:
    """Slices of a node by state; the values add up to 8 × its GPUs."""
    unreachable = bool(node.agent_objection(now)) or not node.ready
    return _slice_states(node, tuple(bills.get(node.name, ())), unreachable)


@once_per_node
def _slice_states(node: NodeFacts, bills: tuple[Bill, ...], unreachable: bool) -> Mapping[SliceState, int]:
    states: Counter[SliceState] = Counter()
    wanted, observed, billed = _by_gpu(node.slots), _by_gpu(node.observed), _bills_by_gpu(bills)
    for gpu in node.gpus:
        on_gpu = wanted.get(gpu.uuid, {}), observed.get(gpu.uuid, {}), billed.get(gpu.uuid, ())
        faulty, changing = unreachable or not gpu.healthy, gpu.uuid in node.changing
        for state, mask in _masks_by_state(gpu, *on_gpu, faulty=faulty, changing=changing).items():
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
    gpu: Gpu,
    wanted: Mapping[str, Slot],
    observed: Mapping[str, ObservedSlot],
    billed: Sequence[Bill],
    *,
    faulty: bool,
    changing: bool,
) -> dict[SliceState, int]:
    """The slices of one GPU in each state, as bits; each slice in one. Where a device being taken away overlaps its
    successor, a hand-over, they count for whoever is billed or published, else as hand-over; so do those of a GPU that
    is being converted, though it is fenced meanwhile."""
    devices: dict[str, Slot | ObservedSlot] = {**observed, **wanted}
    masks = {device: device_mask(gpu.model, slot.profile, slot.start) for device, slot in devices.items()}
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
    faulty_left = left if faulty else left & gpu.fenced_mask
    by_state[SliceState.HAND_OVER if changing and not faulty else SliceState.FAULTY] |= faulty_left
    by_state[SliceState.IDLE] |= left & ~faulty_left
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


def billed_mask(spec: UsageRecordSpec, device: BilledDevice) -> int:
    """Memory slices of a device on record, as bits: its place is in its name; all where that does not tell."""
    start = start_of(device.device)
    return ALL_SLICES if start is None else device_mask(spec.model, spec.profile, start)


_PRECEDENCE: Final = (
    SliceState.CONTESTED, SliceState.LEASED, SliceState.MINING,
    SliceState.FAULTY, SliceState.HAND_OVER, SliceState.IDLE,
)  # fmt: skip
"""Which state a slice is in that several would claim."""


def _unbilled_state(
    device: str, wanted: Mapping[str, Slot], observed: Mapping[str, ObservedSlot], *, faulty: bool
) -> SliceState:
    report, promise = observed.get(device), wanted.get(device)
    if faulty or (report is not None and report.state in BROKEN):
        return SliceState.FAULTY
    holder = promise.holder if promise is not None else observed[device].holder
    ready = report is not None and report.state is SlotState.READY
    return SliceState.MINING if ready and holder.kind is HolderKind.MINING_POOL else SliceState.HAND_OVER
