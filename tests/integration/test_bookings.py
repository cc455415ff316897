"""What is kept for later on a real control plane: a start, a commitment, and what kubectl says of both.

One world of one small server for the module. Every test leaves it as it found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.api.base import format_time
from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.cluster.world import GpuServer, World, lease
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import lease_where, reported, told

WHOLE: Final = {"profile": "full"}
MODEL: Final = "A100-SXM4-80GB"


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from settled_world(_settle, (GpuServer("n1", gpus=2),))


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


def later(**length: float) -> str:
    """An instant from now on."""
    return format_time(datetime.now(UTC) + timedelta(**length))


@story
async def test_what_is_promised_is_not_leased_beyond_the_start_and_nobody_may_extend_into_it(world: World) -> None:
    start = later(hours=2)
    await world.create(lease("late", gpus={**WHOLE, "count": 2}, term={"start": start, "duration": "1h"}))
    late = await world.condition("late", "Ready", "False", "Reserved")
    assert told(late, "Ready").startswith(f"2 devices on n1 reserved from {start} to ")
    assert len(late["status"]["reservation"]["places"]) == 2
    assert "billableFrom" not in late["status"]
    await world.create(lease("long", gpus=WHOLE, term={"duration": "4h"}))
    await world.create(lease("short", gpus=WHOLE, term={"duration": "1h"}))
    await world.ready("short")
    long = await world.condition("long", "Ready", "False", "Queued")
    assert "1 more GPU is free and kept for others" in told(long, "Ready")
    await world.kubectl(
        "patch", "gpul", "short", "-n", "team-a", "--type", "merge", "-p", '{"spec":{"term":{"duration":"3h"}}}'
    )
    short = await world.condition("short", "Stalled", "True", "ExtensionRefused")
    assert f"promised to others from {start}" in told(short, "Stalled")
    assert short["status"]["acceptedDuration"] == "1h"
    await world.create(lease("other", gpus=WHOLE, term={"start": start, "duration": "10m"}))
    other = await world.condition("other", "Ready", "False", "NotReservable")
    assert "there will be room for 0" in told(other, "Ready")
    await world.delete(resources.GPU_LEASES, "late", "team-a")
    await world.condition("other", "Ready", "False", "Reserved")


@story
async def test_nothing_of_a_lease_runs_or_is_billed_before_its_start(world: World) -> None:
    start = later(seconds=6)
    await world.create(lease("soon", gpus=WHOLE, term={"start": start, "duration": "1h"}))
    prepared = await lease_where(
        world, "soon", "prepared", lambda one: told(one, "Ready").startswith("All 1 devices are ready")
    )
    assert "billableFrom" not in prepared["status"]
    early = await world.get(resources.RESOURCE_CLAIM_TEMPLATES, "soon", "team-a")
    assert early is None or format_time(datetime.now(UTC)) >= start
    await world.ready("soon")
    ready = await world.get(resources.GPU_LEASES, "soon", "team-a")
    assert ready is not None
    assert ready["status"]["billableFrom"] == start
    assert await world.get(resources.RESOURCE_CLAIM_TEMPLATES, "soon", "team-a") is not None


@story
async def test_committed_capacity_is_for_reserved_leases_of_its_tenant_only(world: World) -> None:
    commitment = {"name": "base", "model": MODEL, "count": 1, "from": later(hours=-1)}
    spec = {"namespaces": ["team-a"], "commitments": [commitment]}
    await world.create({
        "apiVersion": names.API_VERSION, "kind": "GpuTenant", "metadata": {"name": "acme"}, "spec": spec
    })  # fmt: skip

    async def kept() -> Object | None:
        body = await world.get(resources.GPU_TENANTS, "acme")
        found = (body or {}).get("status", {}).get("commitments", [])
        return found[0] if found and found[0]["kept"] else None

    said = await eventually("the commitment to be kept", kept)
    assert (said["count"], said["drawn"], said["kept"], said["short"]) == (1, 0, 1, 0)
    for number in range(2):
        await world.create(lease(f"other-{number}", "team-b", gpus=WHOLE))
    await world.ready("other-0", "team-b")
    await world.condition("other-1", "Ready", "False", "Queued", "team-b")
    await world.create(lease("own", gpus=WHOLE, tier="Reserved"))
    await world.ready("own")
    await world.create(lease("more", gpus=WHOLE, tier="Reserved"))
    more = await world.condition("more", "Ready", "False", "CommitmentInUse")
    assert "of which 1 are in use" in told(more, "Ready")
    await world.create(lease("none", "team-b", gpus=WHOLE, tier="Reserved"))
    none = await world.condition("none", "Stalled", "True", "NoCommitment", "team-b")
    assert told(none, "Stalled").startswith("Namespace team-b has no commitment for full; it has none.")
