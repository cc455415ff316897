"""The MIG profiles of an A100: the only geometry in the project; everything else is computed from it.

A GPU has 8 memory slices and 7 compute slices. A profile takes a contiguous run of memory slices that begins at one of
a few legal places. Source: NVIDIA MIG User Guide, "Supported MIG Profiles" (A100 40 GB and 80 GB) and
nvmlDeviceGetGpuInstancePossiblePlacements. May import nothing but the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

FULL: Final = "full"
"""Name of the profile that is a whole GPU, not in MIG mode."""
MEMORY_SLICES: Final = 8
"""Memory slices of a GPU; the unit in which GPUs are accounted."""
COMPUTE_SLICES: Final = 7
"""Compute slices of a GPU."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Shape of a MIG device."""

    name: str
    """As NVML names it on that model, e.g. ``3g.40gb``."""
    compute: int
    """Compute slices, of 7."""
    size: int
    """Memory slices, of 8."""
    starts: tuple[int, ...]
    """Memory slices at which it may begin."""

    def mask(self, start: int) -> int:
        """Bits of the memory slices that it takes when it begins at `start`."""
        return ((1 << self.size) - 1) << start


_SHAPES: Final = (
    (1, 1, (0, 1, 2, 3, 4, 5, 6)),
    (2, 2, (0, 2, 4)),
    (3, 4, (0, 4)),
    (4, 4, (0,)),
    (7, 8, (0,)),
)
"""(compute slices, memory slices, legal starts) of the five base profiles; the same on 40 and 80 GB boards."""

_A100: Final = re.compile(r"^A100-.*?(40|80)GB(?:-PCIe)?$")


@cache
def of_model(model: str) -> Mapping[str, Profile]:
    """Profiles of a GPU model by name; empty for a model whose geometry is not known (it can only be rented whole).

    `model` is the NVML name without the vendor, with - for spaces: ``A100-SXM4-80GB``, ``A100-80GB-PCIe``.
    """
    match = _A100.match(model)
    if not match:
        return MappingProxyType({})
    gigabytes_per_slice = int(match.group(1)) // MEMORY_SLICES
    profiles = (Profile(f"{g}g.{size * gigabytes_per_slice}gb", g, size, starts) for g, size, starts in _SHAPES)
    return MappingProxyType({profile.name: profile for profile in profiles})


_BY_NAME: Final = {**of_model("A100-SXM4-40GB"), **of_model("A100-SXM4-80GB")}
KNOWN_NAMES: Final = (FULL, *_BY_NAME)
"""Every profile name that a lease may ask for."""


def slices(model: str, profile: str) -> int:
    """Memory slices that a device takes: 8 for a whole GPU. Raises KeyError for a profile the model does not have."""
    return MEMORY_SLICES if profile == FULL else of_model(model)[profile].size


def widths(profile: str) -> tuple[int, int]:
    """Memory and compute slices of a device by its profile's name alone, which means the same on every model that has
    it; those of a whole GPU for `full` and for a name that is not known."""
    shape = _BY_NAME.get(profile)
    return (MEMORY_SLICES, COMPUTE_SLICES) if shape is None else (shape.size, shape.compute)
