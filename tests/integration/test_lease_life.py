"""The life of a lease on a real control plane: real operator, real agents, real scheduler; only the GPUs are simulated.

One world for the module. Every test leaves it as it found it: sixteen miners.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.ledger import double_billings
from gpu_tenancy.kube import resources
from tests.cluster import conservation
from tests.cluster.api import MERGE, Object
from tests.cluster.eventually import eventually
from tests.cluster.observed import Observed
from tests.cluster.world import World, condition_of, lease, template
from tests.integration.conftest import Living, mining_world, story


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from mining_world()


@pytest.fixture
def world(living_world: Living) -> Iterator[Living]:
    yield living_world
    living_world.run(_clear(living_world.world))


async def _clear(world: World) -> None:
    await world.kubectl("delete", "gpul,deployments", "--all", "-n", "team-a", "--wait=false")
    await world.mining(16)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _uids(miners: dict[tuple[str, str], Object]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in miners.values()}


async def _patch(world: World, name: str, **spec: object) -> None:
    path = resources.GPU_LEASES.path("team-a", name)
    await world.api.patch(path, {"spec": spec}, MERGE)


def _deployment(name: str, claim_template: str) -> Object:
    labels = {"app": name}
    container = {"name": "main", "image": "registry.invalid/notebook", "resources": {"claims": [{"name": "gpu"}]}}
    pod = {
        "containers": [container],
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": claim_template}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "team-a"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


async def _pods(world: World, **labels: str) -> list[Object]:
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    return await world.items(resources.PODS, labelSelector=selector)


async def _running(world: World, **labels: str) -> list[Object]:
    return [pod for pod in await _pods(world, **labels) if pod.get("status", {}).get("phase") == "Running"]


@story
async def test_a_lease_takes_exactly_as_many_gpus_from_miners_as_it_needs(world: World) -> None:
    before = await world.miners()
    await world.create(lease("mine", gpus={"profile": "full", "count": 4}, template=template()))
    ready = await world.ready("mine")
    after = await world.mining(12)
    assert _uids(after) < _uids(before)
    assert len(ready["status"]["nodes"]) == 1
    pods = await eventually("the Job's pod", lambda: _running(world, **{names.LABEL_LEASE: "mine"}))
    assert pods[0]["spec"]["nodeName"] == ready["status"]["nodes"][0]
    assert pods[0]["metadata"]["labels"][names.LABEL_ATTEMPT] == "1"


@story
async def test_a_slice_repartitions_one_gpu_and_what_is_left_of_it_mines_on(world: World) -> None:
    before = await world.miners()
    await world.create(lease("slice", gpus={"profile": "3g.40gb"}, template=template()))
    ready = await world.ready("slice")
    after = await world.mining(16)  # one 7g miner less, one 4g miner more
    new = set(after) - set(before)
    assert len(new) == 1
    assert "4g40gb-0" in new.pop()[1]
    assert ready["status"]["readyDevices"] == 1


@story
async def test_billing_begins_when_the_last_device_is_ready_and_never_before(world: World) -> None:
    await world.create(lease("billed", gpus={"profile": "full", "count": 2}, template=template()))
    ready = await world.ready("billed")
    node = await world.get(resources.GPU_NODES, ready["status"]["nodes"][0])
    assert node is not None
    uid = ready["metadata"]["uid"]
    ready_at = max(_time(slot["readyAt"]) for slot in node["status"]["slots"] if slot["holder"]["uid"] == uid)
    [record] = await world.records("billed")
    start = _time(record["spec"]["billableFrom"])
    assert timedelta(0) <= start - ready_at < timedelta(seconds=1)
    assert ready["status"]["billableFrom"] == record["spec"]["billableFrom"]
    assert "billableTo" not in record["spec"]
    assert record["spec"]["price"] == {"perHour": "145.00", "currency": "RUB", "book": "list"}
    assert len(record["spec"]["devices"]) == 2


@story
async def test_a_lease_without_room_waits_with_position_and_numbers_and_then_gets_its_place(world: World) -> None:
    for name in ("one", "two"):
        await world.create(lease(name, gpus={"profile": "full", "count": 5}))
        await world.ready(name)
    await world.create(lease("third", gpus={"profile": "full", "count": 4}))
    waiting = await world.condition("third", "Ready", "False", "Queued")
    assert waiting["status"]["position"] == 1
    ready = condition_of(waiting, "Ready")
    assert ready is not None
    assert "needs 4 free GPUs (A100-SXM4-80GB) on one node; the best node has 2" in ready["message"]
    await world.create(lease("small", gpus={"profile": "full"}))
    await world.ready("small")  # who fits goes ahead
    await world.delete(resources.GPU_LEASES, "one", "team-a")
    settled = await world.ready("third")
    assert "position" not in settled["status"]


@story
async def test_a_slice_that_may_begin_nowhere_says_what_is_in_the_way_and_comes_once_that_ends(world: World) -> None:
    await world.create(lease("large", gpus={"profile": "7g.80gb"}))  # has one of the two GPUs in MIG mode
    large = await world.ready("large")
    small = [f"small-{number}" for number in range(7)]
    for name in small:
        await world.create(lease(name, gpus={"profile": "1g.10gb"}, term={"duration": "1h"}))
    ends = {name: (await world.ready(name))["status"]["expiresAt"] for name in small}
    node = ({"n1", "n2"} - set(large["status"]["nodes"])).pop()
    by_slice = {slot["start"]: slot["holder"]["name"] for slot in await _leased(world, node)}
    for start in by_slice.keys() - {0, 4}:
        await world.delete(resources.GPU_LEASES, by_slice[start], "team-a")

    async def two_are_left() -> bool:
        return len(await _leased(world, node)) == 2

    await eventually("five of the leases to be gone", two_are_left)
    await world.create(lease("wide", gpus={"profile": "3g.40gb"}))
    waiting = await world.condition("wide", "Ready", "False", "Fragmented")
    ready = condition_of(waiting, "Ready")
    assert ready is not None
    ways = f"1g.10gb at slice 0 (lease team-a/{by_slice[0]}), 1g.10gb at slice 4 (lease team-a/{by_slice[4]})"
    first = 0 if ends[by_slice[0]] <= ends[by_slice[4]] else 4
    assert f"GPU 7 on {node} has 6 free slices" in ready["message"]
    assert f"can only begin at slice 0 or 4; in the way: {ways}." in ready["message"]
    assert f"slices {first}-{first + 3} of GPU 7 on {node} once 1g.10gb at slice {first} ends (at " in ready["message"]
    assert f"{ends[by_slice[first]]} at the latest" in ready["message"]
    assert waiting["status"]["position"] == 1
    assert {slot["holder"]["name"] for slot in await _leased(world, node)} == {by_slice[0], by_slice[4]}
    await world.delete(resources.GPU_LEASES, by_slice[first], "team-a")
    placed = await world.ready("wide")
    assert placed["status"]["nodes"] == [node]
    assert "position" not in placed["status"]


async def _leased(world: World, node: str) -> list[Object]:
    """What is promised to leases on a node."""
    found = await world.get(resources.GPU_NODES, node)
    assert found is not None
    return [slot for slot in found["spec"].get("slots", ()) if slot["holder"]["kind"] == "GpuLease"]


@story
async def test_a_deployment_uses_a_lease_and_does_not_get_its_gpu_back_after_the_end(world: World) -> None:
    await world.create(lease("notebook", gpus={"profile": "full"}, term={"duration": "6s", "notice": "2s"}))
    await world.api.create("/apis/apps/v1/namespaces/team-a/deployments", _deployment("notebook", "notebook"))
    await world.ready("notebook")
    [first] = await eventually("the Deployment's pod", lambda: _running(world, app="notebook"))
    noticed = await world.condition("notebook", "Expired", "False", "NoticeGiven")
    assert condition_of(noticed, "Ready")["status"] == "True"  # type: ignore[index]
    ended = await world.settled("notebook")
    assert ended["status"]["ended"]["reason"] == "Expired"
    [record] = await world.records("notebook")
    assert record["spec"]["seconds"] == 6
    await world.mining(16)

    async def replaced() -> list[Object]:
        pods = await _pods(world, app="notebook")
        return [pod for pod in pods if pod["metadata"]["uid"] != first["metadata"]["uid"]]

    [second] = await eventually("the Deployment's next pod", replaced)
    assert second.get("status", {}).get("phase") == "Pending"
    assert not await _running(world, app="notebook")


@story
async def test_raising_the_duration_extends_a_running_lease(world: World) -> None:
    await world.create(lease("longer", gpus={"profile": "full"}, term={"duration": "1h", "notice": "1s"}))
    ready = await world.ready("longer")
    start = _time(ready["status"]["billableFrom"])
    assert _time(ready["status"]["expiresAt"]) == start + timedelta(hours=1)
    await _patch(world, "longer", term={"duration": "2h"})

    async def extended() -> Object | None:
        found = await world.get(resources.GPU_LEASES, "longer", "team-a")
        return found if found and found["status"]["acceptedDuration"] == "2h" else None

    later = await eventually("the extension", extended)
    assert _time(later["status"]["expiresAt"]) == start + timedelta(hours=2)


@story
async def test_a_duration_that_is_already_over_is_refused_and_the_old_one_stays(world: World) -> None:
    await world.create(lease("shorter", gpus={"profile": "full"}, term={"duration": "1h", "notice": "1s"}))
    ready = await world.ready("shorter")
    over = _time(ready["status"]["billableFrom"]) + timedelta(seconds=3)
    await asyncio.sleep((over - datetime.now(UTC)).total_seconds())
    await _patch(world, "shorter", term={"duration": "2s"})
    refused = await world.condition("shorter", "Stalled", "True", "ExtensionRefused")
    assert refused["status"]["acceptedDuration"] == "1h"
    assert condition_of(refused, "Ready")["status"] == "True"  # type: ignore[index]
    assert "term.duration 2s was refused" in condition_of(refused, "Stalled")["message"]  # type: ignore[index]


@pytest.mark.parametrize(("exit_code", "reason"), [(0, "Completed"), (1, "Failed")])
@story
async def test_a_finished_job_releases_its_lease_and_says_so(world: World, exit_code: int, reason: str) -> None:
    name = reason.lower()
    await world.create(lease(name, gpus={"profile": "full"}, template=template(2, exit_code=exit_code)))
    await world.ready(name)
    ended = await world.settled(name)
    assert ended["status"]["ended"]["reason"] == reason
    [record] = await world.records(name)
    assert record["spec"]["reason"] == reason
    assert record["spec"]["seconds"] >= 1

    async def let_go() -> bool:
        found = await world.get(resources.GPU_LEASES, name, "team-a")
        return found is not None and not found["metadata"].get("finalizers")

    await eventually("the finalizer to go", let_go)


@story
async def test_on_completion_hold_keeps_the_gpus_and_goes_on_billing(world: World) -> None:
    await world.create(lease("held", gpus={"profile": "full"}, onCompletion="Hold", template=template(0.5)))
    await world.ready("held")

    async def finished() -> bool:
        jobs = await world.items(resources.JOBS, labelSelector=f"{names.LABEL_LEASE}=held")
        return any(one["type"] == "Complete" for job in jobs for one in job["status"].get("conditions", ()))

    await eventually("the Job's completion", finished)
    await asyncio.sleep(1)
    [record] = await world.records("held")
    assert "billableTo" not in record["spec"]
    assert len(await world.miners()) == 15


@story
async def test_suspension_stops_billing_and_resuming_goes_on_under_the_same_price(world: World) -> None:
    await world.create(lease("paused", gpus={"profile": "full"}, term={"duration": "1h"}, template=template()))
    first = await world.ready("paused")
    await asyncio.sleep(1.5)
    await _patch(world, "paused", suspend=True)
    await world.condition("paused", "Ready", "False", "Suspended")
    await world.mining(16)
    [closed] = await world.records("paused")
    assert closed["spec"]["reason"] == "Suspended"
    await _patch(world, "paused", suspend=False)
    second = await world.ready("paused")
    assert second["status"]["attempt"] == 2
    assert second["status"]["price"] == first["status"]["price"]
    one, two = await world.records("paused")
    assert _time(two["spec"]["billableFrom"]) >= _time(one["spec"]["billableTo"])
    left = timedelta(hours=1) - timedelta(seconds=one["spec"]["seconds"])
    assert _time(second["status"]["expiresAt"]) == _time(two["spec"]["billableFrom"]) + left


@story
async def test_deleting_a_lease_bills_up_to_the_deletion_and_then_lets_it_go(world: World) -> None:
    await world.create(lease("deleted", gpus={"profile": "full", "count": 2}, template=template()))
    await world.ready("deleted")
    await asyncio.sleep(1.2)
    asked = datetime.now(UTC)
    await world.kubectl("delete", "gpul", "deleted", "-n", "team-a")  # waits for the finalizer
    [record] = await world.records("deleted")
    assert record["spec"]["reason"] == "Deleted"
    assert abs(_time(record["spec"]["billableTo"]) - asked) <= timedelta(seconds=1)
    await world.mining(16)


@story
async def test_a_gang_is_placed_on_two_nodes_at_once_and_finds_itself_by_name(world: World) -> None:
    await world.create(lease("gang", pods=2, gpus={"profile": "full", "count": 5}, template=template()))
    ready = await world.ready("gang")
    assert ready["status"]["nodes"] == ["n1", "n2"]
    pods = await eventually("both pods", lambda: _all_of(world, 2, **{names.LABEL_LEASE: "gang"}))
    assert {pod["spec"]["nodeName"] for pod in pods} == {"n1", "n2"}
    service = await world.get(resources.SERVICES, "gang", "team-a")
    assert service is not None
    assert service["spec"]["clusterIP"] == "None"


async def _all_of(world: World, count: int, **labels: str) -> list[Object]:
    pods = await _running(world, **labels)
    return pods if len(pods) == count else []


WHOLE = {"profile": "full"}
UNNAMEABLE = {"spec": {"containers": [{"name": "No_Good", "image": "registry.invalid/x"}]}}
REFUSED = [
    (
        {"gpus": {**WHOLE, "count": 8}},
        "Impossible",
        "Needs 8 whole GPUs (A100-SXM4-80GB) on one node; the largest node has 7.",
    ),
    ({"gpus": {**WHOLE, "count": 3}, "pods": 5}, "Impossible", "all nodes together hold 4 pods of that kind"),
    ({"gpus": WHOLE, "template": template(cpu="500")}, "Impossible", "Each pod needs 500 CPU (128 there)"),
    ({"gpus": {"profile": "2g.20gb"}}, "NoRate", "no rate for profile 2g.20gb of model A100-SXM4-80GB"),
    ({"gpus": WHOLE, "template": UNNAMEABLE}, "InvalidTemplate", "a lowercase RFC 1123 label must consist of"),
]


@pytest.mark.parametrize(
    ("spec", "reason", "sentence"), REFUSED, ids=[one[1] + str(i) for i, one in enumerate(REFUSED)]
)
@story
async def test_what_can_never_run_is_refused_in_a_sentence_and_not_queued(
    world: World, spec: Object, reason: str, sentence: str
) -> None:
    await world.create(lease("hopeless", **spec))
    refused = await world.condition("hopeless", "Stalled", "True", reason)
    assert "position" not in refused["status"]
    for kind in ("Ready", "Admitted"):
        found = condition_of(refused, kind)
        assert found is not None
        assert (found["status"], found["reason"]) == ("False", reason)
        assert sentence in found["message"]


@story
async def test_kubectl_shows_and_waits_for_a_lease(world: World) -> None:
    await world.create(lease("shown", gpus={"profile": "full"}, term={"duration": "1h"}))
    await world.kubectl("wait", "--for=condition=Ready", "gpul/shown", "-n", "team-a", "--timeout=60s")
    header, row = (await world.kubectl("get", "gpul", "shown", "-n", "team-a")).strip().splitlines()
    assert header.split() == ["NAME", "STATE", "GPUS", "PROFILE", "NODES", "EXPIRES", "COST", "AGE"]
    assert row.split()[:4] == ["shown", "Ready", "1", "full"]
    events = json.loads(await world.kubectl("get", "events", "-n", "team-a", "-o", "json"))
    about = {one["reason"] for one in events["items"] if one["involvedObject"]["name"] == "shown"}
    assert "Ready" in about


@story
async def test_every_slice_second_is_in_exactly_one_hand_and_the_leased_ones_are_billed(world: World) -> None:
    async with Observed(world.api, (resources.USAGE_RECORDS,)) as observed:
        before = await conservation.read(world, "miners")
        counted = lease("counted", gpus={"profile": "full", "count": 4}, term={"duration": "4s", "notice": "1s"})
        await world.create(counted)
        await world.settled("counted")

        def closed() -> list[conservation.Stand]:
            found = conservation.stands(observed)
            return [one for one in found if one.segment.lease_name == "counted"]

        segments = await observed.until("the closed record", closed)
        after = await conservation.read(world, "miners")
        # All records that the module has left, open and closed: the same slices are never billed twice.
        records = [UsageRecordSpec.model_validate(one["spec"]) for one in observed.ever(resources.USAGE_RECORDS)]
    assert [one.billed for one in segments] == [4 * 8 * 4]
    assert conservation.breaches(before, after, segments) == []
    assert list(double_billings(records)) == []
    # Every GPU is in the account: 16 of them, 8 slices each, from one reading to the other.
    least, most = after.earliest - before.latest, after.latest - before.earliest
    assert 16 * 8 * least <= after.total - before.total <= 16 * 8 * most
