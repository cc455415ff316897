"""The GPUs of a node through NVML: the `Gpus` Protocol on real calls. The only package that imports pynvml.

NVML's calls block, for seconds at times, and on a broken GPU for ever: each GPU has a thread for what is asked about it
and one for its facts, so that a call that hangs hangs alone. Instances are found by walking GPU instances, because one
without a compute instance holds its slices and is no MIG device; they are known again by their UUID, because ids are
given anew. Sources: NVIDIA NVML API reference, MIG User Guide.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from ctypes import byref
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import pynvml

from gpu_tenancy.agent.gpus import (
    GpuError,
    GpuEvent,
    GpuFacts,
    Instance,
    InUse,
    Process,
    ResetRequired,
    Telemetry,
    Vitals,
)
from gpu_tenancy.agent.nvml import examine
from gpu_tenancy.agent.nvml.calls import (
    COMPUTE_PROFILES,
    compute_instance_of,
    device_handle,
    gpu_handle,
    gpu_instances_of,
    mode_of,
    multiprocessors_of,
    placements_of,
    profile_name,
    sentences,
    uuid_of,
)
from gpu_tenancy.agent.nvml.events import Watch
from gpu_tenancy.agent.nvml.profiles import Profiles
from gpu_tenancy.api.node import GpuMode

T = TypeVar("T")

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
RESET_SECONDS: Final = 120.0
"""How long a reset may take."""
_TURN: Final = 0.02
_SMI_IN_USE: Final = 255
"""Exit code of nvidia-smi where somebody has the GPU open."""
ANSWER_SECONDS: Final = 10.0
"""How long a GPU may take to say what it is before it is listed as not healthy."""
CONTROL_NODES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
"""Device nodes that every user of a GPU needs beside its own."""
_CAPS_MAJOR: Final = re.compile(r"^\s*(\d+) nvidia-caps$", re.MULTILINE)
_CAPABILITY: Final = re.compile(r"^gpu(\d+)/gi(\d+)/(?:ci(\d+)/)?access (\d+)$", re.MULTILINE)


class _Worker:
    """One thread for calls that may hang; a daemon, because the process must be able to exit while one does."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        Thread(target=self._work, name=f"nvml {name}", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have it called after those that were submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def end(self) -> None:
        """Cancel what has not begun; the thread ends once nothing is under way."""
        with suppress(Empty):
            while (one := self._calls.get_nowait()) is not None:
                one[0].cancel()
        self._calls.put(None)

    def _work(self) -> None:
        while (one := self._calls.get()) is not None:
            future, call = one
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  (it is for whoever asked)
                future.set_exception(error)


class NvmlGpus:
    """The GPUs of this node. Made by `open`; `close` lets NVML go."""

    def __init__(self, boot_id: Path = BOOT_ID, root: Path = Path("/"), nvidia_smi: str = "nvidia-smi") -> None:
        """`root`: where the host's /dev and /proc are found; `nvidia_smi`: the command that resets a GPU."""
        self.reset_seconds = RESET_SECONDS
        """How long a reset may take."""
        self._boot_id = boot_id
        self._root = root
        self._nvidia_smi = nvidia_smi
        self._tell: Callable[[GpuEvent], None] | None = None
        self._under_way = 0
        self._closed = False
        self._threads: dict[str, _Worker] = {}
        self._known: dict[int, GpuFacts] = {}
        self._asked: dict[int, Future[GpuFacts]] = {}
        self._listing: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        self._owners: dict[str, str] = {}
        self._halved: set[tuple[str, int, str]] = set()
        self._watches: dict[str, Watch] = {}
        self._profiles = Profiles()

    @classmethod
    def open(cls, boot_id: Path = BOOT_ID, root: Path = Path("/"), nvidia_smi: str = "nvidia-smi") -> NvmlGpus:
        """Initialise NVML. Raises GpuError where there is no library or no driver."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise GpuError("there is no libnvidia-ml.so.1; install NVIDIA's driver, or mount it into the pod") from None
        except pynvml.NVMLError as error:
            raise GpuError(f"NVML cannot be initialised: {error}; is NVIDIA's kernel module loaded?") from None
        return cls(boot_id, root, nvidia_smi)

    def close(self) -> None:
        """Let NVML go; calls that hang are left alone."""
        self._stop_watching()
        for thread in self._threads.values():
            thread.end()
        pynvml.nvmlShutdown()

    # -------------------------------------------------------------------------------------------------- the Protocol

    async def boot_id(self) -> str:
        """Identity of the boot, from the kernel."""
        return (await asyncio.to_thread(self._boot_id.read_text)).strip()

    async def driver_version(self) -> str:
        """Version of NVIDIA's driver."""
        with sentences("the driver of this node"):
            return await self._in_thread("list", pynvml.nvmlSystemGetDriverVersion)

    async def list(self) -> Sequence[GpuFacts]:
        """Every GPU; one that is lost or does not answer is not healthy, and said as it was when it still did."""
        async with self._listing.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            with sentences("the GPUs of this node"):
                count = await self._in_thread("list", pynvml.nvmlDeviceGetCount)
            async with self._calling():
                await asyncio.to_thread(wait, self._ask(count), ANSWER_SECONDS)
            return [facts for index in range(count) if (facts := self._answer(index)) is not None]

    async def instances(self, gpu: str) -> Sequence[Instance]:
        """Instances of one GPU, by memory slice."""
        found = await self._in_thread(gpu, lambda: self._instances(gpu))
        others = {device: owner for device, owner in self._owners.items() if owner != gpu or device == gpu}
        self._owners = others | {one.uuid: gpu for one in found if one.uuid}
        return found

    async def create(self, gpu: str, profile: str, start: int) -> Instance:
        """A GPU instance at exactly that placement, and the compute instance that has all of it."""
        made = await self._in_thread(gpu, lambda: self._create(gpu, profile, start))
        self._owners[made.uuid] = gpu
        return made

    async def destroy(self, instance: Instance) -> None:
        """The compute instance, then the GPU instance."""
        await self._in_thread(instance.gpu, lambda: self._destroy(instance))

    async def restore(self, gpu: str) -> Sequence[str]:
        """Clocks, power limit, compute mode and persistence mode as they are by default."""
        return await self._in_thread(gpu, lambda: examine.restore(gpu))

    async def vitals(self, gpu: str) -> Vitals:
        """What can be read of the GPU; what it does not tell is None."""
        return await self._in_thread(gpu, lambda: examine.vitals(gpu))

    async def telemetry(self, gpu: str) -> Telemetry:
        """Power, energy, temperature, and memory in use by each device of the GPU."""
        devices = [device for device, owner in self._owners.items() if owner == gpu and device != gpu]
        return await self._in_thread(gpu, lambda: examine.telemetry(gpu, devices))

    async def processes(self, device: str) -> Sequence[Process]:
        """Processes on a GPU or a MIG device."""
        gpu = self._owners.get(device) or await self._in_thread("devices", lambda: self._gpu_of(device))
        return [] if gpu is None else await self._in_thread(gpu, lambda: self._processes(device))

    async def events(self) -> AsyncIterator[GpuEvent]:
        """What the GPUs tell of, each watched by a thread of its own: one that is lost makes no other mute."""
        told: asyncio.Queue[GpuEvent] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: GpuEvent) -> None:
            with suppress(RuntimeError):  # The loop has ended: nobody listens any more.
                loop.call_soon_threadsafe(told.put_nowait, event)

        gpus = [gpu.uuid for gpu in await self.list()]
        self._tell = tell
        self._watch(gpus)
        while True:
            yield await told.get()

    # -------------------------------------------------------------------------------------------- a GPU as a whole

    async def set_mode(self, gpu: str, mode: GpuMode) -> bool:
        """Ask for the mode and read both modes back: the call says that all is well where a mode stays pending."""
        return await self._in_thread(gpu, lambda: self._set_mode(gpu, mode))

    async def reset(self, gpu: str) -> None:
        """NVML resets no GPU: nvidia-smi does, and only while nobody has NVML open, this process included."""
        async with self._alone(gpu):
            await asyncio.to_thread(self._reset, gpu)

    def _set_mode(self, gpu: str, mode: GpuMode) -> bool:
        wanted = int(mode is GpuMode.MIG)
        self._profiles.forget(gpu)
        with sentences(f"mode {mode} of GPU {gpu}"):
            pynvml.nvmlDeviceSetMigMode(gpu_handle(gpu), wanted)
            current, pending = pynvml.nvmlDeviceGetMigMode(gpu_handle(gpu))  # A change of mode makes handles void.
            if pending != wanted:
                raise GpuError(f"GPU {gpu} does not take mode {mode}; its driver may run in a virtual machine")
            return bool(current == wanted)

    def _reset(self, gpu: str) -> None:
        with sentences(f"GPU {gpu}"), suppress(pynvml.NVMLError_NotSupported):
            # Persistence mode keeps the device open; the next hand-over turns it on again.
            pynvml.nvmlDeviceSetPersistenceMode(gpu_handle(gpu), pynvml.NVML_FEATURE_DISABLED)
        watched = self._stop_watching()
        pynvml.nvmlShutdown()
        try:
            self._run_reset(gpu)
        finally:
            _open_again()
            self._halved = {one for one in self._halved if one[0] != gpu}
            self._known = {}  # By index, and indices may be others now.
            self._profiles.forget_all()
            self._watch(watched)

    def _run_reset(self, gpu: str) -> None:
        command = [self._nvidia_smi, "--gpu-reset", "-i", gpu]
        try:
            tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603
        except OSError as error:
            raise GpuError(f"GPU {gpu} was not reset: {error}") from None
        try:
            said, _ = tool.communicate(timeout=self.reset_seconds)
        except subprocess.TimeoutExpired:
            # One that hangs in the driver cannot be killed: nobody waits for it but a thread of its own.
            tool.kill()
            Thread(target=tool.communicate, name="nvml reset", daemon=True).start()
            raise GpuError(f"GPU {gpu} was not reset within {self.reset_seconds:.0f} s") from None
        if tool.returncode != 0:
            said = " ".join(said.split()) or f"exit code {tool.returncode}"
            refusal = InUse if tool.returncode == _SMI_IN_USE else GpuError
            raise refusal(f"GPU {gpu} was not reset: {said}")

    def _watch(self, gpus: Sequence[str]) -> None:
        if self._tell is not None:
            self._watches = {gpu: Watch(gpu, self._tell) for gpu in gpus}

    def _stop_watching(self) -> Sequence[str]:
        """UUIDs of the GPUs that were watched."""
        for watch in self._watches.values():
            watch.stop()
        for watch in self._watches.values():
            watch.join()
        watched, self._watches = tuple(self._watches), {}
        return watched

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        """A call is under way; none begins while NVML is closed for a reset. One that does is rare, and callers may be
        on several event loops: they look again, instead of being told."""
        while self._closed:  # noqa: ASYNC110
            await asyncio.sleep(_TURN)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    @asynccontextmanager
    async def _alone(self, gpu: str) -> AsyncIterator[None]:
        """No call is under way. Raises GpuError where one does not end."""
        while self._closed:  # noqa: ASYNC110
            await asyncio.sleep(_TURN)
        self._closed = True
        try:
            patience = ANSWER_SECONDS
            while self._under_way or any(not asked.done() for asked in self._asked.values()):
                if patience <= 0:
                    raise InUse(f"GPU {gpu} cannot be reset while a call on some GPU of the node hangs")
                await asyncio.sleep(_TURN)
                patience -= _TURN
            yield
        finally:
            self._closed = False

    # ------------------------------------------------------------------------------------------------------- threads

    def _thread(self, name: str) -> _Worker:
        if name not in self._threads:
            self._threads[name] = _Worker(name)
        return self._threads[name]

    async def _in_thread(self, name: str, call: Callable[[], T]) -> T:
        async with self._calling():
            return await asyncio.wrap_future(self._thread(name).submit(call))

    # --------------------------------------------------------------------------------------------------------- facts

    def _facts(self, index: int) -> GpuFacts:
        with sentences(f"GPU {index}"):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            action = examine.recovery_action(device)  # Its Xid may have come when nobody listened.
            unfit = action in (examine.RESET_ASKED, examine.REBOOT_ASKED)
            return GpuFacts(
                index=index,
                uuid=pynvml.nvmlDeviceGetUUID(device),
                model=model_name(pynvml.nvmlDeviceGetName(device)),
                memory_mib=pynvml.nvmlDeviceGetMemoryInfo(device).total >> 20,
                multiprocessors=multiprocessors_of(device),
                pci_bus_id=pynvml.nvmlDeviceGetPciInfo(device).busIdLegacy.lower(),
                mode=mode_of(device),
                healthy=not unfit,
                message=f"GPU {index}: the driver asks to {examine.RECOVERY_ACTIONS[action]}" if unfit else "",
                needs_reset=action == examine.RESET_ASKED,
                nodes=self._existing(f"/dev/nvidia{pynvml.nvmlDeviceGetMinorNumber(device)}", *CONTROL_NODES),
            )

    def _ask(self, count: int) -> Sequence[Future[GpuFacts]]:
        """Ask every GPU what it is, but for those that owe an answer; one that came too late says what was."""
        owing = {index: asked for index, asked in self._asked.items() if not asked.done()}
        fresh = {
            index: self._thread(f"facts {index}").submit(partial(self._facts, index))
            for index in range(count)
            if index not in owing
        }
        self._asked = owing | fresh
        return tuple(fresh.values())

    def _answer(self, index: int) -> GpuFacts | None:
        """What a GPU answered; None for one that has never said what it is."""
        asked = self._asked[index]
        if not asked.done():
            return self._unwell(index, f"GPU {index} has not answered for {ANSWER_SECONDS:.0f} s; reboot the node")
        del self._asked[index]
        try:
            self._known[index] = asked.result()
        except GpuError as error:
            unwell = self._unwell(index, str(error))
            return unwell and replace(unwell, needs_reset=isinstance(error, ResetRequired))
        self._owners[self._known[index].uuid] = self._known[index].uuid
        return self._known[index]

    def _unwell(self, index: int, message: str) -> GpuFacts | None:
        known = self._known.get(index)
        return replace(known, healthy=False, message=message) if known else None

    def _existing(self, *nodes: str) -> tuple[str, ...]:
        return tuple(node for node in nodes if (self._root / node.lstrip("/")).exists())

    # ----------------------------------------------------------------------------------------------------- instances

    def _instances(self, gpu: str) -> Sequence[Instance]:
        with sentences(f"GPU {gpu}"):
            device = gpu_handle(gpu)
            if mode_of(device) is not GpuMode.MIG:
                self._profiles.forget(gpu)
                return []
            minor = pynvml.nvmlDeviceGetMinorNumber(device)
            found = [
                self._instance(gpu, minor, info, instance)
                for info in self._profiles.of_gpu(gpu, device)
                for instance in gpu_instances_of(device, info)
            ]
            return sorted(found, key=lambda one: one.start)

    def _instance(self, gpu: str, minor: int, info: Any, handle: Any) -> Instance:  # noqa: ANN401  (pynvml is untyped)
        at = pynvml.nvmlGpuInstanceGetInfo(handle)
        compute, _ = self._compute_instance(gpu, info, handle)
        made = pynvml.nvmlComputeInstanceGetInfo(compute) if compute is not None else None
        return Instance(
            gpu=gpu,
            profile=profile_name(info),
            start=at.placement.start,
            size=at.placement.size,
            uuid=pynvml.nvmlDeviceGetUUID(made.device) if made else "",
            gpu_instance=at.id,
            compute_instance=made.id if made else None,
            memory_mib=info.memorySizeMB,
            multiprocessors=info.multiprocessorCount,
            nodes=self._instance_nodes(minor, at.id, made.id) if made else (),
        )

    def _compute_instance(self, gpu: str, info: Any, handle: Any) -> tuple[Any | None, bool]:  # noqa: ANN401
        """Of a GPU instance of that profile, as `compute_instance_of`."""
        profile_of = partial(self._profiles.of_compute_instance, gpu, info, handle)
        return compute_instance_of(handle, info.sliceCount, profile_of)

    def _instance_nodes(self, minor: int, gpu_instance: int, compute_instance: int) -> tuple[str, ...]:
        """The GPU's node, and the capabilities of the GPU instance and of the compute instance."""
        table = self._root / "proc/driver/nvidia-caps/mig-minors"
        text = table.read_text() if table.exists() else ""
        capabilities = [
            self._capability_node(int(number))
            for gpu, gi, ci, number in _CAPABILITY.findall(text)
            if (int(gpu), int(gi)) == (minor, gpu_instance) and ci in ("", str(compute_instance))
        ]
        return (*self._existing(f"/dev/nvidia{minor}"), *capabilities, *self._existing(*CONTROL_NODES))

    def _capability_node(self, number: int) -> str:
        """The device node of a capability, made where nobody has yet: without it the container sees no instance."""
        node = f"/dev/nvidia-caps/nvidia-cap{number}"
        path = self._root / node.lstrip("/")
        if not path.exists():
            devices = self._root / "proc/devices"
            major = _CAPS_MAJOR.search(devices.read_text() if devices.exists() else "")
            if major is None:
                raise GpuError(
                    f"{node} is not there, and /proc/devices does not say how to make it; run nvidia-smi once"
                )
            try:
                path.parent.mkdir(exist_ok=True)
                os.mknod(path, stat.S_IFCHR | 0o444, os.makedev(int(major[1]), number))
            except FileExistsError:
                pass  # Somebody was faster.
            except OSError as error:
                raise GpuError(f"{node} is not there and cannot be made: {error}; run the agent as root") from None
        return node

    def _create(self, gpu: str, profile: str, start: int) -> Instance:
        with sentences(f"MIG instance {profile} at memory slice {start} of GPU {gpu}"):
            device = gpu_handle(gpu)
            if mode_of(device) is not GpuMode.MIG:
                raise GpuError(f"GPU {gpu} is not in MIG mode; instances exist in MIG mode only")
            profiles = self._profiles.of_gpu(gpu, device)
            info = next((one for one in profiles if profile_name(one) == profile), None)
            place = next((one for one in placements_of(device, info) if one.start == start), None) if info else None
            if info is None or place is None:
                raise GpuError(f"GPU {gpu} has no placement {profile} at memory slice {start}; ask for a legal one")
            made = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, info.id, byref(place))
            try:
                shape = self._profiles.of_compute_instance(gpu, info, made, COMPUTE_PROFILES[info.sliceCount])
                pynvml.nvmlGpuInstanceCreateComputeInstance(made, shape.id)
            except pynvml.NVMLError:
                # Without a compute instance it would hold its slices and be of no use to anybody.
                with suppress(pynvml.NVMLError):  # Why it failed is what counts; the orphan is found later.
                    pynvml.nvmlGpuInstanceDestroy(made)
                raise
            return self._instance(gpu, pynvml.nvmlDeviceGetMinorNumber(device), info, made)

    def _destroy(self, instance: Instance) -> None:
        where = f"MIG instance {instance.profile} at memory slice {instance.start} of GPU {instance.gpu}"
        with sentences(where):
            device = gpu_handle(instance.gpu)
            try:
                handle = pynvml.nvmlDeviceGetGpuInstanceById(device, instance.gpu_instance)
            except (pynvml.NVMLError_NotFound, pynvml.NVMLError_NotSupported):
                return
            info = self._profiles.of_instance(instance.gpu, device, handle)
            if not _is_at(handle, info, instance):
                return  # Another one has got the id of the one that is gone.
            halved = (instance.gpu, instance.gpu_instance, instance.uuid)
            compute, whole = self._compute_instance(instance.gpu, info, handle)
            if compute is None and instance.uuid and halved not in self._halved:
                return  # An orphan that somebody else is about to fill.
            if compute is not None:
                if uuid_of(compute) != instance.uuid:
                    return
                if not whole:
                    raise GpuError(f"{where}: somebody else divided it; destroy its compute instances by hand")
                pynvml.nvmlComputeInstanceDestroy(compute)
                self._halved.add(halved)
            pynvml.nvmlGpuInstanceDestroy(handle)
            self._halved.discard(halved)

    # ----------------------------------------------------------------------------------------------------- processes

    def _gpu_of(self, device: str) -> str | None:
        """UUID of the GPU of a device; None where there is no such device."""
        with sentences(f"device {device}"):
            handle = device_handle(device)
            if handle is None:
                return None
            if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
                handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            uuid: str = pynvml.nvmlDeviceGetUUID(handle)
            return uuid

    def _processes(self, device: str) -> Sequence[Process]:
        with sentences(f"device {device}"):
            handle = device_handle(device)
            if handle is None:
                return []
            pids = {
                one.pid
                for ask in (
                    pynvml.nvmlDeviceGetComputeRunningProcesses,
                    pynvml.nvmlDeviceGetGraphicsRunningProcesses,
                    pynvml.nvmlDeviceGetMPSComputeRunningProcesses,
                )
                for one in ask(handle)
            }
            return [Process(pid, self._command(pid)) for pid in sorted(pids)]

    def _command(self, pid: int) -> str:
        try:
            return (self._root / f"proc/{pid}/comm").read_text().strip()
        except OSError:
            return ""


def _open_again() -> None:
    """Initialise NVML after a reset; a driver that is still busy with it is asked again. Raises GpuError."""
    for pause in (0.1, 0.5, 1.0, 2.0, 5.0, 10.0):
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return
        time.sleep(pause)
    with sentences("NVML after a reset"):
        pynvml.nvmlInit()


def _is_at(handle: Any, info: Any, instance: Instance) -> bool:  # noqa: ANN401
    """Whether a GPU instance has the profile and the place of an instance; an id alone is given anew."""
    start: int = pynvml.nvmlGpuInstanceGetInfo(handle).placement.start
    return (profile_name(info), start) == (instance.profile, instance.start)


def model_name(name: str) -> str:
    """NVML's name as the project has it: without the vendor, and without spaces, e.g. ``A100-80GB-PCIe``."""
    return name.removeprefix("NVIDIA ").replace(" ", "-")
