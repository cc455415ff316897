"""Whatever leases ask for in turn, conversions keep to their dwell and budget, and nobody is worse off for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.core.actions import Plan, SetSlots
from gpu_tenancy.core.conversion import HOUR
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import ConversionRules
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster


class Demand(NamedTuple):
    """A lease that somebody asks for, and when the next one does."""

    profile: str
    gpus: int
    pods: int
    seconds: int
    tier: str
    pause: float


DEMANDS = st.lists(
    st.builds(
        Demand,
        profile=st.sampled_from(["full", "full", "1g.10gb", "3g.40gb", "7g.80gb"]),
        gpus=st.sampled_from([1, 1, 2, 3]),
        pods=st.sampled_from([1, 1, 2, 4]),
        seconds=st.sampled_from([2, 6, 40]),
        tier=st.sampled_from(["OnDemand", "OnDemand", "Spot"]),
        pause=st.sampled_from([0.5, 4, 15, 60, 1000]),
    ),
    min_size=2,
    max_size=8,
)


class Watch:
    """Looks at every plan of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.laws = cluster, Laws(cluster)
        self.changed: dict[str, list[datetime]] = {}
        """When the wanted mode of each GPU changed, by UUID."""

    def check(self) -> None:
        """After every step."""
        self.laws.check()
        decided, facts = self.cluster.last_plan, self.cluster.last_facts
        nodes = {node.name: node for node in facts.nodes}
        for action in decided.actions:
            if isinstance(action, SetSlots):
                before = {one.gpu: one for one in nodes[action.node].modes}
                begun = [one for one in action.modes if one != before.get(one.gpu)]
                for one in begun:
                    self.changed.setdefault(one.gpu, []).append(one.since)
                    gpu = nodes[action.node].gpu_of[one.gpu]
                    assert gpu.convertible
                    assert all(slot.gpu != one.gpu for slot in (*nodes[action.node].leased, *action.slots))
                    if one.mode is not gpu.declared:
                        self._somebody_waits()
        self._rules_are_kept()

    def _somebody_waits(self) -> None:
        """Without conversions nobody would have been placed who was not, and somebody waits for room."""
        facts = self.cluster.last_facts
        without = plan(replace(facts, conversion_rules=ConversionRules(on_demand=False)), self.cluster.now)
        assert _admitted(without) <= _admitted(self.cluster.last_plan)
        assert {one.lease.uid for one in self.cluster.last_plan.leases if one.refusal} - _admitted(without)

    def _rules_are_kept(self) -> None:
        rules = self.cluster.conversion_rules
        for node in self.cluster.nodes.values():
            recent = [at for at in node.converted if self.cluster.now - at < HOUR]
            assert len(recent) <= rules.per_node_and_hour
            decided = [at for at in node.conversions if self.cluster.now - at < HOUR]
            assert len(decided) <= rules.per_node_and_hour
        for times in self.changed.values():
            assert all(later - former >= rules.dwell for former, later in pairwise(times))


def _admitted(decided: Plan) -> set[str]:
    return {one.lease.uid for one in decided.leases if one.admitted_now}


@given(
    demands=DEMANDS,
    mined=st.booleans(),
    mig=st.sampled_from([set(), {0}, {0, 1}]),
    dwell=st.sampled_from([0, 10, 100]),
    budget=st.sampled_from([0, 1, 3]),
)
def test_no_demand_makes_conversions_thrash(
    demands: Sequence[Demand], mined: bool, mig: set[int], dwell: int, budget: int
) -> None:
    cluster = Cluster()
    cluster.conversion_rules = ConversionRules(dwell=timedelta(seconds=dwell), per_node_and_hour=budget)
    cluster.add_node("a", 3, mig, convertible={0, 1, 2})
    cluster.add_node("b", 2, convertible={1})
    if mined:
        cluster.add_pool()
    watch = Watch(cluster)
    for number, one in enumerate(demands):
        cluster.create(
            f"l{number}",
            one.profile,
            one.gpus if one.profile == "full" else 1,
            one.pods,
            duration=f"{one.seconds}s",
            notice="1s",
            tier=one.tier,
        )
        cluster.run(min(one.pause, 20), watch.check)
        cluster.now += timedelta(seconds=max(0, one.pause - 20))
    cluster.run(20, watch.check)
