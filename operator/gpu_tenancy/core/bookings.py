"""What is kept for later, and for whom: reservations, commitments, and the place of the first in the queue. Pure.

Promises are facts. Where a reservation's devices are stands in its lease's status, and what is kept for a commitment in
its tenant's; nothing is promised twice, and what is promised is not given to a lease that lasts until then. Miners and
spot leases use it all the same, because they yield. The place of the first in the queue is found anew in each plan:
nobody who would delay it gets what becomes free there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final, NamedTuple

from gpu_tenancy.api.base import format_time, parse_duration
from gpu_tenancy.api.lease import Place, Reservation, Tier
from gpu_tenancy.api.tenant import CommitmentStatus, KeptPlace
from gpu_tenancy.core.amounts import NOTHING, Amount, counted
from gpu_tenancy.core.books import GpuBook, NodeBook, Promise
from gpu_tenancy.core.commitments import Committed, Pledges
from gpu_tenancy.core.placement import Placed, Seat, Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.promises import LEAD, commitment_key, lease_key
from gpu_tenancy.core.rest import Stocks
from gpu_tenancy.core.snapshot import LeaseFacts, SpotLimits
from gpu_tenancy.core.spot import cause_of, notice_of
from gpu_tenancy.core.stock import Stock, died_at, time_left
from gpu_tenancy.core.terms import billed_seconds, expiry
from gpu_tenancy.core.timetable import NEVER, Opening, Span, Timetable
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask
from gpu_tenancy.mig.profiles import FULL, of_model

HAND_OVER: Final = timedelta(minutes=1)
"""A lease that is placed now begins within so long, and ends by so much later."""

_LEASES: Final = lease_key("")
QUEUE: Final = "queue:"
"""How keys of places begin that the first in a queue waits for."""

Needs = Callable[[LeaseFacts], PodNeeds]
Notices = Mapping[str, timedelta]
"""Spot leases by UID, with how long before they go they are told."""


class Guard(NamedTuple):
    """The place that the first in the queue of a tier waits for."""

    uid: str
    opening: Opening

    @property
    def expected(self) -> datetime | None:
        """When it is free; None: nobody knows."""
        return self.opening.at if self.opening.at < NEVER else None

    def sentence(self) -> str:
        """What it waits for."""
        first, *others = sorted({seat.node.facts.name for seat in self.opening.seats})
        where = f"{first} and {counted(len(others), 'more node')}" if others else first
        count = len(self.opening.waits_for)
        leases = f"{counted(count, 'lease')} on {where}"
        if not count:
            return f"There will be as soon as {where} {'are' if others else 'is'} handed over."
        if self.expected is None:
            return f"It is not known when there will be: {leases} {'has' if count == 1 else 'have'} no end."
        return f"There will be by {format_time(self.expected)}, when {leases} must have ended."


class Bookings:
    """What is kept in one plan."""

    def __init__(
        self,
        world: World,
        stocks: Stocks,
        pledges: Pledges,
        needs: Needs,
        limits: SpotLimits,
        now: datetime,
    ) -> None:
        """To be made once everything that is held is in the world, and before it is settled."""
        self._world, self._stocks, self._needs, self._limits, self._now = world, stocks, needs, limits, now
        self._begins: dict[str, datetime] = {}
        """From when on each promise is kept, by its key."""
        self._later: list[tuple[str, Span]] = []
        """What was promised, by UUID of the GPU."""
        self._placed: list[tuple[Stock, Placed]] = []
        """What this plan gives to whom."""
        self._reserved: dict[str, Reservation] = {}
        """Reservations that hold good, by UID of their lease."""
        self._too_few: dict[tuple[Want, datetime, datetime, str], Sequence[Seat]] = {}
        """Where not all pods of a want find a seat from one instant to another."""
        self._draw_on: dict[str, str] = {}
        """How the keys of the commitments begin that promised leases will draw on, by the keys of those leases."""
        self._short: dict[Committed, int] = {}
        self._kept: dict[Committed, list[KeptPlace]] = {}
        self.guards: dict[Tier, Guard] = {}
        self.pledges = pledges
        pledges.take_stock(stocks)
        for stock in stocks.moving:
            found = stock.lease.status.reservation
            if stock.wants and found is not None and not stock.lease.records and not _is_over(found, now):
                self._keep_reservation(stock.lease, found)
        for committed in pledges:
            self._keep_commitment(committed)

    # --- reservations -------------------------------------------------------------------------------------------------

    @cached_property
    def due(self) -> frozenset[str]:
        """UIDs of leases whose promised devices are to be prepared: they are ahead of all others of their tier."""
        wanting = (stock.lease for stock in self._stocks.moving if stock.lease.uid in self._reserved)
        return frozenset(lease.uid for lease in wanting if not self.begins_later(lease))

    def begins_later(self, lease: LeaseFacts) -> bool:
        """It has a start that is not near yet."""
        due = self.due_at(lease)
        return due is not None and self._now < due

    def due_at(self, lease: LeaseFacts) -> datetime | None:
        """When the devices of a lease that has a start are to be prepared: earlier where spot leases have to be told
        first. None for a lease without one, or that has begun."""
        start = lease.spec.term.start
        if start is None or lease.records:
            return None
        found = self._reserved.get(lease.uid)
        places = {(place.node, place.gpu) for place in found.places} if found else ()
        notices = (notice for place in places for notice in self._notices.get(place, ()))
        return start - LEAD - max(notices, default=timedelta(0))

    def is_promised(self, lease: LeaseFacts) -> bool:
        """Devices are kept for it."""
        return lease.uid in self._reserved

    def reserve(self, lease: LeaseFacts, wants: Iterable[Want]) -> tuple[Want | None, Reservation | None]:
        """Promise devices to a lease that begins later, or say again what is promised; None where nothing can be.
        The want is the one that was chosen now."""
        if (found := self._reserved.get(lease.uid)) is not None:
            return None, found
        start = lease.spec.term.start or self._now
        length = lease.spec.term.duration
        until = start + parse_duration(length) if length else NEVER
        for want in wants:
            seats = self._during(lease, want, start, until)
            if len(seats) < want.pods:
                continue
            places = [
                Place(node=seat.node.facts.name, gpu=book.gpu.uuid, start=seat.start) for seat, book in _each(seats)
            ]
            found = Reservation(begins=start, until=until if until < NEVER else None, places=places)
            self._keep_reservation(lease, found)
            return want, found
        return None, None

    def no_promise(self, lease: LeaseFacts, wants: Sequence[Want]) -> str:
        """Why nothing can be promised to a lease that begins later."""
        start, length = lease.spec.term.start or self._now, lease.spec.term.duration
        until = start + parse_duration(length) if length else NEVER
        most = max((len(self._during(lease, want, start, until)) for want in wants), default=0)
        gpus = lease.spec.gpus
        time = f"from {format_time(start)} {f'to {format_time(until)}' if length else 'on'}"
        needs = f"{counted(lease.spec.pods, 'pod')} with {gpus.count} × {gpus.profile} each"
        return (
            f"Needs room for {needs} {time}; as far as is known there will be room for {most}, beside leases that run "
            "until then and what is promised to others. It is tried again whenever something changes."
        )

    def _during(self, lease: LeaseFacts, want: Want, start: datetime, until: datetime) -> Sequence[Seat]:
        """Seats for pods of a lease that begins later. Where there are too few, it stays so within a plan: others that
        want the same need not be looked for again."""
        key = want, start, until, self._own_commitment(lease)
        if key not in self._too_few:
            seats = self.timetable.during(want, start - LEAD, until, key[-1])
            if len(seats) >= want.pods:
                return seats
            self._too_few[key] = seats
        return self._too_few[key]

    def _own_commitment(self, lease: LeaseFacts) -> str:
        """How the keys begin of what is kept for what a Reserved lease draws on; empty for all others."""
        committed = self.pledges.of(lease)
        return _commitment(committed) if committed else ""

    def promise_of(self, reservation: Reservation) -> str:
        """What was promised, for people."""
        nodes = ", ".join(sorted({place.node for place in reservation.places}))
        until = f" to {format_time(reservation.until)}" if reservation.until else ""
        devices = counted(len(reservation.places), "device")
        return f"{devices} on {nodes} reserved from {format_time(reservation.begins)}{until}."

    def _keep_reservation(self, lease: LeaseFacts, reservation: Reservation) -> None:
        """Keep its places; where one of them has broken, nothing is kept, and others are looked for."""
        gpus = lease.spec.gpus
        books = [self._book(place, gpus.profile) for place in reservation.places]
        if len(books) != lease.devices or None in books:
            return
        self._reserved[lease.uid] = reservation
        each = self._needs(lease).amount
        if own := self._own_commitment(lease):  # which keeps CPU and memory with its devices
            self._draw_on[lease_key(lease.uid)] = own
            each = NOTHING
        for number, (found, place) in enumerate(zip(books, reservation.places, strict=True)):
            if found is not None:
                mask = device_mask(found[1].gpu.model, gpus.profile, place.start)
                span = Span(lease_key(lease.uid), mask, NOTHING if number % gpus.count else each, reservation.begins)
                self._keep(*found, span._replace(until=reservation.until or NEVER))

    # --- commitments --------------------------------------------------------------------------------------------------

    def commitments(self, tenant: str) -> tuple[CommitmentStatus, ...]:
        """What is kept for the commitments of a GpuTenant."""
        return tuple(self._commitment_status(committed) for committed in self.pledges.of_tenant(tenant))

    def changes(self) -> Iterator[datetime]:
        """When something begins or ends to be owed, or is prepared for."""
        for committed in self.pledges:
            for at in committed.changes():
                yield from (at - LEAD, at)

    def _commitment_status(self, committed: Committed) -> CommitmentStatus:
        """What is kept for it."""
        kept = self._kept[committed]
        return CommitmentStatus(
            name=committed.spec.name,
            count=committed.count,
            drawn=committed.drawn,
            kept=sum(1 for place in kept if place.begins <= self._now),
            short=self._short[committed],
            places=kept,
        )

    def _keep_commitment(self, committed: Committed) -> None:
        """Keep what is owed and not drawn, now and at each later step: what was kept before, and more where that is
        too little."""
        changes = committed.changes()
        most = max(0, *(committed.size(at) - committed.drawn for at in changes))
        free = [place for place in committed.places if self._is_free(place, committed)]
        kept = self._kept[committed] = []
        self._short[committed] = 0
        for place in free[:most]:
            self._keep_place(committed, place)
        for at in changes:
            owed = committed.size(at) - committed.drawn
            lacking = owed - sum(1 for place in kept if place.begins <= at)
            found = self._look_for(committed, lacking, at) if lacking > 0 else []
            for place in found:
                self._keep_place(committed, place)
            self._short[committed] = max(self._short[committed], lacking - len(found))

    def _look_for(self, committed: Committed, count: int, at: datetime) -> list[KeptPlace]:
        """So many devices that nobody has from then on, or as many as there are."""
        spec = committed.spec
        want = Want(spec.profile, 1, count, spec.model, PodNeeds(Amount(pods=1)))
        seats = self.timetable.during(want, max(self._now, at - LEAD), spec.until or NEVER)
        return [
            KeptPlace(node=seat.node.facts.name, gpu=book.gpu.uuid, start=seat.start, begins=at)
            for seat, book in _each(seats)
        ]

    def _keep_place(self, committed: Committed, place: KeptPlace) -> None:
        """A committed device comes with its part of the node's CPU, memory and pod slots."""
        profile = committed.spec.profile
        if (found := self._book(place, profile)) is not None:
            node, book = found
            mask = device_mask(book.gpu.model, profile, place.start)
            key = f"{commitment_key(committed.tenant, committed.spec.name)}{format_time(place.begins)}"
            amount = _share(node, mask)
            self._keep(node, book, Span(key, mask, amount, place.begins, committed.spec.until or NEVER))
            self._kept[committed].append(place)

    def _is_free(self, place: KeptPlace, committed: Committed) -> bool:
        """Nobody has it whom it was not kept free of."""
        profile, own = committed.spec.profile, _commitment(committed)
        found = self._book(place, profile)
        if found is None:
            return False
        _, book = found
        mask = device_mask(book.gpu.model, profile, place.start)
        begins = max(place.begins - LEAD, self._now)
        held = self.timetable.overlapping(book.gpu.uuid, mask, begins, NEVER)
        return all(span.who in self._spot or self._draw_on.get(span.who) == own for span in held)

    # --- the queue ----------------------------------------------------------------------------------------------------

    def place(self, stock: Stock, wants: Sequence[Want]) -> Placed | None:
        """Seats for all pods: where they were promised, else among what is free, else among what is kept for others
        until after the lease has ended."""
        left = time_left(stock, self._now)
        placed = self._place(stock, wants, left) if self._begins else self._world.place(wants, left)
        if placed is not None:
            self._note_placed(stock, placed)
        return placed

    def _place(self, stock: Stock, wants: Sequence[Want], left: timedelta | None) -> Placed | None:
        lease = stock.lease
        own = {key for key in self._begins if self._is_for(key, lease)}
        if lease.uid in self._reserved:
            # Its place was promised before anybody began to wait for it, of whatever tier.
            with self._world.without(own.union(map(_guard_key, self.guards.values()))):
                if (placed := self._where_promised(lease, wants, left)) is not None:
                    return placed
        with self._world.without(own):
            placed = self._world.place(wants, left)
        if placed is not None or len(open_to := own | self._open_to(lease, self._end_of(stock))) == len(own):
            return placed
        if self._world.is_full_without(open_to, wants):
            return None
        with self._world.without(open_to):
            return self._world.place(wants, left)

    def for_lease(self, lease: LeaseFacts) -> AbstractContextManager[None]:
        """Within it, what is kept for a lease is free to be taken."""
        if lease.spec.tier is Tier.SPOT:
            return self._world.without(self._open_to(lease, NEVER))
        return self._world.without({key for key in self._begins if self._is_for(key, lease)})

    def as_without(self, guard: Guard) -> AbstractContextManager[None]:
        """Within it, the place that somebody waits for is free to be taken."""
        return self._world.without({_guard_key(guard)})

    def _is_for(self, key: str, lease: LeaseFacts) -> bool:
        committed = self.pledges.of(lease)
        drawn = committed is not None and key.startswith(commitment_key(committed.tenant, committed.spec.name))
        return key == lease_key(lease.uid) or (drawn and self._begins[key] <= self._now)

    def _open_to(self, lease: LeaseFacts, end: datetime) -> set[str]:
        """Keys of promises that a lease does not get in the way of: those that begin after its end, and for one that
        gives way all of a firmer tier's, but those of leases that begin before it could be told and gone."""
        if lease.spec.tier is Tier.SPOT:
            first = self.guards.get(Tier.SPOT)
            lasts = self._now + LEAD + notice_of(lease, self._limits)
            others = (key for key, begins in self._begins.items() if begins > lasts or not key.startswith(_LEASES))
            return {key for key in others if first is None or key != _guard_key(first)}
        return {key for key, begins in self._begins.items() if end <= begins - LEAD}

    def _end_of(self, stock: Stock) -> datetime:
        """When a lease that is placed now will have ended, by the duration in force. One that renews itself does not
        count as longer: a renewal into what is promised is refused."""
        if stock.term.length is None:
            return NEVER
        return self._now + HAND_OVER + stock.term.length - timedelta(seconds=billed_seconds(stock.lease.records))

    def _where_promised(self, lease: LeaseFacts, wants: Sequence[Want], left: timedelta | None) -> Placed | None:
        """The seats that were promised, if they are free now."""
        if (reservation := self._reserved.get(lease.uid)) is None:
            return None
        gpus, books = lease.spec.gpus, [self._book(place, lease.spec.gpus.profile) for place in reservation.places]
        found = [one for one in books if one is not None]
        here = (one for one in wants if found and one.model == found[0][1].gpu.model)
        want = next((one for one in here if all(one.allowed_on(node.facts) for node, _ in found)), None)
        if want is None:
            return None
        starts = [place.start for place in reservation.places]
        seats = [
            Seat(found[first][0], tuple(book for _, book in found[first : first + gpus.count]), starts[first])
            for first in range(0, len(found), gpus.count)
        ]
        return self._world.place_at(want, seats, left)

    def _note_placed(self, stock: Stock, placed: Placed) -> None:
        lease = stock.lease
        self._drop(lease_key(lease.uid))
        self._placed.append((stock, placed))
        if "timetable" in self.__dict__:
            self._enter(self.timetable, stock, placed)
        if (committed := self.pledges.of(lease)) is not None:
            self._draw(committed, lease)

    def _enter(self, timetable: Timetable, stock: Stock, placed: Placed) -> None:
        """Note in the timetable what a lease has been given."""
        until, spans = self._end_of(stock), []
        for seat in placed.seats:
            for number, book in enumerate(seat.gpus):
                mask = device_mask(book.gpu.model, placed.want.profile, seat.start)
                amount = NOTHING if number else placed.want.needs.amount
                spans.append((book.gpu.uuid, Span(stock.lease.uid, mask, amount, self._now, until)))
        for gpu, span in (*spans, *self._afterwards(stock.lease, spans)):
            timetable.note(gpu, span)

    def _afterwards(self, lease: LeaseFacts, spans: Iterable[tuple[str, Span]]) -> Iterator[tuple[str, Span]]:
        """What a lease draws on a commitment goes back to that once it ends: to nobody else."""
        committed = self.pledges.of(lease)
        if committed is None:
            return
        key, until = _commitment(committed), committed.spec.until or NEVER
        for gpu, span in spans:
            if span.until < until:
                yield gpu, span._replace(who=key, begins=span.until, until=until)

    def _draw(self, committed: Committed, lease: LeaseFacts) -> None:
        """Of what is kept for a commitment so much less is owed now."""
        for key in [
            key for key in self._begins if key.startswith(commitment_key(committed.tenant, committed.spec.name))
        ]:
            self._drop(key)
        self.pledges.draw(lease)
        committed.places = self._kept[committed]
        self._keep_commitment(committed)

    def guard(self, lease: LeaseFacts, wants: Iterable[Want]) -> None:
        """Keep the place where the first in the queue of its tier will find room, so that those behind it use it only
        as long as they do not delay it."""
        tier = lease.spec.tier
        if tier in self.guards:
            return
        ignored = frozenset() if tier is Tier.SPOT else self._yielding(lease)
        found = [(opening, want) for want in wants if (opening := self.timetable.earliest(want, self._now, ignored))]
        if not found:
            return
        opening, want = min(found, key=lambda one: (one[0].at, len(one[0].waits_for), one[1].model))
        if not self._spot.keys().isdisjoint(opening.waits_for):
            return  # it has had the place of that spot lease before: whoever has not may make it go
        guard = self.guards[tier] = Guard(lease.uid, opening)
        begins = opening.at if opening.at < NEVER else self._now
        for seat in opening.seats:
            for number, book in enumerate(seat.gpus):
                mask = device_mask(book.gpu.model, want.profile, seat.start)
                amount = NOTHING if number else want.needs.amount
                self._keep(seat.node, book, Span(_guard_key(guard), mask, amount, begins))

    def _yielding(self, lease: LeaseFacts) -> frozenset[str]:
        """UIDs of the spot leases that can be made to go for a lease."""
        spot = (stock.lease for stock in self._stocks.of_tier(Tier.SPOT) if stock.lease.uid in self._spot)
        return frozenset(one.uid for one in spot if cause_of(lease) not in one.status.preempted_for)

    # --- what is kept -------------------------------------------------------------------------------------------------

    @cached_property
    def timetable(self) -> Timetable:
        """Who has what, and until when."""
        timetable = Timetable(self._world)
        for gpu, span in (*self._all_held(), *self._later):
            timetable.note(gpu, span)
        for stock, placed in self._placed:
            self._enter(timetable, stock, placed)
        return timetable

    def _all_held(self) -> Iterator[tuple[str, Span]]:
        """What leases have that keep their devices, and what goes back to commitments after that."""
        for stock in self._stocks.moving:
            if stock.keeps:
                yield from self._held(stock)
        for rest in self._stocks.resting:
            if not rest.spans:
                rest.spans.extend(self._held(rest.stock))
            yield from rest.spans
        for stock in self._stocks.of_tier(Tier.RESERVED):
            if stock.keeps:
                yield from self._afterwards(stock.lease, self._held(stock))

    def _held(self, stock: Stock) -> Iterator[tuple[str, Span]]:
        until, each = self._until(stock), self._needs(stock.lease).amount
        seen: dict[str, int] = defaultdict(int)
        for node, slot in stock.held:
            gpu = node.gpu_of.get(slot.gpu)
            mask = device_mask(gpu.model, slot.profile, slot.start) if gpu else ALL_SLICES
            first = seen[node.name] % stock.lease.spec.gpus.count == 0
            seen[node.name] += 1
            yield slot.gpu, Span(stock.lease.uid, mask, each if first else NOTHING, until=until)

    def _until(self, stock: Stock) -> datetime:
        lease = stock.lease
        if stock.ending is not None:
            return self._now
        if stock.term.length is None or lease.unreadable:
            return NEVER
        if (ends := expiry(lease, stock.term)) is not None:
            return max(ends, self._now)
        start = max(self._now, lease.spec.term.start or self._now)
        return start + HAND_OVER + stock.term.length - timedelta(seconds=billed_seconds(lease.records))

    @cached_property
    def _spot(self) -> Notices:
        leases = (stock.lease for stock in self._stocks.of_tier(Tier.SPOT) if stock.keeps)
        return {lease.uid: notice_of(lease, self._limits) for lease in leases}

    @cached_property
    def _notices(self) -> Mapping[tuple[str, str], list[timedelta]]:
        """Notices of the spot leases on each GPU, by names of node and GPU."""
        found: dict[tuple[str, str], list[timedelta]] = defaultdict(list)
        for stock in self._stocks.of_tier(Tier.SPOT):
            if stock.keeps:
                for node, slot in stock.held:
                    found[node.name, slot.gpu].append(self._spot[stock.lease.uid])
        return found

    def _book(self, place: Place, profile: str) -> tuple[NodeBook, GpuBook] | None:
        """The GPU of a place, if it is still there, healthy, and in the mode that the profile needs; on a node that is
        neither dead nor being emptied."""
        node = self._world.nodes.get(place.node)
        book = node.gpus.get(place.gpu) if node else None
        if node is None or book is None or not book.gpu.healthy or book.mig is (profile == FULL):
            return None
        if node.facts.cordoned or died_at(node.facts, self._now):
            return None
        fits = profile == FULL or profile in of_model(book.gpu.model)
        mask = device_mask(book.gpu.model, profile, place.start)
        return (node, book) if fits and not mask & book.closed else None

    def _keep(self, node: NodeBook, book: GpuBook, span: Span) -> None:
        self._begins[span.who] = min(span.begins, self._begins.get(span.who, NEVER))
        self._world.promise(node, book, Promise(span.who, span.mask, span.amount, not span.who.startswith(QUEUE)))
        self._note(book.gpu.uuid, span)

    def _drop(self, key: str) -> None:
        if self._begins.pop(key, None) is not None:
            self._world.release(key)
            self._later = [(gpu, span) for gpu, span in self._later if span.who != key]
            if "timetable" in self.__dict__:
                self.timetable.forget(key)

    def _note(self, gpu: str, span: Span) -> None:
        self._later.append((gpu, span))
        if "timetable" in self.__dict__:
            self.timetable.note(gpu, span)


def _is_over(reservation: Reservation, now: datetime) -> bool:
    """It was for a time that has passed: whoever it was for waits like all others."""
    return reservation.until is not None and reservation.until <= now


def _each(seats: Iterable[Seat]) -> Iterator[tuple[Seat, GpuBook]]:
    return ((seat, book) for seat in seats for book in seat.gpus)


def _commitment(committed: Committed) -> str:
    return commitment_key(committed.tenant, committed.spec.name)


def _guard_key(guard: Guard) -> str:
    return f"{QUEUE}{guard.uid}"


def _share(node: NodeBook, mask: int) -> Amount:
    """The part of a node's CPU, memory and pod slots that goes with some memory slices."""
    slices, there = mask.bit_count(), ALL_SLICES.bit_count() * len(node.gpus)
    has = node.facts.allocatable
    return Amount(has.cpu_milli * slices // there, has.memory * slices // there, has.pods * slices // there)
