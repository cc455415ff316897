"""World: the planner's mutable working copy of the cluster. Lives for one call of `plan` only.

Holds what leases take of each GPU (hard), which miners are there (soft: they yield) and what is still draining, and
keeps GPUs in buckets by that state, so that a decision looks at the few distinct states and not at every GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import combinations
from typing import Final, NamedTuple

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.node import Gpu, GpuMode, ObservedSlot, Slot
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import Placement, filling, mask_of
from gpu_tenancy.mig.profiles import FULL, of_model

WHOLE_MASK: Final = 0xFF
DRAINING_COST: Final = 10
"""Waiting for a lease that still drains may take its whole grace; ten miners are stopped sooner."""
MINER_COST: Final = 1
MOST_DEVICES: Final = 7
"""Devices that a GPU can be cut into."""
_COMMON: Final = 420
"""Least common multiple of 1…7, so that costs per pod compare as integers."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one pod of a lease needs, and how many pods there are."""

    profile: str
    count: int
    pods: int
    model: str
    needs: PodNeeds


class Seat(NamedTuple):
    """One pod's GPUs on one node."""

    node: NodeBook
    gpus: tuple[GpuBook, ...]
    start: int
    """First memory slice; 0 for whole GPUs."""


class GpuBook:
    """State of one GPU in the working copy."""

    __slots__ = ("bucket", "draining", "gpu", "hard", "mig", "miners", "node")

    def __init__(self, gpu: Gpu, node: NodeBook) -> None:
        self.gpu = gpu
        self.node = node
        self.mig = gpu.mode is GpuMode.MIG
        """In MIG mode."""
        self.hard = 0
        """Memory slices held by leases, as bits."""
        self.draining = 0
        """Memory slices from which a former lease has not gone yet, as bits."""
        self.miners: frozenset[Placement] = frozenset()
        """Placements that pools hold."""
        self.bucket: _SliceBucket | None = None
        """Where the GPU is filed; None: not in MIG mode, or nothing may be planned on it."""


class NodeBook:
    """State of one node in the working copy."""

    __slots__ = ("buckets", "facts", "free", "gpus", "objection", "slots")

    def __init__(self, facts: NodeFacts, now: datetime) -> None:
        self.facts = facts
        self.objection = facts.objection(now)
        self.free: Amount = facts.allocatable - facts.foreign
        """What leases leave; miners are not counted: they yield."""
        self.gpus = {gpu.uuid: GpuBook(gpu, self) for gpu in facts.gpus}
        self.slots: list[Slot] = []
        """Devices that leases hold in the plan."""
        self.buckets: dict[str, _WholeBucket] = {}
        """Where the node is filed for its whole GPUs, by model."""


class World:
    """The cluster as the plan changes it."""

    def __init__(self, nodes: Iterable[NodeFacts], now: datetime) -> None:
        self.nodes = {facts.name: NodeBook(facts, now) for facts in sorted(nodes, key=lambda facts: facts.name)}
        self.all_models = sorted({book.gpu.model for node in self.nodes.values() for book in node.gpus.values()})
        """Models of the GPUs that are there, sorted."""
        self._slices: dict[str, dict[_GpuState, _SliceBucket]] = {model: {} for model in self.all_models}
        self._wholes: dict[str, dict[_NodeState, _WholeBucket]] = {model: {} for model in self.all_models}
        self._allowed: dict[PodNeeds, dict[str, bool]] = {}

    def hold(self, node: NodeBook, slot: Slot, amount: Amount) -> None:
        """Keep a lease's device where it is. `amount`: what its pod takes of the node, once per pod."""
        node.slots.append(slot)
        node.free -= amount
        if book := node.gpus.get(slot.gpu):
            book.hard |= _bits(book.gpu.model, slot.profile, slot.start)

    def settle(self) -> None:
        """Note miners and draining devices and fill the buckets; called once, after everything held is known."""
        for node in self.nodes.values():
            kept = {slot.device for slot in node.slots}
            for observed in node.facts.observed:
                if observed.device not in kept and observed.holder.kind is HolderKind.GPU_LEASE:
                    self._drain(node, observed)
            for slot in node.facts.slots:
                book = node.gpus.get(slot.gpu)
                if book and slot.holder.kind is HolderKind.MINING_POOL:
                    book.miners = _joined(book.miners, slot.profile, slot.start)
            if not node.objection:
                self._file(node, node.gpus.values())

    def models(self, profile: str) -> list[str]:
        """Models present in the cluster that have the profile, in a fixed order."""
        return [model for model in self.all_models if profile == FULL or profile in of_model(model)]

    def place(self, want: Want) -> tuple[Seat, ...] | None:
        """Seats for all pods at the least disturbance, taken in the working copy; None (and nothing taken) if one
        pod finds none. Pods are alike, so a seat taken for one never spoils the count for the others."""
        seats: list[Seat] = []
        before: list[_Former] = []
        while (remaining := want.pods - len(seats)) > 0:
            found = self._whole_seats(want) if want.profile == FULL else self._slice_seats(want, remaining)
            if not found:
                self._undo(want, seats, before)
                return None
            for seat in found:
                before.extend((book, book.hard, book.draining) for book in seat.gpus)
                self._take(want, seat)
            seats += found
        return tuple(seats)

    def allows(self, node: NodeBook, needs: PodNeeds) -> bool:
        """Whether selectors and taints let the pod on the node at all."""
        known = self._allowed.setdefault(needs, {})
        verdict = known.get(node.facts.name)
        if verdict is None:
            facts = node.facts
            verdict = known[facts.name] = not needs.objection(facts.name, facts.labels, facts.taints)
        return verdict

    def _fits(self, node: NodeBook, needs: PodNeeds) -> bool:
        return needs.amount.at_most(node.free) and self.allows(node, needs)

    def _whole_seats(self, want: Want) -> list[Seat]:
        """The best seat for one pod of whole GPUs."""
        buckets = self._wholes.get(want.model, {})
        offers = [
            (_whole_cost(state, want.count), state.total, state)
            for state, bucket in buckets.items()
            if bucket and state.total >= want.count
        ]
        for _, _, state in sorted(offers):
            for node in buckets[state]:
                if self._fits(node, want.needs):
                    return [Seat(node, _pick(node, want), 0)]
        return []

    def _slice_seats(self, want: Want, remaining: int) -> list[Seat]:
        """The best seats for up to `remaining` pods on one MIG GPU.

        What a bucket's GPUs offer is first taken as if their nodes had room for all pods; one whose roomiest node has
        less is asked again for as many as that, and has to wait its turn.
        """
        most = min(remaining, MOST_DEVICES)
        buckets = enumerate(self._slices.get(want.model, {}).values())
        offers: list[tuple[_Offer, int, _SliceBucket, GpuBook | None]] = [
            (offer, number, bucket, None)
            for number, bucket in buckets
            if bucket.books and (offer := bucket.offer(want.profile, most)) is not None
        ]
        heapify(offers)
        while offers:
            offer, number, bucket, book = heappop(offers)
            if book is None:
                room, book = self._roomiest(bucket, want.needs, len(offer.minus_starts))
                if book is not None and room < len(offer.minus_starts):
                    fewer = bucket.offer(want.profile, room) or offer
                    heappush(offers, (fewer, number, bucket, book))
                    continue
            if book is not None:
                return [Seat(book.node, (book,), -start) for start in offer.minus_starts]
        return []

    def _roomiest(self, bucket: _SliceBucket, needs: PodNeeds, pods: int) -> tuple[int, GpuBook | None]:
        """The first GPU whose node has room for that many pods, or that whose node has room for most."""
        most, best = 0, None
        for book in bucket.books:
            if not self._fits(book.node, needs):
                continue
            room = 1 if pods == 1 else book.node.free.times(needs.amount)
            if room >= pods:
                return pods, book
            if room > most:
                most, best = room, book
        return most, best

    def _take(self, want: Want, seat: Seat) -> None:
        self._unfile(seat.node, seat.gpus)
        for book in seat.gpus:
            bits = _bits(book.gpu.model, want.profile, seat.start)
            book.hard |= bits
            book.draining &= ~bits
        seat.node.free -= want.needs.amount
        self._file(seat.node, seat.gpus)

    def _undo(self, want: Want, seats: list[Seat], before: list[_Former]) -> None:
        for seat in seats:
            self._unfile(seat.node, seat.gpus)
        for book, hard, draining in reversed(before):
            book.hard, book.draining = hard, draining
        for seat in seats:
            seat.node.free += want.needs.amount
        for seat in seats:
            self._file(seat.node, seat.gpus)

    def _drain(self, node: NodeBook, observed: ObservedSlot) -> None:
        if book := node.gpus.get(observed.gpu):
            book.draining |= _bits(book.gpu.model, observed.profile, observed.start) & ~book.hard

    def _file(self, node: NodeBook, books: Iterable[GpuBook]) -> None:
        """Enter GPUs of a node into the buckets of their present state."""
        models = set()
        for book in books:
            if not book.mig:
                models.add(book.gpu.model)
            elif book.gpu.healthy:
                state = _gpu_state(book)
                buckets = self._slices[state.model]
                book.bucket = buckets.get(state) or buckets.setdefault(state, _SliceBucket(state))
                book.bucket.books[book] = None
        for model in models:
            node.buckets[model] = self._wholes[model].setdefault(_node_state(node, model), {})
            node.buckets[model][node] = None

    def _unfile(self, node: NodeBook, books: Iterable[GpuBook]) -> None:
        """Take GPUs of a node out of their buckets; harmless when repeated."""
        for book in books:
            if book.bucket is not None:
                book.bucket.books.pop(book, None)
            elif not book.mig:
                node.buckets[book.gpu.model].pop(node, None)


_Former = tuple[GpuBook, int, int]
"""A GPU with the hard and draining masks it had before a seat was taken."""

_WholeBucket = dict[NodeBook, None]
"""Nodes that are interchangeable for whole GPUs, in the order in which they came to be so."""


class _GpuState(NamedTuple):
    """What makes two MIG GPUs interchangeable for a decision."""

    model: str
    hard: int
    draining: int
    miners: frozenset[Placement]


class _NodeState(NamedTuple):
    """What makes two nodes interchangeable for whole GPUs."""

    model: str
    idle: int
    mining: int
    draining: int

    @property
    def total(self) -> int:
        """Whole GPUs that no lease holds."""
        return self.idle + self.mining + self.draining


class _Offer(NamedTuple):
    """What seats on a GPU of some state cost; the smallest is the best."""

    cost: int
    """Per pod, in units of 1/420."""
    free_slices: int
    minus_starts: tuple[int, ...]
    """Where the devices begin, negated so that the highest comes first; one for each pod."""


class _SliceBucket:
    """MIG GPUs that are interchangeable, in the order in which they came to be so, and what they offer."""

    __slots__ = ("_offers", "books", "state")

    def __init__(self, state: _GpuState) -> None:
        self.state = state
        self.books: dict[GpuBook, None] = {}
        self._offers: dict[tuple[str, int], _Offer | None] = {}

    def offer(self, profile: str, wanted: int) -> _Offer | None:
        """The best seat on any of them; see `_offer`."""
        key = (profile, wanted)
        if key not in self._offers:
            self._offers[key] = _offer(self.state, profile, wanted)
        return self._offers[key]


@lru_cache(maxsize=4096)
def _joined(miners: frozenset[Placement], profile: str, start: int) -> frozenset[Placement]:
    return miners | {Placement(profile, start)}


def _gpu_state(book: GpuBook) -> _GpuState:
    return _GpuState(book.gpu.model, book.hard, book.draining, book.miners)


def _node_state(node: NodeBook, model: str) -> _NodeState:
    idle = mining = draining = 0
    for book in node.gpus.values():
        if book.mig or book.hard or not book.gpu.healthy or book.gpu.model != model:
            continue
        if book.draining:
            draining += 1
        elif book.miners:
            mining += 1
        else:
            idle += 1
    return _NodeState(model, idle, mining, draining)


def _whole_cost(state: _NodeState, count: int) -> int:
    mined = max(0, count - state.idle)
    drained = max(0, mined - state.mining)
    return (mined - drained) * MINER_COST + drained * DRAINING_COST


def _pick(node: NodeBook, want: Want) -> tuple[GpuBook, ...]:
    """The least disturbed free GPUs of the node; among equals the highest index, to leave the low ones together."""
    free = [
        book
        for book in node.gpus.values()
        if not (book.mig or book.hard) and book.gpu.healthy and book.gpu.model == want.model
    ]
    free.sort(key=lambda book: (bool(book.draining), bool(book.miners), -book.gpu.index))
    return tuple(free[: want.count])


@lru_cache(maxsize=65536)
def _offer(state: _GpuState, profile: str, most: int) -> _Offer | None:
    """The best seats for one to `most` pods on a GPU of that state: least cost per pod, so that one wide miner yields
    before several narrow ones do; then as many pods as possible, at the highest starts."""
    free = [
        start for start in of_model(state.model)[profile].starts if not state.hard & _bits(state.model, profile, start)
    ]
    before = _disturbance(state, state.hard)
    offers = [
        (
            (_disturbance(state, state.hard | _union(state.model, profile, starts)) - before) * _COMMON // pods,
            -pods,
            starts,
        )
        for pods in range(1, most + 1)
        for starts in combinations([-start for start in reversed(free)], pods)
    ]
    if not offers:
        return None
    cost, _, minus_starts = min(offers)
    return _Offer(cost, WHOLE_MASK.bit_count() - state.hard.bit_count(), minus_starts)


def _union(model: str, profile: str, minus_starts: Iterable[int]) -> int:
    mask = 0
    for start in minus_starts:
        mask |= _bits(model, profile, -start)
    return mask


def _disturbance(state: _GpuState, hard: int) -> int:
    """Cost of everything that cannot stay where leases hold `hard`."""
    kept = filling(state.model, hard)
    evicted = sum(1 for miner in state.miners if miner not in kept)
    return evicted * MINER_COST + (DRAINING_COST if hard & state.draining else 0)


@lru_cache(maxsize=4096)
def _bits(model: str, profile: str, start: int) -> int:
    if profile == FULL:
        return WHOLE_MASK
    return mask_of(model, Placement(profile, start)) if profile in of_model(model) else WHOLE_MASK
