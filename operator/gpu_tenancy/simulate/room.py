"""What would find room now: GPUs and slices that no lease has, counted by the profiles that fit. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.core.snapshot import NodeFacts, once_per_node
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask, mask_of, placements
from gpu_tenancy.mig.profiles import FULL, of_model


class Room(NamedTuple):
    """What leases could have if miners made way."""

    fits: dict[str, int]
    """Devices of each profile that would fit, if only it were asked for."""
    widest: int
    """Most whole GPUs that are free on one node: the largest pod that would fit."""
    whole_nodes: int
    """Nodes of which every GPU is free."""


def room_on(nodes: Iterable[NodeFacts]) -> Room:
    """What fits on nodes that serve."""
    fits: Counter[str] = Counter()
    widest = whole_nodes = 0
    for node in nodes:
        if node.ready:
            here = _fits_on(node)
            fits.update(here)
            widest = max(widest, here[FULL])
            whole_nodes += here[FULL] == len(node.gpus)
    return Room(dict(sorted(fits.items())), widest, whole_nodes)


@once_per_node
def _fits_on(node: NodeFacts) -> Mapping[str, int]:
    fits: Counter[str] = Counter()
    taken: dict[str, int] = defaultdict(int)
    for slot in node.slots:
        if slot.holder.kind is HolderKind.GPU_LEASE:
            taken[slot.gpu] |= device_mask(node.gpu_of[slot.gpu].model, slot.profile, slot.start)
    for gpu in node.gpus:
        if not gpu.healthy:
            continue
        if gpu.mode is GpuMode.MIG:
            for profile, count in _most(gpu.model, taken[gpu.uuid] | gpu.fenced_mask):
                fits[profile] += count
        else:
            fits[FULL] += not taken[gpu.uuid]
    return fits


@cache
def _most(model: str, occupied: int) -> tuple[tuple[str, int], ...]:
    """How many devices of each profile fit beside the occupied slices. A profile's places overlap, if at all, with
    their next neighbours only, so that taking them one after the other finds the most."""
    found = []
    for profile in of_model(model):
        count, left = 0, occupied & ALL_SLICES
        for one in sorted(one for one in placements(model) if one.profile == profile):
            mask = mask_of(model, one)
            if not left & mask:
                count, left = count + 1, left | mask
        found.append((profile, count))
    return tuple(found)
