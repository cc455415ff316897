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
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple

from gpu_tenancy.api.node import ObservedSlot, Slot
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.books import GpuBook, NodeBook, Promise
from gpu_tenancy.core.desirability import outlasts, span
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

    def __init__(
        self, nodes: Iterable[NodeFacts], now: datetime, takes: Mapping[str, Amount], *, converts: bool = True
    ) -> None:
        """`takes`: what each miner of a pool takes of its node, by the pool's UID. `converts`: GPUs are converted by
        demand, where their node lets it."""
        ordered = sorted(nodes, key=lambda facts: facts.name)
        self.nodes = {facts.name: NodeBook(facts, facts.objection(now)) for facts in ordered}
        memory = {model: size for facts in ordered for model, size in facts.models.items()}
        self.all_models = sorted(memory, key=lambda model: (memory[model], model))
        """Models of the GPUs that are there, those with least memory first: what is asked for without a model does not
        use up large GPUs where small ones do."""
        self._takes = takes
        self.converts = converts
        """GPUs that are convertible count for every profile where it is asked what could be."""
        self._full: set[Want] = set()
        """What found no room. Nothing is given back within a plan, so it finds none later either."""
        self.unseen = any(facts.unreadable and not facts.gpus for facts in ordered)
        """Some node cannot be read at all: it may have GPUs of any model."""
        self._slices: dict[tuple[GpuState, int], _SliceBucket] = {}
        self._rankings: dict[_RankingKey, _Ranking] = {}
        self._wholes: dict[str, dict[_NodeState, _WholeBucket]] = {model: {} for model in self.all_models}
        self._models: dict[str, list[str]] = {}
        self._promised: dict[str, list[_Kept]] = {}
        """What is kept, by key."""
        self._full_without: dict[frozenset[str], set[Want]] = {}
        """What found no room even without the promises of these keys."""
        self.lifted: frozenset[str] = frozenset()
        """Keys whose promises are lifted now."""
        self._settled = False

    def settle(self) -> None:
        """Note draining devices and fill the buckets; called once, after everything held is known."""
        for node in self.nodes.values():
            if node.still is not None or not (node.slots or node.facts.leased_reports):
                if not node.objection:
                    self._file_as_a_whole(node)
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
        self.lifted = frozenset(keys)
        self._change(lifted, _unkeep)
        try:
            yield
        finally:
            self._change(lifted, _keep)
            self.lifted = frozenset()
            self._full = former

    def is_full_without(self, keys: Collection[str], wants: Sequence[Want]) -> bool:
        """All of the wants have been found to find no room even without the promises of these keys."""
        return self._full_without.get(frozenset(keys), set()).issuperset(wants)

    def _change(self, places: Sequence[_Kept], change: Callable[[NodeBook, GpuBook, Promise], None]) -> None:
        """Change what is promised of GPUs; once the buckets are filled, they follow."""
        filed: dict[NodeBook, dict[GpuBook, None]] = {}
        for node, book, _ in places:
            if self._settled and not node.objection:
                filed.setdefault(node, {})[book] = None
        for node, books in filed.items():
            self._unfile(node, books)
        for place in places:
            change(*place)
        for node, books in filed.items():
            node.answers.clear()
            self._file(node, books)

    def models(self, profile: str) -> list[str]:
        """Models present in the cluster that have the profile, in a fixed order."""
        if profile not in self._models:
            self._models[profile] = [one for one in self.all_models if profile == FULL or profile in of_model(one)]
        return self._models[profile]

    def place(self, wants: Sequence[Want], left: timedelta | None = None) -> Placed | None:
        """Seats for all pods of one of the wants, taken in the working copy: of the one that disturbs least, the first
        among equals. None (and nothing taken) if none finds room. `left`: how long the lease will last; None where that
        is not known."""
        lasts = span(left)
        best: Placed | None = None
        for number, want in enumerate(wants, 1):
            if (tried := self._place(want, lasts)) is None:
                continue
            if tried.cost == 0 or (best is None and number == len(wants)):
                return tried
            self._give_back(tried)
            best = min(best or tried, tried, key=_cost)
        return self._place(best.want, lasts) if best else None

    def undo(self, placed: Placed) -> None:
        """Give seats back that were taken last."""
        self._give_back(placed)

    def adjust(self, node: NodeBook, free: Amount, hard: Mapping[GpuBook, int]) -> None:
        """Enter what leases leave of a node, and what they hold of some of its GPUs; only `apart`."""
        filed = [book for book in hard if book.gpu.healthy or not book.mig]
        self._unfile(node, filed)
        for book, mask in hard.items():
            book.hard = mask
        node.free = free
        node.changes()
        self._file(node, filed)
        self._full.clear()

    def convert(self, node: NodeBook, book: GpuBook, state: Mode) -> None:
        """Enter a GPU of a node that is planned on, of which no lease has anything, in another mode; only `apart`."""
        self._unfile(node, (book,))
        if (former := node.filed.get(book.gpu.model)) is not None:
            self._wholes[book.gpu.model][former].pop(node, None)
        node.changes()
        book.mig, book.hard, book.lasts, book.mined = state
        self._file(node, (book,))
        self._file_wholes(node, _node_state(node, book.gpu.model))
        self._full.clear()

    def fits(self) -> dict[tuple[str, str], int]:
        """By model and profile: how many devices the GPUs have room for beside leases and what is kept, miners gone;
        of `full` how many on one node at most."""
        found = {(model, FULL): 0 for model in self.all_models}
        found |= {(model, profile): 0 for model in self.all_models for profile in of_model(model)}
        for bucket in self._slices.values():
            count = sum(map(len, bucket.nodes.values()))
            for profile, seats in _seats(bucket.state.model, bucket.state.hard):
                found[bucket.state.model, profile] += seats * count
        for model, states in self._wholes.items():
            found[model, FULL] = max((state.total for state, nodes in states.items() if nodes), default=0)
        return found

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it, what finds no room does so for this once, and what found none may find some."""
        former, self._full = self._full, set()
        try:
            yield
        finally:
            self._full = former

    def place_at(self, want: Want, seats: Sequence[Seat], left: timedelta | None = None) -> Placed | None:
        """These very seats, taken in the working copy, if they are free."""
        placed = Placed(want, 0, [], [])
        for seat in seats:
            mask = device_mask(want.model, want.profile, seat.start)
            if seat.node.objection or not _fits(seat.node, want) or any(book.taken & mask for book in seat.gpus):
                self._give_back(placed)
                return None
            placed.before.extend((book, book.draining, book.lasts) for book in seat.gpus)
            self._take(want, seat, span(left))
            placed.seats.append(seat)
        return placed

    def _place(self, want: Want, lasts: int) -> Placed | None:
        """Seats for all pods at the least disturbance; None if one pod finds none. Pods are alike, so a seat taken for
        one never spoils the count for the others."""
        if want in self._full:
            return None
        placed = Placed(want, 0, [], [])
        while (remaining := want.pods - len(placed.seats)) > 0:
            found = self._whole_seats(want) if want.profile == FULL else self._slice_seats(want, remaining, lasts)
            if found is None:
                self._give_back(placed)
                self._full.add(want)
                return None
            cost, seats = found
            for seat in seats:
                placed.before.extend((book, book.draining, book.lasts) for book in seat.gpus)
                self._take(want, seat, lasts)
            placed.seats.extend(seats)
            placed = placed._replace(cost=placed.cost + cost)
        return placed

    def _whole_seats(self, want: Want) -> _Found | None:
        """The best seat for one pod of whole GPUs, and what it costs."""
        offers = [
            (_whole_cost(state, want.count), state.whole and state.total > want.count, state.total, state)
            for state, bucket in self._wholes.get(want.model, {}).items()
            if bucket and state.total >= want.count
        ]
        least: _Found | None = None
        for cost, _, _, state in sorted(offers):
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

    def _slice_seats(self, want: Want, remaining: int, lasts: int) -> _Found | None:
        """The best seats for up to `remaining` pods on one MIG GPU, and what they cost.

        What a bucket's GPUs offer is the least that seats there can cost: where no node has room for that many pods
        without a miner losing its CPU, they cost more, and have to be better than what the others offer.
        """
        least: tuple[Offer, int, _SliceBucket, NodeBook] | None = None
        key = _RankingKey(want.model, want.profile, min(remaining, MOST_DEVICES), lasts)
        for best, number, bucket in self._ranking(key):
            if least is not None and least[:2] < (best, number):
                break
            found, node = self._best_in(bucket, best, want, lasts)
            if found is not None and node is not None and (least is None or (found, number) < least[:2]):
                least = found, number, bucket, node
        if least is None:
            return None
        found, _, bucket, node = least
        seats = [Seat(node, (_first(bucket, node),), -start) for start in found.minus_starts]
        return found.cost * len(seats) // PER_POD, seats

    def _best_in(
        self, bucket: _SliceBucket, best: Offer, want: Want, lasts: int
    ) -> tuple[Offer | None, NodeBook | None]:
        """The first node of the bucket where its GPUs offer what they do at best, or the one where they offer most."""
        least, host = None, None
        for node in bucket.nodes:
            if not _fits(node, want):
                continue
            key = bucket.state, want.profile, best, want.needs.amount
            found: Offer = node.answers.get(key) or self._offer(bucket, best, node, want, lasts)
            node.answers[key] = found
            if found == best:
                return found, node
            if least is None or (found.cost, -len(found.minus_starts)) < (least.cost, -len(least.minus_starts)):
                least, host = found, node
        return least, host

    def _offer(self, bucket: _SliceBucket, best: Offer, node: NodeBook, want: Want, lasts: int) -> Offer:
        """What a GPU of the bucket offers on a node that has room for one pod at least."""
        found, pods = best, len(best.minus_starts)
        if pods > 1 and (room := node.available.times(want.needs.amount)) < pods:
            found = offer(bucket.state, want.profile, room, outlasts(lasts, bucket.lasts)) or best
            pods = len(found.minus_starts)
        book = _first(bucket, node)
        after = book.hard | union(want.model, want.profile, found.minus_starts)
        crowded = node.crowded_out(want.needs.amount.of(pods), {book: after}, self._takes)
        return found._replace(cost=found.cost + crowded * PER_POD // pods) if crowded else found

    def _ranking(self, key: _RankingKey) -> _Ranking:
        ranking = self._rankings.get(key)
        if ranking is None:
            ranking = self._rankings[key] = []
            for bucket in self._slices.values():
                _rank(ranking, bucket, key)
        return ranking

    def _take(self, want: Want, seat: Seat, lasts: int) -> None:
        self._unfile(seat.node, seat.gpus)
        for book in seat.gpus:
            taken = device_mask(book.gpu.model, want.profile, seat.start)
            book.hard |= taken
            book.draining &= ~taken
            book.lasts = max(book.lasts, lasts)
        seat.node.free -= want.needs.amount
        seat.node.changes()
        self._file(seat.node, seat.gpus)

    def _give_back(self, placed: Placed) -> None:
        for seat in placed.seats:
            self._unfile(seat.node, seat.gpus)
        for book, draining, lasts in reversed(placed.before):
            book.draining, book.lasts = draining, lasts
        for seat in placed.seats:
            for book in seat.gpus:  # others may have gone from the GPU meanwhile: only what was taken is given back
                book.hard &= ~device_mask(book.gpu.model, placed.want.profile, seat.start)
            seat.node.free += placed.want.needs.amount
            seat.node.changes()
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
                self._bucket(_gpu_state(book), book.lasts).nodes.setdefault(node, {})[book.gpu.uuid] = None
        for model in models:
            self._file_wholes(node, _node_state(node, model))

    def _file_as_a_whole(self, node: NodeBook) -> None:
        """Enter a node of which no lease has anything, or on which nothing has changed: without a look at its GPUs, if
        nothing of it is promised."""
        if node.kept:
            self._file(node, node.gpus.values())
            return
        filing: Filing = node.still.filing if node.still else _unleased(node.facts)
        for state, lasts, uuids in filing.slices:
            self._bucket(state, lasts).nodes[node] = dict.fromkeys(uuids)
        for state_of_wholes in filing.wholes:
            self._file_wholes(node, state_of_wholes)

    def _file_wholes(self, node: NodeBook, state: _NodeState) -> None:
        node.filed[state.model] = state
        self._wholes[state.model].setdefault(state, {})[node] = None

    def _bucket(self, state: GpuState, lasts: int) -> _SliceBucket:
        bucket = self._slices.get((state, lasts))
        if bucket is None:
            bucket = self._slices[state, lasts] = _SliceBucket(state, lasts, len(self._slices))
            for key, ranking in self._rankings.items():
                _rank(ranking, bucket, key)
        return bucket

    def _unfile(self, node: NodeBook, books: Iterable[GpuBook]) -> None:
        """Take GPUs of a node out of their buckets; harmless when repeated."""
        for book in books:
            if not book.mig:
                self._wholes[book.gpu.model][node.filed[book.gpu.model]].pop(node, None)
                continue
            filed = self._slices[_gpu_state(book), book.lasts].nodes
            if (uuids := filed.get(node)) is not None:
                uuids.pop(book.gpu.uuid, None)
                if not uuids:
                    del filed[node]


class Mode(NamedTuple):
    """A mode of a GPU, and what is on it then."""

    mig: bool
    hard: int
    lasts: int
    mined: tuple[Slot, ...] = ()


def mode_of(book: GpuBook) -> Mode:
    """As a GPU is entered now."""
    return Mode(book.mig, book.hard, book.lasts, book.mined)


_Former = tuple[GpuBook, int, int]
"""A GPU with the draining mask, and the span, that it had before a seat was taken."""

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
    whole: bool
    """No lease has any of its whole GPUs: it can serve one that needs all of them."""

    @property
    def total(self) -> int:
        """Whole GPUs that no lease holds."""
        return self.idle + self.mining + self.draining


class _SliceBucket:
    """MIG GPUs that are interchangeable, by node, in the order in which they came to be so."""

    __slots__ = ("lasts", "nodes", "number", "state")

    def __init__(self, state: GpuState, lasts: int, number: int) -> None:
        self.state = state
        self.lasts = lasts
        """Span of the leases on them."""
        self.number = number
        """Its place in the order of creation; the older wins between equal offers."""
        self.nodes: dict[NodeBook, dict[str, None]] = {}
        """UUIDs; no node without one."""


_Ranking = list[tuple[Offer, int, _SliceBucket]]
"""Buckets by what they offer, the best first."""


class _RankingKey(NamedTuple):
    """What a ranking is for: up to `most` pods that last so long."""

    model: str
    profile: str
    most: int
    lasts: int
    """Their span."""


class Filing(NamedTuple):
    """How a node is filed of which nothing is promised."""

    slices: tuple[tuple[GpuState, int, tuple[str, ...]], ...]
    """UUIDs of its healthy GPUs in MIG mode, by state and span."""
    wholes: tuple[_NodeState, ...]
    """State of its whole GPUs, one for each model."""


@once_per_node
def _unleased(facts: NodeFacts) -> Filing:
    """How the node is filed while no lease has anything of it."""
    return filing_of(NodeBook(facts, ""))


def filing_of(node: NodeBook) -> Filing:
    """How a node is filed as it is entered now."""
    slices: dict[tuple[GpuState, int], list[str]] = {}
    for uuid, book in node.gpus.items():
        if book.mig and book.gpu.healthy:
            slices.setdefault((_gpu_state(book), book.lasts), []).append(uuid)
    wholes = sorted({book.gpu.model for book in node.gpus.values() if not book.mig})
    return Filing(
        tuple((state, lasts, tuple(uuids)) for (state, lasts), uuids in slices.items()),
        tuple(_node_state(node, model) for model in wholes),
    )


def _gpu_state(book: GpuBook) -> GpuState:
    miners = NO_MINERS
    for slot in book.mined:
        miners = _joined(miners, slot.profile, slot.start)
    return GpuState(book.gpu.model, book.taken, book.draining, miners)


@lru_cache(maxsize=4096)
def _seats(model: str, occupied: int) -> tuple[tuple[str, int], ...]:
    """How many devices of each profile fit beside what is occupied. Places of one profile never overlap."""
    return tuple(
        (name, sum(not shape.mask(start) & occupied for start in shape.starts))
        for name, shape in of_model(model).items()
    )


@lru_cache(maxsize=4096)
def _joined(miners: frozenset[Placement], profile: str, start: int) -> frozenset[Placement]:
    return miners | {Placement(profile, start)}


def _rank(ranking: _Ranking, bucket: _SliceBucket, key: _RankingKey) -> None:
    """Enter a bucket into a ranking of its model, if it has anything to offer."""
    if bucket.state.model != key.model:
        return
    if (best := offer(bucket.state, key.profile, key.most, outlasts(key.lasts, bucket.lasts))) is not None:
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
    idle = mining = draining = taken = 0
    for book in node.gpus.values():
        if book.mig or not book.gpu.healthy or book.gpu.model != model:
            continue
        if book.taken:
            taken += 1
        elif book.draining:
            draining += 1
        elif book.mined:
            mining += 1
        else:
            idle += 1
    return _NodeState(model, idle, mining, draining, not taken)


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
