"""What breaks beside a lease, on a real control plane: it goes on, or ends, and every second is billed once.

Most stories live in one world of two large servers on which everything mines, and leave it as they found it. Those
about agents and nodes live in one of three small servers with quick heartbeats; the last one takes its world apart.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final

import psutil
import pytest

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from tests.cluster.api import JSON_PATCH, MERGE, Object
from tests.cluster.components import Component
from tests.cluster.eventually import eventually
from tests.cluster.world import (
    CRDS,
    OPERATOR,
    GpuServer,
    World,
    agent_name,
    condition_of,
    lease,
    pool,
    price_book,
    template,
)
from tests.integration.conftest import Living, mining_world, settled_world, story
from tests.integration.looks import (
    DEPLOYMENTS,
    deployment,
    gone,
    lease_where,
    nothing_left,
    reported,
    restart_apiserver,
    running,
    slots_of,
    told,
)

SMALL = (GpuServer("n1", gpus=2), GpuServer("n2", gpus=2), GpuServer("n3", gpus=2))
WHOLE = {"profile": "full"}
MINERS: Final[dict[str, Any]] = {"resources": {"cpu": "1", "memory": "1Gi"}}
ARCHIVE = names.SYSTEM_NAMESPACE
OFTEN, NEVER = 5, 3600
"""Seconds between two listings of everything: as often as can be set, and not within a test."""


@pytest.fixture(scope="module")
def mining() -> Iterator[Living]:
    yield from mining_world()


@pytest.fixture
def world(mining: Living) -> Iterator[Living]:
    yield mining
    mining.run(_clear(mining.world))


async def _clear(world: World) -> None:
    ended = [one for one in Component if not world.control_plane.alive(one)]
    assert not ended, "a part of Kubernetes has ended; nothing that is missing now is the operator's"
    await world.kubectl("delete", "jobs,deployments", "--all", "-n", "team-a", "--wait=false")
    await world.kubectl("delete", "gpul", "--all", "-n", "team-a")
    if not await world.items(resources.MINING_POOLS):
        await world.create(pool(**MINERS))
    await world.mining(16)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _seconds(record: Object) -> int:
    """Billed seconds, after a look at the record's own arithmetic."""
    spec = record["spec"]
    assert _time(spec["billableTo"]) - _time(spec["billableFrom"]) == timedelta(seconds=spec["seconds"])
    return int(spec["seconds"])


def _uids(miners: dict[tuple[str, str], Object]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in miners.values()}


# --- objects that go ----------------------------------------------------------------------------------------------


@story
async def test_a_deleted_pool_takes_its_miners_with_it_and_nothing_else(world: World) -> None:
    await world.create(lease("keeps", gpus={**WHOLE, "count": 2}, template=template()))
    before = await world.ready("keeps")
    await world.mining(14)
    await world.kubectl("delete", "minepool", "miners", "-n", "mining")
    await _no_miners(world)
    await eventually("the miners' claims to go", lambda: _no_claims(world))
    assert await running(world, **{names.LABEL_LEASE: "keeps"})
    after = await world.ready("keeps")
    assert after["status"]["billableFrom"] == before["status"]["billableFrom"]
    for node in await world.items(resources.GPU_NODES):
        assert {slot["holder"]["kind"] for slot in node["spec"].get("slots", ())} <= {"GpuLease"}
    await world.create(pool(**MINERS))
    await world.mining(14)


async def _no_miners(world: World) -> None:
    async def look() -> bool:
        return not await world.miners()

    await eventually("all miners to go", look)


async def _no_claims(world: World) -> bool:
    return not await world.items(resources.RESOURCE_CLAIMS, labelSelector=names.LABEL_POOL)


@story
async def test_a_namespace_deleted_under_its_leases_is_billed_once_and_really_goes(world: World) -> None:
    await world.control_plane.create_namespace("short-lived")
    term = {"duration": "1h"}
    for name, spec in (("job", {"template": template()}), ("own", {}), ("queued", {"pods": 3})):
        count = 7 if name == "queued" else 1
        await world.create(lease(name, "short-lived", gpus={**WHOLE, "count": count}, term=term, **spec))
    ready = [await world.ready(name, "short-lived") for name in ("job", "own")]
    await asyncio.sleep(1.2)
    await world.kubectl("delete", "namespace", "short-lived", "--timeout=60s")
    archived = [one for one in await world.items(resources.USAGE_RECORDS) if _of(one, "short-lived")]
    assert {one["metadata"]["namespace"] for one in archived} == {ARCHIVE}
    assert sorted(one["spec"]["leaseName"] for one in archived) == ["job", "own"]
    for one in archived:
        assert one["spec"]["reason"] in ("Deleted", "Failed")  # Kubernetes may delete a Job's pods before the lease
        assert _seconds(one) >= 1
        assert "finalizers" not in one["metadata"]
    for one in ready:
        await nothing_left(world, one["metadata"]["uid"])


def _of(record: Object, namespace: str) -> bool:
    return bool(record["spec"]["leaseNamespace"] == namespace)


@story
async def test_a_lease_deleted_while_it_is_prepared_was_never_billed(world: World) -> None:
    created = await world.create(lease("brief", gpus=WHOLE))
    await eventually("its devices to be promised", lambda: slots_of(world, created["metadata"]["uid"]))
    await world.delete(resources.GPU_LEASES, "brief", "team-a")
    await gone(world, "brief")
    assert sum(_seconds(record) for record in await world.records("brief")) <= 1
    await nothing_left(world, created["metadata"]["uid"])


@story
async def test_a_record_deleted_by_hand_is_archived_and_its_seconds_still_count(world: World) -> None:
    await world.create(lease("twice", gpus=WHOLE, term={"duration": "1h"}))
    await world.ready("twice")
    await asyncio.sleep(1.2)
    await _patch(world, "twice", suspend=True)
    await lease_where(world, "twice", "suspended", lambda one: one["status"].get("billableTo"))
    [first] = await world.records("twice")
    await world.kubectl("delete", "usagerecord", first["metadata"]["name"], "-n", "team-a")
    [copy] = await world.records("twice")
    assert (copy["metadata"]["namespace"], copy["spec"]) == (ARCHIVE, first["spec"])
    await _patch(world, "twice", suspend=False)
    again = await world.ready("twice")
    assert again["status"]["segment"] == 2
    left = timedelta(hours=1) - timedelta(seconds=_seconds(first))
    assert _time(again["status"]["expiresAt"]) == _time(again["status"]["billableFrom"]) + left


async def _patch(world: World, name: str, **spec: object) -> None:
    await world.api.patch(resources.GPU_LEASES.path("team-a", name), {"spec": spec}, MERGE)


# --- an API server that goes and comes ----------------------------------------------------------------------------


@story
async def test_a_restarted_api_server_costs_no_lease_a_second_or_its_end(world: World) -> None:
    await world.create(lease("patient", gpus={**WHOLE, "count": 2}, term={"duration": "6s", "notice": "1s"}))
    await world.api.create(DEPLOYMENTS, deployment("patient"))
    ready = await world.ready("patient")
    await restart_apiserver(world, pause_seconds=1)
    ended = await world.settled("patient")
    assert ended["status"]["ended"]["reason"] == "Expired"
    [record] = await world.records("patient")
    assert record["spec"]["billableFrom"] == ready["status"]["billableFrom"]
    assert _seconds(record) == 6
    await world.mining(16)
    await nothing_left(world, ready["metadata"]["uid"])


@story
async def test_an_operator_whose_api_server_is_away_is_not_ready_and_says_why_but_is_not_to_be_restarted(
    world: World,
) -> None:
    restart = asyncio.create_task(restart_apiserver(world, pause_seconds=1))
    try:
        why = await _alive_and_unready(world)
    finally:
        await restart
    assert re.match(r"\w+: GET /api", why), "which view is not kept up, and which request failed"
    await world.operator_ready()


async def _alive_and_unready(world: World) -> str:
    """Wait until the operator is not ready; what it says then."""

    async def look() -> str:
        assert await world.ask("/healthz") == (200, "ok\n")
        status, text = await world.ask("/readyz")
        return text if status == 503 else ""

    return await eventually("the operator not to be ready", look)


@asynccontextmanager
async def _blind(world: World) -> AsyncIterator[None]:
    """What happens inside is never told to the operator: it sleeps, and its watches end in 410 Gone."""
    pid = world.control_plane.pid_of(OPERATOR)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        await restart_apiserver(world)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _operator_that_lists_everything(world: World, seconds: int) -> None:
    await world.kill_operator()
    resync = f"GPU_TENANCY_RESYNC_SECONDS={seconds}"
    await world.start_operator(("env", resync, sys.executable, "-m", "gpu_tenancy", "operator"))
    await world.operator_ready()


@story
async def test_what_was_deleted_while_the_operator_saw_nothing_leaves_no_ghost(world: World) -> None:
    """Waiting leases have no finalizer, so they can vanish unseen; a new listing names only what is left."""
    await _operator_that_lists_everything(world, NEVER)
    for name in ("first", "second", "third"):
        await world.create(lease(name, gpus={**WHOLE, "count": 7}, pods=2 if name == "first" else 1))
        await lease_where(world, name, "seen", lambda one: one["status"].get("conditions"))
    await world.ready("first")
    assert [await _position(world, name) for name in ("second", "third")] == [1, 2]
    async with _blind(world):
        await world.delete(resources.GPU_LEASES, "second", "team-a")
    await eventually("the operator to count one lease in the queue", lambda: _counts(world, "Queued", 1))
    await world.delete(resources.GPU_LEASES, "first", "team-a")
    await world.ready("third")


@pytest.mark.exhaustive
@story
async def test_even_the_last_object_of_a_kind_leaves_no_ghost(world: World) -> None:
    """A new listing of nothing is silence: only the slow listing of everything finds out."""
    await _operator_that_lists_everything(world, OFTEN)
    async with _blind(world):
        await world.kubectl("delete", "minepool", "miners", "-n", "mining")
    await eventually("the pool's devices to be given back", lambda: _no_slots(world))
    await _no_miners(world)
    await world.create(pool(**MINERS))
    await world.mining(16)


@story
async def test_a_claim_that_stays_behind_is_made_to_be_looked_at_again(world: World) -> None:
    """Held here by a finalizer, as kube-controller-manager's own holds one that it has forgotten. A miner whose claim
    alone was deleted is stopped, and another takes its place."""
    [claim, *_] = await world.items(resources.RESOURCE_CLAIMS, labelSelector=names.LABEL_POOL)
    name = claim["metadata"]["name"]
    hold = {"metadata": {"finalizers": ["example.com/hold", *claim["metadata"].get("finalizers", ())]}}
    await world.api.patch(resources.RESOURCE_CLAIMS.path("mining", name), hold, MERGE)
    await world.kubectl("delete", "resourceclaim", "-n", "mining", name, "--wait=false")

    async def touched() -> str:
        found = await world.get(resources.RESOURCE_CLAIMS, name, "mining")
        return str((found or {"metadata": {}})["metadata"].get("annotations", {}).get(names.ANNOTATION_TOUCHED, ""))

    assert _time(await eventually("the claim to be touched", touched)).tzinfo is not None
    await world.api.patch(resources.RESOURCE_CLAIMS.path("mining", name), {"metadata": {"finalizers": None}}, MERGE)
    await world.mining(16)


async def _no_slots(world: World) -> bool:
    nodes = await world.items(resources.GPU_NODES)
    return not any(slot for node in nodes for part in ("spec", "status") for slot in node[part].get("slots", ()))


async def _position(world: World, name: str) -> int | None:
    found = await world.condition(name, "Ready", "False", "Queued")
    position: int | None = found["status"].get("position")
    return position


async def _counts(world: World, state: str, number: int) -> bool:
    _, text = await world.ask("/metrics")
    return f'gpu_tenancy_leases{{state="{state}"}} {number}.0' in text.splitlines()


# --- other people's hands -----------------------------------------------------------------------------------------


async def _edit_slots(world: World, node: str, change: Callable[[list[Object]], list[Object]]) -> None:
    """Rewrite GpuNode.spec as an administrator may."""
    body = await world.api.get(resources.GPU_NODES.path(None, node))
    patch = [
        {"op": "test", "path": "/metadata/generation", "value": body["metadata"]["generation"]},
        {"op": "replace", "path": "/spec/slots", "value": change(body["spec"]["slots"])},
    ]
    await world.api.patch(resources.GPU_NODES.path(None, node), patch, JSON_PATCH)


async def _nothing_is_held_twice(world: World) -> None:
    for node in await world.items(resources.GPU_NODES):
        wanted = [(slot["gpu"], slot["start"]) for slot in node["spec"]["slots"]]
        assert len(wanted) == len(set(wanted)), node["metadata"]["name"]


@story
async def test_a_lease_whose_slot_somebody_removed_is_placed_anew_and_billed_for_neither_twice(world: World) -> None:
    await world.create(lease("robbed", gpus={**WHOLE, "count": 2}, template=template()))
    first = await world.ready("robbed")
    uid, [node] = first["metadata"]["uid"], first["status"]["nodes"]
    taken = (await slots_of(world, uid, "spec"))[0][1]["device"]
    await asyncio.sleep(1.2)
    await _edit_slots(world, node, lambda slots: [slot for slot in slots if slot["device"] != taken])
    again = await lease_where(
        world, "robbed", "ready again", lambda one: one["status"]["attempt"] == 2 and _state(one) == "Ready"
    )
    await _nothing_is_held_twice(world)
    one, two = await world.records("robbed")
    assert one["spec"]["reason"] == "NodeLost"
    assert _time(two["spec"]["billableFrom"]) >= _time(one["spec"]["billableTo"])
    assert len(await slots_of(world, uid, "spec")) == again["status"]["readyDevices"] == 2
    await world.mining(14)
    [pod] = await eventually("the pod of the second attempt", lambda: running(world, **{names.LABEL_LEASE: "robbed"}))
    assert pod["metadata"]["labels"][names.LABEL_ATTEMPT] == "2"


@story
async def test_a_stray_slot_is_taken_away_again_and_its_miner_comes_back(world: World) -> None:
    await world.create(lease("spoilt", gpus=WHOLE))
    ready = await world.ready("spoilt")
    uid = ready["metadata"]["uid"]
    [(node, own)] = await slots_of(world, uid, "spec")
    await world.mining(15)
    stray = {**own, "device": "gpu99-stray"}

    def give_away(slots: list[Object]) -> list[Object]:
        miner = next(slot for slot in slots if slot["holder"]["uid"] != uid and slot["profile"] == "full")
        return [*(slot for slot in slots if slot is not miner), {**stray, "gpu": miner["gpu"]}]

    await _edit_slots(world, node, give_away)
    await eventually("the stray slot to go", lambda: _has_only(world, uid, own))
    await world.mining(15)
    await _nothing_is_held_twice(world)
    [record] = await world.records("spoilt")
    assert "billableTo" not in record["spec"]


@story
async def test_an_edit_by_kubectl_between_plan_and_promise_stands_and_nothing_is_leased_twice(world: World) -> None:
    """The operator has planned a gang on both nodes and written its first word; then somebody takes another lease's
    slot away, of which the promise that comes next knows nothing."""
    await world.create(lease("stripped", gpus=WHOLE))
    first = await world.ready("stripped")
    uid, [node] = first["metadata"]["uid"], first["status"]["nodes"]
    await world.mining(15)
    async with _operator_stopped_after(world, "patch gpuleases"):
        pair = await world.create(lease("pair", gpus={**WHOLE, "count": 6}, pods=2))
        await _stopped(world)
        slots = (await world.api.get(resources.GPU_NODES.path(None, node)))["spec"]["slots"]
        [index] = [index for index, slot in enumerate(slots) if slot["holder"]["uid"] == uid]
        patch = f'[{{"op": "remove", "path": "/spec/slots/{index}"}}]'
        await world.kubectl("patch", "gpunode", node, "--type=json", "--patch", patch)
        assert not await slots_of(world, pair["metadata"]["uid"], "spec")
    await world.ready("pair")
    assert await _refused_promises(world) >= 1
    again = await lease_where(
        world, "stripped", "ready again", lambda one: one["status"]["attempt"] == 2 and _state(one) == "Ready"
    )
    await world.mining(3)
    await _nothing_is_held_twice(world)
    assert [len(await slots_of(world, one["metadata"]["uid"])) for one in (pair, again)] == [2 * 12, 2 * 1]
    one, two = await world.records("stripped")
    assert (one["spec"]["reason"], "billableTo" in two["spec"]) == ("NodeLost", False)
    assert _time(two["spec"]["billableFrom"]) >= _time(one["spec"]["billableTo"])


@asynccontextmanager
async def _operator_stopped_after(world: World, write: str) -> AsyncIterator[None]:
    """An operator that stops itself after its first write of a kind and goes on when this is left."""
    await world.kill_operator()
    await world.start_operator((sys.executable, "-m", "tests.cluster.pausing", "--after", write, "operator"))
    try:
        await world.operator_ready()
        yield
    finally:
        os.kill(world.control_plane.pid_of(OPERATOR), signal.SIGCONT)


async def _stopped(world: World) -> None:
    """Wait until the operator has stopped itself."""
    operator = psutil.Process(world.control_plane.pid_of(OPERATOR))

    async def look() -> bool:
        return bool(operator.status() == psutil.STATUS_STOPPED)

    await eventually("the operator to stop itself", look)


async def _refused_promises(world: World) -> int:
    """Writes of the operator to GpuNodes that the API server refused, because somebody else had been there before."""
    _, text = await world.ask("/metrics")
    counts = re.findall(
        r'^gpu_tenancy_api_requests_total\{code="422",resource="gpunodes",verb="patch"\} (\d+)', text, re.MULTILINE
    )
    return sum(map(int, counts))


BEYOND: Final = "9999-12-31T23:59:59.000000-12:00"
"""A time to the API server, and none to the operator: stands for all that only a newer version understands."""


@story
async def test_a_gpu_node_that_cannot_be_read_is_left_as_it_is_until_it_can(world: World) -> None:
    await world.create(lease("kept", gpus={**WHOLE, "count": 2}, template=template()))
    ready = await world.ready("kept")
    uid, [node] = ready["metadata"]["uid"], ready["status"]["nodes"]
    await world.mining(14)
    since = {slot["device"]: slot["since"] for _, slot in await slots_of(world, uid, "spec")}
    await _edit_slots(
        world, node, lambda slots: [slot | ({"since": BEYOND} if slot["device"] in since else {}) for slot in slots]
    )
    written = await world.api.get(resources.GPU_NODES.path(None, node))
    stalled = await world.condition("kept", "Stalled", "True", "Unreadable")
    why = f"GpuNode {node} cannot be read (spec.slots."
    assert f"2 of 2 devices on {node}. But {why}" in told(stalled, "Ready")
    about = f"reason=Unreadable,involvedObject.kind=GpuNode,involvedObject.name={node}"
    [event] = await eventually("an Event", lambda: world.items(resources.EVENTS, fieldSelector=about))
    assert event["message"].startswith(why)
    await world.create(lease("beside", gpus={**WHOLE, "count": 4}))
    assert node not in (await world.ready("beside"))["status"]["nodes"]
    await world.kubectl("delete", "gpul", "kept", "-n", "team-a", "--wait=false")
    await lease_where(world, "kept", "no longer billed", lambda one: "billableTo" in one["status"])
    await asyncio.sleep(1.2)
    left = await world.api.get(resources.GPU_NODES.path(None, node))
    assert left["spec"] == written["spec"]
    assert len(await running(world, **{names.LABEL_LEASE: "kept"})) == 1
    await _edit_slots(
        world, node, lambda slots: [slot | {"since": since.get(slot["device"], slot["since"])} for slot in slots]
    )
    await gone(world, "kept")
    [record] = await world.records("kept")
    assert record["spec"]["reason"] == "Deleted"


async def _has_only(world: World, uid: str, own: Object) -> bool:
    return [slot["device"] for _, slot in await slots_of(world, uid)] == [own["device"]] * 2


def _state(body: Object) -> str:
    """Reason of Ready: the state in one word."""
    found = condition_of(body, "Ready")
    return str(found["reason"]) if found else ""


@story
async def test_a_running_leases_price_is_not_changed_by_a_later_book(world: World) -> None:
    await world.create(lease("before", gpus=WHOLE))
    before = await world.ready("before")
    await world.create(price_book("dear", {"full": "999.00"}, effectiveFrom="2026-02-01T00:00:00Z"))
    await world.create(lease("after", gpus=WHOLE))
    after = await world.ready("after")
    await world.delete(resources.PRICE_BOOKS, "dear")
    assert before["status"]["price"]["perHour"] == "145.00"
    assert after["status"]["price"]["perHour"] == "999.00"
    await _patch(world, "before", suspend=True)
    await lease_where(world, "before", "suspended", lambda one: one["status"].get("billableTo"))
    await _patch(world, "before", suspend=False)
    await world.ready("before")
    prices = [
        record["spec"]["price"]["perHour"] for name in ("before", "after") for record in await world.records(name)
    ]
    assert prices[-3:] == ["145.00", "145.00", "999.00"]


@story
async def test_a_job_that_is_refused_late_stalls_its_own_lease_and_no_other(world: World) -> None:
    """The template was accepted while the lease was suspended; the quota came after that."""
    await world.create(lease("late", gpus=WHOLE, template=template(), suspend=True))
    await world.condition("late", "Ready", "False", "Suspended")
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    await world.api.create("/api/v1/namespaces/team-a/resourcequotas", quota)
    await eventually("the quota to be counted", lambda: _counted(world))
    await _patch(world, "late", suspend=False)
    stalled = await lease_where(world, "late", "stalled", lambda one: "exceeded quota: none" in told(one, "Stalled"))
    assert (condition_of(stalled, "Ready") or {})["status"] == "False"
    await eventually("its devices to be given back", lambda: _holds_nothing(world, stalled["metadata"]["uid"]))
    await world.create(lease("other", gpus=WHOLE))
    await world.ready("other")
    assert not await world.records("late")
    await world.api.delete("/api/v1/namespaces/team-a/resourcequotas/none")
    await world.ready("late")


async def _holds_nothing(world: World, uid: str) -> bool:
    return not await slots_of(world, uid)


async def _counted(world: World) -> bool:
    quota = await world.api.get("/api/v1/namespaces/team-a/resourcequotas/none")
    return "used" in quota.get("status", {})


@story
async def test_labels_that_others_borrow_stop_neither_the_cycle_nor_a_lease(world: World) -> None:
    created = await world.create(lease("labelled", gpus=WHOLE, template=template()))
    await world.ready("labelled")
    uid = created["metadata"]["uid"]
    pod = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "registry.invalid/x"}]}}
    done = {"metadata": {"annotations": {"gpu-tenancy.dev/run-seconds": "0.1"}}, **pod}
    for namespace, name, attempt in (("team-a", "odd", "first"), ("mining", "train-1", "1")):
        labels = {names.LABEL_HOLDER: uid, names.LABEL_ATTEMPT: attempt}
        job = {"metadata": {"name": name, "labels": labels}, "spec": {"template": done}}
        await world.api.create(resources.JOBS.path(namespace), job)
        await _completed(world, resources.JOBS.path(namespace, name))
    await world.create(lease("next", gpus=WHOLE))
    await world.ready("next")
    [record] = await world.records("labelled")
    assert "billableTo" not in record["spec"]
    await world.kubectl("delete", "job", "train-1", "-n", "mining")


async def _completed(world: World, path: str) -> None:
    async def look() -> bool:
        job = await world.api.get(path)
        return any(one["type"] == "Complete" for one in job.get("status", {}).get("conditions", ()))

    await eventually(f"the end of {path}", look)


@story
async def test_a_claim_made_by_hand_without_labels_does_not_keep_its_device_beyond_the_lease(world: World) -> None:
    await world.create(lease("crafty", gpus=WHOLE, term={"duration": "4s", "notice": "1s"}))
    ready = await world.ready("crafty")
    made = await world.get(resources.RESOURCE_CLAIM_TEMPLATES, "crafty", "team-a")
    assert made is not None
    claim = {"metadata": {"name": "own"}, "spec": made["spec"]["spec"]}
    await world.api.create(resources.RESOURCE_CLAIMS.path("team-a"), claim)
    container = {"name": "main", "image": "registry.invalid/x", "resources": {"claims": [{"name": "gpu"}]}}
    spec = {"containers": [container], "resourceClaims": [{"name": "gpu", "resourceClaimName": "own"}]}
    await world.api.create(
        resources.PODS.path("team-a"), {"metadata": {"name": "own", "labels": {"app": "own"}}, "spec": spec}
    )
    await eventually("its pod", lambda: running(world, app="own"))
    await world.settled("crafty")
    assert not await running(world, app="own")
    await nothing_left(world, ready["metadata"]["uid"])
    await world.api.delete(resources.RESOURCE_CLAIMS.path("team-a", "own"))


# --- agents and nodes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile() -> Iterator[Living]:
    yield from settled_world(reported, SMALL, heartbeat_seconds=0.5, heartbeat_lease_seconds=2)


@pytest.fixture
def servers(fragile: Living) -> Iterator[Living]:
    yield fragile
    fragile.run(_whole_again(fragile.world))


async def _whole_again(world: World) -> None:
    for server in SMALL:
        if not world.control_plane.alive(agent_name(server.name)):
            await world.start_agent(server)
    await world.kubectl("delete", "gpul", "--all", "-n", "team-a")
    await eventually("every device to be given back", lambda: _no_slots(world))


def among_servers(test: Callable[..., object]) -> Callable[..., None]:
    """Like `story`, in the world of three small servers."""

    def play(servers: Living) -> None:
        servers.run(test(servers.world))  # type: ignore[arg-type]

    play.__name__, play.__doc__ = test.__name__, test.__doc__
    return play


async def _silent(world: World, node: str, *, silent: bool = True) -> None:
    """Wait until a node is marked as silent, or is not any more."""

    async def look() -> bool:
        body = await world.get(resources.GPU_NODES, node)
        return body is not None and (condition_of(body, "AgentSilent") is not None) is silent

    await eventually(f"node {node} {'' if silent else 'not '}to be marked as silent", look)


def _server(name: str) -> GpuServer:
    return next(server for server in SMALL if server.name == name)


@among_servers
async def test_a_node_whose_agent_is_silent_is_not_planned_on_and_the_lease_that_needs_it_says_so(world: World) -> None:
    await world.kill_agent("n1")
    await _silent(world, "n1")
    await world.create(lease("trio", gpus={**WHOLE, "count": 2}, pods=3))
    waiting = await world.condition("trio", "Ready", "False", "Queued")
    assert "the agent on node n1 is silent: its heartbeat ran out at" in told(waiting, "Ready")
    await world.create(lease("small", gpus={**WHOLE, "count": 2}))
    small = await world.ready("small")
    assert "n1" not in small["status"]["nodes"]
    await world.delete(resources.GPU_LEASES, "small", "team-a")
    await world.start_agent(_server("n1"))
    ready = await world.ready("trio")
    assert ready["status"]["nodes"] == ["n1", "n2", "n3"]
    await _silent(world, "n1", silent=False)


@among_servers
async def test_a_lease_runs_on_while_its_agent_is_silent_and_its_message_says_so(world: World) -> None:
    await world.create(lease("steady", gpus={**WHOLE, "count": 2}, template=template()))
    ready = await world.ready("steady")
    [node] = ready["status"]["nodes"]
    await eventually("its pod", lambda: running(world, **{names.LABEL_LEASE: "steady"}))
    await world.kill_agent(node)
    running_on = await lease_where(
        world, "steady", "told", lambda one: f"the agent on node {node}" in told(one, "Ready")
    )
    assert (condition_of(running_on, "Ready") or {})["status"] == "True"
    assert await running(world, **{names.LABEL_LEASE: "steady"})
    await world.start_agent(_server(node))
    after = await lease_where(world, "steady", "not told any more", lambda one: "But" not in told(one, "Ready"))
    assert after["status"]["billableFrom"] == ready["status"]["billableFrom"]
    [record] = await world.records("steady")
    assert "billableTo" not in record["spec"]


@among_servers
async def test_a_lease_ends_to_the_second_though_its_agent_is_silent_and_its_gpus_wait_for_the_agent(
    world: World,
) -> None:
    created = await world.create(lease("brief", gpus={**WHOLE, "count": 2}, term={"duration": "3s", "notice": "1s"}))
    ready = await world.ready("brief")
    uid, [node] = created["metadata"]["uid"], ready["status"]["nodes"]
    await world.kill_agent(node)
    await world.settled("brief")
    [record] = await world.records("brief")
    assert _seconds(record) == 3
    assert await slots_of(world, uid, "status")  # nobody has proved them empty
    await world.start_agent(_server(node))
    await eventually("the devices to be given back", lambda: _no_slots(world))


@among_servers
async def test_a_node_deleted_under_a_lease_ends_the_segment_and_the_whole_lease_moves(world: World) -> None:
    await world.create(lease("gang", gpus={**WHOLE, "count": 2}, pods=2, template=template()))
    first = await world.ready("gang")
    uid, lost = first["metadata"]["uid"], first["status"]["nodes"][0]
    await asyncio.sleep(1.2)
    await world.api.delete(f"/api/v1/nodes/{lost}")
    again = await lease_where(
        world, "gang", "ready elsewhere", lambda one: one["status"]["attempt"] == 2 and _state(one) == "Ready"
    )
    assert lost not in again["status"]["nodes"]
    assert len(again["status"]["nodes"]) == 2
    one, two = await world.records("gang")
    assert one["spec"]["reason"] == "NodeLost"
    assert _time(two["spec"]["billableFrom"]) >= _time(one["spec"]["billableTo"])
    assert "billableTo" not in two["spec"]
    pods = await eventually("both pods of the second attempt", lambda: _attempt(world, "gang", "2", 2))
    assert {pod["spec"]["nodeName"] for pod in pods} == set(again["status"]["nodes"])
    await world.kill_agent(lost)
    await _bring_back(world, lost)
    assert len(await slots_of(world, uid, "spec")) == 4
    await world.kubectl("delete", "gpul", "gang", "-n", "team-a")
    assert len(await world.records("gang")) == 2
    # The agent that came back may tell only now what it found of the first attempt, and takes it away.
    await eventually("the returned node to be empty", lambda: _holds_nothing(world, uid))
    await nothing_left(world, uid)


async def _attempt(world: World, name: str, attempt: str, count: int) -> list[Object]:
    pods = await running(world, **{names.LABEL_LEASE: name, names.LABEL_ATTEMPT: attempt})
    return pods if len(pods) == count else []


async def _bring_back(world: World, node: str) -> None:
    """Register a node again, as its kubelet would: same name, new UID."""
    await world.control_plane.fake_nodes([node], cpu="128", memory="2Ti", pods=110)
    await world.start_agent(_server(node))
    await _silent(world, node, silent=False)


# --- the end ------------------------------------------------------------------------------------------------------


def test_uninstalling_in_the_documented_order_leaves_nothing_that_hangs(new_world: Callable[..., Living]) -> None:
    """The order of docs/platform-team.md: leases, pools, records, the operator, the agents, the kinds."""
    living = new_world([GpuServer("n1", gpus=2)])
    living.run(_uninstall(living.world))


async def _uninstall(world: World) -> None:
    await world.create(pool(**MINERS))
    await world.mining(2)
    await world.create(lease("gang", gpus=WHOLE, template=template()))
    await world.create(lease("over", gpus=WHOLE, term={"duration": "1s", "notice": "0s"}))
    await world.ready("gang")
    await world.settled("over")
    for kind in ("gpuleases", "miningpools", "usagerecords"):
        await world.kubectl("delete", kind, "--all", "--all-namespaces", "--timeout=60s")
    archived = await world.items(resources.USAGE_RECORDS)
    assert {one["metadata"]["namespace"] for one in archived} == {ARCHIVE}
    assert {one["spec"]["leaseName"] for one in archived} == {"gang", "over"}
    await eventually("every device to be given back", lambda: _no_slots(world))
    await world.kill_operator()
    await world.kill_agent("n1")
    await world.kubectl("delete", "gpunodes", "--all", "--timeout=60s")
    await world.kubectl("delete", "-f", str(CRDS), "--timeout=60s")
    await world.kubectl("delete", "namespace", ARCHIVE, "team-a", "mining", "--timeout=60s")
    left = await world.api.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")
    assert not [one for one in left["items"] if one["spec"]["group"] == names.GROUP]
