"""A real node by itself: pods, kubelet, power and network, without anything of gpu-tenancy."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import aiohttp
import pytest

from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.node.conftest import Living, story
from tests.node.site import Bare, pod
from tests.nvsim.library import library
from tests.nvsim.node import STATE, Node

SIMULATOR = "/simulator"


@pytest.fixture
def here(bare_node: Living) -> Living:
    return bare_node


def with_simulator(body: Object, state: Path) -> Object:
    """The pod, with the simulated NVML mounted and its state."""
    mounts = {f"{SIMULATOR}/lib": str(library().parent), f"{SIMULATOR}/state": str(state.parent)}
    [container] = body["spec"]["containers"]
    container["env"] = [
        {"name": "LD_LIBRARY_PATH", "value": f"{SIMULATOR}/lib"},
        {"name": STATE, "value": f"{SIMULATOR}/state/{state.name}"},
    ]
    container["volumeMounts"] = [{"name": f"v{n}", "mountPath": place} for n, place in enumerate(mounts)]
    body["spec"]["volumes"] = [
        {"name": f"v{n}", "hostPath": {"path": source}} for n, source in enumerate(mounts.values())
    ]
    return body


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@story
async def test_a_pod_runs_with_an_address_of_its_nodes_range_and_says_how_it_ended(here: Bare) -> None:
    await here.create(pod("runs", "sleep"))
    await here.create(pod("fails", "environment", "exit=3"))
    found = await here.phase("runs", "Running")
    assert ipaddress.ip_address(found["status"]["podIP"]) in ipaddress.ip_network(here.node.layout.pod_range)
    failed = await here.phase("fails", "Failed")
    assert failed["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3


@story
async def test_a_pod_sees_no_gpu_unless_the_simulator_is_mounted_into_it(here: Bare, tmp_path: Path) -> None:
    node = Node.create(tmp_path / "node", gpus=3)
    await here.create(pod("without", "devices"))
    await here.create(with_simulator(pod("with", "devices"), node.path))
    for name in ("without", "with"):
        await here.phase(name, "Succeeded")
    assert "devices none: libnvidia-ml.so.1" in await here.node.logs("team-a", "without")
    seen = (await here.said("with", "devices 3")).splitlines()
    assert sum(line.startswith("device GPU-") for line in seen) == 3


@story
async def test_pods_run_on_while_kubelet_is_away_and_are_not_restarted_when_it_is_back(here: Bare) -> None:
    await here.create(pod("p", "sleep"))
    before = await here.phase("p", "Running")
    [pid] = here.node.processes(before["metadata"]["uid"])
    await here.node.restart_kubelet()
    await here.create(pod("later", "exit=0"))
    await here.phase("later", "Succeeded")
    after = await here.phase("p", "Running")
    assert alive(pid)
    assert after["status"]["containerStatuses"] == before["status"]["containerStatuses"]


@story
async def test_a_pod_that_honours_sigterm_is_gone_long_before_its_grace_is_over(here: Bare) -> None:
    await here.create(pod("p", "sleep", terminationGracePeriodSeconds=100_000))
    await here.phase("p", "Running")
    await here.said("p", "sleeping")
    await here.delete("p")
    await here.gone("p")


@story
async def test_a_force_deleted_pod_is_gone_while_its_process_lives_on(here: Bare) -> None:
    await here.create(pod("p", "ignore-term", "sleep"))
    uid = (await here.phase("p", "Running"))["metadata"]["uid"]
    await here.said("p", "sleeping")
    [pid] = here.node.processes(uid)
    here.node.pause_kubelet()  # it would end the process in a second or two: here nobody does
    await here.delete("p", "--force", "--grace-period=0")
    await here.gone("p")
    assert alive(pid)
    assert here.node.processes(uid) == [pid]
    here.node.resume_kubelet()
    await eventually("kubelet to end it", lambda: _none(here, uid))


async def _none(here: Bare, uid: str) -> bool:
    return not here.node.processes(uid)


@story
async def test_without_a_network_pods_live_on_and_what_was_asked_meanwhile_is_done_afterwards(here: Bare) -> None:
    await here.create(pod("p", "sleep"))
    uid = (await here.phase("p", "Running"))["metadata"]["uid"]
    await here.said("p", "sleeping")
    await here.node.cut_network()
    await here.delete("p")
    [pid] = here.node.processes(uid)
    assert alive(pid)
    assert await here.get("p") is not None
    await here.node.mend_network()
    await here.gone("p")
    assert not here.node.processes(uid)


@story
async def test_after_a_reboot_the_boot_is_another_and_containers_are_new_ones(here: Bare) -> None:
    await here.create(pod("p", "sleep", restartPolicy="Always"))
    uid = (await here.phase("p", "Running"))["metadata"]["uid"]
    [pid] = here.node.processes(uid)
    boot, everything = here.node.boot_id(), here.node.all_processes()
    await here.node.reboot()
    assert here.node.boot_id() != boot
    assert not [one for one in everything if alive(one)]

    async def told() -> bool:
        node = await here.control_plane.api.get(f"/api/v1/nodes/{here.node.name}")
        return bool(node["status"]["nodeInfo"]["bootID"] == here.node.boot_id())

    await eventually("the Node to have the new boot id", told)

    async def again() -> list[int]:
        return here.node.processes(uid)

    assert await eventually("the pod to run again", again) != [pid]


@story
async def test_a_port_on_the_node_is_reached_from_here(here: Bare) -> None:
    port = await here.node.reach(10248)
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as answer:
        assert await answer.text() == "ok"
