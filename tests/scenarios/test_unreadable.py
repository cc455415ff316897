"""What the operator cannot read (a newer version wrote it, or a hand) is left as it is, and so is what depends on it;
the others go on. Once it can be read, everything goes on from where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core import platform_status
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.stock import NODE_LOSS
from tests.unit.core.builders import book_spec, lease_spec
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import HEARTBEAT, Cluster

PARTS = pytest.mark.parametrize("part", ["spec", "status"])


def two_nodes() -> Cluster:
    """Eight GPUs on two nodes, all mining."""
    cluster = Cluster()
    cluster.add_node("a", 4)
    cluster.add_node("b", 4)
    cluster.add_book("book", book_spec())
    cluster.add_pool()
    cluster.run(4)
    return cluster


def running(cluster: Cluster, duration: str | None = None) -> str:
    """A lease that is billed and has a node of its own."""
    lease = cluster.create("train", count=4, works=float("inf"), duration=duration, notice="1s")
    cluster.run(4)
    assert cluster.is_true(lease)
    return lease


def node_of(cluster: Cluster, lease: str) -> str:
    """The node that a lease is on."""
    ((node, _), *_) = cluster.slots_of(lease)
    return node


def stalled(cluster: Cluster, lease: str) -> str:
    """What a lease says that it is stalled by."""
    condition = cluster.condition(lease, ConditionType.STALLED)
    assert (cluster.is_true(lease, ConditionType.STALLED), condition.reason) == (True, Reason.UNREADABLE)
    return condition.message


# --- nodes


@PARTS
def test_on_a_node_that_cannot_be_read_everything_stays_and_leases_run_on(part: str) -> None:
    cluster = two_nodes()
    lease = running(cluster)
    laws, before = Laws(cluster), cluster.nodes[node_of(cluster, lease)].slots
    node = cluster.nodes[node_of(cluster, lease)]
    node.unreadable = part
    pods = set(cluster.pods)
    cluster.run(20, laws.check)
    assert (node.slots, set(cluster.pods)) == (before, pods)
    assert cluster.is_true(lease)
    assert [record.is_open for record in cluster.records.values()] == [True]
    ready = cluster.condition(lease).message
    assert ready == f"4 of 4 devices on {node.name}. But GpuNode {node.name} cannot be read ({part})."
    assert stalled(cluster, lease).startswith(f"GpuNode {node.name} cannot be read ({part}): what the lease has there")
    assert cluster.leases[lease].status.nodes == [node.name]


@PARTS
def test_miners_on_a_node_that_cannot_be_read_are_neither_stopped_nor_started(part: str) -> None:
    cluster = two_nodes()
    gone = next(name for name in cluster.pods if cluster.pods[name].claim.node == "a")
    cluster.nodes["a"].unreadable = part
    cluster._gone(cluster.pods[gone])
    before = dict(cluster.pods)
    cluster.run(5)
    assert cluster.pods == before
    cluster.nodes["a"].unreadable = ""
    cluster.run(5)
    assert cluster.mining()["full"] == 8


@PARTS
def test_nothing_new_is_placed_on_a_node_that_cannot_be_read(part: str) -> None:
    cluster = two_nodes()
    cluster.nodes["a"].unreadable = part
    lease = cluster.create("gang", count=3, pods=2)
    cluster.run(3)
    ready = cluster.condition(lease)
    assert ready.reason is Reason.QUEUED, "what is not known is not impossible"
    assert f"(left out: GpuNode a cannot be read ({part}))." in ready.message
    assert not cluster.is_true(lease, ConditionType.STALLED)


def test_a_model_that_only_a_node_that_cannot_be_read_has_is_waited_for() -> None:
    cluster = two_nodes()
    cluster.add_node("c", 4, model="A100-SXM4-40GB")
    cluster.add_book("book", book_spec(model="A100-SXM4-40GB"))
    cluster.nodes["c"].unreadable = "status"
    lease = cluster.create("small", model="A100-SXM4-40GB")
    cluster.run(2)
    ready = cluster.condition(lease)
    assert ready.reason is Reason.QUEUED
    assert ready.message == (
        "Position 1 in the queue: no node that can be read could hold it (left out: GpuNode c cannot be read (status))."
    )


@PARTS
def test_a_lease_that_ends_on_a_node_that_cannot_be_read_is_billed_to_its_end_and_given_back_later(part: str) -> None:
    cluster = two_nodes()
    lease = running(cluster, "20s")
    node = cluster.nodes[node_of(cluster, lease)]
    node.unreadable = part
    slots, pods = node.slots, set(cluster.pods)
    cluster.run(40)
    assert cluster.ledger(lease) == [(20, "Expired")]
    assert (node.slots, set(cluster.pods)) == (slots, pods)
    assert f"GpuNode {node.name} cannot be read" in cluster.condition(lease).message
    assert stalled(cluster, lease)
    assert not cluster.is_true(lease, ConditionType.SETTLED)
    node.unreadable = ""
    cluster.run(10)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert cluster.ledger(lease) == [(20, "Expired")]
    assert cluster.mining()["full"] == 8


@PARTS
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_lease_that_is_being_prepared_waits_until_its_node_can_be_read(part: str, steps: int) -> None:
    cluster = two_nodes()
    cluster.lags = lambda _: True
    lease = cluster.create("train", count=4, works=float("inf"))
    for _ in range(steps):
        cluster.step()
    node = cluster.nodes[node_of(cluster, lease)]
    node.unreadable = part
    slots = node.slots
    cluster.lags = lambda _: False
    cluster.run(10)
    assert node.slots == slots
    assert not cluster.records
    assert len(cluster.slots_of(lease)) == 4, "it was placed a second time"
    assert cluster.condition(lease).reason is Reason.UNREADABLE
    node.unreadable = ""
    cluster.run(5)
    assert cluster.is_true(lease)
    assert cluster.leases[lease].status.attempt == 1


def test_half_a_gang_on_a_node_that_cannot_be_read_keeps_the_other_half() -> None:
    cluster = two_nodes()
    gang = cluster.create("gang", count=3, pods=2, works=float("inf"))
    cluster.run(5)
    assert cluster.is_true(gang)
    slots = cluster.slots_of(gang)
    cluster.nodes["b"].unreadable = "spec"
    cluster.edit(gang, suspend=True)
    cluster.run(10)
    assert cluster.slots_of(gang) == slots
    assert [reason for _, reason in cluster.ledger(gang)] == ["Suspended"]
    assert list(cluster.jobs) == ["gang-1"]
    cluster.nodes["b"].unreadable = ""
    cluster.run(10)
    assert not cluster.slots_of(gang)
    assert not cluster.jobs


def test_a_machine_that_dies_is_not_billed_for_even_where_its_gpu_node_cannot_be_read() -> None:
    cluster = two_nodes()
    lease = running(cluster)
    node = cluster.nodes[node_of(cluster, lease)]
    node.unreadable, node.agent, node.ready = "spec", False, False
    last_sign = node.agent_until
    cluster.run((HEARTBEAT + NODE_LOSS).total_seconds() + 5)
    (record,) = cluster.records.values()
    assert (record.spec.reason, record.spec.billable_to) == (Reason.NODE_LOST, last_sign.replace(microsecond=0))
    assert node_of(cluster, lease) == node.name, "it may have its devices there still"
    cluster.remove_node(node.name)
    cluster.run(8)
    assert cluster.is_true(lease)


def test_silence_is_not_marked_on_a_gpu_node_whose_conditions_cannot_be_read() -> None:
    cluster = two_nodes()
    node = cluster.nodes["a"]
    silent = node.agent_until + HEARTBEAT
    assert platform_status.node_conditions(node.facts(), silent)
    node.unreadable = "status"
    assert platform_status.node_conditions(node.facts(), silent) == node.facts().conditions


# --- leases


def test_of_a_lease_whose_status_cannot_be_read_nothing_is_decided() -> None:
    cluster = two_nodes()
    lease = running(cluster, "10s")
    cluster.unreadable.add(lease)
    facts, slots, records = cluster.leases[lease], cluster.slots_of(lease), dict(cluster.records)
    other = cluster.create("other", count=4)
    cluster.run(20)
    assert cluster.is_true(other), "the others go on"
    assert (cluster.leases[lease], cluster.slots_of(lease)) == (facts, slots)
    assert records.items() <= cluster.records.items()
    assert list(cluster.jobs) == ["train-1"]
    assert lease not in {outlook.lease.uid for outlook in cluster.last_plan.leases}
    cluster.unreadable.clear()
    cluster.run(10)
    assert cluster.ledger(lease) == [(10, "Expired")], "the end of its term is when it was"
    assert cluster.is_true(lease, ConditionType.SETTLED)


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_lease_whose_status_cannot_be_read_stays_as_far_as_it_has_come(steps: int) -> None:
    cluster = two_nodes()
    lease = cluster.create("train", count=4, works=float("inf"))
    for _ in range(steps):
        cluster.step()
    cluster.unreadable.add(lease)
    before = (cluster.leases[lease], cluster.slots_of(lease), dict(cluster.records), dict(cluster.templates))
    cluster.delete(lease)
    deleted = cluster.leases[lease]
    cluster.run(10)
    assert (deleted, *before[1:]) == (
        cluster.leases[lease], cluster.slots_of(lease), dict(cluster.records), dict(cluster.templates)
    )  # fmt: skip
    cluster.unreadable.clear()
    cluster.run(10)
    assert lease not in cluster.leases


# --- records


def suspended_and_resumed(cluster: Cluster) -> str:
    """A lease whose second segment is to begin, and whose first one the operator cannot read."""
    lease = running(cluster, "60s")
    cluster.edit(lease, suspend=True)
    cluster.run(8)
    cluster.unreadable.update(cluster.records)
    cluster.edit(lease, suspend=False)
    return lease


def test_a_lease_with_a_record_that_cannot_be_read_opens_no_segment_and_says_which() -> None:
    cluster = two_nodes()
    lease = suspended_and_resumed(cluster)
    (record,) = cluster.records
    reports = cluster.reports
    cluster.run(10)
    assert list(cluster.records) == [record]
    assert stalled(cluster, lease) == (
        f"UsageRecord {record} cannot be read (spec): no segment begins and nothing is settled or given back until it "
        "can be."
    )
    assert cluster.reports <= reports + 2, "it is said once"
    assert plan(cluster.snapshot(), cluster.now).actions == ()
    cluster.unreadable.clear()
    cluster.run(8)
    assert cluster.is_true(lease)
    assert [record.spec.segment for record in cluster.records.values()] == [1, 2]


def test_a_deleted_lease_with_a_record_that_cannot_be_read_is_not_settled() -> None:
    cluster = two_nodes()
    lease = running(cluster)
    cluster.unreadable.update(cluster.records)
    slots, cost = cluster.slots_of(lease), cluster.leases[lease].status.cost
    cluster.delete(lease)
    cluster.run(10)
    assert cluster.slots_of(lease) == slots
    assert cluster.leases[lease].status.cost == cost, "what was said of the bill stays said"
    assert cluster.condition(lease).reason is Reason.UNREADABLE
    assert [record.is_open for record in cluster.records.values()] == [True]
    deleted_at = cluster.leases[lease].deleted_at
    cluster.unreadable.clear()
    cluster.run(10)
    assert lease not in cluster.leases
    assert [reason for _, reason in cluster.ledger(lease)] == ["Deleted"]
    assert {record.spec.billable_to for record in cluster.records.values()} == {deleted_at}


def test_a_running_segment_ends_when_it_was_said_to_though_an_earlier_record_cannot_be_read() -> None:
    cluster = two_nodes()
    lease = running(cluster, "60s")
    cluster.edit(lease, suspend=True)
    cluster.run(8)
    cluster.edit(lease, suspend=False)
    cluster.run(6)
    assert cluster.is_true(lease)
    cluster.unreadable.add(min(cluster.records))
    cluster.run(80)
    assert sum(seconds for seconds, _ in cluster.ledger(lease)) == 60
    assert cluster.slots_of(lease)
    assert stalled(cluster, lease)
    cluster.unreadable.clear()
    cluster.run(10)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert not cluster.slots_of(lease)


# --- specs


def cannot_be_read(cluster: Cluster, lease: str) -> None:
    """The spec of a lease is one that the operator does not understand; another stands in for it."""
    stand_in = lease_spec(duration=None)
    cluster.leases[lease] = replace(cluster.leases[lease], spec=stand_in, invalid="spec.tier: Input should be OnDemand")


def test_a_lease_whose_spec_cannot_be_read_keeps_the_devices_that_are_prepared_for_it() -> None:
    cluster = two_nodes()
    lease = cluster.create("train", count=4, works=float("inf"))
    cluster.step()
    spec, slots = cluster.leases[lease].spec, cluster.slots_of(lease)
    cannot_be_read(cluster, lease)
    cluster.run(6)
    assert cluster.slots_of(lease) == slots
    assert not cluster.records
    assert cluster.condition(lease).reason is Reason.INVALID_SPEC
    cluster.leases[lease] = replace(cluster.leases[lease], spec=spec, invalid="")
    cluster.run(4)
    assert cluster.is_true(lease)


def test_whether_a_finished_job_ends_its_lease_is_not_decided_while_the_spec_cannot_be_read() -> None:
    cluster = two_nodes()
    lease = cluster.create("train", works=3.0, on_completion="Hold")
    cluster.run(3)
    cannot_be_read(cluster, lease)
    cluster.run(6)
    assert [job.facts.finished for job in cluster.jobs.values()] == ["Complete"]
    assert cluster.is_true(lease)
    assert [record.is_open for record in cluster.records.values()] == [True]
