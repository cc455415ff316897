"""control_plane_ready_s: how long the embedded control plane takes from nothing until it serves, its programs built."""

from __future__ import annotations

import asyncio
import time

from tests.bench.figures import Figure, figure
from tests.cluster.control_plane import ControlPlane


def run(runs: int) -> list[Figure]:
    """Starts one after the other, each in a folder of its own."""
    return [figure("control_plane_ready_s", [asyncio.run(_start()) for _ in range(runs)], "s", "≤ 6 warm")]


async def _start() -> float:
    began = time.monotonic()
    async with ControlPlane():
        return time.monotonic() - began
