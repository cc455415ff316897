"""Whether a GPU is fit to serve, from what it says of itself. Pure.

Sources: NVIDIA GPU Memory Error Management (row remapping), NVML API reference (recovery action, power limits).
"""

from __future__ import annotations

from gpu_tenancy.agent.gpus import Vitals
from gpu_tenancy.agent.situation import Counters


def asks_for_reset(vitals: Vitals, before: Counters | None = None) -> bool:
    """Whether a reset would mend what is wrong."""
    return bool(vitals.remap_pending) or "reset" in vitals.recovery_action or bool(_new_errors(vitals, before))


def objection(vitals: Vitals, before: Counters | None = None) -> str | None:
    """Why the GPU must not serve anybody, as a clause with the remedy; None where it may.

    before: what it had counted when it was last examined, where nothing has been done about it since. What cannot be
    read is no objection: rows cannot while the GPU has MIG instances.
    """
    if vitals.remap_failed:
        return "a memory row could not be remapped; exchange the GPU"
    if vitals.remap_pending:
        return "a memory row waits to be remapped; reset the GPU while nobody is on it"
    if errors := _new_errors(vitals, before):
        return f"it has had {errors} uncorrectable memory errors since it was last examined; reset it"
    if vitals.recovery_action:
        return f"the driver asks to {vitals.recovery_action}"
    limit, default = vitals.power_limit_mw, vitals.default_power_limit_mw
    if limit is not None and default is not None and limit < default:
        return f"its power limit is {limit // 1000} W of {default // 1000} W; look what sets it, DCGM or nvidia-smi -pl"
    width, most = vitals.pcie_width, vitals.max_pcie_width
    if width is not None and most is not None and width < most:
        return f"its PCIe link runs on {width} of {most} lanes; reseat the GPU"
    return None


def _new_errors(vitals: Vitals, before: Counters | None = None) -> int:
    """Uncorrectable memory errors that nobody was told of by an Xid, or nobody listened."""
    if vitals.ecc_uncorrected is None or before is None or before.ecc_uncorrected is None:
        return 0
    return max(0, vitals.ecc_uncorrected - before.ecc_uncorrected)
