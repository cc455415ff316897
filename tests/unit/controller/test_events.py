"""One Event per transition that is news to people, and a lost Event changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import pytest

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, LeaseCondition, LeaseEnd, Reason
from gpu_tenancy.api.node import NodeCondition, NodeConditionType, NodeReason
from gpu_tenancy.api.pool import PoolCondition, PoolConditionType, PoolReason
from gpu_tenancy.api.pricebook import BookCondition, BookConditionType, BookReason
from gpu_tenancy.api.tenant import TenantCondition, TenantConditionType, TenantReason
from gpu_tenancy.controller.events import platform_transitions, transitions
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.errors import AlreadyExists, KubeError, Rejected, Transient
from gpu_tenancy.kube.events import WAITING, Events, Note
from gpu_tenancy.kube.resources import Resource
from tests.unit.controller.facts import NOW, Object, body

TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


def _status(
    *conditions: tuple[ConditionType, ConditionStatus, Reason, str], ended: Reason | None = None
) -> GpuLeaseStatus:
    return GpuLeaseStatus(
        conditions=[
            LeaseCondition(
                type=kind,
                status=status,
                reason=reason,
                message=message,
                last_transition_time=NOW,
                observed_generation=1,
            )
            for kind, status, reason, message in conditions
        ],
        ended=None if ended is None else LeaseEnd(at=NOW, reason=ended, message="It is over."),
    )


NEWS = [
    ((ConditionType.READY, TRUE, Reason.READY), "Normal"),
    ((ConditionType.STALLED, TRUE, Reason.IMPOSSIBLE), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.QUOTA_TOO_SMALL), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.TERM_TOO_LONG), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.NAME_TAKEN), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.API_REJECTED), "Warning"),
    ((ConditionType.ADMITTED, TRUE, Reason.UNPRICED), "Warning"),
    ((ConditionType.ALLOCATED, FALSE, Reason.NODE_LOST), "Warning"),
    ((ConditionType.EXPIRED, FALSE, Reason.NOTICE_GIVEN), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.TIER_NOT_ALLOWED), "Warning"),
    ((ConditionType.STALLED, TRUE, Reason.NOTICE_TOO_LONG), "Warning"),
    ((ConditionType.PREEMPTED, FALSE, Reason.PREEMPTION_NOTICE), "Warning"),
    ((ConditionType.PREEMPTED, FALSE, Reason.NOTICE_WITHDRAWN), "Normal"),
    ((ConditionType.PREEMPTED, TRUE, Reason.PREEMPTED), "Warning"),
]
NO_NEWS = [
    (ConditionType.READY, FALSE, Reason.QUEUED),
    (ConditionType.READY, FALSE, Reason.OVER_QUOTA),
    (ConditionType.READY, FALSE, Reason.PREEMPTING),
    (ConditionType.PREEMPTED, FALSE, Reason.PREEMPTIBLE),
    (ConditionType.READY, FALSE, Reason.PREPARING),
    (ConditionType.STALLED, FALSE, Reason.UP_TO_DATE),
    (ConditionType.ADMITTED, TRUE, Reason.ADMITTED),
    (ConditionType.ADMITTED, FALSE, Reason.UNPRICED),
    (ConditionType.ALLOCATED, TRUE, Reason.PLACED),
    (ConditionType.RECONCILING, TRUE, Reason.PREPARING),
    (ConditionType.EXPIRED, FALSE, Reason.RUNNING),
    (ConditionType.SETTLED, TRUE, Reason.SETTLED),
]


SINCE: Final[Any] = {"status": TRUE, "message": "Because.", "last_transition_time": NOW, "observed_generation": 1}
PLATFORM: Final[list[tuple[PoolCondition | BookCondition | NodeCondition, str | None]]] = [
    (PoolCondition(type=PoolConditionType.STALLED, reason=PoolReason.API_REJECTED, **SINCE), "Warning"),
    (PoolCondition(type=PoolConditionType.READY, reason=PoolReason.MINING, **SINCE), None),
    (BookCondition(type=BookConditionType.CONFLICT, reason=BookReason.SAME_INSTANT, **SINCE), "Warning"),
    (BookCondition(type=BookConditionType.IN_EFFECT, reason=BookReason.IN_EFFECT, **SINCE), "Normal"),
    (NodeCondition(type=NodeConditionType.AGENT_SILENT, reason=NodeReason.HEARTBEAT_MISSED, **SINCE), "Warning"),
]
"""Conditions that hold, and of what type the Event is that tells of it."""


@pytest.mark.parametrize(("condition", "kind"), NEWS, ids=[str(one[0][2]) for one in NEWS])
def test_what_people_want_to_know_is_told_once(
    condition: tuple[ConditionType, ConditionStatus, Reason], kind: str
) -> None:
    new = _status((*condition, "Because."))
    assert list(transitions(GpuLeaseStatus(), new)) == [Note(kind, str(condition[2]), "Because.")]
    assert not list(transitions(new, new))
    assert not list(transitions(new, _status((*condition, "Because of something else."))))


@pytest.mark.parametrize("condition", NO_NEWS, ids=[f"{one[0]}-{one[2]}" for one in NO_NEWS])
def test_what_is_only_progress_is_not_told(condition: tuple[ConditionType, ConditionStatus, Reason]) -> None:
    assert not list(transitions(GpuLeaseStatus(), _status((*condition, ""))))


def test_a_new_reason_of_the_same_condition_is_news() -> None:
    old = _status((ConditionType.STALLED, TRUE, Reason.API_REJECTED, "quota"))
    new = _status((ConditionType.STALLED, TRUE, Reason.NAME_TAKEN, "taken"))
    assert [note.reason for note in transitions(old, new)] == ["NameTaken"]


@pytest.mark.parametrize(("condition", "kind"), PLATFORM, ids=[str(one.type) for one, _ in PLATFORM])
def test_of_pools_books_and_nodes_only_what_begins_to_hold_is_told(
    condition: PoolCondition | BookCondition | NodeCondition, kind: str | None
) -> None:
    expected = [Note(kind, str(condition.reason), condition.message)] if kind else []
    assert list(platform_transitions([], [condition])) == expected
    ended = condition.model_copy(update={"status": FALSE})
    assert list(platform_transitions([ended], [condition])) == expected
    assert not list(platform_transitions([condition], [condition]))
    assert not list(platform_transitions([condition], [ended]))
    assert not list(platform_transitions([condition], []))


def _tenant(reason: TenantReason, message: str = "It is so.") -> TenantCondition:
    return TenantCondition(
        type=TenantConditionType.READY,
        status=TRUE if reason is TenantReason.SERVING else FALSE,
        reason=reason,
        message=message,
        last_transition_time=NOW,
        observed_generation=1,
    )


def test_that_a_tenant_is_not_served_as_its_spec_says_is_told_once() -> None:
    serving, conflict = _tenant(TenantReason.SERVING), _tenant(TenantReason.CONFLICT)
    expected = [Note("Warning", "Conflict", "It is so.")]
    assert list(platform_transitions([], [conflict])) == expected
    assert list(platform_transitions([serving], [conflict])) == expected
    assert list(platform_transitions([_tenant(TenantReason.INVALID_SPEC)], [conflict])) == expected
    assert not list(platform_transitions([conflict], [_tenant(TenantReason.CONFLICT, "It is another one.")]))
    assert not list(platform_transitions([conflict], [serving]))
    assert not list(platform_transitions([], [serving]))


@pytest.mark.parametrize(
    ("reason", "kind"), [(Reason.COMPLETED, "Normal"), (Reason.EXPIRED, "Normal"), (Reason.FAILED, "Warning")]
)
def test_the_end_is_told_once(reason: Reason, kind: str) -> None:
    ended = _status(ended=reason)
    assert list(transitions(_status(), ended)) == [Note(kind, str(reason), "It is over.")]
    assert not list(transitions(ended, ended))


class Recorder:
    """The part of a client that Events need; says what it is told to."""

    def __init__(self, *answers: KubeError | None) -> None:
        self.written: list[Object] = []
        self._answers = list(answers)

    async def create(self, res: Resource, body: Object) -> Object:
        assert res is resources.EVENTS
        self.written.append(body)
        error = self._answers.pop(0) if self._answers else None
        if error is not None:
            raise error
        return body


def _play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


async def _write_all(events: Events) -> None:
    writer = asyncio.create_task(events.run())
    await asyncio.sleep(0)
    while not events._queue.empty():
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not writer.done()
    writer.cancel()


def test_an_event_names_its_object_and_is_cut_where_it_is_too_long() -> None:
    async def story() -> None:
        recorder = Recorder()
        events = Events(recorder, "tests")  # type: ignore[arg-type]
        events.post(resources.GPU_LEASES, body("GpuLease", "train"), "Normal", "Ready", "x" * 3000)
        await _write_all(events)
        [event] = recorder.written
        about = event["involvedObject"]
        assert (about["kind"], about["namespace"], about["name"], about["uid"]) == (
            "GpuLease", "team-a", "train", "uid-train",
        )  # fmt: skip
        assert (event["metadata"]["namespace"], event["reason"], len(event["message"])) == ("team-a", "Ready", 1024)

    _play(story())


def test_a_refused_event_does_not_keep_the_next_one_from_being_written() -> None:
    async def story() -> None:
        recorder = Recorder(
            Rejected(403, "Forbidden", "no"), Transient(0, "Timeout", "no"), AlreadyExists(409, "AlreadyExists", "no")
        )
        events = Events(recorder, "tests")  # type: ignore[arg-type]
        for reason in ("One", "Two", "Three", "Four"):
            events.post(resources.GPU_LEASES, body("GpuLease", "train"), "Normal", reason, "")
        await _write_all(events)
        assert [event["reason"] for event in recorder.written] == ["One", "Two", "Three", "Four"]

    _play(story())


def test_too_many_events_are_dropped_and_nobody_waits_for_them() -> None:
    events = Events(Recorder(), "tests")  # type: ignore[arg-type]
    for number in range(WAITING + 5):
        events.post(resources.GPU_LEASES, body("GpuLease", "train"), "Normal", str(number), "")
    assert events._queue.qsize() == WAITING


def test_switched_off_nothing_is_written() -> None:
    events = Events(Recorder(), "tests", enabled=False)  # type: ignore[arg-type]
    events.post(resources.GPU_LEASES, body("GpuLease", "train"), "Normal", "Ready", "")
    assert events._queue.empty()
