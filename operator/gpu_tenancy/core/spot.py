"""Which spot leases give way to a firm one that finds no room even where miners stop, and when. Pure.

They are told first, each with its whole notice; what was told is in their status, and every plan finds out anew who is
needed: a notice that is not needed any more is taken back. Nobody is told for a plan that does not complete. Meanwhile
the room that there is, and that which comes, is held for the one who waits. A lease is taken as a whole or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final, NamedTuple

from gpu_tenancy.api.base import format_time, parse_duration
from gpu_tenancy.api.lease import Preemption, Reason
from gpu_tenancy.core.actions import Outlook, Refusal
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.checks import needs_of
from gpu_tenancy.core.foresight import Foresight, Part
from gpu_tenancy.core.ordering import PREEMPTIBLE
from gpu_tenancy.core.outlooks import outlook
from gpu_tenancy.core.placement import Placed, Want, World
from gpu_tenancy.core.rest import Stocks
from gpu_tenancy.core.snapshot import LeaseFacts, SpotLimits
from gpu_tenancy.core.stock import Stock
from gpu_tenancy.core.tenancy import holding
from gpu_tenancy.core.terms import Ending, ceil_second, expiry, floor_second, seconds_between
from gpu_tenancy.core.victims import Answer, Stake, Victim, cheapest
from gpu_tenancy.mig.layout import device_mask

DEFAULT_NOTICE: Final = timedelta(seconds=30)
"""Of a spot lease that does not ask for another."""


def notice_of(lease: LeaseFacts, limits: SpotLimits) -> timedelta:
    """How long before its end a spot lease is told of it."""
    asked = lease.spec.term.preemption_notice
    return DEFAULT_NOTICE if asked is None else min(parse_duration(asked), limits.longest_notice)


def cause_of(lease: LeaseFacts) -> str:
    """For what others go: the lease, and once it has run and waits again, that it does so for another time."""
    return f"{lease.uid}:{len(lease.records)}" if lease.records else lease.uid


def beneficiary_of(cause: str) -> str:
    """UID of the lease for which somebody goes."""
    return cause.partition(":")[0]


class Wait(NamedTuple):
    """What a firm lease waits for."""

    leases: int
    """Spot leases."""
    until: datetime

    @property
    def refusal(self) -> Refusal:
        """Why it is not placed yet."""
        who = f"{counted(self.leases, 'spot lease')} to end by {format_time(self.until)}"
        return Refusal(Reason.PREEMPTING, f"Waits for {who}; its room is held for it.")


class Spots:
    """The spot leases of one plan, and those for which they go."""

    def __init__(self, world: World, stocks: Stocks, limits: SpotLimits, now: datetime) -> None:
        self._world, self._stocks, self._limits, self._now = world, stocks, limits, now
        self._hopeless: set[tuple[Want, frozenset[str]]] = set()
        """What finds no room even without any spot lease, and which promises were lifted then."""

    @cached_property
    def beneficiaries(self) -> frozenset[str]:
        """UIDs of the leases for which somebody has been told to go: they are ahead of all others of their tier."""
        notices = (stock.lease.status.preemption for stock in self._stocks.moving)
        return frozenset(beneficiary_of(one.cause) for one in notices if one is not None)

    @cached_property
    def _victims(self) -> list[Victim]:
        """Those that can be taken, the youngest first."""
        found = [self._victim(stock) for stock in reversed(self._stocks.of_tier(PREEMPTIBLE)) if _can_be_taken(stock)]
        return [victim for victim in found if victim.parts]

    @cached_property
    def _on(self) -> dict[NodeBook, list[Stake]]:
        """The same by node, the cheapest first."""
        by_node: dict[NodeBook, list[Stake]] = defaultdict(list)
        for victim in sorted(self._victims, key=_cost):
            for part in victim.parts:
                by_node[part.node].append(Stake(victim, part))
        return {self._world.nodes[name]: by_node[self._world.nodes[name]] for name in sorted(_names(by_node))}

    @cached_property
    def _foresight(self) -> Foresight:
        """What will be, as far as is known without anybody being told: leases that are ending have gone."""
        foresight = Foresight(self._world)
        ending = (stock for stock in self._stocks.moving if stock.keeps and stock.ending is not None)
        leaving = [list(self._parts(stock)) for stock in ending]
        with foresight.view():
            for parts in leaving:
                foresight.lift(parts)
        return foresight

    # --- who has to go ------------------------------------------------------------------------------------------------

    def make_room(self, lease: LeaseFacts, wants: Sequence[Want]) -> Wait | None:
        """What a lease that finds no room now has to wait for, once those have been told that must go for it. None: it
        would find none without all of them either, or finds some in a moment without anybody being told."""
        if lease.spec.tier is PREEMPTIBLE or not self._victims:
            return None
        with self._foresight.view():
            victims: Sequence[Victim] = ()
            placed = self._world.place(wants)
            if placed is None:
                found = [found for want in wants if (found := self._needed(want, cause_of(lease))) is not None]
                if not found:
                    return None
                want, victims = min(found, key=_total)
                placed = self._seats_without(victims, want)
            going = self._waits_for(victims, placed)
            if not going:
                self._world.undo(placed)
                return None
            self._foresight.book(placed)
        self._tell(victims, cause_of(lease))
        return Wait(len(going), max(victim.at for victim in going if victim.at is not None))

    def _seats_without(self, victims: Sequence[Victim], want: Want) -> Placed:
        """The seats that are there once these have gone."""
        for victim in victims:
            self._foresight.lift(victim.parts)
        placed = self._world.place([want])
        if placed is None:
            raise AssertionError(f"no room for {want} though enough spot leases have gone")
        return placed

    def _waits_for(self, victims: Sequence[Victim], placed: Placed) -> list[Victim]:
        """These, and those that go for others and are where the seats are."""
        hosts = {seat.node for seat in placed.seats}
        others = [one for one in self._victims if one.cause and any(part.node in hosts for part in one.parts)]
        return [*victims, *others]

    def _tell(self, victims: Sequence[Victim], cause: str) -> None:
        """They have to go: who has not been told before is told now, and those lose their devices all at once."""
        longest = max((victim.notice for victim in victims if victim.at is None), default=timedelta())
        deadline = ceil_second(self._now + longest) if longest else floor_second(self._now)
        for victim in victims:
            victim.cause = cause
            victim.at = victim.at or deadline

    def _needed(self, want: Want, cause: str) -> tuple[Want, Sequence[Victim]] | None:
        """The cheapest leases without which all pods of the want find room: for one pod no others cost less; for more,
        none of them can be left out. The view stays as it was."""
        if (want, self._world.lifted) in self._hopeless:
            return None
        excluded = frozenset(id(one) for one in self._victims if cause in one.stock.lease.status.preempted_for)
        victims = self._for_one(want, excluded) if want.pods == 1 else self._for_gang(want, excluded)
        if victims is None:
            if not excluded:
                self._hopeless.add((want, self._world.lifted))
            return None
        return want, victims

    def _for_one(self, want: Want, excluded: frozenset[int]) -> Sequence[Victim] | None:
        """Those on the node where one pod costs least."""
        best: Answer | None = None
        for node, here in self._on.items():
            answer = self._on_node(node, here, want, excluded)
            if answer is not None and (best is None or answer.rank < best.rank):
                best = answer
        return best.victims if best else None

    def _for_gang(self, want: Want, excluded: frozenset[int]) -> Sequence[Victim] | None:
        """One pod after the other where it costs least, then whoever turns out not to be needed stays."""
        single = replace(want, pods=1)
        seats: list[Placed] = []
        lifted: list[Victim] = []
        enough = True
        while enough and len(seats) < want.pods:
            placed = self._world.place([single])
            if placed is None:
                more = self._for_one(single, excluded)
                enough = more is not None
                for victim in more or ():
                    self._foresight.lift(victim.parts)
                    victim.cause = PENDING
                    lifted.append(victim)
            else:
                seats.append(placed)
        for placed in reversed(seats):
            self._world.undo(placed)
        needed = self._minimised(want, lifted) if enough else []
        for victim in lifted:
            victim.cause = ""
        for victim in needed if enough else lifted:
            self._foresight.lower(victim.parts)
        return needed if enough else None

    def _minimised(self, want: Want, lifted: Sequence[Victim]) -> list[Victim]:
        """Those of them that cannot stay; the others are back."""
        needed = []
        for victim in sorted(lifted, key=_cost, reverse=True):
            self._foresight.lower(victim.parts)
            if not self._foresight.fits(want):
                self._foresight.lift(victim.parts)
                needed.append(victim)
        return needed

    def _on_node(self, node: NodeBook, here: Sequence[Stake], want: Want, excluded: frozenset[int]) -> Answer | None:
        """The cheapest leases of a node without which one pod of the want fits there."""
        if not want.allowed_on(node.facts):
            return None
        left_out = frozenset(id(victim) for victim, _ in here) & excluded if excluded else excluded
        key = "victims", want.model, want.profile, want.count, want.needs.amount, left_out
        if key not in node.answers:
            free = [one for one in here if not one.victim.cause and id(one.victim) not in left_out]
            node.answers[key] = cheapest(node, free, want)
        answer: Answer | None = node.answers[key]
        return answer

    def _victim(self, stock: Stock) -> Victim:
        lease, told = stock.lease, stock.lease.status.preemption
        at = told.at if told is not None else None
        runs = lease.open_record is not None or not stock.pending
        notice = notice_of(lease, self._limits) if runs else timedelta()
        cost = 0 if told is not None else 1 + self._lost_work(stock, notice)
        return Victim(stock, tuple(self._parts(stock)), cost, notice, at)

    def _lost_work(self, stock: Stock, notice: timedelta) -> int:
        """Slice-seconds that it has run without a break; none, where it ends before it would have to go."""
        record, end = stock.lease.open_record, expiry(stock.lease, stock.term)
        if record is None or (end is not None and end <= self._now + notice):
            return 0
        slices = holding(record.spec.profile, len(record.spec.devices)).memory_slices
        return slices * seconds_between(record.spec.billable_from, self._now)

    def _parts(self, stock: Stock) -> Iterator[Part]:
        """What a lease has of each node on which anything can be planned."""
        per_pod, count = needs_of(stock.lease).amount, stock.lease.spec.gpus.count
        devices: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for facts, slot in stock.held:
            if (gpu := facts.gpu_of.get(slot.gpu)) is not None:
                devices[facts.name].append((slot.gpu, device_mask(gpu.model, slot.profile, slot.start)))
        for name, found in devices.items():
            node, masks = self._world.nodes[name], defaultdict[GpuBook, int](int)
            for uuid, mask in found:
                masks[node.gpus[uuid]] |= mask
            if not node.objection:
                yield Part(node, masks, per_pod.of(-(-len(found) // count)))

    # --- what becomes of them -----------------------------------------------------------------------------------------

    def told(self) -> dict[str, Outlook]:
        """By UID, what becomes of those that have notice now; who has had all of his, ends."""
        if "_victims" not in self.__dict__:
            return {}  # nobody has asked
        return {victim.stock.lease.uid: self._outlook(victim) for victim in self._victims if victim.cause}

    def _outlook(self, victim: Victim) -> Outlook:
        stock, at = victim.stock, victim.at or self._now
        notice = Preemption(at=at, cause=victim.cause)
        if at <= self._now and stock.lease.open_record is not None:
            stock = stock._replace(ending=Ending(at, Reason.PREEMPTED, f"Its GPUs were taken at {format_time(at)}."))
        return outlook(stock, self._now)._replace(preemption=notice)


PENDING: Final = "?"
"""Cause of a victim while it is not known yet whether it is needed."""


def _can_be_taken(stock: Stock) -> bool:
    """A spot lease that has its devices and goes on, as far as is known."""
    if stock.lease.spec.tier is not PREEMPTIBLE or not stock.keeps or stock.lease.unreadable:
        return False
    return stock.ending is None and stock.stuck is None and not (stock.over or stock.hidden or stock.lease.invalid)


def _cost(victim: Victim) -> int:
    return victim.cost


def _total(found: tuple[Want, Sequence[Victim]]) -> tuple[int, int]:
    return sum(map(_cost, found[1])), len(found[1])


def _names(nodes: Iterable[NodeBook]) -> list[str]:
    return [node.facts.name for node in nodes]
