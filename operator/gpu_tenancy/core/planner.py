"""plan(snapshot, now) -> Plan: the one decision, for the whole cluster, once per cycle.

Reads top-down: what every lease holds and is owed (`take_stock`), what becomes of those that stay or go (`outlook`),
who is placed where (`_place_queue`), what miners get (`wanted_slots`), and which writes lead there. Pure, total and
deterministic; "no room" is a Refusal, never an exception. Applying a plan and planning again yields no new actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta

from gpu_tenancy.api.base import Holder, HolderKind, parse_duration
from gpu_tenancy.api.lease import QUEUED, Price, Reason
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core import checks, room, writes
from gpu_tenancy.core.actions import Action, Outlook, Plan, Refusal, TenantOutlook, Unbind
from gpu_tenancy.core.amounts import NOTHING
from gpu_tenancy.core.checks import Context
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.fragments import Survey
from gpu_tenancy.core.mining import ranked, wanted_slots
from gpu_tenancy.core.ordering import in_turn
from gpu_tenancy.core.outlooks import outlook, refused
from gpu_tenancy.core.placement import Seat, World
from gpu_tenancy.core.pricing import Pricing, pricing
from gpu_tenancy.core.shares import Shares
from gpu_tenancy.core.snapshot import LeaseFacts, Snapshot, TenantFacts
from gpu_tenancy.core.stock import NODE_LOSS, Stock, take_stock
from gpu_tenancy.core.tenancy import Tenants, title_of

SECOND = timedelta(seconds=1)


def plan(snapshot: Snapshot, now: datetime) -> Plan:
    """Decide everything that should be written now, and when to decide again."""
    miners = ranked(snapshot.pools)
    takes = {miner.holder.uid: miner.needs.amount for miner in miners}
    tenants = Tenants(snapshot.tenants, snapshot.tenant_defaults)
    stocks = take_stock(snapshot, tenants, now)
    shares = Shares(tenants, snapshot, stocks, now)
    context = Context(World(snapshot.nodes, now, takes), pricing(snapshot.books, now), shares)
    for stock in stocks:
        if stock.keeps:
            _hold(context.world, stock)
    context.world.settle()
    # Of a lease whose status cannot be read nothing is decided: its devices stay, and it has no outlook.
    stocks = [stock for stock in stocks if not stock.lease.unreadable]
    outlooks = [outlook(stock, now) for stock in stocks if not stock.wants]
    outlooks += _place_queue([stock for stock in stocks if stock.wants], outlooks, context, snapshot, now)
    slots = {name: wanted_slots(node, miners, now) for name, node in context.world.nodes.items()}
    mining = writes.mining(snapshot, slots)
    return Plan(
        actions=tuple(_actions(snapshot, stocks, outlooks, slots, mining, now)),
        leases=tuple(sorted(outlooks, key=lambda one: one.lease.key)),
        pools=writes.pool_outlooks(snapshot, mining),
        next_wake=_next_wake(snapshot, outlooks, context.pricing, now),
        refusals={one.lease.uid: one.refusal for one in outlooks if one.refusal},
        tenants=tuple(_tenant(one, tenants, shares) for one in snapshot.tenants),
    )


def _tenant(facts: TenantFacts, tenants: Tenants, shares: Shares) -> TenantOutlook:
    standing = shares.standing(title_of(facts.name))
    return TenantOutlook(facts, standing.holds, standing.used, tenants.conflicts.get(facts.name, ()))


def _actions(
    snapshot: Snapshot,
    stocks: Sequence[Stock],
    outlooks: Sequence[Outlook],
    slots: writes.Slots,
    mining: writes.Mining,
    now: datetime,
) -> Iterator[Action]:
    """In execution order: on record, promised, stopped, started, let go."""
    yield from writes.records(snapshot, outlooks, now)
    yield from writes.promises(snapshot, slots, outlooks)
    yield from writes.miner_stops(snapshot, mining)
    for stock in stocks:
        yield from writes.releases(stock, now)
    for one in outlooks:
        if one.lease.uid not in snapshot.failures:
            yield from writes.objects(one)
    yield from writes.miner_starts(snapshot, mining)
    yield from writes.touches(snapshot, now)
    for one in outlooks:
        if one.settled and one.lease.finalized:
            yield Unbind(one.lease)


def _hold(world: World, stock: Stock) -> None:
    """Enter a lease's devices into the working copy; each pod's CPU and memory count once on its node."""
    per_pod, per_node = checks.needs_of(stock.lease).amount, dict.fromkeys((node.name for node, _ in stock.held), 0)
    for node, slot in stock.held:
        first_of_pod = per_node[node.name] % stock.lease.spec.gpus.count == 0
        per_node[node.name] += 1
        world.hold(world.nodes[node.name], slot, per_pod if first_of_pod else NOTHING)


# --- the queue ----------------------------------------------------------------------------------------------------


def _place_queue(
    stocks: Iterable[Stock], others: Sequence[Outlook], context: Context, snapshot: Snapshot, now: datetime
) -> list[Outlook]:
    """Place what fits, each in its turn; everything else gets a refusal, and a position if it only has to wait. Why
    there is no room is told of the cluster as it is once all are placed. `others`: of leases that hold something."""
    shares = context.shares
    turns = in_turn(stocks, lambda stock: stock.lease, shares.tenant, shares.share)
    placed = [(stock, _place(stock, context, snapshot, now)) for stock in turns]
    survey = Survey(context.world, [*others, *(one for _, one in placed if one is not None)])
    outlooks, position = [], 0
    for stock, one in placed:
        outlook = one or _refused(stock, _no_room(stock.lease, context, survey))
        if (refusal := outlook.refusal) is not None and refusal.reason in QUEUED:
            position += 1
            message = f"Position {position} in the queue: {refusal.message}"
            outlook = outlook._replace(position=position, refusal=Refusal(refusal.reason, message))
        outlooks.append(outlook)
    return outlooks


def _place(stock: Stock, context: Context, snapshot: Snapshot, now: datetime) -> Outlook | None:
    """None: it may be placed, but there is no room."""
    lease = stock.lease
    if failure := snapshot.failures.get(lease.uid):
        return _refused(stock, Refusal(Reason(failure.reason), failure.message))
    if refusal := checks.refusal(lease, context):
        return _refused(stock, refusal)
    placed = context.world.place(context.wants(lease))
    if placed is None:
        return None
    context.shares.take(lease)
    want = placed.want
    return _placed(stock, placed.seats, context.pricing.price(want.model, want.profile), now)


def _no_room(lease: LeaseFacts, context: Context, survey: Survey) -> Refusal:
    wants = context.wants(lease)
    if not wants:
        return Refusal(Reason.QUEUED, "")
    found = survey.nearest(wants)
    want = found.want if found else wants[0]
    if want not in context.full:
        context.full[want] = f"{room.no_room(want, context.world)}."
    if found is None:
        return Refusal(Reason.QUEUED, context.full[want])
    return Refusal(Reason.FRAGMENTED, f"{context.full[want]} {survey.sentence(found, lease.key.namespace)}")


def _refused(stock: Stock, refusal: Refusal) -> Outlook:
    return refused(stock, refusal)._replace(lost=_last_loss(stock.lease))


def _last_loss(lease: LeaseFacts) -> str:
    lost = bool(lease.records) and lease.records[-1].spec.reason is Reason.NODE_LOST
    return "Its former devices were lost; it is placed anew." if lost else ""


def _placed(stock: Stock, seats: Sequence[Seat], price: Price | None, now: datetime) -> Outlook:
    """Take the seats: slots under the next attempt, at the price locked first."""
    lease, attempt = stock.lease, _attempt(stock)
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace=lease.key.namespace, name=lease.key.name, uid=lease.uid)
    for seat in seats:
        seat.node.slots.extend(_seat_slots(lease, seat, holder, attempt, now))
    return Outlook(
        lease,
        stock.term.duration,
        extension_refusal=stock.term.refusal,
        attempt=attempt,
        price=price if lease.status.admitted_at is None else lease.status.price,
        admitted_now=True,
        nodes=tuple(sorted({seat.node.facts.name for seat in seats})),
        waiting=f"0 of {lease.devices} devices are ready; the nodes are being prepared.",
        lost=_last_loss(lease),
    )


def _seat_slots(lease: LeaseFacts, seat: Seat, holder: Holder, attempt: int, now: datetime) -> Iterator[Slot]:
    profile = lease.spec.gpus.profile
    for book in seat.gpus:
        yield Slot(
            device=device_name(book.gpu.index, profile, seat.start, lease.uid, attempt),
            gpu=book.gpu.uuid,
            profile=profile,
            start=seat.start,
            holder=holder,
            attempt=attempt,
            since=now,
        )


def _attempt(stock: Stock) -> int:
    """The attempt of a new placement: the same number again only if nothing can know of the last one."""
    lease, last = stock.lease, stock.lease.status.attempt
    known = lease.jobs or lease.records or lease.claim_template or stock.held or stock.seen
    return last if last > 0 and not known else last + 1


def _next_wake(snapshot: Snapshot, outlooks: Iterable[Outlook], prices: Pricing, now: datetime) -> datetime | None:
    """Earliest instant at which the plan or a status changes though nothing happens."""
    instants = [prices.next_change]
    for one in outlooks:
        if one.expires_at is not None:
            instants += [one.expires_at, one.expires_at - parse_duration(one.lease.spec.term.notice)]
    for node in snapshot.nodes:
        if node.agent_until:
            instants += [node.agent_until + SECOND, node.agent_until + NODE_LOSS]
    instants += [failure.retry_at for failure in snapshot.failures.values()]
    instants += [writes.touch_at(claim) for claim in snapshot.left_claims]
    instants += [writes.start_at(pod) for pod in snapshot.starting]
    return min((instant for instant in instants if instant is not None and instant > now), default=None)
