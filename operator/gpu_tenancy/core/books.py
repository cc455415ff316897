"""The planner's mutable working copy of one node and its GPUs, and which miners are left on it. Pure.

Leases are hard: what they take is gone. Miners are soft: they yield their GPU to a lease, and their CPU and memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar, cast

from gpu_tenancy.api.node import Gpu, GpuMode, Slot
from gpu_tenancy.core.amounts import NOTHING, Amount, total
from gpu_tenancy.core.desirability import LASTING, NOBODY
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import ALL_SLICES, Placement, device_mask, filling
from gpu_tenancy.mig.profiles import FULL

T = TypeVar("T")
MOST_ANSWERS: Final = 64
"""Of a node on which nothing changes; they are found out anew after that."""
WHOLE: Final = Placement(FULL, 0)
"""The one device of a GPU that is not in MIG mode."""


class Promise(NamedTuple):
    """A part of a GPU that is kept for somebody, with its share of the node."""

    key: str
    """For whom or what."""
    mask: int
    """Memory slices as bits."""
    amount: Amount
    """CPU, memory and pods that are kept with it."""
    lasting: bool = True
    """On record; not only for the first in the queue of this plan."""


class GpuBook:
    """State of one GPU in the working copy."""

    __slots__ = ("closed", "draining", "gpu", "hard", "lasts", "mig", "mined", "promised")

    def __init__(self, gpu: Gpu, *, changing: bool = False) -> None:
        """`changing`: it is being converted into another mode."""
        self.gpu = gpu
        self.mig = gpu.mode is GpuMode.MIG
        """In MIG mode."""
        self.closed = ALL_SLICES if changing else gpu.fenced_mask
        """Memory slices that are fenced, as bits; all of them while it is being converted."""
        self.hard = self.closed
        """Memory slices that leases hold, or that are closed, as bits."""
        self.lasts = LASTING if self.hard else NOBODY
        """The span of the lease on it that ends last; a fence has no end."""
        self.draining = 0
        """Memory slices from which a former lease has not gone yet, as bits."""
        self.mined: tuple[Slot, ...] = ()
        """What pools hold."""
        self.promised: tuple[Promise, ...] = ()
        """What is kept for others than those who are placed now. Miners may use it."""

    @property
    def taken(self) -> int:
        """Memory slices that nobody who is placed now may have, as bits."""
        taken = self.hard
        for promise in self.promised:
            taken |= promise.mask
        return taken

    def places(self, hard: int) -> Sequence[Placement]:
        """Devices that are left on the GPU where leases hold these memory slices; none where it is not healthy."""
        if not self.gpu.healthy:
            return ()
        if self.mig:
            return filling(self.gpu.model, hard)
        return () if hard else (WHOLE,)

    def mined_at(self, placement: Placement) -> Slot | None:
        """What a pool holds there now."""
        for slot in self.mined:
            if slot.start == placement.start and slot.profile == placement.profile:
                return slot
        return None


@dataclass(eq=False, slots=True)
class Still:
    """How a node is entered on which nothing has changed: what its leases have, and what follows from that."""

    slots: tuple[Slot, ...]
    free: Amount
    gpus: Mapping[str, tuple[int, int]]
    """What leases hold of its GPUs, as bits, and their span; by UUID."""
    filing: Any
    """How it is filed (core.placement)."""
    verdict: tuple[Hashable, bool] | None = None
    """Whether its slots stay as they are, and what decided about that (core.mining)."""
    answers: dict[Hashable, Any] = field(default_factory=dict)
    """What else was found out about the node as it is: what depends on nothing but its facts and its leases."""

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What is found out about it, once for each key."""
        if key not in self.answers:
            if len(self.answers) >= MOST_ANSWERS:
                self.answers.clear()
            self.answers[key] = find()
        return cast("T", self.answers[key])


class NodeBook:
    """State of one node in the working copy."""

    __slots__ = (
        "_gpus", "_mining", "answers", "awaited", "facts", "filed", "free", "kept", "objection", "promised", "slots",
        "still",
    )  # fmt: skip

    def __init__(self, facts: NodeFacts, objection: str) -> None:
        """`objection`: why nothing may be planned on it; empty where it may."""
        self.facts = facts
        self.objection = objection
        self.free: Amount = facts.allocatable - facts.foreign
        """What leases leave; miners are not counted: they yield."""
        self.promised: Amount = NOTHING
        """What of that is kept for others than those who are placed now."""
        self.kept = 0
        """Promises of parts of its GPUs."""
        self.awaited = False
        """Something of it is held for a lease that waits for a GPU to be converted."""
        self._gpus: dict[str, GpuBook] | None = None
        self._mining: Amount | None = None
        self.slots: list[Slot] = []
        """Devices that leases hold in the plan."""
        self.still: Still | None = None
        """What it was entered from as a whole; None where that was done piece by piece, or something of it changes."""
        self.filed: dict[str, Any] = {}
        """The state that it is filed under for whole GPUs, by model; no bucket, which has the node itself in it: what a
        plan was made with is then freed at once, and no work for the garbage collector."""
        self.answers: dict[Hashable, Any] = {}
        """What was found out about the node as it is: whoever changes it empties this."""

    @property
    def undisturbed(self) -> Still | None:
        """What it was entered from, if nothing of it has changed and nothing is kept."""
        return None if self.kept else self.still

    @property
    def available(self) -> Amount:
        """What whoever is placed now may have."""
        return self.free - self.promised if self.kept else self.free

    @property
    def gpus(self) -> dict[str, GpuBook]:
        """Its GPUs by UUID."""
        if self._gpus is None:
            changing = self.facts.changing
            self._gpus = {gpu.uuid: GpuBook(gpu, changing=gpu.uuid in changing) for gpu in self.facts.gpus}
            for slot in self.facts.mined.values():
                if book := self._gpus.get(slot.gpu):
                    book.mined += (slot,)
            for uuid, (hard, lasts) in self.still.gpus.items() if self.still else ():
                self._gpus[uuid].hard, self._gpus[uuid].lasts = hard, lasts
        return self._gpus

    def hold(self, slot: Slot, amount: Amount, lasts: int) -> None:
        """Enter a lease's device. `amount`: what its pod takes of the node, once per pod. `lasts`: a span."""
        self.slots.append(slot)
        self.free -= amount
        if book := self.gpus.get(slot.gpu):
            book.hard |= device_mask(book.gpu.model, slot.profile, slot.start)
            book.lasts = max(book.lasts, lasts)

    def enter(self, still: Still) -> None:
        """Enter everything that leases have of it; called before anything else is."""
        self.still, self.free = still, still.free
        self.slots.extend(still.slots)

    def changes(self) -> None:
        """Something of it will not be as it was: what was found out about it does not hold any more."""
        self.answers.clear()
        if self.still is not None:
            _ = self.gpus  # they are entered from it
            self.still = None

    def crowded_out(self, amount: Amount, after: Mapping[GpuBook, int], takes: Mapping[str, Amount]) -> int:
        """Miners that would lose not their GPU but their CPU, memory or pod slot to pods that take this much.

        `after`: what leases hold of the GPUs that the pods get, as bits. `takes`: what each miner of a pool takes of
        its node, by the pool's UID. A miner that an earlier lease of the same plan has crowded out already may count
        again, where it loses its GPU.
        """
        if self._mining is None:
            self._mining = total(_take(slot, takes) for slot in self.facts.mined.values())
        if (self._mining + amount).at_most(self.free):
            return 0
        books = self.gpus.values()
        now = [_take(slot, takes) for book in books for slot in _staying(book, book.hard)]
        then = [_take(slot, takes) for book in books for slot in _staying(book, after.get(book, book.hard))]
        stopped = _fitting(now, self.free) - _fitting(then, self.free - amount)
        return max(0, stopped - (len(now) - len(then)))


def _staying(book: GpuBook, hard: int) -> Iterator[Slot]:
    """Miners that keep their device where leases hold these memory slices."""
    for place in book.places(hard) if book.mined else ():
        if (slot := book.mined_at(place)) is not None:
            yield slot


def _take(slot: Slot, takes: Mapping[str, Amount]) -> Amount:
    """What the miner takes of its node; nothing, where its pool is gone and it goes too."""
    return takes.get(slot.holder.uid, NOTHING)


def _fitting(amounts: Iterable[Amount], free: Amount) -> int:
    """How many of them fit, each in its turn."""
    count = 0
    for amount in amounts:
        if amount.at_most(free):
            free -= amount
            count += 1
    return count
