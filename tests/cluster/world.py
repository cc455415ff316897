"""A world to try gpu-tenancy in: a control plane, GPU nodes with their real agents, kubelet's stand-in, the operator.

The demo, `make up` and the integration tests live in the same one. The GPUs are simulated; every process that talks to
the API server is the real one. Nothing here decides anything about leases.
"""

import contextlib
import os
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import Resource
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.components import ClientRates, Component
from tests.cluster.control_plane import ControlPlane
from tests.cluster.driver import Driver
from tests.cluster.eventually import eventually

ROOT: Final = Path(__file__).parent.parent.parent
CRDS: Final = ROOT / "crds"
MODEL: Final = "A100-SXM4-80GB"
OPERATOR: Final = "operator"
KUBELETS: Final = "kubelets"


@dataclass(frozen=True, slots=True)
class GpuServer:
    """A node of the world."""

    name: str
    gpus: int = 8
    mig: tuple[int, ...] = ()
    """Indices of the GPUs in MIG mode."""
    convertible: tuple[int, ...] = ()
    """Indices of the GPUs that may be converted by demand."""
    model: str = MODEL
    cpu: str = "128"
    memory: str = "2Ti"
    pods: int = 110
    labels: Mapping[str, str] = field(default_factory=dict)


class World:
    """Usage: ``async with World([GpuServer("n1", mig=(7,))]) as world: ...``."""

    def __init__(
        self,
        servers: Sequence[GpuServer],
        *,
        heartbeat_seconds: float = 10.0,
        heartbeat_lease_seconds: int = 40,
        agents_apart: bool = True,
        drivers: bool = False,
        operator: bool = True,
        operator_command: Sequence[str] = (sys.executable, "-m", "gpu_tenancy", "operator"),
        client_rates: ClientRates = "raised",
        namespaces: Sequence[str] = ("team-a", "mining"),
    ) -> None:
        """Nothing is started here.

        agents_apart: one agent process per node, as on real nodes; False: one process for all, for many nodes.
        drivers: each node has a simulated driver, and its agent makes NVML and CUDA calls; else its GPUs are in memory.
        operator: start the operator too.
        operator_command: what to run as the operator; its connection and port are appended.
        """
        self.control_plane = ControlPlane(hold_until_prepared=True, client_rates=client_rates)
        self.servers = tuple(servers)
        self.port = 0
        """Port of the operator's /metrics, /healthz and /readyz."""
        self._heartbeat = (heartbeat_seconds, heartbeat_lease_seconds)
        self._agents_apart = agents_apart
        self._drivers: dict[str, Driver] | None = {} if drivers else None
        self._operator = operator
        self._operator_command = tuple(operator_command)
        self._namespaces = tuple(namespaces)

    async def __aenter__(self) -> Self:
        await self.control_plane.__aenter__()
        try:
            await self._start()
        except BaseException:
            await self.control_plane.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.control_plane.__aexit__(kind, error, trace)

    @property
    def api(self) -> Api:
        """An administrator's connection."""
        return self.control_plane.api

    async def kubectl(self, *args: str, stdin: str | None = None) -> str:
        """What kubectl prints; raises KubectlError with what it complains of."""
        return await self.control_plane.kubectl(*args, stdin=stdin)

    # --- objects -------------------------------------------------------------------------------------------------

    async def create(self, body: Object) -> Object:
        """Create an object of the project's kinds, or of any kind in `gpu_tenancy.kube.resources`."""
        resource = resource_of(body)
        return await self.api.create(resource.path(body["metadata"].get("namespace")), body)

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        """An object, or None where there is none."""
        try:
            return await self.api.get(resource.path(namespace, name))
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def items(self, resource: Resource, **selectors: str) -> list[Object]:
        """All objects of a kind."""
        return await self.api.items(resource.path(), **selectors)

    async def delete(self, resource: Resource, name: str, namespace: str | None = None) -> None:
        """Delete an object."""
        await self.api.delete(resource.path(namespace, name))

    async def settled(self, name: str, namespace: str = "team-a") -> Object:
        """Wait until a lease is settled, and return it."""
        return await self.condition(name, "Settled", namespace=namespace)

    async def ready(self, name: str, namespace: str = "team-a") -> Object:
        """Wait until a lease is ready, and return it."""
        return await self.condition(name, "Ready", namespace=namespace)

    async def condition(
        self, name: str, kind: str, status: str = "True", reason: str | None = None, namespace: str = "team-a"
    ) -> Object:
        """Wait until a lease has a condition, and return the lease."""

        async def look() -> Object | None:
            lease = await self.get(resources.GPU_LEASES, name, namespace)
            found = condition_of(lease, kind) if lease else None
            matches = found and found["status"] == status and reason in (None, found["reason"])
            return lease if matches else None

        try:
            return await eventually(f"{kind}={status} ({reason or 'any reason'}) of lease {namespace}/{name}", look)
        except AssertionError as error:
            lease = await self.get(resources.GPU_LEASES, name, namespace)
            log = self.control_plane.log_tail(OPERATOR, 30)
            raise AssertionError(f"{error}\nlease: {lease}\noperator: {log}") from error

    async def records(self, lease: str, namespace: str = "team-a") -> list[Object]:
        """UsageRecords of a lease, by segment."""
        found = await self.items(resources.USAGE_RECORDS)
        own = [one for one in found if (one["spec"]["leaseNamespace"], one["spec"]["leaseName"]) == (namespace, lease)]
        return sorted(own, key=lambda one: one["spec"]["segment"])

    async def miners(self) -> dict[tuple[str, str], Object]:
        """Running miner pods by (node, device)."""
        pods = await self.items(resources.PODS, labelSelector=names.LABEL_POOL)
        return {
            (pod["spec"]["nodeName"], pod["metadata"]["labels"][names.LABEL_DEVICE]): pod
            for pod in pods
            if pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        }

    async def mining(self, count: int) -> dict[tuple[str, str], Object]:
        """Wait until exactly that many miners run; they may be none."""
        found: dict[tuple[str, str], Object] = {}

        async def look() -> bool:
            nonlocal found
            found = await self.miners()
            return len(found) == count

        try:
            await eventually(f"{count} miners", look)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self._who_mines()}") from error
        return found

    async def _who_mines(self) -> str:
        """Every device that is wanted or there, every miner's pod and claim, and what the programs said."""
        slots = [
            f"{node['metadata']['name']} {part}: {slot['device']} of {slot['holder']['name']} {slot.get('state', '')}"
            for node in await self.items(resources.GPU_NODES)
            for part in ("spec", "status")
            for slot in (node.get(part) or {}).get("slots", ())
        ]
        made = [
            f"{kind.kind} {_marks(one['metadata'])} {_told(one.get('status', {}))}"
            for kind in (resources.PODS, resources.RESOURCE_CLAIMS)
            for one in await self.items(kind, labelSelector=names.LABEL_POOL)
        ]
        programs = (OPERATOR, agent_name("all"), KUBELETS, *Component)
        logs = [f"--- {name}:\n{self.control_plane.log_tail(name, 30)}" for name in programs]
        return "\n".join((*slots, *made, *logs))

    # --- processes -----------------------------------------------------------------------------------------------

    async def start_operator(self, command: Sequence[str] | None = None) -> None:
        """Start the operator; returns at once."""
        self.port = self.port or free_port()
        arguments = [
            "--kubeconfig",
            str(self.control_plane.kubeconfig),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        await self.control_plane.spawn(OPERATOR, [*(command or self._operator_command), *arguments], environment())

    async def kill_operator(self) -> None:
        """kill -9."""
        await self.control_plane.kill(OPERATOR)

    async def operator_ready(self) -> None:
        """Wait until the operator says that it is."""

        async def look() -> bool:
            status, _ = await self.ask("/readyz")
            return status == 200

        await eventually("the operator's /readyz", look)

    async def ask(self, path: str) -> tuple[int, str]:
        """GET from the operator's endpoint: status (0: no answer) and text."""
        patience = aiohttp.ClientTimeout(total=5)  # one that was stopped takes the call, and never answers
        async with aiohttp.ClientSession(timeout=patience) as session:
            try:
                async with session.get(f"http://127.0.0.1:{self.port}{path}") as answer:
                    return answer.status, await answer.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                return 0, str(error)

    async def start_agent(self, server: GpuServer) -> None:
        """Start the agent of a node; returns at once."""
        if self._drivers is None:
            await self._spawn_agents(agent_name(server.name), [server])
        else:
            await self._spawn_on_driver(server, self._drivers)

    async def _spawn_on_driver(self, server: GpuServer, drivers: dict[str, Driver]) -> None:
        plane = self.control_plane
        if server.name not in drivers:
            drivers[server.name] = Driver(
                driver_root(plane.directory, server.name),
                board=f"NVIDIA {server.model}",
                gpus=server.gpus,
                mig=server.mig,
                seed=zlib.crc32(server.name.encode()),
            )
        root = plane.kubelet_root(server.name)
        period, duration = self._heartbeat
        settings = {
            "kubelet_root": root,
            "cdi_root": root / "cdi",
            "state_dir": plane.directory / "agents" / server.name,
            "runtime_socket": None,
            "heartbeat_seconds": period,
            "heartbeat_lease_seconds": duration,
            "port": 0,
        }
        driver = drivers[server.name]
        command = driver.command(server.name, plane.kubeconfig, settings)
        await plane.spawn(agent_name(server.name), command, {**environment(), **driver.environment})

    async def kill_agent(self, node: str) -> None:
        """kill -9."""
        await self.control_plane.kill(agent_name(node))

    # --- start ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        control_plane = self.control_plane
        await control_plane.apply_manifests([CRDS])
        for namespace in (names.SYSTEM_NAMESPACE, *self._namespaces):
            await control_plane.create_namespace(namespace)
        for server in self.servers:
            await self._add_node(server)
        if self._operator:
            await self.start_operator()
        if self._agents_apart:
            for server in self.servers:
                await self.start_agent(server)
        else:
            await self._spawn_agents(agent_name("all"), self.servers)
        if self.servers:
            await self._spawn_kubelets()
        if self._operator:
            await self.operator_ready()

    async def _add_node(self, server: GpuServer) -> None:
        annotations = {}
        if server.mig or server.convertible:
            annotations[names.ANNOTATION_MIG_GPUS] = ",".join(map(str, server.mig))
        if server.convertible:
            annotations[names.ANNOTATION_CONVERTIBLE_GPUS] = ",".join(map(str, server.convertible))
        await self.control_plane.fake_nodes(
            [server.name],
            cpu=server.cpu,
            memory=server.memory,
            pods=server.pods,
            labels=dict(server.labels),
            annotations=annotations,
        )

    async def _spawn_agents(self, name: str, servers: Sequence[GpuServer]) -> None:
        first = servers[0]
        nodes = [argument for server in servers for argument in ("--node", server.name)]
        period, duration = self._heartbeat
        command = [
            sys.executable, "-m", "tests.cluster.agent", *nodes,
            "--kubeconfig", str(self.control_plane.kubeconfig),
            "--root", str(self.control_plane.directory / "kubelet"),
            "--state", str(self.control_plane.directory / "agents"),
            "--gpus", str(first.gpus), "--model", first.model,
            "--heartbeat", str(period), "--heartbeat-lease", str(duration),
        ]  # fmt: skip
        for server in servers:
            self.control_plane.kubelet_root(server.name)
        await self.control_plane.spawn(name, command, environment())

    async def _spawn_kubelets(self) -> None:
        nodes = [argument for server in self.servers for argument in ("--node", server.name)]
        command = [
            sys.executable, "-m", "tests.cluster.kubelets", *nodes,
            "--kubeconfig", str(self.control_plane.kubeconfig),
            "--root", str(self.control_plane.directory / "kubelet"),
        ]  # fmt: skip
        await self.control_plane.spawn(KUBELETS, command, environment())


def environment() -> dict[str, str]:
    """Environment in which the project's programs are found from anywhere."""
    paths = [str(ROOT / "operator"), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def driver_root(directory: Path, node: str) -> Path:
    """Folder of a node's simulated driver, in the folder of the control plane."""
    return directory / "drivers" / node


def agent_name(node: str) -> str:
    """Name under which an agent's process is known."""
    return f"agent-{node}"


def _marks(metadata: Object) -> str:
    """What says of an object whether it is there to stay."""
    marks = {key: metadata[key] for key in ("deletionTimestamp", "finalizers") if key in metadata}
    return f"{metadata['name']} {marks or ''}"


def _told(status: Object) -> str:
    """The phase of a pod, and what keeps it from another."""
    unmet = [
        f"{one['type']}: {one.get('message', '')}" for one in status.get("conditions", ()) if one["status"] != "True"
    ]
    return " ".join((status.get("phase", ""), *unmet))


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def condition_of(body: Object, kind: str) -> Object | None:
    """A condition of an object, or None."""
    conditions = (body.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one["type"] == kind), None)


def resource_of(body: Object) -> Resource:
    """The resource of an object by its kind."""
    known = (value for value in vars(resources).values() if isinstance(value, Resource))
    return next(one for one in known if (one.api_version, one.kind) == (body["apiVersion"], body["kind"]))


def lease(name: str, namespace: str = "team-a", **spec: object) -> Object:
    """Manifest of a GpuLease; `spec` uses the API's own field names."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": names.API_VERSION, "kind": "GpuLease", "metadata": metadata, "spec": spec}


def pool(name: str = "miners", namespace: str = "mining", **spec: object) -> Object:
    """Manifest of a MiningPool."""
    metadata = {"name": name, "namespace": namespace}
    body = {"image": "registry.invalid/miner@sha256:" + "0" * 64, **spec}
    return {"apiVersion": names.API_VERSION, "kind": "MiningPool", "metadata": metadata, "spec": body}


def price_book(name: str = "list", rates: Mapping[str, str] | None = None, **spec: object) -> Object:
    """Manifest of a PriceBook: price per hour by profile."""
    prices = rates or {"full": "145.00", "3g.40gb": "70.00", "1g.10gb": "20.00", "7g.80gb": "140.00"}
    body = {
        "currency": "RUB",
        "effectiveFrom": "2026-01-01T00:00:00Z",
        "rates": [{"model": MODEL, "profile": profile, "perHour": price} for profile, price in prices.items()],
        **spec,
    }
    return {"apiVersion": names.API_VERSION, "kind": "PriceBook", "metadata": {"name": name}, "spec": body}


def template(seconds: float | None = None, *, exit_code: int = 0, cpu: str = "4", **spec: object) -> Object:
    """Pod template of a Job whose simulated pods run for some seconds (None: until deleted)."""
    annotations = {} if seconds is None else {"gpu-tenancy.dev/run-seconds": str(seconds)}
    if exit_code:
        annotations["gpu-tenancy.dev/exit-code"] = str(exit_code)
    container = {
        "name": "main",
        "image": "registry.invalid/train@sha256:" + "0" * 64,
        "resources": {"requests": {"cpu": cpu, "memory": "8Gi"}},
    }
    return {"metadata": {"annotations": annotations}, "spec": {"containers": [container], **spec}}
