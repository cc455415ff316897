"""What taking a part of a GPU costs those who are on it, and so the best that it offers to pods that want slices. Pure.

Seats on one GPU are few enough to be tried one and all: an A100 has 14 placements, and no profile more than 7 starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations
from typing import Final, NamedTuple

from gpu_tenancy.core.desirability import loss
from gpu_tenancy.mig.layout import ALL_SLICES, Placement, device_mask, filling
from gpu_tenancy.mig.profiles import of_model

DRAINING_COST: Final = 10
"""Waiting for a lease that still drains may take its whole grace; ten miners are stopped sooner."""
MINER_COST: Final = 1
MOST_DEVICES: Final = 7
"""Devices that a GPU can be cut into."""
PER_POD: Final = 420
"""Least common multiple of 1…7, so that costs per pod compare as integers."""


class GpuState(NamedTuple):
    """What makes two MIG GPUs interchangeable for a decision."""

    model: str
    hard: int
    draining: int
    miners: frozenset[Placement]


class Offer(NamedTuple):
    """What seats on a GPU of some state cost; the smallest is the best."""

    cost: int
    """Per pod, in units of 1/420."""
    loss: int
    """What leases to come lose by it, per pod, in the units of the cost and of `desirability.loss`."""
    free_slices: int
    minus_starts: tuple[int, ...]
    """Where the devices begin, negated so that the highest comes first; one for each pod."""


@lru_cache(maxsize=65536)
def offer(state: GpuState, profile: str, most: int, doublings: int) -> Offer | None:
    """The best seats for one to `most` pods on a GPU of that state: least cost per pod, so that one wide miner yields
    before several narrow ones do; then as many pods as possible, where leases to come lose least, at the highest
    starts. `doublings`: by how much the pods outlast the leases that are there."""
    starts = of_model(state.model)[profile].starts
    free = [-start for start in reversed(starts) if not state.hard & device_mask(state.model, profile, start)]
    before = _disturbance(state, state.hard)
    offers = []
    for pods in range(1, most + 1):
        for taken in combinations(free, pods):
            bits = union(state.model, profile, taken)
            cost = (_disturbance(state, state.hard | bits) - before) * PER_POD // pods
            lost = loss(state.model, state.hard, bits, doublings) * PER_POD // pods
            offers.append((cost, -pods, lost, taken))
    if not offers:
        return None
    cost, _, lost, minus_starts = min(offers)
    return Offer(cost, lost, ALL_SLICES.bit_count() - state.hard.bit_count(), minus_starts)


def union(model: str, profile: str, minus_starts: Iterable[int]) -> int:
    """Memory slices of devices with these starts, as bits."""
    bits = 0
    for start in minus_starts:
        bits |= device_mask(model, profile, -start)
    return bits


def _disturbance(state: GpuState, hard: int) -> int:
    """Cost of everything that cannot stay where leases hold `hard`."""
    kept = filling(state.model, hard)
    evicted = sum(1 for miner in state.miners if miner not in kept)
    return evicted * MINER_COST + (DRAINING_COST if hard & state.draining else 0)
