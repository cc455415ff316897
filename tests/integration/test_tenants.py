"""Tenants on a real control plane: quotas, turns, conflicts, and what kubectl says of them.

One world of one small server for the module. Every test leaves it as it found it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.cluster.world import GpuServer, World, condition_of, lease
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import lease_where, reported, told

WHOLE: Final = {"profile": "full"}


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from settled_world(_settle, (GpuServer("n1", gpus=4),))


@pytest.fixture
def world(living_world: Living) -> Iterator[Living]:
    yield living_world
    living_world.run(_clear(living_world.world))


async def _settle(world: World) -> None:
    await world.kubectl("create", "namespace", "team-b")
    await reported(world)


async def _clear(world: World) -> None:
    await world.kubectl("delete", "gpuleases", "--all", "--all-namespaces")
    await world.kubectl("delete", "gputenants", "--all")


def tenant(name: str, *namespaces: str, **spec: object) -> Object:
    """Manifest of a GpuTenant."""
    body = {"namespaces": list(namespaces), **spec}
    return {"apiVersion": names.API_VERSION, "kind": "GpuTenant", "metadata": {"name": name}, "spec": body}


async def _tenant_that(world: World, name: str, reason: str) -> Object:
    """Wait until a tenant's Ready has a reason."""

    async def look() -> Object | None:
        body = await world.get(resources.GPU_TENANTS, name)
        found = condition_of(body, "Ready") if body else None
        return body if found and found["reason"] == reason else None

    return await eventually(f"reason {reason} of GpuTenant {name}", look)


@story
async def test_a_lease_beyond_the_quota_waits_and_is_placed_once_another_lease_of_the_tenant_has_ended(
    world: World,
) -> None:
    await world.create(tenant("acme", "team-a", "team-b", quota={"gpus": 2}))
    await _tenant_that(world, "acme", "Serving")
    await world.create(lease("first", "team-b", gpus={**WHOLE, "count": 2}))
    await world.ready("first", "team-b")
    await world.create(lease("second", gpus=WHOLE))
    waits = await lease_where(world, "second", "over quota", lambda one: told(one, "Ready").startswith("Position 1"))
    ready = condition_of(waits, "Ready")
    assert ready is not None
    assert (ready["reason"], waits["status"]["position"]) == ("OverQuota", 1)
    assert ready["message"] == "Position 1 in the queue: tenant acme holds 2 of 2 GPUs; this lease needs 1."
    await world.delete(resources.GPU_LEASES, "first", "team-b")
    await world.ready("second")


@story
async def test_what_the_tenant_can_never_have_is_refused_and_told_by_an_event(world: World) -> None:
    await world.create(tenant("acme", "team-a", quota={"gpus": 2}, maxTerm="1h"))
    await _tenant_that(world, "acme", "Serving")
    await world.create(lease("large", gpus={**WHOLE, "count": 3}, term={"duration": "1h"}))
    await world.create(lease("long", gpus=WHOLE))
    large = await world.condition("large", "Stalled", "True", "QuotaTooSmall")
    assert told(large, "Stalled").startswith("Tenant acme may hold 2 GPUs at a time; this lease needs 3.")
    long = await world.condition("long", "Stalled", "True", "TermTooLong")
    assert "position" not in long["status"]
    assert "TermTooLong" in await _described(world, "gpul", "long", "TermTooLong")
    await world.kubectl(
        "patch", "gpul", "long", "-n", "team-a", "--type=merge", '-p={"spec":{"term":{"duration":"1h"}}}'
    )
    await world.ready("long")


@story
async def test_a_namespace_that_two_tenants_name_belongs_to_the_older_and_the_other_says_so(world: World) -> None:
    await world.create(tenant("zenith", "team-a", quota={"gpus": 1}))
    zenith = await _tenant_that(world, "zenith", "Serving")
    # Ages are whole seconds: without the pause the first by name would have it.
    await _later(world, zenith["metadata"]["creationTimestamp"])
    await world.create(tenant("acme", "team-a", "team-b"))
    conflict = await _tenant_that(world, "acme", "Conflict")
    assert told(conflict, "Ready").startswith("Namespaces that belong to others: team-a to tenant zenith. ")
    assert "Conflict" in await _described(world, "gputen", "acme", "Warning")
    await world.create(lease("theirs", gpus={**WHOLE, "count": 2}))
    await world.condition("theirs", "Stalled", "True", "QuotaTooSmall")
    await world.create(lease("ours", "team-b", gpus={**WHOLE, "count": 2}))
    await world.ready("ours", "team-b")
    await world.delete(resources.GPU_TENANTS, "zenith")
    await _tenant_that(world, "acme", "Serving")
    await world.ready("theirs")


async def _later(world: World, instant: str, seconds: int = 1) -> None:
    """Wait until so much time has passed since an instant, on the clock of the API server."""

    async def look() -> bool:
        made = await world.api.create(f"{resources.GPU_TENANTS.path()}?dryRun=All", tenant("probe", "probe"))
        passed = datetime.fromisoformat(made["metadata"]["creationTimestamp"]) - datetime.fromisoformat(instant)
        return passed >= timedelta(seconds=seconds)

    await eventually(f"{seconds} s to pass", look)


async def _described(world: World, kind: str, name: str, word: str) -> str:
    """What `kubectl describe` prints of an object once its Events have a word."""

    async def look() -> str | None:
        scope = () if kind == "gputen" else ("-n", "team-a")
        events = (await world.kubectl("describe", kind, name, *scope)).partition("Events:")[2]
        return events if word in events else None

    return await eventually(f"{word} among the Events of {name}", look)


@story
async def test_kubectl_shows_what_a_tenant_holds_and_has_used_and_explains_its_fields(world: World) -> None:
    await world.create(tenant("acme", "team-a", weight=3, quota={"gpus": 2}))
    await world.create(lease("train", gpus={**WHOLE, "count": 2}))
    await world.ready("train")

    async def look() -> Object | None:
        body = await world.get(resources.GPU_TENANTS, "acme")
        holds = ((body or {}).get("status") or {}).get("holds")
        return body if holds == {"gpus": 2, "memorySlices": 16, "computeSlices": 14} else None

    await eventually("what acme holds", look)
    header, row = (re.split(r"\s{2,}", line) for line in (await world.kubectl("get", "gputen", "acme")).splitlines())
    assert header == ["NAME", "STATE", "WEIGHT", "GPUS", "QUOTA", "SLICES", "USED", "AGE"]
    assert row[:6] == ["acme", "Serving", "3", "2", "2", "16"]
    assert re.fullmatch(r"\d+\.\d\d", row[6])
    explained = await world.kubectl("explain", "gputenant.spec.quota")
    assert "a whole GPU counts as 8" in " ".join(explained.split())


@story
async def test_a_restarted_operator_knows_who_had_much(world: World) -> None:
    await world.kubectl("create", "namespace", "team-c")
    await world.create(lease("before", gpus={**WHOLE, "count": 4}))
    before = await world.ready("before")
    await world.create(lease("again", gpus={**WHOLE, "count": 4}))
    await lease_where(world, "again", "queued", lambda one: one["status"].get("position") == 1)
    await world.create(lease("other", "team-c", gpus={**WHOLE, "count": 4}))
    await world.kill_operator()
    await world.start_operator()
    await world.operator_ready()
    # Seconds are billed as whole ones: of a lease that ran for less than one nothing is on record.
    await _later(world, before["status"]["billableFrom"], 3)
    await world.delete(resources.GPU_LEASES, "before", "team-a")
    await world.ready("other", "team-c")
    again = await world.get(resources.GPU_LEASES, "again", "team-a")
    assert again is not None
    assert told(again, "Ready").startswith("Position ")
