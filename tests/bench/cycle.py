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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from resource import getpagesize
from typing import Final, NamedTuple

from gpu_tenancy.api.lease import GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.controller.statuses import Statuses
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import BookFacts, Key, LeaseFacts, Snapshot
from gpu_tenancy.core.status import lease_status
from gpu_tenancy.mig.profiles import FULL
from tests.bench.figures import Figure, figure
from tests.bench.planner import BOOK, NOW, POOL, at_rest, collected, miners, nodes

SIZES: Final = (300, 1000, 3000)
"""Nodes of eight GPUs, each with ten leases on average."""
PER_NODE: Final = 10
CHANGED: Final = 100
NAMESPACES: Final = 20
WISHES: Final = (*(FULL,) * 3, *("1g.10gb",) * 3, *("2g.20gb",) * 2, "3g.40gb", "4g.40gb")
SOON: Final = NOW + timedelta(seconds=5)


def run(runs: int) -> list[Figure]:
    """`cycle_full_s`, `cycle_incremental_ms` and `cycle_memory_mb` at the largest size; the rows are their growth."""
    found = {size: measured(size, runs) for size in SIZES}
    rows = [
        {
            "nodes": size,
            "leases": size * PER_NODE,
            "full s": round(min(one.full), 2),
            "of that plan s": round(min(one.plan), 2),
            "incremental ms": round(min(one.incremental)),
            "memory MB": round(one.memory),
        }
        for size, one in found.items()
    ]
    largest, goal = found[SIZES[-1]], f"{SIZES[-1]} nodes, {SIZES[-1] * PER_NODE} leases"
    return [
        replace(figure("cycle_full_s", largest.full, "s", f"≤ 1.5, {goal}"), rows=rows),
        figure("cycle_incremental_ms", largest.incremental, "ms", f"≤ 100, {goal}, {CHANGED} changed"),
        figure("cycle_memory_mb", [largest.memory], "MB", f"≤ 1,000, {goal}"),
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


class Measured(NamedTuple):
    """Of one size."""

    full: list[float]
    """Seconds of processor time from nothing: plan and statuses."""
    plan: list[float]
    """Seconds of that for the plan."""
    incremental: list[float]
    """Milliseconds with a hundred leases changed."""
    memory: float
    """Megabytes that facts, what is remembered with them, and statuses take."""


def measured(size: int, runs: int) -> Measured:
    """So many runs, each on a fleet of which nothing is known yet."""
    rest = fleet(size)
    full, alone, incremental = [], [], []
    for number in range(runs):
        alone.append(_seconds(lambda: plan(_forgotten(rest), SOON)))
        fresh, statuses = _forgotten(rest), Statuses()
        full.append(_seconds(lambda: _cycle(fresh, statuses)))  # noqa: B023  (called at once)
        _cycle(fresh, statuses)  # what rests is known from the second look on
        changed = _changed(fresh, number)
        incremental.append(_seconds(lambda: _cycle(changed, statuses)) * 1000)  # noqa: B023
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        memory = apart.submit(_memory, size).result()
    return Measured(full, alone, incremental, memory)


def _forgotten(rest: Snapshot) -> Snapshot:
    """The same facts, of which nothing was found out yet."""
    nodes, leases = (replace(node) for node in rest.nodes), (replace(lease) for lease in rest.leases)
    return replace(rest, nodes=tuple(nodes), leases=tuple(leases))


def _memory(size: int) -> float:
    """Megabytes by which a process of its own grows; what only making the fleet took is given back before."""
    before = _resident()
    rest, statuses = fleet(size), Statuses()
    _cycle(rest, statuses)
    _cycle(rest, statuses)
    gc.collect()
    return _resident() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * getpagesize() / 2**20


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


def _seconds(work: Callable[[], object]) -> float:
    with collected():
        started = time.process_time()
        work()
        return time.process_time() - started
