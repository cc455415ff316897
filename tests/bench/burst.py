"""The burst: 1,000 leases of one GPU each, at once, onto 128 simulated nodes of 8 GPUs, against the same pods posted raw.

What is compared. A lease here has a template, so that the operator has to do all of its work: plan, promise, have the
agents publish the device, make claim template and Job, meter. A bring-your-own lease would be Ready without a pod ever
being scheduled, and its rate would say nothing beside a rate of pods. The clock starts with the first create of a lease
and ends when the last lease was seen Ready and the last pod was seen Running, both by watch.

The baseline, on the same control plane and before the operator is started: the devices are published beforehand (the
bench writes the slots into GpuNode.spec and the agents publish them with their holders), then as many claim templates
and pods are posted as the leases would have led to, made by the operator's own functions: the same labels, tolerations,
requests, CEL selector and node affinity, on the same seats, 32 requests in flight. It contains: creation of template
and pod, the claim that the controller-manager makes from the template, allocation and binding by kube-scheduler,
NodePrepareResources by the same agents through the stand-in for kubelet, and KWOK's Running. It does not contain: the
Job, the lease, its finalizer and its two statuses, the UsageRecord, GpuNode's spec and status, the ResourceSlice's
updates, and the operator's process, all of which share the same cores in the burst. So the ratio also charges us for
Kubernetes' own work on Jobs.

Nothing mines, and all programs share one machine: both rates are bounded by its cores, not by Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.node import Slot
from gpu_tenancy.controller import manifests
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.snapshot import Key, LeaseFacts
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import Resource
from tests.bench import fleet
from tests.bench.figures import Figure, figure
from tests.cluster.api import MERGE, Api, ApiError, Object
from tests.cluster.components import ClientRates
from tests.cluster.world import KUBELETS, OPERATOR, World, agent_name, lease, price_book, template

LEASES: Final = 1000
NAMESPACE: Final = "team-a"
PATIENCE_SECONDS: Final = 1200.0
"""How long one half of a run may take."""
PROGRAMS: Final = (agent_name("all"), KUBELETS)
GPU: Final = {"profile": "full"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run, all in things per second."""

    raw: float
    """Pods Running, posted raw."""
    ready: float
    """Leases Ready."""
    running: float
    """Leases Ready whose pod is Running."""


def run_raised(runs: int) -> list[Figure]:
    """controller-manager and scheduler may send 2,000 requests per second: what the machine can do."""
    return _figures("burst", [asyncio.run(one_run("raised")) for _ in range(runs)], "burst_ratio", "≥ 0.5, aim 0.8")


def run_default(_: int) -> list[Figure]:
    """With Kubernetes' default client rates a run takes minutes, and waits rather than works: one is enough."""
    goal = "≥ 0.5, aim 0.8 (one run; default client rates: 20/s per controller, scheduler 50/s)"
    return _figures("burst_default_rates", [asyncio.run(one_run("default"))], "burst_ratio_default_rates", goal)


def _figures(prefix: str, runs: list[Run], ratio: str, goal: str) -> list[Figure]:
    command = f"make bench ONLY={ratio}"
    raw = sorted(run.raw for run in runs)[len(runs) // 2]
    ...
    return []


async def one_run(rates: ClientRates, leases: int = LEASES, nodes: int = fleet.NODES) -> Run:
    """Baseline and burst on a fresh control plane."""
    world = World(
        fleet.servers(nodes), agents_apart=False, operator=False, client_rates=rates, namespaces=(NAMESPACE,)
    )
    async with world:
        fleet.say(f"{nodes} nodes are up")
        async with asyncio.timeout(PATIENCE_SECONDS):
            raw = await _raw(world, leases)
        fleet.say(f"{raw:.1f} pods/s raw")
        await world.create(price_book())
        await world.start_operator()
        await world.operator_ready()
        async with asyncio.timeout(PATIENCE_SECONDS):
            ready, running = await _leased(world, leases)
        fleet.say(f"{ready:.1f} leases/s Ready, {running:.1f} leases/s Ready with their pod Running")
        return Run(raw, ready, running)


# --- the baseline -------------------------------------------------------------------------------------------------


async def _raw(world: World, count: int) -> float:
    facts = [_facts(index) for index in range(count)]
    seats = await _publish(world, facts)
    seen = await _watched(world.api, resources.PODS, fleet.Pod, _running_pod, count)
    spent = fleet.Spent(world, PROGRAMS)
    began = time.monotonic()
    await fleet.at_once(
        fleet.post(world.api, _raw_objects(one, node)) for one, node in zip(facts, seats, strict=True)
    )
    instants = await seen
    fleet.say(f"raw: {spent.each(count)}")
    await _clear(world)
    return fleet.rate(list(instants.values()), began)


def _facts(index: int) -> LeaseFacts:
    """A lease that does not exist, for the functions that make its claim template and pods."""
    name = f"raw-{index:04d}"
    spec = GpuLeaseSpec.model_validate({"gpus": GPU, "template": template()})
    uid = f"00000000-0000-4000-8000-{index:012d}"
    return LeaseFacts(Key(NAMESPACE, name), uid, 1, datetime.now(UTC), spec, GpuLeaseStatus(attempt=1))


def _raw_objects(facts: LeaseFacts, node: str) -> Iterator[tuple[Resource, Object]]:
    """Claim template, then pod, as the operator and its Job would make them, without an owner."""
    claim_template = manifests.claim_template(facts)
    del claim_template["metadata"]["ownerReferences"]
    yield resources.RESOURCE_CLAIM_TEMPLATES, claim_template
    pod = manifests.job(facts, 1, (node,))["spec"]["template"]
    metadata = {**pod["metadata"], "name": facts.key.name, "namespace": NAMESPACE}
    yield resources.PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


async def _publish(world: World, facts: list[LeaseFacts]) -> list[str]:
    """Have the agents publish a device for every lease, nodes filled one after the other as the planner does; the node
    of each."""
    nodes = await _gpu_nodes(world)
    seats = [(node["metadata"]["name"], gpu) for node in nodes for gpu in reversed(node["status"]["gpus"])]
    wanted: dict[str, list[Object]] = {node["metadata"]["name"]: [] for node in nodes}
    for one, (node, gpu) in zip(facts, seats, strict=False):
        wanted[node].append(_slot(one, gpu))
    await fleet.at_once(_set_slots(world.api, node, slots) for node, slots in wanted.items())
    while await _published(world) != len(facts):
        await asyncio.sleep(0.2)
    return [node for node, _ in seats[: len(facts)]]


async def _gpu_nodes(world: World) -> list[Object]:
    """GpuNodes, once every agent has reported its GPUs."""
    while True:
        with contextlib.suppress(ApiError):  # 429 while the API server still sets a new kind's storage up
            nodes = await world.items(resources.GPU_NODES)
            if len(nodes) == len(world.servers) and all(node.get("status", {}).get("gpus") for node in nodes):
                return nodes
        await asyncio.sleep(0.2)


def _slot(facts: LeaseFacts, gpu: Object) -> Object:
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace=NAMESPACE, name=facts.key.name, uid=facts.uid)
    device = device_name(gpu["index"], "full", 0, facts.uid, 1)
    return Slot(device=device, gpu=gpu["uuid"], profile="full", holder=holder, since=datetime.now(UTC)).to_wire()


async def _set_slots(api: Api, node: str, slots: list[Object]) -> None:
    await api.patch(resources.GPU_NODES.path(None, node), {"spec": {"slots": slots}}, MERGE)


async def _published(world: World) -> int:
    slices = await world.items(resources.RESOURCE_SLICES)
    return sum(len(one["spec"].get("devices") or ()) for one in slices)


async def _clear(world: World) -> None:
    """Take everything of the baseline away again."""
    await fleet.empty(world.api, resources.PODS, NAMESPACE)
    await fleet.empty(world.api, resources.RESOURCE_CLAIM_TEMPLATES, NAMESPACE)
    await fleet.empty(world.api, resources.RESOURCE_CLAIMS, NAMESPACE)
    await fleet.at_once(_set_slots(world.api, server.name, []) for server in world.servers)
    while await _published(world) or any(node["status"].get("slots") for node in await _gpu_nodes(world)):
        await asyncio.sleep(0.2)


def _running_pod(pod: fleet.Pod) -> str:
    return pod.metadata.name if pod.status.phase == "Running" else ""


# --- the burst ----------------------------------------------------------------------------------------------------


async def _leased(world: World, count: int) -> tuple[float, float]:
    ready = await _watched(world.api, resources.GPU_LEASES, fleet.Lease, _ready_lease, count)
    running = await _watched(world.api, resources.PODS, fleet.Pod, _running_pod, count)
    bodies = [lease(f"lease-{index:04d}", NAMESPACE, gpus=GPU, template=template()) for index in range(count)]
    spent = fleet.Spent(world, [*PROGRAMS, OPERATOR])
    began = time.monotonic()
    await fleet.at_once(fleet.post(world.api, [(resources.GPU_LEASES, body)]) for body in bodies)
    fleet.say(f"posted in {time.monotonic() - began:.1f} s")
    leases = await ready
    fleet.say(f"ready: {spent.each(count)}")
    pods = await running
    fleet.say(f"leased: {spent.each(count)}")
    last = max(*leases.values(), *pods.values())
    return fleet.rate(list(leases.values()), began), count / (last - began)


async def _watched(
    api: Api, resource: Resource, view: type[fleet.V], name_of: Callable[[fleet.V], str], count: int
) -> asyncio.Task[dict[str, float]]:
    """A task that ends when `count` names were seen; from here on nothing is missed."""
    version = await fleet.version_of(api, resource)
    return asyncio.create_task(fleet.first_seen(fleet.told(api, resource, view, version), name_of, count))


def _ready_lease(one: fleet.Lease) -> str:
    return one.metadata.name if one.is_true(ConditionType.READY) else ""
