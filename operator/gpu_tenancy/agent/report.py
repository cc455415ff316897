"""What the agent says about its node: GpuNode.status and the ResourceSlice, as pure functions of the situation.

Writing them is the outbox's. Each fact is said in one place only: here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias

from gpu_tenancy.agent.gpus import GpuFacts
from gpu_tenancy.agent.home import Home, Owner, declared_modes
from gpu_tenancy.agent.situation import WHOLE_GPU, Held, Remedy, Shape, Situation, asked_mode, is_on_demand
from gpu_tenancy.agent.steps import foreign, instance_mask, intrusion, slices
from gpu_tenancy.api.base import ConditionStatus, HolderKind
from gpu_tenancy.api.names import ANNOTATION_MIG_GPUS, ATTRIBUTE_HOLDER, DRIVER
from gpu_tenancy.api.node import (
    Gpu,
    GpuMode,
    GpuNodeStatus,
    NodeCondition,
    NodeConditionType,
    NodeReason,
    ObservedSlot,
    SlotState,
)

MESSAGE_LIMIT: Final = 512
"""Characters of a GPU's or slot's message that the API takes."""
CONDITION_LIMIT: Final = 1024
"""Characters of a condition's message that the API takes."""


def status(
    situation: Situation, boot_id: str, here: Home, before: GpuNodeStatus | None, now: datetime
) -> GpuNodeStatus:
    """GpuNode.status.

    `here` is the Node with the declared modes of its GPUs; `before` is the last status, whose transition time lives
    on while the condition does not flip.
    """
    ordered = sorted(situation.gpus.values(), key=lambda gpu: gpu.index)
    gpus = [_gpu(situation, facts, here) for facts in ordered]
    converting = frozenset(facts.uuid for facts in ordered if is_on_demand(situation, facts))
    slots = [_slot(situation.held[device]) for device in sorted(situation.held)]
    return GpuNodeStatus(
        observed_generation=situation.generation or None,
        boot_id=boot_id,
        gpus=gpus,
        slots=slots,
        conditions=[
            _condition(
                NodeConditionType.READY, _verdict(gpus, slots, converting, here), situation.generation, before, now
            ),
            _condition(NodeConditionType.CONFLICT, _ownership(here), situation.generation, before, now),
        ],
    )


def _gpu(situation: Situation, facts: GpuFacts, here: Home) -> Gpu:
    trouble, fences = gpu_trouble(situation, facts), _fences(situation, facts, here)
    mask = 0
    for fenced, _ in fences:
        mask |= fenced
    reasons = [trouble] if trouble else list(dict.fromkeys(why for _, why in fences))
    return Gpu(
        index=facts.index,
        uuid=facts.uuid,
        model=facts.model,
        memory_mib=facts.memory_mib,
        pci_bus_id=facts.pci_bus_id,
        mode=facts.mode,
        declared=declared_modes(here, [facts.index]).get(facts.index),
        convertible=facts.index in here.convertible_gpus,
        healthy=trouble is None,
        fenced=[number for number in range(8) if mask >> number & 1],
        message="; ".join(reasons)[:MESSAGE_LIMIT],
    )


def gpu_trouble(situation: Situation, facts: GpuFacts) -> str | None:
    """Why nobody can be served on the GPU, as a sentence naming the remedy; None where it is sound."""
    if not facts.healthy:
        return facts.message
    fence = next((one for one in situation.fences if (one.gpu, one.mask) == (facts.uuid, WHOLE_GPU)), None)
    return fence.reason if fence is not None else None


def _fences(situation: Situation, facts: GpuFacts, here: Home) -> list[tuple[int, str]]:
    """Memory slices of a GPU, as bits, on which nothing new is to be planned, and why."""
    # A GPU that is to be reset gets nobody new on any of its slices: else it would never be empty.
    fences = [
        (WHOLE_GPU if one.remedy is Remedy.RESET else one.mask, one.reason)
        for one in situation.fences
        if one.gpu == facts.uuid
    ]
    fences += [
        (slices(facts, held.slot), f"{held.slot.device} is quarantined: {held.message}")
        for held in situation.held.values()
        if held.slot.gpu == facts.uuid and _is_quarantined(held)
    ]
    fences += [(instance_mask(one), intrusion(facts, one)) for one in foreign(situation, facts.uuid)]
    fences += [(WHOLE_GPU, conflict) for conflict in here.conflicts]
    if undeclared := _undeclared(situation, facts, here):
        fences.append((WHOLE_GPU, undeclared))
    return fences


def _undeclared(situation: Situation, facts: GpuFacts, here: Home) -> str:
    """Why a GPU is not in the mode that it should have, or that this cannot be told; empty where all is well."""
    wanted = GpuMode.MIG if facts.index in here.mig_gpus else GpuMode.WHOLE
    if here.mistake:
        return here.mistake
    asked = asked_mode(situation, facts)
    if is_on_demand(situation, facts):
        return f"GPU {facts.index} is converted by demand from {facts.mode} to {asked} once nothing is on it"
    if facts.mode in {wanted, asked}:
        return ""
    if here.declares:
        return (
            f"GPU {facts.index} is in mode {facts.mode}, the Node declares {wanted}: it is converted once nothing is "
            f"on it; or correct annotation {ANNOTATION_MIG_GPUS} of the Node"
        )
    return (
        f"GPU {facts.index} is in MIG mode, and the Node has no annotation {ANNOTATION_MIG_GPUS} that says whether it "
        f"should be: add one, e.g. {facts.index}"
    )


def _is_quarantined(held: Held) -> bool:
    return held.overdue and held.state is not SlotState.READY


def _slot(held: Held) -> ObservedSlot:
    slot = held.slot
    return ObservedSlot(
        device=slot.device,
        gpu=slot.gpu,
        profile=slot.profile,
        start=slot.start,
        holder=slot.holder,
        state=SlotState.QUARANTINED if _is_quarantined(held) else held.state,
        uuid=held.uuid,
        ready_at=held.ready_at if held.state in {SlotState.READY, SlotState.DRAINING} else None,
        hand_over=held.hand_over if held.state is SlotState.READY else None,
        message=held.message[:MESSAGE_LIMIT],
    )


Verdict: TypeAlias = tuple[ConditionStatus, NodeReason, str]
"""Status, reason and message of a condition."""


def _condition(
    kind: NodeConditionType, verdict: Verdict, generation: int, before: GpuNodeStatus | None, now: datetime
) -> NodeCondition:
    truth, reason, message = verdict
    known = next((one for one in (before or GpuNodeStatus()).conditions if one.type is kind), None)
    return NodeCondition(
        type=kind,
        status=truth,
        reason=reason,
        message=message[:CONDITION_LIMIT],
        last_transition_time=known.last_transition_time if known and known.status is truth else now,
        observed_generation=generation,
    )


def _ownership(here: Home) -> Verdict:
    if here.conflicts:
        return ConditionStatus.TRUE, NodeReason.OTHER_OWNER, "; ".join(here.conflicts)
    if here.unsure:
        return ConditionStatus.UNKNOWN, NodeReason.RUNTIME_UNKNOWN, here.unsure
    return ConditionStatus.FALSE, NodeReason.SOLE_OWNER, "nobody else hands out the GPUs of this node"


def _verdict(gpus: list[Gpu], slots: list[ObservedSlot], converting: frozenset[str], here: Home) -> Verdict:
    """`converting`: UUIDs of GPUs that change their mode by demand, which is no fault."""
    if not gpus:
        return ConditionStatus.FALSE, NodeReason.NO_GPUS, "the driver lists no GPU on this node"
    changing = [one for one in gpus if one.healthy and one.uuid in converting]
    faults = [one.message for one in gpus if (one.fenced or not one.healthy) and one not in changing]
    faults += [f"{one.device}: {one.message}" for one in slots if one.state is SlotState.FAILED]
    if faults:
        return ConditionStatus.FALSE, NodeReason.DEVICE_FAILED, "; ".join(dict.fromkeys(faults))
    preparing = sum(one.state is SlotState.PREPARING for one in slots)
    draining = sum(one.state is SlotState.DRAINING for one in slots)
    if preparing or draining or changing:
        messages = [f"{preparing} devices are being made, {draining} are being taken away"]
        messages += [one.message for one in changing]
        return ConditionStatus.FALSE, NodeReason.WORKING, "; ".join(messages)
    remarks = [here.remark] if here.remark else []
    message = "; ".join([f"{len(slots)} devices on {len(gpus)} GPUs are as specified", *remarks])
    return ConditionStatus.TRUE, NodeReason.READY, message


def is_awaited(old: GpuNodeStatus | None, new: GpuNodeStatus) -> bool:
    """Whether somebody waits for this change of status, so that it is written at once.

    That a device is ready or failed, and everything about a lease that ends, is; that one waits, is being made, or is
    taken from a miner (whose pod the operator stops without asking) can travel with the next write.
    """
    if old is None or old.gpus != new.gpus or old.boot_id != new.boot_id:
        return True
    known = {slot.device: (slot.state, slot.ready_at) for slot in old.slots}
    now = {slot.device: (slot.state, slot.ready_at) for slot in new.slots}
    return any(
        known.get(slot.device) != now.get(slot.device) and _matters(slot, now) for slot in (*old.slots, *new.slots)
    )


def _matters(slot: ObservedSlot, now: Mapping[str, tuple[SlotState, datetime | None]]) -> bool:
    state, _ = now.get(slot.device, (None, None))
    if state in {SlotState.READY, SlotState.FAILED, SlotState.QUARANTINED}:
        return True
    return slot.holder.kind is HolderKind.GPU_LEASE and state is not SlotState.PREPARING


# ------------------------------------------------------------------------------------------------- the ResourceSlice


def slice_name(node: str) -> str:
    """Name of the node's one ResourceSlice."""
    return f"{node}-{DRIVER}"


def resource_slice(owner: Owner, devices: list[dict[str, Any]], generation: int) -> dict[str, Any]:
    """The node's one ResourceSlice: a pool named as the node."""
    return {
        "metadata": {"name": slice_name(owner.name), "ownerReferences": [owner.reference()]},
        "spec": {
            "driver": DRIVER,
            "nodeName": owner.name,
            "pool": {"name": owner.name, "generation": generation, "resourceSliceCount": 1},
            "devices": devices,
        },
    }


def slice_devices(situation: Situation, held: Iterable[Held]) -> list[dict[str, Any]]:
    """Devices of a ResourceSlice, in the given order."""
    return [_device(situation.gpus[one.slot.gpu], one, one.shape) for one in held if one.shape is not None]


def _device(gpu: GpuFacts, held: Held, shape: Shape) -> dict[str, Any]:
    slot = held.slot
    texts = {
        "uuid": held.uuid,
        "parentUuid": slot.gpu,
        "model": gpu.model,
        "profile": slot.profile,
        ATTRIBUTE_HOLDER: slot.holder.uid,
        "resource.kubernetes.io/pciBusID": gpu.pci_bus_id,
    }
    attributes: dict[str, Any] = {name: {"string": text} for name, text in texts.items() if text}
    return {
        "name": slot.device,
        "attributes": attributes | {"start": {"int": slot.start}},
        "capacity": {
            "memory": {"value": _quantity(shape.memory_mib)},
            "multiprocessors": {"value": str(shape.multiprocessors)},
        },
    }


def _quantity(mib: int) -> str:
    """Memory as the API server writes it back (80Gi, not 81920Mi), so that what stands there can be compared."""
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"
