"""The operator process: wiring of client, cycle, kopf and probes, and an orderly end. Decides nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal

import kopf

from gpu_tenancy.controller.cycle import Cycle
from gpu_tenancy.controller.handlers import register
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.probes import serve

_log = logging.getLogger(__name__)

COLLECT_AFTER = (20_000, 20, 50)
"""Thresholds of Python's cyclic garbage collector. What the operator makes is nearly all freed by reference counts;
with the default of 700 the collector took a fifth of its time, walking over the store again and again."""


async def run(settings: Settings) -> None:
    """Run the operator until SIGTERM or SIGINT. An end of any part ends the process: it restarts clean."""
    if settings.kubeconfig:
        os.environ["KUBECONFIG"] = settings.kubeconfig  # the one way to tell kopf
    logging.getLogger("kopf").setLevel(logging.WARNING)  # a line for each event delivered would drown everything else
    gc.freeze()  # the modules stay
    gc.set_threshold(*COLLECT_AFTER)
    metrics = Metrics()
    client = KubeClient.connect(
        settings.kubeconfig,
        user_agent="gpu-tenancy-operator",
        max_in_flight=settings.max_in_flight,
        on_request=metrics.count_request,
    )
    async with client:
        cycle = Cycle(client, settings, metrics)
        probes = await serve(settings.host, settings.port, metrics.registry, cycle.trouble, cycle.unready)
        try:
            await _until_stopped(cycle)
        finally:
            await probes.cleanup()


async def _until_stopped(cycle: Cycle) -> None:
    registry = kopf.OperatorRegistry()
    register(registry, cycle)
    stop = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    parts = {
        asyncio.create_task(
            kopf.operator(registry=registry, standalone=True, clusterwide=True, stop_flag=stop), name="kopf"
        ),
        asyncio.create_task(cycle.run(), name="cycle"),
        asyncio.create_task(stop.wait(), name="stop"),
    }
    done, pending = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    for part in pending:
        part.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for part in done:
        part.result()
        if part.get_name() != "stop" and not stop.is_set():
            raise RuntimeError(f"{part.get_name()} ended by itself; the operator cannot go on without it.")
