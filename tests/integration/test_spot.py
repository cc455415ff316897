"""Spot leases on a real control plane: notice on the lease and on its pods, the hand-over, and both bills.

One world of one small server for the module. Every test leaves it as it found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from tests.cluster.api import MERGE, Object
from tests.cluster.eventually import eventually
from tests.cluster.world import MODEL, GpuServer, World, condition_of, lease, price_book, template
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import DEPLOYMENTS, deployment, gone, lease_where, reported, running, told

WHOLE: Final = {"profile": "full"}
RATES: Final = [
    {"model": MODEL, "profile": "full", "perHour": "145.00"},
    {"model": MODEL, "profile": "full", "tier": "Spot", "perHour": "60.00"},
]


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from settled_world(_settle, (GpuServer("n1", gpus=2),))


@pytest.fixture
def world(living_world: Living) -> Iterator[Living]:
    yield living_world
    living_world.run(_clear(living_world.world))


async def _settle(world: World) -> None:
    await world.kubectl("create", "namespace", "team-b")
    book = price_book()
    book["spec"]["rates"] = RATES
    await world.create(book)
    await reported(world)


async def _clear(world: World) -> None:
    await world.kubectl("delete", "deployments", "--all", "-n", "team-a")
    await world.kubectl("delete", "gpuleases", "--all", "--all-namespaces")


async def _spot(world: World, notice: str) -> Object:
    """A spot lease on all GPUs, and the Deployment that runs on it."""
    term = {"preemptionNotice": notice}
    await world.create(lease("spot", tier="Spot", gpus={**WHOLE, "count": 2}, term=term))
    await world.api.create(DEPLOYMENTS, deployment("spot"))
    ready = await world.ready("spot")
    await eventually("the tenant's pod to run", lambda: running(world, app="spot"))
    return ready


async def _given_notice(world: World) -> Object:
    """The spot lease, once it and its pod know when it has to go."""
    found = await world.condition("spot", "Preempted", "False", "PreemptionNotice")

    async def warned() -> bool:
        pods = await running(world, app="spot")
        at = found["status"]["preemption"]["at"]
        return [pod["metadata"].get("annotations", {}).get(names.ANNOTATION_PREEMPTED) for pod in pods] == [at]

    await eventually("the annotation on the pod", warned)
    return found


async def _segments(world: World, body: Object) -> list[Object]:
    """What is on record of a lease, which is known by its UID: others had its name before."""
    found = await world.records(body["metadata"]["name"], body["metadata"]["namespace"])
    return [one["spec"] for one in found if one["spec"]["contract"] == body["metadata"]["uid"]]


async def _events(world: World, name: str, reason: str) -> list[str]:
    """Messages of the Events of a lease with a reason, once there is one."""

    async def look() -> list[str]:
        found = await world.items(resources.EVENTS, fieldSelector=f"involvedObject.name={name}")
        return [one["message"] for one in found if one["reason"] == reason]

    return await eventually(f"an Event {reason} of {name}", look)


@story
async def test_spot_on_the_last_gpus_gives_way_with_notice_and_runs_on_later_and_both_bills_are_right(
    world: World,
) -> None:
    await _spot(world, "4s")
    await world.create(lease("firm", "team-b", gpus=WHOLE, template=template(2.0)))
    warned = await _given_notice(world)
    at = warned["status"]["preemption"]["at"]
    firm = await world.condition("firm", "Ready", "False", "Preempting", namespace="team-b")
    assert (
        told(firm, "Ready")
        == f"Position 1 in the queue: Waits for 1 spot lease to end by {at}; its room is held for it."
    )
    assert firm["status"]["expectedStart"] == at
    assert warned["status"]["preemption"]["cause"] == firm["metadata"]["uid"]
    assert at in (await _events(world, "spot", "PreemptionNotice"))[0]
    ready = condition_of(warned, "Ready")
    assert ready is not None
    assert ready["status"] == "True"
    await world.settled("firm", "team-b")
    [first] = [one for one in await _segments(world, warned) if "billableTo" in one]
    assert (first["billableTo"], first["reason"], first["tier"]) == (at, "Preempted", "Spot")
    assert first["price"]["perHour"] == "60.00"
    [bill] = await _segments(world, firm)
    assert (bill["reason"], bill["price"]["perHour"]) == ("Completed", "145.00")
    assert datetime.fromisoformat(bill["billableFrom"]) >= datetime.fromisoformat(at)
    again = await world.ready("spot")
    assert again["status"]["segment"] == 2
    assert "preemption" not in again["status"]
    assert again["status"]["preemptedFor"] == [firm["metadata"]["uid"]]
    assert again["status"]["price"]["perHour"] == "60.00"
    await eventually("the tenant's pod to run again", lambda: running(world, app="spot"))


@story
async def test_a_notice_is_taken_back_from_lease_and_pod_when_the_firm_lease_goes(world: World) -> None:
    ready = await _spot(world, "1m")
    await world.create(lease("firm", "team-b", gpus=WHOLE))
    await _given_notice(world)
    await world.delete(resources.GPU_LEASES, "firm", "team-b")
    kept = await world.condition("spot", "Preempted", "False", "NoticeWithdrawn")
    assert "preemption" not in kept["status"]
    assert await _events(world, "spot", "NoticeWithdrawn")

    async def unsaid() -> bool:
        pods = await running(world, app="spot")
        marks = [pod["metadata"].get("annotations", {}) for pod in pods]
        return len(marks) == 1 and names.ANNOTATION_PREEMPTED not in marks[0]

    await eventually("the annotation to go", unsaid)
    assert kept["status"]["billableFrom"] == ready["status"]["billableFrom"]
    assert len(await _segments(world, kept)) == 1


@pytest.mark.exhaustive  # who follows a killed leader waits for half a minute
@story
async def test_an_operator_that_is_killed_while_a_notice_runs_keeps_to_it(world: World) -> None:
    await _spot(world, "6s")
    await world.create(lease("firm", "team-b", gpus=WHOLE))
    warned = await _given_notice(world)
    at = warned["status"]["preemption"]["at"]
    await world.kill_operator()
    await world.start_operator()
    await world.operator_ready()
    await world.ready("firm", "team-b")
    [record] = await _segments(world, warned)
    assert (record["billableTo"], record["reason"]) == (at, "Preempted")
    queued = await lease_where(world, "spot", "queued", lambda one: one["status"].get("position") == 1)
    gave_way = condition_of(queued, "Preempted")
    assert gave_way is not None
    assert (gave_way["status"], gave_way["reason"]) == ("True", "Preempted")


@story
async def test_what_a_spot_lease_may_ask_for_is_bounded_and_what_others_may_not_is_refused(world: World) -> None:
    long = lease("long", tier="Spot", gpus=WHOLE, term={"preemptionNotice": "6m"})
    await world.create(long)
    refused = await world.condition("long", "Stalled", "True", "NoticeTooLong")
    assert told(refused, "Stalled").startswith("term.preemptionNotice may be 5m at most; this lease has 6m.")
    await world.api.patch(
        resources.GPU_LEASES.path("team-a", "long"), {"spec": {"term": {"preemptionNotice": "5m"}}}, MERGE
    )
    await world.ready("long")
    await world.delete(resources.GPU_LEASES, "long", "team-a")
    await gone(world, "long")
