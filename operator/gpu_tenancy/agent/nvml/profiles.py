"""What profiles the GPUs of a node have, each asked of the driver once.

A driver answers the same about profiles as long as it is loaded and the GPU stays in its mode: with a GPU of seven
slices that is every third call of a look at its instances. Whoever changes the mode or resets has them forgotten.
Blocking; what is asked may raise NVMLError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pynvml

from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.nvml.calls import profiles_of


class Profiles:
    """The profiles of GPU instances, by GPU, and of the compute instances in them. Each GPU is asked about in one
    thread at a time."""

    def __init__(self) -> None:
        self._profiles: dict[str, Sequence[Any]] = {}
        self._shapes: dict[str, dict[tuple[int, int], Any]] = {}

    def of_gpu(self, gpu: str, device: Any) -> Sequence[Any]:  # noqa: ANN401  (pynvml is untyped)
        """GPU instance profiles of the GPU with this UUID and this handle."""
        found = self._profiles.get(gpu, ())
        if not found and (found := tuple(profiles_of(device))):
            self._profiles[gpu] = found
        return found

    def of_instance(self, gpu: str, device: Any, instance: Any) -> Any:  # noqa: ANN401
        """Profile of a GPU instance."""
        number = pynvml.nvmlGpuInstanceGetInfo(instance).profileId
        found = next((one for one in self.of_gpu(gpu, device) if one.id == number), None)
        if found is None:
            self.forget(gpu)
            raise GpuError(f"a GPU instance has profile {number}, which its GPU does not list; update NVIDIA's driver")
        return found

    def of_compute_instance(self, gpu: str, profile: Any, instance: Any, number: int) -> Any:  # noqa: ANN401
        """The profile NVML_COMPUTE_INSTANCE_PROFILE_* of that number, in a GPU instance of that profile."""
        shapes, key = self._shapes.setdefault(gpu, {}), (profile.id, number)
        if key not in shapes:
            shapes[key] = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, number, 0)
        return shapes[key]

    def forget(self, gpu: str) -> None:
        """The GPU may have others from now on."""
        self._profiles.pop(gpu, None)
        self._shapes.pop(gpu, None)

    def forget_all(self) -> None:
        """The driver begins anew."""
        self._profiles.clear()
        self._shapes.clear()
