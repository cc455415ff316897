"""What follows from a situation: the difference between what should be and what is, as steps.

Pure. `diff` returns the steps that can be taken now; each makes others possible, and with none left the node is as its
spec says. The order in which a device changes hands is the specification:

- taking away: Withdraw (out of the slice) → Drain (say so) → Await (claims) → Prove (empty) → Destroy → Forget;
- making: Accept → Await (former holders of the same memory slices) → Restore (settings of the GPU) → Create or Adopt →
  Scrub → Verify → Store → Publish.

`phase` says at which of these a device is; what is not over in its time is quarantined and tried on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeAlias, assert_never

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.gpus import GpuFacts, Instance
from gpu_tenancy.agent.situation import (
    WHOLE_GPU,
    Held,
    PreparedClaim,
    Remedy,
    Situation,
    claims_on,
    instance_of,
    is_own,
    is_wanted,
)
from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import GpuMode, HandOverStepType, Slot, SlotState
from gpu_tenancy.mig.profiles import FULL, of_model


@dataclass(frozen=True, slots=True)
class Accept:
    """Take the slot in hand."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take the device out of the ResourceSlice."""

    device: str


@dataclass(frozen=True, slots=True)
class Drain:
    """The device is out of the slice: say that it waits for its holder."""

    device: str


@dataclass(frozen=True, slots=True)
class Await:
    """Nothing to do for the device but to wait, for the reason given."""

    device: str
    state: SlotState
    message: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The device cannot be made or cannot serve, for the reason given."""

    device: str
    message: str


@dataclass(frozen=True, slots=True)
class Mend:
    """Nothing is wrong any more with what the device is on."""

    device: str


@dataclass(frozen=True, slots=True)
class Remake:
    """The instance under a serving device is gone: make it once more."""

    device: str


@dataclass(frozen=True, slots=True)
class Prove:
    """End what is left of the former holder's pods, and look twice whether any process uses the device.

    `subject` is its name, or the UUID of an orphaned instance; `traces` are UIDs that its holder's processes carry.
    """

    subject: str
    gpu: str
    uuid: str
    traces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Destroy:
    """Destroy the MIG instance; `subject` is the device it was, or the UUID of an orphaned instance."""

    subject: str
    instance: Instance


@dataclass(frozen=True, slots=True)
class Restore:
    """Put clocks, power limit and compute mode of the slot's GPU back: nobody is served on it."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Create:
    """Create the MIG instance at exactly the slot's placement; of a whole GPU, check that nobody else uses it."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Adopt:
    """The slot's instance exists already, of the agent's own making: take it as it is."""

    slot: Slot
    instance: Instance


@dataclass(frozen=True, slots=True)
class Scrub:
    """Overwrite all memory that the holder will be able to reach, from inside the device."""

    slot: Slot
    uuid: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Examine GPU and device before the device serves."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Store:
    """Write into GpuNode.status since when the device is ready."""

    device: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Put the device into the ResourceSlice."""

    device: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing is left of the device: drop it."""

    device: str


Bookkeeping: TypeAlias = Accept | Drain | Await | Fail | Mend | Remake | Forget
"""Steps that change nothing outside the agent's memory."""


@dataclass(frozen=True, slots=True)
class ResetGpu:
    """Reset the GPU, on which nothing is: a fence asks for it."""

    gpu: str


@dataclass(frozen=True, slots=True)
class Convert:
    """Bring the GPU, on which nothing is, into the mode that its Node declares, or that the spec asks for; what to make
    on it comes after."""

    gpu: str
    mode: GpuMode


Maintenance: TypeAlias = ResetGpu | Convert
"""Steps on a GPU on which nothing is."""
Making: TypeAlias = Restore | Create | Adopt | Scrub | Verify
"""Steps that make a device."""
Hardware: TypeAlias = Prove | Destroy | Making | Maintenance
"""Steps on hardware; one at a time in each lane."""
Announcement: TypeAlias = Withdraw | Store | Publish
"""Steps on the API server; one write may carry several."""
Step: TypeAlias = Bookkeeping | Hardware | Announcement


def diff(situation: Situation) -> tuple[Step, ...]:
    """Every step that can be taken now, GPU by GPU; leases before pools on each.

    Empty when all is as specified, and before there is a spec: nothing is taken away for want of one.
    """
    if situation.generation == 0:
        return ()
    held_on: dict[str, list[Held]] = {gpu: [] for gpu in _gpus_of(situation)}
    for held in sorted(situation.held.values(), key=_rank):
        held_on[held.slot.gpu].append(held)
    return tuple(step for gpu, held_here in held_on.items() for step in _steps_on(situation, gpu, held_here))


def settled(situation: Situation, now: datetime) -> tuple[Situation, tuple[Step, ...]]:
    """The situation after every step that changes nothing outside the agent's memory, and the steps that are left."""
    while True:
        before, left = situation, diff(situation)
        for step in left:
            if isinstance(step, Bookkeeping):
                situation = noted(situation, step, now)
        if situation is before:
            return situation, left


def noted(situation: Situation, step: Bookkeeping, now: datetime) -> Situation:
    """The situation after a step that changes nothing outside the agent's memory."""
    match step:
        case Accept(slot=slot):
            return known.accepted(situation, slot, now)
        case Drain(device=device):
            return known.drained(situation, device, mask_of(situation, device), now)
        case Await(device=device, state=state, message=message):
            return known.waiting(situation, device, state, message)
        case Fail(device=device, message=message):
            return known.failed(situation, device, message, now)
        case Mend(device=device):
            return known.mended(situation, device, now)
        case Remake(device=device):
            return known.undone(situation, device, now)
        case Forget(device=device):
            return known.forgotten(situation, device, mask_of(situation, device), now)
        case _:
            assert_never(step)


def lane_of(step: Hardware) -> str:
    """What the step has for itself while it is under way: its GPU, by UUID; a scrub has only its device, by name."""
    match step:
        case Prove(gpu=gpu) | ResetGpu(gpu=gpu) | Convert(gpu=gpu):
            return gpu
        case Destroy(instance=instance):
            return instance.gpu
        case Scrub(slot=slot):
            return slot.device
        case Restore(slot=slot) | Create(slot=slot) | Adopt(slot=slot) | Verify(slot=slot):
            return slot.gpu
        case _:
            assert_never(step)


def subject_of(step: Hardware) -> str:
    """Name of the device that the step is about, or what an orphaned instance is called, or the GPU's UUID."""
    if isinstance(step, Maintenance):
        return step.gpu
    return step.subject if isinstance(step, Prove | Destroy) else step.slot.device


def scrubs_to_come(situation: Situation) -> int:
    """Devices that are to be scrubbed soon."""
    return sum(
        one.hand_over is None and one.scrub is None and device not in situation.scrubbing
        for device, one in situation.held.items()
        if one.state is SlotState.PREPARING
    )


def mask_of(situation: Situation, device: str) -> int:
    """Memory slices of a device in hand, as bits."""
    slot = situation.held[device].slot
    return slices(situation.gpus.get(slot.gpu), slot)


def _gpus_of(situation: Situation) -> list[str]:
    """UUIDs of every GPU that is there, wanted or in hand."""
    gpus = dict.fromkeys(situation.gpus)
    gpus |= dict.fromkeys(situation.instances)
    gpus |= dict.fromkeys(slot.gpu for slot in situation.wanted.values())
    gpus |= dict.fromkeys(held.slot.gpu for held in situation.held.values())
    return sorted(gpus)


def _steps_on(situation: Situation, gpu: str, held_here: Sequence[Held]) -> Iterator[Step]:
    """What is taken away comes first: somebody may wait for its place."""
    stays = []
    for held in held_here:
        if held.published and not serves(situation, held):
            yield Withdraw(held.slot.device)
        elif is_wanted(situation, held):
            stays.append(held)
        else:
            yield from _take_away(situation, held)
    for held in stays:
        yield from _make(situation, held)
    if situation.instances.get(gpu):
        yield from _orphans(situation, gpu, held_here)
    accepted = [slot for device, slot in situation.wanted.items() if slot.gpu == gpu and device not in situation.held]
    yield from map(Accept, accepted)
    if (facts := situation.gpus.get(gpu)) is not None:
        yield from _maintain(situation, facts)


def _maintain(situation: Situation, gpu: GpuFacts) -> Iterator[Step]:
    """What is done to a GPU as a whole: only while nothing is on it, wanted or not, ours or not."""
    if gpu.uuid in situation.resting or _is_occupied(situation, gpu):
        return
    fences = [one for one in situation.fences if one.gpu == gpu.uuid]
    if any(one.remedy is Remedy.REBOOT for one in fences):
        return
    if any(one.remedy is Remedy.RESET for one in fences):
        yield ResetGpu(gpu.uuid)  # One that answers nothing but that it needs this, too.
    elif not gpu.healthy or situation.conflict or any(one.vanished for one in situation.gpus.values()):
        return  # Modes are declared by index, and indices have moved where one has vanished.
    elif (mode := known.mode_for(situation, gpu)) is not gpu.mode:
        yield Convert(gpu.uuid, mode)


def _is_occupied(situation: Situation, gpu: GpuFacts) -> bool:
    """Something is on the GPU, or will be, or it is not known what is."""
    if gpu.mode is GpuMode.MIG and (gpu.uuid not in situation.instances or situation.instances[gpu.uuid]):
        return True
    slots = (*situation.wanted.values(), *(held.slot for held in situation.held.values()))
    return any(slot.gpu == gpu.uuid for slot in slots)


def _rank(held: Held) -> tuple[bool, int, str]:
    """Leases first: somebody waits for them and somebody pays for them."""
    return (held.slot.holder.kind is not HolderKind.GPU_LEASE, held.slot.start, held.slot.device)


def serves(situation: Situation, held: Held) -> bool:
    """Whether a device that stands in the ResourceSlice may stay there: wanted, ready, and nothing wrong with it."""
    return is_wanted(situation, held) and held.state is SlotState.READY and fault(situation, held) is None


def slice_next(situation: Situation, left: Iterable[Step]) -> tuple[Held, ...]:
    """The devices of the next ResourceSlice by name: what stands there and serves, and what is to be published.

    `left` are the steps that follow from the situation.
    """
    publish = [step.device for step in left if isinstance(step, Publish)]
    stays = (held for held in situation.held.values() if held.published and serves(situation, held))
    joins = (situation.held[device] for device in publish)
    return tuple(sorted((*stays, *joins), key=lambda held: held.slot.device))


# ----------------------------------------------------------------------------------------------------- taking away


def _take_away(situation: Situation, held: Held) -> Iterator[Step]:
    device = held.slot.device
    if held.state is not SlotState.DRAINING:
        yield Drain(device)
        return
    step = _leaving(situation, held)
    instance = instance_of(situation, held)
    if step is HandOverStepType.EVICT:
        yield Await(device, held.state, release_blocked(situation, held) or "")
    elif device in situation.scrubbing:
        yield Await(device, held.state, "waits for its scrub to end")
    elif device in situation.resting:
        yield Await(device, held.state, held.message)
    elif _was_handed_out(held) and not was_walked(situation, held.slot):
        yield Await(device, held.state, UNWALKED)
    elif step is HandOverStepType.PROVE_EMPTY:
        yield Prove(device, held.slot.gpu, held.uuid or (instance.uuid if instance else ""), held.traces)
    elif instance is not None:
        yield Destroy(device, instance)
    else:
        yield Forget(device)


def _leaving(situation: Situation, held: Held) -> HandOverStepType | None:
    """At which step of giving way a device is; None where nothing is left to do."""
    if claims_on(situation, held.slot.device):
        return HandOverStepType.EVICT
    instance = instance_of(situation, held)
    if _was_handed_out(held) and _still_there(held, instance) and held.slot.device not in situation.proven:
        return HandOverStepType.PROVE_EMPTY
    return HandOverStepType.DESTROY if instance is not None else None


def _was_handed_out(held: Held) -> bool:
    return held.ready_at is not None


def _still_there(held: Held, instance: Instance | None) -> bool:
    """Whether there is a device on which a process could run."""
    return held.slot.profile == FULL or instance is not None


UNWALKED: Final = "waits until the driver lists the MIG instances of its GPU; the agent's log says why it does not"


def was_walked(situation: Situation, slot: Slot) -> bool:
    """Whether it is known which MIG instances there are, where that matters.

    Not to know is no fault: what serves goes on serving, but nothing is made or taken away by guessing.
    """
    return slot.profile == FULL or slot.gpu in situation.instances


def release_blocked(situation: Situation, held: Held) -> str | None:
    """Which claims on the device kubelet has not given back, as a sentence; None where it has given back all."""
    claims = claims_on(situation, held.slot.device)
    if not claims:
        return None
    return f"waits for {_who(held.slot.holder)} to release {held.slot.device}: {_still_prepared(claims)}"


def _still_prepared(claims: tuple[PreparedClaim, ...]) -> str:
    named = ", ".join(_user(claim) for claim in claims[:3])
    return f"{len(claims)} {'claim' if len(claims) == 1 else 'claims'} still prepared ({named})"


def _user(claim: PreparedClaim) -> str:
    if claim.users:
        return f"pod {claim.namespace}/{claim.users[0]}"
    return f"claim {claim.namespace}/{claim.name}"


_KINDS: Final[Mapping[HolderKind, str]] = {HolderKind.GPU_LEASE: "lease", HolderKind.MINING_POOL: "mining pool"}


def _who(holder: Holder) -> str:
    return f"{_KINDS[holder.kind]} {holder.namespace}/{holder.name}"


def _orphans(situation: Situation, gpu: str, held_here: Sequence[Held]) -> Iterator[Step]:
    """Instances of the agent's own making that no device in hand explains: they hold memory for nobody."""
    explained = [instance_of(situation, held) for held in held_here]
    for instance in situation.instances.get(gpu, ()):
        subject = orphan(instance)
        ours = situation.destroys_foreign or is_own(situation, instance)
        if instance in explained or not ours or subject in situation.resting:
            continue
        if instance.uuid and subject not in situation.proven:
            yield Prove(subject, gpu, instance.uuid)
        else:
            yield Destroy(subject, instance)


def orphan(instance: Instance) -> str:
    """What an instance that belongs to no device is called in `proven` and `resting`."""
    return instance.uuid or f"{instance.gpu}/gi{instance.gpu_instance}"


# ---------------------------------------------------------------------------------------------------------- making


def _make(situation: Situation, held: Held) -> Iterator[Step]:
    device = held.slot.device
    wrong = fault(situation, held)
    match held.state:
        case SlotState.DRAINING:
            yield Accept(situation.wanted[device])
        case _ if wrong is not None:
            if (held.state, held.message) != (SlotState.FAILED, wrong):
                yield Fail(device, wrong)
        case _ if held.faulty:
            yield Mend(device)
        case SlotState.READY:
            yield from _announce(situation, held)
        case _:
            yield _begin(situation, held)


def _announce(situation: Situation, held: Held) -> Iterator[Step]:
    if not is_there(situation, held):
        yield Remake(held.slot.device)
    elif not held.stored:
        yield Store(held.slot.device)
    elif not held.published:
        yield Publish(held.slot.device)


def phase(situation: Situation, held: Held) -> HandOverStepType | None:
    """At which step of its hand-over a device is; None where it serves, cannot be made as things are, or waits for
    another device to give way."""
    if held.state is SlotState.DRAINING or not is_wanted(situation, held):
        return _leaving(situation, held)
    if held.state is SlotState.READY or fault(situation, held) is not None or making_blocked(situation, held):
        return None
    return _making(situation, held)


def _making(situation: Situation, held: Held) -> HandOverStepType:
    """At which step of being made a device is that nothing stands in the way of."""
    if not held.uuid and not known.is_done(held, HandOverStepType.RESET) and _is_alone(situation, held):
        return HandOverStepType.RESET
    if not held.uuid:
        return HandOverStepType.PARTITION
    if held.hand_over is None and held.scrub is None:
        return HandOverStepType.SCRUB
    return HandOverStepType.VERIFY


def _is_alone(situation: Situation, held: Held) -> bool:
    """No lease is served on its GPU: then it may be tuned, and has to be put back."""
    return not any(
        other.ready_at is not None and other.slot.gpu == held.slot.gpu and other is not held
        for other in situation.held.values()
        if other.slot.holder.kind is HolderKind.GPU_LEASE
    )


def _begin(situation: Situation, held: Held) -> Step:
    slot = held.slot
    if not was_walked(situation, slot):
        return Await(slot.device, SlotState.PREPARING, UNWALKED)
    blocked = making_blocked(situation, held)
    if blocked is not None:
        return Await(slot.device, SlotState.PREPARING, blocked)
    if slot.device in situation.resting:
        return Await(slot.device, held.state, held.message)
    if held.uuid and not is_there(situation, held):
        return Remake(slot.device)
    match _making(situation, held):
        case HandOverStepType.RESET:
            return Restore(slot)
        case HandOverStepType.SCRUB:
            return Scrub(slot, held.uuid)
        case HandOverStepType.VERIFY:
            return Verify(slot)
        case _:
            return _partition(situation, held)


def _partition(situation: Situation, held: Held) -> Step:
    """Create the instance, or take what is there already; half of one, which a killed agent has left, is of no use."""
    instance = instance_of(situation, held)
    if instance is None:
        return Create(held.slot)
    return Adopt(held.slot, instance) if instance.uuid else Destroy(held.slot.device, instance)


def is_there(situation: Situation, held: Held) -> bool:
    """Whether what serves is there, as far as it is known."""
    if held.slot.profile == FULL or not was_walked(situation, held.slot):
        return True
    instance = instance_of(situation, held)
    return instance is not None and bool(instance.uuid)


def making_blocked(situation: Situation, held: Held) -> str | None:
    """Whose memory slices the device waits for, as a sentence; None where they are free."""
    mask = slices(situation.gpus.get(held.slot.gpu), held.slot)
    for other in sorted(situation.held.values(), key=_rank):
        if other is not held and _occupies(situation, other) and _overlap(situation, other, held.slot.gpu, mask):
            return release_blocked(situation, other) or _takes(other)
    for instance in situation.instances.get(held.slot.gpu, ()):
        if instance_mask(instance) & mask and is_own(situation, instance) and instance_of(situation, held) != instance:
            where = f"{instance.profile} at memory slice {instance.start}"
            return f"waits for MIG instance {where} of a former device to be destroyed"
    return None


def _takes(other: Held) -> str:
    trouble = f": {other.message}" if other.message else ""
    return f"waits for {other.slot.device} of {_who(other.slot.holder)} to be taken away{trouble}"


def _occupies(situation: Situation, held: Held) -> bool:
    device = held.slot.device
    had = _was_handed_out(held) or bool(held.uuid) or device in situation.scrubbing
    return had or instance_of(situation, held) is not None


def _overlap(situation: Situation, held: Held, gpu: str, mask: int) -> bool:
    return held.slot.gpu == gpu and bool(slices(situation.gpus.get(gpu), held.slot) & mask)


def slices(gpu: GpuFacts | None, slot: Slot) -> int:
    """Memory slices of a slot as bits; all of them where the geometry is not known."""
    profile = None if gpu is None or slot.profile == FULL else of_model(gpu.model).get(slot.profile)
    return WHOLE_GPU if profile is None else profile.mask(slot.start)


def instance_mask(instance: Instance) -> int:
    """Memory slices of an instance, as bits."""
    return ((1 << instance.size) - 1) << instance.start


# ---------------------------------------------------------------------------------------------------------- faults


def fault(situation: Situation, held: Held) -> str | None:
    """Why the device cannot be made or cannot serve, as a sentence naming the remedy; None where nothing is wrong."""
    slot = held.slot
    gpu = situation.gpus.get(slot.gpu)
    if gpu is None:
        return f"GPU {slot.gpu} is not on this node; it was taken out, or the slot is for another node"
    if not gpu.healthy:
        return f"GPU {gpu.index} is not healthy: {gpu.message}"
    if situation.conflict and held.state is not SlotState.READY:
        return situation.conflict
    fence = known.fence_around(situation, gpu.uuid, slices(gpu, slot))
    return (fence.reason if fence is not None else None) or _misfit(gpu, slot) or _intruder(situation, gpu, slot)


def _misfit(gpu: GpuFacts, slot: Slot) -> str | None:
    """Why such a slot cannot be on such a GPU at all."""
    if (slot.profile == FULL) != (gpu.mode is GpuMode.WHOLE):
        wanted = "a whole GPU" if slot.profile == FULL else f"the MIG profile {slot.profile}"
        return f"GPU {gpu.index} is in mode {gpu.mode}, the slot asks for {wanted}; modes change at onboarding only"
    if slot.profile == FULL:
        return None
    profile = of_model(gpu.model).get(slot.profile)
    if profile is None:
        return f"{gpu.model} has no MIG profile {slot.profile}; it has {', '.join(of_model(gpu.model)) or 'none'}"
    if slot.start not in profile.starts:
        return (
            f"{slot.profile} cannot start at memory slice {slot.start} of {gpu.model}, only at {list(profile.starts)}"
        )
    return None


def _intruder(situation: Situation, gpu: GpuFacts, slot: Slot) -> str | None:
    """Which instance of somebody else's making lies where the device should be."""
    mask = slices(gpu, slot)
    for instance in foreign(situation, gpu.uuid):
        if instance_mask(instance) & mask:
            return intrusion(gpu, instance)
    return None


def foreign(situation: Situation, gpu: str) -> tuple[Instance, ...]:
    """Instances on a GPU that the agent did not create."""
    return tuple(one for one in situation.instances.get(gpu, ()) if not is_own(situation, one))


def intrusion(gpu: GpuFacts, instance: Instance) -> str:
    """The sentence about an instance that the agent did not create."""
    return (
        f"GPU {gpu.index} holds MIG instance {instance.profile} at memory slice {instance.start} "
        f"(GPU instance {instance.gpu_instance}) that gpu-tenancy did not create; destroy it with "
        f"nvidia-smi mig -dci and -dgi once nobody uses it"
    )
