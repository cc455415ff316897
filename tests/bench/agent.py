"""agent_*, dra_prepare_ms: what an agent with 8 GPUs and 56 published slices costs while nothing happens, and how fast
it prepares claims.

The agent is a process of its own with its real NVML calls on the simulated driver, in which calls take an A100's time;
its API server is a real one. There is no operator and no kubelet: the bench writes GpuNode.spec, and calls the agent's
socket as kubelet does, over one connection that stays open, for claims as claim author and scheduler leave them.

Memory and processor time are those of the agent and of all its children, as the kernel counts them. Nobody scrapes its
metrics meanwhile; what a scrape adds in NVML calls is a figure of its own. Linux only, root is not needed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import grpc.aio
import psutil

from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.agent.proto.dra_v1_pb2_grpc import DRAPluginStub
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.names import ANNOTATION_MIG_GPUS, DEVICE_CLASS, DRIVER, SYSTEM_NAMESPACE
from gpu_tenancy.kube.resources import GPU_NODES, NODES, RESOURCE_CLAIMS, RESOURCE_SLICES
from tests.bench import fleet
from tests.bench.figures import Figure, NotMeasurable, figure, percentile
from tests.cluster.api import ApiError, Object
from tests.cluster.components import API_ONLY
from tests.cluster.control_plane import ControlPlane
from tests.cluster.driver import Driver
from tests.cluster.eventually import eventually
from tests.cluster.world import CRDS, environment, free_port

GPUS: Final = 8
SLICES: Final = 7
"""On each GPU."""
PROFILE: Final = "1g.10gb"
NODE: Final = "gpu-1"
AGENT: Final = "agent"
TEAM: Final = "team-a"
WINDOW_SECONDS: Final = 30.0
"""How long an agent is watched; it looks at its GPUs once in that time (`observe_seconds`)."""
SETTLE_SECONDS: Final = 5.0
_PATIENCE_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True)
class Idle:
    """What an idle agent cost in one window."""

    rss_mb: float
    """Resident memory, in 10⁶ bytes: what it shares with others is counted in full."""
    pss_mb: float
    """Proportional memory: what n processes share counts as an n-th."""
    cpu_pct: float
    """Processor time, in percent of one core."""
    calls_per_minute: float
    """NVML calls."""


def run_idle(runs: int) -> list[Figure]:
    """`runs` windows of 30 s."""
    _check()
    windows, scrapes = asyncio.run(_idle(runs))
    what = f"agent with {GPUS} GPUs and {GPUS * SLICES} slices, idle"
    calls = [one.calls_per_minute for one in windows]
    return [
        figure("agent_rss_mb", [one.rss_mb for one in windows], "MB", f"≤ 120 ({what}; resident)"),
        figure("agent_pss_mb", [one.pss_mb for one in windows], "MB", f"none: the same, proportional ({what})"),
        figure("agent_idle_cpu_pct", [one.cpu_pct for one in windows], "% of a core", f"≤ 1 ({what})"),
        figure("agent_nvml_calls_per_idle_minute", calls, "calls", f"none: stated ({what}, nobody scrapes)"),
        figure("agent_nvml_calls_per_scrape", scrapes, "calls", f"none: stated ({what})"),
    ]


def run_prepare(runs: int) -> list[Figure]:
    """`runs` times every slice, one after the other."""
    _check()
    took = asyncio.run(_prepare(runs))
    how = f"NodePrepareResources, {GPUS * SLICES} slices on the node, one claim at a time"
    return [
        figure("dra_prepare_ms", took, "ms", f"p99 ≤ 50 ({how}); see dra_prepare_p99_ms"),
        figure("dra_prepare_p99_ms", [percentile(took, 0.99)], "ms", f"≤ 50 ({len(took)} calls)"),
    ]


def _check() -> None:
    if sys.platform != "linux":
        raise NotMeasurable(f"The simulated driver needs Linux; this is {sys.platform}.")


# --- what is measured ---------------------------------------------------------------------------------------------


async def _idle(runs: int) -> tuple[list[Idle], list[float]]:
    async with _bench() as bench:
        await asyncio.sleep(SETTLE_SECONDS)
        windows = [await bench.idle() for _ in range(runs)]
        scrapes = [float(await bench.scrape()) for _ in range(runs)]
    return windows, scrapes


async def _prepare(runs: int) -> list[float]:
    """Milliseconds of each call."""
    async with _bench() as bench, grpc.aio.insecure_channel(f"unix:{bench.socket}") as channel:
        stub = DRAPluginStub(channel)
        claims = [await bench.claim(f"claim-{index}", slot) for index, slot in enumerate(bench.slots)]
        rounds = [[await _call(stub, claim) for claim in claims] for _ in range(runs)]
    fleet.say(f"{len(claims)} claims, {runs} times")
    return [took for one in rounds for took in one]


async def _call(stub: DRAPluginStub, claim: dra.Claim) -> float:
    """Prepare a claim, and give it back; milliseconds of the former."""
    began = time.perf_counter()
    answer = await stub.NodePrepareResources(dra.NodePrepareResourcesRequest(claims=[claim]), wait_for_ready=True)
    took = (time.perf_counter() - began) * 1000
    if error := answer.claims[claim.uid].error:
        raise RuntimeError(f"claim {claim.name} is not prepared: {error}")
    await stub.NodeUnprepareResources(dra.NodeUnprepareResourcesRequest(claims=[claim]))
    return took


# --- what it is measured on ---------------------------------------------------------------------------------------


class _Bench:
    """A node's agent, and the API server that it talks to."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._api = control_plane.api
        self._port = free_port()
        self._root = control_plane.kubelet_root(NODE)
        self._driver = Driver(control_plane.directory / "driver", gpus=GPUS, mig=range(GPUS))
        self.socket = self._root / "plugins" / DRIVER / "dra.sock"
        """Where kubelet calls the agent."""
        self.slots: list[Object] = []
        """All that is served."""

    async def start(self) -> None:
        """The agent serves every slice when this returns."""
        api = self._api
        await self._control_plane.apply_manifests([CRDS])
        for namespace in (SYSTEM_NAMESPACE, TEAM):
            await api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        note = {ANNOTATION_MIG_GPUS: ",".join(map(str, range(GPUS)))}
        await api.create(NODES.path(), {"metadata": {"name": NODE, "annotations": note}})
        settings = {
            "kubelet_root": self._root,
            "cdi_root": self._root / "cdi",
            "state_dir": self._control_plane.directory / "agent",
            "runtime_socket": None,
            "port": self._port,
        }
        command = self._driver.command(NODE, self._control_plane.kubeconfig, settings)
        await self._control_plane.spawn(AGENT, command, {**environment(), **self._driver.environment})
        gpus = await self._until("the agent's report", self._gpus)
        self.slots = [_slot(gpu, start) for gpu in gpus for start in range(SLICES)]
        await api.patch(GPU_NODES.path(None, NODE), {"spec": {"slots": self.slots}})
        await self._until("all slices to be served", self._all_served)
        fleet.say(f"{len(self.slots)} slices are served")

    async def idle(self) -> Idle:
        """Let it be for a window."""
        with self._driver.gpu.fault() as counter:
            before, began = _processor_seconds(self._processes()), time.monotonic()
            await asyncio.sleep(WINDOW_SECONDS)
            elapsed = time.monotonic() - began
            processes = self._processes()
            spent, calls = _processor_seconds(processes) - before, counter.seen
        memory = [one.memory_full_info() for one in processes]
        found = Idle(
            rss_mb=sum(one.rss for one in memory) / 1e6,
            pss_mb=sum(one.pss for one in memory) / 1e6,
            cpu_pct=100 * spent / elapsed,
            calls_per_minute=60 * calls / elapsed,
        )
        fleet.say(f"{found}, {len(processes)} process(es)")
        return found

    async def scrape(self) -> int:
        """Read its metrics; how many NVML calls that took."""
        await asyncio.sleep(SETTLE_SECONDS)  # What was measured a moment ago is not measured again.
        with self._driver.gpu.fault() as counter:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self._port}/metrics") as got:
                got.raise_for_status()
                await got.read()
            return counter.seen

    async def claim(self, name: str, slot: Object) -> dra.Claim:
        """A claim to which a slice is allocated, as kubelet names it."""
        opaque = {"driver": DRIVER, "parameters": ClaimHolder(holder=slot["holder"]["uid"]).to_wire()}
        request = {"name": "gpu", "exactly": {"deviceClassName": DEVICE_CLASS}}
        devices = {"requests": [request], "config": [{"opaque": opaque}]}
        path = RESOURCE_CLAIMS.path(TEAM)
        body = await self._api.create(path, {"metadata": {"name": name}, "spec": {"devices": devices}})
        result = {"driver": DRIVER, "pool": NODE, "request": "gpu", "device": slot["device"]}
        user = {"resource": "pods", "name": name, "uid": f"{name}-pod"}
        body["status"] = {"allocation": {"devices": {"results": [result]}}, "reservedFor": [user]}
        body = await self._api.replace(f"{path}/{name}/status", body)
        return dra.Claim(namespace=TEAM, name=name, uid=body["metadata"]["uid"])

    async def _gpus(self) -> list[Object]:
        try:
            status = (await self._api.get(GPU_NODES.path(None, NODE))).get("status") or {}
        except ApiError as error:
            if error.code != 404:
                raise
            return []
        gpus: list[Object] = status.get("gpus") or []
        return gpus

    async def _all_served(self) -> bool:
        found = await self._api.items(RESOURCE_SLICES.path())
        return sum(len(one["spec"].get("devices") or ()) for one in found) == len(self.slots)

    async def _until(self, what: str, look: Any) -> Any:  # noqa: ANN401  (whatever `look` finds)
        try:
            return await eventually(what, look, _PATIENCE_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\nagent: {self._control_plane.log_tail(AGENT)}") from error

    def _processes(self) -> list[psutil.Process]:
        agent = psutil.Process(self._control_plane.pid_of(AGENT))
        return [agent, *agent.children(recursive=True)]


@asynccontextmanager
async def _bench() -> AsyncIterator[_Bench]:
    async with ControlPlane(components=API_ONLY) as control_plane:
        bench = _Bench(control_plane)
        await bench.start()
        yield bench


def _slot(gpu: Object, start: int) -> Object:
    """A slice of a lease of its own, as the operator writes it."""
    name = f"lease-{gpu['index']}-{start}"
    return {
        "device": f"gpu{gpu['index']}-{PROFILE.replace('.', '')}-{start}-abcdef",
        "gpu": gpu["uuid"],
        "profile": PROFILE,
        "start": start,
        "holder": {"kind": "GpuLease", "namespace": TEAM, "name": name, "uid": f"{name}-uid"},
        "since": "2026-01-01T00:00:00.000000Z",
    }


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(one.user + one.system for one in (process.cpu_times() for process in processes))
