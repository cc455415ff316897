"""What an Xid means for whoever is served on the GPU. Pure.

Application faults are counted. Contained memory errors fence the slice they befell, everything else the GPU: what an
event cannot be attributed to befell all of it. A fence takes its devices out of the slice; how it ends depends on what
NVIDIA asks for: the next hand-over's scrub and examination, a reset, or a reboot. Source: NVIDIA Xid Catalog.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.gpus import GpuEvent
from gpu_tenancy.agent.situation import WHOLE_GPU, Fence, Remedy, Situation
from gpu_tenancy.agent.steps import instance_mask, mask_of

APPLICATION: Final = frozenset({13, 31, 43, 45, 68, 109})
"""Faults of what runs on the GPU: its own matter."""
NOTED: Final = frozenset({63, 92, 154})
"""Told for the record: a row was remapped, single-bit errors are many, the recovery action changed (it is read at every
hand-over)."""
CONTAINED: Final = frozenset({94})
"""A memory error that befell one application."""
RESET: Final = frozenset({48, 62, 64, 74, 95, 119, 120, 140})
"""The GPU has to be reset."""
LOST: Final = frozenset({79})
"""The GPU has fallen off the bus: the node has to be rebooted."""
MEANINGS: Final = {
    48: "a double-bit memory error",
    62: "its power controller halted",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    94: "a contained memory error",
    95: "an uncontained memory error",
    119: "its firmware does not answer",
    120: "an error of its firmware",
    140: "a memory error that ECC did not catch",
}
"""What the fencing ones say, in words."""
UNLISTED: Final = "which NVIDIA's Xid catalog explains"


def learnt(situation: Situation, event: GpuEvent, now: datetime) -> Situation:
    """The situation after the event: counted, and fenced where it has to be."""
    if event.xid:
        counted = {**situation.xids, event.gpu: situation.xids.get(event.gpu, 0) + 1}
        situation = replace(situation, xids=counted)
    fence = verdict(situation, event, now)
    if fence is None:
        return situation
    there = {
        device
        for device, held in situation.held.items()
        if held.slot.gpu == fence.gpu and mask_of(situation, device) & fence.mask
    }
    return known.condemned(situation, fence, there)


def verdict(situation: Situation, event: GpuEvent, now: datetime) -> Fence | None:
    """What must be kept out of use for the event; None where nothing."""
    if event.lost or event.xid in LOST:
        reason = f"{_name(situation, event)} has fallen off the bus (Xid 79); reboot the node"
        return Fence(gpu=event.gpu, mask=WHOLE_GPU, reason=reason, remedy=Remedy.REBOOT)
    if event.xid in APPLICATION | NOTED:
        return None
    mask = _mask(situation, event)
    what = f"{_name(situation, event)}: Xid {event.xid}, {MEANINGS.get(event.xid, UNLISTED)}"
    if event.xid in RESET:
        reason = f"{what}; it is reset once nobody is on it"
        return Fence(gpu=event.gpu, mask=WHOLE_GPU, reason=reason, remedy=Remedy.RESET)
    where = "" if mask == WHOLE_GPU else f" on GPU instance {event.gpu_instance}"
    reason = f"{what}{where}; it is used again after {situation.probation.total_seconds():.0f} s"
    return Fence(gpu=event.gpu, mask=mask, reason=reason, until=now + situation.probation)


def _mask(situation: Situation, event: GpuEvent) -> int:
    """The memory slices that it befell, as bits; all where that cannot be told."""
    for instance in situation.instances.get(event.gpu, ()):
        if instance.gpu_instance == event.gpu_instance:
            return instance_mask(instance)
    return WHOLE_GPU


def _name(situation: Situation, event: GpuEvent) -> str:
    gpu = situation.gpus.get(event.gpu)
    return f"GPU {event.gpu if gpu is None else gpu.index}"
