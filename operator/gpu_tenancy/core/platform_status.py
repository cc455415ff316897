"""Statuses of what the platform team and finance own: pools, price books, tenants, what is said on a node. Pure.

As in `core.status`: (facts, what the plan found out, now) -> status, and nothing else produces one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

from gpu_tenancy.api.base import ConditionStatus, format_time
from gpu_tenancy.api.node import NodeCondition, NodeConditionType, NodeReason
from gpu_tenancy.api.pool import MiningPoolStatus, PoolCondition, PoolConditionType, PoolReason
from gpu_tenancy.api.pricebook import BookCondition, BookConditionType, BookReason, PriceBookStatus
from gpu_tenancy.api.tenant import (
    CommitmentStatus,
    DecayedUsage,
    GpuTenantStatus,
    Holds,
    TenantCondition,
    TenantConditionType,
    TenantReason,
)
from gpu_tenancy.core.actions import PoolOutlook, TenantOutlook
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.ledger import SECONDS_PER_HOUR
from gpu_tenancy.core.pricing import Pricing
from gpu_tenancy.core.snapshot import BookFacts, Failure, NodeFacts
from gpu_tenancy.core.status import FALSE, REFRESH, TRUE, rendered, transition
from gpu_tenancy.core.terms import floor_second


def _held(holds: bool) -> ConditionStatus:
    return TRUE if holds else FALSE


def pool_status(outlook: PoolOutlook, failure: Failure | None, now: datetime) -> MiningPoolStatus:
    """Status of a MiningPool."""
    pool = outlook.pool
    stalled = bool(pool.invalid) or failure is not None
    reason, message = _pool_state(outlook)
    trouble = pool.invalid or (failure.message if failure else "")
    verdicts = (
        (PoolConditionType.READY, _held(reason in HEALTHY), reason, message),
        (
            PoolConditionType.STALLED,
            _held(stalled),
            (PoolReason.INVALID_SPEC if pool.invalid else PoolReason.API_REJECTED)
            if stalled
            else PoolReason.UP_TO_DATE,
            trouble,
        ),
    )
    return MiningPoolStatus(
        observed_generation=pool.generation,
        assigned=outlook.assigned,
        mining=outlook.mining,
        conditions=rendered(PoolCondition, pool.status.conditions, verdicts, pool.generation, now),
    )


HEALTHY: Final = frozenset({PoolReason.MINING, PoolReason.NOTHING_IDLE})
"""A pool whose GPUs are all rented is as it should be."""


def _pool_state(outlook: PoolOutlook) -> tuple[PoolReason, str]:
    if outlook.pool.invalid:
        return PoolReason.INVALID_SPEC, outlook.pool.invalid
    if outlook.pool.spec.suspend:
        return PoolReason.SUSPENDED, "spec.suspend is true."
    if not outlook.assigned:
        return PoolReason.NOTHING_IDLE, "No idle device is left to this pool."
    counts = f"{outlook.mining} of {outlook.assigned} miners run."
    return (PoolReason.MINING if outlook.mining else PoolReason.STARTING), counts


def book_status(book: BookFacts, pricing: Pricing, now: datetime) -> PriceBookStatus:
    """Status of a PriceBook."""
    current = pricing.current is not None and pricing.current.name == book.name
    rivals = pricing.rivals.get(book.name, ())
    conflict = (BookReason.SAME_INSTANT, _conflict(rivals, pricing)) if rivals else (BookReason.NONE, "")
    verdicts = (
        (BookConditionType.IN_EFFECT, _held(current), *_book_state(book, pricing, now)),
        (BookConditionType.CONFLICT, _held(bool(rivals)), *conflict),
    )
    return PriceBookStatus(
        observed_generation=book.generation,
        conditions=rendered(BookCondition, book.status.conditions, verdicts, book.generation, now),
    )


def _conflict(rivals: Sequence[str], pricing: Pricing) -> str:
    stays = f"PriceBook {pricing.current.name} stays in effect" if pricing.current else "no PriceBook is in effect"
    named = f"PriceBook{'s' if len(rivals) > 1 else ''} {', '.join(rivals)}"
    return f"{named} {'have' if len(rivals) > 1 else 'has'} the same effectiveFrom; {stays}. Delete all but one."


def _book_state(book: BookFacts, pricing: Pricing, now: datetime) -> tuple[BookReason, str]:
    if book.spec is None:
        return BookReason.INVALID_SPEC, book.invalid
    current = pricing.current
    if current is not None and current.name == book.name:
        return BookReason.IN_EFFECT, f"{len(book.spec.rates)} rates in {book.spec.currency} are in effect."
    if rivals := pricing.rivals.get(book.name):
        return BookReason.SAME_INSTANT, _conflict(rivals, pricing)
    if current is None or book.spec.effective_from > now:
        return BookReason.NOT_YET, f"Takes effect at {format_time(book.spec.effective_from)}."
    return BookReason.SUPERSEDED, f"Superseded by {current.name}."


def tenant_status(outlook: TenantOutlook, now: datetime) -> GpuTenantStatus:
    """Status of a GpuTenant. What it has used is brought up to date with any other change, else now and then."""
    tenant, old = outlook.tenant, outlook.tenant.status
    reason, message = _tenant_state(outlook)
    verdict = (TenantConditionType.READY, _held(reason is TenantReason.SERVING), reason, message)
    gpus, memory, compute = outlook.holds
    new = GpuTenantStatus(
        observed_generation=tenant.generation,
        conditions=rendered(TenantCondition, old.conditions, [verdict], tenant.generation, now),
        holds=Holds(gpus=gpus, memory_slices=memory, compute_slices=compute),
        commitments=list(outlook.commitments),
        share=old.share,
    )
    lasts = old.share is not None and now - old.share.as_of < REFRESH
    slice_hours = f"{outlook.used / SECONDS_PER_HOUR:.2f}"
    if (new == old and lasts) or (old.share is not None and old.share.slice_hours == slice_hours):
        return new
    return new.model_copy(update={"share": DecayedUsage(slice_hours=slice_hours, as_of=floor_second(now))})


def _tenant_state(outlook: TenantOutlook) -> tuple[TenantReason, str]:
    spec = outlook.tenant.spec
    if spec is None:
        rest = "Until it can be read, its namespaces are tenants of their own with the default limits."
        return TenantReason.INVALID_SPEC, f"{outlook.tenant.invalid}. {rest}"
    if short := [one for one in outlook.commitments if one.short]:
        return TenantReason.SHORT, _short(short)
    if not outlook.conflicts:
        return TenantReason.SERVING, f"Serves {counted(len(spec.namespaces), 'namespace')}."
    taken = "; ".join(f"{', '.join(one.namespaces)} to tenant {one.owner}" for one in outlook.conflicts)
    remedy = "Of two that claim a namespace the older one has it: take each namespace out of one of them."
    return TenantReason.CONFLICT, f"Namespaces that belong to others: {taken}. {remedy}"


def _short(commitments: Iterable[CommitmentStatus]) -> str:
    """Which commitments are not kept in full."""
    each = (f"{counted(one.short, 'device')} of commitment {one.name}" for one in commitments)
    why = "leases that may not be pre-empted hold them, or they are broken or not there"
    return f"Nothing could be kept for {', '.join(each)}: {why}. What becomes free is kept for them."


def node_conditions(node: NodeFacts, now: datetime) -> tuple[NodeCondition, ...]:
    """Conditions of a GpuNode with the operator's mark: AgentSilent is there exactly while nobody is heard.

    A silent agent cannot say so itself; one that is heard again leaves its own conditions as they are. They are written
    as a whole: on a GpuNode that cannot be read nothing is marked.
    """
    if node.unreadable:
        return node.conditions
    others = tuple(one for one in node.conditions if one.type is not NodeConditionType.AGENT_SILENT)
    objection = node.agent_objection(now)
    if not objection:
        return others
    former = next((one for one in node.conditions if one.type is NodeConditionType.AGENT_SILENT), None)
    mark = NodeCondition(
        type=NodeConditionType.AGENT_SILENT,
        status=TRUE,
        reason=NodeReason.HEARTBEAT_MISSED,
        message=f"{objection[0].upper()}{objection[1:]}: nothing new is planned on this node.",
        last_transition_time=transition(former, TRUE, now),
        observed_generation=node.generation,
    )
    return (*others, former if former and former.message == mark.message else mark)
