"""mig_gap_closed_pct: how much of what is lost to fragmentation the product's placement gets back, leases never moved.

The loss system of [loss.py](loss.py): 100 A100s, 3,000 leases, four mixes of profiles at three loads. Each arrival is
placed by `World`, as in a plan: entered with what is left of their terms are all leases that run, and miners everywhere
else. Beside it, on the same arrivals, the rules of loss.py, and the bound of [bounds.py](bounds.py), for the leases
admitted and for their slice-seconds.

The weights in `core.desirability` were tuned on seeds 1 to 20, with another generator of random numbers; here are other
seeds. The share of the gap that is closed is (product − best fit, high index) / (bound − best fit, high index), each a
mean over the seeds for which the bound is worked out. The bound knows the future and refuses wide leases where narrow
ones come later: nothing that has to admit whoever fits comes near it above full load.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Final, NamedTuple

from scipy.stats import t as student

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import Gpu, GpuMode, Slot
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.desirability import span
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import filling
from tests.bench import bounds, fleet, loss
from tests.bench.figures import Figure, figure
from tests.bench.loss import MODEL, Asked, Fleet, Held, Rule, Served
from tests.bench.planner import NOW

GPUS: Final = 100
PER_NODE: Final = 4
LEASES: Final = 3000
LOADS: Final = (0.85, 1.0, 1.2)
SEEDS: Final = range(42, 52)
"""None of those that the weights were tuned on."""
BOUND_SEEDS: Final = range(42, 45)
"""A bound takes seconds: for these it is worked out, and what the product does where no lease has a known end."""
RIVAL: Final = "best fit, high index"
PRODUCT: Final = "product"
ADMITTED, WORTH = "admitted", "slice-seconds"
CONFIDENCE: Final = 0.95


def run(_: int) -> list[Figure]:
    """The figures, over all mixes and loads; the seeds are always the same."""
    settings = [_measured(mix, load) for mix in loss.MIXES for load in LOADS]
    figures = []
    for what, name in ((WORTH, "mig_gap_closed_pct"), (ADMITTED, "mig_gap_closed_admitted_pct")):
        rows = [setting.row(what) for setting in settings]
        closed = [setting.closed(what) for setting in settings]
        goal = f"≥ 50 of the way to a clairvoyant bound, {what}, of {len(rows)} mixes × loads"
        figures.append(replace(figure(name, closed, "%", goal), rows=tuple(rows)))
    gains = [setting.gain(what) for setting in settings for what in (ADMITTED, WORTH)]
    least = min(gain.mean - gain.within for gain in gains)
    goal = "> 0: least lower end of a 95 % interval of (product − best fit, high index)"
    return [*figures, figure("mig_gain_points", [least], "points", goal)]


# --- what was measured --------------------------------------------------------------------------------------------


class Gain(NamedTuple):
    """A paired difference, in points."""

    mean: float
    within: float
    """Half of its confidence interval."""


def gain(ours: Sequence[float], theirs: Sequence[float]) -> Gain:
    """The mean of the differences, and how sure that is."""
    differences = [our - their for our, their in zip(ours, theirs, strict=True)]
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return Gain(statistics.mean(differences), quantile * error)


class Setting(NamedTuple):
    """One mix at one load."""

    mix: str
    load: float
    served: Mapping[str, Sequence[Served]]
    """By rule, one for each seed."""
    bound: Sequence[Served]
    """One for each of BOUND_SEEDS."""
    blind: Sequence[Served]
    """Of the product where nobody says how long leases last, likewise."""

    def gain(self, what: str) -> Gain:
        """What the product is better by."""
        return gain(_of(what, self.served[PRODUCT]), _of(what, self.served[RIVAL]))

    def closed(self, what: str) -> float:
        """Percent of the gap to the bound that the product closes, over the seeds that have a bound."""
        ours, rival, best = (
            statistics.mean(_of(what, served[: len(self.bound)]))
            for served in (self.served[PRODUCT], self.served[RIVAL], self.bound)
        )
        return 100 * (ours - rival) / (best - rival)

    def row(self, what: str) -> dict[str, str | float]:
        """For people: everything in percent."""
        better = self.gain(what)
        blind = gain(_of(what, self.blind), _of(what, self.served[RIVAL][: len(self.blind)]))
        means = {name: round(statistics.mean(_of(what, served)), 2) for name, served in self.served.items()}
        return {
            "mix": self.mix,
            "load": self.load,
            **means,
            "bound": round(statistics.mean(_of(what, self.bound)), 2),
            "gain": f"{better.mean:+.2f} ± {better.within:.2f}",
            "closed %": round(self.closed(what), 1),
            "gain, terms unknown": f"{blind.mean:+.2f} ± {blind.within:.2f}",
        }


def _of(what: str, served: Sequence[Served]) -> list[float]:
    return [one.admitted if what == ADMITTED else one.worth for one in served]


def _measured(mix: str, load: float) -> Setting:
    rules = {**loss.BASELINES, PRODUCT: product}
    served: dict[str, list[Served]] = {name: [] for name in rules}
    bound, blind = [], []
    for seed in SEEDS:
        asked = loss.arrivals(mix, load, seed, LEASES, GPUS)
        for name, rule in rules.items():
            served[name].append(loss.run(asked, GPUS, rule(seed)))
        if seed in BOUND_SEEDS:
            bound.append(_bound(asked))
            blind.append(loss.run(asked, GPUS, product(seed, terms=False)))
    setting = Setting(mix, load, served, bound, blind)
    fleet.say(f"{mix} at {load}: {setting.row(ADMITTED)['gain']} points admitted, {setting.row(WORTH)['gain']} earned")
    return setting


def _bound(asked: Sequence[Asked]) -> Served:
    worth = [one.worth for one in asked]
    admitted = bounds.admission(asked, GPUS, [1.0] * len(asked))
    return Served(100 * admitted / len(asked), 100 * bounds.admission(asked, GPUS, worth) / sum(worth))


# --- the product's rule -------------------------------------------------------------------------------------------


_NEEDS: Final = PodNeeds(Amount(1, 1, 1))
_POOL: Final = Holder(kind=HolderKind.MINING_POOL, namespace="mining", name="pool", uid="pool-uid")
_LEASE: Final = Holder(kind=HolderKind.GPU_LEASE, namespace="team", name="lease", uid="lease-uid")


def product(_: int, *, terms: bool = True) -> Rule:
    """As a plan places a lease, on nodes of PER_NODE GPUs. `terms`: whether it is known how long leases last."""
    nodes: list[_Node] = []
    wants = {name: [Want(name, 1, 1, MODEL, _NEEDS)] for name in bounds.NAMES}

    def rule(running: Fleet, asked: Asked) -> tuple[int, int] | None:
        while len(nodes) * PER_NODE < len(running.masks):
            nodes.append(_Node(len(nodes)))
        world = World([node.facts(running.masks) for node in nodes], NOW, {})
        for held in running.held:
            left = timedelta(hours=held.ends - asked.at) if terms else None
            world.nodes[nodes[held.gpu // PER_NODE].name].hold(_slot(held), NOTHING, span(left))
        world.settle()
        placed = world.place(wants[asked.profile], timedelta(hours=asked.hours) if terms else None)
        if placed is None:
            return None
        [seat] = placed.seats
        return _number(seat.gpus[0].gpu), seat.start

    return rule


class _Node:
    """A node whose facts are the same objects for as long as the same leases are on it."""

    def __init__(self, number: int) -> None:
        self.name = f"node-{number:02d}"
        self._first = number * PER_NODE
        self._gpus = tuple(
            Gpu(index=index, uuid=f"GPU-{self._first + index}", model=MODEL, memory_mib=81_920, mode=GpuMode.MIG)
            for index in range(PER_NODE)
        )
        self._known: dict[tuple[int, ...], NodeFacts] = {}

    def facts(self, masks: Sequence[int]) -> NodeFacts:
        """With miners on all that is not leased."""
        mine = tuple(masks[self._first : self._first + PER_NODE])
        if mine not in self._known:
            slots = [slot for gpu, mask in zip(self._gpus, mine, strict=True) for slot in _miners(gpu, mask)]
            self._known[mine] = NodeFacts(
                self.name,
                1,
                self._gpus,
                tuple(slots),
                (),
                allocatable=Amount(128_000, 2**40, 110),
                agent_until=NOW + timedelta(seconds=40),
            )
        return self._known[mine]


def _number(gpu: Gpu) -> int:
    return int(gpu.uuid.removeprefix("GPU-"))


def _miners(gpu: Gpu, mask: int) -> list[Slot]:
    return [
        Slot.model_construct(
            device=f"{gpu.uuid}-{place.start}".lower(),
            gpu=gpu.uuid,
            profile=place.profile,
            start=place.start,
            holder=_POOL,
            since=NOW,
        )
        for place in filling(MODEL, mask)
    ]


@lru_cache(maxsize=4096)
def _slot(held: Held) -> Slot:
    return Slot.model_construct(
        device=f"gpu-{held.gpu}-{held.start}",
        gpu=f"GPU-{held.gpu}",
        profile=held.profile,
        start=held.start,
        holder=_LEASE,
        since=NOW,
    )
