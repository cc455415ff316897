"""Carries out the steps on hardware: one lane per GPU, in which one call runs at a time; lanes never wait for another.

A lane is a task that lives while its GPU has something to do, so an idle node costs nothing. What the driver refuses
becomes a sentence on the device and a pause, never an end of the lane or of its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Final, assert_never

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.gpus import GpuError, GpuFacts, Gpus, Instance, Process
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import claims_on
from gpu_tenancy.agent.steps import Adopt, Create, Destroy, Hardware, Prove, gpu_of
from gpu_tenancy.api.node import Slot, SlotState
from gpu_tenancy.mig.profiles import FULL

_log = logging.getLogger(__name__)

_PROCESS_PAUSES: Final = 10
"""Longest pause between looks for processes, in first pauses."""


class Lanes:
    """The lanes of one node. Its tasks belong to the TaskGroup it is given."""

    def __init__(
        self, memory: Memory, gpus: Gpus, clock: Clock, settings: AgentSettings, tasks: asyncio.TaskGroup
    ) -> None:
        self._memory = memory
        self._gpus = gpus
        self._clock = clock
        self._settings = settings
        self._tasks = tasks
        self._busy: dict[str, asyncio.Lock] = {}
        self._running: set[str] = set()
        self._failures: dict[str, int] = {}

    def start(self) -> None:
        """Let each lane with a step to take begin, unless it is at it already."""
        waiting = {gpu_of(step) for step in self._memory.steps if isinstance(step, Hardware)}
        for gpu in waiting - self._running:
            self._running.add(gpu)
            self._spawn(self._run(gpu))

    async def look(self, gpu: str) -> None:
        """List the GPU's instances; where its lane is using it, what the lane finds is newer anyway.

        Where they are not known at all it looks again and again: nothing can be made or taken away until then.
        """
        lock = self._lock(gpu)
        if lock.locked():
            return
        try:
            async with lock:
                await self._walk(gpu)
        except GpuError as error:
            _log.warning("The instances of %s could not be listed: %s", gpu, error)
            if gpu not in self._memory.situation.instances:
                self._spawn(self._look_again(gpu))

    async def _look_again(self, gpu: str) -> None:
        await self._clock.sleep(self._settings.retry_seconds)
        await self.look(gpu)

    def _next(self, gpu: str) -> Hardware | None:
        steps = (step for step in self._memory.steps if isinstance(step, Hardware))
        return next((step for step in steps if gpu_of(step) == gpu), None)

    async def _run(self, gpu: str) -> None:
        try:
            while True:
                async with self._lock(gpu):
                    step = self._next(gpu)
                    if step is None:
                        return
                    await self._take(step)
        finally:
            self._running.discard(gpu)

    async def _take(self, step: Hardware) -> None:
        subject = step.slot.device if isinstance(step, Create | Adopt) else step.subject
        try:
            await self._carry_out(step)
        except GpuError as error:
            self._refused(step, subject, str(error))
        else:
            if subject not in self._memory.situation.resting:
                self._failures.pop(subject, None)

    async def _carry_out(self, step: Hardware) -> None:
        match step:
            case Prove(subject=subject, uuid=uuid):
                await self._prove(subject, uuid)
            case Destroy(instance=instance):
                await self._gpus.destroy(instance)
                self._memory.update(lambda now: known.destroyed(now, instance))
            case Create(slot=slot) if slot.profile == FULL:
                await self._check_whole(slot)
            case Create(slot=slot):
                await self._create(slot)
            case Adopt(slot=slot):
                await self._walk(slot.gpu)
                await self._verify(slot)
            case _:
                assert_never(step)

    # ------------------------------------------------------------------------------------------------- taking away

    async def _prove(self, subject: str, uuid: str) -> None:
        """Two looks, because a process that is just starting or ending can be missing from one."""
        found = await self._gpus.processes(uuid)
        if not found:
            await self._clock.sleep(self._settings.process_interval_seconds)
            found = await self._gpus.processes(uuid)
        if found:
            self._wait_for(subject, found)
        else:
            self._memory.update(lambda now: known.proven_empty(now, subject))

    def _wait_for(self, subject: str, found: Sequence[Process]) -> None:
        held = self._memory.situation.held.get(subject)
        if held is not None:
            message = f"waits for {_named(found)} on {subject} to end"
            self._memory.update(lambda now: known.waiting(now, subject, held.state, message))
        first = self._settings.process_retry_seconds
        self._rest(subject, first, first * _PROCESS_PAUSES)

    # ------------------------------------------------------------------------------------------------------- making

    async def _check_whole(self, slot: Slot) -> None:
        """A whole GPU is made by looking that nobody uses it, its own holder excepted."""
        found = await self._gpus.processes(slot.gpu)
        gpu = self._memory.situation.gpus.get(slot.gpu)
        if found and not claims_on(self._memory.situation, slot.device):
            self._wait_for(slot.device, found)
        elif gpu is not None:
            self._ready(slot, gpu)

    async def _create(self, slot: Slot) -> None:
        self._memory.update(lambda now: known.intended(now, slot))
        await self._memory.saved()
        try:
            await self._gpus.create(slot.gpu, slot.profile, slot.start)
        except GpuError:
            self._memory.update(lambda now: known.not_created(now, slot))
            await self._walk(slot.gpu)
            raise
        await self._walk(slot.gpu)
        await self._verify(slot)

    async def _verify(self, slot: Slot) -> None:
        """Ready is what the driver lists at exactly that placement, not what a call said it had done."""
        held = self._memory.situation.held.get(slot.device)
        if held is None:
            return  # the spec dropped it meanwhile: what was made is an orphan now and goes the way of orphans
        there = known.instance_of(self._memory.situation, held)
        if there is None or not _is_usable(there):
            raise GpuError(f"the driver lists no usable {slot.profile} at memory slice {slot.start} of {slot.gpu}")
        self._ready(slot, there)

    def _ready(self, slot: Slot, thing: GpuFacts | Instance) -> None:
        now = self._clock.now()
        if slot.device in self._memory.situation.held:
            self._memory.update(lambda here: known.made_ready(here, slot.device, thing, now))

    async def _walk(self, gpu: str) -> None:
        instances = await self._gpus.instances(gpu)
        self._memory.update(lambda now: known.walked(now, gpu, instances))

    # ----------------------------------------------------------------------------------------------------- patience

    def _refused(self, step: Hardware, subject: str, message: str) -> None:
        _log.warning("%s of %s failed: %s", type(step).__name__, subject, message)
        held = self._memory.situation.held.get(subject)
        if held is not None:
            state = held.state if isinstance(step, Prove | Destroy) else SlotState.FAILED
            self._memory.update(lambda now: known.waiting(now, subject, state, message))
        self._rest(subject, self._settings.retry_seconds, self._settings.retry_limit_seconds)

    def _rest(self, subject: str, first: float, longest: float) -> None:
        failures = self._failures.get(subject, 0)
        self._failures[subject] = failures + 1
        self._memory.update(lambda now: known.rested(now, subject))
        self._spawn(self._wake(subject, min(longest, first * 2.0 ** min(failures, 30))))

    async def _wake(self, subject: str, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._memory.update(lambda now: known.woken(now, subject))

    def _lock(self, gpu: str) -> asyncio.Lock:
        return self._busy.setdefault(gpu, asyncio.Lock())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(work)


def _is_usable(instance: Instance) -> bool:
    return bool(instance.uuid) and instance.compute_instance is not None


def _named(found: Sequence[Process]) -> str:
    named = ", ".join(f"process {one.pid} ({one.name})" for one in found[:3])
    return named if len(found) <= 3 else f"{named} and {len(found) - 3} more"
