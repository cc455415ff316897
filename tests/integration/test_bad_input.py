"""What tenants and finance get wrong, on a real control plane: refused in a sentence, by whoever knows it first.

One world of two small servers for the module, the second of them tainted, without pool and without PriceBook. Every
test leaves it as it found it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from tests.cluster.api import ApiError, Object
from tests.cluster.eventually import eventually
from tests.cluster.world import GpuServer, World, condition_of, lease, price_book, template
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import lease_where, reported, slots_of, told

SERVERS = (GpuServer("n1", gpus=2), GpuServer("n2", gpus=2))
TAINT = {"key": "example.com/reserved", "value": "physics", "effect": "NoSchedule"}
WHOLE = {"profile": "full"}
ON_N2: Final[dict[str, Any]] = {"nodeSelector": {"kubernetes.io/hostname": "n2"}}


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from settled_world(_settle, SERVERS)


@pytest.fixture
def world(living_world: Living) -> Iterator[Living]:
    yield living_world
    living_world.run(_clear(living_world.world))


async def _settle(world: World) -> None:
    """Until both agents have reported their GPUs, and one node is tainted."""
    await world.api.patch("/api/v1/nodes/n2", {"spec": {"taints": [TAINT]}})
    await reported(world)


async def _clear(world: World) -> None:
    for kind in ("resourcequotas", "gpuleases", "pricebooks"):
        await world.kubectl("delete", kind, "--all", "-n", "team-a")


async def _refused(world: World, reason: str, **spec: Any) -> Object:  # noqa: ANN401  (handed on)
    """A lease that is refused for good; returns it."""
    await world.create(lease("hopeless", **spec))
    refused = await world.condition("hopeless", "Stalled", "True", reason)
    assert "position" not in refused["status"]
    for kind in ("Ready", "Admitted"):
        found = condition_of(refused, kind)
        assert found is not None
        assert (found["status"], found["reason"]) == ("False", reason)
    assert not await slots_of(world, refused["metadata"]["uid"])
    return refused


# --- what the operator knows -------------------------------------------------------------------------------------


@story
async def test_more_gpus_per_pod_than_any_node_has_are_impossible_and_not_queued(world: World) -> None:
    refused = await _refused(world, "Impossible", gpus={**WHOLE, "count": 3}, pods=2)
    assert told(refused, "Ready").startswith(
        "Needs 3 whole GPUs (A100-SXM4-80GB) on one node; the largest node has 2. Change the lease or add nodes."
    )


@story
async def test_a_slice_is_impossible_where_no_gpu_is_in_mig_mode(world: World) -> None:
    refused = await _refused(world, "Impossible", gpus={"profile": "1g.10gb"})
    assert "the 0 GPUs in MIG mode that have it hold 0 at most" in told(refused, "Ready")


@story
async def test_a_model_that_nobody_has_is_refused_with_those_that_there_are(world: World) -> None:
    refused = await _refused(world, "Impossible", gpus={**WHOLE, "model": "H100-SXM5-80GB"})
    assert 'No node has a GPU of gpus.model "H100-SXM5-80GB"; there are A100-SXM4-80GB.' in told(refused, "Ready")


@story
async def test_a_taint_that_is_not_tolerated_keeps_a_lease_away_and_is_named(world: World) -> None:
    refused = await _refused(world, "Impossible", gpus=WHOLE, template=template(**ON_N2))
    said = told(refused, "Ready")
    assert "n1: node selector kubernetes.io/hostname=n2 does not match" in said
    assert "n2: taint example.com/reserved=physics:NoSchedule is not tolerated" in said


@story
async def test_a_taint_that_is_tolerated_keeps_nobody_away(world: World) -> None:
    tolerations = [{"key": TAINT["key"], "operator": "Equal", "value": TAINT["value"], "effect": "NoSchedule"}]
    pod = template(**ON_N2, tolerations=tolerations)
    await world.create(lease("physics", gpus=WHOLE, template=pod))
    ready = await world.ready("physics")
    assert ready["status"]["nodes"] == ["n2"]


@story
async def test_a_gang_finds_no_second_place_on_a_tainted_node(world: World) -> None:
    refused = await _refused(world, "Impossible", gpus={**WHOLE, "count": 2}, pods=2, template=template())
    assert "all nodes together have room for 1" in told(refused, "Ready")


# --- what the API server knows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("nodeName", "n1", "the operator places the pods"),
        ("schedulerName", "mine", "the pods need kube-scheduler"),
        ("priorityClassName", "high", "the order of leases and miners is the operator's"),
        ("resourceClaims", [{"name": "gpu"}], "the operator adds the claim of the lease's devices"),
    ],
)
@story
async def test_what_a_lease_decides_itself_may_not_be_in_its_template(
    world: World, field: str, value: object, why: str
) -> None:
    pod = template()
    pod["spec"][field] = value
    with pytest.raises(ApiError, match=f"spec.template.spec.{field} may not be set: {why}"):
        await world.create(lease("odd", gpus=WHOLE, template=pod))


@story
async def test_a_profile_that_does_not_exist_is_refused_with_those_that_do(world: World) -> None:
    with pytest.raises(ApiError, match=r'Unsupported value: "5g\.50gb": supported values: "full", "1g\.5gb"'):
        await world.create(lease("odd", gpus={"profile": "5g.50gb"}))


@story
async def test_a_job_that_a_quota_forbids_waits_in_the_words_of_the_api_server_and_runs_once_it_is_allowed(
    world: World,
) -> None:
    quota = {"metadata": {"name": "few"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    await world.api.create("/api/v1/namespaces/team-a/resourcequotas", quota)
    await eventually("the quota to be counted", lambda: _counted(world))
    refused = await _refused(world, "InvalidTemplate", gpus=WHOLE, template=template())
    assert "exceeded quota: few, requested: count/jobs.batch=1" in told(refused, "Stalled")
    await world.create(lease("other", gpus=WHOLE))
    await world.ready("other")
    await world.api.delete("/api/v1/namespaces/team-a/resourcequotas/few")
    await world.ready("hopeless")


async def _counted(world: World) -> bool:
    quota = await world.api.get("/api/v1/namespaces/team-a/resourcequotas/few")
    return "used" in quota.get("status", {})


# --- prices -------------------------------------------------------------------------------------------------------


@story
async def test_without_any_price_book_a_lease_runs_unpriced_and_says_so(world: World) -> None:
    await world.create(lease("free", gpus=WHOLE, term={"duration": "2s", "notice": "1s"}))
    ready = await world.ready("free")
    admitted = condition_of(ready, "Admitted")
    assert admitted is not None
    assert (admitted["status"], admitted["reason"]) == ("True", "Unpriced")
    assert admitted["message"].startswith("Warning: there is no PriceBook, so the lease runs unpriced")
    settled = await world.settled("free")
    assert not {"price", "cost"} & settled["status"].keys()
    [record] = await world.records("free")
    assert record["spec"]["seconds"] == 2
    assert "price" not in record["spec"]
    events = await world.api.items("/api/v1/namespaces/team-a/events", fieldSelector="involvedObject.name=free")
    assert ("Warning", "Unpriced") in {(event["type"], event["reason"]) for event in events}


@story
async def test_a_twin_of_the_book_in_effect_conflicts_and_the_older_price_stays(world: World) -> None:
    await world.create(price_book("list", {"full": "100.00"}))
    await _book(world, "list", "InEffect", "True")
    await asyncio.sleep(1.1)  # creation timestamps are whole seconds
    await world.create(price_book("twin", {"full": "300.00"}))
    for name, other in (("list", "twin"), ("twin", "list")):
        book = await _book(world, name, "Conflict", "True")
        stays = "PriceBook list stays in effect. Delete all but one."
        assert told(book, "Conflict") == f"PriceBook {other} has the same effectiveFrom; {stays}"
        assert (condition_of(book, "InEffect") or {})["status"] == ("True" if name == "list" else "False")
        assert ("Warning", "SameInstant") in await _told_of(world, name)
    await world.create(lease("before", gpus=WHOLE))
    before = await world.ready("before")
    assert before["status"]["price"] == {"perHour": "100.00", "currency": "RUB", "book": "list"}
    await world.delete(resources.PRICE_BOOKS, "list")
    await _book(world, "twin", "InEffect", "True")
    await _book(world, "twin", "Conflict", "False")
    await world.create(lease("after", gpus=WHOLE))
    after = await world.ready("after")
    assert after["status"]["price"]["book"] == "twin"
    [record] = await world.records("before")
    assert record["spec"]["price"]["perHour"] == "100.00"


async def _told_of(world: World, name: str) -> set[tuple[str, str]]:
    """Type and reason of the Events about a cluster-scoped object, once there are any."""

    async def look() -> list[Object]:
        return await world.api.items("/api/v1/namespaces/default/events", fieldSelector=f"involvedObject.name={name}")

    async def warned() -> bool:
        return any(event["type"] == "Warning" for event in await look())

    await eventually(f"an Event that warns of {name}", warned)
    return {(event["type"], event["reason"]) for event in await look()}


@story
async def test_where_no_book_has_begun_nothing_is_leased_until_one_does(world: World) -> None:
    await world.create(price_book("later", effectiveFrom="2200-01-01T00:00:00Z"))
    refused = await _refused(world, "NoRate", gpus=WHOLE)
    assert "None of the PriceBooks is in effect" in told(refused, "Ready")
    await world.create(price_book("now"))
    ready = await world.ready("hopeless")
    assert ready["status"]["price"]["book"] == "now"


@story
async def test_a_book_without_a_rate_is_named_in_the_refusal(world: World) -> None:
    await world.create(price_book("slices", {"3g.40gb": "70.00"}))
    refused = await _refused(world, "NoRate", gpus=WHOLE)
    assert "PriceBook slices has no rate for profile full of model A100-SXM4-80GB" in told(refused, "Ready")


async def _book(world: World, name: str, kind: str, status: str) -> Object:
    async def look() -> Object | None:
        book = await world.get(resources.PRICE_BOOKS, name)
        found = condition_of(book, kind) if book else None
        return book if found and found["status"] == status else None

    return await eventually(f"{kind}={status} of PriceBook {name}", look)


# --- names --------------------------------------------------------------------------------------------------------


@story
async def test_a_claim_template_that_has_the_leases_name_already_holds_nothing_up_but_that_lease(world: World) -> None:
    path = resources.RESOURCE_CLAIM_TEMPLATES.path("team-a")
    foreign = {"metadata": {"name": "taken"}, "spec": {"spec": {"devices": {}}}}
    made = await world.api.create(path, foreign)
    created = await world.create(lease("taken", gpus={**WHOLE, "count": 2}))
    stalled = await world.condition("taken", "Stalled", "True", "NameTaken")
    assert told(stalled, "Stalled").startswith(
        "A ResourceClaimTemplate named team-a/taken exists and was not made for this lease; "
        "delete it or give the lease another name."
    )
    assert not await slots_of(world, created["metadata"]["uid"])
    assert not await world.records("taken")
    await world.create(lease("other", gpus={**WHOLE, "count": 2}))
    await world.ready("other")
    await world.delete(resources.GPU_LEASES, "other", "team-a")
    untouched = await world.api.get(f"{path}/taken")
    assert untouched["metadata"]["uid"] == made["metadata"]["uid"]
    await world.api.delete(f"{path}/taken")
    await world.ready("taken")
    mine = await world.api.get(f"{path}/taken")
    assert mine["metadata"]["labels"][names.LABEL_HOLDER] == created["metadata"]["uid"]


@story
async def test_a_job_that_has_the_name_of_an_attempt_already_is_not_touched(world: World) -> None:
    path = resources.JOBS.path("team-a")
    foreign = {"metadata": {"name": "clash-1"}, "spec": {"suspend": True, "template": _bare_pod()}}
    made = await world.api.create(path, foreign)
    await world.create(lease("clash", gpus=WHOLE, template=template()))
    stalled = await lease_where(world, "clash", "stalled", lambda one: "NameTaken" in str(condition_of(one, "Stalled")))
    assert "A Job named team-a/clash-1 exists and was not made for this lease" in told(stalled, "Stalled")
    assert not await world.records("clash")
    untouched = await world.api.get(f"{path}/clash-1")
    assert untouched["metadata"]["uid"] == made["metadata"]["uid"]
    await world.api.delete(f"{path}/clash-1")
    await world.ready("clash")


def _bare_pod() -> Object:
    return {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "registry.invalid/x"}]}}
