"""Which GPUs change between whole and MIG, because leases wait for the other mode, and when they change back. Pure.

A GPU is converted only while no lease has anything of it, nothing of it is promised and nobody drains from it; miners
yield. What was decided stands in GpuNode.spec, with its time: it is kept for a dwell, whoever asks for what, and counts
against the node's budget for an hour. A lease that waits for a conversion finds its room anew in each plan, in the
cluster as it will be; what it uses besides is held for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Final, NamedTuple

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.node import GpuMode, WantedMode
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.desirability import LASTING, NOBODY
from gpu_tenancy.core.placement import Mode, Placed, Want, World, mode_of
from gpu_tenancy.core.room import some
from gpu_tenancy.core.snapshot import ConversionRules
from gpu_tenancy.mig.layout import ALL_SLICES
from gpu_tenancy.mig.profiles import FULL, of_model

TAKES: Final = timedelta(seconds=20)
"""How long a conversion takes: its miner stops, the GPU is reset alone and answers again."""
OVERDUE: Final = timedelta(minutes=5)
"""After so long a conversion that is not done is not waited for: others are begun instead."""
HOUR: Final = timedelta(hours=1)


class Wait(NamedTuple):
    """What a lease waits for."""

    gpus: Mapping[tuple[str, GpuMode], int]
    """How many GPUs of which node become what."""
    until: datetime
    """When they are expected to be ready; in the past where they take longer."""

    @property
    def refusal(self) -> Refusal:
        """Why it is not placed yet."""
        parts = [
            f"{counted(number, 'GPU')} of {node} {'is' if number == 1 else 'are'} being converted to {_name(mode)}"
            for (node, mode), number in sorted(self.gpus.items())
        ]
        return Refusal(Reason.QUEUED, f"{some(parts)} for it, which takes about {TAKES.seconds} s.")


def _name(mode: GpuMode) -> str:
    return "MIG" if mode is GpuMode.MIG else "whole"


class Modes(NamedTuple):
    """What a GpuNode's spec says of modes."""

    modes: tuple[WantedMode, ...]
    conversions: tuple[datetime, ...]


@dataclass(eq=False, slots=True)
class _Change:
    """A GPU that is being converted."""

    node: NodeBook
    book: GpuBook
    mode: GpuMode
    """Which it gets."""
    since: datetime
    now: Mode
    """As it is entered until then."""
    then: Mode
    """As it will be: with what leases that wait will have of it."""


class Conversions:
    """The conversions of one plan: those under way, those begun for leases that wait, and those back."""

    def __init__(self, world: World, rules: ConversionRules, now: datetime) -> None:
        """To be made once the world is settled."""
        self._world, self._rules, self._now = world, rules, now
        concerned = (node for node in world.nodes.values() if node.facts.has_convertible or node.facts.modes)
        self._nodes = [node for node in concerned if not node.objection]
        self._entries = {(node.facts.name, entry.gpu): entry for node in self._nodes for entry in node.facts.modes}
        """What GpuNodes say, by names of node and GPU; with what this plan decides."""
        self._spent = {node.facts.name: self._recent(node) for node in self._nodes}
        """When conversions of each node were decided within the last hour; with those of this plan."""
        self._changes: dict[GpuBook, _Change] = dict(self._under_way())
        self._hopeless: set[Want] = set()

    def _recent(self, node: NodeBook) -> list[datetime]:
        return [at for at in node.facts.conversions if self._now - at < HOUR]

    def _under_way(self) -> Iterator[tuple[GpuBook, _Change]]:
        """Conversions that are expected to end soon."""
        for node in self._nodes:
            for uuid, entry in node.facts.changing.items():
                book = node.gpus[uuid]
                if book.gpu.healthy and self._now - entry.since < OVERDUE:
                    yield book, _change(node, book, entry.mode, entry.since)

    # --- for a lease that waits ---------------------------------------------------------------------------------------

    def make_room(self, wants: Sequence[Want]) -> Wait | None:
        """What a lease that finds no room waits for, once the GPUs are converted that it needs. None: it would find
        none for all the conversions that may be begun either."""
        if not self._nodes or self._hopeless.issuperset(wants):
            return None
        with self._view():
            placed = self._world.place(wants) or self._convert(wants)
            if placed is None:
                self._hopeless.update(wants)
                return None
            awaited = {self._changes[book] for seat in placed.seats for book in seat.gpus if book in self._changes}
            if not awaited:
                self._world.undo(placed)
                return None
        for seat in placed.seats:
            seat.node.awaited = True
        numbers = Counter((change.node.facts.name, change.mode) for change in awaited)
        return Wait(numbers, max(change.since for change in awaited) + TAKES)

    def _convert(self, wants: Sequence[Want]) -> Placed | None:
        """Seats for one of the wants, after the fewest conversions that any of them needs; in the view."""
        if not self._rules.on_demand:
            return None
        found = [(want, begun) for want in wants if (begun := self._enough(want))]
        if not found:
            return None
        want, begun = min(found, key=lambda one: len(one[1]))
        for change in begun:
            self._begin(change)
        return self._world.place([want])

    def _enough(self, want: Want) -> list[_Change]:
        """Conversions after which all pods of a want find room, none of which can be left out; none where there are not
        enough. The view stays as it was."""
        single = replace(want, pods=1)
        begun: list[_Change] = []
        seats: list[Placed] = []
        while len(seats) < want.pods:
            if (placed := self._world.place([single])) is not None:
                seats.append(placed)
            elif more := self._best(want, want.pods - len(seats)):
                for change in more:
                    self._begin(change)
                begun += more
            else:
                break
        complete = len(seats) == want.pods
        for placed in reversed(seats):
            self._world.undo(placed)
        needed = [change for change in begun if complete and self._is_needed(change, want)]
        for change in needed:
            self._end(change)
        for change in begun if not complete else ():
            self._end(change)
        return needed

    def _is_needed(self, change: _Change, want: Want) -> bool:
        """Without it the want finds no room; one that is not needed is ended."""
        self._end(change)
        if (placed := self._world.place([want])) is not None:
            self._world.undo(placed)
            return False
        self._begin(change)
        return True

    def _begin(self, change: _Change) -> None:
        self._changes[change.book] = change
        self._spent[change.node.facts.name].append(self._now)
        self._world.convert(change.node, change.book, change.then)

    def _end(self, change: _Change) -> None:
        """It is not begun after all; nobody has anything of the GPU."""
        del self._changes[change.book]
        self._spent[change.node.facts.name].remove(self._now)
        self._world.convert(change.node, change.book, change.now._replace(hard=0, lasts=NOBODY))

    @contextmanager
    def _view(self) -> Iterator[None]:
        """Within it the GPUs that are being converted have been."""
        with self._world.apart():
            for change in self._changes.values():
                self._world.convert(change.node, change.book, change.then)
            try:
                yield
            finally:
                for change in self._changes.values():
                    change.then = mode_of(change.book)
                    change.book.closed = ALL_SLICES
                    self._world.convert(change.node, change.book, change.now)

    # --- which --------------------------------------------------------------------------------------------------------

    def _best(self, want: Want, lacking: int) -> list[_Change]:
        """The conversions on one node that make room for one more pod at least: the fewest for each pod, where the
        other mode loses least."""
        hosts = [
            node for node in self._nodes if want.allowed_on(node.facts) and node.available.times(want.needs.amount)
        ]
        if want.profile == FULL:
            found = [one for node in hosts if (one := self._to_whole(node, want))]
            books = min(found, default=None, key=lambda one: (len(one.books), one.loss, one.node.facts.name))
        else:
            each = [one for node in hosts for one in self._to_mig(node, want, lacking)]
            books = min(each, default=None, key=lambda one: (one.loss, one.node.facts.name))
        if books is None:
            return []
        mode = GpuMode.WHOLE if want.profile == FULL else GpuMode.MIG
        return [_change(books.node, book, mode, self._now) for book in books.books]

    def _to_whole(self, node: NodeBook, want: Want) -> _Candidate | None:
        """The GPUs in MIG mode that a node lacks for one more pod of whole ones."""
        lacking = want.count - _free_wholes(node, want.model)
        able = [book for book in self._idle(node, want.model) if book.mig]
        if not 0 < lacking <= min(len(able), self._left(node)):
            return None
        able.sort(key=lambda book: (book.gpu.declared is GpuMode.MIG, len(book.mined), -book.gpu.index))
        chosen = tuple(able[:lacking])
        foreign = sum(book.gpu.declared is GpuMode.MIG for book in chosen)
        return _Candidate(node, chosen, (foreign, sum(len(book.mined) for book in chosen)))

    def _to_mig(self, node: NodeBook, want: Want, lacking: int) -> Iterator[_Candidate]:
        """The whole GPUs of a node that would serve the want in MIG mode."""
        if (shape := of_model(want.model).get(want.profile)) is None or not self._left(node):
            return
        pods = min(lacking, len(shape.starts), node.available.times(want.needs.amount))
        together = _free_wholes(node, want.model)
        for book in self._idle(node, want.model):
            if not book.mig:
                foreign = book.gpu.declared is GpuMode.WHOLE
                yield _Candidate(node, (book,), (-pods, foreign, together, len(book.mined), -book.gpu.index))

    def _idle(self, node: NodeBook, model: str) -> Iterator[GpuBook]:
        """GPUs of a node that may be converted now: nobody but miners has anything of them, or will."""
        for book in node.gpus.values():
            if book.gpu.model == model and self._may_change(node, book):
                yield book

    def _may_change(self, node: NodeBook, book: GpuBook) -> bool:
        if not (book.gpu.convertible and book.gpu.healthy) or book in self._changes:
            return False
        if book.closed or book.hard or book.draining or book.promised:
            return False
        entry = self._entries.get((node.facts.name, book.gpu.uuid))
        return entry is None or self._now - entry.since >= self._rules.dwell

    def _left(self, node: NodeBook) -> int:
        """How many conversions the node has left within this hour."""
        return self._rules.per_node_and_hour - len(self._spent[node.facts.name])

    # --- back ---------------------------------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Have the GPUs go back to the mode that their node declares of which nobody needs the other any more, once
        everybody has been placed."""
        for node in self._nodes:
            for entry in node.facts.modes:
                book = node.gpus.get(entry.gpu)
                if book is None or not self._goes_back(node, book):
                    continue
                declared = book.gpu.declared or book.gpu.mode
                change = self._changes[book] = _change(node, book, declared, self._now)
                self._spent[node.facts.name].append(self._now)
                node.awaited = True
                book.closed = ALL_SLICES
                with self._world.apart():
                    self._world.convert(node, book, change.now)

    def _goes_back(self, node: NodeBook, book: GpuBook) -> bool:
        elsewhere = book.gpu.mode is not book.gpu.declared
        return elsewhere and self._left(node) > 0 and self._may_change(node, book)

    # --- what is to be written ----------------------------------------------------------------------------------------

    def wanted(self) -> dict[str, Modes]:
        """What the GpuNodes should say of modes, by name of the node, where it differs from what they say."""
        return {
            node.facts.name: wanted
            for node in self._nodes
            if (wanted := self._wanted_on(node)).modes != node.facts.modes
        }

    def _wanted_on(self, node: NodeBook) -> Modes:
        entries = {entry.gpu: entry for entry in node.facts.modes if self._counts(node, entry)}
        for change in self._changes.values():
            if change.node is node and change.since == self._now:
                uuid = change.book.gpu.uuid
                entries[uuid] = WantedMode(gpu=uuid, mode=change.mode, since=self._now)
        modes = sorted(entries.values(), key=attrgetter("gpu"))
        return Modes(tuple(modes), tuple(self._spent[node.facts.name]))

    def _counts(self, node: NodeBook, entry: WantedMode) -> bool:
        """It says something still: the GPU is there and convertible, and is in another mode than declared, or came back
        to that one a moment ago."""
        gpu = node.facts.gpu_of.get(entry.gpu)
        if gpu is None:
            return not node.facts.gpus
        if not gpu.convertible:
            return False
        at_home = entry.mode is gpu.declared and gpu.mode is gpu.declared
        return not at_home or self._now - entry.since < self._rules.dwell

    def changes(self) -> Iterator[datetime]:
        """When something may be converted that may not now, or is not waited for any more."""
        for node in self._nodes:
            for entry in node.facts.modes:
                yield entry.since + self._rules.dwell
                if entry.gpu in node.facts.changing:
                    yield entry.since + OVERDUE
            yield from (at + HOUR for at in node.facts.conversions)


class _Candidate(NamedTuple):
    """GPUs of a node that would serve a want in the other mode."""

    node: NodeBook
    books: tuple[GpuBook, ...]
    loss: tuple[int, ...]
    """What is lost by it; the smallest is the best."""


def _change(node: NodeBook, book: GpuBook, mode: GpuMode, since: datetime) -> _Change:
    closed = Mode(book.mig, ALL_SLICES, LASTING, book.mined)
    return _Change(node, book, mode, since, closed, Mode(mode is GpuMode.MIG, 0, NOBODY))


def _free_wholes(node: NodeBook, model: str) -> int:
    """Whole GPUs of a node that are free together."""
    books = (book for book in node.gpus.values() if book.gpu.model == model and book.gpu.healthy)
    return sum(not (book.mig or book.taken) for book in books)
