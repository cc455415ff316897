"""What became of a plan's actions, and what else must then be left alone. Decides nothing else; no I/O."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from gpu_tenancy.core.actions import (
    Action,
    ArchiveRecord,
    CloseRecord,
    DeleteJob,
    DeletePod,
    SetSlots,
    StartMiner,
    StopMiner,
    TouchClaim,
    TouchPod,
    WarnPod,
)
from gpu_tenancy.core.snapshot import Failure


@dataclass(slots=True)
class Outcome:
    """What became of a plan's actions."""

    conflict: bool = False
    """Something was not as the plan assumed: plan anew at once."""
    trouble: bool = False
    """Something could not be done, and no lease or pool is to blame for it: plan anew after a pause."""
    failed: set[str] = field(default_factory=set)
    """UIDs of leases and pools of which some action was not done."""
    nodes: set[str] = field(default_factory=set)
    """Nodes whose slots were not written."""
    promised: dict[str, frozenset[str]] = field(default_factory=dict)
    """Nodes whose slots were written, and the leases for which they were."""
    refused: dict[str, Failure] = field(default_factory=dict)
    """What the API server refused as things are, by UID of the lease or pool."""
    again: float | None = None
    """Seconds after which a call that was made a moment ago is due again, should its effect still not show."""


_NOBODY: Final[frozenset[str]] = frozenset()


def depends_on_undone(action: Action, uid: str, outcome: Outcome) -> bool:
    """Nothing is done for a lease of which something failed in this cycle, nor for a node that was not written."""
    match action:
        case SetSlots():
            if not action.requires.isdisjoint(outcome.failed):
                undone(action, uid, outcome)
                return True
            return False
        case StopMiner():
            # Also where the node was written, but another node of the same gang was not: nobody goes for half a plan.
            node = action.miner.node
            return node in outcome.nodes or not outcome.promised.get(node, _NOBODY).isdisjoint(outcome.failed)
        case StartMiner():
            return action.node in outcome.nodes
        case _:
            return bool(uid) and uid in outcome.failed


def undone(action: Action, uid: str, outcome: Outcome) -> None:
    """Note that an action was not done."""
    if isinstance(action, SetSlots):
        outcome.nodes.add(action.node)
        outcome.failed |= action.requires
    elif uid and not isinstance(action, StopMiner | StartMiner):  # one miner's trouble is not its pool's
        outcome.failed.add(uid)


def _wanted(action: SetSlots) -> Hashable:
    return tuple(slot.device for slot in action.slots), tuple((one.gpu, one.mode) for one in action.modes)


def identity(action: Action) -> Hashable:  # noqa: C901  (one case per action, nothing more)
    """The same for an action that is planned again in a later cycle."""
    match action:
        case CloseRecord() | ArchiveRecord():
            what: Hashable = (action.record.namespace, action.record.name)
        case SetSlots():
            what = (action.node, action.generation, _wanted(action))
        case StopMiner():
            what = (action.miner.name, action.miner.pod_uid, action.miner.claim_uid)
        case StartMiner():
            what = (action.pool.uid, action.pool.generation, action.node, action.device)
        case DeleteJob():
            what = action.uid
        case DeletePod() | TouchPod():
            what = action.pod.uid
        case TouchClaim():
            what = action.claim.uid
        case WarnPod():
            what = (action.pod.uid, action.at)
        case _:
            what = (action.lease.uid, action.lease.generation)
    return type(action), what
