"""When which parts of GPUs are free, as far as is known: leases end with their terms, promises begin and end. Pure.

Answers two questions: where are seats for a lease from one instant to another, and when at the earliest will there be
seats for one that waits. What ends without a date never ends here; miners are not in it, because they yield.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from heapq import nsmallest
from itertools import accumulate
from typing import Final, NamedTuple

from gpu_tenancy.core.amounts import Amount, total
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.placement import Seat, Want, World
from gpu_tenancy.core.room import serves
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask, highest_start
from gpu_tenancy.mig.profiles import FULL, of_model

ALWAYS: Final = datetime.min.replace(tzinfo=UTC)
"""Since before anything."""
NEVER: Final = datetime.max.replace(tzinfo=UTC)
"""The end of what has no end."""


class Span(NamedTuple):
    """A part of a GPU that somebody has for some time."""

    who: str
    """UID of a lease, or the key of a promise."""
    mask: int
    """Memory slices as bits."""
    amount: Amount
    """What it takes of the node besides."""
    begins: datetime = ALWAYS
    until: datetime = NEVER


class Opening(NamedTuple):
    """When and where a lease that waits will find room."""

    at: datetime
    """NEVER: nobody knows."""
    seats: list[Seat]
    waits_for: tuple[str, ...]
    """Whose end it needs, by UID or key."""


class _Chance(NamedTuple):
    """A seat on one node or GPU, and when it is free; the smallest is the best."""

    at: datetime
    blockers: int
    """Of a seat that is never free: how many without an end are in its way."""
    node: str
    number: int
    """Its place among the chances of its node."""


class _Time(NamedTuple):
    """From one instant to another."""

    begins: datetime
    until: datetime
    own: str
    """How the keys begin of those who need not be regarded; empty: there are none."""

    def is_own(self, span: Span) -> bool:
        """It is kept for those who ask."""
        return bool(self.own) and span.who.startswith(self.own)


class Timetable:
    """Who has what of which GPU, and when."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._spans: dict[str, list[Span]] = defaultdict(list)
        """By UUID of the GPU."""
        self._where: dict[str, list[str]] = defaultdict(list)
        """UUIDs of the GPUs of which somebody has something."""

    def note(self, gpu: str, span: Span) -> None:
        """Enter somebody's part of a GPU."""
        self._spans[gpu].append(span)
        self._where[span.who].append(gpu)

    def forget(self, who: str) -> None:
        """Strike out everything of somebody."""
        for gpu in set(self._where.pop(who, ())):
            self._spans[gpu] = [span for span in self._spans[gpu] if span.who != who]

    def overlapping(self, gpu: str, mask: int, begins: datetime, until: datetime) -> Iterator[Span]:
        """What others have of a part of a GPU within a time."""
        return (span for span in self._spans[gpu] if span.mask & mask and span.begins < until and begins < span.until)

    # --- from one instant to another ----------------------------------------------------------------------------------

    def during(self, want: Want, begins: datetime, until: datetime, own: str = "") -> list[Seat]:
        """Seats for as many pods as possible that are free from one instant to another, on as few nodes as possible and
        on those that they fill best. `own`: how the keys begin of what is kept for those pods already; they are put
        there first."""
        time = _Time(begins, until, own)
        hosts = list(self._hosts(want))
        if own:
            kept = {node.facts.name: self._seats(node, want, time, only_own=True) for node in hosts}
            if sum(map(len, kept.values())) >= want.pods:
                return _fullest(kept, want.pods)
        return _fullest({node.facts.name: self._seats(node, want, time) for node in hosts}, want.pods)

    def _seats(self, node: NodeBook, want: Want, time: _Time, *, only_own: bool = False) -> list[Seat]:
        """`only_own`: on GPUs of which something is kept for them."""
        spans_of = {
            book: list(self.overlapping(book.gpu.uuid, ALL_SLICES, time.begins, time.until))
            for book in node.gpus.values()
        }
        busy = {
            book: [span for span in spans if not time.is_own(span)]
            for book, spans in spans_of.items()
            if not only_own or any(map(time.is_own, spans))
        }
        taken = total(span.amount for spans in spans_of.values() for span in spans if not time.is_own(span))
        room = node.facts.allocatable - node.facts.foreign - taken
        if want.profile == FULL:
            free = [book for book, spans in busy.items() if _usable(book, want) and not spans]
            free.sort(key=lambda book: -book.gpu.index)
            groups = zip(*[iter(free)] * want.count, strict=False)
            seats = [Seat(node, group, 0) for group in groups]
        else:
            seats = [
                Seat(node, (book,), start)
                for book, spans in busy.items()
                if _usable(book, want)
                for start in _starts(book, want.profile, _union(spans) | book.closed)
            ]
        return seats[: room.times(want.needs.amount)]

    # --- at the earliest ----------------------------------------------------------------------------------------------

    def earliest(self, want: Want, now: datetime, ignored: Collection[str] = frozenset()) -> Opening | None:
        """When at the earliest there are seats for all pods that are free from then on, and which: of several as early
        those that are free last, because others can use the rest until then. None where there never were enough.

        `ignored`: those who would make room if they were asked to.
        """
        found = (chance for node in self._hosts(want) for chance in self._chances(node, want, now, ignored))
        chances = nsmallest(want.pods, found)
        if len(chances) < want.pods:
            return None
        at = chances[-1].at
        seats: list[Seat] = []
        for name, count in sorted(Counter(chance.node for chance in chances).items()):
            seats += _Prospect(self, self._world.nodes[name], want, now, ignored).seats(count, at)
        obstacles = (span for seat in seats for span in self._in_the_way(seat, want, now))
        waits_for = {span.who for span in obstacles if span.who not in ignored}
        return Opening(at, seats, tuple(sorted(waits_for)))

    def _chances(self, node: NodeBook, want: Want, now: datetime, ignored: Collection[str]) -> Iterable[_Chance]:
        """What a node will offer. Where nothing has changed since it was asked last, and nobody is left out, that is
        the same but for what is free already."""
        still = node.undisturbed
        if still is None or not node.facts.holders.isdisjoint(ignored):
            return _Prospect(self, node, want, now, ignored).chances()

        def find() -> list[_Chance]:
            return [
                chance._replace(at=ALWAYS) if chance.at <= now else chance
                for chance in _Prospect(self, node, want, now, ignored).chances()
            ]

        known = still.once(("chances", want.profile, want.count, want.model, want.needs.amount), find)
        return (chance._replace(at=now) if chance.at is ALWAYS else chance for chance in known)

    def _in_the_way(self, seat: Seat, want: Want, now: datetime) -> Iterator[Span]:
        for book in seat.gpus:
            mask = device_mask(book.gpu.model, want.profile, seat.start)
            yield from self.overlapping(book.gpu.uuid, mask, now, NEVER)

    def spans_of(self, gpu: str, ignored: Collection[str]) -> list[Span]:
        """What everybody but some has of a GPU."""
        return [span for span in self._spans[gpu] if span.who not in ignored]

    def _hosts(self, want: Want) -> Iterable[NodeBook]:
        return (node for node in self._world.nodes.values() if not node.objection and want.allowed_on(node.facts))


class _Part(NamedTuple):
    """A part of a GPU that a device fits on, and when it is free."""

    at: datetime
    blockers: int
    book: GpuBook
    start: int


class _Prospect:
    """What a node will offer to a want, as time goes by."""

    def __init__(
        self, timetable: Timetable, node: NodeBook, want: Want, now: datetime, ignored: Collection[str]
    ) -> None:
        self._node, self._want, self._now = node, want, now
        self._spans = {book: timetable.spans_of(book.gpu.uuid, ignored) for book in node.gpus.values()}
        self._whole = want.profile == FULL

    def chances(self) -> Iterator[_Chance]:
        """Each seat that it may ever have, and when."""
        room = self._room()
        for number, (at, blockers) in enumerate(self._wholes() if self._whole else self._slices()):
            if number >= len(room):
                return
            yield _Chance(max(at, room[number]), blockers, self._node.facts.name, number)

    def seats(self, count: int, at: datetime) -> list[Seat]:
        """So many seats that are free at an instant: of those that are in time the last."""
        if self._whole:
            needed = self._in_order()[: count * self._want.count]
            books = self._last_in_time(needed, at)
            return [Seat(self._node, group, 0) for group in zip(*[iter(books)] * self._want.count, strict=True)]
        parts = self._parts()
        if parts[count - 1].at < NEVER and at < NEVER:
            parts = sorted((part for part in parts if part.at <= at), key=lambda part: part.at, reverse=True)
        return [Seat(self._node, (part.book,), part.start) for part in parts[:count]]

    def _last_in_time(self, needed: Sequence[GpuBook], at: datetime) -> list[GpuBook]:
        """As many GPUs as are needed: of those that are free by then, or once those end who are in the way anyway, the
        last."""
        in_the_way = set().union(*(self._endless(book, ALL_SLICES) for book in needed))
        in_time = [
            book
            for book in self._in_order()
            if self._free_at(book, ALL_SLICES) <= at and self._endless(book, ALL_SLICES) <= in_the_way
        ]
        return sorted(in_time, key=lambda book: self._free_at(book, ALL_SLICES), reverse=True)[: len(needed)]

    def _free_at(self, book: GpuBook, mask: int) -> datetime:
        """From when on nobody has a part of a GPU any more."""
        return max((span.until for span in self._spans[book] if span.mask & mask), default=self._now)

    def _endless(self, book: GpuBook, mask: int) -> set[str]:
        return {span.who for span in self._spans[book] if span.mask & mask and span.until == NEVER}

    # whole GPUs

    def _wholes(self) -> Iterator[tuple[datetime, int]]:
        """When its first, second, … seat is free, and how many without an end are in its way."""
        books = self._in_order()
        for last in range(self._want.count, len(books) + 1, self._want.count):
            taken = books[:last]
            endless = set().union(*(self._endless(book, ALL_SLICES) for book in taken))
            yield self._free_at(taken[-1], ALL_SLICES), len(endless)

    def _in_order(self) -> list[GpuBook]:
        """Its GPUs by when they are free; of those that never are, the ones of whoever has most first."""
        usable = [book for book in self._spans if _usable(book, self._want)]
        sizes = Counter(who for book in usable for who in self._endless(book, ALL_SLICES))
        return sorted(
            usable,
            key=lambda book: (
                self._free_at(book, ALL_SLICES),
                sorted((-sizes[who], who) for who in self._endless(book, ALL_SLICES)),
                -book.gpu.index,
            ),
        )

    # slices

    def _slices(self) -> Iterator[tuple[datetime, int]]:
        return ((part.at, part.blockers) for part in self._parts())

    def _parts(self) -> list[_Part]:
        """Parts of its GPUs that do not overlap, by when they are free, those with fewest endless in the way first; of
        several as good the one that `fragments` names to whoever waits, the lowest."""
        found = [part for book in self._spans if _usable(book, self._want) for part in self._parts_of(book)]
        return sorted(found, key=lambda part: (part.at, part.blockers, part.book.gpu.index, part.start))

    def _parts_of(self, book: GpuBook) -> Iterator[_Part]:
        shape, taken = of_model(book.gpu.model)[self._want.profile], book.closed
        masks = {start: shape.mask(start) for start in shape.starts}
        parts = [(self._free_at(book, mask), len(self._endless(book, mask)), start) for start, mask in masks.items()]
        for at, blockers, start in sorted(parts):
            if not taken & masks[start]:
                taken |= masks[start]
                yield _Part(at, blockers, book, start)

    # CPU and memory

    def _room(self) -> list[datetime]:
        """From when on there is room for a first, a second, … pod besides its GPUs."""
        need = self._want.needs.amount
        spans = sorted((span for spans in self._spans.values() for span in spans), key=lambda span: span.until)
        most = self._node.facts.allocatable - self._node.facts.foreign
        freed = accumulate((span.amount for span in spans), initial=most - total(span.amount for span in spans))
        times: list[datetime] = []
        for at, room in zip((self._now, *(span.until for span in spans)), freed, strict=True):
            times += [at] * (room.times(need) - len(times))
        return times


def _fullest(found: dict[str, list[Seat]], pods: int) -> list[Seat]:
    """So many seats, or as many as there are, of those of each node."""
    seats: list[Seat] = []
    while found and (lacking := pods - len(seats)) > 0:
        name = min(found, key=lambda name: (_ill_fit(len(found[name]), lacking), name))
        seats += found.pop(name)[:lacking]
    return seats


def _usable(book: GpuBook, want: Want) -> bool:
    return serves(book, want) and book.gpu.healthy and not (want.profile == FULL and book.closed)


def _starts(book: GpuBook, profile: str, occupied: int) -> Iterator[int]:
    """Where devices may begin beside what is occupied, the highest first."""
    shape = of_model(book.gpu.model)[profile]
    while (start := highest_start(book.gpu.model, profile, occupied)) is not None:
        occupied |= shape.mask(start)
        yield start


def _union(spans: Iterable[Span]) -> int:
    bits = 0
    for span in spans:
        bits |= span.mask
    return bits


def _ill_fit(seats: int, lacking: int) -> tuple[bool, int]:
    """The smallest is the best: a node that has just enough, or else the one that has most."""
    return (seats < lacking, seats if seats >= lacking else -seats)
