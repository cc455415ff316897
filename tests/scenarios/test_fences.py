"""What an agent keeps out of use, and what it could not prove empty in time: planned around, never waited for."""

from __future__ import annotations

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.api.node import SlotState
from gpu_tenancy.core.slices import SliceState
from tests.unit.core.simulation import Cluster

WORKS = float("inf")


def cluster_of(count: int = 2, *, mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count, mig=mig)
    cluster.run(1)
    return cluster


def test_a_slice_that_is_fenced_is_planned_around() -> None:
    cluster = cluster_of(1, mig=(0,))
    cluster.fence("a", 0, 4, 5, 6, 7)
    lease = cluster.create("train", profile="3g.40gb", works=WORKS)
    cluster.run(4)
    ((_, slot),) = cluster.slots_of(lease)
    assert slot.start == 0
    late = cluster.create("late", profile="3g.40gb", works=WORKS)
    cluster.run(4)
    assert cluster.condition(late).reason is Reason.QUEUED
    cluster.fence("a", 0)
    cluster.run(4)
    assert cluster.is_true(late)


def test_who_is_served_on_a_fenced_slice_is_left_alone_and_goes_on_paying() -> None:
    cluster = cluster_of(1)
    lease = cluster.create("train", works=WORKS)
    cluster.run(4)
    before = cluster.slots_of(lease)
    cluster.fence("a", 0, *range(8))
    cluster.run(10)
    assert cluster.is_true(lease)
    assert cluster.slots_of(lease) == before
    assert cluster.slice_states()[SliceState.LEASED] == 8


def test_a_lease_that_is_not_ready_yet_moves_away_from_a_fence() -> None:
    cluster = cluster_of(2)
    lease = cluster.create("train", works=WORKS)
    cluster.lags = lambda _: True
    cluster.step()
    ((_, slot),) = cluster.slots_of(lease)
    cluster.fence("a", int(slot.gpu[-1]), *range(8))
    cluster.lags = lambda _: False
    cluster.run(6)
    assert cluster.is_true(lease)
    ((_, other),) = cluster.slots_of(lease)
    assert other.gpu != slot.gpu


def test_miners_leave_a_fenced_gpu_and_none_begins_there() -> None:
    cluster = cluster_of(2)
    cluster.add_pool()
    cluster.run(4)
    assert sum(cluster.mining().values()) == 2
    cluster.fence("a", 0, *range(8))
    cluster.run(4)
    assert sum(cluster.mining().values()) == 1


def test_an_idle_slice_that_is_fenced_counts_as_faulty() -> None:
    cluster = cluster_of(1, mig=(0,))
    cluster.fence("a", 0, 0, 1)
    states = cluster.slice_states()
    assert (states[SliceState.FAULTY], states[SliceState.IDLE]) == (2, 6)


def test_what_cannot_be_proven_empty_holds_up_neither_the_bill_nor_the_next_lease() -> None:
    cluster = cluster_of(2)
    old = cluster.create("old", works=WORKS)
    cluster.run(4)
    ((_, slot),) = cluster.slots_of(old)
    cluster.nodes["a"].stuck = True
    cluster.delete(old)
    cluster.run(6)
    assert cluster.nodes["a"].held[slot.device].state is SlotState.QUARANTINED
    cluster.fence("a", int(slot.gpu[-1]), *range(8))
    cluster.run(3)
    assert old not in cluster.leases or cluster.is_true(old, ConditionType.SETTLED)
    lease = cluster.create("new", works=WORKS)
    cluster.run(5)
    assert cluster.is_true(lease)
    ((_, other),) = cluster.slots_of(lease)
    assert other.gpu != slot.gpu


def test_a_lease_shows_how_its_devices_came_to_it_and_keeps_showing_it() -> None:
    cluster = cluster_of(1)
    cluster.add_pool()
    cluster.run(4)
    lease = cluster.create("train", works=WORKS, duration="20s")
    cluster.run(6)
    (shown,) = cluster.leases[lease].status.hand_overs
    ((node, slot),) = cluster.slots_of(lease)
    assert (shown.node, shown.device) == (node, slot.device)
    assert [one.name for one in shown.record.former] == ["pool"]
    assert shown.record.scrubbed_bytes == 80 << 30
    cluster.step()
    before = cluster.leases[lease].status.hand_overs
    cluster.edit(lease, suspend=True)
    cluster.run(6)
    assert not cluster.slots_of(lease)
    assert cluster.leases[lease].status.hand_overs == before


def test_a_tenant_is_not_told_which_other_tenant_was_there_before() -> None:
    cluster = cluster_of(1)
    first = cluster.create("secret", namespace="team-x", works=WORKS)
    cluster.run(4)
    cluster.delete(first)
    cluster.run(8)
    lease = cluster.create("train", works=WORKS)
    cluster.run(6)
    (shown,) = cluster.leases[lease].status.hand_overs
    device = cluster.nodes["a"].held[shown.device]
    assert device.hand_over is not None
    assert [one.name for one in device.hand_over.former] == ["secret"]
    assert shown.record.former == []
