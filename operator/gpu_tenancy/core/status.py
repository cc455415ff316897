"""What an outlook looks like from outside: the only producer of a lease's status, its conditions and messages.

Pure: (object's facts, what the plan found out, now) -> status. A condition's lastTransitionTime moves only when its
status flips. There is no phase beside the conditions; the reason of `Ready` is the one-word state.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from gpu_tenancy.api.base import ConditionStatus, format_time, parse_duration
from gpu_tenancy.api.lease import QUEUED, ConditionType, Cost, GpuLeaseStatus, LeaseCondition, LeaseEnd, Reason
from gpu_tenancy.api.node import NodeCondition
from gpu_tenancy.api.pool import PoolCondition
from gpu_tenancy.api.pricebook import BookCondition
from gpu_tenancy.api.tenant import TenantCondition
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core import ledger
from gpu_tenancy.core.actions import Outlook
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.ordering import PREEMPTIBLE
from gpu_tenancy.core.snapshot import Failure
from gpu_tenancy.core.terms import FINAL_REASONS, current_job, floor_second

REFRESH: Final = timedelta(minutes=5)
"""Cost, queue position and messages about the queue are rewritten no more often than this when nothing else changes."""

MOST_CAUSES: Final = 32
"""Leases for which a spot lease has given way that are remembered."""

Verdict = tuple[ConditionStatus, Reason, str]
"""Status, reason and message of one condition."""

TRUE, FALSE = ConditionStatus.TRUE, ConditionStatus.FALSE


def lease_status(outlook: Outlook, failure: Failure | None, now: datetime) -> GpuLeaseStatus:
    """Status of a lease."""
    lease, old = outlook.lease, outlook.lease.status
    records = _segments(outlook)
    first_admission = outlook.admitted_now and old.admitted_at is None
    last = records[-1] if records else None
    new = GpuLeaseStatus(
        observed_generation=lease.generation,
        conditions=_conditions(outlook, failure, now),
        contract=old.contract or (lease.uid if first_admission else None),
        admitted_at=now if first_admission else old.admitted_at,
        price=outlook.price,
        accepted_duration=outlook.duration if (first_admission or old.admitted_at) else None,
        attempt=outlook.attempt,
        devices=None if lease.invalid else lease.devices,
        ready_devices=outlook.ready_devices or None,
        nodes=list(outlook.nodes),
        node_names=", ".join(outlook.nodes)[:4096] or None,
        position=outlook.position,
        expected_start=outlook.expected_start,
        segment=last.segment if last else 0,
        billable_from=last.billable_from if last else None,
        billable_to=last.billable_to if last else None,
        expires_at=outlook.expires_at,
        reservation=outlook.reservation,
        commitment=outlook.commitment,
        renewals=outlook.renewals,
        preemption=outlook.preemption,
        preempted_for=_preempted_for(outlook),
        cost=ledger.running_cost(records, now),
        hand_overs=list(outlook.hand_overs) or old.hand_overs,
        ended=_ended(outlook, last, now),
    )
    return _as_last_known(new, old) if lease.unreadable_record else new


def _preempted_for(outlook: Outlook) -> list[str]:
    """For whom it has lost devices: from when it has none any more, or others."""
    known, notice = outlook.lease.status.preempted_for, outlook.lease.status.preemption
    gone = outlook.admitted_now or not outlook.nodes
    if notice is None or not gone or notice.cause in known:
        return known
    return [*known, notice.cause][-MOST_CAUSES:]


def _as_last_known(new: GpuLeaseStatus, old: GpuLeaseStatus) -> GpuLeaseStatus:
    """What is told of the ledger stays as it was, because not all of it can be read."""
    told = {name: getattr(old, name) for name in ("segment", "billable_from", "billable_to", "cost")}
    return new.model_copy(update=told)


def _segments(outlook: Outlook) -> list[UsageRecordSpec]:
    """All segments as they are once the plan's writes are done."""
    specs = [record.spec for record in outlook.lease.records]
    if outlook.opened is not None:
        specs.append(outlook.opened)
    if (closed := outlook.closed) is not None:
        specs[-1] = specs[-1].model_copy(
            update={"billable_to": closed.billable_to, "seconds": closed.seconds, "reason": closed.reason}
        )
    return specs


def _ended(outlook: Outlook, last: UsageRecordSpec | None, now: datetime) -> LeaseEnd | None:
    if outlook.lease.status.ended is not None or not outlook.over:
        return outlook.lease.status.ended
    return LeaseEnd(
        at=last.billable_to if last and last.billable_to else floor_second(now),
        reason=_end_reason(outlook, last),
        message=outlook.end_message,
    )


def _end_reason(outlook: Outlook, last: UsageRecordSpec | None) -> Reason:
    """Why the lease is over, also where nothing was billed."""
    if outlook.lease.status.ended is not None:
        return outlook.lease.status.ended.reason
    if last is not None and last.reason in FINAL_REASONS:
        return last.reason
    if outlook.lease.deleted_at is not None:
        return Reason.DELETED
    job = current_job(outlook.lease)
    if job is not None and job.finished:
        return Reason.COMPLETED if job.finished == "Complete" else Reason.FAILED
    return Reason.EXPIRED


# --- conditions of a lease ----------------------------------------------------------------------------------------


def _conditions(outlook: Outlook, failure: Failure | None, now: datetime) -> list[LeaseCondition]:
    verdicts: dict[ConditionType, Verdict] = {
        ConditionType.READY: _ready(outlook, failure),
        ConditionType.ADMITTED: _admitted(outlook),
        ConditionType.ALLOCATED: _allocated(outlook),
        ConditionType.RECONCILING: _reconciling(outlook, failure),
        ConditionType.STALLED: _stalled(outlook, failure),
        ConditionType.EXPIRED: _expired(outlook, now),
        ConditionType.SETTLED: _settled(outlook),
    }
    lease = outlook.lease
    if lease.spec.tier is PREEMPTIBLE:
        verdicts[ConditionType.PREEMPTED] = _preempted(outlook)
    states = ((kind, *verdict) for kind, verdict in verdicts.items())
    return rendered(LeaseCondition, lease.status.conditions, states, lease.generation, now)


C = TypeVar("C", LeaseCondition, PoolCondition, BookCondition, TenantCondition)


def rendered(
    condition: type[C],
    former: Iterable[C],
    states: Iterable[tuple[Any, ConditionStatus, Any, str]],
    generation: int,
    now: datetime,
) -> list[C]:
    """`states`: type, status, reason and message of each condition; the enums are those of the condition's kind."""
    before = {one.type: one for one in former}
    found = []
    for kind, status, reason, message in states:
        old = before.get(kind)
        if old is not None and _says(old) == (status, reason, message, generation):
            found.append(old)
            continue
        since = transition(old, status, now)
        found.append(
            condition(
                type=kind,
                status=status,
                reason=reason,
                message=message,
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return found


def _says(one: LeaseCondition | PoolCondition | BookCondition | TenantCondition) -> tuple[object, ...]:
    return one.status, one.reason, one.message, one.observed_generation


def transition(
    former: LeaseCondition | PoolCondition | BookCondition | TenantCondition | NodeCondition | None,
    status: ConditionStatus,
    now: datetime,
) -> datetime:
    """lastTransitionTime of a condition: it moves only when the status flips."""
    return former.last_transition_time if former and former.status is status else floor_second(now)


def _is_ready(outlook: Outlook) -> bool:
    record = outlook.opened is not None or outlook.lease.open_record is not None
    return record and outlook.closed is None


def _ready(outlook: Outlook, failure: Failure | None) -> Verdict:
    """The roll-up: its reason is the state of the lease in one word."""
    lease = outlook.lease
    if _is_ready(outlook):
        silent = f" But {outlook.silent}." if outlook.silent else ""
        return TRUE, Reason.READY, f"{lease.devices} of {lease.devices} devices on {', '.join(outlook.nodes)}.{silent}"
    if outlook.over:
        reason = Reason.DRAINING if outlook.draining else _end_reason(outlook, _last(outlook))
        return FALSE, reason, outlook.draining or outlook.end_message or "The lease is over."
    if lease.spec.suspend and not lease.invalid:
        return (
            FALSE,
            Reason.SUSPENDED,
            outlook.draining or "spec.suspend is true; set it to false to queue the lease again.",
        )
    if outlook.refusal is not None:
        return FALSE, outlook.refusal.reason, outlook.refusal.message
    if failure is not None:
        return FALSE, Reason(failure.reason), failure.message
    if outlook.lost and not outlook.waiting:
        return FALSE, Reason.NODE_LOST, outlook.lost
    if outlook.closed is not None and outlook.closed.reason is Reason.PREEMPTED:
        return FALSE, Reason.PREEMPTED, f"{outlook.end_message} {REQUEUED}"
    return FALSE, outlook.waiting_reason, outlook.waiting or "The lease is being placed."


def _last(outlook: Outlook) -> UsageRecordSpec | None:
    segments = _segments(outlook)
    return segments[-1] if segments else None


def _admitted(outlook: Outlook) -> Verdict:
    if outlook.lease.status.admitted_at is None and not outlook.admitted_now:
        if outlook.over or outlook.lease.spec.suspend:
            return FALSE, Reason.SUSPENDED if not outlook.over else Reason.DELETED, "It was never admitted."
        refusal = outlook.refusal
        return FALSE, refusal.reason if refusal else Reason.QUEUED, refusal.message if refusal else ""
    if outlook.price is None:
        return (
            TRUE,
            Reason.UNPRICED,
            "Warning: there is no PriceBook, so the lease runs unpriced: its seconds are recorded without a rate.",
        )
    price = outlook.price
    return TRUE, Reason.ADMITTED, f"{price.per_hour} {price.currency} per device and hour, from PriceBook {price.book}."


def _allocated(outlook: Outlook) -> Verdict:
    if outlook.nodes and not (outlook.closed or outlook.over):
        return TRUE, Reason.PLACED, f"{counted(outlook.lease.devices, 'device')} on {', '.join(outlook.nodes)}."
    if outlook.over:
        return FALSE, _end_reason(outlook, _last(outlook)), "The GPUs go back."
    if outlook.lost:
        return FALSE, Reason.NODE_LOST, outlook.lost
    if outlook.lease.spec.suspend:
        return FALSE, Reason.SUSPENDED, "The GPUs were given back."
    refusal = outlook.refusal
    return FALSE, refusal.reason if refusal else Reason.QUEUED, "It holds no GPUs."


def _reconciling(outlook: Outlook, failure: Failure | None) -> Verdict:
    """kstatus: True while the operator is still working towards the spec."""
    if _is_ready(outlook):
        return FALSE, Reason.READY, ""
    if outlook.over:
        if outlook.draining:
            return TRUE, Reason.DRAINING, outlook.draining
        return FALSE, Reason.SETTLED, ""
    if outlook.lease.spec.suspend:
        return (TRUE, Reason.DRAINING, outlook.draining) if outlook.draining else (FALSE, Reason.SUSPENDED, "")
    if failure is not None or (outlook.refusal and outlook.refusal.final):
        return FALSE, outlook.refusal.reason if outlook.refusal else Reason.API_REJECTED, ""
    if outlook.refusal is not None:
        return TRUE, outlook.refusal.reason, outlook.refusal.message
    return TRUE, outlook.waiting_reason, outlook.waiting or outlook.lost


def _stalled(outlook: Outlook, failure: Failure | None) -> Verdict:
    """kstatus: True where nothing moves until somebody changes something."""
    refusal = outlook.refusal
    if refusal is not None and refusal.final and (not outlook.over or refusal.reason is Reason.UNREADABLE):
        return TRUE, refusal.reason, refusal.message
    if failure is not None:
        return TRUE, Reason(failure.reason), f"{failure.message} Tried again at {format_time(failure.retry_at)}."
    if outlook.extension_refusal:
        return TRUE, Reason.EXTENSION_REFUSED, outlook.extension_refusal
    return FALSE, Reason.UP_TO_DATE, ""


def _expired(outlook: Outlook, now: datetime) -> Verdict:
    if outlook.over:
        reason = _end_reason(outlook, _last(outlook))
        return (TRUE if reason is Reason.EXPIRED else FALSE), reason, outlook.end_message
    if outlook.expires_at is None:
        if outlook.duration is None:
            return FALSE, Reason.UNTIL_DELETED, "No term.duration: the lease runs until it is deleted."
        return FALSE, Reason.RUNNING, f"The term of {outlook.duration} begins when the devices are ready."
    if outlook.expires_at - parse_duration(outlook.lease.spec.term.notice) <= now:
        return (
            FALSE,
            Reason.NOTICE_GIVEN,
            f"The lease ends at {format_time(outlook.expires_at)}; raise term.duration to extend it.",
        )
    return FALSE, Reason.RUNNING, f"Ends at {format_time(outlook.expires_at)}."


def _preempted(outlook: Outlook) -> Verdict:
    """Of a spot lease: whether it has to give way, or had to."""
    notice = outlook.preemption
    if outlook.over:
        return FALSE, _end_reason(outlook, _last(outlook)), ""
    if notice is None:
        former = next((one for one in outlook.lease.status.conditions if one.type is ConditionType.PREEMPTED), None)
        if outlook.nodes and not outlook.admitted_now and former and former.reason in TAKEN_BACK:
            return FALSE, Reason.NOTICE_WITHDRAWN, "Its GPUs are not needed after all: the lease keeps them."
        return FALSE, Reason.PREEMPTIBLE, "A lease of a firmer tier that finds no room may take its GPUs, with notice."
    at = format_time(notice.at)
    if outlook.closed is not None or not outlook.nodes:
        return TRUE, Reason.PREEMPTED, f"Its GPUs were taken at {at} for a lease of a firmer tier. {REQUEUED}"
    told = f"A lease of a firmer tier needs its GPUs: it loses them at {at}, when its pods are stopped. Save its work."
    return FALSE, Reason.PREEMPTION_NOTICE, told


REQUEUED: Final = "It is queued with what is left of its term, and keeps its price."
TAKEN_BACK: Final = (Reason.PREEMPTION_NOTICE, Reason.NOTICE_WITHDRAWN)
"""Reasons of a spot lease that had notice and has none now."""


def _settled(outlook: Outlook) -> Verdict:
    """Nothing is held and every second is on record."""
    if not outlook.settled:
        return FALSE, Reason.OPEN, ""
    segments = _segments(outlook)
    seconds = sum(spec.seconds or 0 for spec in segments)
    return (
        TRUE,
        Reason.SETTLED,
        f"{seconds} s in {counted(len(segments), 'segment')} are on record.",
    )


# --- when a difference is worth a write -----------------------------------------------------------------------------


def differs(old: GpuLeaseStatus, new: GpuLeaseStatus, last_write: datetime | None, now: datetime) -> bool:
    """Whether to write the new status: any transition at once; running cost, position, the expected start and the
    numbers in a queued lease's messages at most every five minutes. `last_write`: when this process last wrote it,
    None: unknown."""
    if old == new:
        return False
    if _essence(old) != _essence(new):
        return True
    since = last_write or _as_of(old.cost)
    return since is None or now - since >= REFRESH


def _as_of(cost: Cost | None) -> datetime | None:
    return cost.as_of if cost else None


def _essence(status: GpuLeaseStatus) -> GpuLeaseStatus:
    queued = [
        condition.model_copy(update={"message": ""}) if condition.reason in QUEUED else condition
        for condition in status.conditions
    ]
    moving = {"cost": None, "position": status.position and 1, "expected_start": None}
    return status.model_copy(update={**moving, "conditions": queued})
