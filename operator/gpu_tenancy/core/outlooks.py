"""What becomes of leases that are not placed in this plan: they run on, end, or leave. Pure.

An Outlook is everything that the plan found out about one lease; its status and its writes follow from it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from gpu_tenancy.api.base import HolderKind, format_time
from gpu_tenancy.api.lease import DeviceHandOver, Reason
from gpu_tenancy.api.node import BROKEN, HandOver, SlotState
from gpu_tenancy.core import ledger
from gpu_tenancy.core.actions import CloseRecord, Outlook, Refusal
from gpu_tenancy.core.snapshot import JobFacts, LeaseFacts, NodeFacts, RecordFacts
from gpu_tenancy.core.stock import Stock, unreachable
from gpu_tenancy.core.terms import Ending, begins_later, billed_seconds, current_job, expiry

SHOWN: Final = 64
"""Devices whose hand-over a lease's status shows."""


def outlook(stock: Stock, now: datetime) -> Outlook:
    """What becomes of a lease that keeps its devices or has no claim to any."""
    lease = stock.lease
    if stock.stuck is not None and lease.open_record is None:
        return _stuck(stock, stock.stuck)
    holds = stock.keeps or lease.open_record is not None
    base = Outlook(
        lease,
        stock.term.duration,
        expires_at=expiry(lease, stock.term) if stock.ending is None else None,
        extension_refusal=stock.term.refusal,
        renewals=stock.term.renewals,
        commitment=lease.status.commitment,
        reservation=None if lease.records else lease.status.reservation,
        attempt=lease.status.attempt,
        price=lease.status.price,
        refusal=stock.stuck,
        nodes=_names(stock) if holds else (),
        ready_devices=len(stock.held) - len(stock.pending),
        hand_overs=_hand_overs(stock),
        over=stock.over,
        lost=stock.lost,
        silent=_silent(stock, now) if holds else "",
    )
    return _holding(base, stock, now) if holds else _leaving(base, stock, now)


def _stuck(stock: Stock, why: Refusal) -> Outlook:
    """A lease that is not billed and of which nothing begins, ends or is settled, because something cannot be read.
    Whether it is over is said once that can be told for good."""
    ended = stock.lease.status.ended
    return refused(stock, why)._replace(
        nodes=_names(stock),
        ready_devices=len(stock.held) - len(stock.pending),
        over=ended is not None,
        draining=why.message,
        end_message=ended.message if ended else "",
    )


def refused(stock: Stock, why: Refusal) -> Outlook:
    """A lease of which nothing is placed; attempt and price stay as they were said last."""
    status = stock.lease.status
    return Outlook(
        stock.lease,
        stock.term.duration,
        extension_refusal=stock.term.refusal,
        refusal=why,
        renewals=stock.term.renewals,
        commitment=status.commitment,
        reservation=None if stock.lease.records else status.reservation,
        attempt=status.attempt,
        price=status.price,
        preemption=status.preemption,
    )


def unfinished(job: JobFacts) -> bool:
    """The Job may still run pods and nobody has told it to go."""
    return not job.finished and not job.deleting


def has_completed(lease: LeaseFacts) -> bool:
    """Its Job has finished well, in this placement or a former one."""
    return any(job.finished == "Complete" for job in lease.jobs)


def _holding(base: Outlook, stock: Stock, now: datetime) -> Outlook:
    """A lease that holds devices: its segment opens, goes on or closes."""
    lease, end = stock.lease, stock.ending
    if record := lease.open_record:
        if end is None:
            return base
        return base._replace(closed=_close(record, lease.uid, end), end_message=end.message)
    if waiting := _waiting(stock, now):
        return base._replace(waiting=waiting, waiting_reason=_waiting_reason(stock, now))
    return _opening(base, stock, now)


def _hand_overs(stock: Stock) -> tuple[DeviceHandOver, ...]:
    """How its devices came to it, as their agents wrote it down; who of other tenants had them before is not told."""
    reports = ((node, slot, stock.report(node, slot)) for node, slot in stock.held[:SHOWN])
    return tuple(
        DeviceHandOver(
            node=node.name, device=slot.device, record=_discreet(report.hand_over, stock.lease.key.namespace)
        )
        for node, slot, report in reports
        if report is not None and report.hand_over is not None
    )


def _discreet(record: HandOver, namespace: str) -> HandOver:
    told = [one for one in record.former if one.kind is HolderKind.MINING_POOL or one.namespace == namespace]
    return record if len(told) == len(record.former) else record.model_copy(update={"former": told})


def _opening(base: Outlook, stock: Stock, now: datetime) -> Outlook:
    """Every device is ready: billing begins. A lease that is over already is so once the segment is closed again."""
    lease, base = stock.lease, base._replace(over=False)
    reports = [report for node, slot in stock.held if (report := stock.report(node, slot)) is not None]
    ready_at = [report.ready_at for report in reports if report.ready_at is not None]
    start = ledger.segment_start(stock.held, ready_at, lease, now)
    opened = ledger.segment(lease, stock.held, start)
    if stock.term.length is None:
        return base._replace(opened=opened)
    left = stock.term.length - timedelta(seconds=billed_seconds(lease.records))
    return base._replace(opened=opened, expires_at=start + left)


def _waiting(stock: Stock, now: datetime) -> str:
    """What a placed lease still waits for, as a sentence; empty when its seconds may be billed."""
    if pending := stock.pending:
        node, slot = pending[0]
        report = stock.report(node, slot)
        # What a device waits for is another holder, or what was left of one: not for this tenant's eyes.
        failed = report is not None and report.state in BROKEN and report.message
        reason = f": {report.message}" if report is not None and failed else ""
        ready = len(stock.held) - len(pending)
        return (
            f"{ready} of {len(stock.held)} devices are ready; {slot.device} on {node.name} is being prepared{reason}."
        )
    if begins_later(stock.lease, now) and (start := stock.lease.spec.term.start):
        return f"All {len(stock.held)} devices are ready; the lease begins at {format_time(start)}."
    if stock.lease.template is not None and current_job(stock.lease) is None and not has_completed(stock.lease):
        return "The Job is being created."
    return ""


def _waiting_reason(stock: Stock, now: datetime) -> Reason:
    reports = (stock.report(node, slot) for node, slot in stock.pending)
    failed = any(report is not None and report.state in BROKEN for report in reports)
    if failed:
        return Reason.DEVICE_FAILED
    return Reason.RESERVED if begins_later(stock.lease, now) else Reason.PREPARING


def _leaving(base: Outlook, stock: Stock, now: datetime) -> Outlook:
    """A lease that is over, suspended or loses its namespace: settled once nothing of it is left."""
    end, status = stock.ending, stock.lease.status
    draining = _draining(stock, now)
    message = status.ended.message if status.ended else (end.message if end else "")
    ends = "Its namespace is being deleted." if stock.lease.namespace_ends else ""
    return base._replace(draining=draining, settled=base.over and not draining, end_message=message, waiting=ends)


def _draining(stock: Stock, now: datetime) -> str:
    """What of a lease is still there after its end, as a sentence. A silent agent, a dead GPU or a quarantined device,
    which nobody can prove empty, cannot hold up settlement: it is not given to anybody else before it is empty."""
    lease = stock.lease
    if stock.held:
        return f"{_devices(len(stock.held))} being withdrawn."
    left = [
        report
        for node, report in stock.seen.values()
        if report.state is not SlotState.QUARANTINED and not unreachable(node, now) and _is_healthy(node, report.gpu)
    ]
    if left:
        reason = f" ({left[0].message})" if left[0].message else ""
        return f"{_devices(len(left))} waiting for pods to stop{reason}."
    if not lease.namespace_ends and (_own_template(lease) or any(unfinished(job) for job in lease.jobs)):
        return "Its claim template or Job is being deleted."
    return ""


def _own_template(lease: LeaseFacts) -> bool:
    """The claim template from which the tenant's own pods are made is there."""
    return bool(lease.claim_template) and lease.template is None


def _is_healthy(node: NodeFacts, uuid: str) -> bool:
    gpu = node.gpu_of.get(uuid)
    return gpu is not None and gpu.healthy


def _devices(count: int) -> str:
    return f"{count} device{' is' if count == 1 else 's are'}"


def _close(record: RecordFacts, uid: str, end: Ending) -> CloseRecord:
    billable_to, seconds = ledger.segment_end(record, end.at)
    return CloseRecord(record, uid, billable_to, seconds, end.reason)


def _names(stock: Stock) -> tuple[str, ...]:
    """Nodes on which it has devices, or may have."""
    return tuple(sorted({node.name for node, _ in stock.held} | {node.name for node in stock.hidden}))


def _silent(stock: Stock, now: datetime) -> str:
    """Why what goes on at one of its nodes is not known, as a clause."""
    if stock.hidden:
        return stock.hidden[0].unreadable
    return next((objection for node, _ in stock.held if (objection := unreachable(node, now))), "")
