"""Pods of a gang close together: on nodes that share a label (a rack, a block, a zone). Pure.

What a gang asks for becomes several wants, the closest first: the same one for the nodes of each place that has room
for all of it, by the finest level first, and at last for all nodes. Where the lease requires a level, there are no
others. The world takes the first of those on which fewest miners stop; so closeness comes after what is disturbed and
before everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from gpu_tenancy.api.lease import Reason, TopologySpec
from gpu_tenancy.core import room
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.books import NodeBook
from gpu_tenancy.core.placement import Want, World

MOST_PLACES: Final = 8
"""Places of a level that are tried: those with least room to spare, so that others stay free for larger gangs."""

NOWHERE: Final = TopologySpec()


def closest(want: Want, asked: TopologySpec | None, world: World, levels: Sequence[str]) -> list[Want]:
    """The wants that a want becomes, in the order in which they are to be tried. `levels`: node labels by which places
    are told apart, the coarsest first."""
    topology = asked or NOWHERE
    if topology.required is not None:
        return list(_in_places(want, world, topology.required, all_of_them=True))
    if want.pods == 1:
        return [want]
    return [*(one for level in _upwards(topology, levels) for one in _in_places(want, world, level)), want]


def _upwards(topology: TopologySpec, levels: Sequence[str]) -> Iterator[str]:
    """Levels to try, the finest first; from the one that is preferred on, where one is."""
    known = list(reversed(levels))
    if topology.preferred is None:
        yield from known
    elif topology.preferred in known:
        yield from known[known.index(topology.preferred) :]
    else:
        yield topology.preferred


def _in_places(want: Want, world: World, level: str, *, all_of_them: bool = False) -> Iterator[Want]:
    """The want for each place that has room for all pods, the fullest first; else, if all of them are asked for, for
    the others too: spot leases may go there, or GPUs be converted."""
    found = _free(want, world, level)
    enough = sorted((seats, place) for place, seats in found.items() if seats >= want.pods)
    places = [place for _, place in enough[:MOST_PLACES]]
    if all_of_them:
        places += [place for _, place in enough[MOST_PLACES:]]
        places += sorted(place for place, seats in found.items() if seats < want.pods)
    for place in places:
        selector = (*want.needs.node_selector, (level, place))
        yield Want(want.profile, want.count, want.pods, want.model, replace(want.needs, node_selector=selector))


def impossible(want: Want, world: World, level: str) -> Refusal | None:
    """Why no place of a level could hold the gang, were it empty."""
    held = _count(world, level, lambda node: room.possible_seats(node, want, world))
    if not held:
        message = f"No node has the label {level}, within one value of which spec.topology requires all pods."
        return Refusal(Reason.IMPOSSIBLE, f"{message} {room.REMEDY}", final=True)
    place, most = _best(held)
    if most >= want.pods:
        return None
    message = f"Needs room for {counted(want.pods, 'pod')} within one {level}; the largest, {place}, holds {most}."
    return Refusal(Reason.IMPOSSIBLE, f"{message} {room.REMEDY}", final=True)


def no_room(wants: Sequence[Want], world: World, level: str) -> str:
    """Why no place of a level has room for the gang now; of several models, on the one that comes nearest."""
    each = ((want, *_best(_free(want, world, level))) for want in wants)
    want, place, most = max(each, key=lambda one: one[2])
    needs = f"Needs room for {counted(want.pods, 'pod')} with {want.count} × {want.profile} ({want.model}) each"
    return f"{needs} within one {level}; the best, {place}, has room for {most} beside the leases that run."


def _free(want: Want, world: World, level: str) -> Counter[str]:
    """Pods that the nodes of each place could take now."""
    return _count(world, level, lambda node: 0 if node.objection else room.free_seats(node, want))


def _count(world: World, level: str, seats: Callable[[NodeBook], int]) -> Counter[str]:
    """Pods that the nodes of each place could take."""
    found = Counter[str]()
    for node in world.nodes.values():
        if (place := node.facts.labels.get(level)) is not None:
            found[place] += seats(node)
    return found


def _best(seats: Counter[str]) -> tuple[str, int]:
    return min(seats.items(), key=lambda one: (-one[1], one[0]))
