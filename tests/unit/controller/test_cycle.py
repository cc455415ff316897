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
from gpu_tenancy.core.actions import Admit, Plan
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.resources import Resource
from tests.unit.controller.facts import NOW, Object, body, lease


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


class Shop(Cycle):
    """A loop that would lease without a price for as long as it knows of no PriceBook."""

    def __init__(self) -> None:
        super().__init__(KubeClient.connect("/nowhere"), Settings(), Metrics())
        self._client = self  # type: ignore[assignment]  # answers the one question that is asked

    async def list(self, res: Resource) -> tuple[list[Object], str]:
        """The API server has a book of which no watch has told."""
        spec = {"currency": "RUB", "effectiveFrom": "2026-01-01T00:00:00Z", "rates": []}
        return [body(res.kind, "list", None, spec=spec)], "7"

    def _plan(self, snapshot: Snapshot, now: datetime) -> Plan:  # noqa: ARG002  (as in Cycle)
        return Plan() if snapshot.books else Plan(actions=(Admit(lease(), 1, None),))


def test_nothing_is_leased_unpriced_before_the_api_server_was_asked_for_price_books() -> None:
    async def story() -> None:
        shop = Shop()
        snapshot, plan = await shop._decide(Snapshot(), NOW)
        assert [book.name for book in snapshot.books] == ["list"]
        assert plan == Plan()

    asyncio.run(story())
