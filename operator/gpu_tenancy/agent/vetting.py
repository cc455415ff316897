"""Whether a GPU is fit to serve, from what it says of itself. Pure.

Sources: NVIDIA GPU Memory Error Management (row remapping), NVML API reference (recovery action, power limits).
"""

from __future__ import annotations

from gpu_tenancy.agent.gpus import Vitals


def asks_for_reset(vitals: Vitals) -> bool:
    """Whether a reset would mend what is wrong."""
    return bool(vitals.remap_pending) or "reset" in vitals.recovery_action


def objection(vitals: Vitals) -> str | None:
    """Why the GPU must not serve anybody, as a clause with the remedy; None where it may. What cannot be read is no
    objection: rows cannot while the GPU has MIG instances."""
    if vitals.remap_failed:
        return "a memory row could not be remapped; exchange the GPU"
    if vitals.remap_pending:
        return "a memory row waits to be remapped; reset the GPU while nobody is on it"
    if vitals.recovery_action:
        return f"the driver asks to {vitals.recovery_action}"
    limit, default = vitals.power_limit_mw, vitals.default_power_limit_mw
    if limit is not None and default is not None and limit < default:
        return f"its power limit is {limit // 1000} W of {default // 1000} W; look what sets it, DCGM or nvidia-smi -pl"
    width, most = vitals.pcie_width, vitals.max_pcie_width
    if width is not None and most is not None and width < most:
        return f"its PCIe link runs on {width} of {most} lanes; reseat the GPU"
    return None
