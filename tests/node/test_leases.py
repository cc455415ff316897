"""Leases on real nodes: operator, scheduler, claim, agent, CDI, containerd and runc, and a program that looks.

Two real nodes, each with the real agent on GPUs in memory, beside a simulated one. Every test leaves them empty.
"""

from __future__ import annotations

import pytest

from gpu_tenancy.api import names
from tests.cluster.eventually import eventually
from tests.cluster.node.realnode import RealNode
from tests.node.conftest import Living, story
from tests.node.site import AGENT, TEAM, Site, cdi_files, pod
from tests.node.test_pods import alive


@pytest.fixture
def here(whole_site: Living) -> Living:
    return whole_site


async def renting(here: Site, name: str, *words: str, **spec: object) -> tuple[RealNode, int]:
    """A lease, and a pod of its name that uses it; its node and its process."""
    await here.lease(name)
    await here.create(pod(name, "environment", *words, "sleep", claim=name, **spec))
    found = await here.phase(name, "Running")
    node = await here.node_of(name)
    await here.said(name, "sleeping", node=node)
    [pid] = node.processes(found["metadata"]["uid"])
    return node, pid


def variables(text: str) -> dict[str, str]:
    """Environment variables in what gpu-probe wrote."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


async def unprepared(node: RealNode) -> None:
    """Wait until the agent has taken back all that it had prepared for claims."""

    async def look() -> bool:
        return not cdi_files(node)

    await eventually("no CDI file of a claim", look)


@story
async def test_a_pod_sees_its_device_and_gives_it_back_when_it_is_deleted(here: Site) -> None:
    node, pid = await renting(here, "train")
    [(device, uuid)] = (await here.devices(node)).items()
    seen = variables(await node.logs(TEAM, "train"))
    assert seen == {"GPU_TENANCY_DEVICE": device, "GPU_TENANCY_UUID": uuid, "NVIDIA_VISIBLE_DEVICES": "void"}
    assert len(cdi_files(node)) == 1
    await here.delete("train")
    await here.gone("train")
    await unprepared(node)
    assert not alive(pid)


@story
async def test_a_pod_without_a_claim_has_nothing_of_the_lease_on_its_node(here: Site) -> None:
    node, _ = await renting(here, "train")
    await here.create(pod("bystander", "environment", "exit=0", nodeName=node.name))
    await here.phase("bystander", "Succeeded")
    assert await node.logs(TEAM, "bystander") == ""


@story
async def test_a_lease_with_a_template_runs_on_two_real_nodes_at_once(here: Site) -> None:
    body = pod("unused", "environment", "sleep")["spec"]
    await here.lease("gang", count=8, pods=2, template={"spec": body})

    async def look() -> dict[str, str]:
        found = await here.control_plane.api.items(f"/api/v1/namespaces/{TEAM}/pods")
        running = [one for one in found if one["status"].get("phase") == "Running"]
        return {one["spec"]["nodeName"]: one["metadata"]["name"] for one in running} if len(running) == 2 else {}

    placed = await eventually("both pods to run", look)
    assert set(placed) == {node.name for node in here.nodes}
    for node in here.nodes:
        written = await here.said(placed[node.name], "sleeping", node=node)
        uuids = (await here.devices(node)).values()
        assert sorted(variables(written)["GPU_TENANCY_UUID"].split(",")) == sorted(uuids)
        assert len(uuids) == 8


@story
async def test_kubelet_is_restarted_and_pods_are_untouched_and_the_next_one_gets_its_device(here: Site) -> None:
    node, pid = await renting(here, "first")
    before = await here.phase("first", "Running")
    await node.restart_kubelet()
    await here.lease("second")
    node_selector = {"kubernetes.io/hostname": node.name}
    await here.create(pod("second", "environment", "exit=0", claim="second"))
    await here.phase("second", "Succeeded")
    assert alive(pid)
    after = await here.phase("first", "Running")
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]
    assert node_selector
    assert (await here.node_of("second")).name == node.name


@story
async def test_a_pod_that_kubelet_has_put_off_is_looked_at_again_and_again(here: Site) -> None:
    """kubelet that could not prepare a claim tries again at its next full sync only, a minute and more later."""
    await here.lease("train")
    node = await here.serving()
    await node.kill(AGENT)
    await here.create(pod("train", "environment", "exit=0", claim="train"))

    async def marked() -> str:
        found = await here.get("train")
        return str(found["metadata"].get("annotations", {}).get(names.ANNOTATION_TOUCHED, "")) if found else ""

    first = await eventually("the pod to be touched", marked)
    await here.start_agent(node)
    await here.phase("train", "Succeeded")
    assert await marked() > first


@story
async def test_the_agent_is_killed_and_comes_back_and_pods_do_not_notice(here: Site) -> None:
    node, pid = await renting(here, "train")
    before = await here.devices(node)
    await node.kill(AGENT)
    await here.start_agent(node)
    assert alive(pid)
    assert await here.devices(node) == before
    await here.delete("train")
    await here.gone("train")
    await unprepared(node)


@story
async def test_a_force_deleted_pod_is_gone_while_its_process_can_still_open_the_device(here: Site) -> None:
    node, pid = await renting(here, "train", "ignore-term")
    node.pause_kubelet()  # so that its process lives for as long as it is looked at
    await here.delete("train", "--force", "--grace-period=0")
    await here.gone("train")
    assert alive(pid)
    assert cdi_files(node)
    node.resume_kubelet()
    await unprepared(node)
    assert not alive(pid)


@story
async def test_after_a_reboot_the_pod_runs_again_on_the_device_of_its_lease(here: Site) -> None:
    node, pid = await renting(here, "train", restartPolicy="Always")
    await node.reboot()
    assert not alive(pid)
    await here.start_agent(node)
    found = await here.get("train")
    assert found is not None
    uid = found["metadata"]["uid"]

    async def again() -> list[int]:
        return node.processes(uid)

    await eventually("the pod to run again", again)
    [(device, _)] = (await here.devices(node)).items()
    assert variables(await node.logs(TEAM, "train"))["GPU_TENANCY_DEVICE"] == device
