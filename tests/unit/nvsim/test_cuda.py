"""libcuda.so.1 through the unmodified cuda-bindings: devices, what a process sees of them, contexts, errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pynvml
import pytest

from tests.nvsim.library import driver
from tests.nvsim.node import Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.client import Client

UNAVAILABLE, NO_DEVICE, INVALID_DEVICE, INVALID_CONTEXT, DESTROYED, UNKNOWN = 46, 100, 101, 201, 709, 999
INVALID_VALUE, NOT_INITIALIZED = 1, 3


def uuids(client: Client) -> list[str]:
    """The 16 bytes by which each device is known; nothing where cuInit finds none."""
    if client.code("cuInit", 0) == NO_DEVICE:
        return []
    return [client.ok("cuDeviceGetUuid", number) for number in range(client.ok("cuDeviceGetCount"))]


def digits(uuid: str) -> str:
    """A UUID of NVML's as CUDA has it."""
    return uuid.partition("-")[2].replace("-", "")


def gpu_uuid(index: int) -> str:
    uuid: str = pynvml.nvmlDeviceGetUUID(calls.gpu(index))
    return uuid


def slice_on(index: int, start: int = 0) -> Any:  # noqa: ANN401
    """A MIG device 3g.40gb on a GPU in MIG mode."""
    instance = calls.create(calls.gpu(index), 9, Placement(start, 4))
    return pynvml.nvmlComputeInstanceGetInfo(calls.full_width(instance, 3)).device


def test_cuda_and_nvml_say_the_same_of_a_gpu(node: Node) -> None:
    device = calls.gpu(1)
    with Client(node) as client:
        client.ok("cuInit", 0)
        assert client.ok("cuDriverGetVersion") == pynvml.nvmlSystemGetCudaDriverVersion_v2()
        assert client.ok("cuDeviceGetCount") == 8
        assert client.ok("cuDeviceGetName", 100, 1) == pynvml.nvmlDeviceGetName(device)
        assert client.ok("cuDeviceGetUuid", 1) == digits(gpu_uuid(1))
        assert client.ok("cuDeviceTotalMem", 1) == pynvml.nvmlDeviceGetMemoryInfo(device).total
        assert client.ok("cuDeviceGetPCIBusId", 20, 1) == pynvml.nvmlDeviceGetPciInfo(device).busIdLegacy
        multiprocessors, bus, slot, domain, major, minor = 16, 33, 34, 50, 75, 76
        found = [
            client.ok("cuDeviceGetAttribute", one, 1) for one in (multiprocessors, bus, slot, domain, major, minor)
        ]
        assert found == [108, 0x0F, 0, 0, 8, 0]
        assert client.code("cuDeviceGet", 8) == INVALID_DEVICE


def test_a_mig_device_is_a_device_of_its_own(node: Node) -> None:
    calls.in_mig_mode(2)
    mig = slice_on(2)
    with Client(node, CUDA_VISIBLE_DEVICES=pynvml.nvmlDeviceGetUUID(mig)) as client:
        client.ok("cuInit", 0)
        assert client.ok("cuDeviceGetUuid", 0) == digits(pynvml.nvmlDeviceGetUUID(mig))
        assert client.ok("cuDeviceGetName", 100, 0) == "NVIDIA A100-SXM4-80GB MIG 3g.40gb"
        assert client.ok("cuDeviceTotalMem", 0) == pynvml.nvmlDeviceGetMemoryInfo(mig).total
        assert client.ok("cuDeviceGetAttribute", 16, 0) == pynvml.nvmlDeviceGetAttributes(mig).multiprocessorCount


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("1,0", [1, 0]),
        (" 3 , 5", [3, 5]),
        ("0,7,8,1", [0, 7]),
        ("2,-1,3", [2]),
        ("2,2,3", [2]),
        ("", []),
        ("nonsense", []),
        ("{4},6", [4, 6]),
        ("{4:.10},6", [4, 6]),
        ("GPU-,1", []),
        ("1,MIG-00000000-0000-5000-8000-000000000000,2", [1]),
    ],
)
def test_visible_devices_are_a_list_that_ends_at_the_first_unknown(node: Node, visible: str, seen: list[int]) -> None:
    known = [gpu_uuid(index) for index in range(8)]
    with Client(node, CUDA_VISIBLE_DEVICES=visible.format(*known)) as client:
        assert uuids(client) == [digits(known[index]) for index in seen]


def test_of_mig_devices_a_process_sees_one_and_no_gpu_beside_it(node: Node) -> None:
    calls.in_mig_mode(1)
    calls.in_mig_mode(3)
    first, second = slice_on(3), slice_on(3, start=4)
    by_id = sorted((first, second), key=pynvml.nvmlDeviceGetGpuInstanceId)
    names = [pynvml.nvmlDeviceGetUUID(one) for one in by_id]
    gi = pynvml.nvmlDeviceGetGpuInstanceId(by_id[1])
    seen = {
        None: names[0],
        "3": names[0],
        gpu_uuid(3): names[0],
        names[1]: names[1],
        f"{names[1]},{names[0]}": names[1],
        f"0,2,{names[1]}": names[1],
        f"MIG-{gpu_uuid(3)}/{gi}/0": names[1],
    }
    for visible, expected in seen.items():
        with Client(node, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})) as client:
            assert uuids(client) == [digits(expected)]
    # A GPU in MIG mode without an instance is no device.
    with Client(node, CUDA_VISIBLE_DEVICES="1") as client:
        assert client.code("cuInit", 0) == NO_DEVICE


def test_without_a_driver_there_is_no_device(node: Node) -> None:
    with Client(node, NVSIM_STATE="/nonexistent") as client:
        assert client.code("cuInit", 0) == NO_DEVICE
        assert client.code("cuDeviceGetCount") == NOT_INITIALIZED
    node.set("driver_loaded", 0)
    with Client(node) as client:
        assert client.code("cuInit", 0) == NO_DEVICE
        assert client.ok("cuGetErrorName", NO_DEVICE) == "CUDA_ERROR_NO_DEVICE"
        assert client.ok("cuGetErrorString", NO_DEVICE) == "no CUDA-capable device is detected"
    node.set("driver_loaded", 1)


def test_a_child_made_by_fork_cannot_use_cuda(node: Node) -> None:
    with Client(node) as client:
        client.begin()
        assert client.code("in child", "cuInit", 0) == NOT_INITIALIZED
        assert client.code("in child", "cuDeviceGetCount") == NOT_INITIALIZED
        assert client.ok("own process", 0) == ([client.pid], client.pid)
        assert [one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(calls.gpu())] == [client.pid]


# --- contexts -----------------------------------------------------------------------------------------------------


def test_a_primary_context_is_counted(node: Node) -> None:
    with Client(node) as client:
        client.ok("cuInit", 0)
        assert client.code("cuCtxSynchronize") == INVALID_CONTEXT
        assert client.code("cuDevicePrimaryCtxRelease", 0) == INVALID_CONTEXT
        context = client.ok("cuDevicePrimaryCtxRetain", 0)
        assert client.ok("cuDevicePrimaryCtxRetain", 0) == context
        client.ok("cuCtxSetCurrent", context)
        assert client.ok("cuCtxGetCurrent") == context
        client.ok("cuDevicePrimaryCtxRelease", 0)
        client.ok("cuCtxSynchronize")
        client.ok("cuDevicePrimaryCtxRelease", 0)
        assert client.code("cuCtxSynchronize") == DESTROYED
        assert client.code("cuCtxSetCurrent", context) == DESTROYED
        assert client.ok("cuDevicePrimaryCtxRetain", 0) != context
        assert client.code("cuCtxSetCurrent", 12345) == INVALID_CONTEXT


EXCLUSIVE, PROHIBITED = 3, 2


def test_compute_modes_and_a_drain_keep_contexts_away(node: Node) -> None:
    with Client(node) as first, Client(node) as second:
        first.begin()
        second.ok("cuInit", 0)
        for field, value in (("compute_mode", EXCLUSIVE), ("compute_mode", PROHIBITED), ("draining", 1)):
            node.set(field, value, gpu=0)
            assert second.code("cuDevicePrimaryCtxRetain", 0) == UNAVAILABLE
            node.set(field, 0, gpu=0)
        second.ok("cuDevicePrimaryCtxRetain", 0)
        node.set("compute_mode", EXCLUSIVE, gpu=1)
        second.ok("cuDevicePrimaryCtxRetain", 1)


def test_a_lost_gpu_fails_whom_it_leaves_and_is_no_device_for_others(node: Node) -> None:
    with Client(node) as inside, Client(node) as outside:
        inside.begin()
        outside.ok("cuInit", 0)
        node.lose(0)
        assert inside.code("cuMemGetInfo") == UNKNOWN
        assert outside.code("cuDevicePrimaryCtxRetain", 0) == UNKNOWN
        outside.ok("cuDevicePrimaryCtxRetain", 1)
    with Client(node) as later:
        assert len(uuids(later)) == 7
    with Client(node, CUDA_VISIBLE_DEVICES="0") as later:
        assert later.code("cuInit", 0) == NO_DEVICE


def test_no_context_outlives_a_reboot_and_no_device_its_instance(node: Node) -> None:
    calls.in_mig_mode(0)
    mig = slice_on(0)
    with Client(node, CUDA_VISIBLE_DEVICES="0") as early, Client(node, CUDA_VISIBLE_DEVICES="1") as late:
        early.ok("cuInit", 0)
        late.begin()
        instance = pynvml.nvmlDeviceGetGpuInstanceById(calls.gpu(), pynvml.nvmlDeviceGetGpuInstanceId(mig))
        pynvml.nvmlComputeInstanceDestroy(pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, 0))
        assert early.code("cuDevicePrimaryCtxRetain", 0) == INVALID_DEVICE
        node.reboot()
        assert late.code("cuMemGetInfo") == UNKNOWN
        assert calls.pids(calls.gpu(1)) == []


# --- faults -------------------------------------------------------------------------------------------------------


def test_cuda_calls_suffer_faults_of_their_own(node: Node) -> None:
    calls.in_mig_mode(1)
    mig = slice_on(1)
    gi = pynvml.nvmlDeviceGetGpuInstanceId(mig)
    with Client(node, CUDA_VISIBLE_DEVICES="1") as client, Client(node, CUDA_VISIBLE_DEVICES="0") as other:
        client.begin()
        other.begin()
        with node.fault("cuMemGetInfo_v2", gpu=1, gi=gi, result=214, after=1, times=1) as fault:
            assert [client.code("cuMemGetInfo") for _ in range(3)] == [0, 214, 0]
            assert other.code("cuMemGetInfo") == 0
            assert fault.seen == 2
        with node.fault("cu*", gpu=0, result=719):
            assert other.code("cuMemAlloc", 4) == 719
            assert client.code("cuCtxSynchronize") == 0
        with node.fault("*", result=pynvml.NVML_ERROR_UNKNOWN):
            assert client.code("cuMemGetInfo") == 0


def test_a_call_that_hangs_can_be_killed_and_holds_up_nobody(node: Node) -> None:
    with Client(node) as hung, Client(node) as other, node.fault("cuMemsetD8_v2", delay_ms=600_000, times=1) as fault:
        pointer, size = hung.begin().everything()
        hung.send("cuMemsetD8", pointer, 0, size)
        while not fault.seen:
            time.sleep(0.001)
        other.begin(1)
        hung.kill()
        assert calls.pids(calls.gpu()) == []


def test_calls_take_the_time_that_they_are_said_to(node: Node) -> None:
    calls.in_mig_mode()
    slice_on(0)
    node.times(context=200, memset_gb_s=100, copy_gb_s=0.01)
    with Client(node) as client:
        assert seconds(client.begin) >= 0.2
        pointer, _ = client.everything()
        # Half of the bandwidth: 50 GB/s within, 5 MB/s from and to the host.
        assert seconds(lambda: client.ok("cuMemsetD32", pointer, 7, 10**10 // 4)) >= 0.2
        assert seconds(lambda: client.read(pointer, 10**6)) >= 0.2


def seconds(call: Callable[[], object]) -> float:
    """How long a call took."""
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def test_an_older_driver_lacks_a_function_of_cuda(node: Node) -> None:
    older = driver(without=("cuMemsetD32_v2",))
    with Client(node, LD_LIBRARY_PATH=str(older)) as client:
        client.begin()
        pointer = client.ok("cuMemAlloc", 64)
        client.ok("cuMemsetD8", pointer, 1, 64)
        client.send("cuMemsetD32", pointer, 1, 16)
        assert client.answer() == [None]  # cuda-bindings raises, which ends the program.
