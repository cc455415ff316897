"""Whether somebody else hands out the GPUs of the node. Pure.

A GPU has one owner. NVIDIA's device plugin, mig-manager and DRA driver would give a tenant's GPU to any pod, or destroy
its instances; NVIDIA's container runtime as the default one gives all GPUs to any container that sets a variable. Where
one of them is at work nothing is planned on the node, and the sentences say how to end it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

from gpu_tenancy.agent.runtime import DefaultRuntime

MIG_MANAGER: Final = "nvidia.com/gpu.deploy.mig-manager"
MIG_CONFIG: Final = "nvidia.com/mig.config"
NVIDIA_DRA: Final = "gpu.nvidia.com"
DEVICE_PLUGIN: Final = ("nvidia.com/gpu", "nvidia.com/mig-")
LEGACY_RUNTIME: Final = "nvidia-container-runtime"


def conflicts(
    labels: Mapping[str, str],
    allocatable: Mapping[str, str],
    plugins: Collection[str],
    runtime: DefaultRuntime | None,
) -> Iterator[str]:
    """Why nothing may be planned on the node, a sentence for each cause.

    labels, allocatable: of the Node. plugins: names of the DRA drivers registered with its kubelet. runtime: the
    default of its container runtime, where that is known.
    """
    offered = sorted(name for name, count in allocatable.items() if name.startswith(DEVICE_PLUGIN) and count != "0")
    if offered:
        yield f"NVIDIA's device plugin offers {', '.join(offered)} on this node; keep it off this node"
    if labels.get(MIG_MANAGER) == "true" and MIG_CONFIG in labels:
        yield f"NVIDIA's mig-manager partitions the GPUs of this node; label the node {MIG_MANAGER}=false"
    if any(name == NVIDIA_DRA or name.startswith(f"{NVIDIA_DRA}-") for name in plugins):
        yield f"NVIDIA's DRA driver {NVIDIA_DRA} is registered on this node; remove its DaemonSet from it"
    if runtime is not None and _is_nvidias(runtime):
        yield (
            f"the default container runtime is {runtime.name} ({runtime.binary or LEGACY_RUNTIME}): any pod that sets "
            f"NVIDIA_VISIBLE_DEVICES would see all GPUs; make runc the default in the runtime's configuration"
        )


def _is_nvidias(runtime: DefaultRuntime) -> bool:
    """NVIDIA's runtime in any of its modes; its variants have a suffix, `.legacy` for one."""
    return any(name.startswith(LEGACY_RUNTIME) for name in (runtime.name, runtime.binary.rsplit("/", 1)[-1]))
