"""When each thing of a hand-over happened on a real node, by watches of the bench's own and by what the node wrote.

All programs share one machine and so one clock. What a watch shows is noted when it arrives, a few milliseconds after
it was stored; the steps of the hand-over itself are the agent's own account of it; the claim was prepared when its CDI
file was written, and the tenant ran when the container runtime noted the first line that its container wrote. Watches
and reads, and changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from enum import StrEnum
from typing import Final

from gpu_tenancy.api.node import HandOverStepType, SlotState
from gpu_tenancy.kube.resources import GPU_NODES, PODS, RESOURCE_SLICES, Resource
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.node.realnode import RealNode
from tests.node.gpu_site import GpuSite
from tests.node.site import TEAM

JOB_LABEL: Final = "batch.kubernetes.io/job-name"
PARTS: Final = {HandOverStepType.EVICT.value: "kubelet and containerd: Evict, the miner's pod until Unprepare"}
"""Steps that are somebody else's work."""
_PATIENCE_SECONDS: Final = 90.0


class Mark(StrEnum):
    """Instants of a hand-over, in their order."""

    CREATED = "created"
    """The bench sends its request to create the lease."""
    SPECIFIED = "specified"
    """GpuNode.spec has the lease's device."""
    READY = "ready"
    """The agent's own `readyAt`."""
    STORED = "stored"
    """GpuNode.status says so."""
    PUBLISHED = "published"
    """The device is in the ResourceSlice."""
    BOUND = "bound"
    """The tenant's pod has a node."""
    PREPARED = "prepared"
    """The claim's CDI file is written."""
    RUNNING = "running"
    """The tenant's container wrote its first line."""


class Timeline:
    """The hand-over to one lease."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Name of the lease."""
        self.marks: dict[Mark, float] = {}
        """Unix time of each mark."""
        self.steps: Mapping[str, float] = {}
        """Milliseconds of each step, by the agent's account."""
        self.device = ""
        """Name of the device, once it is planned."""
        self.pod = ""
        """Name of the tenant's pod, once it is bound."""

    def mark(self, what: Mark, at: float | None = None) -> None:
        """It happened for the first time at that moment, now by default."""
        self.marks.setdefault(what, time.time() if at is None else at)

    @property
    def is_told(self) -> bool:
        """Whether the API server has told all that it will tell."""
        return {Mark.SPECIFIED, Mark.STORED, Mark.PUBLISHED, Mark.BOUND} <= self.marks.keys()

    @property
    def seconds(self) -> float:
        """From the lease's creation to the tenant's first line."""
        return self.marks[Mark.RUNNING] - self.marks[Mark.CREATED]

    @property
    def own_milliseconds(self) -> float:
        """What the agent needs by itself: from the end of the eviction until the device is published."""
        steps = sum(took for step, took in self.steps.items() if step != HandOverStepType.EVICT)
        return steps + self._between(Mark.READY, Mark.PUBLISHED)

    def parts(self) -> Mapping[str, float]:
        """Where the time went, in milliseconds; they add up to `seconds`."""
        between = self._between
        agent = between(Mark.SPECIFIED, Mark.READY)
        return {
            "operator: lease created to GpuNode.spec written": between(Mark.CREATED, Mark.SPECIFIED),
            **{PARTS.get(step, f"agent: {step}"): took for step, took in self.steps.items()},
            "agent: hears of the spec, and between steps": agent - sum(self.steps.values()),
            "agent: status written": between(Mark.READY, Mark.STORED),
            "agent: ResourceSlice written": between(Mark.STORED, Mark.PUBLISHED),
            "kube-scheduler: allocates and binds": between(Mark.PUBLISHED, Mark.BOUND),
            "kubelet and agent: claim prepared": between(Mark.BOUND, Mark.PREPARED),
            "kubelet and containerd: containers started": between(Mark.PREPARED, Mark.RUNNING),
        }

    def _between(self, first: Mark, second: Mark) -> float:
        return (self.marks[second] - self.marks[first]) * 1000


class Clerk:
    """Notes the hand-overs of a site's node, while `watching`."""

    def __init__(self, site: GpuSite) -> None:
        self._site = site
        self._lines: dict[str, Timeline] = {}

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Notes what happens in here."""
        wanted = ((GPU_NODES, self._gpu_node), (RESOURCE_SLICES, self._slice), (PODS, self._pod))
        tasks = [asyncio.create_task(_follow(self._site.control_plane.api, *one)) for one in wanted]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, asyncio.CancelledError):
                raise end

    def begins(self, name: str) -> Timeline:
        """The hand-over to the lease of this name begins now."""
        self._lines[name] = line = Timeline(name)
        line.mark(Mark.CREATED)
        return line

    async def ended(self, line: Timeline) -> Timeline:
        """Wait until its tenant has written a line; the hand-over, complete."""

        async def look() -> bool:
            if line.is_told and (written := _first_line(self._site.node, line.pod)) is not None:
                line.mark(Mark.RUNNING, written)
            return Mark.RUNNING in line.marks

        await self._site.eventually(f"the tenant of {line.name} to run", look, _PATIENCE_SECONDS)
        line.mark(Mark.PREPARED, _prepared(self._site.node, line.device))
        del self._lines[line.name]
        return line

    def _gpu_node(self, body: Object) -> None:
        slots = {part: (body.get(part) or {}).get("slots") or () for part in ("spec", "status")}
        for slot in slots["spec"]:
            if (line := self._lines.get(slot["holder"]["name"])) is not None:
                line.mark(Mark.SPECIFIED)
                line.device = slot["device"]
        for slot in slots["status"]:
            line = self._lines.get(slot["holder"]["name"])
            if line is not None and slot["state"] == SlotState.READY:
                line.mark(Mark.STORED)
                line.mark(Mark.READY, datetime.fromisoformat(slot["readyAt"]).timestamp())
                line.steps = {one["step"]: one["milliseconds"] for one in slot["handOver"]["steps"]}

    def _slice(self, body: Object) -> None:
        there = {device["name"] for device in body["spec"].get("devices") or ()}
        for line in self._lines.values():
            if line.device in there:
                line.mark(Mark.PUBLISHED)

    def _pod(self, body: Object) -> None:
        job = (body["metadata"].get("labels") or {}).get(JOB_LABEL, "")
        line = self._lines.get(job.rpartition("-")[0])
        if line is not None and body["spec"].get("nodeName"):
            line.mark(Mark.BOUND)
            line.pod = body["metadata"]["name"]


async def _follow(api: Api, resource: Resource, note: Callable[[Object], None]) -> None:
    """Hand every state of every object of a kind to `note`, from here on."""
    version = (await api.get(resource.path(), limit="1"))["metadata"]["resourceVersion"]
    while True:
        async for event in api.watch(resource.path(), version, Object):
            if event["type"] == "ERROR":
                raise ApiError(410, "Expired", f"the watch of {resource.plural} lost its place")
            version = event["object"]["metadata"]["resourceVersion"]
            if event["type"] in ("ADDED", "MODIFIED"):
                note(event["object"])


def _first_line(node: RealNode, pod: str) -> float | None:
    """When the runtime noted the first line of a pod's container; None before it has."""
    for log in node.layout.pod_logs.glob(f"{TEAM}_{pod}_*/*/*.log"):
        with log.open() as file:
            if len(words := file.readline().split(" ", 1)) > 1:
                return datetime.fromisoformat(words[0]).timestamp()
    return None


def _prepared(node: RealNode, device: str) -> float:
    """When the CDI file was written of the claim that has this device."""
    [at] = [one.stat().st_mtime for one in node.cdi_root.glob("*.json") if f'-{device}"' in one.read_text()]
    return at
