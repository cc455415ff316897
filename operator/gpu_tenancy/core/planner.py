"""plan(snapshot, now) -> Plan: the one decision, for the whole cluster, once per cycle.

Reads top-down: what every lease holds and is owed (`take_stock`), what becomes of those that stay or go (`outlook`),
who is placed where (`_place_queue`), what miners get (`wanted_slots`), and which writes lead there. Pure, total and
deterministic; "no room" is a Refusal, never an exception. Applying a plan and planning again yields no new actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import NamedTuple

from gpu_tenancy.api.base import Holder, HolderKind, parse_duration
from gpu_tenancy.api.lease import QUEUED, Price, Reason
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core import checks, room, topology, writes
from gpu_tenancy.core.actions import Action, Outlook, Plan, Refusal, TenantOutlook, Unbind
from gpu_tenancy.core.bookings import Bookings
from gpu_tenancy.core.checks import Context
from gpu_tenancy.core.commitments import Pledges
from gpu_tenancy.core.conversion import Conversions, Modes
from gpu_tenancy.core.crew import Crew
from gpu_tenancy.core.desirability import span
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.fragments import Survey
from gpu_tenancy.core.mining import Miner, ranked, wanted_slots
from gpu_tenancy.core.ordering import in_turn, rank
from gpu_tenancy.core.outlooks import outlook, refused
from gpu_tenancy.core.placement import Seat, World
from gpu_tenancy.core.pricing import Pricing, pricing
from gpu_tenancy.core.rest import Stocks, remember, sort_out
from gpu_tenancy.core.shares import Shares
from gpu_tenancy.core.snapshot import Failure, LeaseFacts, Snapshot, TenantFacts
from gpu_tenancy.core.spot import Spots
from gpu_tenancy.core.still import hold, still_node
from gpu_tenancy.core.stock import NODE_LOSS, Stock, take_stock, time_left
from gpu_tenancy.core.tenancy import Tenants, title_of

SECOND = timedelta(seconds=1)


def plan(snapshot: Snapshot, now: datetime) -> Plan:
    """Decide everything that should be written now, and when to decide again."""
    miners = ranked(snapshot.pools)
    tenants = Tenants(snapshot.tenants, snapshot.tenant_defaults)
    leases, resting, on_nodes = sort_out(snapshot, now)
    stocks = Stocks(take_stock(snapshot, leases, tenants, now), resting, on_nodes)
    shares, pledges = Shares(tenants, snapshot, stocks, now), Pledges(snapshot.tenants, tenants, now)
    world = _world(snapshot, miners, stocks, now)
    levels, limits = snapshot.topology_levels, snapshot.spot_limits
    context = Context(world, pricing(snapshot.books, now), shares, limits, pledges, now, levels)
    bookings = Bookings(world, stocks, pledges, checks.needs_of, snapshot.spot_limits, now)
    world.settle()
    conversions = Conversions(world, snapshot.conversion_rules, now)
    spots = Spots(world, stocks, snapshot.spot_limits, now)
    outlooks, rested = _outlooks(stocks, Means(context, bookings, conversions, spots, snapshot.failures))
    fits = world.fits()
    conversions.conclude()
    slots = {name: wanted_slots(node, miners, now) for name, node in world.nodes.items()}
    crew = Crew(snapshot, slots)
    changes = (*bookings.changes(), *conversions.changes(), *(rest.wake for rest in resting))
    return Plan(
        actions=tuple(_actions(snapshot, stocks, outlooks, (slots, conversions.wanted()), crew, now)),
        moving=tuple(sorted(outlooks, key=lambda one: one.lease.key)),
        resting=rested,
        pools=crew.pools(),
        next_wake=_next_wake(snapshot, outlooks, context.pricing, bookings, changes, now),
        refusals={one.lease.uid: one.refusal for one in outlooks if one.refusal},
        tenants=tuple(_tenant(one, tenants, shares, bookings) for one in snapshot.tenants),
        fits=fits,
    )


def _world(snapshot: Snapshot, miners: Sequence[Miner], stocks: Stocks, now: datetime) -> World:
    """The working copy, with what leases have: entered node by node where all of them rest."""
    takes = {miner.holder.uid: miner.needs.amount for miner in miners}
    world = World(snapshot.nodes, now, takes, converts=snapshot.conversion_rules.on_demand)
    for stock in stocks.moving:
        if stock.keeps:
            lasts = span(time_left(stock, now))
            for name in {node.name: None for node, _ in stock.held}:
                hold(world.nodes[name], stock, lasts)
    for name, rests in stocks.on_nodes.items():
        node = world.nodes[name]
        if not node.slots and (still := still_node(node.facts, rests)) is not None:
            node.enter(still)
            continue
        for rest in rests:
            hold(node, rest.stock, rest.lasts)
    return world


def _outlooks(stocks: Stocks, means: Means) -> tuple[list[Outlook], tuple[Outlook, ...]]:
    """What becomes of leases: those of which something follows, and those that stay as they are."""
    holding = [_outlook(stock, means.context.now) for stock in stocks.decided if not stock.wants]
    waiting = [stock for stock in stocks.decided if stock.wants]
    resting = [rest.outlook for rest in stocks.resting]
    placed = _place_queue(waiting, [*holding, *resting], means)
    taken = means.spots.told()
    holding = [taken.pop(one.lease.uid, one) for one in holding]
    if taken:  # who rested has been heard of, though what is remembered of its nodes may be an older heartbeat
        resting = [one for one in resting if one.lease.uid not in taken]
        roused = (one._replace(silent="") for one in taken.values())
        holding = sorted((*holding, *roused), key=lambda one: rank(one.lease))
    return [*holding, *placed], tuple(resting)


def _outlook(stock: Stock, now: datetime) -> Outlook:
    """Of a lease that is not to be placed; with what the next plan need not find out again."""
    found = outlook(stock, now)
    remember(stock, found, now)
    return found


def _tenant(facts: TenantFacts, tenants: Tenants, shares: Shares, bookings: Bookings) -> TenantOutlook:
    standing, conflicts = shares.standing(title_of(facts.name)), tenants.conflicts.get(facts.name, ())
    return TenantOutlook(facts, standing.holds, standing.used, conflicts, bookings.commitments(facts.name))


def _actions(
    snapshot: Snapshot,
    stocks: Stocks,
    outlooks: Sequence[Outlook],
    specs: tuple[writes.Slots, Mapping[str, Modes]],
    crew: Crew,
    now: datetime,
) -> Iterator[Action]:
    """In execution order: on record, promised, stopped, started, let go."""
    yield from writes.records(snapshot, stocks.moving, outlooks, now)
    yield from writes.promises(snapshot, *specs, outlooks)
    yield from crew.stops()
    for stock in stocks.decided:
        yield from writes.releases(stock, now)
    for one in outlooks:
        if one.lease.uid not in snapshot.failures:
            yield from writes.objects(one, now)
            yield from writes.warnings(one)
    yield from crew.starts()
    yield from writes.touches(snapshot, now)
    for one in outlooks:
        if one.settled and one.lease.finalized:
            yield Unbind(one.lease)


# --- the queue ----------------------------------------------------------------------------------------------------


class Means(NamedTuple):
    """What leases that wait are placed with."""

    context: Context
    bookings: Bookings
    conversions: Conversions
    spots: Spots
    failures: Mapping[str, Failure]


def _place_queue(stocks: Iterable[Stock], others: Sequence[Outlook], means: Means) -> list[Outlook]:
    """Place what fits, each in its turn; everything else gets a refusal, and a position if it only has to wait. Why
    there is no room is told of the cluster as it is once all are placed. `others`: of leases that hold something."""
    shares, ahead = means.context.shares, means.spots.beneficiaries | means.bookings.due
    turns = in_turn(stocks, lambda stock: stock.lease, shares.tenant, shares.share, ahead)
    placed = [(stock, _place(stock, means)) for stock in turns]
    survey = Survey(means.context.world, [*others, *(one for _, one in placed if one is not None)])
    outlooks, position = [], 0
    for stock, one in placed:
        outlook = _without_promise(one or _waiting(stock, means, survey), means.bookings)
        if (refusal := outlook.refusal) is not None and refusal.reason in QUEUED:
            position += 1
            message = f"Position {position} in the queue: {refusal.message}"
            outlook = outlook._replace(position=position, refusal=Refusal(refusal.reason, message))
        outlooks.append(outlook)
    return outlooks


def _without_promise(outlook: Outlook, bookings: Bookings) -> Outlook:
    """What is not kept for a lease, or not any more once it is refused for good, its status does not say."""
    final = outlook.refusal is not None and outlook.refusal.final
    if outlook.reservation is not None and (final or not bookings.is_promised(outlook.lease)):
        return outlook._replace(reservation=None)
    return outlook


def _place(stock: Stock, means: Means) -> Outlook | None:
    """None: it may be placed, but there is no room, and nobody can be made to go for it."""
    lease, context, bookings = stock.lease, means.context, means.bookings
    if failure := means.failures.get(lease.uid):
        return _refused(stock, Refusal(Reason(failure.reason), failure.message))
    later = bookings.begins_later(lease)
    if not (later and bookings.is_promised(lease)) and (refusal := checks.refusal(lease, context)):
        return _refused(stock, refusal)
    if later:
        return _promised(stock, means)
    commitment = context.pledges.named(lease)
    placed = bookings.place(stock, context.wants(lease))
    if placed is None:
        return _awaiting(stock, means)
    context.shares.take(lease)
    want = placed.want
    price = context.pricing.price(want.model, want.profile, lease.spec.tier)
    return _placed(stock, placed.seats, price, commitment, context.now)


def _promised(stock: Stock, means: Means) -> Outlook:
    """A lease that begins later: its devices are promised, at the price locked first, or it is said why not."""
    lease, status, context = stock.lease, stock.lease.status, means.context
    wants = context.wants(lease)
    want, reservation = means.bookings.reserve(lease, wants)
    if reservation is None:
        refusal = Refusal(Reason.NOT_RESERVABLE, means.bookings.no_promise(lease, wants))
        return _refused(stock, refusal)._replace(reservation=None)
    first = want is not None and status.admitted_at is None
    price = context.pricing.price(want.model, want.profile, lease.spec.tier) if want and first else status.price
    base = _refused(stock, Refusal(Reason.RESERVED, means.bookings.promise_of(reservation)))
    commitment = context.pledges.named(lease)
    return base._replace(reservation=reservation, price=price, admitted_now=first, commitment=commitment)


def _awaiting(stock: Stock, means: Means) -> Outlook | None:
    """A lease for which GPUs are converted, or spot leases go. None: neither; the first in the queue of its tier keeps
    its place."""
    lease, wants = stock.lease, means.context.wants(stock.lease)
    if lease.uid not in means.spots.beneficiaries and (change := means.conversions.make_room(wants)) is not None:
        means.context.shares.expect(lease)
        return _refused(stock, change.refusal)._replace(expected_start=change.until)
    with means.bookings.for_lease(lease):
        wait = means.spots.make_room(lease, wants)
    if wait is None:
        means.bookings.guard(lease, wants)
        return None
    means.context.shares.expect(lease)
    return _refused(stock, wait.refusal)._replace(expected_start=wait.until)


def _waiting(stock: Stock, means: Means, survey: Survey) -> Outlook:
    """A lease that finds no room: why, and for the first of its tier what it waits for."""
    guard = means.bookings.guards.get(stock.lease.spec.tier)
    if guard is None or guard.uid != stock.lease.uid:
        return _refused(stock, _no_room(stock.lease, means.context, survey))
    with means.bookings.as_without(guard):
        refusal = _no_room(stock.lease, replace(means.context, full={}), survey)
    if refusal.reason is Reason.QUEUED:
        refusal = Refusal(Reason.QUEUED, f"{refusal.message} {guard.sentence()}")
    return _refused(stock, refusal)._replace(expected_start=guard.expected)


def _no_room(lease: LeaseFacts, context: Context, survey: Survey) -> Refusal:
    wants = context.anywhere(lease)
    if not wants:
        return Refusal(Reason.QUEUED, "")
    if lease.spec.topology is not None and (level := lease.spec.topology.required) is not None:
        return Refusal(Reason.QUEUED, topology.no_room(wants, context.world, level))
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


def _placed(stock: Stock, seats: Sequence[Seat], price: Price | None, commitment: str | None, now: datetime) -> Outlook:
    """Take the seats: slots under the next attempt, at the price locked first."""
    lease, attempt = stock.lease, _attempt(stock)
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace=lease.key.namespace, name=lease.key.name, uid=lease.uid)
    for seat in seats:
        seat.node.slots.extend(_seat_slots(lease, seat, holder, attempt, now))
    return Outlook(
        lease,
        stock.term.duration,
        extension_refusal=stock.term.refusal,
        renewals=stock.term.renewals,
        commitment=commitment,
        reservation=None if lease.records else lease.status.reservation,
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


def _next_wake(
    snapshot: Snapshot,
    outlooks: Iterable[Outlook],
    prices: Pricing,
    bookings: Bookings,
    others: Iterable[datetime],
    now: datetime,
) -> datetime | None:
    """Earliest instant at which the plan or a status changes though nothing happens. `others`: some such instants."""
    instants = [prices.next_change, *others]
    for one in outlooks:
        if one.expires_at is not None:
            instants += [one.expires_at, one.expires_at - parse_duration(one.lease.spec.term.notice)]
        if (start := one.lease.spec.term.start) is not None and not one.lease.records:
            instants += [start, bookings.due_at(one.lease)]
        if one.preemption is not None:
            instants.append(one.preemption.at)
    for node in snapshot.nodes:
        if node.agent_until:
            instants += [node.agent_until + SECOND, node.agent_until + NODE_LOSS]
    instants += [failure.retry_at for failure in snapshot.failures.values()]
    instants += [writes.touch_at(claim) for claim in snapshot.left_claims]
    instants += [writes.start_at(pod) for pod in snapshot.starting]
    return min((instant for instant in instants if instant is not None and instant > now), default=None)
