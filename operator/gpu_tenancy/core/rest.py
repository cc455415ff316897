"""Leases that stay as they are: remembered with their facts, so that a plan looks only at what has changed. Pure.

Of a large fleet hardly anything changes from one plan to the next. A lease that is billed and of which nothing follows
rests: what was found out about it holds as long as its own facts and those of its nodes are the same objects (a
heartbeat apart), and until the instant at which time alone changes something. Where nothing is remembered, a plan comes
to the same result; it only takes longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Final, NamedTuple

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.api.lease import Tier
from gpu_tenancy.core import writes
from gpu_tenancy.core.actions import Outlook
from gpu_tenancy.core.desirability import shortest, span
from gpu_tenancy.core.ordering import rank
from gpu_tenancy.core.snapshot import LeaseFacts, Snapshot
from gpu_tenancy.core.stock import Stock, time_left, unreachable
from gpu_tenancy.core.tenancy import Holding, holding
from gpu_tenancy.core.timetable import Span

NEVER: Final = datetime.max.replace(tzinfo=UTC)


class Rest(NamedTuple):
    """What is known of a lease that stays as it is."""

    stock: Stock
    """With the facts of its nodes as they were when it was remembered: their `agent_until` may be an older one."""
    outlook: Outlook
    node: str
    """Its node, or the first of them."""
    answers: object
    """The same object as long as the facts of that node are the same."""
    others: tuple[tuple[str, object], ...]
    """The same of its further nodes."""
    tier: Tier
    namespace: str
    billed: Billed
    lasts: int
    """The span that it lasts (`desirability.span`)."""
    since: datetime
    until: datetime
    """It holds from `since` on, and before this."""
    spans: list[tuple[str, Span]]
    """What it has of each GPU, by UUID, and until when; empty until somebody has asked (core.bookings)."""
    wake: datetime
    """When something happens to it next though nobody does anything; `NEVER`: never."""


class Billed(NamedTuple):
    """What a lease has and is billed for."""

    holds: Holding
    slices: int
    """Memory slices of its open segment; 0 where it has none."""
    since: float
    """Start of that, in seconds since 1970."""


def billed(stock: Stock) -> Billed:
    """What a lease holds and is billed for now."""
    record = stock.lease.open_record
    holds = _held(stock) if stock.keeps else Holding()
    if record is None:
        return Billed(holds, 0, 0.0)
    spec = record.spec
    slices = holding(spec.profile, len(spec.devices)).memory_slices
    return Billed(holds, slices, spec.billable_from.timestamp())


def _held(stock: Stock) -> Holding:
    """What a lease that keeps its devices holds, all of one profile; where a node cannot be read, all it asks for."""
    if stock.hidden:
        return holding(stock.lease.spec.gpus.profile, stock.lease.devices)
    return holding(stock.held[0][1].profile, len(stock.held)) if stock.held else Holding()


OnNodes = Mapping[str, list[Rest]]
"""Those at rest, by name of the node; a gang is on several."""


class Stocks:
    """The stocks of all leases of one plan."""

    def __init__(self, moving: list[Stock], resting: list[Rest], on_nodes: OnNodes) -> None:
        self.moving = moving
        """Of those that something may have happened to, in the order of their age."""
        self.resting = resting
        """Of those that stay as they are, in the order of the snapshot."""
        self.on_nodes = on_nodes
        """The same."""

    @cached_property
    def decided(self) -> list[Stock]:
        """Those that move and of which something may be decided. Of a lease whose status cannot be read nothing is: its
        devices stay, and it has no outlook."""
        return [stock for stock in self.moving if not stock.lease.unreadable]

    @cached_property
    def all(self) -> list[Stock]:
        """Both, in the order of their age."""
        return _by_age([*self.moving, *(rest.stock for rest in self.resting)])

    def of_tier(self, tier: Tier) -> list[Stock]:
        """Those of a tier, in the order of their age."""
        moving = [stock for stock in self.moving if stock.lease.spec.tier is tier]
        return _by_age([*moving, *(rest.stock for rest in self.resting if rest.tier is tier)])

    def billed(self) -> Iterator[tuple[str, list[Billed]]]:
        """What all leases of a namespace hold and are billed for."""
        found: dict[str, list[Billed]] = defaultdict(list)
        for stock in self.moving:
            found[stock.lease.key.namespace].append(billed(stock))
        for rest in self.resting:
            found[rest.namespace].append(rest.billed)
        return iter(found.items())


class Sorted(NamedTuple):
    """The leases of a snapshot."""

    moving: list[LeaseFacts]
    """Those that something may have happened to."""
    resting: list[Rest]
    """What is known of all others."""
    on_nodes: OnNodes


def sort_out(snapshot: Snapshot, now: datetime) -> Sorted:
    """Which leases may have to be looked at, and what is known of the others."""
    sound = {facts.name: facts.answers for facts in snapshot.nodes if not unreachable(facts, now)}
    failures = snapshot.failures
    moving: list[LeaseFacts] = []
    resting: list[Rest] = []
    for lease in snapshot.leases:
        rest: Rest | None = lease.rest
        if (
            rest is not None
            and rest.since <= now < rest.until
            and sound.get(rest.node) is rest.answers
            and not (rest.others and any(sound.get(name) is not answers for name, answers in rest.others))
            and not (failures and lease.uid in failures)
        ):
            resting.append(rest)
        else:
            moving.append(lease)
    on_nodes = _by_node(resting)
    elsewhere = _elsewhere(snapshot, on_nodes)
    if elsewhere.isdisjoint(rest.stock.lease.uid for rest in resting):
        return Sorted(moving, resting, on_nodes)
    moving += [rest.stock.lease for rest in resting if rest.stock.lease.uid in elsewhere]
    resting = [rest for rest in resting if rest.stock.lease.uid not in elsewhere]
    return Sorted(moving, resting, _by_node(resting))


def _elsewhere(snapshot: Snapshot, on_nodes: OnNodes) -> set[str]:
    """UIDs of leases that have something on a node on which they do not rest; all those that do not rest anywhere, too.
    What is on a node where as many rest as have something of it is theirs."""
    found: set[str] = set()
    for facts in snapshot.nodes:
        rests = on_nodes.get(facts.name, ())
        if len(rests) != len(facts.holders):
            found |= facts.holders.difference(rest.stock.lease.uid for rest in rests)
    return found


def _by_node(resting: Iterable[Rest]) -> OnNodes:
    found: dict[str, list[Rest]] = defaultdict(list)
    for rest in resting:
        found[rest.node].append(rest)
        for name, _ in rest.others:
            found[name].append(rest)
    return found


def remember(stock: Stock, outlook: Outlook, now: datetime) -> None:
    """Note what was found out about a lease with its facts, if it rests."""
    if not _rests(stock, outlook, now):
        return
    (node, answers), *others = {node.name: node.answers for node, _ in stock.held}.items()
    left, ends = time_left(stock, now), outlook.expires_at
    lasts, until, wake = span(left), NEVER, NEVER
    if ends is not None:
        notice = ends - parse_duration(stock.lease.spec.term.notice)
        wake = notice if notice > now else ends
        until = wake if left is None else min(wake, now + left - shortest(lasts) + _TICK)
    lease = stock.lease
    known = lease.spec.tier, lease.key.namespace, billed(stock)
    lease.remember(Rest(stock, outlook, node, answers, tuple(others), *known, lasts, now, until, [], wake))


_TICK: Final = timedelta(microseconds=1)
"""What lasts exactly as long as its span at least does, still has it."""


def _rests(stock: Stock, outlook: Outlook, now: datetime) -> bool:
    """It is billed, has all of its devices and no other, and nothing follows from that whoever else does what."""
    lease, term = stock.lease, stock.term
    if lease.open_record is None or not stock.keeps or stock.ending is not None or stock.stuck is not None:
        return False
    odd = stock.over or stock.lost or stock.hidden or lease.invalid or lease.unreadable_record or not lease.finalized
    passing = lease.namespace_ends or lease.status.preemption or lease.status.reservation or outlook.silent
    in_force = not term.refusal and term.duration == lease.status.accepted_duration
    if odd or passing or not in_force or any(record.deleting for record in lease.records):
        return False
    held = {(node.name, slot.device) for node, slot in stock.held}
    foreign = any(device not in held for claim in lease.claims for device in claim.devices)
    if held != stock.seen.keys() or stock.pending or foreign:
        return False
    return not any((*writes.releases(stock, now), *writes.objects(outlook, now), *writes.warnings(outlook)))


def _by_age(stocks: Iterable[Stock]) -> list[Stock]:
    return sorted(stocks, key=lambda stock: rank(stock.lease))
