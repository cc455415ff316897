"""handover_*: from a miner to a tenant on a real node, from `create` of the lease to the first line of its container.

A real kubelet with containerd and runc, the agent with its real NVML, CUDA, DRA and CDI calls, and behind them the
simulator with the times of an A100 (`tests.node.gpus.REAL_TIMES`). On every GPU a miner of gpu-probe holds a CUDA
context and has written all of its memory. The tenant comes with the lease: its template becomes a Job, whose container
prints the device that NVML shows it. The image is on the node. The end is the time that the container runtime put
before the first line of the container's log. `tests.bench.timeline` says how the parts are told apart.

Two things about kubelet decide what is measured. It ends a pod only once it has looked at the node's containers after
its last look at that pod, and that it does once a second: a pod that it has just dealt with takes up to a second more.
So miners mine for some seconds before they are evicted, as they do in earnest, and kubelet syncs pods in its own time
of a minute (the tests have it at five seconds). And it asks only every 0.3 s whether the volumes of a pod are mounted:
the tenant's pod has none, not even the service account's token. `handover_token_s` is the same with the token.

whole    A node of eight GPUs, none in MIG mode: one lease of a whole GPU at a time, then all eight GPUs at once, as one
         lease of the whole node, and as eight leases of eight tenants' pods.
mig      One GPU in MIG mode: its miner's 7g slice is destroyed, a 3g slice for the lease is created.

The control plane, the node and the bench share one machine. A hand-over takes 0.6 to 0.9 s of processor time, most of
it in containerd, runc, the API server and kubelet; where eight at once are more than its cores can do, their ratio to
one is that of the machine. So the bench says how busy the processors were, and `handover_eight_own_ms` is that part
which is the agent's own. Where others work on the machine too, look at the medians.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import psutil

from gpu_tenancy.kube.resources import GPU_LEASES
from tests.bench import fleet
from tests.bench.figures import Figure, NotMeasurable, figure
from tests.bench.timeline import Clerk, Timeline
from tests.cluster.node.images import PROBE
from tests.cluster.node.possible import missing
from tests.cluster.world import lease, pool, price_book
from tests.node.gpu_site import MINED, SMALL, GpuSite
from tests.node.site import TEAM, pod

TOGETHER: Final = 8
SETTLE_SECONDS: Final = 5.0
"""How long miners mine before a lease comes."""
NODE: Final = "gpu-1"
FIRST_NUMBER: Final = 40
"""Of the bench's nodes: others may run beside it."""


def run_whole(runs: int) -> list[Figure]:
    """Four times `runs` hand-overs one after the other, `runs` times eight at once in either way, and `runs` with a
    token."""
    _check()
    singles, nodes, rounds, tokens = asyncio.run(_whole(runs))
    alone, eight = [line.seconds for line in singles], [line.seconds for lines in rounds for line in lines]
    median = statistics.median(alone)
    on = f"on {os.cpu_count()} cores, for control plane, kubelet and all"
    how = "real node, NVML and CUDA times of an A100, until the tenant's first line"
    return [
        figure("handover_whole_s", alone, "s", f"p50 ≤ 1.2, p95 ≤ 2.0 ({how})", parts=_parts(singles)),
        figure(
            "handover_token_s", [line.seconds for line in tokens], "s",
            "none: handover_whole_s, the tenant's pod with a service account token", parts=_parts(tokens),
        ),
        figure(
            "handover_node_ratio", [line.seconds / median for line in nodes], "",
            f"p50 ≤ 2 (one lease of all {TOGETHER} GPUs of a node / of one GPU; {on})",
        ),
        figure(
            "handover_eight_s", eight, "s", f"see handover_eight_ratio ({TOGETHER} GPUs of one node at once)",
            baseline=median, parts=_parts([line for lines in rounds for line in lines]),
        ),
        figure(
            "handover_eight_ratio", [one / median for one in eight], "", f"p50 ≤ 2 (eight leases at once / one; {on})"
        ),
        figure(
            "handover_eight_own_ms", [line.own_milliseconds for lines in rounds for line in lines], "ms",
            "≤ 2 × one: what is the agent's own, from the end of the eviction until the device is published",
            baseline=statistics.median(line.own_milliseconds for line in singles),
        ),
    ]  # fmt: skip


def run_mig(runs: int) -> list[Figure]:
    """Four times `runs` hand-overs."""
    _check()
    lines = asyncio.run(_mig(runs))
    seconds = [line.seconds for line in lines]
    how = "as handover_whole_s; a 7g slice is destroyed, a 3g slice created"
    return [figure("handover_mig_s", seconds, "s", f"p50 ≤ 1.6, p95 ≤ 2.5 ({how})", parts=_parts(lines))]


def _check() -> None:
    if sentence := missing():
        raise NotMeasurable(sentence)


def _parts(lines: Sequence[Timeline]) -> dict[str, list[float]]:
    """Milliseconds of each part, of each hand-over that has it."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for part, took in line.parts().items():
            found.setdefault(part, []).append(took)
    return found


async def _whole(runs: int) -> tuple[list[Timeline], list[Timeline], list[list[Timeline]], list[Timeline]]:
    async with _site(gpus=TOGETHER, mig="") as site:
        singles = [line for index in range(4 * runs) for line in await _round(site, f"one-{index}", 1, "full")]
        nodes = [line for index in range(runs) for line in await _round(site, f"node-{index}", 1, "full", TOGETHER)]
        rounds = [await _round(site, f"eight-{index}", TOGETHER, "full") for index in range(runs)]
        token = {"automountServiceAccountToken": True}
        tokens = [line for index in range(runs) for line in await _round(site, f"token-{index}", 1, "full", **token)]
    return singles, nodes, rounds, tokens


async def _mig(runs: int) -> list[Timeline]:
    async with _site(gpus=1, mig="0") as site:
        return [line for index in range(4 * runs) for line in await _round(site, f"slice-{index}", 1, "3g.40gb")]


@asynccontextmanager
async def _site(*, gpus: int, mig: str) -> AsyncIterator[GpuSite]:
    """A node on whose every GPU a miner mines."""
    site = GpuSite(NODE, number=FIRST_NUMBER, gpus=gpus, mig=mig, sync_frequency="1m")
    try:
        await site.start()
        await site.world.create(price_book())
        args = ["devices", "context", f"write={MINED}", "sleep"]
        await site.world.create(pool(image=PROBE, args=args, resources=SMALL))
        await _mining(site, gpus)
        yield site
    finally:
        await site.stop()


async def _mining(site: GpuSite, count: int) -> None:
    """Wait until so many miners mine, and have written on all that they can reach."""
    await site.world.mining(count)

    async def look() -> bool:
        texts = [await site.logs_of(pod) for pod in (await site.world.miners()).values()]
        return len(texts) == count and all(f"wrote {MINED}" in text for text in texts)

    await site.eventually("the miners to have written", look)


async def _round(site: GpuSite, name: str, count: int, profile: str, gpus: int = 1, **spec: object) -> list[Timeline]:
    """So many leases at once, of so many GPUs each; when it returns they are gone, and all mines as before. `spec`: of
    the tenants' pods."""
    miners = len(await site.world.miners())
    clerk = Clerk(site)
    await asyncio.sleep(SETTLE_SECONDS)
    async with clerk.watching():
        psutil.cpu_percent()
        wanted = {"profile": profile, "count": gpus}
        each = (_lease(site, clerk, f"{name}-{index}", wanted, spec) for index in range(count))
        lines = await asyncio.gather(*each)
        busy = psutil.cpu_percent()
    fleet.say(f"{name}: {', '.join(f'{line.seconds:.2f}' for line in lines)} s, processors {busy:.0f} % busy")
    for line in lines:
        await site.world.delete(GPU_LEASES, line.name, TEAM)
    await _mining(site, miners)
    return lines


async def _lease(
    site: GpuSite, clerk: Clerk, name: str, gpus: Mapping[str, object], more: Mapping[str, object]
) -> Timeline:
    own = {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 2}
    spec = pod(name, "devices", "sleep")["spec"] | own | dict(more)
    line = clerk.begins(name)
    body = lease(name, TEAM, gpus=dict(gpus), template={"spec": spec})
    await site.world.create(body)
    return await clerk.ended(line)
