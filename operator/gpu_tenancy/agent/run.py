"""The agent process: wiring of driver, client and probes, and an orderly end. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import IO, Final

from gpu_tenancy.agent import driver
from gpu_tenancy.agent.clock import SystemClock
from gpu_tenancy.agent.cycle import Agent, Seat, sole_agent
from gpu_tenancy.agent.host import LinuxHost
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.metrics import Metrics
from gpu_tenancy.agent.nvml import BOOT_ID, NvmlGpus
from gpu_tenancy.agent.scrub import CudaScrubber
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.probes import serve

_log = logging.getLogger(__name__)

_sole: Final[list[IO[bytes]]] = []
"""The lock that makes this process the node's one agent; let go by the end of the process and by nothing else."""


async def run(node: str, settings: AgentSettings) -> None:
    """Run the agent of a node until SIGTERM or SIGINT.

    Raises GpuError where there is no driver, or its files cannot be told.
    """
    root = settings.driver_root
    # Before NVML: whoever has it open bars the resets of the agent that is about to end. And to the very end, because
    # calls that are under way in threads outlast every task.
    _sole.append(await sole_agent(settings))
    gpus = NvmlGpus.open(root / BOOT_ID.relative_to("/"), root, settings.nvidia_smi)
    part = await asyncio.to_thread(driver.part, settings, await gpus.driver_version())
    machine, clock = (
        Machine(gpus, CudaScrubber(settings.scrub_seconds), LinuxHost(runtime_socket=settings.runtime_socket)),
        SystemClock(),
    )
    async with KubeClient.connect(settings.kubeconfig, user_agent="gpu-tenancy-agent") as client:
        metrics = Metrics(gpus, lambda: agent.situation, clock)
        agent = Agent(node, client, Seat(machine, settings, part, metrics.hand_over), clock)
        probes = await serve(settings.host, settings.port, metrics.registry, lambda: "", agent.unready, metrics.refresh)
        try:
            await _until_stopped(agent)
        finally:
            await probes.cleanup()
    # NVML is not let go: a call that hangs must not keep the process, whose end lets it go anyway.


async def _until_stopped(agent: Agent) -> None:
    work = asyncio.ensure_future(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        _log.info("The agent of the node stops; its devices stay as they are.")
