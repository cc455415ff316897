"""What the free part of a GPU is worth to leases to come, and what of that a placement takes away. Pure.

Slices are many, places are few: a device of four slices begins at slice 0 or 4 and nowhere else. So a free part is
worth the devices that it can still take, each profile for itself; and as a GPU that is wholly free serves everybody,
free slices count by their square. What is lost counts for as long as the placement lasts: until the last lease that is
there already ends it is what the GPU as it is loses, and from then on, a little less, what an empty one does. So leases
that end at about the same time come to lie together, and GPUs become free as a whole.

The numbers were tuned on simulated clusters, see docs/adr/0016; nothing but the quality of placements depends on them.
Knows no node and no miner.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Final

from gpu_tenancy.mig.layout import ALL_SLICES
from gpu_tenancy.mig.profiles import of_model

NOBODY: Final = 0
"""Span of a GPU of which no lease has anything."""
LASTING: Final = 64
"""Span of what has no end that is known; longer than any."""
MOST_DOUBLINGS: Final = 10
"""A placement that lasts a thousand times as long as what is there already might as well be alone."""

_WORTH: Final = {1: 0, 2: 57, 3: 14, 4: 12, 7: 49}
"""Of one place for a device, by its compute slices."""
_TOGETHER: Final = 1
"""Of free slices, times their number."""
_NOW, _LATER = 16, 15
"""How much a loss counts beside leases that are there, and once they have ended: by then others may have come."""
_MINUTE: Final = timedelta(minutes=1)


def span(left: timedelta | None) -> int:
    """How long something lasts, in doublings of a minute, from 1 on. `left`: None where there is no end."""
    return LASTING if left is None else 1 + max(0, left // _MINUTE).bit_length()


def shortest(span: int) -> timedelta:
    """The shortest time that has a span."""
    return timedelta() if span <= 1 else _MINUTE * 2 ** (span - 2)


def outlasts(lasts: int, there: int) -> int:
    """By how many doublings pods that last so long outlast the leases on a GPU. Both are spans.

    Where nobody is, whatever has an end outlasts that, and nothing is known of what has none."""
    if there == NOBODY and lasts == LASTING:
        return 0
    return min(max(lasts - there, 0), MOST_DOUBLINGS)


@cache
def loss(model: str, occupied: int, taken: int, doublings: int) -> int:
    """What leases to come lose where devices take slices of a GPU beside the occupied ones, both as bits.

    `doublings`: by how much the devices outlast the leases that are there.
    """
    beside = _worth(model, occupied) - _worth(model, occupied | taken)
    alone = _worth(model, 0) - _worth(model, taken)
    whole = 1 << MOST_DOUBLINGS
    shared = whole >> doublings
    return _NOW * beside * shared + _LATER * alone * (whole - shared)


@cache
def _worth(model: str, occupied: int) -> int:
    """Of what is left of a GPU. Places of one profile never overlap, so the number of free ones is what it can take."""
    places = sum(
        _WORTH[shape.compute]
        for shape in of_model(model).values()
        for start in shape.starts
        if not occupied & shape.mask(start)
    )
    return places + _TOGETHER * (ALL_SLICES & ~occupied).bit_count() ** 2
