"""The agent's one mutable thing: the current situation, on disk before anybody relies on it.

Every part of the agent reads it and changes it through pure transitions, between two awaits; whoever acts outside the
process waits for `saved` first. It carries out no step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.agent.steps import Step, settled


class Memory:
    """The situation of one node. `changed` is set by every change; its one reader clears it."""

    def __init__(self, path: Path, boot_id: str, situation: Situation, clock: Clock) -> None:
        self.changed = asyncio.Event()
        self.boot_id = boot_id
        self._path = path
        self._clock = clock
        self._situation = situation
        self._settled: Situation | None = None
        self._steps: tuple[Step, ...] = ()
        self._kept: tuple[object, ...] = ()
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

    @property
    def steps(self) -> tuple[Step, ...]:
        """What follows from what is known now. Asking takes the steps that change nothing but what is known."""
        if self._settled is not self._situation:
            situation, self._steps = settled(self._situation, self._clock.now())
            self.learn(situation)
            self._settled = situation
        return self._steps

    async def saved(self) -> None:
        """Return once everything known by now is on disk; several callers share one write."""
        async with self._saving:
            known = self._situation
            kept = (
                known.held, known.made, known.prepared, known.former, known.fences,
                known.gpus, known.xids, known.examined,
            )  # fmt: skip
            if all(one is other for one, other in zip(kept, self._kept, strict=False)) and self._kept:
                return
            text = checkpoint.of(known, self.boot_id).model_dump_json(by_alias=True, exclude_defaults=True)
            if text != self._saved:
                await asyncio.to_thread(checkpoint.write, self._path, text)
                self._saved = text
            self._kept = kept
