"""What breaks: nodes, GPUs, agents. Leases are placed anew as a whole and billed for what they had."""

from __future__ import annotations

from datetime import timedelta

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.api.node import SlotState
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.stock import NODE_LOSS
from tests.unit.core.simulation import HEARTBEAT, Cluster


def two_nodes(count: int = 4) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count)
    cluster.add_node("b", count)
    cluster.run(1)
    return cluster


def gang(cluster: Cluster, works: float | None = float("inf"), duration: str | None = None) -> str:
    """A lease of three GPUs on each of two nodes, ready."""
    lease = cluster.create("gang", count=3, pods=2, works=works, duration=duration)
    if works is None:
        cluster.deploy(lease, 2)
    while not cluster.leases[lease].status.segment:
        cluster.step()
    cluster.run(2)
    return lease


def test_a_lost_node_closes_the_segment_and_the_gang_is_placed_anew_as_a_whole() -> None:
    cluster = two_nodes()
    lease = gang(cluster, duration="60s")
    cluster.remove_node("b")
    cluster.step()
    assert cluster.condition(lease).reason is Reason.NODE_LOST
    assert cluster.condition(lease).message == "3 of 6 devices are gone from b."
    assert not cluster.slots_of(lease), "half of the gang kept its devices"
    cluster.run(4)
    assert cluster.condition(lease).reason is Reason.IMPOSSIBLE
    assert not [job for job in cluster.jobs.values() if not job.facts.deleting]
    cluster.add_node("c", 4)
    cluster.run(6)
    assert cluster.is_true(lease)
    assert {slot.attempt for _, slot in cluster.slots_of(lease)} == {2}
    assert list(cluster.jobs) == ["gang-2"]
    cluster.run(60)
    (first, why), (second, end) = cluster.ledger(lease)
    assert (why, end, first + second) == ("NodeLost", "Expired", 60)


def test_pods_of_a_deployment_follow_their_lease_to_the_new_devices() -> None:
    cluster = two_nodes()
    lease = gang(cluster, works=None)
    before = {pod.name for pod in cluster.pods.values()}
    cluster.add_node("c", 4)
    cluster.remove_node("b")
    cluster.run(12)
    assert cluster.is_true(lease)
    promised = {(node, slot.device) for node, slot in cluster.slots_of(lease)}
    running = [pod for pod in cluster.pods.values() if pod.claim.prepared]
    assert len(running) == 2
    assert {place for pod in running for place in pod.claim.devices} == promised
    assert not before & {pod.name for pod in running}, "a pod kept a device of the former attempt"


def test_a_gpu_that_breaks_ends_the_segment_and_is_not_planned_on_again() -> None:
    cluster = two_nodes()
    lease = cluster.create("train", count=2, works=float("inf"))
    cluster.run(4)
    node, slot = cluster.slots_of(lease)[0]
    index = next(gpu.index for gpu in cluster.nodes[node].gpus if gpu.uuid == slot.gpu)
    cluster.break_gpu(node, index)
    cluster.step()
    assert cluster.condition(lease).message == f"GPU {index} of node {node} is not healthy: Xid 79."
    cluster.run(8)
    assert cluster.is_true(lease)
    assert slot.gpu not in {slot.gpu for _, slot in cluster.slots_of(lease)}
    assert [reason for _, reason in cluster.ledger(lease)] == ["NodeLost"]
    assert cluster.slice_states()[SliceState.FAULTY] == 8


def test_a_gpu_that_breaks_before_the_lease_is_ready_is_left_without_a_bill() -> None:
    cluster = two_nodes()
    lease = cluster.create("train")
    cluster.step()
    node, slot = cluster.slots_of(lease)[0]
    cluster.break_gpu(node, int(slot.gpu[-1]))
    cluster.run(6)
    assert cluster.is_true(lease)
    assert len(cluster.records) == 1
    assert {slot.attempt for _, slot in cluster.slots_of(lease)} == {2}


def test_a_device_that_cannot_be_made_says_so() -> None:
    cluster = two_nodes()
    cluster.lags = lambda _: True
    lease = cluster.create("train")
    cluster.step()
    ((node, slot),) = cluster.slots_of(lease)
    cluster.lags = lambda _: False
    cluster.step()
    cluster.lags = lambda _: True
    device = cluster.nodes[node].held[slot.device]
    device.state, device.message = SlotState.FAILED, "NVML: insufficient resources"
    cluster.step()
    ready = cluster.condition(lease)
    assert ready.reason is Reason.DEVICE_FAILED
    assert ready.message == (
        f"0 of 1 devices are ready; {slot.device} on {node} is being prepared: NVML: insufficient resources."
    )


def test_a_running_lease_on_a_silent_node_goes_on_and_says_why_it_may_not() -> None:
    cluster = two_nodes()
    lease = gang(cluster)
    cluster.nodes["b"].agent = False
    silent_since = cluster.nodes["b"].agent_until
    cluster.run(HEARTBEAT.total_seconds() + 2)
    assert cluster.is_true(lease)
    assert cluster.condition(lease).message == (
        "6 of 6 devices on a, b. But the agent on node b is silent: its heartbeat ran out at "
        f"{silent_since:%Y-%m-%dT%H:%M:%SZ}."
    )
    reports = cluster.reports
    cluster.run(10)
    assert cluster.reports == reports, "silence is written once, not every second"


def test_a_machine_that_dies_is_billed_up_to_its_last_sign_of_life_and_its_lease_is_placed_anew() -> None:
    cluster = two_nodes()
    lease = cluster.create("train", count=4, works=float("inf"))
    cluster.run(6)
    ((dead, _), *_) = cluster.slots_of(lease)
    node = cluster.nodes[dead]
    node.agent = node.ready = False
    last_sign = node.agent_until
    cluster.run((HEARTBEAT + NODE_LOSS).total_seconds() - 2)
    assert cluster.is_true(lease), "a machine may come back; too early to give up"
    cluster.run(8)
    assert cluster.is_true(lease)
    assert {name for name, _ in cluster.slots_of(lease)} == {"a", "b"} - {dead}
    first, second = (record.spec for record in cluster.records.values())
    assert (first.billable_to, first.reason) == (last_sign.replace(microsecond=0), Reason.NODE_LOST)
    assert second.billable_to is None


def test_nothing_new_is_planned_on_a_silent_node() -> None:
    cluster = two_nodes()
    cluster.nodes["b"].agent = False
    cluster.run(HEARTBEAT.total_seconds() + 2)
    lease = cluster.create("gang", count=3, pods=2)
    cluster.step()
    assert cluster.condition(lease).reason is Reason.QUEUED
    assert "left out: the agent on node b is silent" in cluster.condition(lease).message
    cluster.nodes["b"].agent = True
    cluster.run(4)
    assert cluster.is_true(lease)


def test_a_silent_agent_is_noticed_without_any_event() -> None:
    cluster = two_nodes()
    wake = plan(cluster.snapshot(), cluster.now).next_wake
    assert wake is not None
    assert cluster.nodes["a"].facts().agent_objection(wake)
    assert not cluster.nodes["a"].facts().agent_objection(wake - timedelta(seconds=1))


def test_a_lease_that_is_not_ready_yet_moves_away_from_a_node_that_falls_silent() -> None:
    cluster = two_nodes()
    lease = cluster.create("train", works=float("inf"))
    cluster.step()
    ((node, _),) = cluster.slots_of(lease)
    cluster.nodes[node].agent = False
    cluster.run(HEARTBEAT.total_seconds() + 6)
    assert cluster.is_true(lease)
    assert {other for other, _ in cluster.slots_of(lease)} != {node}
    assert list(cluster.jobs) == ["train-2"]


def test_the_end_of_a_lease_does_not_wait_for_a_silent_agent_but_the_gpu_does() -> None:
    cluster = two_nodes(1)
    lease = cluster.create("train", duration="60s", notice="1s")
    cluster.deploy(lease)
    cluster.run(4)
    ((node, _),) = cluster.slots_of(lease)
    cluster.nodes[node].agent = False
    cluster.run(70)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert cluster.ledger(lease) == [(60, "Expired")]
    assert cluster.nodes[node].held, "only the agent can give the device back"
    second, third = cluster.create("second"), cluster.create("third")
    cluster.run(4)
    assert cluster.is_true(second)
    assert cluster.condition(third).reason is Reason.QUEUED
    cluster.nodes[node].agent = True
    cluster.run(8)
    assert cluster.is_true(third)


def test_a_node_that_is_not_ready_is_not_planned_on() -> None:
    cluster = two_nodes()
    cluster.nodes["a"].ready = False
    lease = cluster.create("train", count=4)
    cluster.run(3)
    assert {node for node, _ in cluster.slots_of(lease)} == {"b"}


def test_a_cordoned_node_keeps_its_leases_and_miners_and_gets_no_new_ones() -> None:
    cluster = two_nodes(2)
    cluster.add_pool()
    lease = cluster.create("train")
    cluster.run(4)
    ((node, _),) = cluster.slots_of(lease)
    cluster.nodes[node].cordoned = True
    mining = cluster.mining()
    cluster.run(4)
    assert cluster.is_true(lease)
    assert cluster.mining() == mining
    cluster.delete(lease)
    cluster.run(6)
    assert cluster.mining() == mining
    cluster.nodes[node].cordoned = False
    cluster.run(4)
    assert cluster.mining()["full"] == 4


def test_every_slice_is_in_one_hand_through_a_whole_hand_over() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2, mig={0, 1})
    cluster.add_pool()
    cluster.run(4)
    seen = set()
    lease = cluster.create("notebook", "3g.40gb", duration="4s", notice="1s")
    cluster.deploy(lease)
    for _ in range(40):
        cluster.step()
        states = cluster.slice_states()
        assert states.total() == 16
        seen |= {state for state, slices in states.items() if slices}
    assert seen == {SliceState.MINING, SliceState.HAND_OVER, SliceState.LEASED}, "none contested, none idle"


def test_a_gpu_that_is_lost_does_not_keep_its_lease_from_being_settled() -> None:
    """Nobody can prove it empty, so nobody is given it; but the lease has moved, and ends elsewhere."""
    cluster = two_nodes()
    lease = cluster.create("train", works=3)
    cluster.run(2)
    [(node, slot)] = cluster.slots_of(lease)
    cluster.break_gpu(node, next(gpu.index for gpu in cluster.nodes[node].gpus if gpu.uuid == slot.gpu), lost=True)
    cluster.run(12)
    assert slot.device in cluster.nodes[node].held
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert [why for _, why in cluster.ledger(lease)] == ["NodeLost", "Completed"]
    cluster.delete(lease)
    cluster.run(2)
    assert lease not in cluster.leases
