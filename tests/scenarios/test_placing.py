"""Who gets which GPUs: facts, now → what is promised to whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core.actions import CreateClaimTemplate, CreateJob, SetSlots, StopMiner
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.podspec import Taint
from gpu_tenancy.core.snapshot import Key
from tests.unit.core.simulation import Cluster


def mining_cluster() -> Cluster:
    """Two nodes of eight GPUs, two of the sixteen in MIG mode, everything mining."""
    cluster = Cluster()
    cluster.add_node("a", 8, mig={6, 7})
    cluster.add_node("b", 8)
    cluster.add_pool()
    cluster.run(4)
    return cluster


def nodes_of(cluster: Cluster, lease: str) -> list[str]:
    return sorted({node for node, _ in cluster.slots_of(lease)})


def test_idle_gpus_mine_whole_and_mig_ones_on_their_widest_slice() -> None:
    assert mining_cluster().mining() == {"full": 14, "7g.80gb": 2}


def test_a_lease_of_four_gpus_preempts_exactly_four_miners_on_one_node() -> None:
    cluster = mining_cluster()
    train = cluster.create("train", count=4)
    decided = plan(cluster.snapshot(), cluster.now)
    stopped = [action.miner for action in decided.actions if isinstance(action, StopMiner)]
    assert len(stopped) == 4
    assert len({miner.node for miner in stopped}) == 1
    cluster.run(5)
    assert cluster.is_true(train)
    assert cluster.mining() == {"full": 10, "7g.80gb": 2}


def test_promises_are_written_before_anybody_is_stopped_and_pods_are_made_at_once() -> None:
    cluster = mining_cluster()
    cluster.create("train", count=4, works=5.0)
    kinds = [type(action) for action in cluster.operator().actions]
    assert kinds.index(SetSlots) < kinds.index(StopMiner) < kinds.index(CreateClaimTemplate) < kinds.index(CreateJob)


def test_a_slice_repartitions_one_gpu_and_the_rest_of_it_mines_on() -> None:
    cluster = mining_cluster()
    cluster.create("notebook", "3g.40gb")
    cluster.run(5)
    assert cluster.mining() == {"full": 14, "7g.80gb": 1, "4g.40gb": 1}
    assert len(cluster.evicted) == 1


def test_slices_gather_on_one_gpu_and_the_other_stays_whole() -> None:
    cluster = mining_cluster()
    leases = [cluster.create(f"l{number}", profile) for number, profile in enumerate(("3g.40gb", "2g.20gb", "1g.10gb"))]
    cluster.run(5)
    placed = {(slot.gpu, slot.profile, slot.start) for lease in leases for _, slot in cluster.slots_of(lease)}
    assert placed == {("GPU-a-6", "3g.40gb", 4), ("GPU-a-6", "2g.20gb", 2), ("GPU-a-6", "1g.10gb", 1)}


def test_a_lease_takes_idle_gpus_before_it_stops_a_miner() -> None:
    cluster = Cluster()
    cluster.add_node("a", 4)
    cluster.add_node("b", 4).labels["mines"] = "yes"
    cluster.add_pool(node_selector={"mines": "yes"})
    cluster.run(4)
    lease = cluster.create("train", count=4)
    cluster.run(3)
    assert nodes_of(cluster, lease) == ["a"]
    assert not cluster.evicted


def test_the_node_with_the_least_room_is_filled_first() -> None:
    cluster = Cluster()
    cluster.add_node("a", 8)
    cluster.add_node("b", 4)
    cluster.run(1)
    small, large = cluster.create("small", count=2), cluster.create("large", count=8)
    cluster.run(3)
    assert nodes_of(cluster, small) == ["b"]
    assert nodes_of(cluster, large) == ["a"]


def test_a_lease_that_is_draining_is_disturbed_less_gladly_than_miners() -> None:
    cluster = mining_cluster()
    first = cluster.create("first", count=8)
    cluster.deploy(first)
    cluster.run(4)
    assert nodes_of(cluster, first) == ["b"]
    cluster.delete(first)
    cluster.run(1)
    second = cluster.create("second", count=2)
    cluster.step()
    assert nodes_of(cluster, second) == ["a"]


def test_each_device_that_is_draining_counts() -> None:
    """A second lease on a GPU that drains waits for another tenant's grace; a miner elsewhere is stopped sooner."""
    cluster = Cluster()
    cluster.add_node("a", 1, mig={0}).labels["only"] = "a"
    cluster.run(1)
    former = [cluster.create(f"former-{number}", "3g.40gb") for number in range(2)]
    for lease in former:
        cluster.deploy(lease)
    cluster.run(5)
    cluster.add_node("b", 1, mig={0})
    cluster.add_pool()
    cluster.run(4)
    for lease in former:
        cluster.delete(lease)
    cluster.run(1.5)
    pod = {"containers": [], "nodeSelector": {"only": "a"}}
    bound = cluster.create("bound", "3g.40gb", template={"spec": pod})
    cluster.works[bound] = None
    free = cluster.create("free", "3g.40gb")
    cluster.step()
    assert nodes_of(cluster, bound) == ["a"]
    assert nodes_of(cluster, free) == ["b"]


def test_a_gang_is_placed_across_nodes_all_together() -> None:
    cluster = mining_cluster()
    gang = cluster.create("gang", count=6, pods=2)
    cluster.run(5)
    assert cluster.is_true(gang)
    assert nodes_of(cluster, gang) == ["a", "b"]
    assert len(cluster.slots_of(gang)) == 12


def test_a_gang_that_does_not_fit_as_a_whole_takes_nothing_and_stops_nobody() -> None:
    cluster = mining_cluster()
    cluster.create("first", count=4)
    cluster.run(4)
    stopped = len(cluster.evicted)
    gang = cluster.create("gang", count=6, pods=2)
    cluster.run(2)
    assert not cluster.slots_of(gang)
    assert len(cluster.evicted) == stopped
    assert cluster.condition(gang).reason is Reason.QUEUED


def test_a_conflict_on_one_node_leaves_no_half_of_a_gang() -> None:
    cluster = mining_cluster()
    beaten = ["b"]
    cluster.conflicts = lambda action: action.node in beaten and bool(beaten.pop())
    gang = cluster.create("gang", count=6, pods=2, works=5.0)
    cluster.step()
    assert not cluster.jobs, "the pods of half a gang were made"
    cluster.run(7)
    assert cluster.is_true(gang)
    assert len(cluster.slots_of(gang)) == 12


def test_a_placement_that_was_not_carried_out_is_the_same_attempt_again() -> None:
    cluster = mining_cluster()
    lease = cluster.create("train", works=5.0)
    cluster.dies_after = cluster.writes + 2
    cluster.step()
    assert cluster.leases[lease].status.attempt == 1
    assert not cluster.slots_of(lease)
    cluster.step()
    assert {slot.attempt for _, slot in cluster.slots_of(lease)} == {1}


def test_a_placement_is_of_the_attempt_that_the_lease_was_admitted_with() -> None:
    """The operator dies between admitting the next attempt and promising its devices, and the node comes back."""
    cluster = Cluster()
    cluster.add_node("a", 1)
    cluster.add_node("b", 1)
    lease = cluster.create("train", works=50.0)
    cluster.step()
    ((first, _),) = cluster.slots_of(lease)
    cluster.nodes[first].ready = False
    cluster.dies_after = cluster.writes + 1
    cluster.step()
    assert cluster.leases[lease].status.attempt == 2
    cluster.nodes[first].ready = True
    cluster.run(6)
    assert cluster.is_true(lease)
    assert {slot.attempt for _, slot in cluster.slots_of(lease)} == {cluster.leases[lease].status.attempt}
    assert [job.facts.attempt for job in cluster.jobs.values()] == [cluster.leases[lease].status.attempt]


def test_a_lease_is_ready_only_when_its_devices_are_offered_to_the_scheduler() -> None:
    cluster = Cluster()
    node = cluster.add_node("a", 1)
    lease = cluster.create("train")
    while not any(device.ready_at for device in node.held.values()):
        cluster.step()
    cluster.lags = lambda _: True
    cluster.run(3)
    assert not any(device.published for device in node.held.values())
    assert not cluster.is_true(lease)
    assert not cluster.records
    cluster.lags = lambda _: False
    cluster.run(1)
    assert cluster.is_true(lease)


def test_only_nodes_where_the_pods_may_run_are_used() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2).taints = (Taint("team", "b", "NoSchedule"),)
    cluster.add_node("b", 2).labels["disk"] = "hdd"
    cluster.add_node("c", 2).labels["disk"] = "ssd"
    pod = {"containers": [{"name": "main"}], "nodeSelector": {"disk": "ssd"}}
    selected = cluster.create("selected", template={"spec": pod})
    tolerant = cluster.create(
        "tolerant", count=2, template={"spec": {"containers": [], "tolerations": [{"operator": "Exists"}]}}
    )
    expression = {"key": "disk", "operator": "NotIn", "values": ["ssd", "none"]}
    affinity = {"nodeSelectorTerms": [{"matchExpressions": [expression, {"key": "disk", "operator": "Exists"}]}]}
    required = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": affinity}}
    averse = cluster.create("averse", template={"spec": {"containers": [], "affinity": required}})
    cluster.works |= dict.fromkeys((selected, tolerant, averse))
    cluster.step()
    assert nodes_of(cluster, selected) == ["c"]
    assert nodes_of(cluster, averse) == ["b"]
    assert nodes_of(cluster, tolerant) == ["a"]


def test_the_customary_gpu_taint_keeps_no_lease_away() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1).taints = (Taint("nvidia.com/gpu", "present", "NoSchedule"),)
    lease = cluster.create("train")
    cluster.run(3)
    assert cluster.is_true(lease)


@pytest.mark.parametrize(
    ("allocatable", "fits"),
    [
        pytest.param(Amount(16_000, 64 * 2**30, 3), 2, id="enough of everything for two"),
        pytest.param(Amount(15_999, 64 * 2**30, 3), 1, id="CPU for one"),
        pytest.param(Amount(16_000, 64 * 2**30 - 1, 3), 1, id="memory for one"),
        pytest.param(Amount(16_000, 64 * 2**30, 2), 1, id="pod slots for one"),
    ],
)
def test_cpu_memory_and_pod_slots_are_part_of_the_fit(allocatable: Amount, fits: int) -> None:
    cluster = Cluster()
    node = cluster.add_node("a", 4)
    node.allocatable, node.foreign = allocatable, Amount(0, 0, 1)
    for number in range(4):
        cluster.create(f"l{number}", cpu="8", memory="32Gi")
    cluster.step()
    assert len(node.slots) == fits


def test_miners_yield_cpu_and_memory_too() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2).allocatable = Amount(8_000, 16 * 2**30, 10)
    cluster.add_pool(resources={"cpu": "4", "memory": "1Gi"})
    cluster.run(3)
    assert cluster.mining() == {"full": 2}
    cluster.create("hungry", cpu="6")
    cluster.run(4)
    assert cluster.mining() == {}


def test_a_lease_without_a_model_takes_what_there_is() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1, model="A100-PCIE-40GB")
    cluster.add_node("b", 1, model="A100-SXM4-80GB")
    first, second = cluster.create("first"), cluster.create("second")
    picky = cluster.create("picky", model="A100-PCIE-40GB")
    cluster.step()
    assert (nodes_of(cluster, first), nodes_of(cluster, second)) == (["a"], ["b"])
    assert cluster.condition(picky).reason is Reason.QUEUED


def test_leases_created_in_one_instant_are_placed_by_name() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1)
    later, earlier = cluster.create("zz"), cluster.create("aa")
    cluster.step()
    assert cluster.slots_of(earlier)
    assert not cluster.slots_of(later)


def test_a_lease_that_is_recreated_under_its_name_gets_devices_of_other_names() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1)
    names = []
    for _ in range(2):
        lease = cluster.create("train")
        cluster.run(4)
        names.append(cluster.slots_of(lease)[0][1].device)
        cluster.delete(lease)
        cluster.run(4)
    assert names[0] != names[1]
    assert cluster.leases == {}


def test_slots_of_a_lease_that_does_not_exist_are_taken_back() -> None:
    cluster = Cluster()
    node = cluster.add_node("a", 1)
    ghost = cluster.create("ghost")
    cluster.run(3)
    cluster.leases.pop(ghost)
    cluster.run(3)
    assert not node.slots
    assert not node.held
    assert [str(record.spec.reason) for record in cluster.records.values()] == ["Deleted"]


def test_other_kinds_of_the_same_name_do_not_mix() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2)
    one = cluster.create("train", namespace="team-a")
    other = cluster.create("train", namespace="team-b")
    cluster.run(3)
    assert cluster.leases[one].key == Key("team-a", "train")
    assert {slot.holder.namespace for _, slot in cluster.slots_of(other)} == {"team-b"}
    assert cluster.is_true(one, ConditionType.ALLOCATED)
    assert cluster.is_true(other, ConditionType.ALLOCATED)


def test_a_plan_on_a_world_at_rest_writes_nothing() -> None:
    cluster = mining_cluster()
    cluster.create("train", count=3, pods=2)
    cluster.create("notebook", "2g.20gb")
    cluster.run(6)
    facts = cluster.snapshot()
    assert not plan(facts, cluster.now).actions
    assert not plan(replace(facts, nodes=facts.nodes[::-1]), cluster.now).actions


def test_without_a_model_large_gpus_are_not_used_up_where_small_ones_do() -> None:
    cluster = Cluster()
    for name, model in (("large", "A100-80GB-PCIe"), ("small", "A100-PCIE-40GB")):
        node = cluster.add_node(name, 2, model=model)
        node.gpus[:] = [gpu.model_copy(update={"memory_mib": 81920 if name == "large" else 40960}) for gpu in node.gpus]
    lease = cluster.create("train", count=2)
    cluster.run(5)
    assert nodes_of(cluster, lease) == ["small"]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_a_node_is_broken_only_where_no_broken_one_has_room(sizes: list[tuple[int, int]], count: int) -> None:
    cluster = Cluster()
    cluster.add_pool()
    for number, (gpus, taken) in enumerate(sizes):
        cluster.add_node(f"n{number}", gpus)
        if 0 < taken <= gpus:
            cluster.create(f"on-{number}", count=taken)
    cluster.run(6)
    free = {
        name: len(node.gpus) - sum(slot.holder.kind == "GpuLease" for slot in node.slots)
        for name, node in cluster.nodes.items()
    }
    broken = {name for name, left in free.items() if left < len(cluster.nodes[name].gpus)}
    lease = cluster.create("train", count=count)
    cluster.run(4)
    for name in nodes_of(cluster, lease):
        fits_exactly = free[name] == count
        assert name in broken or fits_exactly or all(free[other] < count for other in broken)
