"""`ControlPlane`: a real Kubernetes API on loopback ports, up in seconds, gone without a trace.

The one class that tests, demo and benchmarks use. It may start processes only through its supervisor and write only
into its own temporary folder; it knows Kubernetes, but none of gpu-tenancy's kinds.
"""

import asyncio
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import yaml

from tests.cluster import binaries
from tests.cluster.api import Api, Object, apply_documents
from tests.cluster.components import (
    ALL,
    PORTS,
    ClientRates,
    Component,
    Layout,
    argv,
    health_url,
    write_files,
    write_kubeconfig,
)
from tests.cluster.pki import Authority
from tests.cluster.processes import Processes, ProgramError

POLL_SECONDS: Final = 0.03
IN_FLIGHT: Final = 32
SOCKET_PATH_LIMIT: Final = 107 if sys.platform == "linux" else 103
SOCKET_ROOM: Final = len("/plugins_registry/gpu-tenancy.dev-reg.sock")
PLATFORM: Final = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message is what it said."""


class ControlPlane:
    """etcd, kube-apiserver and, unless `components` leaves them out, controller-manager, scheduler and KWOK.

    Usage: ``async with ControlPlane() as cp: ...``. Everything ends, and the folder goes, when the block ends or when
    this process dies in any manner. Several may live side by side.
    """

    def __init__(
        self,
        *,
        components: Iterable[Component] = ALL,
        client_rates: ClientRates = "raised",
        hold_until_prepared: bool = False,
        extra_args: Mapping[Component, Sequence[str]] | None = None,
        patience_seconds: float = 90.0,
    ) -> None:
        """Nothing is started here.

        components: what to run; API_ONLY for etcd and apiserver alone, ``ALL - {Component.KWOK}`` without nodes.
        client_rates: "raised" lets every controller send 100 requests/s and the scheduler 2000; "default": 20 and 50.
        hold_until_prepared: a simulated pod with claims stays Pending until StandInKubelet has prepared them.
        extra_args: further flags per component, after ours (the last one wins in Kubernetes' programs).
        patience_seconds: how long the start may take before it is given up.
        """
        self.components = frozenset(components) | {Component.ETCD, Component.APISERVER}
        self.client_rates: ClientRates = client_rates
        self.hold_until_prepared = hold_until_prepared
        self._extra_args = dict(extra_args or {})
        self._patience_seconds = patience_seconds
        self._processes = Processes()
        self._programs: dict[str, Path] = {}
        self._authority: Authority | None = None
        self._layout: Layout | None = None
        self._api: Api | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # --- what is where -----------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The temporary folder: logs, keys, etcd's data. Short enough for unix sockets below it."""
        return self._set_up().directory

    @property
    def url(self) -> str:
        """The API server's address, ``https://127.0.0.1:PORT``."""
        return self._set_up().url

    @property
    def kubeconfig(self) -> Path:
        """Kubeconfig of a cluster administrator (``system:masters``)."""
        return self._set_up().kubeconfig("admin")

    @property
    def api(self) -> Api:
        """An administrator's connection, bound to the event loop that entered the control plane."""
        if self._api is None:
            raise RuntimeError("this ControlPlane is not running; use it in `async with`.")
        return self._api

    def log_tail(self, name: str, lines: int = 40) -> str:
        """The last lines that a component, or a program started by `spawn`, has written."""
        return self._processes.log_tail(name, lines)

    def pid_of(self, name: str) -> int:
        """Process id of a component or spawned program."""
        return self._processes.pid_of(name)

    @property
    def supervisor_pid(self) -> int:
        """Process id of the parent of all of them."""
        return self._processes.supervisor_pid

    def kubelet_root(self, node: str) -> Path:
        """A kubelet root folder for `node`, with ``plugins`` and ``plugins_registry`` in it.

        Raises ValueError where the sockets of a plugin could not be bound below it, for the length of the path.
        """
        root = self.directory / "kubelet" / node
        if len(str(root)) > SOCKET_PATH_LIMIT - SOCKET_ROOM:
            raise ValueError(f"{root} is too long for unix sockets; shorten the node's name, or set TMPDIR to /tmp.")
        for folder in ("plugins", "plugins_registry"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        return root

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig that signs in as `user` in `groups`, for tests of who may do what."""
        if self._authority is None:
            raise RuntimeError("this ControlPlane is not running; use it in `async with`.")
        name = "user-" + "".join(letter if letter.isalnum() else "-" for letter in user)
        return write_kubeconfig(self._set_up(), self._authority, name, user, groups)

    # --- what to do with it ------------------------------------------------------------------------------------

    async def kubectl(self, *args: str, stdin: str | None = None) -> str:
        """Run kubectl as administrator; returns its standard output. Raises KubectlError with what it complained."""
        program = self._programs.get("kubectl") or (await _ensure(["kubectl"]))["kubectl"]
        process = await asyncio.create_subprocess_exec(
            str(program),
            *args,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self._set_up().environment(), "KUBECONFIG": str(self.kubeconfig)},
        )
        try:
            out, complaint = await process.communicate(stdin.encode() if stdin is not None else None)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(args)}: {complaint.decode().strip()}")
        return out.decode()

    async def apply_manifests(self, paths: Iterable[Path], *, manager: str = "tests") -> list[Object]:
        """Server-side apply of YAML files (folders: every .yaml in them, sorted); returns what the server made of them.

        CustomResourceDefinitions go first, and their kinds are served when this returns.
        """
        files = [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
        documents = [document for file in files for document in yaml.safe_load_all(file.read_text()) if document]
        return await apply_documents(self.api, documents, manager)

    async def create_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Create a namespace and wait until pods can be created in it (its default service account exists)."""
        await self.api.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": dict(labels or {})}})
        await self._service_account(name)

    async def fake_nodes(
        self,
        names: Iterable[str],
        *,
        cpu: str = "128",
        memory: str = "2Ti",
        pods: int = 110,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Create nodes that KWOK keeps alive, and wait until pods can be scheduled on them.

        cpu, memory, pods: allocatable amounts of each; labels, annotations: the same on each.
        """
        names = list(names)
        amounts = {"cpu": cpu, "memory": memory, "pods": str(pods)}
        nodes = [_node(name, amounts, labels or {}, annotations or {}) for name in names]
        gate = asyncio.Semaphore(IN_FLIGHT)

        async def create(node: Object) -> None:
            async with gate:
                await self.api.create("/api/v1/nodes", node)

        await asyncio.gather(*map(create, nodes))
        if Component.KWOK in self.components:
            await self._until_schedulable(set(names))

    async def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Start any program beside the components; it ends with them, and its output is `log_tail(name)`.

        Returns its process id. Raises ProgramError when it cannot be executed or a program of that name runs.
        """
        return await self._processes.start(name, command, env)

    async def kill(self, name: str) -> None:
        """Kill a component or spawned program (SIGKILL) and wait for its end."""
        await self._processes.kill(name)

    def alive(self, name: str) -> bool:
        """Whether a component or spawned program runs."""
        return self._processes.alive(name)

    async def start_component(self, component: Component) -> None:
        """Start a component that was killed, on its former port and data, and wait until it works."""
        await self._launch(component)
        await self._until_healthy(component)

    async def restart_apiserver(self, *, pause_seconds: float = 0.0) -> None:
        """Kill the API server, leave it down for `pause_seconds`, start it on the same port and data.

        Every watch breaks; one that resumes from before the restart is answered 410 Gone if something was written
        since, because the new server's cache begins at the present.
        """
        simulating = self.alive(Component.KWOK)
        if simulating:
            # It drops a write that breaks off half-way, which kubelet would repeat: it has to look at all pods again.
            await self.kill(Component.KWOK)
        await self.kill(Component.APISERVER)
        await asyncio.sleep(pause_seconds)
        await self.start_component(Component.APISERVER)
        if simulating:
            # It holds nodes by Leases in the name of its process; a new one would wait until the old ones are over.
            await self.api.delete("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")
            await self.start_component(Component.KWOK)

    async def detach(self, lifetime_seconds: float) -> None:
        """Let everything outlive this process and this `async with`, at most `lifetime_seconds`; see detached.py."""
        await self._processes.detach(lifetime_seconds)

    async def stop(self) -> None:
        """End everything and remove the folder; after `detach`, only let go. Can be repeated."""
        api, self._api = self._api, None
        if api is not None:
            await api.__aexit__(None, None, None)
        # Shielded: a second Ctrl-C while this waits may not leave the rest undone.
        await asyncio.shield(self._processes.close())

    # --- start ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._programs = await _ensure([*self.components, "kubectl"])
        self._authority = Authority.create()
        await self._processes.start_supervisor(PORTS)
        self._layout = Layout(
            directory=self._processes.directory,
            ports=self._processes.ports,
            components=self.components,
            client_rates=self.client_rates,
            hold_until_prepared=self.hold_until_prepared,
            extra_args=self._extra_args,
        )
        write_files(self._layout, self._authority)
        self._api = await Api(self.kubeconfig).__aenter__()
        for component in (Component.ETCD, Component.APISERVER):
            await self._launch(component)
        await self._until_healthy(Component.APISERVER)
        await self._start_controllers()

    async def _start_controllers(self) -> None:
        controllers = [one for one in Component if one in self.components and one not in ("etcd", "kube-apiserver")]
        for component in controllers:
            await self._launch(component)
        for component in controllers:
            await self._until_healthy(component)
        await self._service_account("default")

    async def _launch(self, component: Component) -> None:
        layout = self._set_up()
        await self._processes.start(component, argv(component, self._programs[component], layout), layout.environment())

    async def _until_healthy(self, component: Component) -> None:
        address = health_url(component, self._set_up())
        await self._until(f"{component} to answer at {address}", lambda: self.api.ready(address))

    async def _service_account(self, namespace: str) -> None:
        """Wait for the account without which the API server refuses every pod of `namespace`."""
        if Component.CONTROLLER_MANAGER not in self.components:
            return
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        await self._until(f"the default service account of namespace {namespace}", lambda: self.api.ready(path))

    async def _until_schedulable(self, names: set[str]) -> None:
        controlled = Component.CONTROLLER_MANAGER in self.components

        async def all_schedulable() -> bool:
            nodes = await self.api.items("/api/v1/nodes", resourceVersion="0")
            return names <= {node["metadata"]["name"] for node in nodes if schedulable(node, controlled)}

        await self._until(f"{len(names)} simulated nodes to become ready", all_schedulable)

    async def _until(self, what: str, true: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + self._patience_seconds
        while not await true():
            self._processes.check_alive(self.components)
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {one}\n{self.log_tail(one, 5)}" for one in sorted(self.components))
                raise ProgramError(f"waited {self._patience_seconds:.0f} s in vain for {what}.\n{logs}")
            await asyncio.sleep(POLL_SECONDS)

    def _set_up(self) -> Layout:
        if self._layout is None:
            raise RuntimeError("this ControlPlane is not running; use it in `async with`.")
        return self._layout


async def _ensure(names: Sequence[str]) -> dict[str, Path]:
    return await asyncio.to_thread(binaries.ensure, [str(name) for name in names])


def _node(name: str, amounts: Mapping[str, str], labels: Mapping[str, str], annotations: Mapping[str, str]) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, **PLATFORM, **labels},
            "annotations": {"kwok.x-k8s.io/node": "fake", **annotations},
        },
        "status": {
            "capacity": dict(amounts),
            "allocatable": dict(amounts),
            "addresses": [
                {"type": "InternalIP", "address": "127.0.0.1"},
                {"type": "Hostname", "address": name},
            ],
            "nodeInfo": _node_info(),
        },
    }


def _node_info() -> Object:
    unknown = dict.fromkeys(("machineID", "systemUUID", "kubeProxyVersion"), "")
    return unknown | {
        "architecture": PLATFORM["kubernetes.io/arch"],
        "operatingSystem": PLATFORM["kubernetes.io/os"],
        "bootID": str(uuid.uuid4()),
        "kubeletVersion": "v" + binaries.pinned_version(binaries.binary("kube-apiserver")),
        "containerRuntimeVersion": "kwok://" + binaries.pinned_version(binaries.binary("kwok")),
        "kernelVersion": "simulated",
        "osImage": "simulated",
    }


def schedulable(node: Object, controlled: bool) -> bool:
    """Ready, and no longer tainted as not ready (a taint that only the controller-manager takes away)."""
    conditions = node.get("status", {}).get("conditions", [])
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    taints = {taint["key"] for taint in node["spec"].get("taints", [])}
    return ready and not (controlled and "node.kubernetes.io/not-ready" in taints)
