"""A cycle's thinking on a large fleet: plan and statuses, from nothing and when a hundred leases have changed.

Every lease runs and every GPU that is not leased mines. `full`: what an operator that has just started does, nothing of
the facts being known from before. `incremental`: fifty leases more and fifty that are deleted, everything else as it
was. No API server takes part; facts are taken for gathered.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from resource import RUSAGE_SELF, getrusage
from typing import Final

from gpu_tenancy.api.lease import GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.controller.statuses import Statuses
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import BookFacts, Key, LeaseFacts, Snapshot
from gpu_tenancy.core.status import lease_status
from gpu_tenancy.mig.profiles import FULL
from tests.bench.figures import Figure, figure
from tests.bench.planner import BOOK, NOW, POOL, at_rest, miners, nodes

SIZES: Final = (300, 1000, 3000)
"""Nodes of eight GPUs, each with ten leases on average."""
PER_NODE: Final = 10
CHANGED: Final = 100
NAMESPACES: Final = 20
WISHES: Final = (*(FULL,) * 3, *("1g.10gb",) * 3, *("2g.20gb",) * 2, "3g.40gb", "4g.40gb")
SOON: Final = NOW + timedelta(seconds=5)


def run(runs: int) -> list[Figure]:
    """`cycle_full_s` and `cycle_incremental_ms` at the largest size; the others are their growth."""
    full, incremental = {}, {}
    for size in SIZES:
        rest = fleet(size)
        full[size], incremental[size] = measured(rest, runs)
    largest = SIZES[-1]
    rows = [
        {"nodes": size, "leases": size * PER_NODE, "full s": min(full[size]), "incremental ms": min(incremental[size])}
        for size in SIZES
    ]
    memory = getrusage(RUSAGE_SELF).ru_maxrss / 1024
    goal = f"{largest} nodes, {largest * PER_NODE} leases"
    return [
        replace(figure("cycle_full_s", full[largest], "s", f"≤ 1.5, {goal}"), rows=rows),
        figure("cycle_incremental_ms", incremental[largest], "ms", f"≤ 100, {goal}, {CHANGED} changed"),
        figure("cycle_memory_mb", [memory], "MB", f"≤ 1,000, {goal}"),
    ]


def fleet(size: int) -> Snapshot:
    """A fleet on which all leases run."""
    bare = tuple(nodes(size))
    queue = Snapshot(
        leases=tuple(leases(size * PER_NODE)),
        pools=(POOL,),
        nodes=bare,
        books=(BookFacts("book", "book-uid", 1, NOW, BOOK, PriceBookStatus()),),
        miners=tuple(miners(bare)),
    )
    facts = at_rest(queue, plan(queue, NOW))
    said = {one.lease.uid: lease_status(one, None, NOW) for one in plan(facts, NOW).leases}
    return replace(facts, leases=tuple(replace(lease, status=said[lease.uid]) for lease in facts.leases))


def leases(count: int, name: str = "lease") -> Iterator[LeaseFacts]:
    """Leases of an hour to a day, of slices and whole GPUs, of many namespaces."""
    chance = random.Random(17)
    for number in range(count):
        term = {"duration": f"{chance.randint(60, 1440)}m"}
        spec = GpuLeaseSpec.model_validate({"gpus": {"profile": chance.choice(WISHES)}, "term": term})
        key = Key(f"team-{number % NAMESPACES}", f"{name}-{number}")
        yield LeaseFacts(key, f"{name}-{number}", 1, NOW - timedelta(hours=1), spec, GpuLeaseStatus())


def measured(rest: Snapshot, runs: int) -> tuple[list[float], list[float]]:
    """Seconds from nothing, and milliseconds with a hundred leases changed, of processor time."""
    full, incremental = [], []
    for number in range(runs):
        fresh = replace(
            rest,
            nodes=tuple(replace(node) for node in rest.nodes),
            leases=tuple(replace(lease) for lease in rest.leases),
        )
        statuses = Statuses()
        full.append(_seconds(lambda: _cycle(fresh, statuses)))  # noqa: B023  (called at once)
        _cycle(fresh, statuses)  # what rests is known from the second look on
        changed = _changed(fresh, number)
        incremental.append(_seconds(lambda: _cycle(changed, statuses)) * 1000)  # noqa: B023
    return full, incremental


def _changed(rest: Snapshot, number: int) -> Snapshot:
    gone = set(range(number * CHANGED // 2, (number + 1) * CHANGED // 2))
    others = [
        replace(lease, deleted_at=SOON, generation=2) if place in gone else lease
        for place, lease in enumerate(rest.leases)
    ]
    return replace(rest, leases=(*others, *leases(CHANGED // 2, f"more-{number}")))


def _cycle(snapshot: Snapshot, statuses: Statuses) -> None:
    for uid in statuses.changing(plan(snapshot, SOON), {}, SOON):
        statuses.stored(uid, SOON)


def _seconds(work: Callable[[], None]) -> float:
    gc.collect()
    gc.freeze()
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        gc.unfreeze()
