"""Which changes are news to people, as Events: one per transition, never one per cycle. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, Reason
from gpu_tenancy.api.node import NodeCondition, NodeConditionType
from gpu_tenancy.api.pool import PoolCondition, PoolConditionType
from gpu_tenancy.api.pricebook import BookCondition, BookConditionType
from gpu_tenancy.kube.events import Note

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
