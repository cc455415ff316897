"""Leases that stay as they are: when a plan need not look at them, and when it has to."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.core.desirability import shortest, span
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import Failure, Key, LeaseFacts, Snapshot
from tests.unit.core.simulation import Cluster, forgotten


def running(count: int = 3, *, gpus: int = 4) -> Cluster:
    """A node of whole GPUs with leases that are billed, once everything has been written."""
    cluster = Cluster()
    cluster.add_node("a", gpus)
    for number in range(count):
        cluster.create(f"lease-{number}", duration="10h")
    cluster.run(12)
    return cluster


def moving(facts: Snapshot, cluster: Cluster) -> set[str]:
    """Names of the leases that a plan has to look at."""
    return {one.lease.key.name for one in plan(facts, cluster.now).moving}


def changed(facts: Snapshot, name: str, **fields: object) -> Snapshot:
    """The same facts, of one lease others."""
    key = Key("team", name)
    leases = (replace(one, **fields) if one.key == key else one for one in facts.leases)  # type: ignore[arg-type]
    return replace(facts, leases=tuple(leases))


def lease(facts: Snapshot, name: str) -> LeaseFacts:
    return next(one for one in facts.leases if one.key.name == name)


def test_a_lease_that_runs_rests_and_the_plan_says_the_same_of_it() -> None:
    cluster = running()
    facts = cluster.snapshot()
    decided = plan(facts, cluster.now)
    assert not decided.moving
    assert {one.lease.key.name for one in decided.resting} == {"lease-0", "lease-1", "lease-2"}
    assert not decided.actions
    assert decided == plan(forgotten(facts), cluster.now)


def test_only_the_lease_that_changed_is_looked_at() -> None:
    cluster = running()
    facts = cluster.snapshot()
    assert moving(changed(facts, "lease-1", deleted_at=cluster.now), cluster) == {"lease-1"}
    assert moving(changed(facts, "lease-1", generation=2), cluster) == {"lease-1"}
    assert moving(facts, cluster) == set()


def test_what_changes_on_a_node_concerns_all_who_are_there_and_nobody_else() -> None:
    cluster = running(count=5)
    cluster.add_node("b", 4)
    cluster.run(12)
    facts = cluster.snapshot()
    on_b = {one.key.name for one in facts.leases if one.status.nodes == ["b"]}
    assert on_b, "no lease is on the second node"
    nodes = tuple(replace(one, cordoned=True) if one.name == "b" else one for one in facts.nodes)
    assert moving(replace(facts, nodes=nodes), cluster) == on_b


def test_a_heartbeat_changes_nothing_and_silence_does() -> None:
    cluster = running()
    facts = cluster.snapshot()
    (node,) = facts.nodes
    assert node.agent_until is not None
    assert moving(replace(facts, nodes=(node.heard(node.agent_until + timedelta(hours=1)),)), cluster) == set()
    silent = replace(facts, nodes=(node.heard(cluster.now - timedelta(seconds=1)),))
    assert moving(silent, cluster) == {"lease-0", "lease-1", "lease-2"}


def test_a_device_of_it_on_another_node_rouses_a_lease() -> None:
    cluster = running()
    cluster.add_node("b", 4)
    cluster.run(4)
    facts = cluster.snapshot()
    slot = next(slot for node in facts.nodes if node.name == "a" for slot in node.leased)
    stray = tuple(replace(one, slots=(*one.slots, slot)) if one.name == "b" else one for one in facts.nodes)
    roused = replace(facts, nodes=stray)
    assert moving(roused, cluster) == {slot.holder.name}
    assert plan(roused, cluster.now) == plan(forgotten(roused), cluster.now)


def test_what_the_api_server_refuses_rouses_a_lease() -> None:
    cluster = running()
    facts = cluster.snapshot()
    failure = Failure(Reason.NAME_TAKEN, "Somebody else has the name.", cluster.now + timedelta(minutes=1))
    refused = replace(facts, failures={lease(facts, "lease-2").uid: failure})
    assert moving(refused, cluster) == {"lease-2"}
    assert plan(refused, cluster.now) == plan(forgotten(refused), cluster.now)


def test_time_alone_rouses_a_lease_when_it_changes_something() -> None:
    cluster = running(count=1)
    facts = cluster.snapshot()
    assert not plan(facts, cluster.now).moving
    expires = lease(facts, "lease-0").status.expires_at
    assert expires is not None
    for ahead in (timedelta(minutes=4), timedelta(seconds=1), timedelta(), -timedelta(seconds=1)):
        nodes = tuple(node.heard(expires + timedelta(hours=1)) for node in facts.nodes)
        later = replace(facts, nodes=nodes)
        assert plan(later, expires - ahead) == plan(forgotten(later), expires - ahead)


def test_a_span_lasts_down_to_its_shortest_time() -> None:
    for minutes in (0, 1, 2, 3, 7, 60, 1000):
        left = timedelta(minutes=minutes, seconds=30)
        known = span(left)
        assert shortest(known) <= left
        assert span(shortest(known)) == known
        if shortest(known):
            assert span(shortest(known) - timedelta(microseconds=1)) < known
