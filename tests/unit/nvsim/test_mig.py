"""The life of MIG instances: mode, GPU instances, compute instances, MIG devices, and what of it survives what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml
import pytest

from tests.nvsim.node import Node, SimulatorError
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement

ONE_G, TWO_G, THREE_G = 19, 14, 9


def slice_of(device: Any, profile: int, start: int, size: int, slices: int) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """GPU instance, compute instance and MIG device."""
    instance = calls.create(device, profile, Placement(start, size))
    compute = calls.full_width(instance, slices)
    return instance, compute, pynvml.nvmlComputeInstanceGetInfo(compute).device


# --- mode ---------------------------------------------------------------------------------------------------------


def test_mig_mode_goes_on_and_off_and_makes_old_handles_void(node: Node) -> None:
    del node
    before = calls.gpu()
    assert pynvml.nvmlDeviceGetMigMode(before) == [0, 0]
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(before) == 0
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetGpuInstanceProfileInfo(before, 0)
    assert pynvml.nvmlDeviceSetMigMode(before, 1) == pynvml.NVML_SUCCESS
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetMigMode(before)
    device = calls.gpu()
    assert pynvml.nvmlDeviceGetMigMode(device) == [1, 1]
    assert pynvml.nvmlDeviceGetMaxMigDeviceCount(device) == 7
    slice_of(device, THREE_G, 0, 4, 3)
    pynvml.nvmlDeviceSetMigMode(device, 0)
    pynvml.nvmlDeviceSetMigMode(calls.gpu(), 1)
    assert calls.instances(calls.gpu()) == {}


def test_on_a_busy_gpu_setting_the_mode_succeeds_and_stays_pending(node: Node) -> None:
    node.add_process(0, 4242)
    assert pynvml.nvmlDeviceSetMigMode(calls.gpu(), 1) == pynvml.NVML_ERROR_IN_USE
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [0, 1]
    with pytest.raises(SimulatorError, match="in use"):
        node.reset(0)
    node.end_process(4242)
    node.reset(0)
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [1, 1]


def test_where_only_a_reset_changes_the_mode_it_stays_pending_until_then(node: Node) -> None:
    node.set("mig_reset_required", 1, gpu=0)
    assert pynvml.nvmlDeviceSetMigMode(calls.gpu(), 1) == pynvml.NVML_ERROR_RESET_REQUIRED
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [0, 1]
    node.reset(0)
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [1, 1]


def test_a_board_may_refuse_a_lone_reset(node: Node) -> None:
    node.set("reset_refused", 1, gpu=3)
    with pytest.raises(SimulatorError, match="its board refuses"):
        node.reset(3)


def test_a_reboot_keeps_the_mode_of_an_a100_and_nothing_else(node: Node) -> None:
    boot = node.boot_id
    device = calls.in_mig_mode()
    slice_of(device, THREE_G, 0, 4, 3)
    pynvml.nvmlDeviceSetPowerManagementLimit(calls.gpu(1), 200_000)
    node.reboot()
    assert node.boot_id != boot
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [1, 1]
    assert calls.instances(calls.gpu()) == {}
    assert pynvml.nvmlDeviceGetPowerManagementLimit(calls.gpu(1)) == 400_000


# --- instances ----------------------------------------------------------------------------------------------------


def test_a_slice_is_made_found_and_taken_away(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    instance, compute, mig = slice_of(device, THREE_G, 4, 4, 3)
    info = pynvml.nvmlGpuInstanceGetInfo(instance)
    uuid = pynvml.nvmlDeviceGetUUID(mig)
    assert uuid.startswith("MIG-")
    assert uuid.split("-")[3].startswith("5")
    assert pynvml.nvmlDeviceGetName(mig) == "NVIDIA A100-SXM4-80GB MIG 3g.40gb"
    assert pynvml.nvmlDeviceGetGpuInstanceId(mig) == info.id
    assert pynvml.nvmlDeviceGetComputeInstanceId(mig) == 0
    assert pynvml.nvmlDeviceIsMigDeviceHandle(mig)
    assert not pynvml.nvmlDeviceIsMigDeviceHandle(device)
    attributes = pynvml.nvmlDeviceGetAttributes(mig)
    assert (attributes.gpuInstanceSliceCount, attributes.multiprocessorCount) == (3, 42)
    assert attributes.memorySizeMB == 40192
    parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
    assert pynvml.nvmlDeviceGetUUID(parent) == pynvml.nvmlDeviceGetUUID(device)
    for name in (uuid, f"MIG-{pynvml.nvmlDeviceGetUUID(device)}/{info.id}/0"):
        assert pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByUUID(name)) == uuid
    assert pynvml.nvmlGpuInstanceGetInfo(pynvml.nvmlDeviceGetGpuInstanceById(device, info.id)).id == info.id

    with pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlGpuInstanceDestroy(instance)
    pynvml.nvmlComputeInstanceDestroy(compute)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetUUID(mig)
    pynvml.nvmlGpuInstanceDestroy(instance)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlGpuInstanceGetInfo(instance)
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetGpuInstanceById(device, info.id)


def test_a_placement_that_is_taken_or_that_there_is_not(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    calls.create(device, THREE_G, Placement(4, 4))
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create(device, ONE_G, Placement(5, 1))
    for start, size in ((2, 4), (4, 2), (7, 1)):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            calls.create(device, THREE_G, Placement(start, size))


def test_a_gpu_instance_without_a_compute_instance_holds_its_slices_unseen(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    calls.create(device, THREE_G, Placement(4, 4))
    assert calls.mig_devices(device) == {}
    assert len(calls.instances(device)) == 1
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create(device, TWO_G, Placement(4, 2))


def test_partial_compute_instances_share_a_gpu_instance(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    instance = calls.create(device, THREE_G, Placement(0, 4))
    first = pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    second = pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 0)
    infos = [pynvml.nvmlComputeInstanceGetInfo(one) for one in (first, second)]
    assert [(one.id, one.placement.start, one.placement.size) for one in infos] == [(0, 0, 1), (1, 1, 1)]
    assert pynvml.nvmlDeviceGetName(infos[0].device) == "NVIDIA A100-SXM4-80GB MIG 1c.3g.40gb"
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlGpuInstanceCreateComputeInstance(instance, 2)
    assert len(calls.mig_devices(device)) == 2


def test_mig_devices_are_numbered_by_gpu_instance_and_numbers_may_be_missing(node: Node) -> None:
    node.set("layout", 0, gpu=0)
    device = calls.in_mig_mode()
    for start in (5, 1, 3):
        slice_of(device, ONE_G, start, 1, 1)
    found = calls.mig_devices(device)
    assert [pynvml.nvmlDeviceGetGpuInstanceId(one) for one in found.values()] == [8, 10, 12]
    node.set("hidden_indices", 0b1010, gpu=0)
    assert list(calls.mig_devices(device)) == [0, 2, 4]
    with pytest.raises(pynvml.NVMLError_NotFound):
        pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, 1)


@pytest.mark.parametrize(("policy", "same"), [(0, False), (1, True)], ids=["new", "stable"])
def test_whether_a_slice_made_again_has_its_former_uuid(node: Node, policy: int, *, same: bool) -> None:
    node.set("uuid_policy", policy)
    device = calls.in_mig_mode()
    uuids = []
    for _ in range(2):
        instance, compute, mig = slice_of(device, TWO_G, 2, 2, 2)
        uuids.append(pynvml.nvmlDeviceGetUUID(mig))
        pynvml.nvmlComputeInstanceDestroy(compute)
        pynvml.nvmlGpuInstanceDestroy(instance)
    assert (uuids[0] == uuids[1]) is same


def test_every_slice_of_a_node_has_a_uuid_of_its_own(node: Node) -> None:
    del node
    uuids = set()
    for index in range(8):
        device = calls.in_mig_mode(index)
        for start in range(7):
            uuids.add(pynvml.nvmlDeviceGetUUID(slice_of(device, ONE_G, start, 1, 1)[2]))
    assert len(uuids) == 56


def test_an_old_driver_goes_on_showing_slices_that_are_gone(node: Node) -> None:
    device = calls.in_mig_mode()
    instance, compute, _ = slice_of(device, ONE_G, 0, 1, 1)
    pynvml.nvmlShutdown()
    node.set("stale_enumeration", 1)
    pynvml.nvmlInit()
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)
    [(_, stale)] = calls.mig_devices(calls.gpu()).items()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetUUID(stale)
    pynvml.nvmlShutdown()
    pynvml.nvmlInit()
    assert calls.mig_devices(calls.gpu()) == {}


# --- who uses them ------------------------------------------------------------------------------------------------


def test_a_process_keeps_its_slice_and_no_other(node: Node) -> None:
    device = calls.in_mig_mode()
    instance, compute, mig = slice_of(device, THREE_G, 0, 4, 3)
    other, other_compute, other_mig = slice_of(device, THREE_G, 4, 4, 3)
    gi = pynvml.nvmlGpuInstanceGetInfo(instance).id
    node.add_process(0, 77, gi=gi, ci=0, memory=1 << 30)
    [process] = pynvml.nvmlDeviceGetComputeRunningProcesses(mig)
    assert (process.pid, process.usedGpuMemory, process.gpuInstanceId) == (77, 1 << 30, gi)
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(other_mig) == []
    assert [one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device)] == [77]
    assert pynvml.nvmlDeviceGetMemoryInfo(mig).used - pynvml.nvmlDeviceGetMemoryInfo(other_mig).used == 1 << 30
    with pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlComputeInstanceDestroy(other_compute)
    pynvml.nvmlGpuInstanceDestroy(other)
    node.end_process(77)
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)


def test_compute_instances_are_made_where_they_are_asked_for(node: Node) -> None:
    del node
    instance = calls.create(calls.in_mig_mode(), 5, Placement(0, 4))
    two_slices = 1
    assert calls.compute_placements(instance, two_slices) == [Placement(0, 2), Placement(2, 2)]
    made = calls.create_compute(instance, two_slices, Placement(2, 2))
    info = pynvml.nvmlComputeInstanceGetInfo(made)
    assert (info.placement.start, info.placement.size, info.id) == (2, 2, 0)
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        calls.create_compute(instance, two_slices, Placement(2, 2))
    for nowhere in (Placement(1, 2), Placement(4, 2), Placement(0, 1)):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            calls.create_compute(instance, two_slices, nowhere)
    calls.create_compute(instance, two_slices, Placement(0, 2))


def test_the_unprivileged_may_look_and_not_touch(node: Node) -> None:
    device = calls.in_mig_mode()
    instance = calls.create(device, THREE_G, Placement(0, 4))
    node.set("unprivileged", 1)
    assert pynvml.nvmlGpuInstanceGetInfo(instance).placement.size == 4
    writes: tuple[Callable[[], object], ...] = (
        lambda: pynvml.nvmlGpuInstanceDestroy(instance),
        lambda: calls.create(device, THREE_G, Placement(4, 4)),
        lambda: calls.full_width(instance, 3),
        lambda: pynvml.nvmlDeviceSetMigMode(device, 0),
        lambda: pynvml.nvmlDeviceSetPowerManagementLimit(device, 200_000),
        lambda: pynvml.nvmlDeviceResetGpuLockedClocks(device),
    )
    for write in writes:
        with pytest.raises(pynvml.NVMLError_NoPermission):
            write()


def test_what_mig_makes_unreadable(node: Node) -> None:
    node.set("remapped_corrected", 2, gpu=0)
    device = calls.in_mig_mode()
    assert pynvml.nvmlDeviceGetRemappedRows(device) == (2, 0, 0, 0)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetUtilizationRates(device)
    calls.create(device, THREE_G, Placement(0, 4))
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetRemappedRows(device)
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceGetAttributes(device)
