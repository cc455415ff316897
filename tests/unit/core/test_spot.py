"""Whose leaving makes room: nobody for a plan that does not complete, nobody without need, for a pod the cheapest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import chain, combinations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import Snapshot
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster, mask

SLICES = ("1g.10gb", "2g.20gb", "3g.40gb")
NODES = ("a", "b")

OLD = st.tuples(
    st.sampled_from(["full", "full", *SLICES]),
    st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    st.booleans(),
    st.sampled_from(["1", "40"]),
    st.integers(0, 9),
)
"""A lease that is there: profile; GPUs per pod, pods; spot; CPU; seconds until the next one comes."""
NEW = st.tuples(
    st.sampled_from(["full", "full", "1g.10gb", "3g.40gb", "7g.80gb"]), st.integers(1, 3), st.sampled_from(["1", "50"])
)
"""A firm lease that comes: profile, GPUs per pod, CPU."""


def crowd(leases: Collection[tuple[str, tuple[int, int], bool, str, int]]) -> Cluster:
    """A cluster full of these, as far as they fit."""
    cluster = Cluster()
    for name in NODES:
        cluster.add_node(name, 3, mig={2}).allocatable = Amount(100_000, 2**40, 110)
    cluster.run(1)
    for number, (profile, (count, pods), is_spot, cpu, seconds) in enumerate(leases):
        tier = "Spot" if is_spot else "OnDemand"
        cluster.create(f"l{number}", profile, count if profile == "full" else 1, pods, tier=tier, cpu=cpu, memory="1Gi")
        cluster.run(1.5)
        cluster.step(timedelta(seconds=seconds))
    for uid in [uid for uid in cluster.leases if not cluster.is_true(uid)]:
        cluster.delete(uid)
    cluster.run(2)
    return cluster


def lost_work(cluster: Cluster, lease: str) -> int:
    """Slice-seconds, and one so that one lease is less than two."""
    slices = sum(mask(slot).bit_count() for _, slot in cluster.slots_of(lease))
    [record] = [record.spec for record in cluster.records.values() if record.spec.contract == lease]
    return 1 + slices * int((cluster.now - record.billable_from).total_seconds())


def without(facts: Snapshot, leases: Collection[str]) -> Snapshot:
    """As if these had never been."""
    nodes = tuple(
        replace(
            node,
            slots=tuple(slot for slot in node.slots if slot.holder.uid not in leases),
            observed=tuple(slot for slot in node.observed if slot.holder.uid not in leases),
        )
        for node in facts.nodes
    )
    return replace(facts, nodes=nodes, leases=tuple(lease for lease in facts.leases if lease.uid not in leases))


def is_placed(facts: Snapshot, cluster: Cluster, lease: str) -> bool:
    return any(one.lease.uid == lease and one.admitted_now for one in plan(facts, cluster.now).leases)


def subsets(leases: Collection[str]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(leases, size) for size in range(len(leases) + 1))


def told(cluster: Cluster) -> set[str]:
    """Leases that have notice with the next plan."""
    return {one.lease.uid for one in plan(cluster.snapshot(), cluster.now).leases if one.preemption is not None}


@settings(max_examples=settings().max_examples // 2)
@given(st.lists(OLD, max_size=7), NEW)
def test_for_one_pod_no_other_leases_cost_less_than_those_that_are_told(
    old: list[tuple[str, tuple[int, int], bool, str, int]], new: tuple[str, int, str]
) -> None:
    cluster = crowd(old)
    candidates = [uid for uid, lease in cluster.leases.items() if lease.spec.tier == "Spot"]
    profile, count, cpu = new
    firm = cluster.create("new", profile, count if profile == "full" else 1, cpu=cpu, memory="1Gi")
    facts, chosen = cluster.snapshot(), told(cluster)
    ways = [set(one) for one in subsets(candidates) if is_placed(without(facts, one), cluster, firm)]
    if not ways or set() in ways:
        assert chosen == set()
        return
    assert chosen in ways
    cheapest = min(sum(lost_work(cluster, one) for one in way) for way in ways)
    assert sum(lost_work(cluster, one) for one in chosen) == cheapest


@settings(max_examples=settings().max_examples // 2)
@given(st.lists(OLD, max_size=7), NEW, st.integers(2, 3))
def test_for_a_gang_whoever_is_told_is_needed(
    old: list[tuple[str, tuple[int, int], bool, str, int]], new: tuple[str, int, str], pods: int
) -> None:
    cluster = crowd(old)
    candidates = {uid for uid, lease in cluster.leases.items() if lease.spec.tier == "Spot"}
    profile, count, cpu = new
    firm = cluster.create("new", profile, count if profile == "full" else 1, pods, cpu=cpu, memory="1Gi")
    facts, chosen = cluster.snapshot(), told(cluster)
    if is_placed(facts, cluster, firm) or not is_placed(without(facts, candidates), cluster, firm):
        assert chosen == set()
        return
    assert is_placed(without(facts, chosen), cluster, firm)
    assert not any(is_placed(without(facts, chosen - {one}), cluster, firm) for one in chosen)


@settings(max_examples=settings().max_examples // 2)
@given(st.lists(OLD, min_size=1, max_size=7), st.lists(NEW, min_size=1, max_size=3))
def test_a_plan_that_told_somebody_tells_the_same_again_and_nobody_else(
    old: list[tuple[str, tuple[int, int], bool, str, int]], new: list[tuple[str, int, str]]
) -> None:
    cluster = crowd(old)
    for number, (profile, count, cpu) in enumerate(new):
        cluster.create(f"new{number}", profile, count if profile == "full" else 1, cpu=cpu, memory="1Gi")
    for _ in range(8):
        cluster.step(timedelta(milliseconds=100))
    notices = {uid: lease.status.preemption for uid, lease in cluster.leases.items()}
    for _ in range(6):
        cluster.step()
        assert {uid: lease.status.preemption for uid, lease in cluster.leases.items()} == notices
        assert not cluster.last_plan.actions


ACT = st.one_of(
    st.tuples(
        st.just("spot"),
        st.sampled_from(["full", "full", "1g.10gb", "3g.40gb"]),
        st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    ),
    st.tuples(
        st.just("firm"),
        st.sampled_from(["full", "full", "3g.40gb", "7g.80gb"]),
        st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    ),
    st.tuples(
        st.sampled_from(["delete", "suspend", "resume", "killed", "beaten", "lagging", "wait", "wait"]),
        st.integers(0, 9),
    ),
)
"""What happens next: a lease comes; something happens to one, to the operator or to an agent; or time passes."""


@settings(max_examples=settings().max_examples // 4)  # each is some hundred cycles
@given(st.lists(ACT, min_size=3, max_size=25))
def test_whatever_happens_the_laws_hold(acts: list[tuple[Any, ...]]) -> None:
    cluster = Cluster()
    laws = Laws(cluster)
    cluster.add_node("a", 2, mig={1})
    cluster.add_node("b", 1)
    cluster.add_pool()
    cluster.run(2, laws.check)
    beaten: list[str] = []
    cluster.conflicts = lambda action: bool(beaten) and beaten.pop() == action.node
    for number, (act, *more) in enumerate(acts):
        _happens(cluster, number, act, more, beaten)
        cluster.step()
        laws.check()
    cluster.lags = lambda _: False
    cluster.run(60, laws.check)
    for uid in list(cluster.leases):
        cluster.delete(uid)
    cluster.run(20, laws.check)
    assert not cluster.leases
    assert all(not record.is_open for record in cluster.records.values())


def _happens(cluster: Cluster, number: int, act: str, more: list[Any], beaten: list[str]) -> None:
    if act in {"spot", "firm"}:
        profile, (count, pods) = more
        tier: dict[str, Any] = {"tier": "Spot", "preemption_notice": "5s"}
        kind = tier if act == "spot" else {"duration": "40s", "notice": "1s"}
        lease = cluster.create(f"l{number}", profile, count if profile == "full" else 1, pods, **kind)
        cluster.deploy(lease, pods)
        return
    leases, which = list(cluster.leases), more[0]
    match act:
        case "delete" if leases:
            cluster.delete(leases[which % len(leases)])
        case "suspend" | "resume" if leases:
            cluster.edit(leases[which % len(leases)], suspend=act == "suspend")
        case "killed":
            cluster.dies_after = cluster.writes + which
        case "beaten":
            beaten.append("a")
        case "lagging":
            cluster.lags = lambda node: node.name == "a" and which % 2 == 0
        case _:
            cluster.run(which)
