"""NVML's calls as the agent uses them, one idea each. Blocking; every one may raise NVMLError, but for `sentences`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import byref, c_uint
from typing import Any, Final

import pynvml

from gpu_tenancy.agent.gpus import GpuError, GpuLost, InsufficientResources, InUse, ResetRequired
from gpu_tenancy.api.node import GpuMode

CORES_PER_MULTIPROCESSOR: Final = {(7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}
"""By compute capability, the minor number included: 8.0 and 8.6 differ (CUDA C++ Programming Guide, 16.1)."""
COMPUTE_PROFILES: Final = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
"""NVML_COMPUTE_INSTANCE_PROFILE_* by compute slices."""


@contextmanager
def sentences(subject: str) -> Iterator[None]:
    """NVML's errors as ours, each a sentence with what to do."""
    try:
        yield
    except pynvml.NVMLError_ResetRequired as error:
        raise ResetRequired(f"{subject}: {error}; reset the GPU or reboot the node") from None
    except pynvml.NVMLError_GpuIsLost as error:
        raise GpuLost(f"{subject}: {error}; reset the GPU or reboot the node") from None
    except pynvml.NVMLError_InUse as error:
        raise InUse(f"{subject}: {error}; stop what uses it, DCGM among others, or try again") from None
    except pynvml.NVMLError_InsufficientResources as error:
        raise InsufficientResources(f"{subject}: {error}; list what is there and try again") from None
    except pynvml.NVMLError_NoPermission as error:
        raise GpuError(f"{subject}: {error}; the agent must run as root in a privileged pod") from None
    except pynvml.NVMLError as error:
        raise GpuError(f"{subject}: {error}; it is tried again") from None


def gpu_handle(uuid: str) -> Any:  # noqa: ANN401
    """Handle of a GPU, fetched anew each time: a change of mode makes older ones void."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError_NotFound:
        raise GpuLost(f"there is no GPU {uuid} on this node") from None


def device_handle(uuid: str) -> Any | None:  # noqa: ANN401
    """Handle of a GPU or a MIG device; None for a MIG device that is gone, as they go, while GPUs stay."""
    if uuid.startswith("GPU-"):
        return gpu_handle(uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError_NotFound:
        return None


def mode_of(device: Any) -> GpuMode:  # noqa: ANN401
    """Whether the GPU is in MIG mode now."""
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(device)
    except pynvml.NVMLError_NotSupported:
        return GpuMode.WHOLE  # No MIG on this model.
    return GpuMode.MIG if current else GpuMode.WHOLE


def multiprocessors_of(device: Any) -> int:  # noqa: ANN401
    """Its streaming multiprocessors, which NVML tells only by their cores."""
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device))
    cores: int = pynvml.nvmlDeviceGetNumGpuCores(device)
    return cores // CORES_PER_MULTIPROCESSOR.get(capability, 128)


def profiles_of(device: Any) -> Iterator[Any]:  # noqa: ANN401
    """GPU instance profiles that the GPU has."""
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            yield pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, number)
        except pynvml.NVMLError_NotSupported:
            continue
        except pynvml.NVMLError_InvalidArgument:
            if number == 0:
                raise  # Every driver knows the first: it is the handle that is stale.
            break  # An older driver knows fewer.


def profile_name(info: Any) -> str:  # noqa: ANN401
    """Name of a profile on that model, e.g. ``3g.40gb``."""
    name: str = info.name
    return name.removeprefix("MIG ")


def placements_of(device: Any, info: Any) -> Sequence[Any]:  # noqa: ANN401
    """All legal placements of a profile, not the free ones."""
    count = c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, info.id, None, byref(count))
    found = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, info.id, found, byref(count))
    return tuple(found[: count.value])


def gpu_instances_of(device: Any, info: Any) -> Sequence[Any]:  # noqa: ANN401
    """Handles of the GPU instances of one profile."""
    found, count = (pynvml.c_nvmlGpuInstance_t * info.instanceCount)(), c_uint()
    pynvml.nvmlDeviceGetGpuInstances(device, info.id, found, byref(count))
    return tuple(found[: count.value])


def uuid_of(compute: Any) -> str:  # noqa: ANN401
    """UUID of the MIG device that a compute instance makes."""
    uuid: str = pynvml.nvmlDeviceGetUUID(pynvml.nvmlComputeInstanceGetInfo(compute).device)
    return uuid


def compute_instance_of(instance: Any, slices: int, profile_of: Callable[[int], Any]) -> tuple[Any | None, bool]:  # noqa: ANN401
    """The compute instance that has all of a GPU instance, or else the first of those that share it, and which it is.

    The project makes none that share; somebody else's are told of, so that their processes are seen. `profile_of`:
    gives the profile NVML_COMPUTE_INSTANCE_PROFILE_* of a number.
    """
    full = COMPUTE_PROFILES[slices]
    found = compute_instances_of(instance, profile_of(full))
    if found:
        return found[0], True
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        with suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            if number != full and (found := compute_instances_of(instance, profile_of(number))):
                return found[0], False
    return None, False


def compute_instances_of(instance: Any, info: Any) -> Sequence[Any]:  # noqa: ANN401
    """Compute instances of one profile."""
    found, count = (pynvml.c_nvmlComputeInstance_t * info.instanceCount)(), c_uint()
    pynvml.nvmlGpuInstanceGetComputeInstances(instance, info.id, found, byref(count))
    return tuple(found[: count.value])


def where_known(ask: Callable[..., Any], *arguments: Any) -> Any | None:  # noqa: ANN401
    """The answer to a question; None where GPU or driver do not know it."""
    try:
        return ask(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_InvalidArgument):
        return None
