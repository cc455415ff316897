"""A site with GPUs: the operator, and a real node whose agent makes its real NVML, CUDA, DRA and CDI calls."""

from __future__ import annotations

from typing import Any, Final

from gpu_tenancy.api import names
from gpu_tenancy.kube.resources import GPU_LEASES, GPU_NODES, PODS
from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.cluster.node.images import PROBE
from tests.cluster.node.realnode import RealNode
from tests.cluster.world import World, condition_of, pool
from tests.node.gpus import AGENT, Driver
from tests.node.site import TEAM, Bare

SMALL: Final = {"cpu": "10m", "memory": "16Mi"}
MINING: Final = "mining"
MINED: Final = "5a"
"""What miners write on all that they can reach."""


class GpuSite(Bare):
    """Two GPUs, the second in MIG mode. Every test leaves them empty, and sound."""

    driver: Driver

    def __init__(self, name: str = "gpu-1", *, number: int = 3, gpus: int = 2, mig: str = "1", **more: Any) -> None:  # noqa: ANN401
        self.world = World((), namespaces=(TEAM, MINING))
        plane = self.world.control_plane
        node = RealNode(plane, name, number=number, annotations={names.ANNOTATION_MIG_GPUS: mig}, **more)
        super().__init__(plane, node)
        self._gpus = gpus
        self._mig = tuple(int(index) for index in mig.split(",") if index)

    async def start(self) -> None:
        """Bring everything up."""
        await self.world.__aenter__()
        await self.node.__aenter__()
        self.driver = Driver(self.node, gpus=self._gpus, mig=self._mig)
        await self.start_agent()

    async def start_agent(self, **settings: Any) -> None:  # noqa: ANN401
        """Start the agent, and wait until it has said what it sees."""
        before = (await self.gpu_node()).get("status", {}).get("bootId")
        await self.driver.start_agent(self.control_plane.kubeconfig, **settings)

        async def look() -> bool:
            status = (await self.gpu_node()).get("status", {})
            return bool(status.get("gpus")) and (before is None or status.get("bootId") == self.driver.gpu.boot_id)

        await self.eventually("the agent's report", look)

    async def restart_agent(self) -> None:
        """kill -9, and start it anew."""
        await self.node.kill(AGENT)
        await self.start_agent()

    async def reboot(self, seed: int) -> None:
        """The node boots, with its driver and its agent."""
        await self.node.cut_power()
        self.driver.reboot(seed)
        await self.node.boot()
        await self.start_agent()

    async def eventually(self, what: str, look: Any, seconds: float = 60) -> Any:  # noqa: ANN401
        """Wait for something; where it does not come, say what the agent said."""
        try:
            return await eventually(what, look, seconds)
        except AssertionError as error:
            told = f"{error}\n{await self.gpu_node()}\nagent: {self.node.log_tail(AGENT)}"
            raise AssertionError(told) from error

    async def clear(self) -> None:
        """Nothing is left of the test, and no GPU is fenced."""
        await self.control_plane.kubectl("delete", "gpul,pods", "--all", "-n", TEAM, "--wait=false")
        await self.control_plane.kubectl("delete", "minepool", "--all", "-n", MINING, "--wait=false")

        async def look() -> bool:
            found = await self.gpu_node()
            left = [*await self.world.items(PODS), *await self.world.items(GPU_LEASES)]
            slots = [found.get(part, {}).get("slots") for part in ("spec", "status")]
            return not left and not any(slots) and not any(gpu.get("fenced") for gpu in found["status"]["gpus"])

        await self.eventually("nothing on the node", look)

    # --- what is there

    async def gpu_node(self) -> Object:
        """The GpuNode; empty where there is none yet."""
        return await self.world.get(GPU_NODES, self.node.name) or {}

    async def slots(self) -> dict[str, Object]:
        """What the agent has in hand, by name of the holder."""
        return {slot["holder"]["name"]: slot for slot in (await self.gpu_node())["status"].get("slots", ())}

    async def gpu(self, index: int) -> Object:
        """A GPU as the agent reports it."""
        gpus = (await self.gpu_node())["status"]["gpus"]
        return next(gpu for gpu in gpus if gpu["index"] == index)

    async def node_condition(self, kind: str) -> Object:
        """A condition of the GpuNode."""
        found = condition_of(await self.gpu_node(), kind)
        assert found is not None
        return found

    # --- who comes

    async def mine(self, count: int) -> None:
        """A pool whose miners write on all that they can reach; waits until so many of them are at it."""
        args = ["devices", "context", "read", f"write={MINED}", "sleep"]
        await self.world.create(pool(image=PROBE, args=args, resources=SMALL))
        await self.world.mining(count)

        async def look() -> bool:
            return all([f"wrote {MINED}" in await self.logs_of(pod) for pod in (await self.world.miners()).values()])

        await self.eventually("the miners to have written", look)

    async def logs_of(self, pod: Object) -> str:
        """What a pod has written."""
        metadata = pod["metadata"]
        [container] = pod["spec"]["containers"]
        return await self.node.logs(metadata["namespace"], metadata["name"], container["name"])

    async def ask(self, name: str, profile: str, **spec: Any) -> None:  # noqa: ANN401
        """Create a lease of one device."""
        body = {"gpus": {"profile": profile, "count": 1}, "podResources": SMALL, **spec}
        metadata = {"name": name, "namespace": TEAM}
        kind = {"apiVersion": names.API_VERSION, "kind": "GpuLease"}
        await self.world.create({**kind, "metadata": metadata, "spec": body})

    async def lease(self, name: str, profile: str, **spec: Any) -> Object:  # noqa: ANN401
        """The same; waits until it is ready."""
        await self.ask(name, profile, **spec)
        return await self.lease_ready(name)

    async def lease_of(self, name: str) -> Object:
        """A lease as it is now."""
        return await self.world.get(GPU_LEASES, name, TEAM) or {}

    async def lease_ready(self, name: str) -> Object:
        """Wait until a lease is ready."""

        async def look() -> Object | None:
            found = await self.world.get(GPU_LEASES, name, TEAM)
            ready = condition_of(found, "Ready") if found else None
            return found if ready and ready["status"] == "True" else None

        found: Object = await self.eventually(f"lease {name} to be ready", look)
        return found

    async def declare(self, indices: str) -> None:
        """The Node declares which GPUs are to be in MIG mode."""
        note = f"{names.ANNOTATION_MIG_GPUS}={indices}"
        await self.control_plane.kubectl("annotate", "node", self.node.name, note, "--overwrite")

    async def end(self, name: str) -> None:
        """Delete a lease; returns at once."""
        await self.world.delete(GPU_LEASES, name, TEAM)
