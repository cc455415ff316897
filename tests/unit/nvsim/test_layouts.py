"""The simulator accepts a layout exactly where brute force over the published tables calls it legal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import pynvml
import pytest

from tests.nvsim.node import Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement

BASE = {0, 1, 2, 3, 4}
"""Numbers of the five profiles without media extensions or double memory."""


class Piece(NamedTuple):
    """A GPU instance that could be there."""

    profile: int
    start: int
    size: int
    most: int

    @property
    def bits(self) -> int:
        return ((1 << self.size) - 1) << self.start


Layout = frozenset[Piece]


def pieces(device: object, numbers: Iterable[int]) -> tuple[Piece, ...]:
    """All placements of the profiles with these numbers."""
    found = calls.profiles(device)
    return tuple(
        Piece(found[number].id, place.start, place.size, found[number].instanceCount)
        for number in sorted(numbers)
        for place in calls.placements(device, found[number].id)
    )


@cache
def legal(all_pieces: tuple[Piece, ...]) -> frozenset[Layout]:
    """Every set of pieces whose memory is disjoint, with no more of a profile than there may be."""
    found: set[Layout] = set()

    def grow(layout: tuple[Piece, ...], rest: tuple[Piece, ...]) -> None:
        found.add(frozenset(layout))
        for at, piece in enumerate(rest):
            disjoint = not any(piece.bits & other.bits for other in layout)
            if disjoint and sum(other.profile == piece.profile for other in layout) < piece.most:
                grow((*layout, piece), rest[at + 1 :])

    grow((), all_pieces)
    return frozenset(found)


def accepts(device: object, piece: Piece) -> object | None:
    """The instance that was made; None where the driver has no room for it."""
    try:
        made: object = calls.create(device, piece.profile, Placement(piece.start, piece.size))
    except pynvml.NVMLError_InsufficientResources:
        return None
    return made


def disagreements(device: object, all_pieces: tuple[Piece, ...], layouts: Iterable[Layout]) -> Iterator[str]:
    """From each layout, made in some order: which further pieces the simulator and brute force judge differently."""
    known = legal(all_pieces)
    for layout in layouts:
        made = [accepts(device, piece) for piece in sorted(layout, key=hash)]
        if None in made:
            yield f"refused: {sorted(layout)}"
        for piece in all_pieces:
            more = accepts(device, piece)
            if more is not None:
                pynvml.nvmlGpuInstanceDestroy(more)
            if (more is not None) != (piece not in layout and layout | {piece} in known):
                yield f"{'accepted' if more else 'refused'}: {piece} beside {sorted(layout)}"
        for one in made:
            if one is not None:
                pynvml.nvmlGpuInstanceDestroy(one)


def test_an_a100_has_298_layouts_of_its_five_profiles(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    base = pieces(device, BASE)
    assert len(legal(base)) == 298
    assert list(disagreements(device, base, legal(base))) == []


def test_an_a100_has_2319_layouts_of_all_profiles(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    everything = pieces(device, calls.profiles(device))
    assert len(legal(everything)) == 2319
    assert list(disagreements(device, everything, legal(everything))) == []


def test_drivers_before_r510_refuse_4g_beside_3g(node: Node) -> None:
    device = calls.in_mig_mode()
    node.set("refuse_4g_3g", 1)
    calls.create(device, 5, Placement(0, 4))
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create(device, 9, Placement(4, 4))
    node.set("refuse_4g_3g", 0)
    calls.create(device, 9, Placement(4, 4))


def test_remaining_capacity_counts_what_may_still_be_made(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    for profile, whole in {19: 7, 20: 1, 15: 4, 14: 3, 9: 2, 5: 1, 0: 1}.items():
        assert pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(device, profile) == whole
    calls.create(device, 9, Placement(4, 4))
    for profile, left in {19: 4, 20: 1, 15: 2, 14: 2, 9: 1, 5: 1, 0: 0}.items():
        assert pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(device, profile) == left
