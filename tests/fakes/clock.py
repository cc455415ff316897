"""A clock that stands still until somebody needs it to move."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_TURNS: Final = 50
"""Turns of the event loop after which everything that can run without time passing has run."""


class FakeClock:
    """Time in which only sleeping takes time. Sleepers wake in order; `until` moves the hand from one to the next."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = count()

    def now(self) -> datetime:
        """Current instant."""
        return EPOCH + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until the hand has moved that far."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.seconds + seconds, next(self._order), woken))
        await woken

    async def until(self, condition: Callable[[], bool], limit_seconds: float = 600.0) -> None:
        """Let time pass until the condition holds. Raises AssertionError where nothing moves any more, or at the limit.

        limit_seconds: in this clock's time.
        """
        limit = self.seconds + limit_seconds
        while not await _comes_true(condition):
            assert self._sleepers, "nobody sleeps and nothing happens: the condition will never hold"
            due, _, woken = heapq.heappop(self._sleepers)
            assert due <= limit, f"the condition did not come to hold within {limit_seconds} s"
            self.seconds = due
            if not woken.done():
                woken.set_result(None)

    async def pass_by(self, seconds: float) -> None:
        """Let that much time pass, with everything that happens in it."""
        over = asyncio.ensure_future(self.sleep(seconds))
        await self.until(over.done)


async def _comes_true(condition: Callable[[], bool]) -> bool:
    for _ in range(_TURNS):
        if condition():
            return True
        await asyncio.sleep(0)
    return condition()
