"""Prometheus metrics of one agent: for watching, never for billing.

What the GPUs measure is asked for when somebody asks for the metrics, and at most every few seconds: an agent that
nobody scrapes asks its driver nothing for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.gpus import GpuError, Gpus, Telemetry
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.api.node import HandOver

_log = logging.getLogger(__name__)

FRESH_SECONDS: Final = 5.0
"""How old measurements may be."""
STEP_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
_GPU_LABELS: Final = ("gpu", "uuid")
_DEVICE_LABELS: Final = ("gpu", "device", "uuid", "profile", "state", "holder_kind", "holder_namespace", "holder")


class Metrics(Collector):
    """The metrics of one agent, in a registry of their own."""

    def __init__(self, gpus: Gpus, situation: Callable[[], Situation], clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self._gpus = gpus
        self._situation = situation
        self._clock = clock
        self._measured: Mapping[str, Telemetry] = {}
        self._measured_at = float("-inf")
        self.steps = Histogram(
            "gpu_tenancy_hand_over_step_seconds",
            "Duration of each step of a hand-over, waiting included.",
            ("step",),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self.scrubbed = Counter(
            "gpu_tenancy_scrubbed_bytes", "Device memory overwritten between holders.", registry=self.registry
        )
        self.registry.register(self)

    def hand_over(self, done: HandOver) -> None:
        """A device was made ready for its holder."""
        for one in done.steps:
            self.steps.labels(one.step.value).observe(one.milliseconds / 1000)
        self.scrubbed.inc(done.scrubbed_bytes)

    async def refresh(self) -> None:
        """Measure, unless that was done a moment ago. What one GPU refuses does not hide the others."""
        if self._clock.monotonic() - self._measured_at < FRESH_SECONDS:
            return
        self._measured_at = self._clock.monotonic()
        uuids = [gpu.uuid for gpu in self._situation().gpus.values() if gpu.healthy]
        found = await asyncio.gather(*(self._measure(uuid) for uuid in uuids))
        self._measured = {uuid: one for uuid, one in zip(uuids, found, strict=True) if one is not None}

    async def _measure(self, uuid: str) -> Telemetry | None:
        try:
            return await self._gpus.telemetry(uuid)
        except GpuError as error:
            _log.warning("GPU %s could not be measured: %s", uuid, error)
            return None

    def collect(self) -> Iterator[Metric]:
        """What was measured, who has which device, and which GPUs are sound."""
        yield from self._of_gpus()
        yield from self._of_devices()

    def _of_gpus(self) -> Iterator[Metric]:
        situation = self._situation()
        power = GaugeMetricFamily("gpu_tenancy_gpu_power_watts", "Power drawn by the GPU.", labels=_GPU_LABELS)
        energy = CounterMetricFamily(
            "gpu_tenancy_gpu_energy_joules", "Energy since the driver was loaded.", labels=_GPU_LABELS
        )
        heat = GaugeMetricFamily("gpu_tenancy_gpu_temperature_celsius", "Temperature of the chip.", labels=_GPU_LABELS)
        healthy = GaugeMetricFamily("gpu_tenancy_gpu_healthy", "1: the GPU can serve.", labels=_GPU_LABELS)
        xids = CounterMetricFamily("gpu_tenancy_gpu_xids", "Xid events that the GPU told of.", labels=_GPU_LABELS)
        for uuid, gpu in situation.gpus.items():
            labels, measured = (str(gpu.index), uuid), self._measured.get(uuid, Telemetry())
            healthy.add_metric(labels, float(gpu.healthy))
            xids.add_metric(labels, situation.xids.get(uuid, 0))
            if measured.power_mw is not None:
                power.add_metric(labels, measured.power_mw / 1000)
            if measured.energy_mj is not None:
                energy.add_metric(labels, measured.energy_mj / 1000)
            if measured.celsius is not None:
                heat.add_metric(labels, measured.celsius)
        yield from (power, energy, heat, healthy, xids)

    def _of_devices(self) -> Iterator[Metric]:
        situation = self._situation()
        memory = {uuid: used for one in self._measured.values() for uuid, used in one.memory_used.items()}
        there = GaugeMetricFamily("gpu_tenancy_device", "1: the device is in hand.", labels=_DEVICE_LABELS)
        used = GaugeMetricFamily("gpu_tenancy_device_memory_used_bytes", "Memory in use.", labels=_DEVICE_LABELS)
        for device, held in situation.held.items():
            slot, gpu = held.slot, situation.gpus.get(held.slot.gpu)
            holder = (slot.holder.kind.value, slot.holder.namespace, slot.holder.name)
            labels = ("" if gpu is None else str(gpu.index), device, held.uuid, slot.profile, held.state.value, *holder)
            there.add_metric(labels, 1.0)
            if held.uuid in memory:
                used.add_metric(labels, memory[held.uuid])
        yield from (there, used)
