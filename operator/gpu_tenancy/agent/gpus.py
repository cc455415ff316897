"""What the agent needs of the GPUs of its node: one Protocol, its facts and its errors.

NVML stands behind it on a real node, memory behind it in tests. A backend runs its own blocking calls somewhere else
than on the event loop. This module imports no driver and does nothing itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from gpu_tenancy.api.node import GpuMode


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU as the driver shows it."""

    index: int
    """NVML index; may change with a reboot."""
    uuid: str
    """NVML UUID, ``GPU-…``."""
    model: str
    """NVML name without the vendor, with - for spaces: ``A100-SXM4-80GB``, ``A100-80GB-PCIe``."""
    memory_mib: int
    """Total memory in MiB."""
    multiprocessors: int
    """Streaming multiprocessors."""
    pci_bus_id: str
    """PCI address, ``0000:3b:00.0``."""
    mode: GpuMode
    """Whole or MIG, as it is now."""
    healthy: bool = True
    """False: nothing is made or published on it."""
    message: str = ""
    """Why it is not healthy, as a sentence."""
    needs_reset: bool = False
    """The driver says that it has to be reset before it is of use again."""
    vanished: bool = False
    """The driver does not list it any more, though it did in this boot. Its index may be another's by now."""
    nodes: tuple[str, ...] = ()
    """Device nodes that a container needs to use the whole GPU; empty where there are none to give."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One MIG instance: a GPU instance with the full-width compute instance in it."""

    gpu: str
    """UUID of its GPU."""
    profile: str
    """Profile by its name on that model, e.g. ``3g.40gb``."""
    start: int
    """First memory slice, 0 to 7."""
    size: int
    """Memory slices, 1 to 8."""
    uuid: str
    """UUID of the MIG device, ``MIG-…``; empty for a GPU instance that has no compute instance."""
    gpu_instance: int
    """NVML GPU instance id."""
    compute_instance: int | None
    """NVML compute instance id; None where there is none."""
    memory_mib: int
    """Its memory in MiB."""
    multiprocessors: int
    """Its streaming multiprocessors."""
    nodes: tuple[str, ...] = ()
    """Device nodes that a container needs to use it; empty where there are none to give."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process that uses a device, or is a pod's that had it."""

    pid: int
    """Process id on the host."""
    name: str
    """Its command, as far as it is known."""
    pod: str = ""
    """The pod whose it is, as namespace/name, or its UID where the runtime does not know it any more; empty where it is
    none's, or nobody has looked."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a GPU says of itself when it is examined between two holders."""

    ecc_uncorrected: int | None = None
    """Uncorrectable memory errors since the driver was loaded; None where the GPU does not count them."""
    remap_pending: bool | None = None
    """A memory row waits for a reset to be replaced; None while the GPU has MIG instances: it cannot be read then."""
    remap_failed: bool | None = None
    """A memory row could not be replaced: the GPU is to be exchanged; None as above."""
    recovery_action: str = ""
    """What the driver asks for, e.g. ``reset the GPU``; empty where nothing."""
    power_limit_mw: int | None = None
    """Power limit in mW that is set."""
    default_power_limit_mw: int | None = None
    """Power limit in mW that the GPU has by default."""
    pcie_width: int | None = None
    """PCIe lanes in use."""
    max_pcie_width: int | None = None
    """PCIe lanes that GPU and slot could use."""
    driver: str = ""
    """Version of NVIDIA's driver."""
    vbios: str = ""
    """Version of the GPU's firmware."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a GPU measures, for watching; None where it does not."""

    power_mw: int | None = None
    """Power in mW, as it is drawn now."""
    energy_mj: int | None = None
    """Energy in mJ since the driver was loaded."""
    celsius: int | None = None
    """Temperature of the chip."""
    memory_used: Mapping[str, int] = field(default_factory=dict)
    """Bytes in use by UUID of the device: the whole GPU, or each of its MIG devices."""


@dataclass(frozen=True, slots=True)
class GpuEvent:
    """What a GPU told of by itself: an Xid, or that it was lost."""

    UNKNOWN: ClassVar[int] = 0xFFFFFFFF
    """NVML's instance id of what cannot be attributed."""

    gpu: str
    """UUID of the GPU."""
    xid: int = 0
    """Number of the Xid; 0 where it is none."""
    gpu_instance: int | None = None
    """NVML id of the GPU instance it befell; None: of the whole GPU, or not known of which."""
    compute_instance: int | None = None
    """The same for the compute instance."""
    lost: bool = False
    """The GPU does not answer any more."""


class GpuError(Exception):
    """A call to the driver failed; the message is a sentence that names GPU, call and remedy."""


class InUse(GpuError):  # noqa: N818  (the driver's own word)
    """The device is in use, or the driver says so (it does at times after the last process has ended)."""


class InsufficientResources(GpuError):  # noqa: N818
    """The placement is taken: what the agent believed about the GPU is stale."""


class GpuLost(GpuError):  # noqa: N818
    """The GPU has fallen off the bus or needs a reset; only a person or a reboot brings it back."""


class ResetRequired(GpuLost):
    """The GPU answers nothing until it is reset."""


class Gpus(Protocol):
    """The GPUs of one node.

    The agent never has two calls for one GPU under way, `list` excepted; calls for different GPUs overlap. A call that
    hangs must hang alone. Each may raise GpuError.
    """

    async def boot_id(self) -> str:
        """Identity of the node's current boot: with a new one no MIG instance and no prepared claim is left."""
        ...

    async def list(self) -> Sequence[GpuFacts]:
        """Every GPU of the node. A faulty one is listed as not healthy, from memory if it no longer answers."""
        ...

    async def instances(self, gpu: str) -> Sequence[Instance]:
        """MIG instances of one GPU, found by walking GPU instances, so that those without a compute instance count."""
        ...

    async def create(self, gpu: str, profile: str, start: int) -> Instance:
        """Create a MIG instance at exactly that placement. Raises InsufficientResources where it is taken.

        It leaves nothing half-made behind unless the process dies in it.
        """
        ...

    async def destroy(self, instance: Instance) -> None:
        """Destroy a MIG instance; one that is gone already counts as destroyed. Raises InUse."""
        ...

    async def restore(self, gpu: str) -> Sequence[str]:
        """Put clocks, power limit and compute mode of a GPU back to their defaults; what was found changed, in words.

        GPU-wide: only while nobody is served on it.
        """
        ...

    async def vitals(self, gpu: str) -> Vitals:
        """Examine a GPU."""
        ...

    async def set_mode(self, gpu: str, mode: GpuMode) -> bool:
        """Ask for a mode, and say whether the GPU has it now; else it will after a reset. Nobody may be on the GPU."""
        ...

    async def reset(self, gpu: str) -> None:
        """Reset this GPU and no other. Nobody may be on it. Raises GpuError where it is refused."""
        ...

    async def telemetry(self, gpu: str) -> Telemetry:
        """What a GPU measures now."""
        ...

    def events(self) -> AsyncIterator[GpuEvent]:
        """What the GPUs tell of, from now on and without end; those of a lost GPU do not keep back the others'."""
        ...

    async def processes(self, device: str) -> Sequence[Process]:
        """Processes that use the device with this UUID, a whole GPU or a MIG device."""
        ...
