"""How leases go on and end: terms, extensions, suspension, completion, deletion; and that GPUs do come back."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpu_tenancy.api.base import ConditionStatus, format_time
from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core.actions import (
    Action,
    CloseRecord,
    DeleteClaimTemplate,
    DeleteJob,
    DeletePod,
    OpenRecord,
    SetSlots,
    Unbind,
)
from gpu_tenancy.core.planner import plan
from tests.unit.core.simulation import Cluster


def one_node() -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", 4, mig={3})
    cluster.add_pool()
    cluster.run(3)
    return cluster


def ready(cluster: Cluster, **wish: object) -> str:
    """A lease that has just become ready."""
    lease = cluster.create("train", **wish)  # type: ignore[arg-type]
    cluster.deploy(lease)
    while not cluster.leases[lease].status.segment:
        cluster.step()
    return lease


def trail(cluster: Cluster, lease: str, seconds: float) -> list[Action]:
    """What the operator does for the lease, or with slots, in that time."""
    actions: list[Action] = []
    for _ in range(int(seconds * 2)):
        cluster.step()
        actions += [
            one
            for one in cluster.last_plan.actions
            if isinstance(one, SetSlots)
            or getattr(getattr(one, "lease", None), "uid", getattr(one, "uid", "")) == lease
        ]
    return actions


def back_to_mining(cluster: Cluster) -> bool:
    return cluster.mining() == {"full": 3, "7g.80gb": 1}


# --- terms


def test_expiry_gives_notice_ends_to_the_second_and_gpus_mine_again() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="20s", notice="5s")
    expires = cluster.leases[lease].status.expires_at
    assert expires is not None
    assert cluster.condition(lease, ConditionType.EXPIRED).reason is Reason.RUNNING
    assert plan(cluster.snapshot(), cluster.now).next_wake == expires - timedelta(seconds=5)
    while cluster.now < expires - timedelta(seconds=5):
        cluster.step()
    notice = cluster.condition(lease, ConditionType.EXPIRED)
    assert (notice.status, notice.reason) == (ConditionStatus.FALSE, Reason.NOTICE_GIVEN)
    assert notice.message == f"The lease ends at {expires:%Y-%m-%dT%H:%M:%SZ}; raise term.duration to extend it."
    cluster.run(15)
    assert cluster.is_true(lease, ConditionType.EXPIRED)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert cluster.ledger(lease) == [(20, "Expired")]
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert (ended.at, ended.reason) == (expires, Reason.EXPIRED)
    assert back_to_mining(cluster)


def test_the_end_comes_in_order_recorded_withdrawn_and_only_then_stopped() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    actions = trail(cluster, lease, 15)
    kinds = [type(one) for one in actions]
    closed, withdrawn = kinds.index(CloseRecord), kinds.index(SetSlots)
    assert closed < withdrawn < kinds.index(DeleteClaimTemplate) < kinds.index(DeletePod) < kinds.index(Unbind)


def test_a_tenants_deployment_does_not_get_its_gpu_back() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    cluster.run(3)
    served = {pod.name for pod in cluster.pods.values() if pod.owner.startswith("deployment") and pod.claim.prepared}
    assert len(served) == 1
    ends = cluster.leases[lease].status.expires_at
    assert ends is not None
    cluster.lags = lambda _: ends <= cluster.now < ends + timedelta(seconds=5)
    for _ in range(60):
        cluster.step()
        now = {pod.name for pod in cluster.pods.values() if pod.owner.startswith("deployment") and pod.claim.prepared}
        assert now <= served, "a pod that came after the end was given the GPU"
    assert cluster.is_true(lease, ConditionType.SETTLED)


def test_an_operator_that_was_away_at_the_end_bills_no_second_more() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    for _ in range(30):
        cluster.now += timedelta(seconds=1)
        cluster.everybody_else()
    cluster.run(5)
    assert cluster.ledger(lease) == [(5, "Expired")]


def test_an_operator_that_died_after_the_last_second_was_recorded_remembers_why_it_was_the_last() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    while not cluster.ledger(lease):
        cluster.dies_after = cluster.writes + 1
        cluster.step()
    cluster.delete(lease)
    cluster.step()
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert (ended.reason, ended.at) == (Reason.EXPIRED, cluster.leases[lease].status.billable_to)


def test_nobody_is_stopped_before_the_agent_has_withdrawn_the_device() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    cluster.run(2)
    (pod,) = (pod for pod in cluster.pods.values() if pod.claim.holder == lease)
    cluster.lags = lambda _: True
    cluster.run(10)
    assert cluster.ledger(lease) == [(5, "Expired")]
    assert lease in cluster.templates
    assert pod.stops_at is None
    cluster.lags = lambda _: False
    cluster.run(8)
    assert cluster.is_true(lease, ConditionType.SETTLED)


def test_an_extension_moves_the_end() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="10s", notice="1s")
    before = cluster.leases[lease].status.expires_at
    cluster.edit(lease, duration="25s")
    cluster.step()
    after = cluster.leases[lease].status.expires_at
    assert before is not None
    assert after == before + timedelta(seconds=15)
    cluster.run(40)
    assert cluster.ledger(lease) == [(25, "Expired")]


def test_a_term_that_would_be_over_already_is_refused_and_the_old_one_stays() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="20s", notice="1s")
    cluster.run(10)
    cluster.edit(lease, duration="5s")
    cluster.step()
    stalled = cluster.condition(lease, ConditionType.STALLED)
    assert stalled.reason is Reason.EXTENSION_REFUSED
    began = cluster.leases[lease].status.billable_from
    assert began is not None
    assert stalled.message == (
        f"term.duration 5s was refused: the lease would have ended at {format_time(began + timedelta(seconds=5))}; "
        "20s stays in force. Delete the lease to end it now."
    )
    assert cluster.is_true(lease)
    cluster.run(20)
    assert cluster.ledger(lease) == [(20, "Expired")]


def test_a_suspended_lease_cannot_be_given_less_than_it_has_run() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="60s")
    cluster.run(10)
    cluster.edit(lease, suspend=True)
    cluster.run(5)
    ((seconds, _),) = cluster.ledger(lease)
    cluster.edit(lease, duration="5s")
    cluster.step()
    assert cluster.condition(lease, ConditionType.STALLED).message == (
        f"term.duration 5s was refused: the lease has already run {seconds}s; 60s stays in force. "
        "Delete the lease to end it now."
    )


def test_a_term_can_be_added_and_taken_away() -> None:
    cluster = one_node()
    lease = ready(cluster)
    assert cluster.condition(lease, ConditionType.EXPIRED).reason is Reason.UNTIL_DELETED
    cluster.edit(lease, duration="30s")
    cluster.step()
    assert cluster.leases[lease].status.expires_at is not None
    cluster.edit(lease, duration=None)
    cluster.run(40)
    assert cluster.is_true(lease)
    assert cluster.leases[lease].status.expires_at is None


def test_waiting_for_room_does_not_use_up_the_term() -> None:
    cluster = one_node()
    first = ready(cluster, count=3, duration="15s", notice="1s")
    second = cluster.create("second", count=3, duration="5s", notice="1s")
    cluster.run(40)
    assert cluster.ledger(first) == [(15, "Expired")]
    assert cluster.ledger(second) == [(5, "Expired")]


# --- suspension


def test_a_suspended_lease_gives_its_gpus_back_and_resumes_with_the_rest_of_its_term() -> None:
    cluster = one_node()
    lease = ready(cluster, count=2, duration="30s", notice="1s")
    cluster.run(10)
    cluster.edit(lease, suspend=True)
    cluster.run(10)
    assert cluster.condition(lease).reason is Reason.SUSPENDED
    assert back_to_mining(cluster)
    assert cluster.leases[lease].status.expires_at is None
    cluster.edit(lease, suspend=False)
    cluster.run(40)
    (first, why), (second, end) = cluster.ledger(lease)
    assert (why, end) == ("Suspended", "Expired")
    assert first + second == 30
    assert 9 <= first <= 11


def test_a_suspension_that_is_taken_back_at_once_loses_no_second_and_no_device() -> None:
    cluster = one_node()
    lease = ready(cluster, count=2)
    devices = cluster.slots_of(lease)
    cluster.edit(lease, suspend=True)
    cluster.step()
    cluster.edit(lease, suspend=False)
    cluster.run(5)
    assert cluster.slots_of(lease) == devices
    first, second = (record.spec for record in cluster.records.values())
    assert first.billable_to is not None
    assert timedelta(0) <= second.billable_from - first.billable_to <= timedelta(seconds=1)


def test_a_lease_that_is_created_suspended_takes_nothing_until_it_is_resumed() -> None:
    cluster = one_node()
    lease = cluster.create("train", suspend=True)
    cluster.run(3)
    assert cluster.condition(lease).message == "spec.suspend is true; set it to false to queue the lease again."
    assert not cluster.slots_of(lease)
    cluster.edit(lease, suspend=False)
    cluster.run(4)
    assert cluster.is_true(lease)


# --- Jobs


def test_a_completed_job_releases_the_lease_as_of_its_end() -> None:
    cluster = one_node()
    lease = cluster.create("train", count=2, works=6.0, duration="60s")
    cluster.run(20)
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert (ended.reason, ended.message) == (Reason.COMPLETED, "Job train-1 finished.")
    (record,) = (record.spec for record in cluster.records.values())
    assert record.billable_to == ended.at == cluster.jobs["train-1"].facts.finished_at
    assert back_to_mining(cluster)


def test_a_failed_job_says_why() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=float("inf"))
    cluster.run(5)
    job = cluster.jobs["train-1"]
    failed_at = cluster.now.replace(microsecond=0)
    job.facts = replace(job.facts, finished="Failed", finished_at=failed_at, message="BackoffLimitExceeded")
    cluster.step()
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert (ended.at, ended.reason) == (failed_at, Reason.FAILED)
    assert ended.message == "Job train-1 failed: BackoffLimitExceeded."


def test_a_job_that_is_over_before_its_devices_were_seen_ready_is_billed_all_the_same() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=2.0)
    cluster.operator()
    for _ in range(20):
        cluster.now += timedelta(seconds=0.5)
        cluster.everybody_else()
    assert cluster.jobs["train-1"].facts.finished
    cluster.run(8)
    ((seconds, reason),) = cluster.ledger(lease)
    assert (2 <= seconds <= 4, reason) == (True, "Completed")
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert ended.at == cluster.jobs["train-1"].facts.finished_at


def test_hold_keeps_the_gpus_and_bills_after_the_job() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=2.0, on_completion="Hold", duration="20s", notice="1s")
    cluster.run(12)
    assert cluster.jobs["train-1"].facts.finished
    assert cluster.is_true(lease)
    cluster.run(20)
    assert cluster.ledger(lease) == [(20, "Expired")]


def test_pods_of_the_tenants_own_beside_a_job_are_stopped_at_the_end_too() -> None:
    cluster = one_node()
    lease = cluster.create("train", count=1, pods=1, works=3.0, on_completion="Hold", duration="12s", notice="1s")
    cluster.run(9)
    cluster.deploy(lease)
    cluster.run(20)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert back_to_mining(cluster)


# --- deletion


def test_early_deletion_bills_up_to_the_request_and_lets_the_lease_go() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="60s")
    began = cluster.leases[lease].status.billable_from
    cluster.run(7)
    cluster.delete(lease)
    deleted = cluster.leases[lease].deleted_at
    cluster.run(8)
    (record,) = (record.spec for record in cluster.records.values())
    assert (record.billable_from, record.billable_to, record.reason) == (began, deleted, Reason.DELETED)
    assert lease not in cluster.leases
    assert back_to_mining(cluster)


def test_a_lease_that_is_deleted_before_it_is_ready_costs_nothing() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=5.0)
    cluster.step()
    assert cluster.slots_of(lease)
    cluster.delete(lease)
    cluster.run(8)
    assert not cluster.records
    assert not cluster.leases
    assert not cluster.jobs
    assert back_to_mining(cluster)


def test_a_lease_that_only_waits_is_deleted_at_once() -> None:
    cluster = one_node()
    ready(cluster, count=3)
    waiting = cluster.create("second", count=3)
    cluster.run(2)
    cluster.delete(waiting)
    assert waiting not in cluster.leases


def test_a_namespace_that_is_deleted_mid_lease_bills_once_and_nothing_hangs() -> None:
    cluster = one_node()
    running = ready(cluster, count=2)
    pending = cluster.create("second", works=5.0)
    cluster.operator()
    cluster.end_namespace("team")
    cluster.run(10)
    assert not cluster.leases
    assert not cluster.records, "a record keeps the namespace from going"
    assert [record.spec.reason for record in cluster.archive.values()] == [Reason.DELETED]
    assert len(cluster.ledger(running)) == 1
    assert cluster.ledger(pending) == []
    assert back_to_mining(cluster)


def test_an_ended_lease_keeps_its_story_when_it_is_deleted_later() -> None:
    cluster = one_node()
    lease = ready(cluster, duration="5s", notice="1s")
    cluster.run(6)
    facts = cluster.lease(lease)
    cluster.leases[lease] = replace(facts, deleted_at=cluster.now)
    decided = plan(cluster.snapshot(), cluster.now)
    assert not [one for one in decided.actions if isinstance(one, OpenRecord | CloseRecord)]
    cluster.operator()
    ended = cluster.leases[lease].status.ended
    assert ended is not None
    assert ended.reason is Reason.EXPIRED


@pytest.mark.parametrize("works", [None, float("inf")])
def test_pods_that_will_not_stop_hold_up_the_gpu_but_not_the_bill(works: float | None) -> None:
    cluster = one_node()
    lease = cluster.create("train", count=1, duration="5s", notice="1s", works=works)
    if works is None:
        cluster.deploy(lease)
    while not cluster.leases[lease].status.segment:
        cluster.step()
    cluster.step()
    cluster.step()
    stubborn = next(pod for pod in cluster.pods.values() if pod.claim.holder == lease)
    stubborn.stops_at = cluster.now + timedelta(seconds=60)
    cluster.run(20)
    assert cluster.ledger(lease) == [(5, "Expired")]
    assert cluster.condition(lease).reason is Reason.DRAINING
    assert cluster.condition(lease).message == "1 device is waiting for pods to stop (waits for its pod)."
    assert cluster.mining() == {"full": 2, "7g.80gb": 1}
    cluster.run(60)
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert back_to_mining(cluster)


def test_a_job_of_a_suspended_lease_is_stopped_and_runs_anew_under_the_next_name() -> None:
    cluster = one_node()
    lease = cluster.create("train", works=float("inf"))
    cluster.run(5)
    cluster.edit(lease, suspend=True)
    actions = trail(cluster, lease, 6)
    assert [one.job for one in actions if isinstance(one, DeleteJob)] == ["train-1"]
    cluster.edit(lease, suspend=False)
    cluster.run(6)
    assert list(cluster.jobs) == ["train-2"]
    assert cluster.is_true(lease)


def test_a_tenant_cannot_keep_a_gpu_by_keeping_the_job() -> None:
    """A finalizer on the Job keeps it from going, and Kubernetes deletes its pods only after it."""
    cluster = one_node()
    lease = ready(cluster, works=float("inf"), duration="5s", notice="1s")
    cluster.kept_jobs.add(lease)
    cluster.run(15)
    assert cluster.ledger(lease) == [(5, "Expired")]
    assert cluster.is_true(lease, ConditionType.SETTLED)
    assert back_to_mining(cluster)


def test_a_training_that_is_complete_and_held_is_not_run_again_when_it_is_resumed() -> None:
    cluster = one_node()
    lease = ready(cluster, works=2, on_completion="Hold")
    cluster.run(5)
    cluster.edit(lease, suspend=True)
    cluster.run(5)
    cluster.edit(lease, suspend=False)
    cluster.run(5)
    assert cluster.is_true(lease)
    assert list(cluster.jobs) == ["train-1"]
    assert cluster.leases[lease].status.attempt == 2
