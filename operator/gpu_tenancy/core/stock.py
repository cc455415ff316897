"""What every lease holds and is owed, found out before anything is placed. Pure.

Every lease of a snapshot becomes one Stock: its devices as promised (GpuNode.spec) and as reported (GpuNode.status),
its term, the fact that ends it if there is one, and whether its devices stay where they are, or it is to be placed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.node import BROKEN, Gpu, ObservedSlot, Slot
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.ledger import held_by
from gpu_tenancy.core.ordering import in_order
from gpu_tenancy.core.promises import Promises
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, RecordFacts, Snapshot
from gpu_tenancy.core.tenancy import Tenant, Tenants
from gpu_tenancy.core.terms import Ending, Term, billed_seconds, current_job, ending, expiry, is_over, term_of
from gpu_tenancy.mig.layout import device_mask

NODE_LOSS: Final = timedelta(minutes=5)
"""A node that is not Ready and whose agent is silent for so long is taken for dead: its leases are billed up to the
last sign of life and placed anew. As long as Kubernetes itself leaves pods on such a node by default."""

Held = list[tuple[NodeFacts, Slot]]
"""Devices with their nodes."""

Seen = dict[tuple[str, str], tuple[NodeFacts, ObservedSlot]]
"""Devices as agents report them, by names of node and device."""


class Stock(NamedTuple):
    """What is known about one lease before anything is placed."""

    lease: LeaseFacts
    term: Term
    ending: Ending | None
    held: Held
    """Its slots in GpuNode.spec."""
    seen: Seen
    """Its devices in GpuNode.status, those of former attempts included."""
    keeps: bool
    """Its slots stay in this plan."""
    wants: bool
    """It is to be placed."""
    over: bool
    """It has ended, or ends with this plan."""
    lost: str = ""
    """Why devices that it is billed for are not there any more, as a sentence."""
    stuck: Refusal | None = None
    """Why nothing of it may begin or be taken away: something that this depends on cannot be read."""
    hidden: tuple[NodeFacts, ...] = ()
    """Nodes that cannot be read and on which it may have devices; those are not among `held` and `seen`, or only in
    part."""

    @property
    def pending(self) -> Held:
        """Devices that are not ready: stored as ready by their agent and seen in the ResourceSlice."""
        return [(node, slot) for node, slot in self.held if not _is_ready(node, slot, self.seen)]

    def report(self, node: NodeFacts, slot: Slot) -> ObservedSlot | None:
        """What the agent says about a device."""
        found = self.seen.get((node.name, slot.device))
        return found[1] if found else None


def take_stock(snapshot: Snapshot, leases: Sequence[LeaseFacts], tenants: Tenants, now: datetime) -> list[Stock]:
    """The stocks of some leases, in the order of their age. Nothing is promised to any of the others."""
    promises = Promises(leases, snapshot.tenants)
    uids = {lease.uid for lease in leases}
    held: dict[str, Held] = defaultdict(list)
    seen: dict[str, Seen] = defaultdict(dict)
    for node in snapshot.nodes:
        if uids.isdisjoint(node.holders):
            continue
        for slot in node.leased:
            held[slot.holder.uid].append((node, slot))
        for report in node.leased_reports:
            seen[report.holder.uid][node.name, report.device] = (node, report)
    nothing: Held = []
    unreadable = [node for node in snapshot.nodes if node.unreadable]
    return [
        _stock(
            lease,
            _Devices(
                held.get(lease.uid, nothing),
                seen.get(lease.uid, {}),
                tuple(node for node in unreadable if _may_be_on(lease, node)),
            ),
            tenants.of(lease.key.namespace),
            now,
            promises,
            failing=lease.uid in snapshot.failures,
        )
        for lease in in_order(leases)
    ]


def time_left(stock: Stock, now: datetime) -> timedelta | None:
    """How long a lease keeps the devices that it has, or is given now, as far as is known; None: there is no end."""
    if stock.ending is not None:
        return timedelta()
    length = stock.term.length
    if length is None or stock.lease.spec.term.renew or stock.lease.unreadable:
        return None
    ends = expiry(stock.lease, stock.term)
    return (
        length - timedelta(seconds=billed_seconds(stock.lease.records))
        if ends is None
        else max(ends - now, timedelta())
    )


def unreachable(node: NodeFacts, now: datetime) -> str:
    """Why nothing can be learnt from the node or done on it, as a clause; empty where it can."""
    return "" if node.ready and not node.agent_objection(now) else node.objection(now)


def _may_be_on(lease: LeaseFacts, node: NodeFacts) -> bool:
    """Whether a lease may have devices on a node that cannot be read: something there, in its status or in its open
    segment says so."""
    if lease.uid in node.mentions or node.name in lease.status.nodes:
        return True
    record = lease.open_record
    return record is not None and any(device.node == node.name for device in record.spec.devices)


class _Devices(NamedTuple):
    """Where a lease has devices, or may have."""

    held: Held
    seen: Seen
    hidden: tuple[NodeFacts, ...]


def _stock(
    lease: LeaseFacts, devices: _Devices, tenant: Tenant, now: datetime, promises: Promises, *, failing: bool
) -> Stock:
    """`failing`: the API server refuses what the lease needs; if it is not billed yet, it gives its devices back."""
    held, seen, hidden = devices
    if lease.unreadable:
        return Stock(lease, Term(None), None, held, seen, keeps=True, wants=False, over=False, hidden=hidden)
    unsure = lease.invalid or lease.unreadable_record
    term = _term(lease, held, tenant, now, promises) if not unsure else Term(lease.status.accepted_duration)
    stuck = _stuck(lease, hidden)
    lost, lost_at = _lost(lease, held, seen, hidden, now)
    end = ending(lease, term, now, lost=lost, lost_at=lost_at)
    over = is_over(lease) or (end is not None and end.final)
    if (record := lease.open_record) is not None:
        # Billed seconds end on record before a device is taken away: the slots go in the cycle after that. A slot that
        # nobody is billed for is not the lease's, whoever wrote it.
        billed = held_by(record)
        held = [(node, slot) for node, slot in held if (node.name, slot.device) in billed]
        keeps = stuck is not None or not lost
        return Stock(lease, term, end, held, seen, keeps, wants=False, over=over, lost=lost, stuck=stuck, hidden=hidden)
    if stuck is not None:
        return Stock(lease, term, end, held, seen, keeps=True, wants=False, over=over, stuck=stuck, hidden=hidden)
    if _unbilled(lease, held, seen, over):
        return Stock(lease, term, end, held, seen, keeps=True, wants=False, over=over)
    active = not (over or lease.spec.suspend or lease.namespace_ends)
    if lease.invalid and held and active:
        stuck = Refusal(Reason.INVALID_SPEC, lease.invalid, final=True)
        return Stock(lease, term, end, held, seen, keeps=True, wants=False, over=over, stuck=stuck)
    usable = not (failing or _stale(lease, held, now) or _was_taken(lease, held, now))
    complete = active and len(held) == lease.devices and usable
    return Stock(lease, term, end, held, seen, keeps=complete, wants=active and not complete, over=over)


def _term(lease: LeaseFacts, held: Held, tenant: Tenant, now: datetime, promises: Promises) -> Term:
    return term_of(lease, now, tenant, promises.earliest(lease, held))


def _stuck(lease: LeaseFacts, hidden: Sequence[NodeFacts]) -> Refusal | None:
    """Why nothing of a lease may begin or be taken away, whatever state it is in."""
    if lease.unreadable_record:
        why = f"{lease.unreadable_record}: no segment begins and nothing is settled or given back until it can be."
        return Refusal(Reason.UNREADABLE, why, final=True)
    if hidden:
        why = f"{hidden[0].unreadable}: what the lease has there stays as it is until it can be."
        return Refusal(Reason.UNREADABLE, why, final=True)
    return None


def _lost(
    lease: LeaseFacts, held: Held, seen: Seen, hidden: Sequence[NodeFacts], now: datetime
) -> tuple[str, datetime]:
    """Which billed devices are no longer promised to the lease, have broken, or are on a dead machine, as a sentence;
    and since when."""
    record = lease.open_record
    if record is None:
        return "", now
    for node in (*(node for node, _ in held), *hidden):
        if died := died_at(node, now):
            return f"Node {node.name} is not Ready and its agent has been silent since {format_time(died)}.", died
    return _gone(record, held, seen, hidden), now


def died_at(node: NodeFacts, now: datetime) -> datetime | None:
    """When a machine was last heard of that neither kubelet nor agent has been heard from for NODE_LOSS; else None."""
    until = node.agent_until
    return until if until is not None and not node.ready and now - until >= NODE_LOSS else None


def _gone(record: RecordFacts, held: Held, seen: Seen, hidden: Sequence[NodeFacts]) -> str:
    """Which devices of a segment are no longer promised to its lease, or have broken; on a node that cannot be read
    none is."""
    there, unknown = {(node.name, slot.device) for node, slot in held}, {node.name for node in hidden}
    missing = (device for device in record.spec.devices if (device.node, device.device) not in there)
    gone = [device for device in missing if device.node not in unknown]
    if gone:
        names = ", ".join(sorted({device.node for device in gone}))
        return f"{len(gone)} of {len(record.spec.devices)} devices are gone from {names}."
    return next((fault for node, slot in held if (fault := _fault(node, slot, seen))), "")


def _fault(node: NodeFacts, slot: Slot, seen: Seen) -> str:
    """Why a device cannot serve any more, as its agent says."""
    gpu = node.gpu_of.get(slot.gpu)
    if gpu is not None and not gpu.healthy:
        return f"GPU {gpu.index} of node {node.name} is not healthy: {gpu.message or 'no reason was given'}."
    found = seen.get((node.name, slot.device))
    if found is not None and found[1].state in BROKEN:
        return f"Device {slot.device} on {node.name} failed: {found[1].message or 'no reason was given'}."
    return ""


def _unbilled(lease: LeaseFacts, held: Held, seen: Seen, over: bool) -> bool:
    """A lease whose Job was over before its devices were seen ready: its seconds are recorded first."""
    if not over or lease.namespace_ends or len(held) != lease.devices:
        return False
    job = current_job(lease)
    if job is None or not job.finished:
        return False
    return all(_is_ready(node, slot, seen) for node, slot in held) and not _on_record(lease, held)


def _on_record(lease: LeaseFacts, held: Held) -> bool:
    """A segment was opened for these very devices; their names tell attempts apart."""
    devices = {(node.name, slot.device) for node, slot in held}
    return any(devices == held_by(record) for record in lease.records)


def _was_taken(lease: LeaseFacts, held: Held, now: datetime) -> bool:
    """A lease of a firmer tier has a right to the devices of one that is not billed for them: any more, or yet."""
    notice = lease.status.preemption
    if notice is not None and notice.at <= now:
        return True
    last = lease.records[-1].spec if lease.records else None
    return last is not None and last.reason is Reason.PREEMPTED and _on_record(lease, held)


def _stale(lease: LeaseFacts, held: Held, now: datetime) -> bool:
    """A placement that is not billed yet and cannot become ready where it is."""
    for node, slot in held:
        gpu = node.gpu_of.get(slot.gpu)
        if slot.attempt != lease.status.attempt or gpu is None or not gpu.healthy or _on_fenced(gpu, slot):
            return True
        if unreachable(node, now):
            return True
    return False


def _on_fenced(gpu: Gpu, slot: Slot) -> bool:
    return bool(gpu.fenced_mask & device_mask(gpu.model, slot.profile, slot.start))


def _is_ready(node: NodeFacts, slot: Slot, seen: Seen) -> bool:
    """Stored as ready by the agent and seen in the ResourceSlice."""
    if slot.device not in node.published:
        return False
    found = seen.get((node.name, slot.device))
    return found is not None and found[1].ready_at is not None
