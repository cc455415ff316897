"""Carries out the steps on hardware, in lanes: one for each GPU, in which one call runs at a time, and one for each
device that is being scrubbed. No lane waits for another.

A lane is a task that lives while there is something to do in it, so an idle node costs nothing. What the driver refuses
becomes a sentence on the device and a pause, never an end of the lane or of its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Final, assert_never

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.gpus import GpuError, Instance, InsufficientResources, InUse, Process
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import WHOLE_GPU, Fence, Remedy, Situation, claims_on
from gpu_tenancy.agent.steps import (
    Adopt,
    Convert,
    Create,
    Destroy,
    Hardware,
    Maintenance,
    Making,
    Prove,
    ResetGpu,
    Restore,
    Scrub,
    Verify,
    lane_of,
    mask_of,
    subject_of,
)
from gpu_tenancy.agent.vetting import asks_for_reset, objection
from gpu_tenancy.api.node import HandOver, Slot, SlotState
from gpu_tenancy.mig.profiles import FULL

_log = logging.getLogger(__name__)

SCRUBBED_SHARE: Final = 0.85
"""Share of a device's memory that a scrub must have written: a context takes some 0.5 GiB of the smallest, of 4.75."""
_NAMED: Final = 3
"""Processes that a sentence names; of more it gives the number."""
_PROCESS_PAUSES: Final = 20
"""Longest pause between looks for processes, in first pauses."""


class Lanes:
    """The lanes of one node. Its tasks belong to the TaskGroup it is given."""

    def __init__(
        self,
        memory: Memory,
        machine: Machine,
        clock: Clock,
        settings: AgentSettings,
        tasks: asyncio.TaskGroup,
        on_hand_over: Callable[[HandOver], None] = lambda _: None,
    ) -> None:
        """`on_hand_over` is told of every device that was made ready for a holder."""
        self._memory = memory
        self._gpus = machine.gpus
        self._scrubber = machine.scrubber
        self._host = machine.host
        self._clock = clock
        self._settings = settings
        self._tasks = tasks
        self._on_hand_over = on_hand_over
        self._busy: dict[str, asyncio.Lock] = {}
        self._running: set[str] = set()
        self._failures: dict[str, int] = {}

    def start(self) -> None:
        """Let each lane with a step to take begin, unless it is at it already."""
        waiting = {lane_of(step) for step in self._memory.steps if isinstance(step, Hardware)}
        for lane in waiting - self._running:
            self._running.add(lane)
            self._spawn(self._run(lane))

    async def look(self, gpu: str) -> None:
        """List the GPU's instances; where its lane is using it, what the lane finds is newer anyway.

        Where they are not known at all it looks again and again: nothing can be made or taken away until then.
        """
        lock = self._lock(gpu)
        if lock.locked():
            return
        try:
            async with lock:
                await self._walk_carefully(gpu)
        except GpuError as error:
            _log.warning("The instances of %s could not be listed: %s", gpu, error)
            if gpu not in self._memory.situation.instances:
                self._spawn(self._look_again(gpu))

    async def _walk_carefully(self, gpu: str) -> None:
        """List the instances; where one that serves is not among them a second look decides: a lease hangs on it."""
        instances = await self._gpus.instances(gpu)
        held = self._memory.situation.held.values()
        served = {one.uuid for one in held if one.slot.gpu == gpu and one.slot.profile != FULL and one.published}
        if not served <= {one.uuid for one in instances}:
            await self._clock.sleep(self._settings.confirm_seconds)
            instances = await self._gpus.instances(gpu)
        self._memory.update(lambda now: known.walked(now, gpu, instances))

    async def _look_again(self, gpu: str) -> None:
        await self._clock.sleep(self._settings.retry_seconds)
        await self.look(gpu)

    def _next(self, lane: str) -> Hardware | None:
        steps = (step for step in self._memory.steps if isinstance(step, Hardware))
        return next((step for step in steps if lane_of(step) == lane), None)

    async def _run(self, lane: str) -> None:
        try:
            while True:
                async with self._lock(lane):
                    step = self._next(lane)
                    if step is None:
                        return
                    await self._take(step)
        finally:
            self._running.discard(lane)

    async def _take(self, step: Hardware) -> None:
        subject = subject_of(step)
        try:
            await self._carry_out(step)
        except GpuError as error:
            self._refused(step, subject, str(error))
        else:
            if subject not in self._memory.situation.resting:
                self._failures.pop(subject, None)

    async def _carry_out(self, step: Hardware) -> None:
        match step:
            case Prove(subject=subject, uuid=uuid, traces=traces):
                await self._prove(subject, uuid, traces)
            case Destroy():
                await self._destroy(step)
            case ResetGpu() | Convert():
                await self._maintain(step)
            case _:
                await self._make(step)

    async def _make(self, step: Making) -> None:
        match step:
            case Restore(slot=slot):
                await self._restore(slot)
            case Create(slot=slot) if slot.profile == FULL:
                await self._take_whole(slot)
            case Create(slot=slot):
                await self._create(slot)
            case Adopt(slot=slot):
                await self._walk(slot.gpu)
                self._take_instance(slot)
            case Scrub(slot=slot, uuid=uuid):
                await self._scrub(slot, uuid)
            case Verify(slot=slot):
                await self._verify(slot)
            case _:
                assert_never(step)

    # ------------------------------------------------------------------------------------------------- taking away

    async def _prove(self, subject: str, uuid: str, traces: Sequence[str]) -> None:
        """Nobody of the former holder is left on the host, and the driver lists nobody: two looks, because a process
        that is just starting or ending can be missing from one."""
        left, found = await asyncio.gather(self._host.carrying(traces), self._gpus.processes(uuid))
        for straggler in left:
            _log.warning("Process %d (%s) has outlived its pod on %s and is killed.", *_pair(straggler), subject)
            await self._host.end(straggler, traces)
        if not (left or found):
            await self._clock.sleep(self._settings.process_interval_seconds)
            found = await self._gpus.processes(uuid)
        if left or found:
            await self._wait_for(subject, [*left, *(one for one in found if one not in left)])
        else:
            now = self._clock.now()
            self._memory.update(lambda here: known.proven_empty(here, subject, now))

    async def _destroy(self, step: Destroy) -> None:
        await self._gpus.destroy(step.instance)
        now = self._clock.now()
        self._memory.update(lambda here: known.destroyed(here, step.subject, step.instance, now))

    async def _wait_for(self, subject: str, found: Sequence[Process]) -> None:
        who = await self._named(found)
        held = self._memory.situation.held.get(subject)
        if held is not None:
            message = f"waits for {who} on {subject} to end"
            self._memory.update(lambda now: known.waiting(now, subject, held.state, message))
        first = self._settings.process_retry_seconds
        self._rest(subject, first, first * _PROCESS_PAUSES)

    # ------------------------------------------------------------------------------------------------------- making

    async def _restore(self, slot: Slot) -> None:
        for change in await self._gpus.restore(slot.gpu):
            _log.info("GPU %s, before it serves %s: %s", slot.gpu, slot.device, change)
        self._advance(slot, lambda here, now: known.restored(here, slot.device, now))

    async def _take_whole(self, slot: Slot) -> None:
        """A whole GPU is made by looking that nobody uses it, its own holder excepted."""
        gpu = self._memory.situation.gpus.get(slot.gpu)
        if gpu is not None and await self._is_unused(slot, slot.gpu):
            self._advance(slot, lambda here, now: known.partitioned(here, slot.device, gpu, now))

    async def _is_unused(self, slot: Slot, uuid: str) -> bool:
        """Whether nobody uses the device but who has a claim on it; else it is waited for."""
        found = await self._gpus.processes(uuid)
        if found and not claims_on(self._memory.situation, slot.device):
            await self._wait_for(slot.device, found)
            return False
        return True

    async def _create(self, slot: Slot) -> None:
        self._memory.update(lambda now: known.intended(now, slot))
        await self._memory.saved()
        try:
            await self._gpus.create(slot.gpu, slot.profile, slot.start)
        except InsufficientResources:  # What takes the place was there before, and is not ours for our asking.
            self._memory.update(lambda now: known.not_created(now, slot, nothing=True))
            await self._walk(slot.gpu)
            raise
        except GpuError:
            # Where the list cannot be had either, what was intended stays on record: something may have been made.
            await self._walk(slot.gpu)
            self._memory.update(lambda now: known.not_created(now, slot))
            raise
        await self._walk(slot.gpu)
        self._take_instance(slot)

    def _take_instance(self, slot: Slot) -> None:
        """What was made is what the driver lists at exactly that placement, not what a call said it had done."""
        held = self._memory.situation.held.get(slot.device)
        if held is None:
            return  # the spec dropped it meanwhile: what was made is an orphan now and goes the way of orphans
        there = known.instance_of(self._memory.situation, held)
        if there is None or not _is_usable(there):
            raise GpuError(f"the driver lists no usable {slot.profile} at memory slice {slot.start} of {slot.gpu}")
        self._advance(slot, lambda here, now: known.partitioned(here, slot.device, there, now))

    async def _scrub(self, slot: Slot, uuid: str) -> None:
        self._memory.update(lambda here: known.scrubs(here, slot.device))
        try:
            scrub = await self._scrubber.scrub(uuid)
            self._check_scrub(slot, scrub)
        finally:
            self._memory.update(lambda here: known.rests_from_scrubbing(here, slot.device))
        self._advance(slot, lambda here, now: known.scrubbed(here, slot.device, scrub, now))

    def _check_scrub(self, slot: Slot, scrub: known.Scrub) -> None:
        """What a context takes for itself cannot be had; more than that must not be missing."""
        held = self._memory.situation.held.get(slot.device)
        if held is not None and held.shape is not None and scrub.bytes < SCRUBBED_SHARE * (held.shape.memory_mib << 20):
            wrote = f"{scrub.bytes >> 20} of {held.shape.memory_mib} MiB"
            raise GpuError(f"the scrub of {slot.device} wrote {wrote}; look who else is on it")

    async def _verify(self, slot: Slot) -> None:
        """Ready is what looks as it should, from the outside, at that moment."""
        held = self._memory.situation.held.get(slot.device)
        if held is None:
            return
        if not await self._is_unused(slot, held.uuid):
            self._memory.update(lambda here: known.unscrubbed(here, slot.device))
            return
        vitals = await self._gpus.vitals(slot.gpu)
        before = self._memory.situation.examined.get(slot.gpu)
        if (wrong := objection(vitals, before)) is not None:
            if asks_for_reset(vitals, before):
                self._condemn(slot, wrong)
            raise GpuError(f"GPU {slot.gpu} is not fit for {slot.device}: {wrong}")
        now_held = self._memory.situation.held.get(slot.device)
        if now_held is None or (now_held.scrub, now_held.hand_over) != (held.scrub, held.hand_over):
            return  # It was condemned meanwhile: what was verified counts for nothing.
        mask = mask_of(self._memory.situation, slot.device)
        again = held.hand_over is not None
        self._advance(slot, lambda here, now: known.made_ready(here, slot.device, vitals, mask, now))
        made = self._memory.situation.held.get(slot.device)
        if made is not None and made.hand_over is not None and not again:
            self._on_hand_over(made.hand_over)

    def _condemn(self, slot: Slot, wrong: str) -> None:
        """What a reset would mend waits for it. Who is served on other slices of the GPU is left alone until then."""
        if slot.device not in self._memory.situation.held:
            return
        reason = f"GPU {slot.gpu}: {wrong}; it is reset once nobody is on it"
        mask = WHOLE_GPU if slot.profile == FULL else mask_of(self._memory.situation, slot.device)
        fence = Fence(gpu=slot.gpu, mask=mask, reason=reason, remedy=Remedy.RESET)
        self._memory.update(lambda here: known.condemned(here, fence, [slot.device]))

    def _advance(self, slot: Slot, transition: Callable[[Situation, datetime], Situation]) -> None:
        """A step is done; of a device that the spec has dropped meanwhile nobody wants to know."""
        now = self._clock.now()
        if slot.device in self._memory.situation.held:
            self._memory.update(lambda here: transition(here, now))

    async def _walk(self, gpu: str) -> None:
        instances = await self._gpus.instances(gpu)
        self._memory.update(lambda now: known.walked(now, gpu, instances))

    # -------------------------------------------------------------------------------------------- a GPU as a whole

    async def _maintain(self, step: Maintenance) -> None:
        """Reset or convert a GPU once; where that is refused it is left alone until the node is rebooted."""
        if found := await self._users(step.gpu):
            self._later(step.gpu, f"it is in use by {await self._named(found)}")
            return
        began = self._clock.now()
        self._memory.update(lambda here: known.maintenance_began(here, step.gpu))
        try:
            await self._reset_or_convert(step)
        except InUse as error:
            self._later(step.gpu, str(error))
            return
        except GpuError as error:
            self._give_up(step.gpu, error)
        else:
            _log.info("%s of GPU %s is done.", type(step).__name__, step.gpu)
            now = self._clock.now()
            self._memory.update(lambda here: known.reset_done(here, step.gpu, now))
        finally:
            took = max(timedelta(), self._clock.now() - began)
            self._memory.update(lambda here: known.maintenance_ended(here, step.gpu, took))
        gpus = await self._gpus.list()
        self._memory.update(lambda here: known.listed(here, gpus))

    async def _reset_or_convert(self, step: Maintenance) -> None:
        if isinstance(step, ResetGpu):
            await self._gpus.reset(step.gpu)
        else:
            await self._convert(step)

    def _give_up(self, gpu: str, error: GpuError) -> None:
        _log.error("GPU %s is left alone until the node is rebooted: %s", gpu, error)
        fence = Fence(gpu=gpu, mask=WHOLE_GPU, reason=f"{error}; reboot the node", remedy=Remedy.REBOOT)
        self._memory.update(lambda here: known.fenced(here, fence))

    async def _users(self, gpu: str) -> Sequence[Process]:
        """Who uses a GPU; one that needs a reset answers nothing, and whoever had it was proven gone."""
        try:
            return await self._gpus.processes(gpu)
        except GpuError:
            return ()

    def _later(self, gpu: str, why: str) -> None:
        _log.warning("GPU %s is not reset or converted yet: %s", gpu, why)
        self._rest(gpu, self._settings.retry_seconds, self._settings.retry_limit_seconds)

    async def _convert(self, step: Convert) -> None:
        """The mode that was asked for, read back; where it waits for a reset, a reset of this GPU alone."""
        if not await self._gpus.set_mode(step.gpu, step.mode):
            await self._gpus.reset(step.gpu)
        modes = {gpu.uuid: gpu.mode for gpu in await self._gpus.list()}
        if modes.get(step.gpu) is not step.mode:
            raise GpuError(f"GPU {step.gpu} is not in mode {step.mode} though it was asked to and reset")

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

    async def _named(self, found: Sequence[Process]) -> str:
        """Some of them, with their pods, as a part of a sentence."""
        named = ", ".join(_named(one) for one in await self._host.placed(found[:_NAMED]))
        return named if len(found) <= _NAMED else f"{named} and {len(found) - _NAMED} more"

    def _lock(self, gpu: str) -> asyncio.Lock:
        return self._busy.setdefault(gpu, asyncio.Lock())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.create_task(work)


def _is_usable(instance: Instance) -> bool:
    return bool(instance.uuid) and instance.compute_instance is not None


def _pair(process: Process) -> tuple[int, str]:
    return process.pid, process.name


def _named(process: Process) -> str:
    named = f"process {process.pid} ({process.name})"
    return f"{named} of pod {process.pod}" if process.pod else named
