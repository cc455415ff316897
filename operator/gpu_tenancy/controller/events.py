"""Which changes are news to people, as Events: one per transition, never one per cycle. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, Reason
from gpu_tenancy.api.node import NodeCondition, NodeConditionType
from gpu_tenancy.api.pool import PoolCondition, PoolConditionType
from gpu_tenancy.api.pricebook import BookCondition, BookConditionType
from gpu_tenancy.api.tenant import TenantCondition
from gpu_tenancy.kube.events import Note

WARNINGS: Final = frozenset({
    Reason.IMPOSSIBLE, Reason.QUOTA_TOO_SMALL, Reason.TERM_TOO_LONG, Reason.NO_RATE, Reason.INVALID_TEMPLATE,
    Reason.INVALID_SPEC, Reason.NAME_TAKEN, Reason.EXTENSION_REFUSED, Reason.API_REJECTED, Reason.UNPRICED,
    Reason.NODE_LOST, Reason.NOTICE_GIVEN, Reason.FAILED, Reason.UNREADABLE, Reason.TIER_NOT_ALLOWED,
    Reason.NOTICE_TOO_LONG, Reason.PREEMPTION_NOTICE, Reason.PREEMPTED,
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


PlatformCondition = PoolCondition | BookCondition | TenantCondition | NodeCondition


def platform_transitions(old: Iterable[PlatformCondition], new: Iterable[PlatformCondition]) -> Iterable[Note]:
    """What of the change of a pool, a book, a tenant or a node is news to those who own it."""
    told = {(condition.type, condition.reason) for condition in old if _platform_news(condition)}
    for condition in new:
        kind = _platform_news(condition)
        if kind and (condition.type, condition.reason) not in told:
            yield Note(kind, str(condition.reason), condition.message)


def _platform_news(condition: PlatformCondition) -> str | None:
    """Type of the Event that a condition is worth, as it is; None: it is worth none."""
    if isinstance(condition, TenantCondition):  # served as its spec says is how a tenant is; anything else is news
        return "Warning" if condition.status is ConditionStatus.FALSE else None
    return PLATFORM_NEWS.get(condition.type) if condition.status is ConditionStatus.TRUE else None


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
        case ConditionType.PREEMPTED:
            return reason in {Reason.PREEMPTION_NOTICE, Reason.NOTICE_WITHDRAWN, Reason.PREEMPTED}
        case _:
            return False
