"""How many pods of a kind the cluster can hold, empty or as it is, and the sentences for those it cannot. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.amounts import cores, counted, gibibytes
from gpu_tenancy.core.books import GpuBook, NodeBook
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.mig.layout import highest_start
from gpu_tenancy.mig.profiles import FULL, of_model

REMEDY: Final = "Change the lease or add nodes."
NAMED: Final = 3
"""Nodes or devices that a sentence names; of more it gives the number."""


def impossible(want: Want, world: World) -> Refusal | None:
    """Refusal of a want that no empty cluster of these nodes could hold, naming the first thing that is too small."""
    fitting = 0
    for node in world.nodes.values():
        fitting += possible_seats(node, want, world)
        if fitting >= want.pods:
            return None
    if world.unseen:
        return Refusal(Reason.QUEUED, f"no node that can be read could hold it{_left_out(world)}.")
    return _why_impossible(want, world, fitting)


def _why_impossible(want: Want, world: World, fitting: int) -> Refusal:
    nodes = list(world.nodes.values())
    if not any(node.gpus for node in nodes):
        return Refusal(Reason.QUEUED, "no agent has reported a GPU yet.")
    hosts = [node for node in nodes if _seats(node, want, world)]
    seats = sum(_seats(node, want, world) for node in hosts)
    if seats < want.pods:
        return _never(_too_few_gpus(want, world, seats))
    willing = [node for node in hosts if not _lasting_objection(node, want)]
    return _never(_too_little_else(want, hosts, willing, fitting))


def no_room(want: Want, world: World) -> str:
    """Why a possible lease finds no place now: what it needs and how much of that is there."""
    usable = [node for node in world.nodes.values() if not node.objection]
    left_out = f"{_kept(usable, want)}{_left_out(world)}"
    seats = sum(free_seats(node, want) for node in usable)
    if want.profile != FULL:
        needs = f"needs {want.pods} free {want.profile} ({want.model}), {_each(want)}"
        return f"{needs}; there is room for {seats} beside the leases that run{left_out}"
    best = max((_free_wholes(node, want) for node in usable), default=0)
    if best < want.count:
        needs = f"needs {_gpus(want, 'free')} on one node"
        return f"{needs}; the best node has {best} beside the leases that run{left_out}"
    needs = f"needs room for {counted(want.pods, 'pod')} with {_gpus(want, 'free')}, {_each(want)}"
    return f"{needs}; there is room for {seats} beside the leases that run{left_out}"


def _kept(nodes: Sequence[NodeBook], want: Want) -> str:
    """What is free and promised to others, as a clause."""
    kept = [book for node in nodes if node.kept for book in node.gpus.values() if book.promised and serves(book, want)]
    if want.profile == FULL:
        count = sum(1 for book in kept if book.gpu.healthy and not book.hard)
        noun = "GPU"
    else:
        healthy = [book for book in kept if book.gpu.healthy]
        count = sum(_slices_free(book, want, book.hard) - _slices_free(book, want, book.taken) for book in healthy)
        noun = want.profile
    if not count:
        return ""
    return f"; {counted(count, f'more {noun}')} {'is' if count == 1 else 'are'} free and kept for others"


def _too_few_gpus(want: Want, world: World, seats: int) -> str:
    nodes = world.nodes.values()
    if want.profile != FULL:
        model = f" ({want.model})" if want.model else ""
        mig = sum(could_serve(book, want, world) for node in nodes for book in node.gpus.values())
        return (
            f"needs {want.pods} × {want.profile}{model}; the {mig} GPUs in MIG mode that have it hold {seats} at most"
        )
    largest = max(sum(could_serve(book, want, world) for book in node.gpus.values()) for node in nodes)
    if largest < want.count:
        return f"needs {_gpus(want, 'whole')} on one node; the largest node has {largest}"
    needs = f"needs {_gpus(want, 'whole')} on one node for each of {counted(want.pods, 'pod')}"
    return f"{needs}; all nodes together hold {counted(seats, 'pod')} of that kind"


def _too_little_else(want: Want, hosts: Sequence[NodeBook], willing: Sequence[NodeBook], fitting: int) -> str:
    if not willing:
        objections = [f"{node.facts.name}: {_lasting_objection(node, want)}" for node in hosts]
        return f"the pods may not run on the nodes that have the GPUs ({some(objections)})"
    largest = max((node.facts.allocatable for node in willing), key=lambda amount: (amount.cpu_milli, amount.memory))
    if not fitting:
        return f"each pod needs {want.needs.amount.shortage(largest)} on the largest GPU node"
    return f"needs room for {counted(want.pods, 'pod')}, {_each(want)}; all nodes together have room for {fitting}"


def _never(message: str) -> Refusal:
    return Refusal(Reason.IMPOSSIBLE, f"{message[0].upper()}{message[1:]}. {REMEDY}", final=True)


def _lasting_objection(node: NodeBook, want: Want) -> str:
    """Why the pods may never run on the node; taints that only say how the node is right now do not count."""
    facts = node.facts
    return want.needs.objection(facts.name, facts.labels, facts.lasting_taints)


def _left_out(world: World) -> str:
    objections = [node.objection for node in world.nodes.values() if node.objection]
    return f" (left out: {some(objections)})" if objections else ""


def some(sentences: Sequence[str], most: int = NAMED, separator: str = "; ") -> str:
    """The first of them, and how many more there are."""
    more = len(sentences) - most
    return separator.join([*sentences[:most], *([f"and {more} more"] if more > 0 else [])])


def serves(book: GpuBook, want: Want) -> bool:
    """The GPU is of the model and in the mode that the want needs."""
    if want.model != book.gpu.model:
        return False
    return not book.mig if want.profile == FULL else book.mig and want.profile in of_model(book.gpu.model)


def could_serve(book: GpuBook, want: Want, world: World) -> bool:
    """The GPU is of the model, and in the mode that the want needs or may be converted into it."""
    if serves(book, want):
        return True
    if not (world.converts and book.gpu.convertible) or want.model != book.gpu.model:
        return False
    return want.profile == FULL or want.profile in of_model(book.gpu.model)


def _seats(node: NodeBook, want: Want, world: World) -> int:
    """Pods that the node's GPUs could serve if nothing else were on them."""
    serving = [book for book in node.gpus.values() if could_serve(book, want, world)]
    if want.profile == FULL:
        return len(serving) // want.count
    return sum(_slices_free(book, want, 0) for book in serving)


def possible_seats(node: NodeBook, want: Want, world: World) -> int:
    """Pods that the node could take if nothing else were on it."""
    if _lasting_objection(node, want):
        return 0
    return min(_seats(node, want, world), node.facts.allocatable.times(want.needs.amount))


def _free_wholes(node: NodeBook, want: Want) -> int:
    if (still := node.undisturbed) is not None:
        return still.once(("free", want.model), lambda: _count_wholes(node, want))
    return _count_wholes(node, want)


def _count_wholes(node: NodeBook, want: Want) -> int:
    return sum(1 for book in node.gpus.values() if serves(book, want) and not book.taken and book.gpu.healthy)


def free_seats(node: NodeBook, want: Want) -> int:
    """Pods that the node could take beside its leases, its miners gone."""
    if not want.allowed_on(node.facts):
        return 0
    if want.profile == FULL:
        seats = _free_wholes(node, want) // want.count
    elif (still := node.undisturbed) is not None:
        seats = still.once(("free", want.model, want.profile), lambda: _count_slices(node, want))
    else:
        seats = _count_slices(node, want)
    return min(seats, node.available.times(want.needs.amount))


def _count_slices(node: NodeBook, want: Want) -> int:
    serving = [book for book in node.gpus.values() if serves(book, want) and book.gpu.healthy]
    return sum(_slices_free(book, want, book.taken) for book in serving)


def _slices_free(book: GpuBook, want: Want, occupied: int) -> int:
    count, shape = 0, of_model(book.gpu.model)[want.profile]
    while (start := highest_start(book.gpu.model, want.profile, occupied)) is not None:
        occupied |= shape.mask(start)
        count += 1
    return count


def _gpus(want: Want, kind: str) -> str:
    model = f" ({want.model})" if want.model else ""
    return f"{want.count} {kind} GPU{'' if want.count == 1 else 's'}{model}"


def _each(want: Want) -> str:
    amount = want.needs.amount
    return f"{cores(amount.cpu_milli)} CPU and {gibibytes(amount.memory)} memory each"
