"""Which step of a hand-over has taken too long, and which fence is over: a pure function of situation and time.

A step that passes its deadline quarantines its own device: its memory slices are fenced, the operator plans elsewhere,
the agent keeps trying, the neighbours serve on.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.situation import Fence, Held, Remedy, Situation
from gpu_tenancy.agent.steps import mask_of, phase
from gpu_tenancy.api.node import HandOverStepType, SlotState

LIMITS: Final[Mapping[HandOverStepType, timedelta]] = {
    HandOverStepType.EVICT: timedelta(seconds=180),
    HandOverStepType.PROVE_EMPTY: timedelta(seconds=60),
    HandOverStepType.DESTROY: timedelta(seconds=60),
    HandOverStepType.RESET: timedelta(seconds=30),
    HandOverStepType.PARTITION: timedelta(seconds=60),
    HandOverStepType.SCRUB: timedelta(seconds=120),
    HandOverStepType.VERIFY: timedelta(seconds=30),
}
"""How long each step may take. An eviction includes the pods' own grace, which the operator bounds by 30 s, and what
kubelet needs on top; a scrub the start of a context on a GPU that has just been partitioned."""


def due(situation: Situation, now: datetime) -> Situation:
    """The situation after whatever has come due by now."""
    situation = _in_step(situation, now)
    over = [fence for fence in situation.fences if _is_over(situation, fence, now)]
    if over:
        situation = known.lifted(situation, over)
    for device, held in situation.held.items() if not situation.maintained else ():
        if is_late(situation, held, now):
            situation = known.overdue(situation, device)
    return situation


def _in_step(situation: Situation, now: datetime) -> Situation:
    """What a clock that was ahead has written down does not last until the years it saw."""
    latest = now + situation.probation
    for fence in situation.fences:
        if fence.until is not None and fence.until > latest:
            situation = known.lifted(situation, [fence])
            situation = known.fenced(situation, fence.model_copy(update={"until": latest}))
    return situation


def _is_over(situation: Situation, fence: Fence, now: datetime) -> bool:
    """Its time has come, and nobody has a device behind it any more."""
    if fence.remedy is not Remedy.TIME or fence.until is None or now < fence.until:
        return False
    return not any(
        held.slot.gpu == fence.gpu and mask_of(situation, device) & fence.mask
        for device, held in situation.held.items()
    )


def is_late(situation: Situation, held: Held, now: datetime) -> bool:
    """Whether the step that the device is at should have ended by now, and nobody has been told."""
    if held.state is SlotState.READY or held.overdue or held.since is None:
        return False
    step = phase(situation, held)
    return step is not None and now - held.since > LIMITS[step]
