"""The GPUs of a node through NVML: the `Gpus` Protocol on real calls. The only module that imports pynvml.

NVML's calls block, for seconds at times, and on a broken GPU for ever: each GPU has a thread for what is asked about it
and one for its facts, so that a call that hangs hangs alone. Instances are found by walking GPU instances, because one
without a compute instance holds its slices and is no MIG device; they are known again by their UUID, because ids are
given anew. Sources: NVIDIA NVML API reference, MIG User Guide.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from ctypes import byref, c_uint
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
    GpuFacts,
    GpuLost,
    Instance,
    InsufficientResources,
    InUse,
    Process,
    Vitals,
)
from gpu_tenancy.api.node import GpuMode

T = TypeVar("T")

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
ANSWER_SECONDS: Final = 10.0
"""How long a GPU may take to say what it is before it is listed as not healthy."""
CORES_PER_MULTIPROCESSOR: Final = {(7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}
"""By compute capability, the minor number included: 8.0 and 8.6 differ (CUDA C++ Programming Guide, 16.1)."""
COMPUTE_PROFILES: Final = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}
"""NVML_COMPUTE_INSTANCE_PROFILE_* by compute slices."""
CONTROL_NODES: Final = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
"""Device nodes that every user of a GPU needs beside its own."""
RECOVERY_ACTIONS: Final = {
    0: "",
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain the GPU and its NVLink peers",
    4: "drain the GPU and reset it",
}
"""nvmlDeviceGpuRecoveryAction_t."""
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

    def __init__(self, boot_id: Path = BOOT_ID, root: Path = Path("/")) -> None:
        """`root`: where the host's /dev and /proc are found."""
        self._boot_id = boot_id
        self._root = root
        self._threads: dict[str, _Worker] = {}
        self._known: dict[int, GpuFacts] = {}
        self._asked: dict[int, Future[GpuFacts]] = {}
        self._listing: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        self._owners: dict[str, str] = {}
        self._halved: set[tuple[str, int, str]] = set()

    @classmethod
    def open(cls, boot_id: Path = BOOT_ID, root: Path = Path("/")) -> NvmlGpus:
        """Initialise NVML. Raises GpuError where there is no library or no driver."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError_LibraryNotFound:
            raise GpuError("there is no libnvidia-ml.so.1; install NVIDIA's driver, or mount it into the pod") from None
        except pynvml.NVMLError as error:
            raise GpuError(f"NVML cannot be initialised: {error}; is NVIDIA's kernel module loaded?") from None
        return cls(boot_id, root)

    def close(self) -> None:
        """Let NVML go; calls that hang are left alone."""
        for thread in self._threads.values():
            thread.end()
        pynvml.nvmlShutdown()

    # -------------------------------------------------------------------------------------------------- the Protocol

    async def boot_id(self) -> str:
        """Identity of the boot, from the kernel."""
        return (await asyncio.to_thread(self._boot_id.read_text)).strip()

    async def list(self) -> Sequence[GpuFacts]:
        """Every GPU; one that is lost or does not answer is not healthy, and said as it was when it still did."""
        async with self._listing.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            with _sentences("the GPUs of this node"):
                count = await self._in_thread("list", pynvml.nvmlDeviceGetCount)
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
        return await self._in_thread(gpu, lambda: _restore(gpu))

    async def vitals(self, gpu: str) -> Vitals:
        """What can be read of the GPU; what it does not tell is None."""
        return await self._in_thread(gpu, lambda: _vitals(gpu))

    async def processes(self, device: str) -> Sequence[Process]:
        """Processes on a GPU or a MIG device."""
        gpu = self._owners.get(device) or await self._in_thread("devices", lambda: self._gpu_of(device))
        return [] if gpu is None else await self._in_thread(gpu, lambda: self._processes(device))

    # ------------------------------------------------------------------------------------------------------- threads

    def _thread(self, name: str) -> _Worker:
        if name not in self._threads:
            self._threads[name] = _Worker(name)
        return self._threads[name]

    async def _in_thread(self, name: str, call: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._thread(name).submit(call))

    # --------------------------------------------------------------------------------------------------------- facts

    def _facts(self, index: int) -> GpuFacts:
        with _sentences(f"GPU {index}"):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            return GpuFacts(
                index=index,
                uuid=pynvml.nvmlDeviceGetUUID(device),
                model=model_name(pynvml.nvmlDeviceGetName(device)),
                memory_mib=pynvml.nvmlDeviceGetMemoryInfo(device).total >> 20,
                multiprocessors=_multiprocessors(device),
                pci_bus_id=pynvml.nvmlDeviceGetPciInfo(device).busIdLegacy.lower(),
                mode=_mode(device),
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
            return self._unwell(index, str(error))
        self._owners[self._known[index].uuid] = self._known[index].uuid
        return self._known[index]

    def _unwell(self, index: int, message: str) -> GpuFacts | None:
        known = self._known.get(index)
        return replace(known, healthy=False, message=message) if known else None

    def _existing(self, *nodes: str) -> tuple[str, ...]:
        return tuple(node for node in nodes if (self._root / node.lstrip("/")).exists())

    # ----------------------------------------------------------------------------------------------------- instances

    def _instances(self, gpu: str) -> Sequence[Instance]:
        with _sentences(f"GPU {gpu}"):
            device = _device(gpu)
            if _mode(device) is not GpuMode.MIG:
                return []
            found = [
                self._instance(gpu, device, info, instance)
                for info in _profiles(device)
                for instance in _instances_of(device, info)
            ]
            return sorted(found, key=lambda one: one.start)

    def _instance(self, gpu: str, device: Any, info: Any, handle: Any) -> Instance:  # noqa: ANN401  (pynvml is untyped)
        at = pynvml.nvmlGpuInstanceGetInfo(handle)
        compute, _ = _compute_instance(handle, info.sliceCount)
        made = pynvml.nvmlComputeInstanceGetInfo(compute) if compute is not None else None
        minor = pynvml.nvmlDeviceGetMinorNumber(device)
        return Instance(
            gpu=gpu,
            profile=_profile_name(info),
            start=at.placement.start,
            size=at.placement.size,
            uuid=_uuid(compute) if made else "",
            gpu_instance=at.id,
            compute_instance=made.id if made else None,
            memory_mib=info.memorySizeMB,
            multiprocessors=info.multiprocessorCount,
            nodes=self._instance_nodes(minor, at.id, made.id) if made else (),
        )

    def _instance_nodes(self, minor: int, gpu_instance: int, compute_instance: int) -> tuple[str, ...]:
        """The GPU's node, and the capabilities of the GPU instance and of the compute instance."""
        table = self._root / "proc/driver/nvidia-caps/mig-minors"
        text = table.read_text() if table.exists() else ""
        capabilities = [
            f"/dev/nvidia-caps/nvidia-cap{number}"
            for gpu, gi, ci, number in _CAPABILITY.findall(text)
            if (int(gpu), int(gi)) == (minor, gpu_instance) and ci in ("", str(compute_instance))
        ]
        return self._existing(f"/dev/nvidia{minor}", *capabilities, *CONTROL_NODES)

    def _create(self, gpu: str, profile: str, start: int) -> Instance:
        with _sentences(f"MIG instance {profile} at memory slice {start} of GPU {gpu}"):
            device = _device(gpu)
            if _mode(device) is not GpuMode.MIG:
                raise GpuError(f"GPU {gpu} is not in MIG mode; instances exist in MIG mode only")
            info = next((one for one in _profiles(device) if _profile_name(one) == profile), None)
            place = next((one for one in _placements(device, info) if one.start == start), None) if info else None
            if info is None or place is None:
                raise GpuError(f"GPU {gpu} has no placement {profile} at memory slice {start}; ask for a legal one")
            made = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, info.id, byref(place))
            try:
                number = COMPUTE_PROFILES[info.sliceCount]
                shape = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(made, number, 0)
                pynvml.nvmlGpuInstanceCreateComputeInstance(made, shape.id)
            except pynvml.NVMLError:
                # Without a compute instance it would hold its slices and be of no use to anybody.
                with suppress(pynvml.NVMLError):  # Why it failed is what counts; the orphan is found later.
                    pynvml.nvmlGpuInstanceDestroy(made)
                raise
            return self._instance(gpu, device, info, made)

    def _destroy(self, instance: Instance) -> None:
        where = f"MIG instance {instance.profile} at memory slice {instance.start} of GPU {instance.gpu}"
        with _sentences(where):
            device = _device(instance.gpu)
            try:
                handle = pynvml.nvmlDeviceGetGpuInstanceById(device, instance.gpu_instance)
            except (pynvml.NVMLError_NotFound, pynvml.NVMLError_NotSupported):
                return
            if not self._is_at(device, handle, instance):
                return  # Another one has got the id of the one that is gone.
            halved = (instance.gpu, instance.gpu_instance, instance.uuid)
            compute, whole = _compute_instance(handle, _profile_of(device, handle).sliceCount)
            if compute is None and instance.uuid and halved not in self._halved:
                return  # An orphan that somebody else is about to fill.
            if compute is not None:
                if _uuid(compute) != instance.uuid:
                    return
                if not whole:
                    raise GpuError(f"{where}: somebody else divided it; destroy its compute instances by hand")
                pynvml.nvmlComputeInstanceDestroy(compute)
                self._halved.add(halved)
            pynvml.nvmlGpuInstanceDestroy(handle)
            self._halved.discard(halved)

    def _is_at(self, device: Any, handle: Any, instance: Instance) -> bool:  # noqa: ANN401
        """Whether a GPU instance has the profile and the place of an instance; an id alone is given anew."""
        start: int = pynvml.nvmlGpuInstanceGetInfo(handle).placement.start
        return (_profile_name(_profile_of(device, handle)), start) == (instance.profile, instance.start)

    # ----------------------------------------------------------------------------------------------------- processes

    def _gpu_of(self, device: str) -> str | None:
        """UUID of the GPU of a device; None where there is no such device."""
        with _sentences(f"device {device}"):
            handle = _any_device(device)
            if handle is None:
                return None
            if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
                handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            uuid: str = pynvml.nvmlDeviceGetUUID(handle)
            return uuid

    def _processes(self, device: str) -> Sequence[Process]:
        with _sentences(f"device {device}"):
            handle = _any_device(device)
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


def model_name(name: str) -> str:
    """NVML's name as the project has it: without the vendor, and without spaces, e.g. ``A100-80GB-PCIe``."""
    return name.removeprefix("NVIDIA ").replace(" ", "-")


# --- NVML's calls, one idea each --------------------------------------------------------------------------------------


@contextmanager
def _sentences(subject: str) -> Iterator[None]:
    """NVML's errors as ours, each a sentence with what to do."""
    try:
        yield
    except (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_ResetRequired) as error:
        raise GpuLost(f"{subject}: {error}; reset the GPU or reboot the node") from None
    except pynvml.NVMLError_InUse as error:
        raise InUse(f"{subject}: {error}; stop what uses it, DCGM among others, or try again") from None
    except pynvml.NVMLError_InsufficientResources as error:
        raise InsufficientResources(f"{subject}: {error}; list what is there and try again") from None
    except pynvml.NVMLError_NoPermission as error:
        raise GpuError(f"{subject}: {error}; the agent must run as root in a privileged pod") from None
    except pynvml.NVMLError as error:
        raise GpuError(f"{subject}: {error}; it is tried again") from None


def _device(uuid: str) -> Any:  # noqa: ANN401
    """Handle of a GPU, fetched anew each time: a change of mode makes older ones void."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError_NotFound:
        raise GpuLost(f"there is no GPU {uuid} on this node") from None


def _any_device(uuid: str) -> Any | None:  # noqa: ANN401
    """Handle of a GPU or a MIG device; None for a MIG device that is gone, as they go, while GPUs stay."""
    if uuid.startswith("GPU-"):
        return _device(uuid)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError_NotFound:
        return None


def _restore(gpu: str) -> Sequence[str]:
    """Put settings of a GPU back that a holder may have been given: what a later one must not inherit."""
    changes = []
    with _sentences(f"settings of GPU {gpu}"):
        device = _device(gpu)
        limit, default = _limits(device)
        if limit is not None and default is not None and limit != default:
            pynvml.nvmlDeviceSetPowerManagementLimit(device, default)
            changes.append(f"power limit from {limit // 1000} to {default // 1000} W")
        mode = pynvml.nvmlDeviceGetComputeMode(device)
        if mode != pynvml.NVML_COMPUTEMODE_DEFAULT:
            pynvml.nvmlDeviceSetComputeMode(device, pynvml.NVML_COMPUTEMODE_DEFAULT)
            changes.append(f"compute mode from {mode} to the default")
        # NVML does not say whether clocks are locked: they are unlocked in any case.
        for unlock in (
            pynvml.nvmlDeviceResetGpuLockedClocks,
            pynvml.nvmlDeviceResetMemoryLockedClocks,
            pynvml.nvmlDeviceResetApplicationsClocks,
        ):
            _where_known(unlock, device)
        if _where_known(pynvml.nvmlDeviceGetPersistenceMode, device) == pynvml.NVML_FEATURE_DISABLED:
            pynvml.nvmlDeviceSetPersistenceMode(device, pynvml.NVML_FEATURE_ENABLED)
            changes.append("persistence mode on")
    return changes


def _vitals(gpu: str) -> Vitals:
    with _sentences(f"GPU {gpu}"):
        device = _device(gpu)
        limit, default = _limits(device)
        remapped = _where_known(pynvml.nvmlDeviceGetRemappedRows, device)
        return Vitals(
            ecc_uncorrected=_where_known(
                pynvml.nvmlDeviceGetTotalEccErrors,
                device,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_VOLATILE_ECC,
            ),
            remap_pending=bool(remapped[2]) if remapped else None,
            remap_failed=bool(remapped[3]) if remapped else None,
            recovery_action=_recovery_action(device),
            power_limit_mw=limit,
            default_power_limit_mw=default,
            pcie_width=_where_known(pynvml.nvmlDeviceGetCurrPcieLinkWidth, device),
            max_pcie_width=_where_known(pynvml.nvmlDeviceGetMaxPcieLinkWidth, device),
            driver=pynvml.nvmlSystemGetDriverVersion(),
            vbios=_where_known(pynvml.nvmlDeviceGetVbiosVersion, device) or "",
        )


def _limits(device: Any) -> tuple[int | None, int | None]:  # noqa: ANN401
    """Enforced and default power limit in mW; None where the GPU has none."""
    return (
        _where_known(pynvml.nvmlDeviceGetEnforcedPowerLimit, device),
        _where_known(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, device),
    )


def _recovery_action(device: Any) -> str:  # noqa: ANN401
    """What the driver asks for; empty where nothing, and of older drivers, which do not say."""
    fields = _where_known(pynvml.nvmlDeviceGetFieldValues, device, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not fields or fields[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return ""
    return RECOVERY_ACTIONS.get(fields[0].value.uiVal, f"do what its recovery action {fields[0].value.uiVal} means")


def _where_known(ask: Callable[..., Any], *arguments: Any) -> Any | None:  # noqa: ANN401
    """The answer to a question; None where GPU or driver do not know it."""
    try:
        return ask(*arguments)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_InvalidArgument):
        return None


def _mode(device: Any) -> GpuMode:  # noqa: ANN401
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(device)
    except pynvml.NVMLError_NotSupported:
        return GpuMode.WHOLE  # No MIG on this model.
    return GpuMode.MIG if current else GpuMode.WHOLE


def _multiprocessors(device: Any) -> int:  # noqa: ANN401
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(device))
    cores: int = pynvml.nvmlDeviceGetNumGpuCores(device)
    return cores // CORES_PER_MULTIPROCESSOR.get(capability, 128)


def _profiles(device: Any) -> Iterator[Any]:  # noqa: ANN401
    """GPU instance profiles that the GPU has."""
    for number in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            yield pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, number)
        except pynvml.NVMLError_NotSupported:
            continue
        except pynvml.NVMLError_InvalidArgument:
            if number == 0:
                raise  # Every driver knows the first: it is the handle that is stale.
            break  # An older driver knows fewer.


def _profile_name(info: Any) -> str:  # noqa: ANN401
    name: str = info.name
    return name.removeprefix("MIG ")


def _profile_of(device: Any, instance: Any) -> Any:  # noqa: ANN401
    """Profile of a GPU instance."""
    number = pynvml.nvmlGpuInstanceGetInfo(instance).profileId
    found = next((one for one in _profiles(device) if one.id == number), None)
    if found is None:
        raise GpuError(f"a GPU instance has profile {number}, which its GPU does not list; update NVIDIA's driver")
    return found


def _placements(device: Any, info: Any) -> Sequence[Any]:  # noqa: ANN401
    """All legal placements of a profile, not the free ones."""
    count = c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, info.id, None, byref(count))
    found = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, info.id, found, byref(count))
    return tuple(found[: count.value])


def _instances_of(device: Any, info: Any) -> Sequence[Any]:  # noqa: ANN401
    found, count = (pynvml.c_nvmlGpuInstance_t * info.instanceCount)(), c_uint()
    pynvml.nvmlDeviceGetGpuInstances(device, info.id, found, byref(count))
    return tuple(found[: count.value])


def _uuid(compute: Any) -> str:  # noqa: ANN401
    """UUID of the MIG device that a compute instance makes."""
    uuid: str = pynvml.nvmlDeviceGetUUID(pynvml.nvmlComputeInstanceGetInfo(compute).device)
    return uuid


def _compute_instance(instance: Any, slices: int) -> tuple[Any | None, bool]:  # noqa: ANN401
    """The compute instance that has all of a GPU instance, or else the first of those that share it, and which it is.

    The project makes none that share; somebody else's are told of, so that their processes are seen.
    """
    full = COMPUTE_PROFILES[slices]
    found = _compute_instances(instance, full)
    if found:
        return found[0], True
    for number in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        with suppress(pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            if number != full and (found := _compute_instances(instance, number)):
                return found[0], False
    return None, False


def _compute_instances(instance: Any, number: int) -> Sequence[Any]:  # noqa: ANN401
    """Compute instances of one NVML_COMPUTE_INSTANCE_PROFILE_*."""
    info = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, number, 0)
    found, count = (pynvml.c_nvmlComputeInstance_t * info.instanceCount)(), c_uint()
    pynvml.nvmlGpuInstanceGetComputeInstances(instance, info.id, found, byref(count))
    return tuple(found[: count.value])
