"""The working copy as it will be once some leases have gone: who finds room there then, and what is held for him. Pure.

Nobody is placed there now: in the copy of the present those who go are still there, and what is booked for others is
taken too, so that neither miners nor leases behind them in the queue get it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.placement import Placed, Want, World
from gpu_tenancy.mig.layout import device_mask


class Part(NamedTuple):
    """What a lease has of one node."""

    node: NodeBook
    masks: Mapping[GpuBook, int]
    """Memory slices as bits."""
    amount: Amount
    """CPU, memory and pod slots."""


@dataclass(slots=True)
class _Change:
    """What goes from a node and what is booked there."""

    going: dict[GpuBook, int] = field(default_factory=dict)
    booked: dict[GpuBook, int] = field(default_factory=dict)
    leaves: Amount = NOTHING
    enters: Amount = NOTHING

    @property
    def kept(self) -> Amount:
        """What of the node nobody else can have now: those who go have it, and then those who come."""
        return self.leaves.larger(self.enters)

    @property
    def books(self) -> list[GpuBook]:
        """GPUs that it is about."""
        return [*self.going, *(book for book in self.booked if book not in self.going)]


class Foresight:
    """A second view of one World."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._changes: dict[NodeBook, _Change] = {}

    @contextmanager
    def view(self) -> Iterator[None]:
        """Within it the World is as it will be. Only here may anybody be lifted, lowered, placed or booked."""
        with self._world.apart():
            for node, change in self._changes.items():
                after = {book: self._without(change, book) for book in change.books}
                self._world.adjust(node, node.free + change.kept - change.enters, after)
            try:
                yield
            finally:
                for node, change in self._changes.items():
                    now = {book: book.hard | _both(change, book) for book in change.books}
                    self._world.adjust(node, node.free + change.enters - change.kept, now)

    def lift(self, parts: Iterable[Part]) -> None:
        """A lease goes."""
        for part in parts:
            change = self._changes.setdefault(part.node, _Change())
            for book, mask in part.masks.items():
                change.going[book] = change.going.get(book, 0) | mask
            change.leaves += part.amount
            after = {book: book.hard & ~mask for book, mask in part.masks.items()}
            self._world.adjust(part.node, part.node.free + part.amount, after)

    def lower(self, parts: Iterable[Part]) -> None:
        """It stays after all; nothing was booked where it is."""
        for part in parts:
            change = self._changes[part.node]
            for book, mask in part.masks.items():
                change.going[book] &= ~mask
            change.leaves -= part.amount
            after = {book: book.hard | mask for book, mask in part.masks.items()}
            self._world.adjust(part.node, part.node.free - part.amount, after)

    def book(self, placed: Placed) -> None:
        """Keep the seats, which were taken in this view, for those for whom they are."""
        want = placed.want
        for seat in placed.seats:
            change = self._changes.setdefault(seat.node, _Change())
            for book in seat.gpus:
                taken = device_mask(book.gpu.model, want.profile, seat.start)
                change.booked[book] = change.booked.get(book, 0) | taken
            change.enters += want.needs.amount

    def fits(self, want: Want) -> bool:
        """Whether all pods of the want find room."""
        placed = self._world.place([want])
        if placed is not None:
            self._world.undo(placed)
        return placed is not None

    def _without(self, change: _Change, book: GpuBook) -> int:
        return book.hard & ~change.going.get(book, 0) | change.booked.get(book, 0)


def _both(change: _Change, book: GpuBook) -> int:
    return change.going.get(book, 0) | change.booked.get(book, 0)
