"""What breaks, and when: drawn by chance from a seed, the same for the same seed whatever the leases do. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.simulate.description import Faults, Machine

DAY = timedelta(days=1)


class Fault(NamedTuple):
    """Something that breaks and is mended."""

    node: str
    gpu: str
    """UUID of the GPU; empty: the whole node is lost."""
    after: timedelta
    """Since it was mended last."""
    repair: timedelta
    """How long it takes."""


def faults_of(machine: Machine, faults: Faults, seed: int) -> Iterator[Iterator[Fault]]:
    """For each thing that can break on a node: all of its faults, one after the other, without end."""
    if faults.node_mean_days is not None:
        yield _series(machine.name, "", faults.node_mean_days, faults.node_repair, seed)
    if faults.xid_mean_days is not None:
        for gpu in machine.gpus:
            yield _series(machine.name, gpu.uuid, faults.xid_mean_days, faults.xid_repair, seed)


def _series(node: str, gpu: str, mean_days: float, repair: str, seed: int) -> Iterator[Fault]:
    chance = random.Random(f"{seed}/{node}/{gpu}")  # noqa: S311  (no secret)
    while True:
        yield Fault(node, gpu, chance.expovariate(1 / mean_days) * DAY, parse_duration(repair))
