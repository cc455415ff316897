"""Who mines where: the miners' share is a function of what leases leave, so it is never searched for.

On each GPU the free slices are filled by the one layout that `filling` names; a device goes to the best pool that may
use it. A miner that is already there stays as long as its placement is still part of that layout and no pool of a
higher priority wants the device. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import Final, NamedTuple

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import Slot
from gpu_tenancy.api.pool import Devices, MiningPoolSpec
from gpu_tenancy.core.amounts import Amount, cpu_milli, memory_bytes
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts, PoolFacts
from gpu_tenancy.mig.layout import Placement

_NEVER: Final = datetime(1, 1, 1, tzinfo=UTC)
"""No slot that is there was decided then: one that has to be made is told from it."""


@dataclass(frozen=True, slots=True)
class Miner:
    """What decides about where a pool mines, and what each of its miners takes of a node."""

    holder: Holder
    priority: int
    devices: Devices
    needs: PodNeeds

    def __hash__(self) -> int:
        return hash(self.holder.uid)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Miner) and self._key == other._key)

    @property
    def _key(self) -> tuple[object, ...]:
        holder = self.holder
        return holder.uid, holder.namespace, holder.name, self.priority, self.devices, self.needs


def revision(spec: MiningPoolSpec) -> str:
    """Hash of what a miner's pod and claim are made from; where, when and how gently it runs and stops is not."""
    parts = spec.model_dump_json(exclude={"devices", "priority", "node_selector", "suspend", "grace_seconds"})
    return sha256(parts.encode()).hexdigest()[:10]


def ranked(pools: Iterable[PoolFacts]) -> tuple[Miner, ...]:
    """Pools that may mine at all, best first: highest priority, then oldest."""
    active = [pool for pool in pools if pool.active]
    active.sort(key=lambda pool: (-pool.spec.priority, pool.created, pool.key))
    return _interned(tuple(map(_miner, active)))


@lru_cache(maxsize=8)
def _interned(miners: tuple[Miner, ...]) -> tuple[Miner, ...]:
    """The same object for the same miners: what was found out with them is asked about for every node."""
    return miners


def _miner(pool: PoolFacts) -> Miner:
    spec = pool.spec
    holder = Holder(kind=HolderKind.MINING_POOL, namespace=pool.key.namespace, name=pool.key.name, uid=pool.uid)
    amount = Amount(cpu_milli(spec.resources.cpu), memory_bytes(spec.resources.memory), 1)
    needs = PodNeeds(amount, node_selector=tuple(sorted(spec.node_selector.items())))
    return Miner(holder, spec.priority, spec.devices, needs)


def wanted_slots(node: NodeBook, miners: tuple[Miner, ...], now: datetime) -> tuple[Slot, ...]:
    """The devices that should exist on a node after leases have been placed in the working copy, ordered by name: what
    leases hold, and what pools get of the rest. On a node that cannot be read they are what they were."""
    facts = node.facts
    if facts.unreadable:
        return facts.slots
    if not (node.awaited or node.objection) and _stays(node, miners):
        return facts.slots
    return tuple(sorted((*node.slots, *miner_slots(node, miners, now)), key=by_device))


def _stays(node: NodeBook, miners: tuple[Miner, ...]) -> bool:
    """Whether the pools leave a node as it is on which nothing of leases has changed, as far as that was found out once
    already; of which no lease has anything, to begin with."""
    if node.still is None:
        return not (node.slots or node.facts.leased) and _stays_unleased(node.facts, miners)
    known = node.still.verdict
    if known is None or (known[0] is not miners and known[0] != miners):
        slots = (*node.slots, *miner_slots(node, miners, _NEVER))
        known = node.still.verdict = miners, tuple(sorted(slots, key=by_device)) == node.facts.slots
    return known[1]


def _stays_unleased(facts: NodeFacts, miners: tuple[Miner, ...]) -> bool:
    known = facts.answers.get(_STAYS)
    if not isinstance(known, _Verdict) or (known.miners is not miners and known.miners != miners):
        slots = miner_slots(NodeBook(facts, ""), miners, _NEVER)
        known = facts.answers[_STAYS] = _Verdict(miners, tuple(sorted(slots, key=by_device)) == facts.slots)
    return known.stays


_STAYS: Final = "stays"


class _Verdict(NamedTuple):
    """Whether the pools leave a node as it is."""

    miners: tuple[Miner, ...]
    stays: bool


def by_device(slot: Slot) -> str:
    """The order of the slots of a node."""
    return slot.device


def miner_slots(node: NodeBook, miners: Sequence[Miner], now: datetime) -> list[Slot]:
    """The slots of pools on a node after leases have been placed in the working copy.

    Where nothing may be planned on the node (cordoned, silent) or a taint keeps new pods away, miners that still fit
    stay and none is started.
    """
    facts = node.facts
    evicting = [taint for taint in facts.lasting_taints if taint.effect == "NoExecute"]
    here = [miner for miner in miners if not miner.needs.objection(facts.name, facts.labels, evicting)]
    if not here:
        return []
    kept_away = any(miner.needs.objection(facts.name, facts.labels, facts.lasting_taints) for miner in here)
    beside_leases = [miner for miner in here if miner.devices is Devices.ANY]
    free, planned = node.free, not (node.objection or kept_away)
    slots: list[Slot] = []
    vacant: list[tuple[GpuBook, Placement, Sequence[Miner]]] = []
    for book in node.gpus.values():
        # `Whole` means a whole GPU, or one in MIG mode of which nothing is rented.
        usable = beside_leases if book.hard else here
        for placement in book.places(book.hard):
            slot = book.mined_at(placement)
            keeper = _keeper(slot, usable, challenged=planned) if slot else None
            if slot and keeper and keeper.needs.amount.at_most(free):
                free -= keeper.needs.amount
                slots.append(slot)
            else:
                vacant.append((book, placement, usable))
    if vacant and planned:
        slots.extend(_fill(vacant, free, now))
    return slots


def _keeper(slot: Slot, usable: Sequence[Miner], *, challenged: bool) -> Miner | None:
    """Whose slot it is, if it may stay: on a node that is planned on, no pool of a higher priority may want it."""
    uid = slot.holder.uid
    for miner in usable:
        if miner.holder.uid == uid:
            outranked = challenged and miner.priority < usable[0].priority
            return None if outranked else miner
    return None


def _fill(places: Iterable[tuple[GpuBook, Placement, Sequence[Miner]]], free: Amount, now: datetime) -> Iterator[Slot]:
    """The best of the pools that may use it and fit takes each place; where that is the one that has it already,
    nothing changes."""
    for book, placement, usable in places:
        for miner in usable:
            if miner.needs.amount.at_most(free):
                free -= miner.needs.amount
                slot = book.mined_at(placement)
                stays = slot is not None and slot.holder.uid == miner.holder.uid
                yield slot if slot is not None and stays else _slot(miner, book, placement, now)
                break


def _slot(miner: Miner, book: GpuBook, placement: Placement, now: datetime) -> Slot:
    return Slot(
        device=device_name(book.gpu.index, placement.profile, placement.start, miner.holder.uid, 1),
        gpu=book.gpu.uuid,
        profile=placement.profile,
        start=placement.start,
        holder=miner.holder,
        since=now,
    )
