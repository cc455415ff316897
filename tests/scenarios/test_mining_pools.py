"""What idle GPUs do: which pool gets which device, and what its miners look like."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpu_tenancy.api.names import ANY_GPU_TAINT
from gpu_tenancy.api.pool import MiningPoolStatus, PoolConditionType, PoolReason
from gpu_tenancy.core.actions import StartMiner, StopMiner, TouchClaim, TouchPod
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.podspec import Taint
from gpu_tenancy.core.snapshot import Failure, LeftClaim, StartingPod
from tests.unit.core.builders import START
from tests.unit.core.simulation import Cluster


def node_of_two(mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", 2, mig=mig)
    cluster.run(1)
    return cluster


def holders(cluster: Cluster) -> dict[str, str]:
    """Pool by device's placement."""
    slots = (slot for node in cluster.nodes.values() for slot in node.slots)
    return {f"{slot.gpu}/{slot.profile}": slot.holder.name for slot in slots}


def ready(cluster: Cluster, pool: str) -> tuple[PoolReason, str]:
    status: MiningPoolStatus = cluster.pools[pool].status
    condition = next(one for one in status.conditions if one.type is PoolConditionType.READY)
    return condition.reason, condition.message


def test_the_pool_of_the_highest_priority_mines_and_the_next_takes_over_when_it_goes() -> None:
    cluster = node_of_two()
    low = cluster.add_pool("low")
    cluster.run(3)
    high = cluster.add_pool("high", priority=5)
    cluster.run(4)
    assert set(holders(cluster).values()) == {"high"}
    assert ready(cluster, low) == (PoolReason.NOTHING_IDLE, "No idle device is left to this pool.")
    assert ready(cluster, high) == (PoolReason.MINING, "2 of 2 miners run.")
    del cluster.pools[high]
    cluster.run(4)
    assert set(holders(cluster).values()) == {"low"}
    assert cluster.mining() == {"full": 2}


DEDICATED = Taint("dedicated", "research", "NoSchedule")


def test_no_miner_is_started_where_a_taint_would_keep_its_pod_away_and_those_that_run_stay() -> None:
    cluster = node_of_two()
    cluster.nodes["a"].taints = (DEDICATED,)
    cluster.add_pool("low")
    cluster.run(3)
    assert holders(cluster) == {}
    cluster.nodes["a"].taints = (Taint(ANY_GPU_TAINT, "present", "NoSchedule"),)
    cluster.run(3)
    assert cluster.mining() == {"full": 2}
    cluster.nodes["a"].taints = (DEDICATED,)
    cluster.add_pool("high", priority=5)
    cluster.run(3)
    assert set(holders(cluster).values()) == {"low"}
    assert cluster.mining() == {"full": 2}


def test_a_taint_that_evicts_pods_ends_the_miners() -> None:
    cluster = node_of_two()
    cluster.add_pool("low")
    cluster.run(3)
    cluster.nodes["a"].taints = (replace(DEDICATED, effect="NoExecute"),)
    cluster.run(3)
    assert holders(cluster) == {}


def test_of_equal_pools_the_older_mines_and_a_newcomer_displaces_nobody() -> None:
    cluster = node_of_two()
    cluster.add_pool("zz")
    cluster.run(3)
    cluster.add_pool("aa")
    cluster.run(3)
    assert set(holders(cluster).values()) == {"zz"}
    assert not cluster.evicted


@pytest.mark.parametrize("how", ["suspend", "delete", "unreadable"])
def test_a_pool_that_may_not_mine_gives_its_devices_back(how: str) -> None:
    cluster = node_of_two()
    uid = cluster.add_pool()
    cluster.run(3)
    pool = cluster.pools[uid]
    match how:
        case "suspend":
            cluster.pools[uid] = replace(pool, spec=pool.spec.model_copy(update={"suspend": True}))
        case "delete":
            cluster.pools[uid] = replace(pool, deleting=True)
        case _:
            cluster.pools[uid] = replace(pool, invalid="spec.image is missing")
    cluster.run(4)
    assert not cluster.nodes["a"].slots
    assert not cluster.pods
    assert not cluster.miner_claims


def test_whole_leaves_the_rest_of_a_rented_gpu_idle_and_any_mines_on_it() -> None:
    cluster = node_of_two(mig=(0, 1))
    cluster.add_pool("whole", devices="Whole", priority=5)
    cluster.create("notebook", "3g.40gb")
    cluster.run(5)
    assert cluster.mining() == {"7g.80gb": 1}
    cluster.add_pool("any", devices="Any")
    cluster.run(4)
    assert cluster.mining() == {"7g.80gb": 1, "4g.40gb": 1}
    assert holders(cluster)["GPU-a-0/4g.40gb"] == "any"


def test_a_pool_mines_only_on_nodes_that_it_selects() -> None:
    cluster = node_of_two()
    cluster.add_node("b", 1).labels["site"] = "north"
    cluster.add_pool(node_selector={"site": "north"})
    cluster.run(3)
    assert holders(cluster) == {"GPU-b-0/full": "pool"}


def test_a_device_whose_node_lacks_cpu_for_the_miner_is_left_to_a_smaller_one() -> None:
    cluster = node_of_two()
    cluster.nodes["a"].allocatable = Amount(3_000, 16 * 2**30, 10)
    cluster.add_pool("large", priority=5, resources={"cpu": "2", "memory": "1Gi"})
    cluster.add_pool("small", resources={"cpu": "1", "memory": "1Gi"})
    cluster.run(4)
    assert sorted(holders(cluster).values()) == ["large", "small"]
    later = cluster.now + timedelta(seconds=1)
    assert not plan(cluster.snapshot(), later).actions, "who mines must not change from cycle to cycle"


@pytest.mark.parametrize("grace", [0, 3, 5])
def test_a_miner_gets_its_pools_grace(grace: int) -> None:
    cluster = node_of_two()
    cluster.add_pool(grace_seconds=grace)
    cluster.run(3)
    cluster.create("train")
    stops = [one for one in plan(cluster.snapshot(), cluster.now).actions if isinstance(one, StopMiner)]
    assert [one.grace_seconds for one in stops] == [grace]


def test_a_miner_that_stopped_by_itself_is_replaced() -> None:
    cluster = node_of_two()
    cluster.add_pool()
    cluster.run(3)
    facts = cluster.snapshot()
    dead, alive = facts.miners
    decided = plan(replace(facts, miners=(replace(dead, finished=True, running=False), alive)), cluster.now)
    assert [one.miner.name for one in decided.actions if isinstance(one, StopMiner)] == [dead.name]
    decided = plan(replace(facts, miners=(alive,)), cluster.now)
    assert [one.device for one in decided.actions if isinstance(one, StartMiner)] == [dead.device]


def test_miners_are_made_anew_when_their_flight_sheet_changes_and_not_when_its_place_in_the_queue_does() -> None:
    cluster = node_of_two()
    uid = cluster.add_pool()
    cluster.run(3)
    pool = cluster.pools[uid]
    cluster.pools[uid] = replace(pool, spec=pool.spec.model_copy(update={"priority": 7, "grace_seconds": 3}))
    assert not plan(cluster.snapshot(), cluster.now).actions
    cluster.pools[uid] = replace(pool, spec=pool.spec.model_copy(update={"image": "better"}))
    cluster.run(5)
    assert len(cluster.evicted) == 2
    assert cluster.mining() == {"full": 2}
    assert {pod.revision for pod in cluster.pods.values()} == {revision(cluster.pools[uid].spec)}


def test_only_the_missing_half_of_a_miner_is_made() -> None:
    cluster = node_of_two()
    cluster.add_pool()
    cluster.run(3)
    facts = cluster.snapshot()
    first, second = facts.miners
    halves = (replace(first, pod_uid="", running=False), replace(second, claim_uid="", running=False))
    starts = [one for one in plan(replace(facts, miners=halves), cluster.now).actions if isinstance(one, StartMiner)]
    assert {(one.device, one.claim_uid, one.missing_pod) for one in starts} == {
        (first.device, first.claim_uid, True),
        (second.device, "", False),
    }


def test_a_pool_whose_miners_are_refused_is_not_retried_before_its_time() -> None:
    cluster = node_of_two()
    uid = cluster.add_pool()
    facts = replace(
        cluster.snapshot(), failures={uid: Failure("ApiRejected", "quota exceeded", START.replace(hour=13))}
    )
    decided = plan(facts, cluster.now)
    assert not [one for one in decided.actions if isinstance(one, StartMiner)]
    assert decided.next_wake is not None


def test_without_pools_gpus_are_idle() -> None:
    cluster = node_of_two()
    cluster.run(2)
    assert not cluster.nodes["a"].slots


def test_a_miners_name_that_somebody_else_has_keeps_no_other_miner_of_the_pool_from_starting() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2)
    uid = cluster.add_pool()
    refused = Failure("NameTaken", "A Pod named mining/miner-a exists.", START.replace(hour=13))
    decided = plan(replace(cluster.snapshot(), failures={uid: refused}), cluster.now)
    assert len([action for action in decided.actions if isinstance(action, StartMiner)]) == 2


def test_a_miner_whose_claim_alone_was_deleted_is_stopped_once_and_replaced() -> None:
    cluster = node_of_two()
    cluster.add_pool()
    cluster.run(3)
    facts = cluster.snapshot()
    first, second = facts.miners
    for bereft, stops in ((True, [first.device]), (False, [])):
        changed = replace(facts, miners=(replace(first, deleting=True, running=False, bereft=bereft), second))
        stopped = [one for one in plan(changed, cluster.now).actions if isinstance(one, StopMiner)]
        assert [one.miner.device for one in stopped] == stops


def left(name: str, deleted: float, touched: float | None = None) -> LeftClaim:
    """A claim that was deleted, and touched, so many seconds after the start."""
    instant = None if touched is None else START + timedelta(seconds=touched)
    return LeftClaim("mining", name, f"uid-{name}", START + timedelta(seconds=deleted), instant)


@pytest.mark.parametrize(
    ("claim", "due"),
    [(left("one", 0), 30), (left("one", 0, 31), 151), (left("one", 7, 7), 127)],
    ids=["never touched", "touched once", "touched at once"],
)
def test_a_claim_that_stays_behind_is_touched_after_a_while_and_again_after_a_longer_one(
    claim: LeftClaim, due: int
) -> None:
    facts = replace(node_of_two().snapshot(), left_claims=(claim,))
    before = plan(facts, START + timedelta(seconds=due - 1))
    assert not [one for one in before.actions if isinstance(one, TouchClaim)]
    assert before.next_wake is not None
    assert before.next_wake <= START + timedelta(seconds=due)
    at = START + timedelta(seconds=due)
    assert [one for one in plan(facts, at).actions if isinstance(one, TouchClaim)] == [TouchClaim(claim, at)]


def starting(bound: float, touched: float | None = None) -> StartingPod:
    """A pod that was bound, and touched, so many seconds after the start."""
    instant = None if touched is None else START + timedelta(seconds=touched)
    return StartingPod("mining", "miner", "uid-pod", "n1", START + timedelta(seconds=bound), instant)


@pytest.mark.parametrize(
    ("pod", "due"),
    [(starting(0), 2), (starting(0, 2), 8), (starting(0, 8), 32), (starting(10, 3), 12), (starting(10, 11), 18)],
    ids=["never touched", "touched once", "touched twice", "touched before it was seen", "touched early"],
)
def test_a_bound_pod_that_does_not_begin_is_touched_ever_more_rarely(pod: StartingPod, due: int) -> None:
    facts = replace(node_of_two().snapshot(), starting=(pod,))
    before = plan(facts, START + timedelta(seconds=due - 1))
    assert not [one for one in before.actions if isinstance(one, TouchPod)]
    assert before.next_wake is not None
    assert before.next_wake <= START + timedelta(seconds=due)
    at = START + timedelta(seconds=due)
    assert [one for one in plan(facts, at).actions if isinstance(one, TouchPod)] == [TouchPod(pod, at)]


def test_a_burst_of_claims_that_are_late_is_not_touched_all_at_once() -> None:
    facts = replace(node_of_two().snapshot(), left_claims=tuple(left(f"claim-{number}", 0) for number in range(1000)))
    touched = [one for one in plan(facts, START + timedelta(minutes=5)).actions if isinstance(one, TouchClaim)]
    assert len(touched) == 128
