"""openb_fill_pct: how full a fleet is when as much has been asked for as there is, and nobody has left.

776 nodes with 8 A100s. Pods are drawn, with replacement, from those of a production trace
([openb_gpu_requests.csv](../data/README.md)) until their slices together are as many as the fleet has, and placed one
by one. A pod that asks for a part of a GPU gets the narrowest profile with that share of the compute slices; one that
asks for one GPU its 7g slice; one that asks for several gets them whole, on one node.

The mode of a GPU is declared: the nodes are divided between whole GPUs and MIG as the trace's demand is, for every rule
alike and for the bound. Everybody's figure is the share of all memory slices that is placed. The bound may choose whom
it refuses.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from gpu_tenancy.api.node import Gpu, GpuMode
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import device_mask
from gpu_tenancy.mig.profiles import COMPUTE_SLICES, FULL, MEMORY_SLICES, slices
from tests.bench import bounds, fleet, loss
from tests.bench.admission import gain
from tests.bench.figures import Figure, figure
from tests.bench.loss import MODEL, PROFILES, Asked, Fleet
from tests.bench.planner import NOW

REQUESTS: Final = Path(__file__).parent.parent / "data" / "openb_gpu_requests.csv"
NODES: Final = 776
GPUS: Final = 8
SEEDS: Final = range(42, 52)
RIVAL: Final = "best fit"


class Pod(NamedTuple):
    """What one pod gets."""

    profile: str
    gpus: int

    @property
    def slices(self) -> int:
        """Memory slices of all its GPUs."""
        return slices(MODEL, self.profile) * self.gpus


def run(_: int) -> list[Figure]:
    """The figure; the seeds are always the same."""
    rows = [_filled(seed) for seed in SEEDS]
    means = {name: round(statistics.mean(row[name] for row in rows), 2) for name in rows[0]}
    ours, theirs = ([row[name] for row in rows] for name in ("product", RIVAL))
    better = gain(ours, theirs)
    fleet.say(f"openb: {better.mean:+.2f} ± {better.within:.2f} points over {RIVAL}")
    goal = f"the bound, {means['bound']:g}; baseline is {RIVAL}"
    made = figure("openb_fill_pct", ours, "% of slices", goal, baseline=means[RIVAL])
    return [replace(made, rows=({"seeds": f"{SEEDS[0]} to {SEEDS[-1]}", **means},))]


# --- the pods -----------------------------------------------------------------------------------------------------


@cache
def requests() -> Mapping[Pod, int]:
    """How many pods of the trace get what."""
    found: Counter[Pod] = Counter()
    with REQUESTS.open(newline="") as file:
        for row in csv.DictReader(file):
            found[pod(int(row["num_gpu"]), int(row["gpu_milli"]))] += int(row["pods"])
    return found


def pod(gpus: int, milli: int) -> Pod:
    """What is given to a pod that asks for so many GPUs, and so many thousandths of each."""
    if gpus > 1:
        return Pod(FULL, gpus)
    return Pod(next(one.name for one in PROFILES if milli * COMPUTE_SLICES <= 1000 * one.compute), 1)


def drawn(seed: int) -> list[Pod]:
    """Pods in the order in which they come, until one would ask for more than is left."""
    dice, kinds = random.Random(seed), requests()
    left = NODES * GPUS * MEMORY_SLICES
    found: list[Pod] = []
    while True:
        [one] = dice.choices(list(kinds), list(kinds.values()))
        left -= one.slices
        if left < 0:
            return found
        found.append(one)


@cache
def whole_nodes() -> int:
    """Nodes whose GPUs are not in MIG mode: as many as the trace's share of pods with several GPUs needs."""
    wanted: Counter[bool] = Counter()
    for one, pods in requests().items():
        wanted[one.profile == FULL] += one.slices * pods
    return round(NODES * wanted[True] / wanted.total())


# --- filling ------------------------------------------------------------------------------------------------------


def _filled(seed: int) -> dict[str, float]:
    """Percent of the slices that each rule fills."""
    pods = drawn(seed)
    placed: dict[str, float] = {name: _by_rules(pods, mig(seed), whole(seed)) for name, (mig, whole) in RULES.items()}
    placed |= {"product": _by_product(pods), "bound": _bound(pods)}
    return {name: 100 * found / (NODES * GPUS * MEMORY_SLICES) for name, found in placed.items()}


def _by_product(pods: Sequence[Pod]) -> int:
    """As a plan places them."""
    world = World([_node(number) for number in range(NODES)], NOW, {})
    world.settle()
    wants = {one: [Want(one.profile, one.gpus, 1, MODEL, PodNeeds(Amount(1, 1, 1)))] for one in requests()}
    return sum(one.slices for one in pods if world.place(wants[one]) is not None)


def _node(number: int) -> NodeFacts:
    mode = GpuMode.WHOLE if number < whole_nodes() else GpuMode.MIG
    gpus = tuple(
        Gpu(index=index, uuid=f"GPU-{number}-{index}", model=MODEL, memory_mib=81_920, mode=mode)
        for index in range(GPUS)
    )
    much, until = Amount(1_000_000, 2**50, 1_000), NOW + timedelta(seconds=40)
    return NodeFacts(f"node-{number:03d}", 1, gpus, (), (), allocatable=much, agent_until=until)


WholeRule = Callable[[list[int], int], int | None]
"""The node for a pod with so many GPUs, by how many each has free."""


def _by_rules(pods: Sequence[Pod], mig: loss.Rule, whole: WholeRule) -> int:
    cut, free, placed = Fleet((NODES - whole_nodes()) * GPUS), [GPUS] * whole_nodes(), 0
    for one in pods:
        if one.profile == FULL:
            node = whole(free, one.gpus)
            if node is not None:
                free[node] -= one.gpus
                placed += one.slices
            continue
        asked = Asked(0.0, 1.0, one.profile)
        place = mig(cut, asked)
        if place is not None:
            cut.take(asked, *place)
            placed += one.slices
    return placed


def _bound(pods: Sequence[Pod]) -> float:
    """The most of these pods that the fleet could hold."""
    wanted, programme = Counter(pods), bounds.Programme()
    cut = [programme.column(0.0, None) for _ in bounds.best_mixes()]
    programme.row(float((NODES - whole_nodes()) * GPUS), [(column, 1.0) for column in cut])
    wholes = []
    for one, count in wanted.items():
        served = programme.column(float(one.slices), float(count))
        if one.profile == FULL:
            wholes.append((served, float(one.gpus)))
            continue
        kind = bounds.NAMES.index(one.profile)
        has = [(column, -float(mix[kind])) for column, mix in zip(cut, bounds.best_mixes(), strict=True) if mix[kind]]
        programme.row(0.0, [(served, 1.0), *has])
    programme.row(float(whole_nodes() * GPUS), wholes)
    return programme.best()


# --- rules --------------------------------------------------------------------------------------------------------


def _random_node(seed: int) -> WholeRule:
    dice = random.Random(seed)

    def rule(free: list[int], gpus: int) -> int | None:
        fitting = [node for node, left in enumerate(free) if left >= gpus]
        return dice.choice(fitting) if fitting else None

    return rule


def _least_node(key: Callable[[int, int], float]) -> WholeRule:
    """The first node with the smallest key, a function of the GPUs that are free and those asked for."""

    def rule(free: list[int], gpus: int) -> int | None:
        return min((n for n, left in enumerate(free) if left >= gpus), key=lambda n: key(free[n], gpus), default=None)

    return rule


def _shares(*, whole: bool) -> Mapping[Pod, float]:
    """The share of each kind among the pods that want whole GPUs, or slices."""
    kinds = {one: pods for one, pods in requests().items() if (one.profile == FULL) is whole}
    return {one: pods / sum(kinds.values()) for one, pods in kinds.items()}


@cache
def _fragmented(mask: int) -> float:
    """Free slices that a pod of the trace cannot use, on average."""
    return sum(share * loss.unusable(mask, one.profile) for one, share in _shares(whole=False).items())


def _more_fragmented(mask: int, profile: str, start: int) -> float:
    return _fragmented(mask | device_mask(MODEL, profile, start)) - _fragmented(mask)


def _more_nodes_fragmented(free: int, gpus: int) -> float:
    def fragmented(left: int) -> float:
        return sum(share * left for one, share in _shares(whole=True).items() if left < one.gpus)

    return fragmented(free - gpus) - fragmented(free)


RULES: Final[Mapping[str, tuple[Callable[[int], loss.Rule], Callable[[int], WholeRule]]]] = {
    "random": (loss.at_random, _random_node),
    "first fit": (loss.BASELINES["first fit"], lambda _: _least_node(lambda *_: 0.0)),
    "best fit": (loss.BASELINES["best fit"], lambda _: _least_node(lambda free, _: free)),
    "best fit, high index": (loss.BASELINES["best fit, high index"], lambda _: _least_node(lambda free, _: free)),
    "fragmentation gradient": (lambda _: loss.least(_more_fragmented), lambda _: _least_node(_more_nodes_fragmented)),
}
"""For slices and for whole GPUs. The last is the rule of Weng et al. (ATC 2023): least growth of the fragmentation that
the trace's own pods would find."""
