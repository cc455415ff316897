"""The agent of one node: observe → diff → execute → report, over and over, level-triggered.

Whatever happens, a spec, an unprepared claim, a finished step, only marks the situation as changed; the cycle then
looks at all of it anew. It forgets nothing by dying: disk, hardware and API server tell it where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import IO, Any, Final, ParamSpec, TypeVar

import msgspec
from pydantic import ValidationError
from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception_type, wait_exponential_jitter

from gpu_tenancy.agent import checkpoint, heartbeat, home
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.cdi import NO_DRIVER, ClaimFiles, DriverPart
from gpu_tenancy.agent.clock import Clock, SystemClock
from gpu_tenancy.agent.deadlines import due
from gpu_tenancy.agent.dra import Plugin, Registration, serving
from gpu_tenancy.agent.dra_health import Health
from gpu_tenancy.agent.gpus import GpuError, GpuFacts
from gpu_tenancy.agent.health import learnt
from gpu_tenancy.agent.home import Home
from gpu_tenancy.agent.lanes import Lanes
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.news import news
from gpu_tenancy.agent.outbox import Outbox
from gpu_tenancy.agent.report import slice_name
from gpu_tenancy.agent.settings import AdoptForeign, AgentSettings
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.agent.steps import scrubs_to_come
from gpu_tenancy.api.node import GpuMode, GpuNodeSpec, HandOver
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import KubeError
from gpu_tenancy.kube.events import Events
from gpu_tenancy.kube.resources import GPU_NODES, RESOURCE_SLICES
from gpu_tenancy.kube.watch import Reflector

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)

COMPONENT: Final = "gpu-tenancy-agent"
"""Who says what Events say."""
_LOCK_PAUSE: Final = 0.2
_LOCK_TURNS: Final = 300
"""Looks at the lock from one warning to the next: a minute."""
_LONGEST_PAUSE: Final = 10.0


class _Metadata(msgspec.Struct, frozen=True):
    name: str
    uid: str
    generation: int = 0


class _SpecView(msgspec.Struct, frozen=True):
    """The agent's GpuNode without the status, which it writes itself: its own writes wake nobody."""

    metadata: _Metadata
    spec: dict[str, Any] = {}


class _SliceView(msgspec.Struct, frozen=True):
    """That the slice is there."""

    metadata: _Metadata


@dataclass(frozen=True, slots=True)
class Seat:
    """One node for `run_agents`: its hardware, where its files are, and what containers need of its driver."""

    machine: Machine
    settings: AgentSettings
    driver: DriverPart = NO_DRIVER
    """What containers need of its driver (`driver`)."""
    on_hand_over: Callable[[HandOver], None] = lambda _: None
    """Told of every device that was made ready."""


async def run_agents(seats: Mapping[str, Seat], client: KubeClient, clock: Clock | None = None) -> None:
    """Run the agents of these nodes, by name, until cancelled: one in a DaemonSet, many on a simulated fleet."""
    async with asyncio.TaskGroup() as tasks:
        for node, seat in seats.items():
            tasks.create_task(_run_alone(Agent(node, client, seat, clock or SystemClock()), seat.settings))


async def _run_alone(agent: Agent, settings: AgentSettings) -> None:
    with await sole_agent(settings):
        await agent.run()


async def sole_agent(settings: AgentSettings) -> IO[bytes]:
    """Wait until no other agent of this node is left, two of which may overlap during an update; this one is the only
    one until the file is closed or the process ends."""
    turns = 0
    while (file := await asyncio.to_thread(checkpoint.lock, settings.checkpoint)) is None:
        if turns % _LOCK_TURNS == 0:
            _log.warning(
                "Another agent of this node still holds %s; waiting for its end. Where its process cannot be killed "
                "(state D), a call hangs in the driver: reboot the node.", settings.checkpoint.with_suffix(".lock"),
            )  # fmt: skip
        turns += 1
        await asyncio.sleep(_LOCK_PAUSE)
    return file


class Agent:
    """The agent of one node; `run` it until it is cancelled."""

    def __init__(self, node: str, client: KubeClient, seat: Seat, clock: Clock) -> None:
        self._node = node
        self._client = client
        self._machine = seat.machine
        self._gpus = seat.machine.gpus
        self._settings = seat.settings
        self._files = ClaimFiles(seat.settings, seat.driver)
        self._home = home.Reader(client, node, seat.settings)
        self._on_hand_over = seat.on_hand_over
        self._clock = clock
        self._scrubs_expected = 0
        self._remembers = False
        self._memory: Memory | None = None

    @property
    def situation(self) -> Situation:
        """What it knows; nothing before it has begun."""
        return self._memory.situation if self._memory is not None else Situation()

    def unready(self) -> str:
        """Why it cannot serve yet, as a sentence; empty where it can."""
        if self._memory is None:
            return "the agent waits for the API server"
        return "" if self._memory.situation.generation else "the agent has not read its GpuNode yet"

    async def run(self) -> None:
        """Be the agent of this node until cancelled; the caller is its `sole_agent`.

        Raises UnreadableCheckpoint, or GpuError where the driver does not even list the GPUs.
        """
        memory = self._memory = await self._remember()
        here = await self._persist(self._home.read)
        await self._persist(home.ensure_gpu_node, self._client, here.owner)
        outbox = Outbox(self._client, memory, (self._home, here), self._clock, self._settings)
        self._declare(memory, here)
        await self._persist(outbox.resume, remembers=self._remembers)
        async with asyncio.TaskGroup() as tasks:
            await self._work(memory, outbox, tasks)

    async def _remember(self) -> Memory:
        """What disk and hardware tell."""
        boot_id = await self._gpus.boot_id()
        saved = await asyncio.to_thread(checkpoint.read, self._settings.checkpoint)
        self._remembers = bool(saved.boot_id)
        situation = replace(
            checkpoint.situation_of(saved),
            probation=timedelta(seconds=self._settings.probation_seconds),
            destroys_foreign=self._settings.adopt_foreign is AdoptForeign.DESTROY,
        )
        if saved.boot_id != boot_id:
            situation = known.rebooted(situation, self._clock.now())
        situation = known.listed(situation, await self._list(known.sound(situation)))
        return Memory(self._settings.checkpoint, boot_id, situation, self._clock)

    async def _persist(self, call: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call until the API server has answered: without it there is nothing to do."""
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(KubeError),
            wait=wait_exponential_jitter(multiplier=0.1, max=_LONGEST_PAUSE, jitter=0.1),
            sleep=self._clock.sleep,
            before_sleep=before_sleep_log(_log, logging.WARNING),
        )
        return await retrying(call, *args, **kwargs)

    async def _work(self, memory: Memory, outbox: Outbox, tasks: asyncio.TaskGroup) -> None:
        """Start everything; the order matters: nothing is taken away before the spec was read."""
        lanes = Lanes(memory, self._machine, self._clock, self._settings, tasks, self._on_hand_over)
        await self._first_look(memory, lanes, tasks)
        memory.update(known.tidied)
        tasks.create_task(heartbeat.beat(self._client, lambda: outbox.home.owner, self._clock, self._settings))
        await self._watch(memory, outbox, tasks)
        events = Events(self._client, COMPONENT)
        tasks.create_task(events.run())
        tasks.create_task(self._observe(memory, lanes, tasks))
        tasks.create_task(self._stay_home(memory, outbox))
        tasks.create_task(self._watch_deadlines(memory))
        tasks.create_task(self._listen(memory))
        await asyncio.to_thread(self._files.remove_all_but, memory.situation.prepared)
        patience = self._settings.prepare_patience_seconds
        plugin = Plugin(self._node, self._client, memory, self._files, self._clock, patience)
        registrar = Registration(self._settings.dra_socket, outbox.slice_lost)
        health = Health(self._node, memory, self._clock)
        async with serving(plugin, registrar, health, self._settings):
            tasks.create_task(outbox.run())
            await self._cycle(memory, lanes, (outbox, events), tasks)

    # ----------------------------------------------------------------------------------------------------- the cycle

    async def _cycle(self, memory: Memory, lanes: Lanes, told: tuple[Outbox, Events], tasks: asyncio.TaskGroup) -> None:
        """`told`: who tells the API server what is, and what happened."""
        outbox, events = told
        before = memory.situation
        while True:
            lanes.start()
            outbox.wake()
            self._expect_scrubs(memory, tasks)
            for note in news(before, memory.situation):
                for kind, body in outbox.subjects():
                    events.post(kind, body, *note)
            before = memory.situation
            await memory.changed.wait()
            memory.changed.clear()

    def _expect_scrubs(self, memory: Memory, tasks: asyncio.TaskGroup) -> None:
        """Have what scrubs need ready where one is to come soon; it costs nobody any waiting."""
        count = scrubs_to_come(memory.situation)
        if count != self._scrubs_expected:
            self._scrubs_expected = count
            tasks.create_task(self._machine.scrubber.prepare(count))

    async def _listen(self, memory: Memory) -> None:
        """Take in what the GPUs tell of by themselves."""
        async for event in self._gpus.events():
            _log.log(logging.WARNING if event.xid or event.lost else logging.INFO, "%s", event)
            memory.learn(learnt(memory.situation, event, self._clock.now()))

    async def _watch_deadlines(self, memory: Memory) -> None:
        """Quarantine what takes too long, and lift fences that are over."""
        while True:
            await self._clock.sleep(self._settings.deadline_seconds)
            memory.learn(due(memory.situation, self._clock.now()))

    # ----------------------------------------------------------------------------------------------------- observing

    async def _observe(self, memory: Memory, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        """Look now and then though nothing happened: GPUs fail, and other hands destroy instances."""
        while True:
            await self._clock.sleep(self._settings.observe_seconds)
            try:
                gpus = await self._list(known.sound(memory.situation))
            except GpuError as error:
                _log.warning("The GPUs of node %s could not be listed: %s", self._node, error)
                continue
            memory.learn(known.listed(memory.situation, gpus))
            for gpu in _partitioned(memory.situation):
                tasks.create_task(lanes.look(gpu))

    async def _list(self, sound: Collection[str]) -> Sequence[GpuFacts]:
        """The GPUs; where one that was sound does not look so, a second look decides: a lease hangs on it."""
        gpus = await self._gpus.list()
        if set(sound) <= {gpu.uuid for gpu in gpus if gpu.healthy}:
            return gpus
        await self._clock.sleep(self._settings.confirm_seconds)
        return await self._gpus.list()

    async def _first_look(self, memory: Memory, lanes: Lanes, tasks: asyncio.TaskGroup) -> None:
        """Learn which instances there are before anything is judged by it; a GPU that hangs is not waited for."""
        looks = asyncio.gather(*(tasks.create_task(lanes.look(gpu)) for gpu in _partitioned(memory.situation)))
        enough = asyncio.ensure_future(self._clock.sleep(self._settings.first_look_seconds))
        await asyncio.wait((enough, looks), return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()

    async def _watch(self, memory: Memory, outbox: Outbox, tasks: asyncio.TaskGroup) -> None:
        """Keep the spec in the situation, and notice when GpuNode or slice vanish; returns with the first spec."""
        specs = Reflector(
            self._client,
            GPU_NODES,
            _SpecView,
            lambda view: view.metadata.name,
            field_selector=f"metadata.name={self._node}",
            on_item=lambda old, new: self._gpu_node_changed(old, new, memory, outbox, tasks),
        )
        slices = Reflector(
            self._client,
            RESOURCE_SLICES,
            _SliceView,
            lambda view: view.metadata.name,
            field_selector=f"metadata.name={slice_name(self._node)}",
            on_item=lambda _, new: None if new else outbox.slice_lost(),
        )
        tasks.create_task(specs.run())
        tasks.create_task(slices.run())
        await specs.synced()

    def _gpu_node_changed(
        self, old: _SpecView | None, new: _SpecView | None, memory: Memory, outbox: Outbox, tasks: asyncio.TaskGroup
    ) -> None:
        if new is None:
            # What was wanted stays wanted until there is a spec that says otherwise.
            tasks.create_task(self._gpu_node_anew(memory, outbox))
            return
        if old is None or old.metadata.uid != new.metadata.uid:
            outbox.check_status(new.metadata.uid)
        try:
            spec = GpuNodeSpec.model_validate(new.spec)
        except ValidationError as error:
            _log.error("The spec of GpuNode %s is not understood and is left aside: %s", self._node, error)
            return
        memory.update(lambda now: known.specified(now, spec.slots, new.metadata.generation, spec.modes))

    async def _gpu_node_anew(self, memory: Memory, outbox: Outbox) -> None:
        """The GpuNode goes with its Node: whatever is made again belongs to the Node as it is now, or it goes too."""
        here = await self._persist(self._home.read)
        outbox.home = here
        self._declare(memory, here)
        await self._persist(home.ensure_gpu_node, self._client, here.owner)
        outbox.wake()

    async def _stay_home(self, memory: Memory, outbox: Outbox) -> None:
        """Read the Node now and then: its annotation may change, and a Node made anew owns nothing of ours yet."""
        while True:
            await self._clock.sleep(self._settings.node_seconds)
            try:
                here: Home = await self._home.read()
            except KubeError as error:
                _log.warning("Node %s could not be read: %s", self._node, error)
                continue
            if here != outbox.home:
                outbox.home = here
                self._declare(memory, here)
                outbox.wake()

    def _declare(self, memory: Memory, here: Home) -> None:
        """Take in which mode each GPU should be in."""
        indices = [gpu.index for gpu in memory.situation.gpus.values()]
        modes = home.declared_modes(here, indices)
        conflict, convertible = "; ".join(here.conflicts), here.convertible_gpus
        memory.update(lambda now: known.declared(now, modes, conflict, convertible))


def _partitioned(situation: Situation) -> list[str]:
    """UUIDs of the GPUs that can have instances."""
    return [gpu.uuid for gpu in situation.gpus.values() if gpu.mode is GpuMode.MIG]
