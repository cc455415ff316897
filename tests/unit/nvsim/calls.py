"""The NVML calls that tests of the simulator make all the time, as the agent will make them."""

from __future__ import annotations

from ctypes import byref, c_uint
from typing import Any, NamedTuple

import pynvml


class Placement(NamedTuple):
    """Memory slices of a GPU instance."""

    start: int
    size: int


def gpu(index: int = 0) -> Any:  # noqa: ANN401  (nvidia-ml-py has no types)
    """Handle of a GPU."""
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def in_mig_mode(index: int = 0) -> Any:  # noqa: ANN401
    """Handle of a GPU whose MIG mode was switched on."""
    assert pynvml.nvmlDeviceSetMigMode(gpu(index), 1) == 0
    return gpu(index)


def profiles(device: Any) -> dict[int, Any]:  # noqa: ANN401
    """What nvmlDeviceGetGpuInstanceProfileInfo says, by the number it was asked for."""
    found = {}
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            found[number] = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, number)
        except pynvml.NVMLError_NotSupported:
            continue
    return found


def placements(device: Any, profile: int) -> list[Placement]:  # noqa: ANN401
    """All legal placements of a profile by its id."""
    count = c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, None, byref(count))
    found = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, found, byref(count))
    return [Placement(one.start, one.size) for one in found]


def create(device: Any, profile: int, placement: Placement) -> Any:  # noqa: ANN401
    """A GPU instance at exactly that placement."""
    where = pynvml.c_nvmlGpuInstancePlacement_t()
    where.start, where.size = placement
    return pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, profile, byref(where))


def compute_placements(instance: Any, number: int) -> list[Placement]:  # noqa: ANN401
    """All legal placements of a compute instance profile in a GPU instance."""
    count = c_uint()
    pynvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(instance, number, None, byref(count))
    found = (pynvml.c_nvmlComputeInstancePlacement_t * count.value)()
    pynvml.nvmlGpuInstanceGetComputeInstancePossiblePlacements(instance, number, found, byref(count))
    return [Placement(one.start, one.size) for one in found]


def create_compute(instance: Any, number: int, placement: Placement) -> Any:  # noqa: ANN401
    """A compute instance at exactly that placement."""
    where = pynvml.c_nvmlComputeInstancePlacement_t()
    where.start, where.size = placement
    return pynvml.nvmlGpuInstanceCreateComputeInstanceWithPlacement(instance, number, byref(where))


def instances(device: Any) -> dict[int, Any]:  # noqa: ANN401
    """GPU instances by id, found by walking the profiles."""
    found: dict[int, Any] = {}
    for info in profiles(device).values():
        handles = (pynvml.c_nvmlGpuInstance_t * info.instanceCount)()
        count = c_uint()
        pynvml.nvmlDeviceGetGpuInstances(device, info.id, handles, byref(count))
        found |= {pynvml.nvmlGpuInstanceGetInfo(one).id: one for one in handles[: count.value]}
    return found


def mig_devices(device: Any) -> dict[int, Any]:  # noqa: ANN401
    """MIG devices by index."""
    found = {}
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            found[index] = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
        except pynvml.NVMLError_NotFound:
            continue
    return found


def full_width(instance: Any, slices: int) -> Any:  # noqa: ANN401
    """The compute instance that has all of a GPU instance."""
    numbers = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
    return pynvml.nvmlGpuInstanceCreateComputeInstance(instance, numbers[slices])


def pids(device: Any) -> list[int]:  # noqa: ANN401
    """Processes that compute on a GPU or a MIG device."""
    return sorted(one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(device))
