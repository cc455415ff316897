"""Gangs close together: within one rack where one has room for them, at no more miners' cost than elsewhere."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core import explain
from gpu_tenancy.core.planner import plan
from tests.unit.core.simulation import Cluster

BLOCK, RACK = "example.com/block", "example.com/rack"


def site(*racks: int, gpus: int = 8, per_block: int = 2, mining: bool = True) -> Cluster:
    """So many nodes in each rack, two racks in each block: r0-n0 is the first node of the first rack."""
    cluster = Cluster()
    cluster.topology_levels = (BLOCK, RACK)
    for rack, nodes in enumerate(racks):
        for number in range(nodes):
            node = cluster.add_node(f"r{rack}-n{number}", gpus)
            node.labels = {RACK: f"r{rack}", BLOCK: f"b{rack // per_block}"}
    if mining:
        cluster.add_pool()
    cluster.run(4)
    return cluster


def racks_of(cluster: Cluster, lease: str) -> list[str]:
    return sorted({node.partition("-")[0] for node, _ in cluster.slots_of(lease)})


def test_a_gang_is_within_one_rack_where_one_has_room_for_it() -> None:
    cluster = site(1, 2, 1)
    train = cluster.create("train", count=8, pods=2)
    cluster.run(5)
    assert racks_of(cluster, train) == ["r1"]


def test_the_reason_names_the_rack() -> None:
    cluster = site(1, 2)
    train = cluster.create("train", count=8, pods=2)
    facts = cluster.snapshot()
    decided = plan(facts, cluster.now)
    (lease,) = (one for one in facts.leases if one.uid == train)
    seats = explain.seats(lease, decided, facts)
    assert explain.reason(lease, seats, facts, cluster.now).endswith("Its 2 nodes are all in example.com/rack r1.")


def test_the_rack_with_least_room_to_spare_is_taken() -> None:
    cluster = site(4, 2, 3)
    train = cluster.create("train", count=8, pods=2)
    cluster.run(5)
    assert racks_of(cluster, train) == ["r1"]


def test_where_no_rack_has_room_a_block_has_and_at_last_anywhere_will_do() -> None:
    cluster = site(1, 1, 1, 1)
    within_a_block = cluster.create("block", count=8, pods=2)
    cluster.run(5)
    assert racks_of(cluster, within_a_block) in (["r0", "r1"], ["r2", "r3"])
    cluster = site(1, 1, 1, 1)
    anywhere = cluster.create("all", count=8, pods=3)
    cluster.run(5)
    assert cluster.is_true(anywhere)


def test_no_miner_stops_for_closeness() -> None:
    cluster = site(1, 1, 2, mining=False)
    cluster.add_pool(node_selector={RACK: "r2"})
    cluster.run(4)
    train = cluster.create("train", count=8, pods=2)
    cluster.run(5)
    assert racks_of(cluster, train) == ["r0", "r1"], "the rack that would hold it mines"
    assert not cluster.evicted


def test_a_gang_that_requires_a_rack_waits_for_one_and_is_told_how_much_room_there_is() -> None:
    cluster = site(2, 2)
    *_, last = [cluster.create(name, count=8, duration="1h") for name in ("a", "b", "c")]
    cluster.run(6)
    train = cluster.create("train", count=8, pods=2, topology={"required": RACK})
    cluster.run(5)
    condition = cluster.condition(train)
    assert condition.reason is Reason.QUEUED
    best = "Needs room for 2 pods with 8 × full (A100-SXM4-80GB) each within one example.com/rack; the best, "
    assert best in condition.message
    assert "has room for 1 beside the leases that run." in condition.message
    cluster.delete(last)
    cluster.run(20)
    assert racks_of(cluster, train) == ["r1"]


def test_what_no_rack_could_ever_hold_is_refused_with_the_largest() -> None:
    cluster = site(2, 3)
    train = cluster.create("train", count=8, pods=4, topology={"required": RACK})
    cluster.run(3)
    condition = cluster.condition(train, ConditionType.STALLED)
    assert condition.reason is Reason.IMPOSSIBLE
    assert condition.message.startswith("Needs room for 4 pods within one example.com/rack; the largest, r1, holds 3.")


def test_a_label_that_no_node_has_is_named() -> None:
    cluster = site(2)
    train = cluster.create("train", count=8, pods=2, topology={"required": "example.com/hall"})
    cluster.run(3)
    assert "No node has the label example.com/hall" in cluster.condition(train, ConditionType.STALLED).message


def test_a_preferred_level_is_begun_with() -> None:
    cluster = site(2, 2)
    train = cluster.create("train", count=8, pods=2, topology={"preferred": BLOCK})
    cluster.run(5)
    assert cluster.is_true(train)
    cluster.topology_levels = ()
    other = cluster.create("other", count=4, pods=2, topology={"preferred": RACK})
    cluster.run(5)
    assert len(racks_of(cluster, other)) == 1


def test_spot_leases_go_where_the_gang_can_be_together() -> None:
    cluster = site(2, 2)
    spot = [cluster.create(f"spot-{number}", count=8, tier="Spot", duration="5h") for number in range(4)]
    cluster.run(6)
    train = cluster.create("train", count=8, pods=2, topology={"required": RACK})
    cluster.run(5)
    told = {one for one in spot if cluster.leases[one].status.preemption is not None}
    assert len({rack for one in told for rack in racks_of(cluster, one)}) == 1
    assert len(told) == 2
    for _ in range(80):
        cluster.step(timedelta(seconds=1))
    assert len(racks_of(cluster, train)) == 1


def test_a_reservation_is_within_one_rack_and_is_kept_there() -> None:
    cluster = site(1, 2)
    cluster.create("in-the-way", count=8, duration="10m")
    cluster.run(4)
    begins = cluster.now + timedelta(minutes=30)
    late = cluster.create("late", count=8, pods=2, duration="1h", start=begins, topology={"required": RACK})
    cluster.run(4)
    reservation = cluster.leases[late].status.reservation
    assert reservation is not None
    assert {place.node for place in reservation.places} == {"r1-n0", "r1-n1"}
    while cluster.now < begins + timedelta(seconds=5):
        cluster.step(timedelta(seconds=15))
    assert racks_of(cluster, late) == ["r1"]


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(2, 4),
    st.lists(st.integers(1, 8), max_size=4),
)
def test_a_gang_is_spread_only_where_no_rack_had_room_for_it(racks: list[int], pods: int, others: list[int]) -> None:
    cluster = site(*racks)
    for number, count in enumerate(others):
        cluster.create(f"other-{number}", count=count)
    cluster.run(6)
    free = {f"r{rack}": 0 for rack in range(len(racks))}
    for node in cluster.nodes.values():
        leased = sum(slot.holder.kind == "GpuLease" for slot in node.slots)
        free[node.labels[RACK]] += (8 - leased) // 4
    train = cluster.create("train", count=4, pods=pods)
    cluster.run(6)
    if cluster.slots_of(train):
        together = len(racks_of(cluster, train)) == 1
        assert together == any(seats >= pods for seats in free.values())


@pytest.mark.parametrize("pods", [1, 2])
def test_without_labels_and_levels_nothing_is_different(pods: int) -> None:
    cluster = Cluster()
    cluster.topology_levels = (BLOCK, RACK)
    cluster.add_node("a", 8)
    cluster.add_node("b", 8)
    lease = cluster.create("train", count=4, pods=pods)
    cluster.run(6)
    assert cluster.is_true(lease)
