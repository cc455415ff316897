"""Why a lease that is placed now goes where it goes, in numbers: a sentence from facts. Pure.

It decides nothing and looks at no rule of the planner's: it counts what the place costs, and what the others would
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.node import Gpu, GpuMode, Slot
from gpu_tenancy.core.actions import Plan, SetSlots
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, Snapshot
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask
from gpu_tenancy.mig.profiles import FULL, of_model


class Seated(NamedTuple):
    """A device that a lease is given."""

    node: NodeFacts
    gpu: Gpu
    slot: Slot
    stops: tuple[Slot, ...]
    """Miners' devices that are in its way."""

    @property
    def place(self) -> str:
        """Where it is, e.g. "n1 GPU 3" or "n1 GPU 3 slices 4–7"."""
        mask = device_mask(self.gpu.model, self.slot.profile, self.slot.start)
        if mask == ALL_SLICES:
            return f"{self.node.name} GPU {self.gpu.index}"
        last = mask.bit_length() - 1
        slices = f"slice {last}" if last == self.slot.start else f"slices {self.slot.start}–{last}"
        return f"{self.node.name} GPU {self.gpu.index} {slices}"


def seats(lease: LeaseFacts, plan: Plan, snapshot: Snapshot) -> tuple[Seated, ...]:
    """The devices that a plan gives a lease."""
    nodes = {node.name: node for node in snapshot.nodes}
    found = []
    for action in plan.actions:
        if isinstance(action, SetSlots):
            facts = nodes[action.node]
            there = {slot.device for slot in facts.slots}
            new = (slot for slot in action.slots if slot.holder.uid == lease.uid and slot.device not in there)
            found += [_seated(facts, slot) for slot in new]
    return tuple(found)


def _seated(node: NodeFacts, slot: Slot) -> Seated:
    gpu = node.gpu_of[slot.gpu]
    mask = device_mask(gpu.model, slot.profile, slot.start)
    return Seated(node, gpu, slot, tuple(one for one in _miners(node, gpu) if _mask(gpu, one) & mask))


def reason(lease: LeaseFacts, placed: Sequence[Seated], snapshot: Snapshot, now: datetime) -> str:
    """Why it is placed there, as sentences; empty where it is not placed."""
    if not placed:
        return ""
    stopped = len({(one.node.name, slot.device) for one in placed for slot in one.stops})
    nodes = [node for node in snapshot.nodes if not node.objection(now)]
    model = placed[0].gpu.model
    if lease.spec.gpus.profile == FULL:
        costs, where = [*_whole_costs(nodes, model, lease.spec.gpus.count)], "node"
        what = f"{counted(lease.spec.gpus.count, 'GPU')} of {model}"
    else:
        costs, where = [*_slice_costs(nodes, model, lease.spec.gpus.profile)], "GPU"
        what = f"a {lease.spec.gpus.profile} of {model}"
    least = min(costs, default=0)
    fewest = f"on the best of them {counted(least, 'miner')} would stop for each pod"
    others = f"{counted(len(costs), where)} had {what} free of leases, and {fewest}" if costs else ""
    rest = f"{_rest(placed, where)}{_together(placed, snapshot.topology_levels)}"
    return f"{counted(stopped, 'miner')} {'stops' if stopped == 1 else 'stop'} for it; {others}. {rest}"


def _together(placed: Sequence[Seated], levels: Sequence[str]) -> str:
    """The finest place that all of its nodes have in common, where there are several nodes."""
    nodes = {one.node.name: one.node for one in placed}.values()
    for level in reversed(levels) if len(nodes) > 1 else ():
        places = {node.labels.get(level) for node in nodes}
        if len(places) == 1 and None not in places:
            return f" Its {counted(len(nodes), 'node')} are all in {level} {places.pop()}."
    return ""


def _rest(placed: Sequence[Seated], where: str) -> str:
    """What stays free of leases where it is placed."""
    if where == "node":
        left = {one.node.name: -1 for one in placed}
        for name in left:
            taken = [one for one in placed if one.node.name == name]
            left[name] = len(_free_wholes(taken[0].node, taken[0].gpu.model)) - len(taken)
        return f"It leaves {_listed(f'{number} free on {name}' for name, number in left.items())}."
    masks: dict[str, int] = {}
    for one in placed:
        taken_mask = masks.get(one.gpu.uuid, _leased(one.node, one.gpu) | one.gpu.fenced_mask)
        masks[one.gpu.uuid] = taken_mask | _mask(one.gpu, one.slot)
    names = {one.gpu.uuid: f"{one.node.name} GPU {one.gpu.index}" for one in placed}
    free = (f"{(ALL_SLICES & ~mask).bit_count()} of 8 slices on {names[uuid]}" for uuid, mask in masks.items())
    return f"It leaves {_listed(free)} free of leases."


NAMED = 3
"""Places that a sentence names; of more it gives the number."""


def _listed(parts: Iterable[str]) -> str:
    words = list(parts)
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more


def _whole_costs(nodes: Iterable[NodeFacts], model: str, count: int) -> Iterator[int]:
    """Miners that would stop on each node that has so many whole GPUs free of leases."""
    for node in nodes:
        free = _free_wholes(node, model)
        if len(free) >= count:
            mined = sum(1 for gpu in free if any(_miners(node, gpu)))
            yield max(0, count - (len(free) - mined))


def _free_wholes(node: NodeFacts, model: str) -> list[Gpu]:
    return [
        gpu
        for gpu in node.gpus
        if gpu.model == model and gpu.healthy and gpu.mode is GpuMode.WHOLE and not _leased(node, gpu)
    ]


def _slice_costs(nodes: Iterable[NodeFacts], model: str, profile: str) -> Iterator[int]:
    """Miners that would stop on each GPU that has room for the profile beside leases."""
    shape = of_model(model).get(profile)
    for node in nodes:
        for gpu in node.gpus:
            if shape is None or gpu.model != model or not gpu.healthy or gpu.mode is not GpuMode.MIG:
                continue
            taken = _leased(node, gpu) | gpu.fenced_mask
            masks = [shape.mask(start) for start in shape.starts if not shape.mask(start) & taken]
            mined = [_mask(gpu, slot) for slot in _miners(node, gpu)]
            if masks:
                yield min(sum(1 for one in mined if one & mask) for mask in masks)


def _leased(node: NodeFacts, gpu: Gpu) -> int:
    """Memory slices of a GPU that leases have, as bits."""
    mask = 0
    for slot in node.leased:
        if slot.gpu == gpu.uuid:
            mask |= _mask(gpu, slot)
    return mask


def _miners(node: NodeFacts, gpu: Gpu) -> Iterator[Slot]:
    return (one for one in node.slots if one.gpu == gpu.uuid and one.holder.kind is HolderKind.MINING_POOL)


def _mask(gpu: Gpu, slot: Slot) -> int:
    return device_mask(gpu.model, slot.profile, slot.start)
