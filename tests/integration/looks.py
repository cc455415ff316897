"""What fault tests make and look at on a cluster. Looks only at the API server, as an administrator would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import JOBS, RESOURCE_CLAIM_TEMPLATES, SERVICES, Resource
from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.cluster.world import World, condition_of

DEPLOYMENTS = "/apis/apps/v1/namespaces/team-a/deployments"


def deployment(name: str) -> Object:
    """A tenant's Deployment whose pod uses the lease of the same name."""
    labels = {"app": name}
    container = {"name": "main", "image": "registry.invalid/notebook", "resources": {"claims": [{"name": "gpu"}]}}
    pod = {"containers": [container], "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": name}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "team-a"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


async def running(world: World, **labels: str) -> list[Object]:
    """Running pods with these labels."""
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    pods = await world.items(resources.PODS, labelSelector=selector)
    return [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]


async def slots_of(world: World, uid: str, *parts: str) -> list[tuple[str, Object]]:
    """Devices of a holder with their nodes, as promised ("spec") or as reported ("status"); both unless said."""
    return [
        (node["metadata"]["name"], slot)
        for node in await world.items(resources.GPU_NODES)
        for part in parts or ("spec", "status")
        for slot in (node.get(part) or {}).get("slots", ())
        if slot["holder"]["uid"] == uid
    ]


async def nothing_left(world: World, uid: str, *, job: bool = False) -> None:
    """No device is held for the lease, and nothing that was made for it is there; but for a finished Job (`job`), so
    that its logs can be read, and for what a lease's own Job was made with: these stay until the lease is deleted, and
    go with it."""
    assert not await slots_of(world, uid)
    there = [one for one in await world.items(resources.GPU_LEASES) if one["metadata"]["uid"] == uid]
    made = () if any("template" in one["spec"] for one in there) else (RESOURCE_CLAIM_TEMPLATES, SERVICES)

    async def look() -> bool:
        selector = f"{names.LABEL_HOLDER}={uid}"
        kinds = (*made, *(() if job else (JOBS,)))
        return not any([await world.items(kind, labelSelector=selector) for kind in kinds])

    await eventually(f"everything that was made for {uid} to go", look)


async def reported(world: World) -> None:
    """Wait until the agents of all servers have told what they have."""
    wanted = {server.name: server.gpus for server in world.servers}

    async def look() -> bool:
        nodes = await world.items(resources.GPU_NODES)
        return {node["metadata"]["name"]: len((node.get("status") or {}).get("gpus", ())) for node in nodes} == wanted

    await eventually(f"the GPUs of {', '.join(wanted)}", look)


async def gone(world: World, name: str, namespace: str = "team-a") -> None:
    """Wait until a lease is no more."""

    async def look() -> bool:
        return await world.get(resources.GPU_LEASES, name, namespace) is None

    await eventually(f"the end of lease {namespace}/{name}", look)


async def lease_where(world: World, name: str, what: str, true: Callable[[Object], object]) -> Object:
    """Wait until a lease of team-a is as described."""

    async def look() -> Object | None:
        found = await world.get(resources.GPU_LEASES, name, "team-a")
        return found if found and found.get("status") and true(found) else None

    return await eventually(f"lease {name}: {what}", look)


async def restart_apiserver(world: World, *, pause_seconds: float = 0.0) -> None:
    """Kill the API server and start it again; returns when custom resources are served (at first it answers 429)."""
    await world.control_plane.restart_apiserver(pause_seconds=pause_seconds)
    for kind in resources.OWN_KINDS:
        await _served(world, kind)


async def _served(world: World, kind: Resource) -> None:
    await eventually(f"{kind.plural} to be served", lambda: world.api.ready(kind.path()))


def told(body: Object, kind: str) -> str:
    """Message of a condition; empty where there is none."""
    found = condition_of(body, kind)
    return str(found["message"]) if found else ""


async def always(seconds: float, what: str, true: Callable[[], Awaitable[object]]) -> None:
    """Look again and again that something stays so for a while: for what must *not* happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert await true(), what
        await asyncio.sleep(0.1)
