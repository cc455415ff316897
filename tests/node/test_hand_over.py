"""From a miner to a tenant on a real node: real kubelet and containers, and the agent's real NVML, CUDA, DRA and CDI.

What must hold whatever happens: a tenant sees its own device and no other, nothing of whoever had it before, and
nobody has a device while a process of its former holder lives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from gpu_tenancy.api import names
from tests.cluster.api import Object
from tests.node.conftest import Living, living, story
from tests.node.gpu_site import MINED, GpuSite
from tests.node.gpus import AGENT, PORT
from tests.node.site import TEAM, pod
from tests.node.test_pods import alive

STEPS = ["Evict", "ProveEmpty", "Reset", "Partition", "Scrub", "Verify"]
SECRET = 0xDEADBEEF


@pytest.fixture(scope="module")
def here(possible: None) -> Iterator[Living]:  # noqa: ARG001
    """One node, two GPUs."""
    yield from living(GpuSite())


def devices(text: str) -> list[str]:
    """UUIDs of the devices that gpu-probe saw."""
    return [line.split()[1] for line in text.splitlines() if line.startswith("device ")]


def found(text: str) -> list[str]:
    """What gpu-probe found in memory: bytes that are not zero."""
    return [line.split()[1] for line in text.splitlines() if line.startswith("read ") and line != "read clean"]


async def renting(here: GpuSite, name: str, profile: str, *words: str) -> tuple[Object, str]:
    """A lease and a pod on it that has looked at all it can reach; the lease and what the pod wrote."""
    lease = await here.lease(name, profile)
    await here.create(pod(name, "devices", "context", "read", *words, "sleep", claim=name))
    return lease, await here.said(name, "sleeping")


async def pid_of(here: GpuSite, name: str) -> int:
    """The process of a pod."""
    body = await here.get(name)
    assert body is not None
    [pid] = here.node.processes(body["metadata"]["uid"])
    return pid


# ------------------------------------------------------------------------------------------------- who sees what


@story
async def test_a_tenant_gets_a_whole_gpu_from_a_miner_and_finds_nothing_of_it(here: GpuSite) -> None:
    await here.mine(2)
    lease, text = await renting(here, "train", "full")
    assert devices(text) == [(await here.slots())["train"]["uuid"]]
    assert found(text) == []
    [shown] = lease["status"]["handOvers"]
    record = shown["record"]
    assert [one["name"] for one in record["former"]] == ["miners"]
    assert [one["step"] for one in record["steps"]] == STEPS
    assert record["scrubbedBytes"] > 79 << 30
    assert len(await here.world.miners()) == 1, "the miner on the other GPU was disturbed"


@story
async def test_tenants_get_slices_from_a_miner_and_each_sees_its_own(here: GpuSite) -> None:
    await here.mine(2)
    _, first = await renting(here, "one", "3g.40gb", "write=7b")
    _, second = await renting(here, "two", "3g.40gb")
    slots = await here.slots()
    assert devices(first) == [slots["one"]["uuid"]]
    assert devices(second) == [slots["two"]["uuid"]]
    assert found(first) == found(second) == []
    await here.end("one")
    _, third = await renting(here, "three", "3g.40gb")
    assert found(third) == [], "the next tenant of a slice read what the one before had written"


@story
async def test_a_pod_without_a_claim_sees_no_gpu_whatever_it_asks_for(here: GpuSite) -> None:
    await renting(here, "train", "full")
    body = pod("curious", "devices", "context", "exit=0", nodeName=here.node.name)
    body["spec"]["containers"][0]["env"] = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    await here.create(body)
    await here.phase("curious", "Succeeded")
    assert devices(await here.node.logs(TEAM, "curious")) == []


@story
async def test_what_was_planted_in_idle_memory_is_not_read_by_the_next_holder(here: GpuSite) -> None:
    for gpu in (0, 1):
        here.driver.gpu.plant(gpu, SECRET)
    for name, profile in (("whole", "full"), ("slice", "1g.10gb")):
        _, text = await renting(here, name, profile)
        assert found(text) == []
        uuid = (await here.slots())[name]["uuid"]
        assert not [row for row in here.driver.gpu.readable(uuid) if row.pattern == SECRET]


@story
async def test_a_slice_that_may_begin_nowhere_is_not_tried_and_comes_once_the_one_in_the_way_ends(
    here: GpuSite,
) -> None:
    small = [f"small-{number}" for number in range(7)]
    for name in small:
        await here.ask(name, "1g.10gb")
    for name in small:
        await here.lease_ready(name)
    by_slice = {slot["start"]: name for name, slot in (await here.slots()).items()}
    for start in by_slice.keys() - {0, 4}:
        await here.end(by_slice[start])

    async def two_are_left() -> bool:
        return len(await here.slots()) == 2

    await here.eventually("five of the slices to be given back", two_are_left)
    with here.driver.gpu.fault("nvmlDeviceCreateGpuInstance*") as made:
        await here.ask("wide", "3g.40gb")
        waiting = await here.world.condition("wide", "Ready", "False", "Fragmented", TEAM)
        await here.lease("later", "1g.10gb")  # once it has its slice, whatever was promised before was tried
        assert made.seen == 1
        conditions = {one["type"]: one for one in waiting["status"]["conditions"]}
        message = conditions["Ready"]["message"]
        assert f"{here.node.name} has 6 free slices, but 3g.40gb can only begin at slice 0 or 4" in message
        assert f"1g.10gb at slice 0 (lease {TEAM}/{by_slice[0]})" in message
        assert f"at slices 0-3 of GPU 1 on {here.node.name} once 1g.10gb at slice 0 ends (it has no end)" in message
        assert set(await here.slots()) == {by_slice[0], by_slice[4], "later"}
        await here.end(by_slice[0])
        await here.lease_ready("wide")
        assert made.seen == 2
    slots = await here.slots()
    assert {name: slot["start"] for name, slot in slots.items()} == {"wide": 0, by_slice[4]: 4, "later": 6}


# -------------------------------------------------------------------------------------------- who is still there


@story
async def test_a_container_that_outlives_its_forced_deletion_keeps_the_gpu_until_it_is_gone(here: GpuSite) -> None:
    await renting(here, "old", "full", "ignore-term")
    pid = await pid_of(here, "old")
    here.node.pause_kubelet()
    await here.delete("old", "--force", "--grace-period=0")
    await here.gone("old")
    await here.end("old")
    await here.ask("new", "full")

    async def waits() -> str:
        message = (await here.slots()).get("old", {}).get("message", "")
        return str(message) if "still prepared" in message else ""

    assert "1 claim still prepared (pod team-a/old)" in await here.eventually("the device to wait", waits)
    assert alive(pid)
    here.node.resume_kubelet()
    lease = await here.lease_ready("new")
    assert not alive(pid)
    assert lease["status"]["handOvers"]


@story
async def test_a_process_that_kubelet_does_not_know_of_is_found_by_its_mounts_and_killed(here: GpuSite) -> None:
    """It sleeps, uses no GPU, and could open one at any time: the driver does not list it."""
    await renting(here, "old", "full")
    pid = on_the_node(await pid_of(here, "old"))
    command = ["nsenter", f"--target={pid}", "--mount", "--root", "--", "/gpu-probe", "sleep"]
    await here.node.spawn("stowaway", command, {})
    await here.end("old")
    _, text = await renting(here, "new", "full")
    assert found(text) == []
    assert not here.node.alive("stowaway")
    assert "has outlived its pod" in here.node.log_tail(AGENT)


def on_the_node(pid: int) -> int:
    """A process id of here as the node sees it."""
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("NSpid:")]
    return int(line.split()[2])


@story
async def test_a_process_that_the_driver_lists_is_named_with_its_pod(here: GpuSite) -> None:
    """A pod that has no claim on the GPU, and has it open all the same."""
    await here.lease("old", "full")
    await here.create(pod("stranger", "sleep"))
    await here.phase("stranger", "Running")
    pid = on_the_node(await pid_of(here, "stranger"))
    here.driver.gpu.add_process(0, pid, memory=1 << 20)
    try:
        await here.end("old")

        async def named() -> str:
            message = (await here.slots()).get("old", {}).get("message", "")
            return str(message) if "waits for process" in message else ""

        told = await here.eventually("the process to be named", named)
        assert f"process {pid}" in told
        assert f"of pod {TEAM}/stranger on" in told
    finally:
        here.driver.gpu.end_process(pid)
    await renting(here, "new", "full")


@story
async def test_a_client_of_nobody_is_named_and_holds_up_its_own_gpu_alone(here: GpuSite) -> None:
    await here.lease("old", "full")
    here.driver.gpu.add_process(0, os.getpid(), memory=1 << 20)
    try:
        await here.end("old")

        async def named() -> str:
            message = (await here.slots()).get("old", {}).get("message", "")
            return str(message) if "waits for process" in message else ""

        assert f"process {os.getpid()}" in await here.eventually("the process to be named", named)
        await renting(here, "beside", "3g.40gb")
    finally:
        here.driver.gpu.end_process(os.getpid())
    await renting(here, "new", "full")


# ----------------------------------------------------------------------------------------------------- what breaks


@story
async def test_an_application_fault_fences_nobody_and_a_contained_error_only_its_slice(here: GpuSite) -> None:
    await here.lease("hit", "3g.40gb")
    await here.lease("beside", "3g.40gb")
    before = await here.slots()
    here.driver.xid(1, 31, before["hit"]["uuid"])
    here.driver.xid(1, 94, before["hit"]["uuid"])

    async def described() -> bool:
        """The device itself says so for a moment only: then its lease is on its way elsewhere."""
        text = await here.control_plane.kubectl("describe", "node", here.node.name)
        return "Fenced" in text and "Xid 94, a contained memory error" in text and "Xid 31" not in text

    await here.eventually("kubectl describe node to say so", described)

    async def again() -> bool:
        """It comes back where it was, scrubbed, once the place is used again."""
        lease = await here.lease_ready("hit")
        return bool(lease["status"]["attempt"] == 2)

    await here.eventually("the lease to be placed anew", again)
    assert (await here.slots())["beside"] == before["beside"]


@story
async def test_a_lost_gpu_takes_its_lease_and_no_other(here: GpuSite) -> None:
    await here.lease("beside", "3g.40gb")
    before = (await here.slots())["beside"]
    here.driver.gpu.lose(0)

    async def lost() -> bool:
        return not (await here.gpu(0)).get("healthy", True)

    await here.eventually("the GPU to be reported", lost)
    assert (await here.slots())["beside"] == before
    await here.reboot(seed=7)

    async def sound() -> bool:
        return bool((await here.gpu(0)).get("healthy", True))

    await here.eventually("the end of its probation", sound)


@story
async def test_the_agent_is_killed_during_a_hand_over_and_the_next_one_ends_it(here: GpuSite) -> None:
    await here.mine(2)
    await here.ask("train", "3g.40gb")
    await here.restart_agent()
    await here.lease_ready("train")
    await here.create(pod("train", "devices", "context", "read", "sleep", claim="train"))
    text = await here.said("train", "sleeping")
    assert devices(text) == [(await here.slots())["train"]["uuid"]]
    assert MINED not in found(text)


@story
async def test_after_a_reboot_slices_are_made_again_and_pods_come_back_to_them(here: GpuSite) -> None:
    await here.lease("train", "3g.40gb")
    await here.create(pod("train", "devices", "sleep", claim="train", restartPolicy="Always"))
    await here.said("train", "sleeping")
    before = (await here.slots())["train"]
    await here.reboot(seed=8)

    async def back() -> list[str]:
        now = (await here.slots()).get("train", {})
        if now.get("state") != "Ready" or now["uuid"] == before["uuid"]:
            return []
        text = await here.node.logs(TEAM, "train")
        return devices(text) if now["uuid"] in text else []

    assert (await here.eventually("the pod on the new slice", back))[-1] != before["uuid"]


@story
async def test_kubelet_shows_the_health_of_a_pods_device(here: GpuSite) -> None:
    await renting(here, "train", "3g.40gb")
    device = (await here.slots())["train"]["device"]

    async def shown() -> list[Object]:
        body = await here.get("train")
        assert body is not None
        containers = body["status"].get("containerStatuses", ())
        kinds = [kind for container in containers for kind in container.get("allocatedResourcesStatus", ())]
        resources = [one for kind in kinds for one in kind["resources"]]
        return [one for one in resources if one["health"] != "Unknown"]

    [resource] = await here.eventually("the health in the pod's status", shown)
    assert resource["health"] == "Healthy"
    assert device in resource["resourceID"]


# ----------------------------------------------------------------------------------------------------- conversions


@story
async def test_a_declared_mode_is_taken_by_a_reset_of_that_gpu_alone(here: GpuSite) -> None:
    gpu = here.driver.gpu
    gpu.set("mig_reset_required", 1, gpu=0)
    await here.lease("beside", "3g.40gb")
    before = (await here.slots())["beside"]
    await here.declare("0,1")

    async def converted() -> bool:
        now = await here.gpu(0)
        return bool(now["mode"] == "MIG" and not now.get("fenced"))

    await here.eventually("the GPU to be in MIG mode", converted)
    assert (await here.slots())["beside"] == before
    await here.declare("1")

    async def back() -> bool:
        now = await here.gpu(0)
        return bool(now["mode"] == "Whole" and not now.get("fenced"))

    await here.eventually("the GPU to be whole again", back)


@story
async def test_metrics_tell_of_every_gpu_and_device(here: GpuSite) -> None:
    await here.lease("train", "3g.40gb")
    port = await here.node.reach(PORT)
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        text = await answer.text()
    assert text.count("gpu_tenancy_gpu_power_watts{") == 2
    assert 'holder="train"' in text
    assert 'gpu_tenancy_hand_over_step_seconds_count{step="Scrub"}' in text
    assert names.DRIVER not in text.splitlines()[0]
