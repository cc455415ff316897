"""The loop's own word on whether it can be relied on."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime

import pytest

from gpu_tenancy.controller import cycle as module
from gpu_tenancy.controller.cycle import BROKEN_CYCLES, Cycle
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.kube.client import KubeClient


class Loop(Cycle):
    """A loop whose cycles do nothing, or fail."""

    def __init__(self) -> None:
        super().__init__(KubeClient.connect("/nowhere"), Settings(), Metrics())
        self.fails = False
        self.turns = 0

    async def _first_sight(self) -> None:
        self.dirty.set()

    async def _turn(self) -> datetime | None:
        self.turns += 1
        self.dirty.set()
        if self.fails:
            raise RuntimeError("one object is odd")
        self.cycles += 1
        return None

    async def turn(self, times: int) -> None:
        """Run until so many cycles have begun and the last one has ended."""
        until = self.turns + times
        loop = asyncio.create_task(self._turn_forever())
        while self.turns <= until:
            await asyncio.sleep(0)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


def test_an_operator_whose_cycles_all_fail_is_not_ready_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.0)

    async def story() -> None:
        loop = Loop()
        assert loop.unready() == "no cycle has been through yet"
        await loop.turn(1)
        assert "came to no end" not in loop.unready()
        loop.fails = True
        await loop.turn(BROKEN_CYCLES)
        assert loop.unready().endswith("cycles came to no end; see the log")
        loop.fails = False
        await loop.turn(1)
        assert "came to no end" not in loop.unready()

    asyncio.run(story())


def test_an_operator_that_may_not_list_its_own_kinds_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    loop.cycles = 1
    later = time.monotonic() + 200
    monkeypatch.setattr("gpu_tenancy.controller.cycle.time.monotonic", lambda: later)
    assert loop.unready().startswith("the API server has not let everything be listed for 20")
