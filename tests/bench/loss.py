"""A loss system of MIG leases: they arrive and leave on their own, are placed or turned away, and are never moved.

Poisson arrivals, exponential durations with a mean of an hour, on A100s in MIG mode. The load is what is asked for at a
time, in compute slices, as a share of all there are. Also what other rules than the product's would do, each in a line
or two. Nothing is measured here.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Final, NamedTuple

from gpu_tenancy.mig.layout import ALL_SLICES, device_mask
from gpu_tenancy.mig.profiles import COMPUTE_SLICES, Profile, of_model

MODEL: Final = "A100-SXM4-80GB"
PROFILES: Final[Sequence[Profile]] = tuple(of_model(MODEL).values())
"""1g, 2g, 3g, 4g, 7g."""
MIXES: Final[Mapping[str, Sequence[float]]] = {
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),
    "small": (0.4, 0.3, 0.15, 0.1, 0.05),
    "big": (0.05, 0.1, 0.15, 0.3, 0.4),
    "bimodal": (0.4, 0.1, 0.0, 0.1, 0.4),
}
"""Share of each profile."""


class Asked(NamedTuple):
    """A lease that arrives."""

    at: float
    """In hours."""
    hours: float
    profile: str

    @property
    def ends(self) -> float:
        """When it leaves if it is placed, in hours."""
        return self.at + self.hours

    @property
    def worth(self) -> float:
        """Compute slices times hours."""
        return of_model(MODEL)[self.profile].compute * self.hours


class Held(NamedTuple):
    """A lease on its place."""

    ends: float
    gpu: int
    start: int
    profile: str


class Fleet:
    """GPUs and the leases on them."""

    def __init__(self, gpus: int) -> None:
        self.masks = [0] * gpus
        """Memory slices that are held, as bits, by GPU."""
        self.held: list[Held] = []
        """A heap: whoever leaves next is first."""
        self._with: dict[int, list[int]] = {0: list(range(gpus))}
        """Heaps of the GPUs that had a mask once."""

    def leave(self, now: float) -> None:
        """Those go whose time has come."""
        while self.held and self.held[0].ends <= now:
            gone = heapq.heappop(self.held)
            self._set(gone.gpu, self.masks[gone.gpu] & ~device_mask(MODEL, gone.profile, gone.start))

    def take(self, asked: Asked, gpu: int, start: int) -> None:
        """One more is placed. Raises ValueError where somebody is there already."""
        mask = device_mask(MODEL, asked.profile, start)
        if self.masks[gpu] & mask:
            raise ValueError(f"{asked.profile} at {start} of GPU {gpu} overlaps {self.masks[gpu]:08b}")
        self._set(gpu, self.masks[gpu] | mask)
        heapq.heappush(self.held, Held(asked.ends, gpu, start, asked.profile))

    def firsts(self) -> Iterator[tuple[int, int]]:
        """Every mask that some GPU has, and the first GPU that has it."""
        for mask, gpus in self._with.items():
            while gpus and self.masks[gpus[0]] != mask:
                heapq.heappop(gpus)
            if gpus:
                yield mask, gpus[0]

    def _set(self, gpu: int, mask: int) -> None:
        self.masks[gpu] = mask
        heapq.heappush(self._with.setdefault(mask, []), gpu)


Rule = Callable[[Fleet, Asked], tuple[int, int] | None]
"""GPU and start for a lease that arrives; None: it is turned away."""


class Served(NamedTuple):
    """What became of the leases that arrived, in percent."""

    admitted: float
    """Of the leases."""
    worth: float
    """Of their slice-seconds."""


def arrivals(mix: str, load: float, seed: int, leases: int, gpus: int) -> list[Asked]:
    """The leases that arrive, in the order of time."""
    dice = random.Random(f"{mix}/{load}/{seed}")
    shares = MIXES[mix]
    slices = sum(share * shape.compute for share, shape in zip(shares, PROFILES, strict=True))
    per_hour, now, found = load * COMPUTE_SLICES * gpus / slices, 0.0, []
    for _ in range(leases):
        now += dice.expovariate(per_hour)
        [shape] = dice.choices(PROFILES, shares)
        found.append(Asked(now, dice.expovariate(1.0), shape.name))
    return found


def run(asked: Sequence[Asked], gpus: int, rule: Rule) -> Served:
    """Let them come and go."""
    fleet, admitted, worth = Fleet(gpus), 0, 0.0
    for one in asked:
        fleet.leave(one.at)
        place = rule(fleet, one)
        if place is not None:
            fleet.take(one, *place)
            admitted += 1
            worth += one.worth
    return Served(100 * admitted / len(asked), 100 * worth / sum(one.worth for one in asked))


# --- rules --------------------------------------------------------------------------------------------------------


PATIENCE: Final = 50
"""So often chance tries a place before it looks which are free."""


def at_random(seed: int) -> Rule:
    """Any place at all."""
    dice = random.Random(seed)

    def rule(fleet: Fleet, asked: Asked) -> tuple[int, int] | None:
        legal = of_model(MODEL)[asked.profile].starts
        for _ in range(PATIENCE):
            gpu, start = dice.randrange(len(fleet.masks)), dice.choice(legal)
            if start in starts(fleet.masks[gpu], asked.profile):
                return gpu, start
        free = [(gpu, start) for gpu, mask in enumerate(fleet.masks) for start in starts(mask, asked.profile)]
        return dice.choice(free) if free else None

    return rule


Key = Callable[[int, str, int], float]
"""How bad it is to begin a profile at a slice beside a mask."""


def least(key: Key) -> Rule:
    """The place with the smallest key; of equals on the first GPU, at the lowest start."""

    @cache
    def best(mask: int, profile: str) -> tuple[float, int] | None:
        return min(((key(mask, profile, start), start) for start in starts(mask, profile)), default=None)

    def rule(fleet: Fleet, asked: Asked) -> tuple[int, int] | None:
        chosen: tuple[float, int, int] | None = None
        for mask, gpu in fleet.firsts():
            found = best(mask, asked.profile)
            if found is not None and (chosen is None or (found[0], gpu) < chosen[:2]):
                chosen = found[0], gpu, found[1]
        return None if chosen is None else chosen[1:]

    return rule


def _free(mask: int) -> int:
    return (ALL_SLICES & ~mask).bit_count()


def unusable(mask: int, profile: str) -> int:
    """Free slices on which no place of the profile lies."""
    usable = 0
    for start in starts(mask, profile):
        usable |= device_mask(MODEL, profile, start)
    return _free(mask | usable)


@cache
def _unusable(mask: int) -> int:
    return sum(unusable(mask, shape.name) for shape in PROFILES)


def _more_unusable(mask: int, profile: str, start: int) -> float:
    return _unusable(mask | device_mask(MODEL, profile, start)) - _unusable(mask)


BASELINES: Final[Mapping[str, Callable[[int], Rule]]] = {
    "random": at_random,
    "first fit": lambda _: least(lambda *_: 0.0),
    "worst fit": lambda _: least(lambda mask, *_: -_free(mask)),
    "best fit": lambda _: least(lambda mask, *_: _free(mask)),
    "best fit, high index": lambda _: least(lambda mask, _, start: _free(mask) - start / 100),
    "min fragment increment": lambda _: least(_more_unusable),
}
"""By name; each needs a seed, which only chance uses."""


@cache
def starts(mask: int, profile: str) -> Sequence[int]:
    """Where the profile may begin beside a mask."""
    shape = of_model(MODEL)[profile]
    return tuple(start for start in shape.starts if not mask & shape.mask(start))


# --- cliques ------------------------------------------------------------------------------------------------------


def crowds(asked: Sequence[Asked]) -> Iterator[list[int]]:
    """The largest sets of leases, by their number, that would be there at the same time if all were placed: those at an
    arrival that a departure follows next."""
    there: list[tuple[float, int]] = []
    for number, one in enumerate(asked):
        if there and there[0][0] <= one.at:
            yield sorted(index for _, index in there)
            while there and there[0][0] <= one.at:
                heapq.heappop(there)
        heapq.heappush(there, (one.ends, number))
    yield sorted(index for _, index in there)
