"""The burst: 1,000 one-GPU leases at once onto 128 simulated nodes of 8 GPUs, against the same pods posted raw.

Three ways to get 1,000 pods with a GPU each to run, one after the other on the same control plane. Each is measured in
pods per second, from the first create to the moment when a watch of the bench's own has told the last of them. The
baseline is measured before and after the others, and counts with the mean of both: a shared machine is not as fast at
the end of a run as it was at the beginning.

raw       The baseline. No operator runs. The devices were published beforehand: the bench wrote the slots into
          GpuNode.spec, and the agents published them with their holders. Then a claim template and a pod are posted for
          each, made by the operator's own functions (the same requests, tolerations, CEL selector and node affinity).
          In it: creating template and pod, the claim that the controller-manager makes, allocation and binding by
          kube-scheduler, NodePrepareResources by the agents through the stand-in for kubelet, KWOK's Running.
leased    `burst_ratio`. The same pods, but for leases: leases are posted, and as soon as a lease says its node and its
          claim template is there, the bench posts its pod, with the affinity to that node. Ends when all leases are
          Ready and all pods Running. So the difference to raw is what leasing costs, and nothing else: lease, finalizer
          and statuses, planning, GpuNode, publishing, UsageRecord, and the operator's process on the same cores. (A
          tenant's own pod seldom has such an affinity; without it kube-scheduler looks at more nodes, in raw as here.)
with Job  `burst_jobs_ratio`. The leases have a template: the operator checks it by a dry run and makes a Job of it. The
          ratio to the bare pods of raw also charges them for what Kubernetes itself does for a Job: its status, its
          Events, and the creation of its pod.

`burst_leases_per_s` is the rate of leases Ready in the second half, without waiting for their pods.

Nothing mines. 32 requests of the bench are in flight, and 64 of the pods that it posts itself are not Running yet: of
the claims that it has made kube-controller-manager remembers 100, and where its watch lags behind by more, it makes a
second one and the pod waits for ever (github.com/kubernetes/kubernetes/issues/140217). That is as many as all programs
together can work on. All programs, the bench included, share one machine: with raised client rates every rate is
bounded by its processor (and below 50 claims per second, `tests.cluster.components` says why), with the defaults of
Kubernetes by the 20 requests per second that each controller may send (two for a claim, three or more for a Job).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

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

T = TypeVar("T")

LEASES: Final = 1000
NAMESPACE: Final = "team-a"
PATIENCE_SECONDS: Final[dict[ClientRates, float]] = {"raised": 300.0, "default": 1200.0}
"""How long one part of a run may take."""
WINDOW: Final = 64
"""Pods of the bench's own that are posted and not Running yet, at most."""
AGENTS: Final = agent_name("all")
CONDITIONS: Final = f"nothing mines, ≤ {WINDOW} bare pods not Running"
"""What the figures hold under; see above."""
WHOLE: Final = {"profile": "full"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run, all in things per second."""

    raw: float
    """Pods posted raw, Running; mean of before and after."""
    ready: float
    """Leases Ready."""
    leased: float
    """Leases Ready whose pod, posted by the bench, is Running."""
    with_job: float
    """Leases Ready whose Job's pod is Running."""


def run_raised(runs: int) -> list[Figure]:
    """Controllers and scheduler may send as much as is safe: what the machine can do."""
    return _figures("", [asyncio.run(one_run("raised")) for _ in range(runs)], "≥ 0.5, aim 0.8")


def run_default(_: int) -> list[Figure]:
    """With Kubernetes' default client rates a run takes minutes, and waits rather than works: one is enough."""
    return _figures("_default_rates", [asyncio.run(one_run("default"))], "≥ 0.5, aim 0.8; one run, default rates")


def run_writes(runs: int) -> list[Figure]:
    """Writes to the API server over the whole life of a lease; see `tests.bench.writes`."""
    return writes.run(runs)


def _figures(suffix: str, runs: Sequence[Run], goal: str) -> list[Figure]:
    raw = round(statistics.median(run.raw for run in runs), 2)
    bare, jobs = f"{goal}; {CONDITIONS}", f"none: charged for what Kubernetes does for a Job; {CONDITIONS}"
    running, ready = f"see burst_ratio; {CONDITIONS}", f"none: Ready alone, pods by the tenant; {CONDITIONS}"
    return [
        figure(f"burst_ratio{suffix}", [run.leased / run.raw for run in runs], "", bare),
        figure(f"burst_jobs_ratio{suffix}", [run.with_job / run.raw for run in runs], "", jobs),
        figure(f"burst_running_per_s{suffix}", [run.leased for run in runs], "1/s", running, baseline=raw),
        figure(f"burst_leases_per_s{suffix}", [run.ready for run in runs], "1/s", ready, baseline=raw),
    ]


async def one_run(rates: ClientRates, leases: int = LEASES, nodes: int = fleet.NODES) -> Run:
    """All three parts on a fresh control plane."""
    async with World(
        fleet.servers(nodes), agents_apart=False, operator=False, client_rates=rates, namespaces=(NAMESPACE,)
    ) as world:
        await fleet.gpu_nodes(world)
        fleet.say(f"{nodes} nodes are up")
        before = await _part(_raw, world, leases)
        await world.create(price_book())
        await world.start_operator()
        await world.operator_ready()
        ready, leased = await _part(_leased, world, leases)
        _, with_job = await _part(_with_job, world, leases)
        await world.kill_operator()
        after = await _part(_raw, world, leases)
    return Run((before + after) / 2, ready, leased, with_job)


async def _part(part: Callable[[World, int], Coroutine[Any, Any, T]], world: World, count: int) -> T:
    """One part, and its traces gone. Raises RuntimeError with what is not there yet where that takes too long."""
    patience = PATIENCE_SECONDS[world.control_plane.client_rates]
    try:
        async with asyncio.timeout(patience):
            result = await part(world, count)
            await _clear(world)
    except TimeoutError:
        raise RuntimeError(f"not done after {patience:.0f} s: {await _undone(world)}") from None
    return result


async def _undone(world: World) -> str:
    """What there is, and what Kubernetes last said about the first pod that does not run."""
    pods = await world.api.items(resources.PODS.path(NAMESPACE))
    leases = await world.api.items(resources.GPU_LEASES.path(NAMESPACE))
    claims = await world.api.items(resources.RESOURCE_CLAIMS.path(NAMESPACE))
    waiting = sorted(pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] != "Running")
    text = f"{len(leases)} leases, {len(claims)} claims, {len(pods)} pods, {len(waiting)} of them not Running"
    if not waiting:
        return text
    events = await world.api.items(f"/api/v1/namespaces/{NAMESPACE}/events")
    told = [event["message"] for event in events if event["involvedObject"]["name"] == waiting[0]]
    return f"{text}; {waiting[0]}: {told[-1] if told else 'no Event'}"


async def _clear(world: World) -> None:
    """Nothing is leased, nothing published, no pod and no claim is left."""
    for kind in (resources.PODS, resources.GPU_LEASES, resources.JOBS, resources.PODS):
        await fleet.empty(world.api, kind, NAMESPACE)
    for kind in (resources.RESOURCE_CLAIM_TEMPLATES, resources.RESOURCE_CLAIMS):
        # Their controller would take its finalizer off at its own 20 requests per second.
        await fleet.empty(world.api, kind, NAMESPACE, force=True)
    if not world.control_plane.alive(OPERATOR):
        await fleet.at_once(_set_slots(world.api, server.name, []) for server in world.servers)
    while await _published(world) or any(node["status"].get("slots") for node in await fleet.gpu_nodes(world)):
        await asyncio.sleep(0.2)


# --- raw ----------------------------------------------------------------------------------------------------------


async def _raw(world: World, count: int) -> float:
    facts = [_facts(f"raw-{index:04d}", f"00000000-0000-4000-8000-{index:012d}") for index in range(count)]
    nodes = await _publish(world, facts)
    window = asyncio.Semaphore(WINDOW)
    running = await _last(world.api, resources.PODS, fleet.Pod, _running_pod, count, window.release)

    async def post(one: LeaseFacts, node: str) -> None:
        await window.acquire()
        await fleet.post(world.api, [_claim_template(one), _pod(one, node)])

    spent, began = fleet.Spent(world, (AGENTS, KUBELETS)), time.monotonic()
    await fleet.at_once(post(one, node) for one, node in zip(facts, nodes, strict=True))
    per_second = count / (await running - began)
    fleet.say(f"raw: {per_second:.1f} pods/s Running, {spent.each(count)}")
    return per_second


def _facts(name: str, uid: str) -> LeaseFacts:
    """A lease, as far as the functions look at it that make claim template and pods."""
    spec = GpuLeaseSpec.model_validate({"gpus": WHOLE, "template": template()})
    return LeaseFacts(Key(NAMESPACE, name), uid, 1, datetime.now(UTC), spec, GpuLeaseStatus(attempt=1))


def _claim_template(facts: LeaseFacts) -> tuple[Resource, Object]:
    """As the operator makes it, without an owner, which would be missing."""
    body = manifests.claim_template(facts)
    del body["metadata"]["ownerReferences"]
    return resources.RESOURCE_CLAIM_TEMPLATES, body


def _pod(facts: LeaseFacts, node: str) -> tuple[Resource, Object]:
    """As the Job of the operator would make it."""
    spec = manifests.job(facts, 1, (node,))["spec"]["template"]["spec"]
    metadata = {"namespace": NAMESPACE, "name": facts.key.name}
    return resources.PODS, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


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


# --- leased -------------------------------------------------------------------------------------------------------


async def _leased(world: World, count: int) -> tuple[float, float]:
    """Leases Ready per second, and leases Ready with their pod Running."""
    amounts = {"cpu": "4", "memory": "8Gi"}
    bodies = [lease(f"own-{index:04d}", NAMESPACE, gpus=WHOLE, podResources=amounts) for index in range(count)]
    placed = await fleet.states(world.api, resources.GPU_LEASES, fleet.Lease)
    made = await fleet.states(world.api, resources.RESOURCE_CLAIM_TEMPLATES, fleet.View)
    window = asyncio.Semaphore(WINDOW)
    tenant = asyncio.create_task(_Tenant(world.api, count, window).run(placed, made))
    rates = await _burst(world, bodies, "leased", window.release)
    await tenant
    return rates


async def _with_job(world: World, count: int) -> tuple[float, float]:
    """The same for leases whose pods come from a template."""
    bodies = [lease(f"job-{index:04d}", NAMESPACE, gpus=WHOLE, template=template()) for index in range(count)]
    return await _burst(world, bodies, "with Job")


async def _burst(
    world: World, bodies: Sequence[Object], what: str, runs: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """`runs` is called for each pod that runs."""
    count = len(bodies)
    ready = await _last(world.api, resources.GPU_LEASES, fleet.Lease, _ready_lease, count)
    running = await _last(world.api, resources.PODS, fleet.Pod, _running_pod, count, runs)
    spent, began = fleet.Spent(world, (AGENTS, KUBELETS, OPERATOR)), time.monotonic()
    await fleet.at_once(fleet.post(world.api, [(resources.GPU_LEASES, body)]) for body in bodies)
    last_ready, last_running = await asyncio.gather(ready, running)
    rates = count / (last_ready - began), count / (max(last_ready, last_running) - began)
    fleet.say(f"{what}: {rates[0]:.1f} leases/s Ready, {rates[1]:.1f} with their pod Running, {spent.each(count)}")
    return rates


async def _last(
    api: Api,
    resource: Resource,
    view: type[fleet.V],
    name_of: Callable[[fleet.V], str],
    count: int,
    told: Callable[[], None] = lambda: None,
) -> asyncio.Task[float]:
    """A task that ends when `count` names were told, with that instant; from here on nothing is missed."""
    return asyncio.create_task(fleet.last_seen(await fleet.states(api, resource, view), name_of, count, told))


def _ready_lease(one: fleet.Lease) -> str:
    return one.metadata.name if one.is_true(ConditionType.READY) else ""


def _placed_lease(one: fleet.Lease) -> str:
    return one.metadata.name if one.status.nodes else ""


def _running_pod(one: fleet.Pod) -> str:
    return one.metadata.name if one.status.phase == "Running" else ""


def _any(one: fleet.View) -> str:
    return one.metadata.name


class _Tenant:
    """Posts the pod of each lease once the lease names its node and its claim template is there."""

    def __init__(self, api: Api, count: int, window: asyncio.Semaphore) -> None:
        """`window`: acquired for each pod that is posted."""
        self._api = api
        self._window = window
        self._count = count
        self._nodes: dict[str, str] = {}
        self._templates: set[str] = set()
        self._in_flight = asyncio.Semaphore(fleet.IN_FLIGHT)

    async def run(self, leases: AsyncGenerator[fleet.Lease, None], templates: AsyncGenerator[fleet.View, None]) -> None:
        """Ends when every pod is posted."""
        async with asyncio.TaskGroup() as work:
            work.create_task(self._follow_leases(leases, work))
            work.create_task(self._follow_templates(templates, work))

    async def _follow_leases(self, leases: AsyncGenerator[fleet.Lease, None], work: asyncio.TaskGroup) -> None:
        async for name, one in fleet.first(leases, _placed_lease, self._count):
            self._nodes[name] = one.status.nodes[0]
            if name in self._templates:
                work.create_task(self._post(name))

    async def _follow_templates(self, templates: AsyncGenerator[fleet.View, None], work: asyncio.TaskGroup) -> None:
        async for name, _ in fleet.first(templates, _any, self._count):
            self._templates.add(name)
            if name in self._nodes:
                work.create_task(self._post(name))

    async def _post(self, name: str) -> None:
        await self._window.acquire()
        async with self._in_flight:
            await fleet.post(self._api, [_pod(_facts(name, ""), self._nodes[name])])
