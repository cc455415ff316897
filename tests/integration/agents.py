"""One node with a real agent on GPUs in memory, and everything an agent meets: its operator, kubelet, and hardware."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent.clock import SystemClock
from gpu_tenancy.agent.cycle import Agent, Seat, sole_agent
from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.agent.proto.dra_v1_pb2_grpc import DRAPluginStub
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.names import DEVICE_CLASS, DRIVER, SYSTEM_NAMESPACE
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.resources import GPU_NODES, NODES, RESOURCE_CLAIMS, RESOURCE_SLICES
from tests.cluster.api import MERGE, ApiError, Object
from tests.cluster.components import API_ONLY
from tests.cluster.control_plane import ControlPlane
from tests.cluster.eventually import eventually
from tests.cluster.world import CRDS, environment
from tests.fakes.gpus import FakeGpus
from tests.fakes.machine import machine

LEASE, POOL = "lease-uid-1", "pool-uid-2"
NAMESPACES: Final = {LEASE: "team-a", POOL: "mining", "lease-uid-3": "team-a"}
_numbers = itertools.count(1)


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[ControlPlane]:
    """API server with the kinds and namespaces that an agent needs."""
    async with ControlPlane(components=API_ONLY) as control_plane:
        await control_plane.apply_manifests([CRDS])
        for namespace in (SYSTEM_NAMESPACE, *sorted(set(NAMESPACES.values()))):
            await control_plane.api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        yield control_plane


@dataclass(frozen=True, slots=True)
class Seen:
    """One state of an object, as a watch showed it."""

    version: int
    """resourceVersion: one counter for all kinds, so that what is smaller was written earlier."""
    kind: str
    body: Object

    @property
    def ready(self) -> set[str]:
        """Devices that a GpuNode's status calls ready, with an instant."""
        return {slot["device"] for slot in self.slots if slot["state"] == "Ready" and slot.get("readyAt")}

    @property
    def states(self) -> dict[str, str]:
        """State of each device in a GpuNode's status."""
        return {slot["device"]: slot["state"] for slot in self.slots}

    @property
    def slots(self) -> list[Object]:
        """Slots of a GpuNode's status."""
        return list(self.body.get("status", {}).get("slots", []))

    @property
    def published(self) -> set[str]:
        """Devices of a ResourceSlice."""
        return {device["name"] for device in self.body["spec"].get("devices") or []}


class Bench:
    """A node. Its agent runs in this process (`agent`) or in one of its own (`start`, `kill`)."""

    def __init__(self, control_plane: ControlPlane, mig: Sequence[int] = (6, 7)) -> None:
        self.node = f"a{next(_numbers)}-{os.getpid()}"
        self.control_plane = control_plane
        self.api = control_plane.api
        self.mig = tuple(mig)
        self.root = control_plane.kubelet_root(self.node)
        self.state = control_plane.directory / "agents"
        self.gpus = FakeGpus(self.node, mig=mig, state=self.state / self.node / "hardware.json")
        self.history: list[Seen] = []
        self.patience = 20.0
        """How long a claim waits for a device that is being made."""
        self._watched_to: dict[str, int] = {}

    @property
    def settings(self) -> AgentSettings:
        """As tests.cluster.agent makes them."""
        return AgentSettings(
            kubelet_root=self.root,
            cdi_root=self.root / "cdi",
            state_dir=self.state / self.node,
            runtime_socket=None,
            observe_seconds=0.2,
            prepare_patience_seconds=self.patience,
        )

    # ------------------------------------------------------------------------------------------------ the agent

    async def join(self, annotation: str | None = None) -> None:
        """The Node joins the cluster."""
        text = ",".join(map(str, self.mig)) if annotation is None else annotation
        metadata = {"name": self.node, "annotations": {f"{DRIVER}/mig-gpus": text}}
        await self.api.create(NODES.path(), {"metadata": metadata})

    async def run_agent(self) -> None:
        """The agent in this process, until it ends or is cancelled."""
        async with KubeClient.connect(str(self.control_plane.kubeconfig)) as client:
            with await sole_agent(self.settings):
                await Agent(self.node, client, Seat(machine(self.gpus), self.settings), SystemClock()).run()

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[None]:
        """The agent at work in this process."""
        work = asyncio.ensure_future(self.run_agent())
        try:
            await self.until("a ResourceSlice", self._has_slice, work)
            yield
            assert not work.done(), work
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def start(self) -> None:
        """Start the agent as a process of its own."""
        command = [
            sys.executable, "-m", "tests.cluster.agent", "--node", self.node,
            "--kubeconfig", str(self.control_plane.kubeconfig),
            "--root", str(self.root.parent), "--state", str(self.state),
        ]  # fmt: skip
        await self.control_plane.spawn(f"agent-{self.node}", command, environment())

    async def kill(self) -> None:
        """kill -9."""
        await self.control_plane.kill(f"agent-{self.node}")

    def checkpoint(self) -> checkpoint.Checkpoint:
        """What the agent would remember if it were killed now."""
        return checkpoint.read(self.settings.checkpoint)

    # ----------------------------------------------------------------------------------------------- the operator

    def slot(self, index: int, profile: str, start: int, holder: str) -> Object:
        """A slot of spec; its device is named after placement and holder."""
        kind, name = ("MiningPool", "miners") if holder == POOL else ("GpuLease", "train")
        shape = "" if profile == "full" else f"-{profile.replace('.', '')}-{start}"
        return {
            "device": f"gpu{index}{shape}-{holder[-1] * 6}",
            "gpu": self.gpus.uuids[index],
            "profile": profile,
            "start": start,
            "holder": {"kind": kind, "namespace": NAMESPACES[holder], "name": name, "uid": holder},
            "since": "2026-01-01T00:00:00.000000Z",
        }

    async def specify(self, *slots: Object) -> None:
        """The operator writes the spec, as soon as there is a GpuNode."""

        async def write() -> Object | None:
            try:
                return await self.api.patch(GPU_NODES.path(None, self.node), {"spec": {"slots": list(slots)}}, MERGE)
            except ApiError as error:
                if error.code != 404:
                    raise
                return None

        await eventually("a GpuNode to write to", write)

    async def gpu_node(self) -> Seen:
        """The GpuNode now."""
        body = await self.api.get(GPU_NODES.path(None, self.node))
        return Seen(int(body["metadata"]["resourceVersion"]), "GpuNode", body)

    async def slice(self) -> Seen:
        """The ResourceSlice now; an empty one where there is none."""
        try:
            body = await self.api.get(RESOURCE_SLICES.path(None, self.slice_name))
        except ApiError as error:
            if error.code != 404:
                raise
            return Seen(0, "None", {"spec": {}})
        return Seen(int(body["metadata"]["resourceVersion"]), "ResourceSlice", body)

    @property
    def slice_name(self) -> str:
        """Name of the node's slice."""
        return f"{self.node}-{DRIVER}"

    async def published(self, *slots: Object) -> Seen:
        """Wait until exactly these devices stand in the slice."""
        wanted = {slot["device"] for slot in slots}

        async def look() -> Seen | None:
            seen = await self.slice()
            return seen if seen.published == wanted and seen.kind != "None" else None

        try:
            return await eventually(f"exactly {wanted} in the slice of {self.node}", look)
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {(await self.gpu_node()).slots}") from error

    async def status(self, what: str, condition: Callable[[Seen], object]) -> Seen:
        """Wait until GpuNode.status fulfils the condition."""

        async def look() -> Seen | None:
            seen = await self.gpu_node()
            return seen if condition(seen) else None

        return await eventually(what, look)

    async def settled(self, *slots: Object) -> Seen:
        """Wait until exactly these devices are published, and status lists no other."""
        await self.published(*slots)
        wanted = {slot["device"]: "Ready" for slot in slots}
        return await self.status(f"exactly {wanted} in status", lambda seen: seen.states == wanted)

    # ------------------------------------------------------------------------------------------------- the watcher

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Record in `history` every state of GpuNode and ResourceSlice that is written from here on."""
        watched = {"GpuNode": (GPU_NODES.path(), self.node), "ResourceSlice": (RESOURCE_SLICES.path(), self.slice_name)}
        for kind, (path, _) in watched.items():
            self._watched_to[kind] = int((await self.api.get(path))["metadata"]["resourceVersion"])
        tasks = [asyncio.ensure_future(self._record(kind, path, name)) for kind, (path, name) in watched.items()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _record(self, kind: str, path: str, name: str) -> None:
        selector = {"fieldSelector": f"metadata.name={name}"}
        async for event in self.api.watch(path, str(self._watched_to[kind]), dict[str, Any], **selector):
            body = event["object"]
            seen = Seen(int(body["metadata"]["resourceVersion"]), kind, body)
            if event["type"] != "BOOKMARK":
                self.history.append(seen)
            self._watched_to[kind] = seen.version

    async def told(self, seen: Seen) -> list[Seen]:
        """The history up to that state at least, in the order in which it was written.

        The two watches are two streams: one may lag behind the other, so both are waited for.
        """
        now = {"GpuNode": (await self.gpu_node()).version, "ResourceSlice": (await self.slice()).version}
        now[seen.kind] = max(now[seen.kind], seen.version)

        async def look() -> bool:
            return all(self._watched_to[kind] >= version for kind, version in now.items())

        await eventually(f"the watches to show {now}", look)
        return sorted(self.history, key=lambda one: one.version)

    # -------------------------------------------------------------------------------------------------- kubelet

    async def claim(self, name: str, *slots: Object, holder: str | None = None, namespace: str | None = None) -> Object:
        """A ResourceClaim with these devices allocated, as claim author and scheduler leave it."""
        uid = holder or slots[0]["holder"]["uid"]
        opaque = {"driver": DRIVER, "parameters": ClaimHolder(holder=uid).to_wire()}
        request = {"name": "gpus", "exactly": {"deviceClassName": DEVICE_CLASS, "count": len(slots)}}
        metadata = {"name": f"{name}-{self.node}", "namespace": namespace or slots[0]["holder"]["namespace"]}
        path = RESOURCE_CLAIMS.path(metadata["namespace"])
        spec = {"devices": {"requests": [request], "config": [{"opaque": opaque}]}}
        body = await self.api.create(path, {"metadata": metadata, "spec": spec})
        result = {"driver": DRIVER, "pool": self.node, "request": "gpus"}
        results = [result | {"device": slot["device"]} for slot in slots]
        body["status"] = {
            "allocation": {"devices": {"results": results}},
            "reservedFor": [{"resource": "pods", "name": f"{name}-pod", "uid": f"{name}-pod-uid"}],
        }
        return await self.api.replace(f"{path}/{metadata['name']}/status", body)

    async def prepare(self, claim: Object) -> dra.NodePrepareResourceResponse:
        """kubelet's call for a claim; waits for the agent, as kubelet does."""
        asked = _asked(claim)
        async with grpc.aio.insecure_channel(f"unix:{self.settings.dra_socket}") as channel:
            stub = DRAPluginStub(channel)
            request = dra.NodePrepareResourcesRequest(claims=[asked])
            answer = await stub.NodePrepareResources(request, wait_for_ready=True, timeout=60)
        return answer.claims[asked.uid]

    async def unprepare(self, claim: Object) -> str:
        """kubelet's call at the end of a claim's last pod; the error, empty for success."""
        asked = _asked(claim)
        async with grpc.aio.insecure_channel(f"unix:{self.settings.dra_socket}") as channel:
            stub = DRAPluginStub(channel)
            request = dra.NodeUnprepareResourcesRequest(claims=[asked])
            answer = await stub.NodeUnprepareResources(request, wait_for_ready=True, timeout=60)
        return str(answer.claims[asked.uid].error)

    def cdi_files(self) -> list[Path]:
        """CDI files on the node."""
        return sorted(self.settings.cdi_root.glob("*"))

    # ------------------------------------------------------------------------------------------------- waiting

    async def until(self, what: str, look: Callable[[], Any], work: asyncio.Future[None] | None = None) -> None:
        """Wait for what `look` (a coroutine function) sees; an agent that fails meanwhile is the failure."""

        async def looked() -> bool:
            if work is not None and work.done():
                work.result()
            return bool(await look())

        await eventually(what, looked)

    async def _has_slice(self) -> bool:
        return (await self.slice()).kind != "None"


def _asked(claim: Object) -> dra.Claim:
    metadata = claim["metadata"]
    return dra.Claim(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"])
