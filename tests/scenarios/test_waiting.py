"""Why is my lease pending? It waits with its place and numbers, or is refused with a sentence that names the remedy."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core.actions import CreateClaimTemplate
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.podspec import Taint
from gpu_tenancy.core.snapshot import Failure
from gpu_tenancy.core.status import lease_status
from tests.unit.core.builders import MODEL
from tests.unit.core.simulation import Cluster


def one_node(count: int = 8, mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count, mig=mig).allocatable = Amount(64_000, 512 * 2**30, 110)
    cluster.run(1)
    return cluster


def said(cluster: Cluster, lease: str) -> tuple[str, str]:
    """Reason and message of Ready, once it has been looked at."""
    cluster.step()
    ready = cluster.condition(lease)
    assert ready.status is ConditionStatus.FALSE
    return str(ready.reason), ready.message


# --- waiting


def test_what_cannot_fit_waits_with_its_position_and_what_would_fit_later_goes_first() -> None:
    cluster = one_node()
    cluster.create("first", count=6)
    cluster.run(2)
    large = cluster.create("large", count=4)
    cluster.run(1)
    larger = cluster.create("larger", count=8)
    cluster.run(1)
    small = cluster.create("small", count=2)
    cluster.run(3)
    assert cluster.is_true(small)
    assert said(cluster, large) == (
        "Queued",
        (
            f"Position 1 in the queue: needs 4 free GPUs ({MODEL}) on one node; the best node has 0 beside the leases "
            "that run. It is not known when there will be: 1 lease on a has no end."
        ),
    )
    assert cluster.leases[large].status.position == 1
    assert cluster.leases[larger].status.position == 2


def test_the_message_of_a_gang_counts_the_pods_that_there_is_room_for() -> None:
    cluster = one_node()
    cluster.create("first", count=3)
    cluster.run(3)
    gang = cluster.create("gang", count=2, pods=3, cpu="16", memory="64Gi")
    assert said(cluster, gang)[1] == (
        f"Position 1 in the queue: needs room for 3 pods with 2 free GPUs ({MODEL}), 16 CPU and 64Gi memory each; "
        "there is room for 2 beside the leases that run. It is not known when there will be: 1 lease on a has no end."
    )


def test_the_message_of_a_slice_counts_what_is_left() -> None:
    cluster = one_node(2, mig=(0,))
    cluster.create("first", "3g.40gb")
    cluster.run(3)
    gang = cluster.create("gang", "2g.20gb", pods=3)
    assert said(cluster, gang)[1] == (
        f"Position 1 in the queue: needs 3 free 2g.20gb ({MODEL}), 1 CPU and 1Gi memory each; "
        "there is room for 2 beside the leases that run. It is not known when there will be: 1 lease on a has no end."
    )


def test_nodes_that_are_left_out_are_named_with_the_reason() -> None:
    cluster = one_node()
    cluster.nodes["a"].cordoned = True
    assert said(cluster, cluster.create("train"))[1] == (
        f"Position 1 in the queue: needs 1 free GPU ({MODEL}) on one node; "
        "the best node has 0 beside the leases that run (left out: node a is cordoned)."
    )


def test_who_waits_is_served_in_order_of_age_as_soon_as_there_is_room() -> None:
    cluster = one_node()
    first = cluster.create("first", count=8)
    cluster.run(3)
    second, third = cluster.create("second", count=8), cluster.create("third", count=8)
    cluster.delete(first)
    cluster.run(5)
    assert cluster.is_true(second)
    assert cluster.leases[third].status.position == 1


def test_before_any_agent_has_reported_leases_wait() -> None:
    cluster = Cluster()
    cluster.add_node("a", 0)
    reason, message = said(cluster, cluster.create("train", count=4))
    assert (reason, message) == ("Queued", "Position 1 in the queue: no agent has reported a GPU yet.")


def test_a_template_that_is_still_checked_waits_without_a_position() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=1.0)
    facts = cluster.lease(lease)
    assert facts.template is not None
    unchecked = replace(facts, template=replace(facts.template, verdict=None))
    outlook = plan(replace(cluster.snapshot(), leases=(unchecked,)), cluster.now).leases[0]
    assert outlook.refusal is not None
    assert (outlook.refusal.reason, outlook.refusal.final) == (Reason.CHECKING_TEMPLATE, False)
    assert outlook.position is None


# --- refused


IMPOSSIBLE = [
    pytest.param(
        {"count": 3, "pods": 3},
        f"Needs 3 whole GPUs ({MODEL}) on one node for each of 3 pods; all nodes together hold 2 pods of that kind. "
        "Change the lease or add nodes.",
        id="more pods than all nodes hold",
    ),
    pytest.param(
        {"count": 9},
        f"Needs 9 whole GPUs ({MODEL}) on one node; the largest node has 8. Change the lease or add nodes.",
        id="more GPUs than any node has",
    ),
    pytest.param(
        {"cpu": "500"},
        "Each pod needs 500 CPU (64 there) on the largest GPU node. Change the lease or add nodes.",
        id="more CPU than any node has",
    ),
    pytest.param(
        {"cpu": "500", "memory": "1Ti"},
        "Each pod needs 500 CPU (64 there) and 1024Gi memory (512Gi there) on the largest GPU node. "
        "Change the lease or add nodes.",
        id="more CPU and memory than any node has",
    ),
    pytest.param(
        {"count": 1, "pods": 3, "cpu": "30"},
        "Needs room for 3 pods, 30 CPU and 1Gi memory each; all nodes together have room for 2. "
        "Change the lease or add nodes.",
        id="more CPU than all nodes have",
    ),
    pytest.param(
        {"model": "H100-SXM5-80GB"},
        f'No node has a GPU of gpus.model "H100-SXM5-80GB"; there are {MODEL}. Change the lease or add nodes.',
        id="unknown model",
    ),
    pytest.param(
        {"profile": "3g.40gb"},
        f"Needs 1 × 3g.40gb ({MODEL}); the 0 GPUs in MIG mode that have it hold 0 at most. "
        "Change the lease or add nodes.",
        id="a slice where no GPU is in MIG mode",
    ),
    pytest.param(
        {"profile": "3g.20gb"},
        "Needs 1 × 3g.20gb; the 0 GPUs in MIG mode that have it hold 0 at most. Change the lease or add nodes.",
        id="a slice that no model here has",
    ),
    pytest.param(
        {"profile": "5g.50gb"},
        'gpus.profile "5g.50gb" is not known; choose one of full, 1g.5gb, 2g.10gb, 3g.20gb, 4g.20gb, 7g.40gb, '
        "1g.10gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb.",
        id="unknown profile",
    ),
]


@pytest.mark.parametrize(("wish", "sentence"), IMPOSSIBLE)
def test_what_no_empty_cluster_could_hold_is_refused(wish: dict[str, object], sentence: str) -> None:
    cluster = one_node()
    lease = cluster.create("train", **wish)  # type: ignore[arg-type]
    assert said(cluster, lease) == ("Impossible", sentence)
    assert cluster.leases[lease].status.position is None
    assert cluster.condition(lease, ConditionType.STALLED).message == sentence
    assert not cluster.is_true(lease, ConditionType.RECONCILING)


def test_three_gpus_for_each_of_two_pods_are_impossible_where_only_one_node_has_three() -> None:
    cluster = Cluster()
    cluster.add_node("a", 3)
    cluster.add_node("b", 2)
    cluster.run(1)
    assert said(cluster, cluster.create("gang", count=3, pods=2))[1] == (
        f"Needs 3 whole GPUs ({MODEL}) on one node for each of 2 pods; all nodes together hold 1 pod of that kind. "
        "Change the lease or add nodes."
    )


def test_a_template_that_asks_for_more_than_any_node_has_is_refused() -> None:
    cluster = one_node()
    pod = {"containers": [{"name": "main", "resources": {"requests": {"cpu": "100"}}}]}
    assert said(cluster, cluster.create("train", template={"spec": pod})) == (
        "Impossible",
        "Each pod needs 100 CPU (64 there) on the largest GPU node. Change the lease or add nodes.",
    )


def test_pods_that_no_gpu_node_admits_are_refused_with_each_nodes_objection() -> None:
    cluster = one_node()
    cluster.nodes["a"].taints = (Taint("team", "b", "NoSchedule"),)
    cluster.add_node("b", 1)
    pod = {"containers": [], "nodeSelector": {"disk": "ssd"}, "tolerations": []}
    assert said(cluster, cluster.create("train", template={"spec": pod})) == (
        "Impossible",
        (
            "The pods may not run on the nodes that have the GPUs (a: node selector disk=ssd does not match; "
            "b: node selector disk=ssd does not match). Change the lease or add nodes."
        ),
    )


def test_a_node_that_is_only_unreachable_or_cordoned_makes_nothing_impossible() -> None:
    cluster = one_node()
    node = cluster.nodes["a"]
    node.ready, node.cordoned = False, True
    node.taints = (Taint("node.kubernetes.io/unreachable", "", "NoSchedule"),)
    assert said(cluster, cluster.create("train"))[0] == "Queued"


def test_what_was_impossible_is_placed_once_a_fitting_node_joins() -> None:
    cluster = one_node(2)
    lease = cluster.create("train", count=4)
    assert said(cluster, lease)[0] == "Impossible"
    cluster.add_node("b", 4)
    cluster.run(3)
    assert cluster.is_true(lease)


def test_a_template_that_the_api_server_refuses_is_refused_in_its_words() -> None:
    cluster = one_node()
    cluster.verdict = "spec.template.spec.containers[0].image: Required value"
    assert said(cluster, cluster.create("train", works=1.0)) == ("InvalidTemplate", cluster.verdict)


def test_a_lease_that_cannot_be_read_is_refused_and_disturbs_nobody() -> None:
    cluster = one_node()
    bad, good = cluster.create("bad"), cluster.create("good")
    cluster.leases[bad] = replace(cluster.leases[bad], invalid="spec.pods: must be at most 64")
    cluster.run(3)
    assert said(cluster, bad) == ("InvalidSpec", "spec.pods: must be at most 64")
    assert cluster.is_true(good)


def test_a_write_that_the_api_server_refused_stalls_that_lease_alone_until_its_retry() -> None:
    cluster = one_node()
    bad, good = cluster.create("bad"), cluster.create("good")
    retry_at = cluster.now + timedelta(seconds=9)
    failure = Failure("NameTaken", "A Service named team/bad exists.", retry_at)
    decided = plan(replace(cluster.snapshot(), failures={bad: failure}), cluster.now)
    outlooks = {outlook.lease.uid: outlook for outlook in decided.leases}
    stalled = {one.type: one for one in lease_status(outlooks[bad], failure, cluster.now).conditions}
    assert stalled[ConditionType.STALLED].reason is Reason.NAME_TAKEN
    assert stalled[ConditionType.STALLED].message == (
        "A Service named team/bad exists. Tried again at 2026-03-01T12:00:10Z."
    )
    assert not outlooks[bad].nodes
    assert outlooks[good].nodes == ("a",)
    assert decided.next_wake == retry_at


def test_objects_of_a_placed_lease_are_not_retried_before_their_time() -> None:
    cluster = one_node()
    lease = cluster.create("train")
    cluster.run(3)
    cluster.templates.pop(lease, None)
    failure = Failure("NameTaken", "taken", cluster.now + timedelta(seconds=9))
    facts = cluster.snapshot()
    assert any(isinstance(one, CreateClaimTemplate) for one in plan(facts, cluster.now).actions)
    assert not plan(replace(facts, failures={lease: failure}), cluster.now).actions
