"""The burst: 1,000 one-GPU leases at once onto 128 simulated nodes of 8 GPUs, against the same pods posted raw.

What is compared. A lease here has a template, so that the operator has to do all of its work: plan, promise, have the
agents publish the device, make claim template and Job, meter. A lease that brings its own pods would be Ready without
one of them being scheduled, and its rate would say nothing beside a rate of pods. The clock starts with the first
create of a lease. `burst_leases_per_s`, and with it `burst_ratio`, ends it when the last lease was seen Ready;
`burst_running_per_s` when, besides, the last pod was seen Running. Both are seen by watches of the bench's own.

The baseline, in the same run on the same control plane, before the operator is started: the devices are published
beforehand (the bench writes the slots into GpuNode.spec and the agents publish them with their holders), then as many
claim templates and pods are posted as the leases would have led to, made by the operator's own functions: the same
labels, tolerations, requests, CEL selector and node affinity, on the same seats, 32 requests in flight.
It contains: creating template and pod, the claim that the controller-manager makes from the template, allocation and
binding by kube-scheduler, NodePrepareResources by the same agents through the stand-in for kubelet, KWOK's Running.
It does not contain: a Job, a lease with its finalizer and two statuses, the dry run of its template, a UsageRecord, the
writes to GpuNode and ResourceSlice, and the operator's process. All of these share the machine's cores with the rest in
the burst, so the ratio also charges the leases for Kubernetes' own work on Jobs.

Nothing mines. All programs, the bench included, share one machine: with raised client rates both rates are bounded by
its processor, with the default rates by the 20 requests per second of each controller.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.node import Slot
from gpu_tenancy.controller import manifests
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.snapshot import Key, LeaseFacts
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import Resource
from tests.bench import fleet, writes
from tests.bench.figures import Figure, figure
from tests.cluster.api import MERGE, Api, Object
from tests.cluster.components import ClientRates
from tests.cluster.world import KUBELETS, OPERATOR, World, agent_name, lease, price_book, template

LEASES: Final = 1000
NAMESPACE: Final = "team-a"
PATIENCE_SECONDS: Final = 1200.0
"""How long one half of a run may take."""
PROGRAMS: Final = (agent_name("all"), KUBELETS)
WHOLE: Final = {"profile": "full"}


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
    """controller-manager and scheduler may send 2,000 requests per second each: what the machine can do."""
    return _figures("burst_ratio", "", [asyncio.run(one_run("raised")) for _ in range(runs)], "≥ 0.5, aim 0.8")


def run_default(_: int) -> list[Figure]:
    """With Kubernetes' default client rates a run takes minutes, and waits rather than works: one is enough."""
    goal = "≥ 0.5, aim 0.8 (one run; default client rates: 20/s per controller, 50/s for the scheduler)"
    return _figures("burst_ratio_default_rates", "_default_rates", [asyncio.run(one_run("default"))], goal)


def run_writes(runs: int) -> list[Figure]:
    """Writes to the API server over the whole life of a lease; see `tests.bench.writes`."""
    return writes.run(runs)


def _figures(name: str, suffix: str, runs: Sequence[Run], goal: str) -> list[Figure]:
    raw = round(statistics.median(run.raw for run in runs), 2)
    rows = (
        figure(name, [run.ready / run.raw for run in runs], "", goal),
        figure(f"burst_leases_per_s{suffix}", [run.ready for run in runs], "1/s", "to the last Ready", baseline=raw),
        figure(
            f"burst_running_per_s{suffix}",
            [run.running for run in runs],
            "1/s",
            "to the last Ready and Running",
            baseline=raw,
        ),
    )
    return [replace(one, command=f"make bench ONLY={name}") for one in rows]


async def one_run(rates: ClientRates, leases: int = LEASES, nodes: int = fleet.NODES) -> Run:
    """Baseline and burst on a fresh control plane."""
    servers = fleet.servers(nodes)
    async with World(servers, agents_apart=False, operator=False, client_rates=rates, namespaces=(NAMESPACE,)) as world:
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
    """Pods per second from the first create to the last Running."""
    facts = [_facts(index) for index in range(count)]
    nodes = await _publish(world, facts)
    seen = await _watched(world.api, resources.PODS, fleet.Pod, _running_pod, count)
    spent = fleet.Spent(world, PROGRAMS)
    began = time.monotonic()
    await fleet.at_once(fleet.post(world.api, _raw_objects(one, node)) for one, node in zip(facts, nodes, strict=True))
    instants = await seen
    fleet.say(f"raw: {spent.each(count)}")
    await _clear(world)
    return count / (max(instants.values()) - began)


def _facts(index: int) -> LeaseFacts:
    """A lease that does not exist, for the functions that make its claim template and pods."""
    name, uid = f"raw-{index:04d}", f"00000000-0000-4000-8000-{index:012d}"
    spec = GpuLeaseSpec.model_validate({"gpus": WHOLE, "template": template()})
    return LeaseFacts(Key(NAMESPACE, name), uid, 1, datetime.now(UTC), spec, GpuLeaseStatus(attempt=1))


def _raw_objects(facts: LeaseFacts, node: str) -> Iterator[tuple[Resource, Object]]:
    """Claim template, then pod, as the operator and its Job would make them, but without an owner."""
    claim_template = manifests.claim_template(facts)
    del claim_template["metadata"]["ownerReferences"]
    yield resources.RESOURCE_CLAIM_TEMPLATES, claim_template
    pod = manifests.job(facts, 1, (node,))["spec"]["template"]
    metadata = {**pod["metadata"], "name": facts.key.name, "namespace": NAMESPACE}
    yield resources.PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}


async def _publish(world: World, facts: Sequence[LeaseFacts]) -> list[str]:
    """Have the agents publish a device for each, nodes filled one after the other as the planner does; the nodes."""
    gpu_nodes = await fleet.gpu_nodes(world)
    seats = [(node["metadata"]["name"], gpu) for node in gpu_nodes for gpu in reversed(node["status"]["gpus"])]
    wanted: dict[str, list[Object]] = {node["metadata"]["name"]: [] for node in gpu_nodes}
    for one, (node, gpu) in zip(facts, seats, strict=False):
        wanted[node].append(_slot(one, gpu))
    await fleet.at_once(_set_slots(world.api, node, slots) for node, slots in wanted.items())
    while await _published(world) != len(facts):
        await asyncio.sleep(0.2)
    return [node for node, _ in seats[: len(facts)]]


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
    for kind in (resources.PODS, resources.RESOURCE_CLAIM_TEMPLATES, resources.RESOURCE_CLAIMS):
        await fleet.empty(world.api, kind, NAMESPACE)
    await fleet.at_once(_set_slots(world.api, server.name, []) for server in world.servers)
    while await _published(world) or any(node["status"].get("slots") for node in await fleet.gpu_nodes(world)):
        await asyncio.sleep(0.2)


def _running_pod(pod: fleet.Pod) -> str:
    return pod.metadata.name if pod.status.phase == "Running" else ""


# --- the burst ----------------------------------------------------------------------------------------------------


async def _leased(world: World, count: int) -> tuple[float, float]:
    """Leases per second from the first create to the last Ready, and to the last Ready and Running."""
    ready = await _watched(world.api, resources.GPU_LEASES, fleet.Lease, _ready_lease, count)
    running = await _watched(world.api, resources.PODS, fleet.Pod, _running_pod, count)
    bodies = [lease(f"lease-{index:04d}", NAMESPACE, gpus=WHOLE, template=template()) for index in range(count)]
    spent = fleet.Spent(world, [*PROGRAMS, OPERATOR])
    began = time.monotonic()
    await fleet.at_once(fleet.post(world.api, [(resources.GPU_LEASES, body)]) for body in bodies)
    fleet.say(f"posted in {time.monotonic() - began:.1f} s")
    leases = await ready
    fleet.say(f"Ready: {spent.each(count)}")
    pods = await running
    fleet.say(f"Running: {spent.each(count)}")
    last = max(leases.values())
    return count / (last - began), count / (max(last, *pods.values()) - began)


def _ready_lease(one: fleet.Lease) -> str:
    return one.metadata.name if one.is_true(ConditionType.READY) else ""


async def _watched(
    api: Api, resource: Resource, view: type[fleet.V], name_of: Callable[[fleet.V], str], count: int
) -> asyncio.Task[dict[str, float]]:
    """A task that ends when `count` names were seen; from here on nothing is missed."""
    version = await fleet.version_of(api, resource)
    return asyncio.create_task(fleet.first_seen(fleet.told(api, resource, view, version), name_of, count))
