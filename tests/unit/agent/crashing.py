"""A warm process that plays hand-overs on the simulator and kills the agent at chosen NVML calls.

``python -m tests.unit.agent.crashing FOLDER CALL…``: for each CALL a new node, an agent that is killed when that call
returns, a second one that goes on where the first left off, and a look at what is there in the end; the line printed
for each says in JSON what is wrong, or nothing. At CALL 0 nobody is killed: its line tells how many calls there are.

Only the API server is played: what it would hold is in a file, written as the agent's outbox writes. Children are
forked, so that nothing is loaded anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pynvml

from gpu_tenancy.agent import checkpoint, steps
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.clock import SystemClock
from gpu_tenancy.agent.lanes import Lanes
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.nvml import NvmlGpus
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import Scrub
from gpu_tenancy.api.base import ApiModel
from gpu_tenancy.api.node import GpuMode, Slot, SlotState
from gpu_tenancy.mig.profiles import FULL
from tests.fakes.machine import FakeHost
from tests.nvsim.library import library
from tests.nvsim.node import STATE, Node
from tests.unit.agent.world import EPOCH, holder

SCRIPT: Final = tuple(
    itertools.islice(
        itertools.cycle(
            (
                {0: [(FULL, 0, 2)], 1: [("7g.80gb", 0, 2)]},
                {0: [(FULL, 0, 1)], 1: [("3g.40gb", 4, 1), ("4g.40gb", 0, 2)]},
                {0: [(FULL, 0, 2)], 1: [("3g.40gb", 4, 1), ("1g.10gb", 0, 3), ("2g.20gb", 2, 5)]},
                {0: [], 1: [("3g.40gb", 4, 2), ("3g.40gb", 0, 1)]},
                {0: [(FULL, 0, 3)], 1: []},
            )
        ),
        20,
    )
)
"""Twenty specs in a row: by GPU (profile, first memory slice, number of the holder). The second is in MIG mode."""
PATIENCE_SECONDS: Final = 30.0


class Api(ApiModel):
    """What the API server holds."""

    position: int = 0
    """Which spec of the script is in force."""
    in_slice: tuple[str, ...] = ()
    """Devices of the ResourceSlice."""
    ready_at: dict[str, datetime] = {}
    """What GpuNode.status says."""


class NoScrub:
    """Memory is not what this is about."""

    async def scrub(self, device: str) -> Scrub:
        """Nothing is overwritten."""
        del device
        return Scrub(bytes=1 << 50, samples=1)

    async def prepare(self, count: int) -> None:
        """Nothing is kept ready."""
        del count


class Life:
    """One life of an agent on a node in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._settings = AgentSettings(
            state_dir=folder / "agent", process_interval_seconds=0.001, retry_seconds=0.01, process_retry_seconds=0.01
        )
        there = folder / "api.json"
        self._api = Api.model_validate_json(there.read_text()) if there.exists() else Api()

    async def run(self) -> None:
        """From where the life before has left off to the end of the script."""
        gpus = NvmlGpus.open(self._folder / "boot_id")
        facts = await gpus.list()
        clock = SystemClock()
        saved = checkpoint.read(self._settings.checkpoint)
        situation = known.listed(checkpoint.situation_of(saved), facts)
        situation = known.resumed(situation, self._api.in_slice, self._api.ready_at, clock.now())
        memory = Memory(self._settings.checkpoint, await gpus.boot_id(), situation, clock)
        async with asyncio.TaskGroup() as tasks:
            lanes = Lanes(memory, Machine(gpus, NoScrub(), FakeHost()), clock, self._settings, tasks)
            for gpu in facts:
                if gpu.mode is GpuMode.MIG:
                    await lanes.look(gpu.uuid)
            work = tasks.create_task(self._work(memory, lanes))
            uuids = {gpu.index: gpu.uuid for gpu in facts}
            for position in range(self._api.position, len(SCRIPT)):
                await self._hand_over(position, uuids, memory)
            work.cancel()
        await self._check(gpus, uuids, memory)

    async def _work(self, memory: Memory, lanes: Lanes) -> None:
        """The agent's cycle, and what its outbox does."""
        while True:
            await self._announce(memory)
            lanes.start()
            await memory.changed.wait()
            memory.changed.clear()

    async def _announce(self, memory: Memory) -> None:
        """On disk first; then the slice, then the status, as the outbox has it."""
        await memory.saved()
        names = [held.slot.device for held in steps.slice_next(memory.situation, memory.steps)]
        memory.update(lambda now: known.publishing(now, names))
        await memory.saved()
        self._write(in_slice=tuple(names))
        memory.update(lambda now: known.published(now, names))
        held = memory.situation.held
        ready_at = {name: one.ready_at for name, one in held.items() if one.ready_at and one.state is SlotState.READY}
        if ready_at != self._api.ready_at:
            self._write(ready_at=ready_at)
        memory.update(lambda now: known.stored(now, ready_at))

    def _write(self, **change: Any) -> None:  # noqa: ANN401  (fields of Api)
        self._api = self._api.model_copy(update=change)
        fresh = self._folder / "api.new"
        fresh.write_text(self._api.model_dump_json())
        fresh.replace(self._folder / "api.json")

    async def _hand_over(self, position: int, uuids: dict[int, str], memory: Memory) -> None:
        self._write(position=position)
        slots = [_slot(index, uuids[index], *one) for index, some in SCRIPT[position].items() for one in some]
        memory.update(lambda now: known.specified(now, slots, position + 1))
        wanted = {slot.device for slot in slots}
        async with asyncio.timeout(PATIENCE_SECONDS):
            while set(self._api.in_slice) != wanted or set(memory.situation.held) != wanted:
                await asyncio.sleep(0.002)

    async def _check(self, gpus: NvmlGpus, uuids: dict[int, str], memory: Memory) -> None:
        """What the hardware holds in the end is what the last spec says, and all of it is the agent's own."""
        there = await gpus.instances(uuids[1])
        wanted = {(profile, start) for profile, start, _ in SCRIPT[-1][1]}
        assert {(one.profile, one.start) for one in there} == wanted, f"instances {there}"
        assert all(one.compute_instance is not None for one in there), f"an orphan among {there}"
        situation = memory.situation
        assert len(situation.made) == len(wanted), f"records of instances that are gone: {situation.made}"
        assert not [one for one in situation.held.values() if one.state is not SlotState.READY], situation.held
        assert all(one.hand_over is not None for one in situation.held.values()), "a device serves unscrubbed"


def _slot(index: int, gpu: str, profile: str, start: int, number: int) -> Slot:
    device = f"gpu{index}-{profile.replace('.', '')}-{start}-{number}"
    return Slot(device=device, gpu=gpu, profile=profile, start=start, holder=holder(number), since=EPOCH)


class Killer:
    """Counts NVML calls, and kills this process when one of them returns."""

    def __init__(self, at: int) -> None:
        self.calls = 0
        self._at = at
        self._lock = threading.Lock()
        self._wrapped: dict[str, Callable[..., int]] = {}
        self._find = pynvml._nvmlGetFunctionPointer
        pynvml._nvmlGetFunctionPointer = self._pointer

    def _pointer(self, name: str) -> Callable[..., int]:
        if name not in self._wrapped:
            self._wrapped[name] = self._counting(self._find(name))
        return self._wrapped[name]

    def _counting(self, function: Any) -> Callable[..., int]:  # noqa: ANN401  (a ctypes function)
        def call(*arguments: object) -> int:
            result: int = function(*arguments)
            with self._lock:
                self.calls += 1
                if self.calls == self._at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def _child(folder: Path, kill_at: int) -> None:
    """One life in a process of its own, which it does not survive."""
    status = 1
    try:
        os.environ[STATE] = str(folder / "node")
        killer = Killer(kill_at)
        asyncio.run(Life(folder).run())
        (folder / "calls").write_text(str(killer.calls))
        status = 0
    except BaseException:  # noqa: BLE001  (a fork must not return into its parent's code, whatever happens)
        with suppress(OSError):
            (folder / "trouble").write_text(traceback.format_exc())
    os._exit(status)


def _live(folder: Path, kill_at: int = -1) -> int:
    pid = os.fork()
    if pid == 0:
        _child(folder, kill_at)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _play(folder: Path, call: int) -> str:
    """What came of an agent that was killed at a call; empty where all is well."""
    folder.mkdir(parents=True)
    node = Node.create(folder / "node", gpus=2)
    node.set("mig_current", 1, gpu=1)
    node.set("mig_pending", 1, gpu=1)
    (folder / "boot_id").write_text(node.boot_id)
    first = _live(folder, call or -1)
    if first not in {0, -signal.SIGKILL}:
        return f"the first agent: {(folder / 'trouble').read_text()}"
    if call == 0:
        return ""
    if first == 0:
        return "it was not killed: there are fewer calls"
    if _live(folder) != 0:
        return f"the second agent: {(folder / 'trouble').read_text()}"
    return ""


def main() -> None:
    """Play each call that is asked for."""
    ctypes.CDLL(str(library()))
    root = Path(sys.argv[1])
    for call in map(int, sys.argv[2:]):
        trouble = _play(root / str(call), call)
        counted = root / str(call) / "calls"
        said = {"call": call, "trouble": trouble, "calls": counted.read_text() if counted.exists() else None}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
