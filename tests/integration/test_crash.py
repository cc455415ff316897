"""kill -9 of the operator after each write of a lease's life: the end is the same, and no second is lost or doubled.

The numbered steps of a lease's life (design, section 4) consist of these writes; a case is named after how many of them
were let through, and says in its failure which one was the last:

5. admission and promise: `patch gpuleases` (finalizer), `update gpuleases/status` (price, attempt), beside them
   `create resourceclaimtemplates` and a gang's `create services`; `patch gpunodes` (slots); `delete pods` and
   `delete resourceclaims` (miners); `create jobs`;
7. ready: `create usagerecords` (the segment opens), `update gpuleases/status` (Ready);
8. the end: `update gpuleases/status` (notice), `patch usagerecords` (billableTo), `patch gpunodes` (slots back),
   `delete resourceclaimtemplates` (a tenant's own pods'), `delete jobs`, `delete pods` (a tenant's own); where the
   namespace goes, `create usagerecords` and `patch usagerecords` (archived, let go);
9. `update gpuleases/status` (settled), `patch gpuleases` (finalizer off), `create resourceclaims` and `create pods`
   (miners again);
10. `update gpuleases/status`, `update miningpools/status`, `update pricebooks/status`.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.crashing import writes_in
from tests.cluster.eventually import eventually
from tests.cluster.world import OPERATOR, World, lease, template
from tests.integration.conftest import Living, mining_world, story
from tests.integration.looks import DEPLOYMENTS, deployment, gone, nothing_left, running, slots_of

GPUS: Final = {"profile": "full", "count": 2}
TERM_SECONDS: Final = 3
STEPS: Final = {
    "patch gpuleases": "5, 9",
    "update gpuleases/status": "5, 7, 8, 9, 10",
    "patch gpunodes": "5, 8",
    "delete pods": "5, 8",
    "delete resourceclaims": "5",
    "create resourceclaimtemplates": "5",
    "create services": "5",
    "create jobs": "5",
    "create usagerecords": "7, 8",
    "patch usagerecords": "8",
    "delete resourceclaimtemplates": "8",
    "delete jobs": "8",
    "create resourceclaims": "9",
    "create pods": "9",
    "update miningpools/status": "10",
    "update pricebooks/status": "10",
}
"""Numbered steps to which a write can belong."""
FEWEST_WRITES: Final = {
    "expires": 20,
    "deleted": 16,
    "resumes": 20,
    "completes": 26,
    "loses its namespace": 20,
    "loses a device": 36,
}
"""No more than a life always has, however statuses coincide: a crash within these really happens."""
MOST_WRITES: Final = {
    "expires": 30,
    "deleted": 24,
    "resumes": 36,
    "completes": 36,
    "loses its namespace": 36,
    "loses a device": 56,
}
"""No fewer than a life ever has. A test below holds both against lives without a crash."""
PARTS: Final = ("early", "midway", "late")
"""Where in a life a sampled crash is; one each."""

Life = Callable[[World, str], Awaitable[None]]


@pytest.fixture(scope="module")
def world() -> Iterator[Living]:
    yield from mining_world()


async def _expires(world: World, name: str) -> None:
    """A lease with a Job that runs until its term is over."""
    term = {"duration": f"{TERM_SECONDS}s", "notice": "1s"}
    created = await world.create(lease(name, gpus=GPUS, term=term, template=template()))
    ended = await world.settled(name)
    assert ended["status"]["ended"]["reason"] == "Expired"
    record = await _the_one_segment(world, name, "Expired")
    assert record["seconds"] == TERM_SECONDS
    await world.mining(16)
    await nothing_left(world, created["metadata"]["uid"])
    await world.delete(resources.GPU_LEASES, name, "team-a")


async def _is_deleted(world: World, name: str) -> None:
    """A lease that a Deployment uses and that its tenant deletes."""
    created = await world.create(lease(name, gpus={"profile": "full"}))
    await world.api.create(DEPLOYMENTS, deployment(name))
    await world.ready(name)
    await eventually("the Deployment's pod", lambda: running(world, app=name))
    going = await world.api.delete(resources.GPU_LEASES.path("team-a", name))
    deleted_at = _time(going["metadata"]["deletionTimestamp"])
    await gone(world, name)
    record = await _the_one_segment(world, name, "Deleted")
    assert _time(record["billableTo"]) == max(_time(record["billableFrom"]), deleted_at)
    await world.mining(16)
    await nothing_left(world, created["metadata"]["uid"])
    assert not await running(world, app=name)
    await world.api.delete(f"{DEPLOYMENTS}/{name}")


async def _resumes(world: World, name: str) -> None:
    """A lease that is suspended and resumed as soon as its first segment is closed, before its devices are back."""
    term = {"duration": f"{TERM_SECONDS}s", "notice": "1s"}
    created = await world.create(lease(name, gpus={"profile": "full"}, term=term))
    await world.ready(name)
    await asyncio.sleep(1.1)
    await _suspend(world, name, True)
    await eventually("the first segment's end", lambda: _closed(world, name))
    await _suspend(world, name, False)
    await world.settled(name)
    records = [record["spec"] for record in await world.records(name)]
    assert [(one["segment"], one["reason"]) for one in records] == [(1, "Suspended"), (2, "Expired")]
    assert sum(map(_seconds, records)) == TERM_SECONDS
    assert _time(records[1]["billableFrom"]) >= _time(records[0]["billableTo"])
    await world.mining(16)
    await nothing_left(world, created["metadata"]["uid"])
    await world.delete(resources.GPU_LEASES, name, "team-a")


async def _completes(world: World, name: str) -> None:
    """A gang of slices on both nodes whose Job comes to its end."""
    created = await world.create(lease(name, gpus={"profile": "3g.40gb"}, pods=3, template=template(1)))
    ended = await world.settled(name)
    assert ended["status"]["ended"]["reason"] == "Completed"
    await _the_one_segment(world, name, "Completed")
    await world.mining(16)
    await nothing_left(world, created["metadata"]["uid"], job=True)
    await world.delete(resources.GPU_LEASES, name, "team-a")


async def _loses_its_namespace(world: World, name: str) -> None:
    """A lease whose namespace is deleted while it runs: its segment is closed, and archived elsewhere."""
    await world.control_plane.create_namespace(name)
    created = await world.create(lease(name, name, gpus=GPUS, template=template()))
    await world.ready(name, name)
    await world.kubectl("delete", "namespace", name, "--timeout=140s")
    [record] = await world.records(name, name)
    assert record["metadata"]["namespace"] == names.SYSTEM_NAMESPACE
    assert "finalizers" not in record["metadata"]
    assert record["spec"]["reason"] in ("Deleted", "Failed")  # Kubernetes may delete a Job's pods before the lease
    _seconds(record["spec"])
    await world.mining(16)
    await nothing_left(world, created["metadata"]["uid"])


async def _loses_a_device(world: World, name: str) -> None:
    """A lease one of whose promises is torn up: it is placed anew, and billed for what it had."""
    created = await world.create(lease(name, gpus=GPUS, template=template()))
    first = await world.ready(name)
    uid, [node] = created["metadata"]["uid"], first["status"]["nodes"]
    [(_, torn), _] = await slots_of(world, uid, "spec")
    path = resources.GPU_NODES.path(None, node)
    slots = (await world.api.get(path))["spec"]["slots"]
    await world.api.patch(path, {"spec": {"slots": [slot for slot in slots if slot["device"] != torn["device"]]}})
    await eventually("the second segment", lambda: _segments(world, name, 2))
    await world.delete(resources.GPU_LEASES, name, "team-a")
    await gone(world, name)
    one, two = (record["spec"] for record in await world.records(name))
    assert [(spec["segment"], spec["reason"]) for spec in (one, two)] == [(1, "NodeLost"), (2, "Deleted")]
    assert [_seconds(spec) == spec["seconds"] for spec in (one, two)] == [True, True]
    assert _time(two["billableFrom"]) >= _time(one["billableTo"])
    await world.mining(16)
    await nothing_left(world, uid)


LIVES: Final[dict[str, Life]] = {
    "expires": _expires,
    "deleted": _is_deleted,
    "resumes": _resumes,
    "completes": _completes,
    "loses its namespace": _loses_its_namespace,
    "loses a device": _loses_a_device,
}
CASES: Final = [(life, after) for life in LIVES for after in range(1, MOST_WRITES[life] + 1)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("life", "after"), CASES, ids=[f"{life}-{after}" for life, after in CASES])
@story
async def test_an_operator_killed_after_any_write_leaves_the_same_end_behind(
    world: World, life: str, after: int
) -> None:
    if not await _live_through_a_crash(world, life, after):
        pytest.skip(f"the life {life!r} had fewer than {after} writes this time: the operator was not killed")


@pytest.mark.parametrize("part", PARTS)
@story
async def test_an_operator_killed_after_some_write_leaves_the_same_end_behind(
    world: World, part: str, seed: int
) -> None:
    """A sample of the exhaustive test, chosen by the seed: three lives, each with its crash in another part."""
    life, after = _sample(seed)[part]
    killed = await _live_through_a_crash(world, life, after)
    assert killed, f"the life {life!r} had fewer than {after} writes: FEWEST_WRITES promises more than there are"


def _sample(seed: int) -> dict[str, tuple[str, int]]:
    """Cases by their part of the life, all of them certain to be reached."""
    chance = random.Random(seed)
    lives = chance.sample(list(LIVES), len(PARTS))
    return {part: (life, chance.choice(_thirds(life)[part])) for part, life in zip(PARTS, lives, strict=True)}


def _thirds(life: str) -> dict[str, range]:
    """The writes of a life in three parts of about the same length."""
    ends = [FEWEST_WRITES[life] * third // len(PARTS) for third in range(len(PARTS) + 1)]
    return {part: range(ends[third] + 1, ends[third + 1] + 1) for third, part in enumerate(PARTS)}


@pytest.mark.exhaustive
@pytest.mark.parametrize("life", LIVES)
@story
async def test_every_write_of_a_life_is_one_of_the_numbered_steps(world: World, life: str) -> None:
    async with _operator_that_crashes(world, 10 * MOST_WRITES[life]):
        await LIVES[life](world, f"{_slug(life)}-whole")
        writes = _writes(world)
    assert FEWEST_WRITES[life] <= len(writes) <= MOST_WRITES[life]
    assert set(writes) <= set(STEPS)


async def _live_through_a_crash(world: World, life: str, after: int) -> bool:
    """Whether the operator was killed: not where the life was over before."""
    async with _operator_that_crashes(world, after) as is_another:
        try:
            await LIVES[life](world, f"{_slug(life)}-{secrets.token_hex(3)}")
        except AssertionError as error:
            writes = _writes(world)
            raise AssertionError(f"killed after write {len(writes)} of {writes}:\n{error}") from error
    if is_another():
        assert len(_writes(world)) == after, "the operator ended, but not by the kill"
    return is_another()


@asynccontextmanager
async def _operator_that_crashes(world: World, after: int) -> AsyncIterator[Callable[[], bool]]:
    """An operator that kills itself, and a successor as a Deployment would start it. Tells whether there is one."""
    await world.kill_operator()
    await world.start_operator((sys.executable, "-m", "tests.cluster.crashing", "--after", str(after), "operator"))
    first = world.control_plane.pid_of(OPERATOR)
    over = asyncio.Event()
    keeper = asyncio.create_task(_start_again(world, over))
    try:
        yield lambda: world.control_plane.pid_of(OPERATOR) != first
    finally:
        over.set()
        await keeper


async def _start_again(world: World, over: asyncio.Event) -> None:
    """Also where the life is over with the very write after which the operator is killed."""
    looks_left = 10
    while looks_left:
        if not world.control_plane.alive(OPERATOR):
            await world.start_operator()
            return
        looks_left -= over.is_set()
        await asyncio.sleep(0.02)


def _slug(life: str) -> str:
    return life.replace(" ", "-")


def _writes(world: World) -> list[str]:
    return writes_in(world.control_plane.log_tail(OPERATOR, 100_000))


async def _the_one_segment(world: World, name: str, reason: str) -> Object:
    [record] = await world.records(name)
    spec: Object = record["spec"]
    assert (spec["segment"], spec["reason"]) == (1, reason)
    assert _seconds(spec) == spec["seconds"]
    return spec


async def _closed(world: World, name: str) -> bool:
    return any("billableTo" in record["spec"] for record in await world.records(name))


async def _segments(world: World, name: str, count: int) -> bool:
    return len(await world.records(name)) == count


async def _suspend(world: World, name: str, suspended: bool) -> None:
    await world.api.patch(resources.GPU_LEASES.path("team-a", name), {"spec": {"suspend": suspended}})


def _seconds(spec: Object) -> int:
    """Billed seconds of a segment, by its two instants and by its own word."""
    length = _time(spec["billableTo"]) - _time(spec["billableFrom"])
    assert length == timedelta(seconds=spec["seconds"])
    return int(spec["seconds"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
