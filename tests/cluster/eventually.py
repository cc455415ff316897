"""Waiting in tests for what a cluster will show sooner or later. No assertion about how soon: machines are shared."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE_SECONDS: Final = 150.0
POLL_SECONDS: Final = 0.02


async def eventually(
    what: str, look: Callable[[], Awaitable[T | None]], patience_seconds: float = PATIENCE_SECONDS
) -> T:
    """Call `look` until it returns something true, and return that.

    Raises AssertionError naming `what`, and the last thing seen, when it does not happen; whatever `look` raises.
    """
    deadline = time.monotonic() + patience_seconds
    while not (seen := await look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience_seconds:.0f} s in vain for {what}; last seen: {seen!r}")
        await asyncio.sleep(POLL_SECONDS)
    return seen
