"""A process with a CUDA context is one of its GPU's processes, for exactly as long as it lives."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.nvsim.node import Node, SimulatorError
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.client import Client

CAP_SYS_ADMIN = 21


def may_make_namespaces() -> bool:
    """Whether this process has CAP_SYS_ADMIN."""
    status = Path("/proc/self/status").read_text()
    [effective] = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")]
    return bool(int(effective, 16) >> CAP_SYS_ADMIN & 1)


needs_namespaces = pytest.mark.skipif(
    not may_make_namespaces(), reason="this process may not make namespaces; run as root"
)


def mig_on(index: int) -> tuple[Any, Any, Any]:
    """GPU instance, compute instance and MIG device on a GPU in MIG mode."""
    instance = calls.create(calls.gpu(index), 9, Placement(0, 4))
    compute = calls.full_width(instance, 3)
    return instance, compute, pynvml.nvmlComputeInstanceGetInfo(compute).device


def test_a_context_makes_a_process_and_its_end_unmakes_it(node: Node) -> None:
    with Client(node) as client, Client(node) as other:
        client.ok("cuInit", 0)
        assert calls.pids(calls.gpu()) == []
        client.begin()
        other.begin(1)
        assert calls.pids(calls.gpu()) == [client.pid]
        before = pynvml.nvmlDeviceGetComputeRunningProcesses(calls.gpu())[0].usedGpuMemory
        client.ok("cuMemAlloc", 1 << 30)
        [process] = pynvml.nvmlDeviceGetComputeRunningProcesses(calls.gpu())
        assert process.usedGpuMemory - before == 1 << 30
        client.ok("cuDevicePrimaryCtxRelease", 0)
        assert calls.pids(calls.gpu()) == []
        assert calls.pids(calls.gpu(1)) == [other.pid]


def test_one_that_is_killed_is_gone_at_once(node: Node) -> None:
    for _ in range(5):
        with Client(node) as client:
            client.begin().ok("cuMemAlloc", 1 << 30)
            assert calls.pids(calls.gpu()) == [client.pid]
            client.kill()
            assert calls.pids(calls.gpu()) == []
            assert pynvml.nvmlDeviceGetMemoryInfo(calls.gpu(), version=0x02000028).used == 0


def test_one_that_is_stopped_is_still_there(node: Node) -> None:
    with Client(node) as client:
        client.begin()
        client.signal(signal.SIGSTOP)
        assert calls.pids(calls.gpu()) == [client.pid]


def test_a_process_sees_itself(node: Node) -> None:
    with Client(node) as client:
        client.begin()
        assert client.ok("own process", 0) == ([client.pid], client.pid)
        # Nor does its NVML's end make it disappear.
        assert calls.pids(calls.gpu()) == [client.pid]


def test_a_process_on_a_slice_is_one_of_the_slice_and_of_its_gpu(node: Node) -> None:
    calls.in_mig_mode()
    *_, mig = mig_on(0)
    other = pynvml.nvmlComputeInstanceGetInfo(
        calls.full_width(calls.create(calls.gpu(), 19, Placement(6, 1)), 1)
    ).device
    with Client(node, CUDA_VISIBLE_DEVICES=pynvml.nvmlDeviceGetUUID(mig)) as client:
        client.begin()
        assert calls.pids(mig) == calls.pids(calls.gpu()) == [client.pid]
        assert calls.pids(other) == []
        [process] = pynvml.nvmlDeviceGetComputeRunningProcesses(mig)
        assert process.gpuInstanceId == pynvml.nvmlDeviceGetGpuInstanceId(mig)
        assert process.computeInstanceId == 0


def test_what_is_in_use_is_neither_destroyed_nor_reset_nor_changed(node: Node) -> None:
    calls.in_mig_mode(0)
    instance, compute, mig = mig_on(0)
    with Client(node, CUDA_VISIBLE_DEVICES=pynvml.nvmlDeviceGetUUID(mig)) as client:
        client.begin()
        for handle, destroy in (
            (compute, pynvml.nvmlComputeInstanceDestroy),
            (instance, pynvml.nvmlGpuInstanceDestroy),
        ):
            with pytest.raises(pynvml.NVMLError_InUse):
                destroy(handle)
        assert pynvml.nvmlDeviceSetMigMode(calls.gpu(), 0) == pynvml.NVML_ERROR_IN_USE
        with pytest.raises(SimulatorError, match="in use"):
            node.reset(0)
        with pytest.raises(pynvml.NVMLError_InUse):
            pynvml.nvmlDeviceModifyDrainState(pynvml.nvmlDeviceGetPciInfo(calls.gpu()), 1)
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)
    node.reset(0)


WATCH = """
import pynvml
pynvml.nvmlInit()
print("ready", flush=True)
input()
pynvml.nvmlShutdown()
print("done", flush=True)
input()
"""


def test_where_watching_is_a_use_a_process_with_nvml_keeps_a_gpu_from_changing(node: Node) -> None:
    with Client(node, program=WATCH) as watcher:
        assert watcher.line() == "ready"
        node.reset(0)
        node.set("nvml_is_use", 1)
        assert calls.pids(calls.gpu()) == []
        with pytest.raises(SimulatorError, match="in use"):
            node.reset(0)
        assert pynvml.nvmlDeviceSetMigMode(calls.gpu(), 1) == pynvml.NVML_ERROR_IN_USE
        assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [0, 1]
        watcher.send("")
        assert watcher.line() == "done"
        # Oneself does not count.
        node.reset(0)
        assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [1, 1]


def test_to_control_another_node_meanwhile_ends_no_watch(node: Node, tmp_path: Path) -> None:
    other = Node.create(tmp_path / "other")
    other.set("nvml_is_use", 1)
    script = f"""
import sys
from pathlib import Path
import pynvml
from tests.nvsim.node import Node
one, other = Node(Path({str(other.path)!r})), Node(Path({str(node.path)!r}))
pynvml.nvmlInit()
for each in (one, other, one, other):
    each.get("celsius", 0)
print("ready", flush=True); input()
"""
    with Client(other, program=script) as watcher:
        assert watcher.line() == "ready"
        with pytest.raises(SimulatorError, match="in use"):
            other.reset(0)


@needs_namespaces
def test_pids_are_those_of_whoever_asks(node: Node) -> None:
    own_pids = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Client(node, inside=own_pids) as container, Client(node) as host:
        container.begin()
        host.begin()
        # In the container: itself, as number 1, and not the process of the host.
        assert container.ok("own process", 0) == ([1], 1)
        [inner] = [pid for pid in calls.pids(calls.gpu()) if pid != host.pid]
        assert f"NSpid:\t{inner}\t1" in Path(f"/proc/{inner}/status").read_text()
        os.kill(inner, signal.SIGKILL)
        while Path(f"/proc/{inner}").exists():
            time.sleep(0.001)
        assert calls.pids(calls.gpu()) == [host.pid]


@needs_namespaces
def test_a_process_of_the_same_pid_is_another(node: Node) -> None:
    own_pids = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Client(node, inside=own_pids) as first:
        first.begin().ok("cuMemAlloc", 1 << 30)
    while calls.pids(calls.gpu()):
        time.sleep(0.001)
    with Client(node, inside=own_pids) as second:
        second.ok("cuInit", 0)
        assert second.ok("own process", 0) == ([], 1)


def test_a_process_that_controls_nodes_holds_no_file_of_theirs_open(node: Node, tmp_path: Path) -> None:
    del node
    Node.create(tmp_path / "first").set("celsius", 40, gpu=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        Node.create(tmp_path / f"node-{number}").set("celsius", 40, gpu=0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_to_turn_nvml_to_another_node_ends_no_context(node: Node, tmp_path: Path) -> None:
    """A process' locks on a file end when it closes any descriptor of it: NVML must not close this one."""
    other = Node.create(tmp_path / "other")
    script = f"""
import os, pynvml
from cuda.bindings import driver
driver.cuInit(0); driver.cuDevicePrimaryCtxRetain(0)
pynvml.nvmlInit(); pynvml.nvmlShutdown()
os.environ["NVSIM_STATE"] = {str(other.path)!r}
pynvml.nvmlInit(); pynvml.nvmlShutdown()
print("ready", flush=True); input()
"""
    with Client(node, program=script) as client:
        assert client.line() == "ready"
        assert calls.pids(calls.gpu()) == [client.pid]


def test_two_libraries_of_one_process_exclude_each_other(node: Node) -> None:
    """NVML and CUDA each map the state for themselves: threads of both must never write at once."""
    script = """
import threading, pynvml
from cuda.bindings import driver
driver.cuInit(0); driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(1)

def limits():
    for number in range(3000):
        pynvml.nvmlDeviceSetPowerManagementLimit(device, 100_000 + number)

threads = [threading.Thread(target=limits) for _ in range(2)]
for thread in threads: thread.start()
for number in range(3000):
    code, pointer = driver.cuMemAlloc(4)
    driver.cuMemsetD32(pointer, number, 1)
    driver.cuMemFree(pointer)
for thread in threads: thread.join()
code, pointer = driver.cuMemAlloc(4)
buffer = bytearray(4)
driver.cuMemcpyDtoH(buffer, pointer, 4)
print(int.from_bytes(buffer, "little"), pynvml.nvmlDeviceGetPowerManagementLimit(device), flush=True)
"""
    with Client(node, program=script) as client:
        assert client.line() == "2999 102999"
