"""A plan's working copy is gone when the plan is made, without the garbage collector: an operator plans all day."""

from __future__ import annotations

import gc

from gpu_tenancy.core.books import NodeBook
from gpu_tenancy.core.planner import plan
from tests.unit.core.simulation import Cluster


def test_no_node_of_the_working_copy_outlives_its_plan() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.add_node(name, 4, mig={2, 3})
    cluster.run(1)
    for number, profile in enumerate(("full", "full", "2g.20gb", "1g.10gb")):
        cluster.create(f"l{number}", profile, 1, 1)
    facts = cluster.snapshot()
    gc.collect()
    others = len(books())
    gc.disable()
    try:
        decided = plan(facts, cluster.now)
        left = len(books())
    finally:
        gc.enable()
    assert decided.actions
    assert left == others


def books() -> list[NodeBook]:
    return [one for one in gc.get_objects() if isinstance(one, NodeBook)]
