"""preempt_decisions_per_s: 24,000 GPUs on 3,000 nodes, miners on all of them, and 500 leases that come at once.

Every lease needs GPUs from miners: a decision is who stops for whom. The figure is leases by the processor time of the
whole plan on one core, with all that it does besides: 3,000 nodes are looked at, leases ordered and checked, the miners
that stay laid out anew, and the writes worked out. That no other choice would stop fewer miners is not measured here
but proved in tests/unit/core/test_preemption.py, against brute force.
"""

from __future__ import annotations

from typing import Final

from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.core.actions import StopMiner
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import BookFacts, Snapshot
from tests.bench.figures import Figure, figure
from tests.bench.planner import BOOK, NOW, POOL, leases, miners, nodes, timed

NODES: Final = 3000
LEASES: Final = 500


def run(runs: int) -> list[Figure]:
    """The figure, the median of `runs` plans after one that warms up."""
    fleet = tuple(nodes(NODES))
    queue = Snapshot(
        leases=tuple(leases(LEASES)),
        pools=(POOL,),
        nodes=fleet,
        books=(BookFacts("book", "book-uid", 1, NOW, BOOK, PriceBookStatus()),),
        miners=tuple(miners(fleet)),
    )
    decided = plan(queue, NOW)
    stopped = sum(isinstance(action, StopMiner) for action in decided.actions)
    if decided.refusals or stopped < LEASES:
        without = len(decided.refusals)
        raise RuntimeError(f"{without} leases found no room, {stopped} miners stop: this measures something else")
    return [
        figure(
            "preempt_decisions_per_s",
            [LEASES / second for second in timed(queue, runs)],
            "leases/s",
            "≥ 500 at 24,000 GPUs full of miners, one core",
        )
    ]
