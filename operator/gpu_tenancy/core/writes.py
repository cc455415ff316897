"""The writes that lead from what is to what was decided, apart from the queue's own: records, slots, pods. Pure.

Each function yields the actions of one concern; `planner.plan` puts them in execution order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.node import Slot, SlotState
from gpu_tenancy.core import ledger
from gpu_tenancy.core.actions import (
    Action,
    Admit,
    ArchiveRecord,
    CloseRecord,
    CreateClaimTemplate,
    CreateJob,
    DeleteClaimTemplate,
    DeleteJob,
    DeletePod,
    OpenRecord,
    Outlook,
    SetSlots,
    TouchClaim,
    TouchPod,
    WarnPod,
)
from gpu_tenancy.core.conversion import Modes
from gpu_tenancy.core.mining import by_device
from gpu_tenancy.core.outlooks import has_completed, unfinished
from gpu_tenancy.core.snapshot import ClaimFacts, LeftClaim, Snapshot, StartingPod
from gpu_tenancy.core.stock import Stock, unreachable
from gpu_tenancy.core.terms import begins_later

Slots = Mapping[str, tuple[Slot, ...]]
"""Wanted devices by name of the node, ordered by name of the device."""

TOUCH_AFTER: Final = timedelta(seconds=30)
"""How long a claim may stay behind; kube-controller-manager needs milliseconds, and half a minute in a great burst."""
TOUCH_AGAIN: Final = timedelta(minutes=2)
START_AFTER: Final = timedelta(seconds=2)
"""How long a bound pod may show no sign of life before kubelet is made to look again; a sandbox takes half a second."""
START_AGAIN: Final = 4
"""Then when it has been bound four times as long, and so on: kubelet says nothing either while it pulls an image."""
MOST_TOUCHES: Final = 128
"""Claims, and pods, that are touched in one cycle: the rest of a burst comes later, or needs it no more by then."""


# --- the ledger ---------------------------------------------------------------------------------------------------


def records(
    snapshot: Snapshot, stocks: Iterable[Stock], outlooks: Iterable[Outlook], now: datetime
) -> Iterator[Action]:
    """Segments that begin, end, or are to be archived."""
    for outlook in outlooks:
        if (spec := outlook.opened) is not None:
            yield OpenRecord(outlook.lease, ledger.record_name(spec.contract, spec.segment), spec)
        if outlook.closed is not None:
            yield outlook.closed
    for record in snapshot.orphans:
        if record.is_open:
            end, seconds = ledger.segment_end(record, now)
            yield CloseRecord(record, "", end, seconds, Reason.DELETED)
    of_leases = (record for stock in stocks for record in stock.lease.records)
    for record in (*of_leases, *snapshot.orphans):
        if record.deleting and record.finalized and not record.is_open:
            yield ArchiveRecord(record)


# --- promises -----------------------------------------------------------------------------------------------------


def promises(
    snapshot: Snapshot, slots: Slots, modes: Mapping[str, Modes], outlooks: Iterable[Outlook]
) -> Iterator[Action]:
    """Prices and attempts of the leases placed now, then what every node should have where that changes. `modes`: of
    the nodes where those change."""
    promised: dict[str, set[str]] = defaultdict(set)
    for outlook in outlooks:
        if outlook.admitted_now:
            yield Admit(outlook.lease, outlook.attempt, outlook.price)
            for name in outlook.nodes:
                promised[name].add(outlook.lease.uid)
    for node in snapshot.nodes:
        wanted, changed = slots[node.name], modes.get(node.name)
        if changed is not None or (wanted != node.slots and wanted != tuple(sorted(node.slots, key=by_device))):
            kept = changed or Modes(node.modes, node.conversions)
            yield SetSlots(node.name, node.generation, wanted, frozenset(promised[node.name]), *kept)


# --- what others have forgotten -----------------------------------------------------------------------------------


def touches(snapshot: Snapshot, now: datetime) -> Iterator[Action]:
    """Claims that kube-controller-manager has forgotten, and pods that kubelet has put off.

    The former frees a claim when it sees the pod go; of a pod that came and went while its watch was broken it never
    hears, and the device stays taken for half a day. The latter is refused the claim of a pod that is bound until the
    API server's node authorizer has seen so too, and then waits for its next full sync, a minute or more."""
    due = (claim for claim in snapshot.left_claims if touch_at(claim) <= now)
    yield from (TouchClaim(claim, now) for claim in islice(due, MOST_TOUCHES))
    late = (pod for pod in snapshot.starting if start_at(pod) <= now)
    yield from (TouchPod(pod, now) for pod in islice(late, MOST_TOUCHES))


def touch_at(claim: LeftClaim) -> datetime:
    """When a claim that is still there is to be touched."""
    return claim.deleted_at + TOUCH_AFTER if claim.touched_at is None else claim.touched_at + TOUCH_AGAIN


def start_at(pod: StartingPod) -> datetime:
    """When a pod that has not begun is to be touched."""
    if pod.touched_at is None or pod.touched_at <= pod.bound_at:
        return pod.bound_at + START_AFTER
    return pod.bound_at + START_AGAIN * max(pod.touched_at - pod.bound_at, START_AFTER)


# --- what runs on a lease -----------------------------------------------------------------------------------------


def objects(outlook: Outlook, now: datetime) -> Iterator[Action]:
    """The claim template and Job of a placed lease, at once: the pods wait in the scheduler's queue. Of one that begins
    later, when it begins: nobody uses devices before."""
    lease = outlook.lease
    if not outlook.nodes or outlook.refusal or outlook.over or outlook.closed or lease.namespace_ends:
        return
    if begins_later(lease, now):
        return
    if not lease.claim_template:
        yield CreateClaimTemplate(lease)
    # Once a segment runs, a Job that is missing was deleted by its owner: it is not run a second time. Nor is one that
    # is complete and was held, where the lease has to move or is resumed: its results are there.
    begun = lease.open_record is not None or outlook.opened is not None or has_completed(lease)
    if lease.template is not None and not begun and not any(job.attempt == outlook.attempt for job in lease.jobs):
        yield CreateJob(lease, outlook.attempt, outlook.nodes)


def releases(stock: Stock, now: datetime) -> Iterator[Action]:
    """Stop what used devices that are no longer the lease's, once they can no longer be scheduled: a pod stopped
    earlier would be replaced by its controller, and the new one would find the device still there."""
    lease = stock.lease
    if stock.stuck is not None or not (lease.claim_template or lease.jobs or lease.claims):
        return
    if stock.keeps or lease.open_record is not None:
        yield from _former_jobs(stock)
        yield from _unpreparable(stock, now)
    elif not stock.held and not any(_schedulable(stock, device, now) for device in stock.seen):
        yield from _everything(stock)


def _everything(stock: Stock) -> Iterator[Action]:
    lease = stock.lease
    if lease.claim_template and lease.template is None and not stock.wants and not lease.namespace_ends:
        # Only a tenant's own controller makes pods from it again and again; it is told so by the template's absence.
        # What was made for a lease's own Job stays with the finished Job, and goes with the lease.
        yield DeleteClaimTemplate(lease)
    running = [job for job in lease.jobs if unfinished(job)]
    for job in running:
        yield DeleteJob(lease, job.name, job.uid)
    if running:
        return  # it would replace a pod; once it is going, it does not, even where a finalizer of the tenant's keeps it
    for claim in lease.claims:
        yield from _users(stock, claim, _why(stock))


def warnings(outlook: Outlook) -> Iterator[Action]:
    """What the pods of a spot lease are told of its notice, once it is in the status; or that it was taken back."""
    lease = outlook.lease
    if outlook.closed is not None or not outlook.nodes or not lease.claims:
        return
    notice, stored = outlook.preemption, lease.status.preemption
    if notice != stored:
        return
    at = notice.at if notice is not None else None
    for claim in lease.claims:
        for pod in claim.users:
            if pod.warned_of != at:
                yield WarnPod(lease, pod, at)


def _why(stock: Stock) -> str:
    if stock.wants and stock.lease.status.preemption is not None:
        return "its lease gave way to one of a firmer tier, and is queued"
    if stock.wants:
        return "its lease lost its devices and is placed anew"
    return "its lease is over" if stock.over else "its lease is suspended"


def _former_jobs(stock: Stock) -> Iterator[Action]:
    """Jobs of earlier placement attempts: their pods would compete for the devices of the present one."""
    for job in stock.lease.jobs:
        if job.attempt != stock.lease.status.attempt and unfinished(job):
            yield DeleteJob(stock.lease, job.name, job.uid)


def _unpreparable(stock: Stock, now: datetime) -> Iterator[Action]:
    """Pods bound to a device of a former attempt in the moment of its withdrawal: kubelet would retry for ever."""
    current = {(node.name, slot.device) for node, slot in stock.held}
    for claim in stock.lease.claims:
        former = [device for device in claim.devices if device not in current]
        if former and not any(_schedulable(stock, device, now) for device in former):
            yield from _users(stock, claim, "its devices were taken away")


def _users(stock: Stock, claim: ClaimFacts, why: str) -> Iterator[Action]:
    for pod in claim.users:
        yield DeletePod(stock.lease, pod, f"Stopped pod {pod.name}: {why}.")


def _schedulable(stock: Stock, device: tuple[str, str], now: datetime) -> bool:
    """A pod could still be sent to the device. An agent that is silent cannot withdraw it; kubelet takes its devices
    away soon after it."""
    found = stock.seen.get(device)
    if found is None or unreachable(found[0], now):
        return False
    node, report = found
    return report.device in node.published or report.state is SlotState.READY
