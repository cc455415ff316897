"""Time as the agent sees it: an argument, so that tests can replace it.

Nothing else in the agent reads a clock or sleeps.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """What the agent needs of time."""

    def now(self) -> datetime:
        """Current instant, UTC: for what is stored."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed instant, never going back: for what is waited for."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """Current instant, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since boot, about."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        await asyncio.sleep(seconds)
