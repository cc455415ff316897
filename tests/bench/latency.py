"""lease_ready_s: from `create` of a one-GPU lease to Ready=True, on a cluster where every GPU mines.

Includes everything: planning, stopping the miner, its Unprepare, recutting (0.4 s of NVML time on the 3g slice),
publishing, and the status that says Ready. Observed by a watch, not by polling.
"""

from __future__ import annotations

import asyncio
import time

from gpu_tenancy.api.lease import ConditionType
from gpu_tenancy.kube import resources
from tests.bench import fleet
from tests.bench.figures import Figure, figure
from tests.cluster.world import GpuServer, World, lease, pool, price_book, template

LEASES = 30
GOAL = "p50 ≤ 1.5, p95 ≤ 2.5"


def run(runs: int) -> list[Figure]:
    """Samples of `runs` × 30 / 5 leases, alternately a 3g slice (one destroy, two creates) and a whole GPU."""
    slices, wholes = asyncio.run(_measure(max(2, LEASES * runs // 5)))
    return [
        figure("lease_ready_s", slices, "s", f"{GOAL} (3g.40gb slice, 0.4 s and more of NVML time in it)"),
        figure("lease_ready_whole_s", wholes, "s", f"{GOAL} (one whole GPU, no repartition)"),
    ]


async def _measure(count: int) -> tuple[list[float], list[float]]:
    servers = [GpuServer("n1", mig=(6, 7)), GpuServer("n2", mig=(6, 7))]
    slices, wholes = [], []
    async with World(servers) as world:
        await world.create(price_book())
        await world.create(pool(resources={"cpu": "1", "memory": "1Gi"}))
        await world.mining(16)
        for index in range(count):
            slices.append(await _one(world, f"slice-{index}", "3g.40gb"))
            wholes.append(await _one(world, f"whole-{index}", "full"))
    return slices, wholes


async def _one(world: World, name: str, profile: str) -> float:
    """Seconds from the create call to the event that says Ready; the lease is gone, and all mines, when it returns."""

    def ready(one: fleet.Lease) -> str:
        return name if one.metadata.name == name and one.is_true(ConditionType.READY) else ""

    states = await fleet.states(world.api, resources.GPU_LEASES, fleet.Lease)
    seen = asyncio.create_task(fleet.last_seen(states, ready, 1))
    body = lease(name, gpus={"profile": profile}, template=template())
    began = time.monotonic()
    await world.create(body)
    seconds = await seen - began
    await world.kubectl("delete", "gpul", name, "-n", "team-a")
    await world.mining(16)
    return seconds
