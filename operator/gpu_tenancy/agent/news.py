"""What changed on the node that people should hear of, as Events: errors of the hardware and what became of them. Pure.

What a device waits for is no news: its message says it. An agent that starts tells nothing that it knew before.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpu_tenancy.agent.situation import Fence, Situation
from gpu_tenancy.api.node import SlotState
from gpu_tenancy.kube.events import Note


def news(before: Situation, after: Situation) -> Iterator[Note]:
    """What happened between two situations."""
    yield from _fences(before, after)
    yield from _health(before, after)
    yield from _quarantines(before, after)


def _fences(before: Situation, after: Situation) -> Iterator[Note]:
    if before.fences is after.fences:
        return
    known = {_place(one): one for one in before.fences}
    left = {_place(one) for one in after.fences}
    for one in after.fences:
        former = known.get(_place(one))
        if former is None or former.remedy is not one.remedy:
            yield Note("Warning", "Fenced", one.reason)
    for place, one in known.items():
        if place not in left:
            yield Note("Normal", "FenceLifted", f"{_slices(one.mask)} of GPU {one.gpu} are used again.")


def _place(fence: Fence) -> tuple[str, int]:
    return fence.gpu, fence.mask


def _slices(mask: int) -> str:
    numbers = [str(number) for number in range(8) if mask >> number & 1]
    return "All memory slices" if len(numbers) == 8 else f"Memory slices {', '.join(numbers)}"


def _health(before: Situation, after: Situation) -> Iterator[Note]:
    if before.gpus is after.gpus:
        return
    for uuid, gpu in after.gpus.items():
        former = before.gpus.get(uuid)
        if former is None or former.healthy is gpu.healthy:
            continue
        if gpu.healthy:
            yield Note("Normal", "GpuHealthy", f"GPU {gpu.index} answers as it should again.")
        else:
            yield Note("Warning", "GpuUnhealthy", gpu.message)


def _quarantines(before: Situation, after: Situation) -> Iterator[Note]:
    if before.held is after.held:
        return
    for device, held in after.held.items():
        former = before.held.get(device)
        if held.overdue and held.state is not SlotState.READY and former is not None and not former.overdue:
            why = f": {held.message}" if held.message else ""
            yield Note("Warning", "Quarantined", f"{device} does not get on{why}; its memory slices are not used.")
