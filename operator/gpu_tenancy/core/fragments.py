"""Free slices enough, but none where the profile may begin: what is in the way, and whose end makes room. Pure.

Asked only about slices that found no room, once everybody else has been placed; changes nothing. Leases are never
moved, so that their end alone makes room. Miners, and leases that still drain, are not in the way: they go for whoever
comes. Only GPUs count whose node takes one more pod now: where CPU or memory is short, position is not the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, cached_property, lru_cache
from heapq import nsmallest
from itertools import combinations
from operator import attrgetter, le
from typing import Final, NamedTuple

from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core import room
from gpu_tenancy.core.actions import Outlook
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask, layouts, occupied_by
from gpu_tenancy.mig.profiles import FULL, of_model

NO_END: Final = datetime.max.replace(tzinfo=UTC)
"""Of a device whose end has no date: later than any."""
PLANNED: Final = 4
"""Devices of a plan that a sentence names."""
MOST_LACKING: Final = 8
"""Pods of a gang without room for which a plan is worked out; for more it would be a list that nobody goes through."""
_START: Final = attrgetter("start", "device")


class Device(NamedTuple):
    """A lease's device, with where it is."""

    node: str
    gpu: int
    """Index of its GPU."""
    slot: Slot


class Clearing(NamedTuple):
    """Devices of one GPU whose end makes room on it."""

    node: str
    gpu: int
    """Index of the GPU."""
    starts: tuple[int, ...]
    """Where the profile can begin then."""
    devices: tuple[Device, ...]


class Fragmentation(NamedTuple):
    """Why slices that are free are of no use to a want, and what would make them so."""

    want: Want
    node: str
    gpu: int
    """Index of the nearest GPU whose free slices would do if they lay otherwise: fewest devices are in the way."""
    free: int
    """Memory slices that no lease holds on it and that are not fenced."""
    fenced: tuple[int, ...]
    """Its fenced slices where the profile would lie."""
    in_the_way: tuple[Device, ...]
    """Devices that lie there."""
    plan: tuple[Clearing, ...]
    """The fewest devices, on any GPUs, whose end makes room for all pods; for one pod the set that ends first, of
    several as small. Empty where more than MOST_LACKING pods have no room."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices of the plan."""
        return tuple(device for clearing in self.plan for device in clearing.devices)


class Survey:
    """The positions of everything that leases hold, as they are once everybody has been placed. Lives for one plan."""

    def __init__(self, world: World, outlooks: Sequence[Outlook]) -> None:
        """`outlooks`: of all leases that hold something."""
        self._world = world
        self._outlooks = outlooks
        self._found: dict[Want, Fragmentation | None] = {}
        self._said: dict[tuple[Want, str], str] = {}
        self._ends: dict[str, tuple[datetime, str]] = {}

    def nearest(self, wants: Sequence[Want]) -> Fragmentation | None:
        """Of wants that found no room, the one with fewest devices in its way; None where position is the reason for
        none of them."""
        found = [one for want in wants if want.profile != FULL and (one := self._fragmentation(want)) is not None]
        return min(found, key=lambda one: (not one.plan, len(one.devices)), default=None)

    def sentence(self, found: Fragmentation, namespace: str) -> str:
        """What is in the way and what makes room, for readers in a namespace."""
        key = found.want, namespace
        if key not in self._said:
            self._said[key] = f"{self._obstacles(found, namespace)}. {self._plan(found)}."
        return self._said[key]

    # --- finding ------------------------------------------------------------------------------------------------------

    def _fragmentation(self, want: Want) -> Fragmentation | None:
        if want not in self._found:
            self._found[want] = self._find(want)
        return self._found[want]

    def _find(self, want: Want) -> Fragmentation | None:
        hosts = list(_hosts(self._gpus, want))
        seats = sum(min(host.seats, host.room) for host in hosts)
        otherwise = sum(min(host.otherwise, host.room) for host in hosts)
        if not seats < want.pods <= otherwise:
            return None
        blocked = [host for host in hosts if host.seats < host.room]
        apart = [found for host in blocked for found in host.gpus if found.ways.is_fragmented]
        fewest = min(found.ways.costs[0] for found in apart)
        gpu = min((found for found in apart if found.ways.costs[0] == fewest), key=self._earliest).gpu
        starts, fenced = _all_starts(want), sorted(gpu.book.gpu.fenced)
        return Fragmentation(
            want,
            gpu.node,
            gpu.book.gpu.index,
            ALL_SLICES.bit_count() - gpu.book.hard.bit_count(),
            tuple(number for number in fenced if starts >> number & 1),
            tuple(gpu.device(number) for number in gpu.overlapping(starts)),
            self._smallest(blocked, want.pods - seats),
        )

    @cached_property
    def _gpus(self) -> list[tuple[NodeBook, list[_Gpu]]]:
        """Every node on which something may be planned, by name, with its healthy GPUs in MIG mode."""
        return [(node, list(_mig_gpus(node))) for node in self._world.nodes.values() if not node.objection]

    def _smallest(self, hosts: Sequence[_Host], lacking: int) -> tuple[Clearing, ...]:
        """The fewest devices whose end makes room for so many more pods."""
        if lacking > MOST_LACKING:
            return ()
        best: _Table = [_NOTHING]
        for host, gpus in self._worth_trying(hosts, lacking):
            most = min(lacking, host.room - host.seats)
            table: _Table = [_NOTHING]
            for found in gpus:
                steps = range(1, min(most, len(found.ways.clearing)) + 1)
                table = _joined(table, [_NOTHING, *(self._best(found, more) for more in steps)], most)
            best = _joined(best, table, lacking)
        choice = best[lacking]
        return choice.clearings if choice else ()

    def _worth_trying(self, hosts: Sequence[_Host], lacking: int) -> Iterator[tuple[_Host, list[_Found]]]:
        """The hosts with those GPUs that may be part of a smallest set. Of GPUs that cost the same no more are needed
        than pods lack, and none where others cost less; but where CPU or memory keeps a node from taking that many,
        all of it are tried."""
        alike: dict[tuple[int, ...], list[_Found]] = {}
        for host in hosts:
            if host.room - host.seats >= lacking:
                for found in host.gpus:
                    if found.ways.costs:
                        alike.setdefault(found.ways.costs[:lacking], []).append(found)
        enough = [costs for costs, group in alike.items() if len(group) >= lacking]
        best = [group for costs, group in alike.items() if not any(_is_less(other, costs) for other in enough)]
        chosen = {id(found) for group in best for found in nsmallest(lacking, group, key=self._earliest)}
        for host in hosts:
            roomy = host.room - host.seats >= lacking
            gpus = [found for found in host.gpus if found.ways.costs and (not roomy or id(found) in chosen)]
            if gpus:
                yield host, gpus

    def _earliest(self, found: _Found) -> tuple[datetime, bool]:
        """When one more pod finds room on a GPU, if as few devices as possible end for it; of equals, those first where
        position is what keeps it away."""
        return min(self._latest(found.gpu, one) for one in found.ways.clearing[0]), not found.ways.is_fragmented

    def _best(self, found: _Found, more: int) -> _Choice:
        """Of the smallest sets of devices on a GPU whose end makes room for so many more pods, the one that ends
        first."""
        gpu, sets = found.gpu, found.ways.clearing[more - 1]
        latest, number = min((self._latest(gpu, one), number) for number, one in enumerate(sets))
        starts, numbers = sets[number]
        clearing = Clearing(gpu.node, gpu.book.gpu.index, starts, tuple(gpu.device(one) for one in numbers))
        return _Choice(len(numbers), latest, int(not found.ways.is_fragmented), (clearing,))

    def _latest(self, gpu: _Gpu, one: _Set) -> datetime:
        """When the last of these devices ends."""
        return max(self._end(gpu.slots[number])[0] for number in one.devices)

    # --- ends ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _holders(self) -> dict[str, Outlook]:
        return {one.lease.uid: one for one in self._outlooks}

    def _end(self, slot: Slot) -> tuple[datetime, str]:
        """When the lease of a device ends as things are, and in words."""
        uid = slot.holder.uid
        if uid not in self._ends:
            self._ends[uid] = _end(self._holders.get(uid))
        return self._ends[uid]

    # --- sentences ----------------------------------------------------------------------------------------------------

    def _obstacles(self, found: Fragmentation, namespace: str) -> str:
        want = found.want
        starts = _listed([str(start) for start in of_model(want.model)[want.profile].starts], "or")
        held = [f"{_place(device.slot)} ({_holder(device.slot, namespace)})" for device in found.in_the_way]
        fenced = [f"fenced {_slices(found.fenced)}"] if found.fenced else []
        return (
            f"GPU {found.gpu} on {found.node} has {counted(found.free, 'free slice')}, but {want.profile} can only "
            f"begin at slice {starts}; in the way: {room.some([*held, *fenced], separator=', ')}"
        )

    def _plan(self, found: Fragmentation) -> str:
        if not found.plan:
            return f"Leases are not moved: room comes as they end, or for fewer than {found.want.pods} pods"
        leaves = [self._end(device.slot)[1] for device in found.devices]
        if found.want.pods == 1:
            [clearing] = found.plan
            there = [_place(device.slot) for device in found.devices]
            shape = of_model(found.want.model)[found.want.profile]
            slices = _slices([start + offset for start in clearing.starts[:1] for offset in range(shape.size)])
            place = f"at {slices} of GPU {clearing.gpu} on {clearing.node}"
        else:
            there = [f"{_place(device.slot)} of GPU {device.gpu} on {device.node}" for device in found.devices]
            place = f"for all {found.want.pods}"
        if len(there) == 1:
            return f"Leases are not moved: there is room {place} once {there[0]} ends ({leaves[0]})"
        all_of_them = [f"{device} ({end})" for device, end in zip(there, leaves, strict=True)]
        these = room.some(all_of_them, most=PLANNED, separator=", ")
        return f"Leases are not moved: there is room {place} once these {len(there)} end: {these}"


def _end(outlook: Outlook | None) -> tuple[datetime, str]:
    if outlook is None:
        return NO_END, "its end is not known"
    if outlook.closed is not None:
        return outlook.closed.billable_to, "it is ending"
    if outlook.expires_at is not None:
        return outlook.expires_at, f"at {format_time(outlook.expires_at)} at the latest"
    return NO_END, "it has no end" if outlook.duration is None else "its term has not begun"


def _place(slot: Slot) -> str:
    return f"{slot.profile} at slice {slot.start}"


def _holder(slot: Slot, namespace: str) -> str:
    """Who holds a device, as far as that is for readers in the namespace."""
    holder = slot.holder
    return f"lease {holder.namespace}/{holder.name}" if holder.namespace == namespace else "another tenant's lease"


def _slices(numbers: Sequence[int]) -> str:
    """Memory slices for people: "slice 3", "slices 0-3", "slices 1, 5"."""
    if len(numbers) == 1:
        return f"slice {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"slices {numbers[0]}-{numbers[-1]}"
    return f"slices {', '.join(map(str, numbers))}"


def _listed(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


# --- GPUs and what can be had of them ---------------------------------------------------------------------------------


class _Gpu(NamedTuple):
    """A GPU in MIG mode, and what leases hold of it."""

    node: str
    book: GpuBook
    slots: tuple[Slot, ...]
    """By their first memory slice."""
    positions: tuple[tuple[str, int], ...]
    """Profiles and starts of the same."""

    def device(self, number: int) -> Device:
        """One of its devices."""
        return Device(self.node, self.book.gpu.index, self.slots[number])

    def overlapping(self, bits: int) -> list[int]:
        """Devices that have one of these slices, by number."""
        masks = (device_mask(self.book.gpu.model, *position) for position in self.positions)
        return [number for number, mask in enumerate(masks) if mask & bits]


class _Found(NamedTuple):
    """A GPU, and what can be had of it for a profile."""

    gpu: _Gpu
    ways: _Ways


class _Host(NamedTuple):
    """A node that takes at least one more pod of the want."""

    gpus: list[_Found]
    room: int
    """Pods for which it has CPU, memory and pod slots."""
    seats: int
    """Pods for which its GPUs have room as they are."""
    otherwise: int
    """Pods for which they would have if their devices lay otherwise."""


def _mig_gpus(node: NodeBook) -> Iterator[_Gpu]:
    held: dict[str, list[Slot]] = {}
    for slot in node.slots:
        held.setdefault(slot.gpu, []).append(slot)
    for uuid, book in node.gpus.items():
        if book.mig and book.gpu.healthy and not any(promise.lasting for promise in book.promised):
            slots = sorted(held.get(uuid, ()), key=_START)
            yield _Gpu(node.facts.name, book, tuple(slots), tuple((slot.profile, slot.start) for slot in slots))


def _hosts(gpus: Sequence[tuple[NodeBook, list[_Gpu]]], want: Want) -> Iterator[_Host]:
    for node, on_node in gpus:
        if not (pods := node.available.times(want.needs.amount)) or not want.allowed_on(node.facts):
            continue
        serving = [_Found(gpu, _ways_of(gpu, want.profile)) for gpu in on_node if room.serves(gpu.book, want)]
        seats = sum(found.ways.seats for found in serving)
        yield _Host(serving, pods, seats, sum(found.ways.otherwise for found in serving))


class _Set(NamedTuple):
    """Devices of a GPU that end."""

    starts: tuple[int, ...]
    """Where a profile can begin then."""
    devices: tuple[int, ...]
    """By number."""


class _Ways(NamedTuple):
    """What can be had of a GPU for a profile. No two starts of a profile overlap: each start is one pod's."""

    seats: int
    """Starts that are free."""
    otherwise: int
    """Devices that could be added if those that are there lay otherwise."""
    clearing: tuple[tuple[_Set, ...], ...]
    """For one more pod, for two more, and so on: every smallest set whose end makes room for so many."""
    costs: tuple[int, ...]
    """The number of devices in each of those."""

    @property
    def is_fragmented(self) -> bool:
        """Position is what keeps pods away."""
        return self.otherwise > self.seats


def _ways_of(gpu: _Gpu, profile: str) -> _Ways:
    return _ways(gpu.book.gpu.model, profile, gpu.book.closed, gpu.positions)


@lru_cache(maxsize=65536)
def _ways(model: str, profile: str, fenced: int, positions: tuple[tuple[str, int], ...]) -> _Ways:
    shape = of_model(model)[profile]
    masks = [device_mask(model, *position) for position in positions]
    usable = [start for start in shape.starts if not shape.mask(start) & fenced]
    blocked = [start for start in usable if any(shape.mask(start) & mask for mask in masks)]
    clearing = []
    for more in range(1, len(blocked) + 1):
        sets = []
        for starts in combinations(blocked, more):
            bits = sum(shape.mask(start) for start in starts)
            sets.append(_Set(starts, tuple(number for number, mask in enumerate(masks) if mask & bits)))
        fewest = min(len(one.devices) for one in sets)
        clearing.append(tuple(one for one in sets if len(one.devices) == fewest))
    seats = len(usable) - len(blocked)
    otherwise = max(seats, _otherwise(model, profile, fenced, positions))
    return _Ways(seats, otherwise, tuple(clearing), tuple(len(sets[0].devices) for sets in clearing))


def _otherwise(model: str, profile: str, fenced: int, positions: tuple[tuple[str, int], ...]) -> int:
    """Devices of the profile that fit beside devices of these profiles, wherever all of them lie."""
    profiles, count = [name for name, _ in positions], 0
    while tuple(sorted([*profiles, *[profile] * (count + 1)])) in _mixes(model, fenced):
        count += 1
    return count


@cache
def _mixes(model: str, fenced: int) -> frozenset[tuple[str, ...]]:
    """Profiles, sorted, of every set of devices that can coexist beside fenced slices."""
    legal = (layout for layout in layouts(model) if not occupied_by(model, layout) & fenced)
    return frozenset(tuple(sorted(placement.profile for placement in layout)) for layout in legal)


def _all_starts(want: Want) -> int:
    """Slices on which a device of the profile may lie, as bits."""
    shape = of_model(want.model)[want.profile]
    return sum(shape.mask(start) for start in shape.starts)


def _is_less(costs: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whatever others offer is to be had for as few devices, and something for fewer, or more is."""
    return costs != others and len(costs) >= len(others) and all(map(le, costs, others))


# --- the smallest set -------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """Clearings that are made together."""

    devices: int
    latest: datetime
    """When the last of the devices ends."""
    elsewhere: int
    """GPUs among them on which position is not what keeps pods away."""
    clearings: tuple[Clearing, ...]


_NOTHING: Final = _Choice(0, datetime.min.replace(tzinfo=UTC), 0, ())

_Table = list[_Choice | None]
"""The best choice for each number of pods, from none on."""


def _joined(first: Sequence[_Choice | None], second: Sequence[_Choice | None], most: int) -> _Table:
    """The best choices out of both, for up to `most` pods; between equals, more out of the first."""
    best: _Table = [None] * (most + 1)
    for number in range(len(first) - 1, -1, -1):
        for more, other in enumerate(second):
            one, pods = first[number], min(number + more, most)
            if one is None or other is None:
                continue
            both = one.devices + other.devices, max(one.latest, other.latest), one.elsewhere + other.elsewhere
            known = best[pods]
            if known is None or both < _cost(known):
                best[pods] = _Choice(*both, one.clearings + other.clearings)
    return best


def _cost(choice: _Choice) -> tuple[int, datetime, int]:
    return choice.devices, choice.latest, choice.elsewhere
