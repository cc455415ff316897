"""The cheapest of things that together give at least so much of each resource. Pure integer arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

Vector = tuple[int, ...]
"""Amounts of resources, in one order."""

MOST_STEPS: Final = 20_000
"""Combinations that are tried; a node with so many different leases gets the best that was found until then."""


class Item(NamedTuple):
    """A thing that can be chosen."""

    number: int
    cost: int
    gives: Vector


class Cover(NamedTuple):
    """What was chosen."""

    cost: int
    chosen: tuple[int, ...]
    """Numbers of the items."""

    @property
    def rank(self) -> tuple[int, int]:
        """The lower the better: what it costs, then how many there are."""
        return self.cost, len(self.chosen)


def cheapest(items: Sequence[Item], lacking: Vector, start: Cover, bound: Cover | None) -> Cover | None:
    """The cheapest items that give what is lacking, beside those that are chosen already; `bound` where nothing is
    better. Items are in the order in which they are preferred among those of one cost."""
    if bound is not None and start.rank >= bound.rank:
        return bound
    if all(amount <= 0 for amount in lacking):
        return start
    useful = [item for item in items if any(min(pair) > 0 for pair in zip(item.gives, lacking, strict=True))]
    greedy = _greedy(useful, lacking, start)
    if greedy is None:
        return bound
    best = greedy if bound is None or greedy.rank < bound.rank else bound
    return _Search(_alike(useful, lacking), best).run(lacking, start)


def _greedy(items: Sequence[Item], lacking: Vector, start: Cover) -> Cover | None:
    """The cheapest one after the other, then without those that are not needed after all; None: all are not enough."""
    taken: list[Item] = []
    for item in sorted(items, key=_cost):
        if _enough(taken, lacking):
            break
        taken.append(item)
    if not _enough(taken, lacking):
        return None
    for item in sorted(taken, key=_cost, reverse=True):
        rest = [other for other in taken if other is not item]
        if _enough(rest, lacking):
            taken = rest
    return _plus(start, taken)


class _Search:
    """Branch and bound over groups of items that give the same: of each the cheapest are taken first."""

    def __init__(self, groups: Sequence[Sequence[Item]], best: Cover) -> None:
        self._groups, self._best = groups, best
        self._steps = 0
        self._gives_from = [_sum([item for group in groups[index:] for item in group]) for index in range(len(groups))]

    def run(self, lacking: Vector, start: Cover) -> Cover:
        self._try(0, lacking, start)
        return self._best

    def _try(self, index: int, lacking: Vector, chosen: Cover) -> None:
        self._steps += 1
        if chosen.rank >= self._best.rank or self._steps > MOST_STEPS:
            return
        if all(amount <= 0 for amount in lacking):
            self._best = chosen
            return
        if index == len(self._groups) or not _gives(self._gives_from[index], lacking):
            return
        for count in range(len(self._groups[index]) + 1):
            taken = self._groups[index][:count]
            self._try(index + 1, _less(lacking, _sum(taken) if taken else ()), _plus(chosen, taken))


def _alike(items: Sequence[Item], lacking: Vector) -> list[list[Item]]:
    """Items that give the same of what is lacking, the cheapest of each group first."""
    groups: dict[Vector, list[Item]] = defaultdict(list)
    for item in items:
        gives = tuple(min(amount, most) if most > 0 else 0 for amount, most in zip(item.gives, lacking, strict=True))
        groups[gives].append(item._replace(gives=gives))
    return [sorted(group, key=_cost) for group in groups.values()]


def _enough(items: Sequence[Item], lacking: Vector) -> bool:
    return _gives(_sum(items), lacking) if items else all(amount <= 0 for amount in lacking)


def _gives(amounts: Vector, lacking: Vector) -> bool:
    return all(amount >= least for amount, least in zip(amounts, lacking, strict=True))


def _sum(items: Sequence[Item]) -> Vector:
    return tuple(map(sum, zip(*(item.gives for item in items), strict=True)))


def _less(lacking: Vector, given: Vector) -> Vector:
    return tuple(amount - less for amount, less in zip(lacking, given, strict=True)) if given else lacking


def _plus(chosen: Cover, items: Sequence[Item]) -> Cover:
    return Cover(chosen.cost + sum(map(_cost, items)), (*chosen.chosen, *(item.number for item in items)))


def _cost(item: Item) -> int:
    return item.cost
