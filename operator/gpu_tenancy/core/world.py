"""World: the planner's mutable working copy of the cluster. Lives for one call of `plan` only.

Holds what leases take of each GPU (hard), which miners are there (soft: they yield) and what is still draining, and
keeps GPUs in buckets by that state, so that a decision looks at the few distinct states and not at every GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final, NamedTuple

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.node import Gpu, GpuMode, ObservedSlot, Slot
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import Placement, filling, highest_start, mask_of
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
                    book.miners |= {Placement(slot.profile, slot.start)}
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
        for remaining in range(want.pods, 0, -1):
            seat = self._whole_seat(want) if want.profile == FULL else self._slice_seat(want, remaining)
            if seat is None:
                self._undo(want, seats, before)
                return None
            before.extend((book, book.hard, book.miners, book.draining) for book in seat.gpus)
            self._take(want, seat)
            seats.append(seat)
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

    def _whole_seat(self, want: Want) -> Seat | None:
        buckets = self._wholes.get(want.model, {})
        offers = [
            (_whole_cost(state, want.count), state.total, state)
            for state, bucket in buckets.items()
            if bucket and state.total >= want.count
        ]
        for _, _, state in sorted(offers):
            for node in buckets[state]:
                if self._fits(node, want.needs):
                    return Seat(node, _pick(node, want), 0)
        return None

    def _slice_seat(self, want: Want, remaining: int) -> Seat | None:
        buckets = self._slices.get(want.model, {})
        wanted = min(remaining, MOST_DEVICES)
        offers = [
            (offer, state)
            for state, bucket in buckets.items()
            if bucket.books and (offer := bucket.offer(want.profile, wanted)) is not None
        ]
        for offer, state in sorted(offers, key=_best_first):
            for book in buckets[state].books:
                if self._fits(book.node, want.needs):
                    return Seat(book.node, (book,), -offer.minus_start)
        return None

    def _take(self, want: Want, seat: Seat) -> None:
        self._unfile(seat.node, seat.gpus)
        for book in seat.gpus:
            bits = _bits(book.gpu.model, want.profile, seat.start)
            book.hard |= bits
            book.draining &= ~bits
            book.miners &= _kept_miners(book)
        seat.node.free -= want.needs.amount
        self._file(seat.node, seat.gpus)

    def _undo(self, want: Want, seats: list[Seat], before: list[_Former]) -> None:
        for seat in seats:
            self._unfile(seat.node, seat.gpus)
        for book, hard, miners, draining in reversed(before):
            book.hard, book.miners, book.draining = hard, miners, draining
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


_Former = tuple[GpuBook, int, frozenset[Placement], int]
"""A GPU with the hard mask, miners and draining mask it had before a seat was taken."""

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
    """What a seat on a GPU of some state costs; the smallest is the best."""

    cost: int
    free_slices: int
    minus_start: int


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


def _best_first(pair: tuple[_Offer, _GpuState]) -> _Offer:
    return pair[0]


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
def _offer(state: _GpuState, profile: str, wanted: int) -> _Offer | None:
    """Best seat for the profile on a GPU of that state. With several pods wanted the cost is the average over as many
    as the GPU can take at best, so that one wide miner yields before several narrow ones do."""
    hard, cost, best, first = state.hard, 0, None, None
    for taken in range(1, wanted + 1):
        step = _cheapest_start(state, profile, hard)
        if step is None:
            break
        start, cost = step
        first = start if first is None else first
        hard |= _bits(state.model, profile, start)
        average = cost * _COMMON // taken
        best = average if best is None else min(best, average)
    if best is None or first is None:
        return None
    return _Offer(best, WHOLE_MASK.bit_count() - state.hard.bit_count(), -first)


def _cheapest_start(state: _GpuState, profile: str, hard: int) -> tuple[int, int] | None:
    """(start, total cost of everything then displaced) of the least disturbing start; the highest among equals."""
    if highest_start(state.model, profile, hard) is None:
        return None
    starts = [s for s in of_model(state.model)[profile].starts if not hard & _bits(state.model, profile, s)]
    costs = [(_disturbance(state, hard | _bits(state.model, profile, start)), -start) for start in starts]
    cost, minus_start = min(costs)
    return -minus_start, cost


def _disturbance(state: _GpuState, hard: int) -> int:
    kept = filling(state.model, hard)
    evicted = sum(1 for miner in state.miners if miner not in kept)
    return evicted * MINER_COST + (DRAINING_COST if hard & state.draining else 0)


def _kept_miners(book: GpuBook) -> frozenset[Placement]:
    return frozenset(filling(book.gpu.model, book.hard)) if book.mig else frozenset()


@lru_cache(maxsize=4096)
def _bits(model: str, profile: str, start: int) -> int:
    if profile == FULL:
        return WHOLE_MASK
    return mask_of(model, Placement(profile, start)) if profile in of_model(model) else WHOLE_MASK
