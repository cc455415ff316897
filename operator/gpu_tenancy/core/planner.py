"""plan(snapshot, now) -> Plan: the one decision, for the whole cluster, once per cycle.

Reads top-down: what every lease holds and is owed (`_take_stock`), who is placed where (`_place_queue`), what miners get
(`_slots_of`), and which writes lead there. Pure, total and deterministic; "no room" is a Refusal, never an exception.
Applying a plan and planning again yields no new actions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from gpu_tenancy.api.base import Holder, HolderKind, parse_duration
from gpu_tenancy.api.lease import Price, Reason
from gpu_tenancy.api.node import ObservedSlot, Slot, SlotState
from gpu_tenancy.core import checks, ledger
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
    Plan,
    PoolOutlook,
    Refusal,
    SetSlots,
    StartMiner,
    StopMiner,
    Unbind,
)
from gpu_tenancy.core.amounts import NOTHING
from gpu_tenancy.core.devices import device_name, miner_name
from gpu_tenancy.core.mining import Miner, miner_slots, ranked
from gpu_tenancy.core.ordering import in_order
from gpu_tenancy.core.pricing import pricing
from gpu_tenancy.core.snapshot import JobFacts, LeaseFacts, NodeFacts, RecordFacts, Snapshot
from gpu_tenancy.core.terms import Ending, Term, current_job, ending, expiry, is_over, term_of
from gpu_tenancy.core.world import Seat, Want, World

MINER_GRACE_SECONDS = 1
"""Grace of a miner whose pool is gone and cannot be asked."""

Held = list[tuple[NodeFacts, Slot]]
"""Devices with their nodes."""


@dataclass(slots=True)
class _Stock:
    """What is known about one lease before anything is placed."""

    lease: LeaseFacts
    term: Term
    ending: Ending | None
    held: Held
    """Its slots in GpuNode.spec."""
    keeps: bool
    """Its slots stay in this plan."""
    wants: bool
    """It is to be placed."""
    lost: str = ""
    observed: list[tuple[NodeFacts, ObservedSlot]] = field(default_factory=list)
    """Its devices as agents report them."""


def plan(snapshot: Snapshot, now: datetime) -> Plan:
    """Decide everything that should be written now, and when to decide again."""
    world = World(snapshot.nodes, now)
    context = checks.Context(world, pricing(snapshot.books, now))
    stocks = _take_stock(snapshot, now)
    for stock in stocks:
        if stock.keeps:
            _hold(world, stock)
    world.settle()
    outlooks = [_outlook(stock, now) for stock in stocks if not stock.wants]
    outlooks += _place_queue([stock for stock in stocks if stock.wants], context, snapshot, now)
    slots = _slots_of(world, ranked(snapshot.pools), now)
    actions = [
        *_record_actions(snapshot, outlooks, now),
        *_slot_actions(snapshot, slots, outlooks),
        *_miner_stops(snapshot, slots),
        *(action for stock in stocks for action in _release(stock, snapshot, now)),
        *(action for outlook in outlooks for action in _objects(outlook)),
        *_miner_starts(snapshot, slots),
        *(Unbind(outlook.lease) for outlook in outlooks if outlook.settled and outlook.lease.finalized),
    ]
    return Plan(
        actions=tuple(actions),
        leases=tuple(sorted(outlooks, key=lambda outlook: outlook.lease.key)),
        pools=_pool_outlooks(snapshot, slots),
        next_wake=_next_wake(snapshot, outlooks, context, now),
        refusals={outlook.lease.uid: outlook.refusal for outlook in outlooks if outlook.refusal},
    )


# --- what every lease holds and is owed ---------------------------------------------------------------------------


def _take_stock(snapshot: Snapshot, now: datetime) -> list[_Stock]:
    held: dict[str, Held] = defaultdict(list)
    observed: dict[str, list[tuple[NodeFacts, ObservedSlot]]] = defaultdict(list)
    for node in snapshot.nodes:
        for slot in node.slots:
            if slot.holder.kind is HolderKind.GPU_LEASE:
                held[slot.holder.uid].append((node, slot))
        for seen in node.observed:
            if seen.holder.kind is HolderKind.GPU_LEASE:
                observed[seen.holder.uid].append((node, seen))
    leases = in_order(snapshot.leases)
    return [_stock(lease, held.get(lease.uid, []), observed.get(lease.uid, []), now) for lease in leases]


def _stock(lease: LeaseFacts, held: Held, observed: list[tuple[NodeFacts, ObservedSlot]], now: datetime) -> _Stock:
    term = term_of(lease, now) if not lease.invalid else Term(lease.status.accepted_duration)
    lost = _lost(lease, held)
    end = ending(lease, term, now, lost=lost)
    over = is_over(lease) or (end is not None and end.final)
    active = not (over or lease.spec.suspend or lease.namespace_ends)
    if lease.open_record is not None:
        # Billed seconds end on record before a device is taken away: the slots go in the cycle after that.
        return _Stock(lease, term, end, held, keeps=not lost, wants=False, lost=lost, observed=observed)
    if _unbilled(lease, held, over):
        return _Stock(lease, term, end, held, keeps=True, wants=False, observed=observed)
    complete = active and len(held) == lease.devices and not _stale(lease, held, now)
    return _Stock(lease, term, end, held, complete, active and not complete, observed=observed)


def _lost(lease: LeaseFacts, held: Held) -> str:
    """Which billed devices are no longer promised to the lease, as a sentence."""
    record = lease.open_record
    if record is None:
        return ""
    there = {(node.name, slot.device) for node, slot in held}
    gone = [device for device in record.spec.devices if (device.node, device.device) not in there]
    if not gone:
        return ""
    names = ", ".join(sorted({device.node for device in gone}))
    return f"{len(gone)} of {len(record.spec.devices)} devices are gone from {names}."


def _unbilled(lease: LeaseFacts, held: Held, over: bool) -> bool:
    """A lease that is over but had all its devices and no segment yet for them: its seconds are recorded first."""
    job = current_job(lease)
    if not over or lease.namespace_ends or len(held) != lease.devices or job is None or not job.finished:
        return False
    return _ready_devices(held) == lease.devices and not _billed_since(lease, held)


def _billed_since(lease: LeaseFacts, held: Held) -> bool:
    decided = max(slot.since for _, slot in held).replace(microsecond=0)
    return any(record.spec.billable_from >= decided for record in lease.records)


def _stale(lease: LeaseFacts, held: Held, now: datetime) -> bool:
    """A placement that is not billed yet and cannot become ready where it is."""
    for node, slot in held:
        gpu = next((gpu for gpu in node.gpus if gpu.uuid == slot.gpu), None)
        if slot.attempt != lease.status.attempt or gpu is None or not gpu.healthy:
            return True
        if not node.ready or node.agent_objection(now):
            return True
    return False


def _hold(world: World, stock: _Stock) -> None:
    """Enter a lease's devices into the working copy; each pod's CPU and memory count once on its node."""
    per_pod = checks.needs_of(stock.lease).amount
    counted: dict[str, int] = defaultdict(int)
    for node, slot in stock.held:
        first_of_pod = counted[node.name] % stock.lease.spec.gpus.count == 0
        counted[node.name] += 1
        world.hold(world.nodes[node.name], slot, per_pod if first_of_pod else NOTHING)


def _ready_devices(held: Held) -> int:
    return sum(1 for node, slot in held if _is_ready(node, slot))


def _is_ready(node: NodeFacts, slot: Slot) -> bool:
    """Stored as ready by the agent and seen in the ResourceSlice."""
    seen = _observed(node, slot.device)
    return slot.device in node.published and seen is not None and seen.ready_at is not None


def _observed(node: NodeFacts, device: str) -> ObservedSlot | None:
    return next((seen for seen in node.observed if seen.device == device), None)


# --- outlooks of leases that are not placed in this plan ------------------------------------------------------------


def _outlook(stock: _Stock, now: datetime) -> Outlook:
    lease, end = stock.lease, stock.ending
    base = Outlook(
        lease,
        stock.term.duration,
        expires_at=expiry(lease, stock.term),
        extension_refusal=stock.term.refusal,
        attempt=lease.status.attempt,
        price=lease.status.price,
        ready_devices=_ready_devices(stock.held),
        over=is_over(lease) or (end is not None and end.final),
        lost=stock.lost,
    )
    if stock.keeps or lease.open_record is not None:
        return _running(base, stock, now)
    return _leaving(base, stock, now)


def _running(base: Outlook, stock: _Stock, now: datetime) -> Outlook:
    """A lease that holds devices: its segment opens, goes on or closes."""
    lease, end = stock.lease, stock.ending
    base = replace(base, nodes=_names(stock.held), silent=_silent(stock.held, now))
    if record := lease.open_record:
        if end is None:
            return base
        return replace(base, closed=_close(record, lease.uid, end), end_message=end.message)
    waiting = _waiting(stock)
    if waiting:
        return replace(base, waiting=waiting)
    ready = [seen.ready_at for node, slot in stock.held if (seen := _observed(node, slot.device)) and seen.ready_at]
    start = ledger.segment_start(stock.held, ready, lease, now)
    opened = ledger.segment(lease, stock.held, start)
    if stock.term.length is not None:
        used = timedelta(seconds=sum(one.spec.seconds or 0 for one in lease.records))
        base = replace(base, expires_at=start + stock.term.length - used)
    return replace(base, opened=opened)


def _waiting(stock: _Stock) -> str:
    """What a placed lease still waits for, as a sentence; empty when its seconds may be billed."""
    pending = [(node, slot) for node, slot in stock.held if not _is_ready(node, slot)]
    if pending:
        node, slot = pending[0]
        seen = _observed(node, slot.device)
        reason = f": {seen.message}" if seen and seen.message else ""
        ready = len(stock.held) - len(pending)
        return f"{ready} of {len(stock.held)} devices are ready; {slot.device} on {node.name} is being prepared{reason}"
    if stock.lease.template is not None and current_job(stock.lease) is None:
        return "The Job is being created."
    return ""


def _leaving(base: Outlook, stock: _Stock, now: datetime) -> Outlook:
    """A lease that is over or suspended: settled once nothing of it is left."""
    end, lease = stock.ending, stock.lease
    draining = _draining(stock, now)
    message = end.message if end else (lease.status.ended.message if lease.status.ended else "")
    return replace(base, draining=draining, settled=base.over and not draining, end_message=message)


def _draining(stock: _Stock, now: datetime) -> str:
    """What of a lease is still there after its end, as a sentence; a silent agent cannot hold up settlement: it will
    not give the GPU to anybody else before it is empty."""
    lease = stock.lease
    if stock.held:
        return f"{len(stock.held)} devices are being withdrawn."
    left = [seen for node, seen in stock.observed if node.ready and not node.agent_objection(now)]
    if left:
        reason = f" ({left[0].message})" if left[0].message else ""
        return f"{len(left)} devices wait for their pods to stop{reason}."
    if any(record.is_open for record in lease.records):
        return "The last segment is being closed."
    if not lease.namespace_ends and (lease.claim_template or any(_unfinished(job) for job in lease.jobs)):
        return "Its claim template and Job are being deleted."
    return ""


def _unfinished(job: JobFacts) -> bool:
    return not job.finished and not job.deleting


def _close(record: RecordFacts, uid: str, end: Ending) -> CloseRecord:
    billable_to, seconds = ledger.segment_end(record, end.at)
    return CloseRecord(record, uid, billable_to, seconds, end.reason)


def _names(held: Held) -> tuple[str, ...]:
    return tuple(sorted({node.name for node, _ in held}))


def _silent(held: Held, now: datetime) -> str:
    return next((objection for node, _ in held if (objection := _unreachable(node, now))), "")


def _unreachable(node: NodeFacts, now: datetime) -> str:
    return "" if node.ready and not node.agent_objection(now) else node.objection(now)


# --- the queue ----------------------------------------------------------------------------------------------------


def _place_queue(stocks: Sequence[_Stock], context: checks.Context, snapshot: Snapshot, now: datetime) -> list[Outlook]:
    """Place what fits, in order; everything else gets a refusal, and a position if it only has to wait."""
    outlooks, position = [], 0
    full: dict[Want, str] = {}
    for stock in stocks:
        outlook = _place(stock, context, full, snapshot, now)
        if outlook.refusal and not outlook.refusal.final:
            position += 1
            outlook = replace(outlook, position=position)
        outlooks.append(outlook)
    return outlooks


def _place(stock: _Stock, context: checks.Context, full: dict[Want, str], snapshot: Snapshot, now: datetime) -> Outlook:
    lease = stock.lease
    base = Outlook(
        lease,
        stock.term.duration,
        extension_refusal=stock.term.refusal,
        attempt=lease.status.attempt,
        price=lease.status.price,
        lost=_last_loss(lease),
    )
    if failure := snapshot.failures.get(lease.uid):
        return replace(base, refusal=Refusal(Reason(failure.reason), failure.message))
    if refused := checks.refusal(lease, context):
        return replace(base, refusal=refused)
    models = checks.models_for(lease, context)
    for model in models:
        want = checks.want_of(lease, model)
        seats = None if want in full else context.world.place(want)
        if seats is not None:
            return _admit(base, stock, seats, context.pricing.price(model, want.profile), now)
        # Nothing is given back within a plan: what did not fit once fits for nobody after.
        full.setdefault(want, f"Position in the queue is by age; {checks.no_room(want, context.world)}.")
    return replace(base, refusal=Refusal(Reason.QUEUED, full[checks.want_of(lease, models[0])]))


def _last_loss(lease: LeaseFacts) -> str:
    lost = bool(lease.records) and lease.records[-1].spec.reason is Reason.NODE_LOST
    return "Its former devices were lost; it is placed anew." if lost else ""


def _admit(base: Outlook, stock: _Stock, seats: Sequence[Seat], price: Price | None, now: datetime) -> Outlook:
    """Take the seats: slots under the next attempt, at the price locked first."""
    lease, attempt = stock.lease, _attempt(stock)
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace=lease.key.namespace, name=lease.key.name, uid=lease.uid)
    profile = lease.spec.gpus.profile
    for seat in seats:
        for book in seat.gpus:
            device = device_name(book.gpu.index, profile, seat.start, lease.uid, attempt)
            slot = Slot(
                device=device,
                gpu=book.gpu.uuid,
                profile=profile,
                start=seat.start,
                holder=holder,
                attempt=attempt,
                since=now,
            )
            seat.node.slots.append(slot)
    first = lease.status.admitted_at is None
    return replace(
        base,
        attempt=attempt,
        price=price if first else lease.status.price,
        admitted_now=True,
        nodes=tuple(sorted({seat.node.facts.name for seat in seats})),
        waiting=f"0 of {lease.devices} devices are ready; the nodes are being prepared.",
    )


def _attempt(stock: _Stock) -> int:
    """The attempt of a new placement: the same number again only if nothing can know of the last one."""
    lease = stock.lease
    unused = not lease.jobs and not stock.held and not stock.observed and not lease.claim_template
    return (
        lease.status.attempt if unused and lease.status.attempt > 0 and not lease.records else lease.status.attempt + 1
    )


# --- the wanted devices of every node -----------------------------------------------------------------------------


def _slots_of(world: World, miners: Sequence[Miner], now: datetime) -> dict[str, tuple[Slot, ...]]:
    return {
        name: tuple(sorted((*node.slots, *miner_slots(node, miners, now)), key=lambda slot: slot.device))
        for name, node in world.nodes.items()
    }


def _slot_actions(
    snapshot: Snapshot, slots: dict[str, tuple[Slot, ...]], outlooks: Iterable[Outlook]
) -> Iterable[Action]:
    admitted = [outlook for outlook in outlooks if outlook.admitted_now]
    for outlook in admitted:
        yield Admit(outlook.lease, outlook.attempt, outlook.price)
    promised: dict[str, set[str]] = defaultdict(set)
    for outlook in admitted:
        for name in outlook.nodes:
            promised[name].add(outlook.lease.uid)
    for node in snapshot.nodes:
        if set(slots[node.name]) != set(node.slots):
            yield SetSlots(node.name, node.generation, slots[node.name], frozenset(promised[node.name]))


def _miner_stops(snapshot: Snapshot, slots: dict[str, tuple[Slot, ...]]) -> Iterable[Action]:
    grace = {pool.uid: pool.spec.grace_seconds for pool in snapshot.pools}
    wanted = {(node, slot.device) for node, ones in slots.items() for slot in ones}
    for miner in snapshot.miners:
        if ((miner.node, miner.device) not in wanted or miner.finished) and not miner.deleting:
            yield StopMiner(miner, grace.get(miner.pool, MINER_GRACE_SECONDS))


def _miner_starts(snapshot: Snapshot, slots: dict[str, tuple[Slot, ...]]) -> Iterable[Action]:
    pools = {pool.uid: pool for pool in snapshot.pools}
    existing = {miner.name: miner for miner in snapshot.miners}
    for node, ones in slots.items():
        for slot in ones:
            pool = pools.get(slot.holder.uid)
            if pool is None or slot.holder.kind is not HolderKind.MINING_POOL or pool.uid in snapshot.failures:
                continue
            miner = existing.get(miner_name(node, slot.device))
            if miner is None:
                yield StartMiner(pool, node, slot, missing_claim=True, missing_pod=True)
            elif not (miner.deleting or miner.finished or (miner.pod_uid and miner.claim_uid)):
                yield StartMiner(pool, node, slot, not miner.claim_uid, not miner.pod_uid)


# --- beginnings and ends ------------------------------------------------------------------------------------------


def _record_actions(snapshot: Snapshot, outlooks: Iterable[Outlook], now: datetime) -> Iterable[Action]:
    for outlook in outlooks:
        if outlook.opened is not None:
            yield OpenRecord(
                outlook.lease, ledger.record_name(outlook.opened.contract, outlook.opened.segment), outlook.opened
            )
        if outlook.closed is not None:
            yield outlook.closed
    for record in snapshot.orphans:
        if record.is_open:
            end, seconds = ledger.segment_end(record, now)
            yield CloseRecord(record, "", end, seconds, Reason.DELETED)
    known = (record for lease in snapshot.leases for record in lease.records)
    for record in (*known, *snapshot.orphans):
        if record.deleting and record.finalized and not record.is_open:
            yield ArchiveRecord(record)


def _release(stock: _Stock, snapshot: Snapshot, now: datetime) -> Iterable[Action]:
    """Stop what used devices that are no longer the lease's, once they can no longer be scheduled."""
    lease = stock.lease
    if lease.open_record is not None or stock.keeps:
        yield from _unpreparable(stock)
        return
    if stock.held or not _withdrawn(stock, now):
        return
    gone = not stock.wants
    if gone and lease.claim_template and not lease.namespace_ends:
        yield DeleteClaimTemplate(lease)
    for job in lease.jobs:
        if _unfinished(job):
            yield DeleteJob(lease, job.name, job.uid)
    if lease.jobs:
        return
    why = "its lease is over" if gone else "its lease was placed anew on other devices"
    for claim in lease.claims:
        for pod in claim.users:
            yield DeletePod(lease, pod, f"Stopped pod {pod.name}: {why}.")


def _withdrawn(stock: _Stock, now: datetime) -> bool:
    """No device of the lease can be scheduled any more. An agent that is silent cannot withdraw; kubelet takes its
    devices away soon after it."""
    for node, seen in stock.observed:
        if _unreachable(node, now):
            continue
        if seen.device in node.published or seen.state is SlotState.READY:
            return False
    return True


def _unpreparable(stock: _Stock) -> Iterable[Action]:
    """Pods bound to a device of a former attempt in the moment of its withdrawal: kubelet would retry for ever."""
    lease = stock.lease
    if not stock.held:
        return
    current = {(node.name, slot.device) for node, slot in stock.held}
    for claim in lease.claims:
        if claim.devices and not current.issuperset(claim.devices):
            for pod in claim.users:
                yield DeletePod(
                    lease, pod, f"Stopped pod {pod.name}: its devices were taken away before it could start."
                )


def _objects(outlook: Outlook) -> Iterable[Action]:
    """The claim template and Job of a placed lease, at once: the pods wait in the scheduler's queue."""
    lease = outlook.lease
    if not outlook.nodes or outlook.over or outlook.closed or lease.namespace_ends:
        return
    if not lease.claim_template:
        yield CreateClaimTemplate(lease)
    if lease.template is not None and not any(job.attempt == outlook.attempt for job in lease.jobs):
        yield CreateJob(lease, outlook.attempt, outlook.nodes)


def _pool_outlooks(snapshot: Snapshot, slots: dict[str, tuple[Slot, ...]]) -> tuple[PoolOutlook, ...]:
    assigned: dict[str, int] = defaultdict(int)
    mining: dict[str, int] = defaultdict(int)
    running = {(miner.node, miner.device) for miner in snapshot.miners if miner.running}
    for node, ones in slots.items():
        for slot in ones:
            if slot.holder.kind is HolderKind.MINING_POOL:
                assigned[slot.holder.uid] += 1
                mining[slot.holder.uid] += (node, slot.device) in running
    return tuple(PoolOutlook(pool, assigned[pool.uid], mining[pool.uid]) for pool in snapshot.pools)


def _next_wake(
    snapshot: Snapshot, outlooks: Iterable[Outlook], context: checks.Context, now: datetime
) -> datetime | None:
    """Earliest instant at which the plan or a status changes though nothing happens."""
    instants = [context.pricing.next_change]
    for outlook in outlooks:
        if outlook.expires_at is not None and not outlook.over:
            instants += [outlook.expires_at, outlook.expires_at - parse_duration(outlook.lease.spec.term.notice)]
    instants += [node.agent_until + timedelta(seconds=1) for node in snapshot.nodes if node.agent_until]
    instants += [failure.retry_at for failure in snapshot.failures.values()]
    return min((instant for instant in instants if instant is not None and instant > now), default=None)
