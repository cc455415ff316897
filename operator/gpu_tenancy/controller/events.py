"""Kubernetes Events and their reasons: one per transition, never one per cycle.

Written beside the cycle: a lost Event is logged and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, NamedTuple

from gpu_tenancy.api import names
from gpu_tenancy.api.base import ConditionStatus, format_time
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, Reason
from gpu_tenancy.api.node import NodeCondition, NodeConditionType
from gpu_tenancy.api.pool import PoolCondition, PoolConditionType
from gpu_tenancy.api.pricebook import BookCondition, BookConditionType
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import AlreadyExists, KubeError
from gpu_tenancy.kube.resources import Resource

_log = logging.getLogger(__name__)

COMPONENT: Final = "gpu-tenancy-operator"
WAITING: Final = 1000
"""Events that may wait to be written; more are dropped, with a line in the log."""
WARNINGS: Final = frozenset({
    Reason.IMPOSSIBLE, Reason.NO_RATE, Reason.INVALID_TEMPLATE, Reason.INVALID_SPEC, Reason.NAME_TAKEN,
    Reason.EXTENSION_REFUSED, Reason.API_REJECTED, Reason.UNPRICED, Reason.NODE_LOST, Reason.NOTICE_GIVEN,
    Reason.FAILED, Reason.UNREADABLE,
})  # fmt: skip
PLATFORM_NEWS: Final = {
    BookConditionType.IN_EFFECT: "Normal",
    BookConditionType.CONFLICT: "Warning",
    PoolConditionType.STALLED: "Warning",
    NodeConditionType.AGENT_SILENT: "Warning",
}
"""Conditions of what the platform team and finance own that are news once they hold, and of what type."""


class Note(NamedTuple):
    """An Event to be."""

    type: str
    reason: str
    message: str


def transitions(old: GpuLeaseStatus, new: GpuLeaseStatus) -> Iterable[Note]:
    """What of a lease's change is news to people: refused, placed unpriced, ready, notice, lost, ended."""
    before = {condition.type: condition for condition in old.conditions}
    for condition in new.conditions:
        former = before.get(condition.type)
        if former and (former.status, former.reason) == (condition.status, condition.reason):
            continue
        if _is_news(condition.type, condition.status, condition.reason):
            kind = "Warning" if condition.reason in WARNINGS else "Normal"
            yield Note(kind, str(condition.reason), condition.message)
    if new.ended is not None and old.ended is None:
        kind = "Warning" if new.ended.reason in WARNINGS else "Normal"
        yield Note(kind, str(new.ended.reason), new.ended.message)


def platform_transitions(
    old: Iterable[PoolCondition | BookCondition | NodeCondition],
    new: Iterable[PoolCondition | BookCondition | NodeCondition],
) -> Iterable[Note]:
    """What of the change of a pool, a book or a node is news to those who own it."""
    held = {condition.type for condition in old if condition.status is ConditionStatus.TRUE}
    for condition in new:
        kind = PLATFORM_NEWS.get(condition.type)
        if kind and condition.status is ConditionStatus.TRUE and condition.type not in held:
            yield Note(kind, str(condition.reason), condition.message)


def _is_news(kind: ConditionType, status: ConditionStatus, reason: Reason) -> bool:
    true = status is ConditionStatus.TRUE
    match kind:
        case ConditionType.READY | ConditionType.STALLED:
            return true
        case ConditionType.ADMITTED:
            return true and reason is Reason.UNPRICED
        case ConditionType.ALLOCATED:
            return reason is Reason.NODE_LOST
        case ConditionType.EXPIRED:
            return reason is Reason.NOTICE_GIVEN
        case _:
            return False


class Events:
    """Writes Events one after the other, beside everything else."""

    def __init__(self, client: KubeClient, *, enabled: bool) -> None:
        self._client = client
        self._enabled = enabled
        self._queue: asyncio.Queue[Object] = asyncio.Queue(WAITING)

    def post(self, resource: Resource, body: Object, kind: str, reason: str, message: str) -> None:
        """Have an Event written about an object."""
        if not self._enabled:
            return
        try:
            self._queue.put_nowait(_event(resource, body, Note(kind, reason, message), datetime.now(UTC)))
        except asyncio.QueueFull:
            _log.warning("Event dropped, %s are waiting: %s %s", WAITING, reason, message)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            event = await self._queue.get()
            try:
                await self._client.create(resources.EVENTS, event)
            except AlreadyExists:
                continue
            except KubeError as error:
                _log.info("Event not written: %s: %s", event["reason"], error)


def _event(resource: Resource, body: Object, note: Note, now: datetime) -> Object:
    metadata = body["metadata"]
    tag = sha256(f"{metadata['uid']}{note}{now.timestamp():.0f}".encode()).hexdigest()[:16]
    namespace = metadata.get("namespace", "default")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "name": f"{metadata['name'][:200]}.{tag}"},
        "involvedObject": {
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "namespace": metadata.get("namespace", ""),
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message[:1024],
        "source": {"component": COMPONENT},
        "reportingComponent": names.GROUP,
        "reportingInstance": COMPONENT,
        "firstTimestamp": format_time(now),
        "lastTimestamp": format_time(now),
        "count": 1,
    }
