"""Which miners stop and which start, so that one runs on every device that a pool holds in the plan. Pure.

Of a node on which nothing changes it was found out before, and is remembered with its facts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Final, NamedTuple

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core.actions import Action, PoolOutlook, StartMiner, StopMiner
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.snapshot import MinerFacts, NodeFacts, Snapshot
from gpu_tenancy.core.writes import Slots

MINER_GRACE_SECONDS: Final = 1
"""Grace of a miner whose pool is gone and cannot be asked."""


class Crew:
    """The miners that there are beside the devices that pools hold in the plan, node by node."""

    def __init__(self, snapshot: Snapshot, slots: Slots) -> None:
        self._snapshot = snapshot
        self._assigned = Counter[str]()
        """Devices that pools hold, by UID of the pool."""
        self._running = Counter[str]()
        self._stops: list[MinerFacts] = []
        self._starts: list[_Gap] = []
        made_from = {pool.uid: revision(pool.spec) for pool in snapshot.pools if not pool.invalid}
        by_node: dict[str, list[MinerFacts]] = defaultdict(list)
        for miner in snapshot.miners:
            by_node[miner.node].append(miner)
        for node in snapshot.nodes:
            self._count(_shift(node, slots[node.name], by_node.pop(node.name, []), made_from))
        for left in by_node.values():
            self._count(_look_at((), left, made_from))

    def _count(self, shift: _Shift) -> None:
        self._assigned.update(shift.assigned)
        self._running.update(shift.running)
        self._stops += shift.stops
        self._starts += shift.starts

    def stops(self) -> Iterator[Action]:
        """Miners whose device is no longer their pool's, and those that have stopped for good and must be replaced."""
        grace = {pool.uid: pool.spec.grace_seconds for pool in self._snapshot.pools}
        for miner in sorted(self._stops, key=attrgetter("node", "device")):
            yield StopMiner(miner, grace.get(miner.pool, MINER_GRACE_SECONDS))

    def starts(self) -> Iterator[Action]:
        """A miner for every device that a pool holds, or the half of it that is missing. What the API server refuses a
        pool is refused for all of its miners, but for a name that somebody else has."""
        snapshot = self._snapshot
        refused = {uid for uid, failure in snapshot.failures.items() if failure.reason != Reason.NAME_TAKEN}
        pools = {pool.uid: pool for pool in snapshot.pools if pool.uid not in refused}
        for node, slot, half in sorted(self._starts, key=lambda gap: (gap.node, gap.slot.device)):
            pool = pools.get(slot.holder.uid)
            if pool is not None and half is None:
                yield StartMiner(pool, node, slot)
            elif pool is not None and half is not None and not (half.deleting or half.finished):
                yield StartMiner(pool, node, slot, half.claim_uid, not half.pod_uid)

    def pools(self) -> tuple[PoolOutlook, ...]:
        """How many devices each pool holds, and on how many of them its miner runs."""
        return tuple(
            PoolOutlook(pool, self._assigned[pool.uid], self._running[pool.uid]) for pool in self._snapshot.pools
        )


class _Gap(NamedTuple):
    """A device of a pool that has no miner, or half of one: a pod without its claim, a claim without its pod."""

    node: str
    slot: Slot
    half: MinerFacts | None


class _Shift(NamedTuple):
    """What there is to be said of the miners of one node."""

    miners: Sequence[MinerFacts]
    made_from: Mapping[str, str]
    """Revision of what each pool's miners should be made from, by its UID."""
    assigned: Mapping[str, int] = {}
    running: Mapping[str, int] = {}
    stops: Sequence[MinerFacts] = ()
    starts: Sequence[_Gap] = ()


def _shift(
    node: NodeFacts, wanted: tuple[Slot, ...], miners: Sequence[MinerFacts], made_from: Mapping[str, str]
) -> _Shift:
    """Of a node on which nothing changes it is remembered."""
    still = wanted is node.slots
    known = node.answers.get(_SHIFT) if still else None
    if isinstance(known, _Shift) and _are(known.miners, miners) and known.made_from == made_from:
        return known
    held = tuple(node.mined.values()) if still else _of_pools(wanted)
    found = _look_at([(node.name, slot) for slot in held], miners, made_from)
    if node.unreadable:  # nobody knows who should mine there
        found = found._replace(stops=(), starts=())
    if still:
        node.answers[_SHIFT] = found
    return found


_SHIFT: Final = "miners"


def _are(some: Sequence[object], others: Sequence[object]) -> bool:
    """The very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def _of_pools(slots: Iterable[Slot]) -> tuple[Slot, ...]:
    return tuple(slot for slot in slots if slot.holder.kind is HolderKind.MINING_POOL)


def _look_at(held: Sequence[tuple[str, Slot]], miners: Sequence[MinerFacts], made_from: Mapping[str, str]) -> _Shift:
    """`held`: devices of pools, with the name of their node."""
    places = {slot.device: slot for _, slot in held}
    running = Counter(miner.pool for miner in miners if miner.running and miner.device in places)
    halves = {miner.device: miner for miner in miners if not (miner.pod_uid and miner.claim_uid)}
    complete = {miner.device for miner in miners if miner.pod_uid and miner.claim_uid}
    return _Shift(
        miners,
        made_from,
        Counter(slot.holder.uid for slot in places.values()),
        running,
        [miner for miner in miners if _goes(miner, miner.device in places, made_from)],
        [_Gap(name, slot, halves.get(slot.device)) for name, slot in held if slot.device not in complete],
    )


def _goes(miner: MinerFacts, wanted: bool, made_from: Mapping[str, str]) -> bool:
    unwanted = not wanted or miner.finished or miner.bereft
    outdated = miner.pod_uid and miner.revision != made_from.get(miner.pool, miner.revision)
    return bool((unwanted or outdated) and (miner.bereft or not miner.deleting))
