"""Leases that stay as they are: remembered with their facts, so that a plan looks only at what has changed. Pure.

Of a large fleet hardly anything changes from one plan to the next. A lease that is billed and of which nothing follows
rests: what was found out about it holds as long as its own facts and those of its nodes are the same objects (a
heartbeat apart), and until the instant at which time alone changes something. Where nothing is remembered, a plan comes
to the same result; it only takes longer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
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

NEVER: Final = datetime.max.replace(tzinfo=UTC)


class Rest(NamedTuple):
    """What is known of a lease that stays as it is."""

    stock: Stock
    """With the facts of its nodes as they were when it was remembered: their `agent_until` may be an older one."""
    outlook: Outlook
    nodes: tuple[tuple[str, object], ...]
    """Names of its nodes, and what is the same object as long as their facts are the same."""
    lasts: int
    """The span that it lasts (`desirability.span`)."""
    since: datetime
    until: datetime
    """It holds from `since` on, and before this."""
    wake: datetime
    """When something happens to it next though nobody does anything; `NEVER`: never."""


class Stocks:
    """The stocks of all leases of one plan."""

    def __init__(self, moving: list[Stock], resting: list[Rest]) -> None:
        self.moving = moving
        """Of those that something may have happened to, in the order of their age."""
        self.resting = resting
        """Of those that stay as they are, in the order of the snapshot."""

    @cached_property
    def decided(self) -> list[Stock]:
        """Those that move and of which something may be decided. Of a lease whose status cannot be read nothing is: its
        devices stay, and it has no outlook."""
        return [stock for stock in self.moving if not stock.lease.unreadable]

    @cached_property
    def all(self) -> list[Stock]:
        """Both, in the order of their age."""
        return _by_age([*self.moving, *(rest.stock for rest in self.resting)])

    @cached_property
    def _by_tier(self) -> Mapping[Tier, list[Stock]]:
        found: dict[Tier, list[Stock]] = defaultdict(list)
        for stock in self.moving:
            found[stock.lease.spec.tier].append(stock)
        for rest in self.resting:
            found[rest.stock.lease.spec.tier].append(rest.stock)
        return found

    def of_tier(self, tier: Tier) -> list[Stock]:
        """Those of a tier, in the order of their age."""
        return _by_age(self._by_tier.get(tier, ()))

    def on_nodes(self) -> Mapping[str, list[Rest]]:
        """Those at rest, by name of the node; a gang is on several."""
        found: dict[str, list[Rest]] = defaultdict(list)
        for rest in self.resting:
            for name, _ in rest.nodes:
                found[name].append(rest)
        return found


def sort_out(snapshot: Snapshot, now: datetime) -> tuple[list[LeaseFacts], list[Rest]]:
    """The leases that something may have happened to, and what is known of all others."""
    sound = {facts.name: facts.answers for facts in snapshot.nodes if not unreachable(facts, now)}
    holders = Counter[str]()
    for facts in snapshot.nodes:
        holders.update(facts.holders)
    moving: list[LeaseFacts] = []
    resting: list[Rest] = []
    for lease in snapshot.leases:
        rest = lease.rest
        if (
            isinstance(rest, Rest)
            and rest.since <= now < rest.until
            and holders[lease.uid] == len(rest.nodes)
            and _are(rest.nodes, sound)
        ):
            resting.append(rest)
        else:
            moving.append(lease)
    if snapshot.failures:
        moving += [rest.stock.lease for rest in resting if rest.stock.lease.uid in snapshot.failures]
        resting = [rest for rest in resting if rest.stock.lease.uid not in snapshot.failures]
    return moving, resting


def _are(nodes: tuple[tuple[str, object], ...], sound: Mapping[str, object]) -> bool:
    for name, answers in nodes:  # noqa: SIM110  (a third of the time that `all` takes)
        if sound.get(name) is not answers:
            return False
    return True


def remember(stock: Stock, outlook: Outlook, now: datetime) -> None:
    """Note what was found out about a lease with its facts, if it rests."""
    if not _rests(stock, outlook, now):
        return
    nodes = {node.name: node.answers for node, _ in stock.held}
    left, ends = time_left(stock, now), outlook.expires_at
    lasts, until, wake = span(left), NEVER, NEVER
    if ends is not None:
        notice = ends - parse_duration(stock.lease.spec.term.notice)
        wake = notice if notice > now else ends
        until = wake if left is None else min(wake, now + left - shortest(lasts) + _TICK)
    stock.lease.remember(Rest(stock, outlook, tuple(nodes.items()), lasts, now, until, wake))


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
