"""Whose leaving makes room for a pod on one node at the least cost. Pure.

Exact, but for a node with very many different leases (`cover.MOST_STEPS`): for whole GPUs so many have to come free, a
slice needs a place where all those in the way can go, and either needs CPU, memory and a pod slot besides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from gpu_tenancy.core import cover
from gpu_tenancy.core.amounts import total
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.cover import Cover, Item
from gpu_tenancy.core.foresight import Part
from gpu_tenancy.core.placement import Want
from gpu_tenancy.core.room import serves
from gpu_tenancy.core.stock import Stock
from gpu_tenancy.mig.profiles import FULL, of_model


@dataclass(eq=False, slots=True)
class Victim:
    """A lease that goes, or may have to."""

    stock: Stock
    parts: tuple[Part, ...]
    cost: int
    """Slice-seconds of work that are lost at most; 0: it goes already, or has been told."""
    notice: timedelta
    """Zero where nothing of it runs yet."""
    at: datetime | None = None
    """When it loses its devices."""
    cause: str = ""
    """UID of the lease for which it has to go in this plan; empty: it stays."""


class Stake(NamedTuple):
    """A lease on a node."""

    victim: Victim
    part: Part


class Answer(NamedTuple):
    """Whose leaving makes room."""

    rank: tuple[int, int]
    """What they cost, and how many they are."""
    victims: tuple[Victim, ...]


class _Option(NamedTuple):
    """One way to make room for a pod's GPUs."""

    base: tuple[int, ...]
    """Those that have to go, by number."""
    gpus: int
    """Whole GPUs that have to come free besides."""


def cheapest(node: NodeBook, here: Sequence[Stake], want: Want) -> Answer | None:
    """Those of the leases that have a stake in the node; None: one pod finds no room there without all of them either.
    The first ones are preferred among those that cost the same."""
    lacking = want.needs.amount.beyond(node.available)
    options = [_whole_option(node, want)] if want.profile == FULL else _slice_options(node, here, want)
    best: Cover | None = None
    for base, gpus in options:
        start = Cover(sum(here[number].victim.cost for number in base), tuple(base))
        if best is None or start.rank < best.rank:
            left = (gpus, *lacking.beyond(total(here[number].part.amount for number in base)))
            items = list(_items(here, base, gpus, want)) if any(left) else []
            best = cover.cheapest(items, left, start, best)
    return Answer(best.rank, tuple(here[number].victim for number in best.chosen)) if best else None


def _items(here: Sequence[Stake], base: Sequence[int], gpus: int, want: Want) -> Iterator[Item]:
    """What the others would leave."""
    for number, (victim, part) in enumerate(here):
        if number not in base:
            yield Item(number, victim.cost, (_wholes(part, want) if gpus else 0, *part.amount))


def _whole_option(node: NodeBook, want: Want) -> _Option:
    """Nobody in particular has to go, but so many whole GPUs have to come free."""
    free = sum(1 for book in node.gpus.values() if serves(book, want) and book.gpu.healthy and not book.taken)
    return _Option((), max(0, want.count - free))


def _slice_options(node: NodeBook, here: Sequence[Stake], want: Want) -> Iterator[_Option]:
    """Wherever a device of the profile can begin: who is in the way there."""
    on: dict[GpuBook, list[int]] = defaultdict(list)
    for number, (_, part) in enumerate(here):
        for book in part.masks:
            on[book].append(number)
    shape = of_model(want.model)[want.profile]
    for book in (book for book in node.gpus.values() if serves(book, want) and book.gpu.healthy):
        for start in shape.starts:
            blocked = book.taken & shape.mask(start)
            if blocked & (book.closed | _promised(book)):
                continue
            base = tuple(number for number in on[book] if here[number].part.masks[book] & blocked)
            for number in base:
                blocked &= ~here[number].part.masks[book]
            if not blocked:
                yield _Option(base, 0)


def _wholes(part: Part, want: Want) -> int:
    """Whole GPUs that serve the want once the lease has gone from the node."""
    return sum(
        1
        for book, mask in part.masks.items()
        if serves(book, want) and book.gpu.healthy and not (book.taken & ~mask) and not _promised(book)
    )


def _promised(book: GpuBook) -> int:
    """Memory slices that are kept for others whoever goes, as bits."""
    mask = 0
    for promise in book.promised:
        mask |= promise.mask
    return mask
