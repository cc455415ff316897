"""Where the stories of real nodes play: a bare node, or a whole site with operator, agents and leases."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gpu_tenancy.kube.resources import GPU_LEASES, GPU_NODES, PODS
from tests.cluster.api import ApiError, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.eventually import eventually
from tests.cluster.node.images import PROBE
from tests.cluster.node.realnode import KUBELET, RealNode
from tests.cluster.world import MODEL, OPERATOR, GpuServer, World, environment

AGENT: Final = "agent"
TEAM: Final = "team-a"
_REGISTERED: Final = rb"RegisterPlugin started.*Connection changed[^\n]*connected=true"
SIMULATED: Final = GpuServer("simulated", model="A100-SXM4-40GB")
"""Of another model, so that a lease can say that it wants a real node."""


def pod(name: str, *words: str, claim: str | None = None, **spec: Any) -> Object:  # noqa: ANN401  (pod spec)
    """A pod of the image gpu-probe with these words. `claim`: the claim template (a lease's name) of its GPUs."""
    container: Object = {"name": "main", "image": PROBE, "imagePullPolicy": "Never", "args": list(words)}
    container["resources"] = {"requests": {"cpu": "10m", "memory": "16Mi"}}
    body = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 30, "containers": [container], **spec}
    if claim is not None:
        container["resources"]["claims"] = [{"name": "gpu"}]
        body["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": claim}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": body}


class Bare:
    """A control plane and one real node, without anything of gpu-tenancy. Pods are in the namespace `TEAM`."""

    def __init__(self, control_plane: ControlPlane, *nodes: RealNode) -> None:
        self.control_plane = control_plane
        self.nodes = nodes

    @property
    def node(self) -> RealNode:
        """The first node."""
        return self.nodes[0]

    async def start(self) -> None:
        """Bring everything up."""
        await self.control_plane.__aenter__()
        await self.control_plane.create_namespace(TEAM)
        await asyncio.gather(*(node.__aenter__() for node in self.nodes))

    async def stop(self) -> None:
        """End everything, however far it has come."""
        for node in self.nodes:
            await node.stop()
        await self.control_plane.stop()

    async def clear(self) -> None:
        """No pod is left, as a test found it."""
        await self.control_plane.kubectl("delete", "pods", "--all", "-n", TEAM, "--grace-period=1", "--wait=false")
        await eventually("no pods", self._no_pods)

    async def _no_pods(self) -> bool:
        return not await self.control_plane.api.items(PODS.path(TEAM))

    # --- pods

    async def create(self, body: Object) -> Object:
        """Create a pod."""
        return await self.control_plane.api.create(PODS.path(TEAM), body)

    async def get(self, name: str) -> Object | None:
        """A pod, or None."""
        try:
            return await self.control_plane.api.get(PODS.path(TEAM, name))
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def phase(self, name: str, phase: str) -> Object:
        """Wait until a pod has a phase; the pod."""

        async def look() -> Object | None:
            found = await self.get(name)
            return found if found and found["status"]["phase"] == phase else None

        try:
            return await eventually(f"{name} to be {phase}", look, 60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{await self._why(name)}") from error

    async def _why(self, name: str) -> str:
        selector = f"involvedObject.name={name}"
        events = await self.control_plane.api.items(f"/api/v1/namespaces/{TEAM}/events", fieldSelector=selector)
        told = [event["message"] for event in events]
        kubelets = [node.log_tail(KUBELET, 15) for node in self.nodes]
        return "\n".join([str((await self.get(name) or {}).get("status")), *told, *kubelets])

    async def gone(self, name: str) -> None:
        """Wait until there is no such pod."""

        async def look() -> bool:
            return await self.get(name) is None

        await eventually(f"{name} to be gone", look)

    async def delete(self, name: str, *flags: str) -> None:
        """kubectl delete, without waiting."""
        await self.control_plane.kubectl("delete", "pod", name, "-n", TEAM, "--wait=false", *flags)

    async def said(self, name: str, *lines: str, node: RealNode | None = None) -> str:
        """Wait until a pod has written these lines; all that it wrote."""
        on = node or self.node

        async def look() -> str:
            written = await on.logs(TEAM, name)
            return written if set(lines) <= set(written.splitlines()) else ""

        return await eventually(f"{name} to say {lines}", look, 60)


class Site(Bare):
    """Operator, two real nodes with agents, and a simulated node of another model."""

    def __init__(self) -> None:
        self.world = World((SIMULATED,), namespaces=(TEAM,))
        plane = self.world.control_plane
        super().__init__(plane, RealNode(plane, "real-1", number=1), RealNode(plane, "real-2", number=2))

    async def start(self) -> None:
        """Bring everything up."""
        await self.world.__aenter__()
        await asyncio.gather(*(self._join(node) for node in self.nodes))

    async def _join(self, node: RealNode) -> None:
        await node.__aenter__()
        await self.start_agent(node)

    async def clear(self) -> None:
        """No lease, no pod, and no device on the real nodes."""
        await self.control_plane.kubectl("delete", "gpul,pods", "--all", "-n", TEAM, "--wait=false")
        await eventually("no pods", self._no_pods)
        await eventually("no leases", self._no_leases)
        for node in self.nodes:
            await eventually(f"no devices on {node.name}", functools.partial(self._idle, node))

    async def _no_leases(self) -> bool:
        return not await self.world.items(GPU_LEASES)

    async def _idle(self, node: RealNode) -> bool:
        found = await self.gpu_node(node)
        return not any(found.get(part, {}).get("slots") for part in ("spec", "status"))

    async def start_agent(self, node: RealNode) -> None:
        """Start the agent on a node, and wait until kubelet knows it."""
        command = [
            sys.executable, "-m", "tests.cluster.agent", "--node", node.name,
            "--kubeconfig", str(self.control_plane.kubeconfig),
            "--root", str(node.kubelet_root.parent), "--state", str(node.state_dir.parent), "--model", MODEL,
        ]  # fmt: skip
        before = node.kubelet_log_end()
        await node.spawn(AGENT, command, environment())
        try:
            await node.until_kubelet_says(_REGISTERED, before, AGENT)
        except AssertionError as error:
            raise AssertionError(f"{error}\nagent: {node.log_tail(AGENT)}") from error

    async def gpu_node(self, node: RealNode) -> Object:
        """The GpuNode of a node; empty where there is none yet."""
        return await self.world.get(GPU_NODES, node.name) or {}

    async def lease(self, name: str, count: int = 1, **spec: Any) -> Object:  # noqa: ANN401  (lease spec)
        """A lease of GPUs that only real nodes have; waits until it is ready."""
        gpus = {"profile": "full", "count": count, "model": MODEL}
        resources = {"cpu": "10m", "memory": "16Mi"}
        body = {"gpus": gpus, **({} if "template" in spec else {"podResources": resources}), **spec}
        metadata = {"name": name, "namespace": TEAM}
        await self.world.create(
            {"apiVersion": "gpu-tenancy.dev/v1alpha1", "kind": "GpuLease", "metadata": metadata, "spec": body}
        )
        return await self.world.ready(name)

    async def node_of(self, name: str) -> RealNode:
        """The real node that a pod was bound to."""
        found = await self.get(name)
        assert found is not None
        return next(node for node in self.nodes if node.name == found["spec"]["nodeName"])

    async def devices(self, node: RealNode) -> dict[str, str]:
        """UUID of the GPU of each device that is ready on a node."""
        slots = (await self.gpu_node(node)).get("status", {}).get("slots", ())
        return {slot["device"]: slot["gpu"] for slot in slots if slot["state"] == "Ready"}

    async def serving(self) -> RealNode:
        """The one node on which a device is ready."""

        async def look() -> RealNode | None:
            found = [node for node in self.nodes if await self.devices(node)]
            return found[0] if len(found) == 1 else None

        return await eventually("one node with a device that is ready", look)

    def operator_log(self) -> str:
        """What the operator said last."""
        return self.control_plane.log_tail(OPERATOR, 30)


def cdi_files(node: RealNode) -> Sequence[Path]:
    """CDI files of claims on a node."""
    return sorted(node.cdi_root.glob("*.json"))
