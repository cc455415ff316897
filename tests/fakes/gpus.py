"""A100s in memory behind the `Gpus` Protocol: their MIG rules, their times, and their ways to fail.

With a state file the hardware outlives the agent's process, as hardware does, and another process may change it (a
`FakeGpus` on the same file). It also keeps the agent to its word: two calls for one GPU at a time are an error.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import Field

from gpu_tenancy.agent.clock import Clock, SystemClock
from gpu_tenancy.agent.gpus import (
    GpuError,
    GpuEvent,
    GpuFacts,
    GpuLost,
    Instance,
    InsufficientResources,
    InUse,
    Process,
    Telemetry,
    Vitals,
)
from gpu_tenancy.api.base import ApiModel
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.mig.profiles import Profile, of_model

CREATE_SECONDS: Final[Mapping[int, float]] = {1: 0.16, 2: 0.17, 3: 0.20, 4: 0.21, 7: 0.24}
"""Time to create an instance, by compute slices."""
DESTROY_SECONDS: Final[Mapping[int, float]] = {1: 0.20, 2: 0.20, 3: 0.21, 4: 0.21, 7: 0.22}
"""Time to destroy an instance, by compute slices."""
MEMORY_MIB: Final[Mapping[str, Mapping[int, int]]] = {
    "40GB": {1: 4864, 2: 9856, 3: 19968, 4: 19968, 7: 40192},
    "80GB": {1: 9728, 2: 19968, 3: 40192, 4: 40192, 7: 80640},
}
"""Memory of an instance in MiB, by compute slices."""
TOTAL_MIB: Final[Mapping[str, int]] = {"40GB": 40960, "80GB": 81920}
MULTIPROCESSORS: Final = 108
POWER_LIMIT_MW: Final = 400_000
RESET_SECONDS: Final = 2.0
DRIVER_VERSION: Final = "570.148.08"
PER_SLICE: Final = 14
GPU_INSTANCE_IDS: Final[Mapping[int, range]] = {8: range(1), 4: range(1, 3), 2: range(3, 7), 1: range(7, 15)}
"""GPU instance ids by memory slices: a tree, not a counter."""


class Faults(ApiModel):
    """What is wrong with one GPU."""

    lost: bool = False
    """It has fallen off the bus."""
    in_use: int = 0
    """So many destructions to come are refused as in use."""
    no_room: int = 0
    """So many creations to come are refused as having no room."""
    unsure: int = 0
    """So many listings to come show it as not healthy, though it is."""
    unlisted: int = 0
    """So many listings of its instances to come fail."""
    slow_seconds: float = 0.0
    """Every call on it takes so much longer."""
    reset_refused: bool = False
    """It cannot be reset alone."""
    remap_pending: bool = False
    """A memory row waits for a reset."""
    errors: int = 0
    """Uncorrectable memory errors since its driver was loaded."""
    unseen: bool = False
    """The driver does not even list it."""


class _Made(ApiModel):
    gpu: int
    profile: str
    start: int
    uuid: str
    gpu_instance: int
    compute_instance: int | None = 0


class _Running(ApiModel):
    device: str
    pid: int
    name: str


class Hardware(ApiModel):
    """Everything that a restart of the agent does not change; immutable, replaced as a whole."""

    boot: int = 1
    serial: int = 0
    instances: tuple[_Made, ...] = ()
    processes: tuple[_Running, ...] = ()
    faults: dict[int, Faults] = Field(default_factory=dict)
    modes: dict[int, GpuMode] = Field(default_factory=dict)
    """Of the GPUs whose mode was changed."""
    pending: dict[int, GpuMode] = Field(default_factory=dict)
    """Modes that wait for a reset."""
    power_limits_mw: dict[int, int] = Field(default_factory=dict)
    """Of the GPUs that have another than the default."""


class FakeGpus:
    """The GPUs of one node. `mig` are the indices in MIG mode."""

    def __init__(
        self,
        node: str,
        *,
        count: int = 8,
        model: str = "A100-SXM4-80GB",
        mig: Iterable[int] = (),
        clock: Clock | None = None,
        state: Path | None = None,
    ) -> None:
        self.node = node
        self.model = model
        self.uuids = tuple(f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'{node}/{index}')}" for index in range(count))
        self._mig = frozenset(mig)
        self.calls: list[tuple[str, str]] = []
        """(call, subject) of every change that was carried out, in order."""
        self._clock = clock or SystemClock()
        self._state = state
        self._stamp: tuple[int, int] | None = None
        self._hardware = Hardware()
        self._under_way: set[int] = set()
        self._told: asyncio.Queue[GpuEvent] = asyncio.Queue()

    # -------------------------------------------------------------------------------------------------- the Protocol

    async def boot_id(self) -> str:
        """Identity of the boot."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.node}/boot/{self.hardware.boot}"))

    async def list(self) -> Sequence[GpuFacts]:
        """Every GPU; a lost one is not healthy."""
        self._refresh()
        return [self._facts(index) for index in range(len(self.uuids)) if not self._faults(index).unseen]

    async def instances(self, gpu: str) -> Sequence[Instance]:
        """Instances of one GPU, by memory slice."""
        index = self._index(gpu)
        with self._alone(index):
            await self._pause(index, 0.0)
            self._check(index)
            if self._once(index, "unlisted"):
                raise GpuError(f"the instances of GPU {index} cannot be listed now; try again")
            there = (one for one in self._hardware.instances if one.gpu == index)
            return [self._instance(one) for one in sorted(there, key=lambda one: one.start)]

    async def create(self, gpu: str, profile: str, start: int) -> Instance:
        """Create an instance, in its time."""
        index = self._index(gpu)
        with self._alone(index):
            shape = self._shape(index, profile, start)
            await self._pause(index, CREATE_SECONDS[shape.compute])
            self._check(index)
            self._check_room(index, shape, start)
            made = self._make(index, shape, start)
            self.calls.append(("create", f"{profile}@{start}"))
            return self._instance(made)

    async def destroy(self, instance: Instance) -> None:
        """Destroy an instance, in its time."""
        index = self._index(instance.gpu)
        with self._alone(index):
            await self._pause(index, DESTROY_SECONDS[self._profile(instance.profile).compute])
            self._check(index)
            self._check_unused(index, instance)
            hardware = self._hardware
            left = tuple(one for one in hardware.instances if one.uuid != instance.uuid or not one.uuid)
            self._write(hardware.model_copy(update={"instances": left}))
            self.calls.append(("destroy", f"{instance.profile}@{instance.start}"))

    async def processes(self, device: str) -> Sequence[Process]:
        """Processes on a device."""
        index = self._index(device) if device.startswith("GPU-") else self._index_of_device(device)
        if index is None:
            return []
        with self._alone(index):
            await self._pause(index, 0.0)
            self._check(index)
            return [Process(one.pid, one.name) for one in self._hardware.processes if one.device == device]

    async def restore(self, gpu: str) -> Sequence[str]:
        """The power limit goes back to the default."""
        index = self._index(gpu)
        with self._alone(index):
            await self._pause(index, 0.0)
            self._check(index)
            limits = dict(self._hardware.power_limits_mw)
            if (limit := limits.pop(index, None)) is None:
                return []
            self._write(self._hardware.model_copy(update={"power_limits_mw": limits}))
            return [f"power limit from {limit // 1000} to {POWER_LIMIT_MW // 1000} W"]

    async def vitals(self, gpu: str) -> Vitals:
        """All well, but for what a test has broken."""
        index = self._index(gpu)
        with self._alone(index):
            await self._pause(index, 0.0)
            self._check(index)
            return Vitals(
                ecc_uncorrected=self._faults(index).errors,
                remap_pending=None if index in self.mig else self._faults(index).remap_pending,
                remap_failed=None if index in self.mig else False,
                power_limit_mw=self._hardware.power_limits_mw.get(index, POWER_LIMIT_MW),
                default_power_limit_mw=POWER_LIMIT_MW,
                pcie_width=16,
                max_pcie_width=16,
                driver=DRIVER_VERSION,
                vbios="92.00.81.00.06",
            )

    async def telemetry(self, gpu: str) -> Telemetry:
        """An idle A100."""
        index = self._index(gpu)
        with self._alone(index):
            self._check(index)
            devices = [one.uuid for one in self.hardware.instances if one.gpu == index] or [gpu]
            return Telemetry(52_000, 1_000_000, 33, dict.fromkeys(devices, 3 << 20))

    async def events(self) -> AsyncIterator[GpuEvent]:
        """What tests let the GPUs tell of."""
        while True:
            yield await self._told.get()

    async def set_mode(self, gpu: str, mode: GpuMode) -> bool:
        """An A100 takes a mode after a reset."""
        index = self._index(gpu)
        with self._alone(index):
            await self._pause(index, 0.0)
            self._check(index)
            self._write(self._hardware.model_copy(update={"pending": {**self._hardware.pending, index: mode}}))
            return (index in self.mig) == (mode is GpuMode.MIG)

    async def reset(self, gpu: str) -> None:
        """What was pending comes into force; instances are gone."""
        index = self._index(gpu)
        with self._alone(index):
            await self._pause(index, RESET_SECONDS)
            self._check(index)
            if self._faults(index).reset_refused:
                raise GpuError(f"GPU {index} was not reset: Resetting GPU {index} is not supported.")
            hardware = self._hardware
            left = tuple(one for one in hardware.instances if one.gpu != index)
            self._write(
                hardware.model_copy(update={"instances": left, "modes": {**hardware.modes, **hardware.pending}})
            )
            self.fail(index, self._faults(index).model_copy(update={"errors": 0}))
            self.calls.append(("reset", str(index)))

    # ------------------------------------------------------------------------------------------------- for the tests

    @property
    def mig(self) -> frozenset[int]:
        """Indices of the GPUs in MIG mode."""
        modes = self.hardware.modes
        return frozenset(
            index
            for index in range(len(self.uuids))
            if (modes[index] is GpuMode.MIG if index in modes else index in self._mig)
        )

    def tell(self, event: GpuEvent) -> None:
        """A GPU tells of something."""
        self._told.put_nowait(event)

    def tune(self, index: int, limit_mw: int) -> None:
        """Somebody sets the power limit of a GPU."""
        limits = {**self.hardware.power_limits_mw, index: limit_mw}
        self._write(self.hardware.model_copy(update={"power_limits_mw": limits}))

    def memory_of(self, device: str) -> int:
        """Memory in MiB of a whole GPU or an instance. Raises GpuError where there is no such device."""
        if device in self.uuids:
            return TOTAL_MIB[self.model[-4:]]
        for one in self.hardware.instances:
            if one.uuid == device:
                return MEMORY_MIB[self.model[-4:]][self._profile(one.profile).compute]
        raise GpuError(f"there is no device {device} on this node")

    @property
    def hardware(self) -> Hardware:
        """The hardware as it is now, whoever changed it."""
        self._refresh()
        return self._hardware

    def layout(self, index: int) -> set[tuple[str, int]]:
        """(profile, start) of the instances on one GPU."""
        return {(one.profile, one.start) for one in self.hardware.instances if one.gpu == index}

    def fail(self, index: int, faults: Faults) -> None:
        """Let one GPU fail like this from now on."""
        hardware = self.hardware
        self._write(hardware.model_copy(update={"faults": {**hardware.faults, index: faults}}))

    def occupy(self, device: str, *, pid: int = 4711, name: str = "python3") -> None:
        """A process begins to use a device."""
        hardware = self.hardware
        running = (*hardware.processes, _Running(device=device, pid=pid, name=name))
        self._write(hardware.model_copy(update={"processes": running}))

    def vacate(self, device: str) -> None:
        """Every process on a device ends."""
        hardware = self.hardware
        running = tuple(one for one in hardware.processes if one.device != device)
        self._write(hardware.model_copy(update={"processes": running}))

    def intrude(self, index: int, profile: str, start: int) -> str:
        """Somebody else creates an instance; its UUID."""
        return self._make(index, self._shape(index, profile, start), start).uuid

    def wipe(self, index: int) -> None:
        """Somebody else destroys all instances of a GPU."""
        hardware = self.hardware
        left = tuple(one for one in hardware.instances if one.gpu != index)
        self._write(hardware.model_copy(update={"instances": left}))

    def reboot(self) -> None:
        """The node boots: instances and processes are gone."""
        before = self.hardware
        modes = {**before.modes, **before.pending}
        self._write(Hardware(boot=before.boot + 1, serial=before.serial, modes=modes))

    # ---------------------------------------------------------------------------------------------------------- rules

    def _facts(self, index: int) -> GpuFacts:
        lost = self._faults(index).lost or self._once(index, "unsure")
        return GpuFacts(
            index=index,
            uuid=self.uuids[index],
            model=self.model,
            memory_mib=TOTAL_MIB[self.model[-4:]],
            multiprocessors=MULTIPROCESSORS,
            pci_bus_id=f"0000:{index + 16:02x}:00.0",
            mode=GpuMode.MIG if index in self.mig else GpuMode.WHOLE,
            healthy=not lost,
            message=f"GPU {index} has fallen off the bus (Xid 79); reboot the node" if lost else "",
        )

    def _instance(self, made: _Made) -> Instance:
        profile = self._profile(made.profile)
        return Instance(
            gpu=self.uuids[made.gpu],
            profile=made.profile,
            start=made.start,
            size=profile.size,
            uuid=made.uuid,
            gpu_instance=made.gpu_instance,
            compute_instance=made.compute_instance,
            memory_mib=MEMORY_MIB[self.model[-4:]][profile.compute],
            multiprocessors=PER_SLICE * profile.compute,
        )

    def _shape(self, index: int, profile: str, start: int) -> Profile:
        if index not in self.mig:
            raise GpuError(f"GPU {index} is not in MIG mode; instances exist in MIG mode only")
        shape = of_model(self.model).get(profile)
        if shape is None or start not in shape.starts:
            raise GpuError(f"GPU {index} has no placement {profile} at memory slice {start}; ask for a legal one")
        return shape

    def _check(self, index: int) -> None:
        if self._faults(index).lost:
            raise GpuLost(f"GPU {index} has fallen off the bus; reboot the node")

    def _check_room(self, index: int, shape: Profile, start: int) -> None:
        if self._once(index, "no_room"):
            raise InsufficientResources(f"GPU {index} has no room for {shape.name}; list its instances")
        for one in self._hardware.instances:
            if one.gpu == index and self._profile(one.profile).mask(one.start) & shape.mask(start):
                raise InsufficientResources(f"GPU {index} has {one.profile} at {one.start}; destroy it first")

    def _check_unused(self, index: int, instance: Instance) -> None:
        if self._once(index, "in_use"):
            raise InUse(f"MIG instance {instance.profile} on GPU {index} is in use, says the driver; try again")
        if any(one.device == instance.uuid for one in self._hardware.processes):
            raise InUse(f"MIG instance {instance.profile} on GPU {index} is in use by a process; stop it first")

    def _make(self, index: int, shape: Profile, start: int) -> _Made:
        hardware = self._hardware
        taken = {one.gpu_instance for one in hardware.instances if one.gpu == index}
        made = _Made(
            gpu=index,
            profile=shape.name,
            start=start,
            uuid=f"MIG-{uuid.uuid5(uuid.NAMESPACE_URL, f'{self.node}/mig/{hardware.serial}')}",
            gpu_instance=next(one for one in GPU_INSTANCE_IDS[shape.size] if one not in taken),
        )
        update = {"instances": (*hardware.instances, made), "serial": hardware.serial + 1}
        self._write(hardware.model_copy(update=update))
        return made

    # ------------------------------------------------------------------------------------------------------ machinery

    @contextmanager
    def _alone(self, index: int) -> Iterator[None]:
        assert index not in self._under_way, f"two calls for GPU {index} at a time"
        self._under_way.add(index)
        try:
            yield
        finally:
            self._under_way.discard(index)

    async def _pause(self, index: int, seconds: float) -> None:
        """Every call takes its time, and finds what is there at its end."""
        self._refresh()
        seconds += self._faults(index).slow_seconds
        if seconds:
            await self._clock.sleep(seconds)
            self._refresh()

    def _faults(self, index: int) -> Faults:
        return self._hardware.faults.get(index, Faults())

    def _once(self, index: int, fault: str) -> bool:
        """Whether this call is one of those that are to fail; each counts once."""
        faults = self._faults(index)
        left: int = getattr(faults, fault)
        if left:
            self.fail(index, faults.model_copy(update={fault: left - 1}))
        return left > 0

    def _profile(self, name: str) -> Profile:
        return of_model(self.model)[name]

    def _index(self, gpu: str) -> int:
        if gpu not in self.uuids:
            raise GpuLost(f"there is no GPU {gpu} on this node")
        return self.uuids.index(gpu)

    def _index_of_device(self, device: str) -> int | None:
        return next((one.gpu for one in self._hardware.instances if one.uuid == device), None)

    def _refresh(self) -> None:
        """Read the state file, if there is one and somebody else has written it."""
        if self._state is None:
            return
        try:
            found = self._state.stat()
        except FileNotFoundError:
            return
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            self._hardware = Hardware.model_validate(json.loads(self._state.read_text()))
            self._stamp = stamp

    def _write(self, hardware: Hardware) -> None:
        self._hardware = hardware
        if self._state is None:
            return
        self._state.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._state.with_suffix(".new")
        fresh.write_text(hardware.model_dump_json())
        fresh.replace(self._state)
        found = self._state.stat()
        self._stamp = (found.st_mtime_ns, found.st_ino)
