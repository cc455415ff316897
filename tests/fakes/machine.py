"""What stands beside the GPUs in memory: the scrub of their devices, and the processes of their node."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from gpu_tenancy.agent.clock import Clock, SystemClock
from gpu_tenancy.agent.gpus import GpuError, Process
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.situation import Scrub
from tests.fakes.gpus import FakeGpus

CONTEXT_SECONDS: Final = 0.25
"""Time to start a CUDA context."""
BYTES_PER_SECOND: Final = 1.4e12
"""Bandwidth of a whole A100 of 80 GB; an instance has its share of it and of the memory."""
EVERY: Final = 512 << 20
"""Bytes from one sample to the next."""


class FakeScrubber:
    """Scrubs devices of GPUs in memory, in the time it takes on real ones."""

    def __init__(self, gpus: FakeGpus, clock: Clock | None = None) -> None:
        self.scrubbed: list[str] = []
        """UUIDs of the devices that were scrubbed, in order."""
        self.failing: dict[str, int] = {}
        """By UUID, or "*": so many scrubs to come fail."""
        self.expected = 0
        self._gpus = gpus
        self._clock = clock or SystemClock()

    async def scrub(self, device: str) -> Scrub:
        """Take the time, or fail."""
        whole = self._gpus.memory_of(self._gpus.uuids[0]) << 20
        size = self._gpus.memory_of(device) << 20
        await self._clock.sleep(CONTEXT_SECONDS + whole / BYTES_PER_SECOND)
        for name in (device, "*"):
            if self.failing.get(name, 0):
                self.failing[name] -= 1
                raise GpuError(f"{device} could not be scrubbed: cuMemsetD32: CUDA_ERROR_ECC_UNCORRECTABLE")
        self.scrubbed.append(device)
        return Scrub(bytes=size, samples=size // EVERY)

    async def prepare(self, count: int) -> None:
        """Note how many are expected."""
        self.expected = count


@dataclass
class FakeHost:
    """Processes of a node in memory."""

    running: dict[int, tuple[str, str]] = field(default_factory=dict)
    """UID that a process carries, and its command, by pid."""
    ended: list[int] = field(default_factory=list)
    """Processes that were killed."""
    unkillable: set[int] = field(default_factory=set)
    pods: dict[int, str] = field(default_factory=dict)
    """namespace/name of the pod that a process is of, by pid."""

    async def carrying(self, traces: Collection[str]) -> Sequence[Process]:
        """Those that carry one of the UIDs."""
        return [Process(pid, name) for pid, (uid, name) in sorted(self.running.items()) if uid in traces]

    async def end(self, process: Process, traces: Collection[str]) -> None:
        """It is gone, unless it cannot be killed."""
        if self.running[process.pid][0] in traces and process.pid not in self.unkillable:
            del self.running[process.pid]
            self.ended.append(process.pid)

    async def placed(self, processes: Sequence[Process]) -> Sequence[Process]:
        """As tests have said."""
        return [replace(one, pod=self.pods.get(one.pid, "")) for one in processes]


def machine(gpus: FakeGpus, clock: Clock | None = None) -> Machine:
    """GPUs in memory with all that belongs to them."""
    return Machine(gpus, FakeScrubber(gpus, clock), FakeHost())
