"""A node in memory whose agent takes one step at a time, in any order that `diff` allows, with mishaps in between.

It plays hardware, API server, kubelet and holders; the agent's part is the real `situation` and `steps` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, assert_never

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent import steps
from gpu_tenancy.agent.claims import Refusal, admitted
from gpu_tenancy.agent.gpus import GpuFacts, Instance, Vitals
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.agent.steps import Announcement, Hardware, Making, Step
from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.names import DRIVER
from gpu_tenancy.api.node import GpuMode, Slot
from gpu_tenancy.mig.profiles import FULL, of_model

MODEL = "A100-SXM4-80GB"
MIG_GPU = "GPU-mig"
WHOLE = "GPU-whole"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def facts(uuid: str, mode: GpuMode, index: int = 0) -> GpuFacts:
    """A healthy A100 of 80 GB."""
    return GpuFacts(index, uuid, MODEL, 81920, 108, f"0000:{index:02x}:00.0", mode)


def holder(number: int) -> Holder:
    """Odd numbers are leases, even ones pools."""
    kind = HolderKind.GPU_LEASE if number % 2 else HolderKind.MINING_POOL
    return Holder(kind=kind, namespace=f"team-{number}", name=f"holder-{number}", uid=f"uid-{number}")


def slot(gpu: str, profile: str, start: int, number: int) -> Slot:
    """A slot of holder `number`; its device is named after placement and holder, as the operator does."""
    device = f"{gpu.lower()}-{profile.replace('.', '')}-{start}-{number}"
    return Slot(device=device, gpu=gpu, profile=profile, start=start, holder=holder(number), since=EPOCH)


def claim_of(devices: Sequence[str], *, holder: str, namespace: str, uid: str) -> dict[str, Any]:
    """A ResourceClaim on node n1 with these devices allocated, made for the holder with that UID."""
    opaque = {"driver": DRIVER, "parameters": ClaimHolder(holder=holder).to_wire()}
    results = [{"driver": DRIVER, "pool": "n1", "device": device, "request": "gpus"} for device in devices]
    return {
        "metadata": {"namespace": namespace, "name": "train", "uid": uid},
        "spec": {"devices": {"requests": [{"name": "gpus"}], "config": [{"opaque": opaque}]}},
        "status": {
            "allocation": {"devices": {"results": results}},
            "reservedFor": [{"resource": "pods", "name": "train-0", "uid": "p"}],
        },
    }


def instance(gpu: str, profile: str, start: int, serial: int) -> Instance:
    """A MIG instance of 80-GB geometry."""
    size = of_model(MODEL)[profile].size
    return Instance(gpu, profile, start, size, f"MIG-{serial}", serial, 0, 9728 * size, 14)


@dataclass
class World:
    """Truth and belief: what the hardware, the slice and the holders are, and what the agent knows of it."""

    agent: Situation = field(
        default_factory=lambda: Situation(
            gpus={MIG_GPU: facts(MIG_GPU, GpuMode.MIG, 0), WHOLE: facts(WHOLE, GpuMode.WHOLE, 1)},
            instances={MIG_GPU: (), WHOLE: ()},
        )
    )
    hardware: dict[str, Instance] = field(default_factory=dict)
    """Instances by MIG UUID."""
    in_slice: set[str] = field(default_factory=set)
    in_status: dict[str, datetime] = field(default_factory=dict)
    processes: set[str] = field(default_factory=set)
    """UUIDs of devices that a process uses."""
    sleepers: set[str] = field(default_factory=set)
    """UIDs of claims that a process carries which has its devices and does not use them."""
    given: dict[str, str] = field(default_factory=dict)
    """UUID of the device that each claim was given when it was prepared."""
    residue: dict[tuple[str, int], str] = field(default_factory=dict)
    """Whose data is on which memory slice of which GPU: UID of the holder."""
    foreign: set[str] = field(default_factory=set)
    """UUIDs of instances that somebody else made."""
    disk: Situation = field(default_factory=Situation)
    """What the checkpoint holds; kept in step, as the agent writes it before it acts."""
    history: list[Step] = field(default_factory=list)
    serial: int = 0
    now: datetime = EPOCH

    def enabled(self) -> tuple[Step, ...]:
        """Steps that would change something: waiting for what is waited for already changes nothing."""
        return tuple(step for step in steps.diff(self.agent) if not self._is_idle(step))

    def _is_idle(self, step: Step) -> bool:
        if not isinstance(step, steps.Await):
            return False
        held = self.agent.held[step.device]
        return (held.state, held.message) == (step.state, step.message)

    def take(self, step: Step, *, fails: bool = False) -> None:
        """Carry out one step, or let the driver refuse it."""
        self.history.append(step)
        self.now += timedelta(milliseconds=1)
        match step:
            case steps.Withdraw() | steps.Store() | steps.Publish():
                self._announce(step)
            case _ if isinstance(step, Hardware):
                self._on_hardware(step, fails=fails)
            case _:
                self.agent = steps.noted(self.agent, step, self.now)
        self.disk = self.agent

    def _announce(self, step: Announcement) -> None:
        match step:
            case steps.Withdraw(device=device):
                self.in_slice.discard(device)
            case steps.Publish(device=device):
                held = self.agent.held[device]
                left = {self.residue.get((held.slot.gpu, number)) for number in self.numbers(held.slot)}
                assert left <= {None, held.slot.holder.uid}, f"{device} is published with data of {left}"
                self.in_slice.add(device)
            case steps.Store(device=device):
                ready_at = self.agent.held[device].ready_at
                assert ready_at is not None
                self.in_status[device] = ready_at
                self.agent = known.stored(self.agent, {device: ready_at})
            case _:
                assert_never(step)
        self.agent = known.published(self.agent, self.in_slice)

    def _on_hardware(self, step: Hardware, *, fails: bool) -> None:
        subject = steps.subject_of(step)
        if fails:
            self.agent = known.rested(self.agent, subject)
            return
        match step:
            case steps.Prove(uuid=uuid, traces=traces):
                self.sleepers -= set(traces)  # They are killed.
                if uuid in self.processes:
                    self.agent = known.rested(self.agent, subject)
                else:
                    self.agent = known.proven_empty(self.agent, subject, self.now)
            case steps.Destroy(instance=there):
                assert there.uuid not in self.processes, "destroyed an instance with a process on it"
                del self.hardware[there.uuid]
                self.agent = known.destroyed(self.agent, subject, there, self.now)
            case steps.ResetGpu(gpu=gpu):
                self._assert_empty(gpu)
                self.agent = known.reset_done(self.agent, gpu, self.now)
            case steps.Convert(gpu=gpu, mode=mode):
                self._assert_empty(gpu)
                facts = [replace(one, mode=mode) if one.uuid == gpu else one for one in self.agent.gpus.values()]
                self.agent = known.reset_done(known.listed(self.agent, facts), gpu, self.now)
            case _:
                self._make(step)

    def _assert_empty(self, gpu: str) -> None:
        assert gpu not in self.processes, "a GPU was reset under a process"
        assert not [one for one in self.hardware.values() if one.gpu == gpu], "a GPU was reset with instances on it"
        assert not [one for one in self.in_slice if self.agent.held[one].slot.gpu == gpu], "reset while in the slice"

    def _make(self, step: Making) -> None:
        wanted = step.slot
        match step:
            case steps.Restore():
                given = {one.device for claim in self.agent.prepared.values() for one in claim.devices}
                served = [self.agent.held[one].slot for one in given - {wanted.device}]
                leased = [one for one in served if one.holder.kind is HolderKind.GPU_LEASE and one.gpu == wanted.gpu]
                assert not leased, "settings of a GPU were changed under a lease"
                self.agent = known.restored(self.agent, wanted.device, self.now)
            case steps.Create():
                self._create(wanted)
            case steps.Adopt(instance=there):
                self.agent = known.partitioned(self.agent, wanted.device, there, self.now)
            case steps.Scrub(uuid=uuid):
                self._scrub(wanted, uuid)
            case steps.Verify():
                assert self.agent.held[wanted.device].uuid
                mask = steps.mask_of(self.agent, wanted.device)
                self.agent = known.made_ready(self.agent, wanted.device, Vitals(), mask, self.now)
            case _:
                assert_never(step)

    def _scrub(self, wanted: Slot, uuid: str) -> None:
        assert uuid not in {self.given[claim] for claim in self.agent.prepared}, "scrubbed under a prepared claim"
        assert uuid not in self.processes, "scrubbed a device with a process on it"
        for number in self.numbers(wanted):
            self.residue.pop((wanted.gpu, number), None)
        scrub = known.Scrub(bytes=1 << 30, samples=16)
        self.agent = known.scrubbed(self.agent, wanted.device, scrub, self.now)

    def numbers(self, slot: Slot) -> list[int]:
        """The memory slices of a slot."""
        mask = steps.slices(self.agent.gpus.get(slot.gpu), slot)
        return [number for number in range(8) if mask >> number & 1]

    def _create(self, wanted: Slot) -> None:
        if wanted.profile == FULL:
            self.agent = known.partitioned(self.agent, wanted.device, self.agent.gpus[wanted.gpu], self.now)
            return
        self.begin_creation(wanted)
        self.walk()
        made = next(one for one in self.hardware.values() if (one.profile, one.start) == (wanted.profile, wanted.start))
        self.agent = known.partitioned(self.agent, wanted.device, made, self.now)

    def begin_creation(self, wanted: Slot) -> None:
        """The part of a creation after which the agent may die: intended, on disk, and done by the driver."""
        self.agent = known.intended(self.agent, wanted)
        self.disk = self.agent
        self.serial += 1
        fresh = instance(wanted.gpu, wanted.profile, wanted.start, self.serial)
        taken = sum(bits(one) for one in self.hardware.values())
        assert not taken & bits(fresh), "created an instance over another one"
        self.hardware[fresh.uuid] = fresh

    def walk(self) -> None:
        """The agent lists the instances of the MIG GPU."""
        self.agent = known.walked(self.agent, MIG_GPU, self.hardware.values())

    # ------------------------------------------------------------------------------------------------- the others

    def specify(self, wanted: list[Slot]) -> None:
        """The operator writes the spec."""
        self.agent = known.specified(self.agent, wanted, self.agent.generation + 1)

    def prepare(self, device: str, uid: str, *, runs: bool = True) -> bool:
        """kubelet asks for a claim of the holder on the device; whether it was prepared.

        `runs`: a process begins to use it.
        """
        owner = self.agent.held[device].slot.holder
        body = claim_of([device], holder=owner.uid, namespace=owner.namespace, uid=uid)
        try:
            claim = admitted(self.agent, "n1", body, uid)
        except Refusal:
            return False
        self.agent = known.claimed(self.agent, claim)
        held = self.agent.held[device]
        for number in self.numbers(held.slot):
            assert self.residue.get((held.slot.gpu, number)) in {None, owner.uid}, "a pod can read another's data"
            self.residue[held.slot.gpu, number] = owner.uid
        self.given[uid] = held.uuid
        if runs:
            self.processes.add(held.uuid)
        else:
            self.sleepers.add(uid)
        self.disk = self.agent
        return True

    def unprepare(self, uid: str) -> None:
        """kubelet gives the claim back; its processes may linger."""
        self.agent = known.unclaimed(self.agent, uid, self.now)
        self.disk = self.agent

    def has_sleeper(self, uuid: str) -> bool:
        """Whether a process lives that was given the device with that UUID."""
        return uuid in {self.given[claim] for claim in self.sleepers}

    def wake(self) -> None:
        """Every back-off ends."""
        for subject in self.agent.resting:
            self.agent = known.woken(self.agent, subject)

    def replace(self, uuid: str) -> None:
        """Somebody destroys an instance and makes one of their own in its place."""
        gone = self.hardware.pop(uuid)
        self.serial += 1
        fresh = instance(gone.gpu, gone.profile, gone.start, self.serial)
        self.hardware[fresh.uuid] = fresh
        self.foreign.add(fresh.uuid)
        self.walk()

    def evict_strangers(self) -> None:
        """Whoever made instances behind the agent's back takes them away."""
        for uuid in self.foreign & self.hardware.keys():
            del self.hardware[uuid]
        self.processes -= self.foreign
        self.walk()

    def restart(self) -> None:
        """kill -9, and a new agent on the same boot: only disk, API server and hardware are left."""
        fresh = replace(self.disk, gpus=self.agent.gpus, proven=frozenset(), resting=frozenset())
        self.agent = known.resumed(fresh, self.in_slice, self.in_status, self.now)
        self.agent = known.specified(self.agent, self.agent.wanted.values(), self.agent.generation)
        self.walk()

    def reboot(self) -> None:
        """The node boots: no instance, no process, no claim survives."""
        self.hardware.clear()
        self.processes.clear()
        self.sleepers.clear()
        there = self.agent.gpus.values()
        fresh = known.listed(
            known.rebooted(replace(self.disk, proven=frozenset(), resting=frozenset()), self.now), there
        )
        self.agent = known.resumed(fresh, self.in_slice, self.in_status, self.now)
        self.disk = self.agent
        self.walk()

    def settle(self, limit: int = 500) -> None:
        """Everybody lets go; take steps until none is left."""
        for uid in list(self.agent.prepared):
            self.unprepare(uid)
        self.processes.clear()
        for _ in range(limit):
            self.wake()
            enabled = self.enabled()
            if not enabled:
                return
            self.take(enabled[0])
        raise AssertionError(f"does not come to rest: {self.enabled()}")


def bits(one: Instance) -> int:
    """Memory slices of an instance."""
    return ((1 << one.size) - 1) << one.start
