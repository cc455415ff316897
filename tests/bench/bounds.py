"""What no way of placing could better: linear programmes over the mixes of profiles that one GPU can hold.

They may move leases, cut GPUs anew at any moment, place fractions, refuse whom they like and know the future. So every
real rule stays below, and how far it is to be below is not known: the distance is an upper limit of what can be gained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final, NamedTuple

from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from gpu_tenancy.mig.layout import layouts
from tests.bench.loss import MODEL, PROFILES, Asked, crowds

NAMES: Final = tuple(shape.name for shape in PROFILES)

Mix = tuple[int, ...]
"""How many devices of each profile, in the order of PROFILES."""


@cache
def best_mixes() -> tuple[Mix, ...]:
    """What one GPU can hold at the most: no other mix has as many of each and more of one."""
    mixes = {tuple(Counter(place.profile for place in layout)[name] for name in NAMES) for layout in layouts(MODEL)}
    return tuple(sorted(one for one in mixes if not any(other != one and _covers(other, one) for other in mixes)))


def _covers(mix: Mix, other: Mix) -> bool:
    return all(mine >= its for mine, its in zip(mix, other, strict=True))


class _Entry(NamedTuple):
    row: int
    column: int
    value: float


class Programme:
    """Rows and columns as they are written down: at most as much as the right side, as much worth as possible."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._limits: list[float] = []
        self._worth: list[float] = []
        self._most: list[float | None] = []

    def column(self, worth: float, most: float | None) -> int:
        """Add a quantity from 0 to `most` (None: without end); what one of it is worth. Its number."""
        self._worth.append(worth)
        self._most.append(most)
        return len(self._worth) - 1

    def row(self, limit: float, terms: Iterator[tuple[int, float]] | Sequence[tuple[int, float]]) -> None:
        """Add a limit on a sum of quantities, each by its number and times so much."""
        self._entries += [_Entry(len(self._limits), column, value) for column, value in terms]
        self._limits.append(limit)

    def best(self) -> float:
        """The most that can be had. Raises RuntimeError where the solver finds no optimum."""
        rows, columns, values = zip(*self._entries, strict=True)
        shape = len(self._limits), len(self._worth)
        found = linprog(
            [-one for one in self._worth],
            A_ub=coo_matrix((values, (rows, columns)), shape=shape).tocsr(),
            b_ub=self._limits,
            bounds=[(0, most) for most in self._most],
            method="highs-ipm",
        )
        if not found.success:
            raise RuntimeError(f"the linear programme has no optimum: {found.message}")
        return float(-found.fun)


def admission(asked: Sequence[Asked], gpus: int, worth: Sequence[float]) -> float:
    """The most that can be had of leases that come and go; `worth`: of each of them."""
    programme = Programme()
    served = [programme.column(value, 1.0) for value in worth]
    for crowd in crowds(asked):
        cut = [programme.column(0.0, None) for _ in best_mixes()]
        for kind, name in enumerate(NAMES):
            here = [(served[number], 1.0) for number in crowd if asked[number].profile == name]
            if here:
                has = [(column, -float(mix[kind])) for column, mix in zip(cut, best_mixes(), strict=True) if mix[kind]]
                programme.row(0.0, [*here, *has])
        programme.row(float(gpus), [(column, 1.0) for column in cut])
    return programme.best()
