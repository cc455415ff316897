"""Layouts: sets of placements that can exist on one GPU at the same time, as bit masks of memory slices.

Tables are computed once from the profiles: 14 placements, 298 legal sets on an A100. Two placements can coexist exactly
when their memory slices do not overlap; the limit of 7 compute slices then holds by itself (checked by test).
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from gpu_tenancy.mig.profiles import MEMORY_SLICES, Profile, of_model

ALL_SLICES: Final = (1 << MEMORY_SLICES) - 1
"""Every memory slice of a GPU, as bits."""


class Placement(NamedTuple):
    """A profile at its first memory slice."""

    profile: str
    start: int


@cache
def placements(model: str) -> tuple[Placement, ...]:
    """Every placement of a model, widest profile first, then highest start first."""
    wide_first = sorted(of_model(model).values(), key=lambda profile: -profile.compute)
    return tuple(Placement(profile.name, start) for profile in wide_first for start in reversed(profile.starts))


@cache
def mask_of(model: str, placement: Placement) -> int:
    """Memory slices of a placement as bits. Raises KeyError for a profile the model does not have."""
    return of_model(model)[placement.profile].mask(placement.start)


@cache
def device_mask(model: str, profile: str, start: int) -> int:
    """Memory slices of a device as bits: all for a whole GPU, and for a profile that the model does not have."""
    shape = of_model(model).get(profile)
    return shape.mask(start) & ALL_SLICES if shape else ALL_SLICES


@cache
def highest_start(model: str, profile: str, occupied: int) -> int | None:
    """Highest legal start at which the profile fits beside the occupied slices, or None.

    Highest first keeps the low slices, where 4g and 7g must begin, free for longest; measured better than the choice
    of GPU for three mixes of four.
    """
    shape = of_model(model).get(profile)
    if shape is None:
        return None
    return next((start for start in reversed(shape.starts) if not occupied & shape.mask(start)), None)


@cache
def layouts(model: str) -> frozenset[frozenset[Placement]]:
    """Every set of placements that can coexist on one GPU, the empty one and all partial ones included."""
    found: set[frozenset[Placement]] = {frozenset()}
    for placement in placements(model):
        bits = mask_of(model, placement)
        found |= {one | {placement} for one in found if not bits & occupied_by(model, one)}
    return frozenset(found)


def occupied_by(model: str, layout: frozenset[Placement]) -> int:
    """Memory slices that a layout takes, as bits."""
    mask = 0
    for placement in layout:
        mask |= mask_of(model, placement)
    return mask


@cache
def filling(model: str, occupied: int) -> tuple[Placement, ...]:
    """The placements that use what is left of a GPU best: most compute slices, then fewest devices, widest first.

    An empty GPU is filled by its one widest profile. Deterministic, so that the same leases always leave the same
    rest and nothing is repartitioned without need.
    """

    def worth(layout: frozenset[Placement]) -> tuple[int, int, list[Placement]]:
        profiles: list[Profile] = [of_model(model)[placement.profile] for placement in layout]
        ordered = sorted(layout, key=lambda placement: (-of_model(model)[placement.profile].compute, -placement.start))
        return (-sum(profile.compute for profile in profiles), len(profiles), ordered)

    fitting = (layout for layout in layouts(model) if not occupied & occupied_by(model, layout))
    return tuple(min(map(worth, fitting))[2])
