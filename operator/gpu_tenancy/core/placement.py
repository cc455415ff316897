"""Where pods go at the least disturbance: World, the planner's working copy of the cluster. Lives for one `plan` only.

Holds what leases take of each GPU (hard), which miners are there (soft: they yield) and what is still draining, and
keeps GPUs in buckets by that state, so that a decision looks at the few distinct states and not at every GPU. A node on
which no lease has anything, which is most of a large fleet, is filed as a whole; its GPUs are looked at once one of
them is taken.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final, NamedTuple

from gpu_tenancy.api.node import ObservedSlot, Slot
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.books import GpuBook, NodeBook, Promise
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.preemption import DRAINING_COST, MINER_COST, MOST_DEVICES, PER_POD, GpuState, Offer, offer, union
from gpu_tenancy.core.snapshot import NodeFacts, once_per_node
from gpu_tenancy.mig.layout import ALL_SLICES, Placement, device_mask
from gpu_tenancy.mig.profiles import FULL, of_model

NO_MINERS: Final[frozenset[Placement]] = frozenset()


@dataclass(eq=False, slots=True)
class Want:
    """What one pod of a lease needs, and how many pods there are. Leases that want the same share one."""

    profile: str
    count: int
    pods: int
    model: str
    needs: PodNeeds
    _allowed: dict[str, bool] = field(default_factory=dict)

    def allowed_on(self, facts: NodeFacts) -> bool:
        """Whether selectors and taints let the pods on the node at all."""
        verdict = self._allowed.get(facts.name)
        if verdict is None:
            verdict = self._allowed[facts.name] = not self.needs.objection(facts.name, facts.labels, facts.taints)
        return verdict


class Seat(NamedTuple):
    """One pod's GPUs on one node."""

    node: NodeBook
    gpus: tuple[GpuBook, ...]
    start: int
    """First memory slice; 0 for whole GPUs."""


class Placed(NamedTuple):
    """Seats for all pods of a lease, taken in the working copy."""

    want: Want
    cost: int
    """What stops for it: `MINER_COST` for each miner, `DRAINING_COST` for each lease whose end it waits for."""
    seats: list[Seat]
    before: list[_Former]


class World:
    """The cluster as the plan changes it."""

    def __init__(self, nodes: Iterable[NodeFacts], now: datetime, takes: Mapping[str, Amount]) -> None:
        """`takes`: what each miner of a pool takes of its node, by the pool's UID."""
        ordered = sorted(nodes, key=lambda facts: facts.name)
        self.nodes = {facts.name: NodeBook(facts, facts.objection(now)) for facts in ordered}
        self.all_models = sorted({model for facts in ordered for model in _unleased(facts).models})
        """Models of the GPUs that are there, sorted."""
        self._takes = takes
        self._full: set[Want] = set()
        """What found no room. Nothing is given back within a plan, so it finds none later either."""
        self.unseen = any(facts.unreadable and not facts.gpus for facts in ordered)
        """Some node cannot be read at all: it may have GPUs of any model."""
        self._slices: dict[GpuState, _SliceBucket] = {}
        self._rankings: dict[tuple[str, str, int], _Ranking] = {}
        self._wholes: dict[str, dict[_NodeState, _WholeBucket]] = {model: {} for model in self.all_models}
        self._models: dict[str, list[str]] = {}
        self._promised: dict[str, list[_Kept]] = {}
        """What is kept, by key."""
        self._full_without: dict[frozenset[str], set[Want]] = {}
        """What found no room even without the promises of these keys."""
        self._settled = False

    def hold(self, node: NodeBook, slot: Slot, amount: Amount) -> None:
        """Keep a lease's device where it is. `amount`: what its pod takes of the node, once per pod."""
        node.slots.append(slot)
        node.free -= amount
        if book := node.gpus.get(slot.gpu):
            book.hard |= device_mask(book.gpu.model, slot.profile, slot.start)

    def settle(self) -> None:
        """Note draining devices and fill the buckets; called once, after everything held is known."""
        for node in self.nodes.values():
            if not node.slots and not node.facts.leased_reports:
                if not node.objection:
                    self._file_untouched(node)
                continue
            kept = {slot.device for slot in node.slots}
            for observed in node.facts.leased_reports:
                if observed.device not in kept:
                    self._drain(node, observed)
            if not node.objection:
                self._file(node, node.gpus.values())
        self._settled = True

    def promise(self, node: NodeBook, book: GpuBook, promise: Promise) -> None:
        """Keep a part of a GPU: from now on nobody is placed there but in `without` its key."""
        place = node, book, promise
        self._promised.setdefault(promise.key, []).append(place)
        self._change([place], _keep)

    def release(self, key: str) -> None:
        """Keep nothing under a key any more: what found no room before may find it now."""
        self._change(self._promised.pop(key, []), _unkeep)
        self._full.clear()
        self._full_without.clear()

    @contextmanager
    def without(self, keys: Collection[str]) -> Iterator[None]:
        """Within it, what was promised under these keys is free to be taken."""
        lifted = [place for key in sorted(keys) for place in self._promised.get(key, ())]
        if not lifted:
            yield
            return
        former, self._full = self._full, self._full_without.setdefault(frozenset(keys), set())
        self._change(lifted, _unkeep)
        try:
            yield
        finally:
            self._change(lifted, _keep)
            self._full = former

    def _change(self, places: Sequence[_Kept], change: Callable[[NodeBook, GpuBook, Promise], None]) -> None:
        """Change what is promised of GPUs; once the buckets are filled, they follow."""
        filed = [(node, book) for node, book, _ in places if self._settled and not node.objection]
        for node, book in filed:
            self._unfile(node, (book,))
        for place in places:
            change(*place)
        for node, book in filed:
            node.answers.clear()
            self._file(node, (book,))

    def models(self, profile: str) -> list[str]:
        """Models present in the cluster that have the profile, in a fixed order."""
        if profile not in self._models:
            self._models[profile] = [one for one in self.all_models if profile == FULL or profile in of_model(one)]
        return self._models[profile]

    def place(self, wants: Sequence[Want]) -> Placed | None:
        """Seats for all pods of one of the wants, taken in the working copy: of the one that disturbs least, the first
        among equals. None (and nothing taken) if none finds room."""
        best: Placed | None = None
        for number, want in enumerate(wants, 1):
            if (tried := self._place(want)) is None:
                continue
            if tried.cost == 0 or (best is None and number == len(wants)):
                return tried
            self._give_back(tried)
            best = min(best or tried, tried, key=_cost)
        return self._place(best.want) if best else None

    def _place(self, want: Want) -> Placed | None:
        """Seats for all pods at the least disturbance; None if one pod finds none. Pods are alike, so a seat taken for
        one never spoils the count for the others."""
        if want in self._full:
            return None
        placed = Placed(want, 0, [], [])
        while (remaining := want.pods - len(placed.seats)) > 0:
            found = self._whole_seats(want) if want.profile == FULL else self._slice_seats(want, remaining)
            if found is None:
                self._give_back(placed)
                self._full.add(want)
                return None
            cost, seats = found
            for seat in seats:
                placed.before.extend((book, book.hard, book.draining) for book in seat.gpus)
                self._take(want, seat)
            placed.seats.extend(seats)
            placed = placed._replace(cost=placed.cost + cost)
        return placed

    def _whole_seats(self, want: Want) -> _Found | None:
        """The best seat for one pod of whole GPUs, and what it costs."""
        offers = [
            (_whole_cost(state, want.count), state.total, state)
            for state, bucket in self._wholes.get(want.model, {}).items()
            if bucket and state.total >= want.count
        ]
        least: _Found | None = None
        for cost, _, state in sorted(offers):
            if least is not None and least[0] <= cost:
                break
            for node in self._wholes[want.model][state]:
                if not _fits(node, want):
                    continue
                # Miners that lose their CPU come on top of those that lose their GPU.
                gpus, crowded = self._whole_seat(node, want)
                if least is None or cost + crowded < least[0]:
                    least = cost + crowded, [Seat(node, gpus, 0)]
                if not crowded:
                    break
        return least

    def _whole_seat(self, node: NodeBook, want: Want) -> tuple[tuple[GpuBook, ...], int]:
        """The GPUs of the node that one pod would get, and the miners that it would crowd out."""
        key = want.model, want.count, want.needs.amount
        if key not in node.answers:
            gpus = _pick(node, want)
            after = dict.fromkeys(gpus, ALL_SLICES)
            node.answers[key] = gpus, node.crowded_out(want.needs.amount, after, self._takes)
        answer: tuple[tuple[GpuBook, ...], int] = node.answers[key]
        return answer

    def _slice_seats(self, want: Want, remaining: int) -> _Found | None:
        """The best seats for up to `remaining` pods on one MIG GPU, and what they cost.

        What a bucket's GPUs offer is the least that seats there can cost: where no node has room for that many pods
        without a miner losing its CPU, they cost more, and have to be better than what the others offer.
        """
        least: tuple[Offer, int, _SliceBucket, NodeBook] | None = None
        for best, number, bucket in self._ranking(want.model, want.profile, min(remaining, MOST_DEVICES)):
            if least is not None and least[:2] < (best, number):
                break
            found, node = self._best_in(bucket, best, want)
            if found is not None and node is not None and (least is None or (found, number) < least[:2]):
                least = found, number, bucket, node
        if least is None:
            return None
        found, _, bucket, node = least
        seats = [Seat(node, (_first(bucket, node),), -start) for start in found.minus_starts]
        return found.cost * len(seats) // PER_POD, seats

    def _best_in(self, bucket: _SliceBucket, best: Offer, want: Want) -> tuple[Offer | None, NodeBook | None]:
        """The first node of the bucket where its GPUs offer what they do at best, or the one where they offer most."""
        least, host = None, None
        for node in bucket.nodes:
            if not _fits(node, want):
                continue
            key = bucket.state, want.profile, best, want.needs.amount
            found: Offer = node.answers.get(key) or self._offer(bucket, best, node, want)
            node.answers[key] = found
            if found == best:
                return found, node
            if least is None or (found.cost, -len(found.minus_starts)) < (least.cost, -len(least.minus_starts)):
                least, host = found, node
        return least, host

    def _offer(self, bucket: _SliceBucket, best: Offer, node: NodeBook, want: Want) -> Offer:
        """What a GPU of the bucket offers on a node that has room for one pod at least."""
        found, pods = best, len(best.minus_starts)
        if pods > 1 and (room := node.available.times(want.needs.amount)) < pods:
            found = offer(bucket.state, want.profile, room) or best
            pods = len(found.minus_starts)
        book = _first(bucket, node)
        after = book.hard | union(want.model, want.profile, found.minus_starts)
        crowded = node.crowded_out(want.needs.amount.of(pods), {book: after}, self._takes)
        return found._replace(cost=found.cost + crowded * PER_POD // pods) if crowded else found

    def _ranking(self, model: str, profile: str, most: int) -> _Ranking:
        ranking = self._rankings.get((model, profile, most))
        if ranking is None:
            ranking = self._rankings[model, profile, most] = []
            for bucket in self._slices.values():
                _rank(ranking, bucket, model, profile, most)
        return ranking

    def _take(self, want: Want, seat: Seat) -> None:
        self._unfile(seat.node, seat.gpus)
        for book in seat.gpus:
            taken = device_mask(book.gpu.model, want.profile, seat.start)
            book.hard |= taken
            book.draining &= ~taken
        seat.node.free -= want.needs.amount
        seat.node.answers.clear()
        self._file(seat.node, seat.gpus)

    def _give_back(self, placed: Placed) -> None:
        for seat in placed.seats:
            self._unfile(seat.node, seat.gpus)
        for book, hard, draining in reversed(placed.before):
            book.hard, book.draining = hard, draining
        for seat in placed.seats:
            seat.node.free += placed.want.needs.amount
            seat.node.answers.clear()
        for seat in placed.seats:
            self._file(seat.node, seat.gpus)

    def _drain(self, node: NodeBook, observed: ObservedSlot) -> None:
        if book := node.gpus.get(observed.gpu):
            book.draining |= device_mask(book.gpu.model, observed.profile, observed.start) & ~book.hard

    def _file(self, node: NodeBook, books: Iterable[GpuBook]) -> None:
        """Enter GPUs of a node into the buckets of their present state."""
        models = set()
        for book in books:
            if not book.mig:
                models.add(book.gpu.model)
            elif book.gpu.healthy:
                self._bucket(_gpu_state(book)).nodes.setdefault(node, {})[book.gpu.uuid] = None
        for model in models:
            self._file_wholes(node, _node_state(node, model))

    def _file_untouched(self, node: NodeBook) -> None:
        """Enter a node of which no lease has anything: without a look at its GPUs, if nothing of it is promised."""
        if node.kept:
            self._file(node, node.gpus.values())
            return
        unleased = _unleased(node.facts)
        for state, uuids in unleased.slices:
            self._bucket(state).nodes[node] = dict.fromkeys(uuids)
        for state_of_wholes in unleased.wholes:
            self._file_wholes(node, state_of_wholes)

    def _file_wholes(self, node: NodeBook, state: _NodeState) -> None:
        bucket = node.buckets[state.model] = self._wholes[state.model].setdefault(state, {})
        bucket[node] = None

    def _bucket(self, state: GpuState) -> _SliceBucket:
        bucket = self._slices.get(state)
        if bucket is None:
            bucket = self._slices[state] = _SliceBucket(state, len(self._slices))
            for (model, profile, most), ranking in self._rankings.items():
                _rank(ranking, bucket, model, profile, most)
        return bucket

    def _unfile(self, node: NodeBook, books: Iterable[GpuBook]) -> None:
        """Take GPUs of a node out of their buckets; harmless when repeated."""
        for book in books:
            if not book.mig:
                node.buckets[book.gpu.model].pop(node, None)
                continue
            filed = self._slices[_gpu_state(book)].nodes
            if (uuids := filed.get(node)) is not None:
                uuids.pop(book.gpu.uuid, None)
                if not uuids:
                    del filed[node]


_Former = tuple[GpuBook, int, int]
"""A GPU with the hard and draining masks it had before a seat was taken."""

_Kept = tuple[NodeBook, GpuBook, Promise]
"""A part of a GPU that is kept for somebody."""

_Found = tuple[int, list[Seat]]
"""Seats, and what they cost."""

_WholeBucket = dict[NodeBook, None]
"""Nodes that are interchangeable for whole GPUs, in the order in which they came to be so."""


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


class _SliceBucket:
    """MIG GPUs that are interchangeable, by node, in the order in which they came to be so."""

    __slots__ = ("nodes", "number", "state")

    def __init__(self, state: GpuState, number: int) -> None:
        self.state = state
        self.number = number
        """Its place in the order of creation; the older wins between equal offers."""
        self.nodes: dict[NodeBook, dict[str, None]] = {}
        """UUIDs; no node without one."""


_Ranking = list[tuple[Offer, int, _SliceBucket]]
"""Buckets by what they offer, the best first."""


class _Unleased(NamedTuple):
    """A node of which no lease has anything."""

    models: frozenset[str]
    slices: tuple[tuple[GpuState, tuple[str, ...]], ...]
    """UUIDs of its healthy GPUs in MIG mode, by state."""
    wholes: tuple[_NodeState, ...]
    """State of its whole GPUs, one for each model."""


@once_per_node
def _unleased(facts: NodeFacts) -> _Unleased:
    """How the node is filed while no lease has anything of it."""
    node = NodeBook(facts, "")
    slices: dict[GpuState, list[str]] = {}
    for uuid, book in node.gpus.items():
        if book.mig and book.gpu.healthy:
            slices.setdefault(_gpu_state(book), []).append(uuid)
    wholes = sorted({book.gpu.model for book in node.gpus.values() if not book.mig})
    return _Unleased(
        frozenset(gpu.model for gpu in facts.gpus),
        tuple((state, tuple(uuids)) for state, uuids in slices.items()),
        tuple(_node_state(node, model) for model in wholes),
    )


def _gpu_state(book: GpuBook) -> GpuState:
    miners = NO_MINERS
    for slot in book.mined:
        miners = _joined(miners, slot.profile, slot.start)
    return GpuState(book.gpu.model, book.taken, book.draining, miners)


@lru_cache(maxsize=4096)
def _joined(miners: frozenset[Placement], profile: str, start: int) -> frozenset[Placement]:
    return miners | {Placement(profile, start)}


def _rank(ranking: _Ranking, bucket: _SliceBucket, model: str, profile: str, most: int) -> None:
    """Enter a bucket into a ranking of its model, if it has anything to offer."""
    if bucket.state.model == model and (best := offer(bucket.state, profile, most)) is not None:
        insort(ranking, (best, bucket.number, bucket))


def _keep(node: NodeBook, book: GpuBook, promise: Promise) -> None:
    book.promised += (promise,)
    node.promised += promise.amount
    node.kept += 1


def _unkeep(node: NodeBook, book: GpuBook, promise: Promise) -> None:
    kept = list(book.promised)
    kept.remove(promise)
    book.promised = tuple(kept)
    node.promised -= promise.amount
    node.kept -= 1


def _first(bucket: _SliceBucket, node: NodeBook) -> GpuBook:
    """The GPU that is taken first of those on the node in the bucket."""
    return node.gpus[next(iter(bucket.nodes[node]))]


def _cost(placed: Placed) -> int:
    return placed.cost


def _fits(node: NodeBook, want: Want) -> bool:
    return want.needs.amount.at_most(node.available) and want.allowed_on(node.facts)


def _node_state(node: NodeBook, model: str) -> _NodeState:
    idle = mining = draining = 0
    for book in node.gpus.values():
        if book.mig or book.taken or not book.gpu.healthy or book.gpu.model != model:
            continue
        if book.draining:
            draining += 1
        elif book.mined:
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
        if not (book.mig or book.taken) and book.gpu.healthy and book.gpu.model == want.model
    ]
    free.sort(key=lambda book: (bool(book.draining), bool(book.mined), -book.gpu.index))
    return tuple(free[: want.count])
