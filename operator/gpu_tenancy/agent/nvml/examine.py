"""What a GPU is examined for between two holders, what it measures, and which of its settings go back. Blocking.

Sources: NVML API reference; NVIDIA GPU Memory Error Management.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pynvml

from gpu_tenancy.agent.gpus import Telemetry, Vitals
from gpu_tenancy.agent.nvml.calls import device_handle, gpu_handle, sentences, where_known

RESET_ASKED: Final = 1
REBOOT_ASKED: Final = 2
RECOVERY_ACTIONS: Final = {
    0: "",
    RESET_ASKED: "reset the GPU",
    REBOOT_ASKED: "reboot the node",
    3: "drain the GPU and its NVLink peers",
    4: "drain the GPU and reset it",
}
"""nvmlDeviceGpuRecoveryAction_t."""


def restore(gpu: str) -> Sequence[str]:
    """Put settings of a GPU back that a holder may have been given: what a later one must not inherit."""
    changes = []
    with sentences(f"settings of GPU {gpu}"):
        device = gpu_handle(gpu)
        limit, default = _limits(device)
        if limit is not None and default is not None and limit != default:
            pynvml.nvmlDeviceSetPowerManagementLimit(device, default)
            changes.append(f"power limit from {limit // 1000} to {default // 1000} W")
        mode = pynvml.nvmlDeviceGetComputeMode(device)
        if mode != pynvml.NVML_COMPUTEMODE_DEFAULT:
            pynvml.nvmlDeviceSetComputeMode(device, pynvml.NVML_COMPUTEMODE_DEFAULT)
            changes.append(f"compute mode from {mode} to the default")
        # NVML does not say whether clocks are locked: they are unlocked in any case.
        for unlock in (
            pynvml.nvmlDeviceResetGpuLockedClocks,
            pynvml.nvmlDeviceResetMemoryLockedClocks,
            pynvml.nvmlDeviceResetApplicationsClocks,
        ):
            where_known(unlock, device)
        if where_known(pynvml.nvmlDeviceGetPersistenceMode, device) == pynvml.NVML_FEATURE_DISABLED:
            pynvml.nvmlDeviceSetPersistenceMode(device, pynvml.NVML_FEATURE_ENABLED)
            changes.append("persistence mode on")
    return changes


def vitals(gpu: str) -> Vitals:
    """What the GPU says of itself; what it does not tell is None."""
    with sentences(f"GPU {gpu}"):
        device = gpu_handle(gpu)
        limit, default = _limits(device)
        remapped = where_known(pynvml.nvmlDeviceGetRemappedRows, device)
        return Vitals(
            ecc_uncorrected=where_known(
                pynvml.nvmlDeviceGetTotalEccErrors,
                device,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
            remap_pending=bool(remapped[2]) if remapped else None,
            remap_failed=bool(remapped[3]) if remapped else None,
            recovery_action=_in_words(recovery_action(device)),
            power_limit_mw=limit,
            default_power_limit_mw=default,
            pcie_width=where_known(pynvml.nvmlDeviceGetCurrPcieLinkWidth, device),
            max_pcie_width=where_known(pynvml.nvmlDeviceGetMaxPcieLinkWidth, device),
            driver=pynvml.nvmlSystemGetDriverVersion(),
            vbios=where_known(pynvml.nvmlDeviceGetVbiosVersion, device) or "",
        )


def telemetry(gpu: str, devices: Sequence[str]) -> Telemetry:
    """What the GPU measures. `devices`: UUIDs of its MIG devices; power and energy are known of the GPU alone."""
    with sentences(f"GPU {gpu}"):
        device = gpu_handle(gpu)
        handles = {one: handle for one in devices or [gpu] if (handle := device_handle(one)) is not None}
        memory = {one: where_known(pynvml.nvmlDeviceGetMemoryInfo, handle) for one, handle in handles.items()}
        return Telemetry(
            power_mw=where_known(pynvml.nvmlDeviceGetPowerUsage, device),
            energy_mj=where_known(pynvml.nvmlDeviceGetTotalEnergyConsumption, device),
            celsius=where_known(pynvml.nvmlDeviceGetTemperature, device, pynvml.NVML_TEMPERATURE_GPU),
            memory_used={one: int(info.used) for one, info in memory.items() if info is not None},
        )


def _limits(device: Any) -> tuple[int | None, int | None]:  # noqa: ANN401
    """The power limit that was set and the default one in mW; None where the GPU has none. The enforced one may be
    lower still, by the chassis' or the site's own limits, which are nobody's tuning."""
    return (
        where_known(pynvml.nvmlDeviceGetPowerManagementLimit, device),
        where_known(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, device),
    )


def recovery_action(device: Any) -> int:  # noqa: ANN401
    """What the driver asks for, as nvmlDeviceGpuRecoveryAction_t; 0 where nothing, and of older drivers, which do not
    say."""
    fields = where_known(pynvml.nvmlDeviceGetFieldValues, device, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not fields or fields[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return 0
    return int(fields[0].value.uiVal)


def _in_words(action: int) -> str:
    return RECOVERY_ACTIONS.get(action, f"do what its recovery action {action} means")
