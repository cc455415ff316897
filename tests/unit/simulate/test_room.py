"""Room: what would fit beside the leases if it were asked for alone; miners are in nobody's way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Final

import pytest

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import GpuMode, Slot
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import device_mask
from gpu_tenancy.mig.profiles import of_model
from gpu_tenancy.simulate.room import Room, room_on
from tests.unit.core.builders import MODEL, START, gpus

EMPTY: Final = {"1g.10gb": 7, "2g.20gb": 3, "3g.40gb": 2, "4g.40gb": 1, "7g.80gb": 1}


def node(
    name: str, *held: tuple[int, str, int], count: int = 2, mig: int = 0, kind: HolderKind = HolderKind.GPU_LEASE
) -> NodeFacts:
    """A node on which leases have these: GPU, profile, start."""
    found = gpus(name, count, range(count - mig, count))
    holder = Holder(kind=kind, namespace="team", name="l", uid="uid")
    slots = tuple(
        Slot(device=f"d{number}", gpu=found[gpu].uuid, profile=profile, start=start, holder=holder, since=START)
        for number, (gpu, profile, start) in enumerate(held)
    )
    return NodeFacts(name, 1, tuple(found), slots, ())


def test_an_empty_node_has_room_for_whole_gpus_or_for_slices_as_its_gpus_are() -> None:
    assert room_on([node("a", mig=1)]) == Room({"full": 1, **EMPTY}, 1, 0)
    assert room_on([node("a"), node("b")]) == Room({"full": 4}, 2, 2)


def test_what_a_lease_has_is_no_room_and_what_a_miner_has_is() -> None:
    assert room_on([node("a", (0, "full", 0))]) == Room({"full": 1}, 1, 0)
    assert room_on([node("a", (0, "full", 0), kind=HolderKind.MINING_POOL)]) == Room({"full": 2}, 2, 1)


def test_nodes_that_do_not_serve_and_gpus_that_are_not_well_have_none() -> None:
    sound = node("a")
    broken = [sound.gpus[0].model_copy(update={"healthy": False}), sound.gpus[1]]
    assert room_on([replace(sound, ready=False)]) == Room({}, 0, 0)
    assert room_on([replace(sound, gpus=tuple(broken))]) == Room({"full": 1}, 1, 0)


@pytest.mark.parametrize(
    ("held", "fits"),
    [
        ((0, "1g.10gb", 6), {**EMPTY, "1g.10gb": 6, "3g.40gb": 1, "7g.80gb": 0}),
        ((0, "1g.10gb", 3), {**EMPTY, "1g.10gb": 6, "2g.20gb": 2, "3g.40gb": 1, "4g.40gb": 0, "7g.80gb": 0}),
        ((0, "7g.80gb", 0), dict.fromkeys(EMPTY, 0)),
    ],
)
def test_where_a_slice_lies_decides_what_fits_beside_it(held: tuple[int, str, int], fits: Mapping[str, int]) -> None:
    assert room_on([node("a", held, count=1, mig=1)]).fits == fits


def test_counting_from_the_left_finds_the_most_on_every_gpu() -> None:
    for fence in range(256):
        gpu = gpus("a", 1, {0})[0].model_copy(update={"fenced": [bit for bit in range(8) if fence >> bit & 1]})
        assert gpu.mode is GpuMode.MIG
        found = room_on([NodeFacts("a", 1, (gpu,), (), ())]).fits
        assert {profile: found.get(profile, 0) for profile in EMPTY} == {one: _most(one, fence) for one in EMPTY}


def _most(profile: str, fence: int) -> int:
    """By trying every set of places."""
    masks = [device_mask(MODEL, profile, start) for start in of_model(MODEL)[profile].starts]
    best = 0
    for chosen in product((False, True), repeat=len(masks)):
        taken, together = fence, True
        for mask in (mask for mask, is_chosen in zip(masks, chosen, strict=True) if is_chosen):
            together = together and not taken & mask
            taken |= mask
        best = max(best, sum(chosen) if together else 0)
    return best
