"""What happened, as it happens: who waited how long, who had which slices when, what it brought in.

Times are whole microseconds and money is exact, so that sums do not depend on their order. Pure.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from gpu_tenancy.api.lease import Reason, Tier
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.tenancy import holding
from gpu_tenancy.core.terms import FINAL_REASONS
from gpu_tenancy.simulate.room import Room

MICROSECOND: Final = timedelta(microseconds=1)
MOST_POINTS: Final = 512
"""Of a series over time; when there are more, two become one."""


@dataclass(slots=True)
class Side:
    """Leases of one tier and tenant."""

    asked: int = 0
    started: int = 0
    refused: int = 0
    ended: int = 0
    preempted: int = 0
    """Times that one lost its devices to a firmer lease."""
    lost: int = 0
    """Times that one lost its devices to a fault."""
    waits: list[float] = field(default_factory=list)
    """Seconds from being asked for until its devices were ready, of each that started."""
    slice_seconds: int = 0
    """Billed seconds × memory slices."""
    asked_slice_seconds: int = 0
    """The same as they were asked for, of leases with a duration."""
    money: dict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    """Price per hour × devices × seconds, by currency: to be divided by 3600 once."""


@dataclass(slots=True)
class Point:
    """A stretch of time."""

    states: Counter[SliceState]
    """Slice-microseconds."""
    waiting: int
    """Lease-microseconds of leases that waited."""
    room: Room
    """What would have found room at its beginning."""


class Tally:
    """Keeps count of one simulation."""

    def __init__(self, began: datetime) -> None:
        self.began = self.now = began
        self.sides: dict[tuple[Tier, str], Side] = defaultdict(Side)
        self.states: Counter[SliceState] = Counter()
        """Slice-microseconds in each state."""
        self.leased = 0
        """Slice-microseconds between the opening and the closing of every segment: by the records, not by the nodes."""
        self.width = timedelta(minutes=1)
        self.points: list[Point] = []
        self._slices: Counter[SliceState] = Counter()
        """Slices in each state now."""
        self._of_gpu: dict[tuple[str, str], Mapping[SliceState, int]] = {}
        self._waiting = 0
        self._opened: dict[str, datetime] = {}
        """When each open segment was opened, by its contract."""

    # --- time ---------------------------------------------------------------------------------------------------------

    def advance(self, to: datetime, room: Callable[[], Room]) -> None:
        """Time passes in which nothing changes. `room`: what there is of it meanwhile."""
        found: Room | None = None
        while self.now < to:
            index = (self.now - self.began) // self.width
            if index == MOST_POINTS:
                self._halve()
                continue
            while len(self.points) <= index:
                found = found or room()
                self.points.append(Point(Counter(), 0, found))
            until = min(to, self.began + (index + 1) * self.width)
            self._count(self.points[index], (until - self.now) // MICROSECOND)
            self.now = until

    def _count(self, point: Point, microseconds: int) -> None:
        for state, slices in self._slices.items():
            point.states[state] += slices * microseconds
            self.states[state] += slices * microseconds
        point.waiting += self._waiting * microseconds

    def _halve(self) -> None:
        pairs = zip(self.points[::2], self.points[1::2], strict=True)
        self.points = [Point(a.states + b.states, a.waiting + b.waiting, a.room) for a, b in pairs]
        self.width *= 2

    def has(self, place: tuple[str, str], slices: Mapping[SliceState, int]) -> None:
        """From now on the slices of a GPU are in these hands. `place`: its node's name and its UUID."""
        for state, number in self._of_gpu.get(place, {}).items():
            self._slices[state] -= number
        for state, number in slices.items():
            self._slices[state] += number
        self._of_gpu[place] = slices

    # --- leases -------------------------------------------------------------------------------------------------------

    def asked(self, tier: Tier, tenant: str, slice_seconds: int) -> None:
        """A lease was asked for."""
        side = self.sides[tier, tenant]
        side.asked += 1
        side.asked_slice_seconds += slice_seconds
        self._waiting += 1

    def refused(self, tier: Tier, tenant: str) -> None:
        """It was refused for good."""
        self.sides[tier, tenant].refused += 1
        self._waiting -= 1

    def opened(self, spec: UsageRecordSpec, tenant: str, waited: timedelta) -> None:
        """A segment began. `waited`: since the lease was asked for."""
        side = self.sides[spec.tier, tenant]
        if spec.segment == 1:
            side.started += 1
            side.waits.append(waited.total_seconds())
        self._waiting -= 1
        self._opened[spec.contract] = self.now

    def closed(self, spec: UsageRecordSpec, seconds: int, reason: Reason | None, tenant: str) -> None:
        """A segment ended. No reason: it goes on, and the simulation does not."""
        side = self.sides[spec.tier, tenant]
        slices = holding(spec.profile, len(spec.devices)).memory_slices
        self.leased += slices * ((self.now - self._opened.pop(spec.contract)) // MICROSECOND)
        side.slice_seconds += slices * seconds
        if spec.price is not None:
            side.money[spec.price.currency] += Decimal(spec.price.per_hour) * len(spec.devices) * seconds
        side.ended += reason in FINAL_REASONS
        side.preempted += reason is Reason.PREEMPTED
        side.lost += reason is Reason.NODE_LOST
        self._waiting += reason is not None and reason not in FINAL_REASONS
