"""What the agent knows of its node, as one value, and every way in which that knowledge changes.

A transition is a pure function from one Situation to the next: no I/O, no clock. `steps` says what follows from a
situation, the rest of the agent carries it out and records the outcome here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Self, TypeVar

from gpu_tenancy.agent.gpus import GpuFacts, Instance
from gpu_tenancy.api.base import ApiModel, MicroTime
from gpu_tenancy.api.node import Slot, SlotState
from gpu_tenancy.mig.profiles import FULL

K = TypeVar("K")
V = TypeVar("V")

WHOLE_GPU: Final = 0xFF
"""All eight memory slices."""


class Shape(ApiModel):
    """What a device is made of, as it was found when it became ready."""

    memory_mib: int
    """Its memory in MiB."""
    multiprocessors: int
    """Its streaming multiprocessors."""
    nodes: tuple[str, ...] = ()
    """Device nodes that a container needs to use it; empty where there are none to give."""

    @classmethod
    def of(cls, device: GpuFacts | Instance) -> Self:
        """The shape of a whole GPU or of an instance."""
        return cls(memory_mib=device.memory_mib, multiprocessors=device.multiprocessors, nodes=device.nodes)


class Held(ApiModel):
    """A device that the agent has in hand: being made, serving or being taken away."""

    slot: Slot
    """The slot of the spec that it was taken up for."""
    state: SlotState = SlotState.PREPARING
    """Preparing, Ready, Draining or Failed."""
    uuid: str = ""
    """UUID of the device itself, once it is made."""
    shape: Shape | None = None
    """What it is made of, once it is made."""
    ready_at: MicroTime | None = None
    """When it was ready; not None means that a pod may have had it since."""
    message: str = ""
    """What it waits for, or why it failed."""
    stored: bool = False
    """Its `ready_at` stands in GpuNode.status."""
    published: bool = False
    """It stands in the node's ResourceSlice, or may do so."""


@dataclass(frozen=True, slots=True, order=True)
class Made:
    """A MIG instance that the agent has created or is about to create."""

    gpu: str
    """UUID of the GPU."""
    profile: str
    """MIG profile."""
    start: int
    """First memory slice."""
    uuid: str = ""
    """UUID of the MIG device; empty from the decision to create it until it is known to exist."""


class PreparedDevice(ApiModel):
    """One device of a prepared claim."""

    device: str
    """Name of the device."""
    requests: tuple[str, ...] = ()
    """Requests of the claim that it answers."""


class PreparedClaim(ApiModel):
    """A claim whose devices kubelet was told to hand to containers and has not given back."""

    uid: str
    """UID of the ResourceClaim."""
    namespace: str
    """Its namespace."""
    name: str
    """Its name."""
    devices: tuple[PreparedDevice, ...]
    """What it was given."""
    users: tuple[str, ...] = ()
    """Names of the pods it was reserved for when it was prepared."""


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything that the next steps depend on."""

    gpus: Mapping[str, GpuFacts] = field(default_factory=dict)
    """GPUs by UUID."""
    generation: int = 0
    """Generation of the GpuNode that `wanted` is from; 0 before the first."""
    wanted: Mapping[str, Slot] = field(default_factory=dict)
    """Slots of the spec by device name."""
    held: Mapping[str, Held] = field(default_factory=dict)
    """Devices in hand by name."""
    instances: Mapping[str, tuple[Instance, ...]] = field(default_factory=dict)
    """MIG instances by GPU, foreign ones included."""
    made: frozenset[Made] = frozenset()
    """Which instances are the agent's own."""
    prepared: Mapping[str, PreparedClaim] = field(default_factory=dict)
    """Prepared claims by UID."""
    proven: frozenset[str] = frozenset()
    """Devices (by name) and orphaned instances (by UUID) on which no process was seen, twice."""
    resting: frozenset[str] = frozenset()
    """Devices and orphans whose next attempt is not due yet."""


def is_wanted(situation: Situation, held: Held) -> bool:
    """Whether the spec still asks for this very device: same placement, same holder."""
    slot = situation.wanted.get(held.slot.device)
    return slot is not None and identity(slot) == identity(held.slot)


def identity(slot: Slot) -> tuple[str, str, str, int, str]:
    """What makes a slot another slot when it changes; when it was decided and for which attempt does not."""
    return (slot.device, slot.gpu, slot.profile, slot.start, slot.holder.uid)


def claims_on(situation: Situation, device: str) -> tuple[PreparedClaim, ...]:
    """Prepared claims that have this device, by name of the claim."""
    holding = (claim for claim in situation.prepared.values() if any(one.device == device for one in claim.devices))
    return tuple(sorted(holding, key=lambda claim: (claim.namespace, claim.name)))


def instance_of(situation: Situation, held: Held) -> Instance | None:
    """The MIG instance that is this device, or was left half-recorded when it was being made; None where there is none.

    A device that never was ready has no UUID: its instance is then the one whose creation was recorded as intended. An
    instance of another device at the same placement is never mistaken for it.
    """
    slot = held.slot
    if Made(slot.gpu, slot.profile, slot.start, held.uuid) not in situation.made:
        return None
    for instance in situation.instances.get(slot.gpu, ()):
        if (instance.profile, instance.start) == (slot.profile, slot.start) and held.uuid in {"", instance.uuid}:
            return instance
    return None


def is_own(situation: Situation, instance: Instance) -> bool:
    """Whether the agent created it: recorded by placement before the creation, by UUID after it."""
    return _placed(instance) in situation.made or _placed(instance, instance.uuid) in situation.made


def sound(situation: Situation) -> frozenset[str]:
    """UUIDs of the GPUs that were healthy when last seen; before the first look, of those with a device in use."""
    if situation.gpus:
        return frozenset(gpu.uuid for gpu in situation.gpus.values() if gpu.healthy)
    return frozenset(held.slot.gpu for held in situation.held.values() if held.published)


# ------------------------------------------------------------------------------------------------- what was learnt


def specified(situation: Situation, slots: Iterable[Slot], generation: int) -> Situation:
    """The spec says so now."""
    return replace(situation, wanted={slot.device: slot for slot in slots}, generation=generation)


def listed(situation: Situation, gpus: Iterable[GpuFacts]) -> Situation:
    """The GPUs of the node were listed."""
    return replace(situation, gpus={gpu.uuid: gpu for gpu in gpus})


def facts_with(gpu: GpuFacts, *, healthy: bool, message: str) -> GpuFacts:
    """The same GPU in another state of health."""
    return replace(gpu, healthy=healthy, message=message)


def walked(situation: Situation, gpu: str, instances: Iterable[Instance]) -> Situation:
    """The instances of one GPU were listed."""
    return replace(situation, instances=_with(situation.instances, gpu, tuple(instances)))


# ------------------------------------------------------------------------------------------------- making a device


def accepted(situation: Situation, slot: Slot) -> Situation:
    """Take the slot in hand, or take it back in hand while it was being taken away."""
    held = situation.held.get(slot.device)
    fresh = Held(slot=slot) if held is None else held.model_copy(update=_BACK_IN_HAND | {"slot": slot})
    return _held(replace(situation, proven=situation.proven - {slot.device}), fresh)


_BACK_IN_HAND: Final[dict[str, object]] = {"state": SlotState.PREPARING, "message": "", "stored": False}


def waiting(situation: Situation, device: str, state: SlotState, message: str) -> Situation:
    """Nothing can be done for the device yet, for that reason."""
    held = situation.held[device]
    if (held.state, held.message) == (state, message):
        return situation
    return _held(situation, held.model_copy(update={"state": state, "message": message}))


def failed(situation: Situation, device: str, message: str) -> Situation:
    """The device could not be made, or cannot serve any more."""
    return _held(situation, situation.held[device].model_copy(update={"state": SlotState.FAILED, "message": message}))


def undone(situation: Situation, device: str) -> Situation:
    """The instance under the device is gone; it has to be made once more."""
    again = {"state": SlotState.PREPARING, "uuid": "", "message": "", "stored": False}
    return _held(situation, situation.held[device].model_copy(update=again))


def intended(situation: Situation, slot: Slot) -> Situation:
    """An instance is about to be created there; recorded first, so that it is known as ours whatever happens."""
    return replace(situation, made=_without_placement(situation.made, slot) | {_placed(slot)})


def not_created(situation: Situation, slot: Slot) -> Situation:
    """The driver refused to create an instance there and left nothing behind."""
    return replace(situation, made=situation.made - {_placed(slot)})


def made_ready(situation: Situation, device: str, thing: GpuFacts | Instance, now: datetime) -> Situation:
    """The device exists, verified, and this is it: the whole GPU or the instance."""
    held, uuid = situation.held[device], thing.uuid
    slot = held.slot
    made = situation.made
    if slot.profile != FULL:
        made = _without_placement(made, slot) | {_placed(slot, uuid)}
    ready = {"state": SlotState.READY, "uuid": uuid, "shape": Shape.of(thing), "ready_at": now, "message": ""}
    ready["stored"] = False
    return _held(replace(situation, made=made), held.model_copy(update=ready))


def stored(situation: Situation, ready_at: Mapping[str, datetime]) -> Situation:
    """GpuNode.status holds these devices as ready since these instants."""
    for device, since in ready_at.items():
        held = situation.held.get(device)
        if held is not None and not held.stored and held.state is SlotState.READY and held.ready_at == since:
            situation = _held(situation, held.model_copy(update={"stored": True}))
    return situation


def unstored(situation: Situation) -> Situation:
    """GpuNode.status is empty: somebody deleted the object and it was made anew."""
    for held in situation.held.values():
        situation = _held(situation, held.model_copy(update={"stored": False}))
    return situation


def published(situation: Situation, devices: Iterable[str]) -> Situation:
    """The ResourceSlice holds exactly these devices."""
    there = set(devices)
    for device, held in situation.held.items():
        if held.published != (device in there):
            situation = _held(situation, held.model_copy(update={"published": device in there}))
    return situation


def publishing(situation: Situation, devices: Iterable[str]) -> Situation:
    """A ResourceSlice with these devices is being written: from now on they may be in it."""
    for device in devices:
        held = situation.held[device]
        if not held.published:
            situation = _held(situation, held.model_copy(update={"published": True}))
    return situation


# -------------------------------------------------------------------------------------------- taking a device away


def drained(situation: Situation, device: str) -> Situation:
    """The device is out of the slice and waits for its holder to let go."""
    held = situation.held[device].model_copy(update={"state": SlotState.DRAINING, "message": ""})
    return _held(replace(situation, proven=situation.proven - {device}), held)


def proven_empty(situation: Situation, subject: str) -> Situation:
    """No process was seen on the device or orphan, twice."""
    return replace(situation, proven=situation.proven | {subject})


def destroyed(situation: Situation, instance: Instance) -> Situation:
    """The instance is gone."""
    left = tuple(one for one in situation.instances.get(instance.gpu, ()) if one.gpu_instance != instance.gpu_instance)
    made = _without_placement(situation.made, instance)
    return replace(walked(situation, instance.gpu, left), made=made, proven=situation.proven - {instance.uuid})


def forgotten(situation: Situation, device: str) -> Situation:
    """Nothing is left of the device."""
    held = {name: one for name, one in situation.held.items() if name != device}
    return replace(situation, held=held, proven=situation.proven - {device}, resting=situation.resting - {device})


# ---------------------------------------------------------------------------------------------------------- claims


def claimed(situation: Situation, claim: PreparedClaim) -> Situation:
    """The claim is prepared."""
    return replace(situation, prepared=_with(situation.prepared, claim.uid, claim))


def unclaimed(situation: Situation, uid: str) -> Situation:
    """The claim is not prepared any more."""
    return replace(situation, prepared={key: one for key, one in situation.prepared.items() if key != uid})


# -------------------------------------------------------------------------------------------------------- patience


def rested(situation: Situation, subject: str) -> Situation:
    """The next attempt at the device or orphan is not due yet."""
    return replace(situation, resting=situation.resting | {subject})


def woken(situation: Situation, subject: str) -> Situation:
    """The next attempt at the device or orphan is due."""
    return replace(situation, resting=situation.resting - {subject}) if subject in situation.resting else situation


# ------------------------------------------------------------------------------------------------------- beginning


def rebooted(situation: Situation) -> Situation:
    """After a reboot no claim is prepared, no instance exists and nothing was handed to anybody yet."""
    held = {device: Held(slot=one.slot) for device, one in situation.held.items()}
    return replace(situation, held=held, made=frozenset(), prepared={})


def resumed(situation: Situation, in_slice: Iterable[str], in_status: Mapping[str, datetime]) -> Situation:
    """After a restart: what the API server holds of what the agent had in hand.

    A device that was published before keeps its `ready_at`. One that was not was of no use to anybody while the agent
    was away: it is ready from now on, not from then.
    """
    there = set(in_slice)
    for device, held in situation.held.items():
        out = held.published or device in there
        again = held.state is SlotState.READY and (not out or held.shape is None)
        change = {
            "published": device in there,
            "stored": held.ready_at is not None and in_status.get(device) == held.ready_at,
            "state": SlotState.PREPARING if again else held.state,
        }
        situation = _held(situation, held.model_copy(update=change))
    return situation


def _held(situation: Situation, held: Held) -> Situation:
    return replace(situation, held=_with(situation.held, held.slot.device, held))


def _with(mapping: Mapping[K, V], key: K, value: V) -> dict[K, V]:
    return {**mapping, key: value}


def _placed(at: Slot | Instance, uuid: str = "") -> Made:
    return Made(at.gpu, at.profile, at.start, uuid)


def _without_placement(made: frozenset[Made], at: Slot | Instance) -> frozenset[Made]:
    return frozenset(one for one in made if (one.gpu, one.profile, one.start) != (at.gpu, at.profile, at.start))
