"""What the agent knows of its node, as one value, and every way in which that knowledge changes.

A transition is a pure function from one Situation to the next: no I/O, no clock. `steps` says what follows from a
situation, the rest of the agent carries it out and records the outcome here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, Self, TypeVar

from gpu_tenancy.agent.gpus import GpuFacts, Instance, Vitals
from gpu_tenancy.api.base import ApiModel, Holder, MicroTime, format_time
from gpu_tenancy.api.node import GpuMode, HandOver, HandOverStep, HandOverStepType, Slot, SlotState, WantedMode
from gpu_tenancy.mig.profiles import FULL

K = TypeVar("K")
V = TypeVar("V")

PROBATION: Final = timedelta(minutes=10)
"""How long by default a place stays out of use after an error, or after a device could not be made there in time."""
MOST_TRACES: Final = 512
"""UIDs that a device remembers, of the pods and claims that had it last: a pod that restarts for weeks has many."""
MOST_STEPS: Final = 16
"""Steps of a hand-over that are told, the last ones."""
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


class Scrub(ApiModel):
    """What a scrub wrote and read back."""

    bytes: int
    """Bytes of device memory that were overwritten."""
    samples: int
    """Places that were read back and held what had been written."""


class Counters(ApiModel):
    """What a GPU had counted when it was last examined."""

    ecc_uncorrected: int | None = None
    """Uncorrectable memory errors since its driver was loaded; None where it does not count them."""
    xids: int = 0
    """Xid events that the agent has counted in this boot."""


class Former(ApiModel):
    """Who had a memory slice last, and how that one was taken from them."""

    holder: Holder
    """Lease or pool."""
    steps: tuple[HandOverStep, ...] = ()
    """Evict, ProveEmpty and Destroy, with their times."""
    gone_at: MicroTime
    """When nothing was left of their device."""


class Remedy(StrEnum):
    """What ends a fence."""

    TIME = "Time"
    """Its time; nobody may be on it by then."""
    RESET = "Reset"
    """A reset of the GPU."""
    REBOOT = "Reboot"
    """A reboot of the node."""


class Fence(ApiModel):
    """Memory slices of a GPU that are kept out of use."""

    gpu: str
    """UUID of the GPU."""
    mask: int
    """The slices, as bits."""
    reason: str
    """Why, as a sentence that names the remedy."""
    remedy: Remedy = Remedy.TIME
    """What ends it."""
    until: MicroTime | None = None
    """When they are used again, where it is time that ends it."""


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
    traces: tuple[str, ...] = ()
    """UIDs of the pods and claims that were given it: a process on the host that carries one is its holder's."""
    since: MicroTime | None = None
    """When the step of its hand-over that is under way, or waited for, began."""
    steps: tuple[HandOverStep, ...] = ()
    """Steps of its hand-over that are done."""
    scrub: Scrub | None = None
    """What its scrub wrote, once it has been scrubbed."""
    hand_over: HandOver | None = None
    """How it was made ready; not None means that it is not scrubbed again: a pod's data may be on it."""
    overdue: bool = False
    """A step of its hand-over did not end in time."""
    faulty: bool = False
    """Something is wrong with its GPU or its place, and nothing is tried until it is not."""


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
    pods: tuple[str, ...] = ()
    """UIDs of the same pods."""


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
    scrubbing: frozenset[str] = frozenset()
    """Devices that are being scrubbed right now."""
    former: Mapping[str, Mapping[int, Former]] = field(default_factory=dict)
    """Who had which memory slice of which GPU last."""
    fences: tuple[Fence, ...] = ()
    """Where nothing is made or served for now."""
    probation: timedelta = PROBATION
    """How long a place stays out of use after an error."""
    destroys_foreign: bool = False
    """Instances that the agent did not create are destroyed like orphans of its own."""
    declared: Mapping[int, GpuMode] = field(default_factory=dict)
    """Modes that the Node declares for its GPUs, by index; empty where it declares none."""
    convertible: frozenset[int] = frozenset()
    """Indices of the GPUs that the operator may convert by demand."""
    asked: Mapping[str, GpuMode] = field(default_factory=dict)
    """Modes that the spec asks for, by UUID, whatever the Node declares."""
    conflict: str = ""
    """Who else hands out the GPUs of the node, as a sentence: nothing new is made then."""
    xids: Mapping[str, int] = field(default_factory=dict)
    """Xid events that each GPU has told of in this boot, while an agent listened."""
    examined: Mapping[str, Counters] = field(default_factory=dict)
    """What each GPU had counted at its last hand-over; absent where what has happened since was dealt with."""
    maintained: frozenset[str] = frozenset()
    """GPUs that are being reset or converted right now: meanwhile NVML is closed, and no step of any GPU goes on."""


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
    instance without a UUID has no compute instance: half made, or half destroyed. An instance of another device at the
    same placement is never mistaken for it.
    """
    slot = held.slot
    if Made(slot.gpu, slot.profile, slot.start, held.uuid) not in situation.made:
        return None
    for instance in situation.instances.get(slot.gpu, ()):
        if (instance.profile, instance.start) != (slot.profile, slot.start):
            continue
        if not (held.uuid and instance.uuid) or held.uuid == instance.uuid:
            return instance
    return None


def is_own(situation: Situation, instance: Instance) -> bool:
    """Whether the agent created it: recorded by placement before the creation, by UUID after it.

    One without a compute instance, and so without a UUID, in a place where the agent has one on record is that one,
    half destroyed: the agent was killed between the two halves.
    """
    if _placed(instance) in situation.made or _placed(instance, instance.uuid) in situation.made:
        return True
    here = (instance.gpu, instance.profile, instance.start)
    return not instance.uuid and any((one.gpu, one.profile, one.start) == here for one in situation.made)


def sound(situation: Situation) -> frozenset[str]:
    """UUIDs of the GPUs that were healthy when last seen; before the first look, of those with a device in use."""
    if situation.gpus:
        return frozenset(gpu.uuid for gpu in situation.gpus.values() if gpu.healthy)
    return frozenset(held.slot.gpu for held in situation.held.values() if held.published)


# ------------------------------------------------------------------------------------------------- what was learnt


def specified(
    situation: Situation, slots: Iterable[Slot], generation: int, modes: Iterable[WantedMode] = ()
) -> Situation:
    """The spec says so now."""
    asked = {one.gpu: one.mode for one in modes}
    return replace(situation, wanted={slot.device: slot for slot in slots}, generation=generation, asked=asked)


def asked_mode(situation: Situation, gpu: GpuFacts) -> GpuMode | None:
    """The mode that the spec asks of a GPU, where its Node lets it be converted."""
    return situation.asked.get(gpu.uuid) if gpu.index in situation.convertible else None


def mode_for(situation: Situation, gpu: GpuFacts) -> GpuMode:
    """The mode that a GPU should have: as the spec asks, else as the Node declares, else the one that it has."""
    return asked_mode(situation, gpu) or situation.declared.get(gpu.index, gpu.mode)


def is_on_demand(situation: Situation, gpu: GpuFacts) -> bool:
    """The GPU is to be converted because the spec asks for it, not because its Node declares it."""
    return asked_mode(situation, gpu) not in {None, gpu.mode}


def listed(situation: Situation, gpus: Iterable[GpuFacts]) -> Situation:
    """The GPUs of the node were listed. One that was there in this boot and is missing is lost, not gone: none is taken
    out of a running node."""
    there = {gpu.uuid: gpu for gpu in gpus}
    lost = {uuid: _vanished(gpu) for uuid, gpu in situation.gpus.items() if uuid not in there}
    situation = replace(situation, gpus=there | lost)
    for gpu in situation.gpus.values():
        if gpu.needs_reset and not any(one.gpu == gpu.uuid and one.mask == WHOLE_GPU for one in situation.fences):
            devices = [device for device, held in situation.held.items() if held.slot.gpu == gpu.uuid]
            fence = Fence(gpu=gpu.uuid, mask=WHOLE_GPU, reason=gpu.message, remedy=Remedy.RESET)
            situation = condemned(situation, fence, devices)
    return situation


def _vanished(gpu: GpuFacts) -> GpuFacts:
    message = f"GPU {gpu.index} is not listed by the driver any more; look for Xid 79 in the kernel's log and reboot"
    return replace(gpu, healthy=False, vanished=True, message=message)


def facts_with(gpu: GpuFacts, *, healthy: bool, message: str) -> GpuFacts:
    """The same GPU in another state of health."""
    return replace(gpu, healthy=healthy, message=message)


def declared(
    situation: Situation, modes: Mapping[int, GpuMode], conflict: str, convertible: frozenset[int] = frozenset()
) -> Situation:
    """The Node declares these modes for its GPUs; `conflict`: who else hands them out; `convertible`: which of them the
    operator may convert, by index."""
    if (modes, conflict, convertible) == (situation.declared, situation.conflict, situation.convertible):
        return situation
    return replace(situation, declared=modes, conflict=conflict, convertible=convertible)


def walked(situation: Situation, gpu: str, instances: Iterable[Instance]) -> Situation:
    """The instances of one GPU were listed."""
    return replace(situation, instances=_with(situation.instances, gpu, tuple(instances)))


# ------------------------------------------------------------------------------------------------- making a device


def accepted(situation: Situation, slot: Slot, now: datetime) -> Situation:
    """Take the slot in hand, or take it back in hand while it was being taken away."""
    held = situation.held.get(slot.device) or Held(slot=slot)
    fresh = held.model_copy(update=_AFRESH | {"slot": slot, "since": now})
    return _held(replace(situation, proven=situation.proven - {slot.device}), fresh)


_AFRESH: Final[dict[str, object]] = {
    "state": SlotState.PREPARING, "message": "", "stored": False, "steps": (), "overdue": False, "faulty": False,
}  # fmt: skip


def passed(held: Held, step: HandOverStepType, now: datetime) -> Held:
    """A step of its hand-over is done; the next begins."""
    took = max(timedelta(), now - held.since) if held.since is not None else timedelta()
    done = HandOverStep(step=step, milliseconds=round(took / timedelta(milliseconds=1)))
    steps = (*held.steps, done)[-MOST_STEPS:]  # One that is tried again and again has more than it can tell of.
    return held.model_copy(update={"steps": steps, "since": now, "overdue": False})


def is_done(held: Held, step: HandOverStepType) -> bool:
    """Whether that step of its hand-over is done."""
    return any(one.step is step for one in held.steps)


def overdue(situation: Situation, device: str) -> Situation:
    """The step of its hand-over that is under way should have ended by now."""
    return _held(situation, situation.held[device].model_copy(update={"overdue": True}))


def waiting(situation: Situation, device: str, state: SlotState, message: str) -> Situation:
    """Nothing can be done for the device yet, for that reason."""
    held = situation.held[device]
    if (held.state, held.message) == (state, message):
        return situation
    return _held(situation, held.model_copy(update={"state": state, "message": message}))


def failed(situation: Situation, device: str, message: str, now: datetime) -> Situation:
    """The device cannot be made as things are, or cannot serve any more."""
    begins = _AFRESH | {"since": now, "state": SlotState.FAILED, "message": message, "faulty": True}
    return _held(situation, situation.held[device].model_copy(update=begins))


def mended(situation: Situation, device: str, now: datetime) -> Situation:
    """Nothing is wrong with its GPU and its place any more: it is made or verified from now on."""
    return _held(situation, situation.held[device].model_copy(update={"faulty": False, "since": now}))


def undone(situation: Situation, device: str, now: datetime) -> Situation:
    """The instance under the device is gone; it has to be made once more."""
    gone = {"since": now, "uuid": "", "shape": None, "scrub": None, "hand_over": None}
    return _held(situation, situation.held[device].model_copy(update=_AFRESH | gone))


def intended(situation: Situation, slot: Slot) -> Situation:
    """An instance is about to be created there; recorded first, so that it is known as ours whatever happens.

    What was on record there stays so: the driver may only have failed to list it.
    """
    return replace(situation, made=situation.made | {_placed(slot)})


def not_created(situation: Situation, slot: Slot, *, nothing: bool = False) -> Situation:
    """The driver refused to create an instance there. What lies there since is the agent's own, half of one or a whole
    one whose reading failed; with `nothing` it made nothing."""
    before = {(one.profile, one.start) for one in situation.made if one.gpu == slot.gpu and one.uuid}
    here = (slot.profile, slot.start)
    left = here not in before and any((one.profile, one.start) == here for one in situation.instances.get(slot.gpu, ()))
    return situation if left and not nothing else replace(situation, made=situation.made - {_placed(slot)})


def restored(situation: Situation, device: str, now: datetime) -> Situation:
    """Clocks, power limit and compute mode of its GPU are at their defaults."""
    return _held(situation, passed(situation.held[device], HandOverStepType.RESET, now))


def partitioned(situation: Situation, device: str, thing: GpuFacts | Instance, now: datetime) -> Situation:
    """The device exists, and this is it: the whole GPU, which nobody uses, or the instance."""
    held, uuid = passed(situation.held[device], HandOverStepType.PARTITION, now), thing.uuid
    slot = held.slot
    made = situation.made
    if slot.profile != FULL:
        made = _without_placement(made, slot) | {_placed(slot, uuid)}
    return _held(replace(situation, made=made), held.model_copy(update={"uuid": uuid, "shape": Shape.of(thing)}))


def scrubs(situation: Situation, device: str) -> Situation:
    """The device is being scrubbed from now on."""
    return replace(situation, scrubbing=situation.scrubbing | {device})


def rests_from_scrubbing(situation: Situation, device: str) -> Situation:
    """It is not being scrubbed any more, whatever came of it."""
    return replace(situation, scrubbing=situation.scrubbing - {device})


def scrubbed(situation: Situation, device: str, scrub: Scrub, now: datetime) -> Situation:
    """All that the device's holder will be able to reach was overwritten."""
    held = passed(situation.held[device], HandOverStepType.SCRUB, now)
    return _held(situation, held.model_copy(update={"scrub": scrub}))


def unscrubbed(situation: Situation, device: str) -> Situation:
    """Somebody is or was on the device after its scrub, and it has not served yet: that scrub counts for nothing."""
    held = situation.held[device]
    return situation if held.hand_over is not None else _held(situation, held.model_copy(update={"scrub": None}))


def made_ready(situation: Situation, device: str, vitals: Vitals, mask: int, now: datetime) -> Situation:
    """The device is as it should be. `mask`: the memory slices of its GPU that it takes, as bits."""
    held = passed(situation.held[device], HandOverStepType.VERIFY, now)
    evidence = held.hand_over or _evidence(situation, held, vitals, mask).model_copy(update={"at": now})
    ready = {"state": SlotState.READY, "ready_at": now, "message": "", "stored": False, "hand_over": evidence}
    counted = _with(situation.examined, held.slot.gpu, counters(situation, held.slot.gpu, vitals))
    return _held(replace(situation, examined=counted), held.model_copy(update=ready))


def counters(situation: Situation, gpu: str, vitals: Vitals) -> Counters:
    """What a GPU has counted by now."""
    return Counters(ecc_uncorrected=vitals.ecc_uncorrected, xids=situation.xids.get(gpu, 0))


def _evidence(situation: Situation, held: Held, vitals: Vitals, mask: int) -> HandOver:
    """How the device came to its holder: what the one that gave way last went through, and what it went through."""
    there = situation.former.get(held.slot.gpu, {})
    former = [there[number] for number in sorted(there) if mask >> number & 1]
    last = max(former, key=lambda one: one.gone_at, default=None)
    before, after = situation.examined.get(held.slot.gpu), counters(situation, held.slot.gpu, vitals)
    return HandOver(
        holder=held.slot.holder,
        former=list({one.holder.uid: one.holder for one in former}.values()),
        steps=[*(last.steps if last else ()), *held.steps][-MOST_STEPS:],
        scrubbed_bytes=held.scrub.bytes if held.scrub else 0,
        samples=held.scrub.samples if held.scrub else 0,
        ecc_uncorrected=after.ecc_uncorrected,
        ecc_uncorrected_before=before.ecc_uncorrected if before else None,
        xids=after.xids,
        xids_before=before.xids if before else None,
        driver=vitals.driver,
        vbios=vitals.vbios,
    )


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


def drained(situation: Situation, device: str, mask: int, now: datetime) -> Situation:
    """The device is out of the slice and waits for its holder to let go. `mask`: its memory slices, as bits.

    Where it could not be made in time, the next one is not tried at once in the same place.
    """
    gone = situation.held[device]
    if gone.ready_at is None and gone.overdue:
        reason = f"{device} could not be made in time: {gone.message}"
        fence = Fence(gpu=gone.slot.gpu, mask=mask, reason=reason, until=now + situation.probation)
        situation = fenced(situation, fence)
    begins = {"state": SlotState.DRAINING, "message": "", "since": now, "steps": (), "overdue": False}
    held = situation.held[device].model_copy(update=begins)
    return _held(replace(situation, proven=situation.proven - {device}), held)


def proven_empty(situation: Situation, subject: str, now: datetime) -> Situation:
    """No process was seen on the device or orphan, twice."""
    proven = replace(situation, proven=situation.proven | {subject})
    held = situation.held.get(subject)
    return proven if held is None else _held(proven, passed(held, HandOverStepType.PROVE_EMPTY, now))


def destroyed(situation: Situation, subject: str, instance: Instance, now: datetime) -> Situation:
    """The instance is gone; `subject` is the device that it was, or the orphan."""
    left = tuple(one for one in situation.instances.get(instance.gpu, ()) if one.gpu_instance != instance.gpu_instance)
    made = _without_placement(situation.made, instance)
    gone = replace(walked(situation, instance.gpu, left), made=made, proven=situation.proven - {instance.uuid})
    held = gone.held.get(subject)
    return gone if held is None else _held(gone, passed(held, HandOverStepType.DESTROY, now))


def forgotten(situation: Situation, device: str, mask: int, now: datetime) -> Situation:
    """Nothing is left of the device. `mask`: the memory slices that it had, as bits."""
    gone = situation.held[device]
    held = {name: one for name, one in situation.held.items() if name != device}
    for name, one in held.items():
        if one.slot.gpu == gone.slot.gpu and one.state is SlotState.PREPARING and not one.steps:
            held[name] = one.model_copy(update={"since": now})  # What waited for it begins now.
    former = situation.former
    if gone.ready_at is not None:
        trace = Former(holder=gone.slot.holder, steps=gone.steps, gone_at=now)
        slices = {number: trace for number in range(8) if mask >> number & 1}
        former = _with(former, gone.slot.gpu, {**former.get(gone.slot.gpu, {}), **slices})
    proven, resting = situation.proven - {device}, situation.resting - {device}
    # A kill between the driver's deed and its record leaves a record of an instance that is gone.
    made = situation.made - {_placed(gone.slot, gone.uuid)} if gone.uuid else situation.made
    return replace(situation, held=held, made=made, proven=proven, resting=resting, former=former)


# ---------------------------------------------------------------------------------------------------------- claims


def claimed(situation: Situation, claim: PreparedClaim) -> Situation:
    """The claim is prepared: whoever carries its UID, or that of a pod it is reserved for, has its devices."""
    for one in claim.devices:
        held = situation.held[one.device]
        traces = tuple(dict.fromkeys((*held.traces, claim.uid, *claim.pods)))[-MOST_TRACES:]
        if traces != held.traces:
            situation = _held(situation, held.model_copy(update={"traces": traces}))
    return replace(situation, prepared=_with(situation.prepared, claim.uid, claim))


def unclaimed(situation: Situation, uid: str, now: datetime) -> Situation:
    """The claim is not prepared any more."""
    claim = situation.prepared.get(uid)
    situation = replace(situation, prepared={key: one for key, one in situation.prepared.items() if key != uid})
    for one in claim.devices if claim is not None else ():
        held = situation.held.get(one.device)
        if held is not None and held.state is SlotState.DRAINING and not claims_on(situation, one.device):
            situation = _held(situation, passed(held, HandOverStepType.EVICT, now))
    return situation


# -------------------------------------------------------------------------------------------------------- patience


def rested(situation: Situation, subject: str) -> Situation:
    """The next attempt at the device or orphan is not due yet."""
    return replace(situation, resting=situation.resting | {subject})


def woken(situation: Situation, subject: str) -> Situation:
    """The next attempt at the device or orphan is due."""
    return replace(situation, resting=situation.resting - {subject}) if subject in situation.resting else situation


# ---------------------------------------------------------------------------------------------------------- fences


def fenced(situation: Situation, fence: Fence) -> Situation:
    """These slices are kept out of use. Of two fences around the same ones that stays which is harder to end."""
    same = [one for one in situation.fences if (one.gpu, one.mask) == (fence.gpu, fence.mask)]
    if any(_is_harder(one, fence) for one in same):
        return situation
    return replace(situation, fences=(*(one for one in situation.fences if one not in same), fence))


def _is_harder(one: Fence, other: Fence) -> bool:
    """Whether a fence takes more to end, or longer, than another."""
    remedies = list(Remedy)
    if one.remedy is not other.remedy:
        return remedies.index(one.remedy) > remedies.index(other.remedy)
    return one.until is not None and other.until is not None and one.until > other.until


def condemned(situation: Situation, fence: Fence, devices: Iterable[str]) -> Situation:
    """These slices are kept out of use, and the devices on them are no more what they were: none serves unscrubbed.

    What the GPU has counted by now is dealt with by that; the next hand-over is judged by what comes after it.
    """
    for device in devices:
        situation = _held(situation, situation.held[device].model_copy(update={"scrub": None, "hand_over": None}))
    return fenced(replace(situation, examined=_without(situation.examined, fence.gpu)), fence)


def reset_done(situation: Situation, gpu: str, now: datetime) -> Situation:
    """The GPU was reset: no instance is left, and what asked for a reset ends after a time of probation."""
    until = now + situation.probation
    fences = tuple(_on_probation(one, until) if one.gpu == gpu else one for one in situation.fences)
    made = frozenset(one for one in situation.made if one.gpu != gpu)
    examined = _without(situation.examined, gpu)  # Its counters begin anew.
    return replace(walked(situation, gpu, ()), fences=fences, made=made, examined=examined)


def maintenance_began(situation: Situation, gpu: str) -> Situation:
    """The GPU is being reset or converted from now on."""
    return replace(situation, maintained=situation.maintained | {gpu})


def maintenance_ended(situation: Situation, gpu: str, took: timedelta) -> Situation:
    """It is not any more, whatever came of it. What was in hand on any GPU could not go on: that time is not its."""
    for held in situation.held.values():
        if held.since is not None and held.state is not SlotState.READY:
            situation = _held(situation, held.model_copy(update={"since": held.since + took}))
    return replace(situation, maintained=situation.maintained - {gpu})


def _on_probation(fence: Fence, until: datetime) -> Fence:
    if fence.remedy is Remedy.TIME:
        return fence
    reason = f"{fence.reason} (that was done; it is used again after {format_time(until)})"
    return fence.model_copy(update={"remedy": Remedy.TIME, "until": until, "reason": reason})


def tidied(situation: Situation) -> Situation:
    """Records of creations that a kill prevented, of devices that nobody wants any more: what comes to lie there is not
    the agent's."""
    explained = {(one.slot.gpu, one.slot.profile, one.slot.start) for one in situation.held.values()}
    stale = {
        one
        for one in situation.made
        if not one.uuid
        and one.gpu in situation.instances
        and (one.gpu, one.profile, one.start) not in explained
        and not any((here.profile, here.start) == (one.profile, one.start) for here in situation.instances[one.gpu])
    }
    return replace(situation, made=situation.made - stale)


def lifted(situation: Situation, fences: Collection[Fence]) -> Situation:
    """These fences are gone."""
    return replace(situation, fences=tuple(one for one in situation.fences if one not in fences))


def fence_around(situation: Situation, gpu: str, mask: int) -> Fence | None:
    """A fence around any of these memory slices; None where there is none."""
    return next((one for one in situation.fences if one.gpu == gpu and one.mask & mask), None)


# ------------------------------------------------------------------------------------------------------- beginning


def rebooted(situation: Situation, now: datetime) -> Situation:
    """After a reboot no claim is prepared, no instance exists and nothing was handed to anybody yet."""
    held = {device: Held(slot=one.slot, since=now) for device, one in situation.held.items()}
    fences = tuple(_on_probation(one, now + situation.probation) for one in situation.fences)
    situation = replace(situation, gpus={}, xids={}, examined={})  # Another machine, for all that is known.
    return replace(situation, held=held, made=frozenset(), prepared={}, fences=fences, former={})


def resumed(
    situation: Situation, in_slice: Iterable[str], in_status: Mapping[str, datetime], now: datetime
) -> Situation:
    """After a restart: what the API server holds of what the agent had in hand.

    A device that was published before keeps its `ready_at`. One that was not was of no use to anybody while the agent
    was away: it is ready from now on, not from then.
    """
    there = set(in_slice)
    for device, held in situation.held.items():
        out = held.published or device in there
        again = held.state is SlotState.READY and (not out or held.shape is None)
        stored = held.ready_at is not None and in_status.get(device) == held.ready_at
        since = held.since if held.state is SlotState.READY else now  # While nobody was there no time was lost.
        change = {"published": device in there, "stored": stored, "since": since}
        anew = _AFRESH | {"since": now} if again else {}
        situation = _held(situation, held.model_copy(update=change | anew))
    return situation


def _held(situation: Situation, held: Held) -> Situation:
    return replace(situation, held=_with(situation.held, held.slot.device, held))


def _with(mapping: Mapping[K, V], key: K, value: V) -> dict[K, V]:
    return {**mapping, key: value}


def _without(mapping: Mapping[K, V], key: K) -> dict[K, V]:
    return {one: value for one, value in mapping.items() if one != key}


def _placed(at: Slot | Instance, uuid: str = "") -> Made:
    return Made(at.gpu, at.profile, at.start, uuid)


def _without_placement(made: frozenset[Made], at: Slot | Instance) -> frozenset[Made]:
    return frozenset(one for one in made if (one.gpu, one.profile, one.start) != (at.gpu, at.profile, at.start))
