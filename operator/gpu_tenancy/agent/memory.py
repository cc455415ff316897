"""The agent's one mutable thing: the current situation, on disk before anybody relies on it.

Every part of the agent reads it and changes it through pure transitions, between two awaits; whoever acts outside the
process waits for `saved` first. It carries out no step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent.situation import Situation


class Memory:
    """The situation of one node. `changed` is set by every change; its one reader clears it."""

    def __init__(self, path: Path, boot_id: str, situation: Situation) -> None:
        self.changed = asyncio.Event()
        self.boot_id = boot_id
        self._path = path
        self._situation = situation
        self._saved: str | None = None
        self._saving = asyncio.Lock()

    @property
    def situation(self) -> Situation:
        """What is known now."""
        return self._situation

    def learn(self, situation: Situation) -> None:
        """Replace what is known by a transition of it; the caller has not awaited since it read it."""
        if situation is not self._situation:
            self._situation = situation
            self.changed.set()

    def update(self, transition: Callable[[Situation], Situation]) -> None:
        """Apply a transition to what is known now."""
        self.learn(transition(self._situation))

    async def saved(self) -> None:
        """Return once everything known by now is on disk; several callers share one write."""
        async with self._saving:
            text = checkpoint.of(self._situation, self.boot_id).model_dump_json(by_alias=True, exclude_defaults=True)
            if text != self._saved:
                await asyncio.to_thread(checkpoint.write, self._path, text)
                self._saved = text
