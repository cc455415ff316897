"""A simulated GPU node and what can befall it: the hand that no driver shows.

The node lies in one file; every process that loads the library with `$NVSIM_STATE` naming it sees the same node. What
is done here goes through functions that the library exports beside NVML's, so its layout is said in one place.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple, Self

from tests.nvsim.files import make_files
from tests.nvsim.library import driver, library

STATE: Final = "NVSIM_STATE"
"""Environment variable that names the node of a process."""
A100_80GB: Final = "NVIDIA A100-SXM4-80GB"
NO_INSTANCE: Final = 0xFFFFFFFF
"""Of an event or a process that cannot be attributed to an instance."""
NOBODY: Final = 0
"""Writer of what memory happens to hold after power-up, and of what `plant` puts there unless it says else."""
DRIVER: Final = 0xFFFFFFFF
"""Writer of a context's own memory."""
SUCCESS: Final = 0
XID: Final = 0x8
"""nvmlEventTypeXidCriticalError."""
_COMPLAINTS: Final = {
    -1: "there is no node in that file",
    -2: "there is no such GPU, process, fault or field",
    -3: "there is no room for more",
    -4: "the GPU is in use, lost, or its board refuses to reset it alone",
}


class SimulatorError(RuntimeError):
    """What was asked of the simulator cannot be done."""


class Residue(NamedTuple):
    """What stands in a part of a memory slice: a pattern of 32 bits again and again, and who wrote it.

    `writer`: the pid of a process as it knows it itself (1 in many a container), NOBODY or DRIVER.
    """

    slice: int
    pattern: int
    writer: int
    size: int


_ROW: Final = struct.Struct("@IIIxxxxQ")
_FAULT_ROW: Final = struct.Struct("@64siiIIIII")
"""As src/control.c lays them out."""
_ROWS: Final = 1024
"""More than a GPU's memory can be divided into."""


_FAULTS: Final = 64
"""As many as a node can have at a time."""


class Node:
    """One simulated node. Made by `create`, or opened where it is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(
        cls, path: Path, *, board: str = A100_80GB, gpus: int = 8, layouts: int = 0b10101010, seed: int = 0
    ) -> Node:
        """A new node in `path`, with MIG off on every GPU.

        `layouts`: for each GPU a bit, which of the two ways seen on real boards it numbers its GPU instances.
        """
        node = cls(path)
        node._call("nvsim_create", board.encode(), gpus, layouts, ctypes.c_uint64(seed))
        return node

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to see the node as its own, set before it starts."""
        return {STATE: str(self.path), "LD_LIBRARY_PATH": str(driver())}

    @property
    def files(self) -> tuple[Path, Path]:
        """The node's state, and the file beside it that shows which clients live: a container needs both."""
        return self.path, self.path.with_name(f"{self.path.name}.clients")

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(library()))

    def _call(self, name: str, *arguments: object) -> int:
        result = int(getattr(self._library, name)(os.fsencode(self.path), *arguments))
        if result < 0:
            raise SimulatorError(f"{name} on {self.path}: {_COMPLAINTS.get(result, result)}.")
        return result

    # --- any field

    def set(self, field: str, value: int, gpu: int | None = None) -> None:
        """Set a field of a GPU, or of the node; their names are those of src/state.h."""
        self._call("nvsim_set", -1 if gpu is None else gpu, field.encode(), ctypes.c_uint64(value))

    def get(self, field: str, gpu: int | None = None) -> int:
        """The value of a field."""
        value = ctypes.c_uint64()
        self._call("nvsim_get", -1 if gpu is None else gpu, field.encode(), ctypes.byref(value))
        return value.value

    def fields(self, *, of_gpus: bool) -> list[str]:
        """Names of the fields that can be set, of every GPU or of the node."""
        name = self._library.nvsim_field
        name.restype = ctypes.c_char_p
        names = (name(int(of_gpus), number) for number in range(1000))
        return [one.decode() for one in takewhile(bool, names)]

    def _text(self, name: str) -> str:
        text = ctypes.create_string_buffer(64)
        self._call("nvsim_text", name.encode(), text, len(text))
        return text.value.decode()

    @property
    def boot_id(self) -> str:
        """Identity of the node's boot, as /proc/sys/kernel/random/boot_id would say it."""
        return self._text("boot_id")

    @property
    def driver_version(self) -> str:
        """Version of the driver that is loaded."""
        return self._text("driver_version")

    @property
    def gpus(self) -> int:
        """How many GPUs there are."""
        return self.get("gpu_count")

    # --- files

    def make_files(self, root: Path) -> None:
        """Make below `root` what the driver shows of the node as it is now: /dev and /proc; see files.py."""
        make_files(self, root)

    def capability(self, minor: int, gi: int, ci: int = -1) -> int:
        """Number of the node /dev/nvidia-caps/nvidia-cap… of a GPU instance, or of a compute instance of it."""
        return int(self._library.nvsim_capability(minor, gi, ci))

    # --- time

    def stop_clock(self) -> None:
        """Simulated time passes by `advance` alone."""
        self._call("nvsim_clock", 1, ctypes.c_double(1.0))

    def run_clock(self, scale: float = 1.0) -> None:
        """Simulated time passes `scale` times as fast as real time."""
        self._call("nvsim_clock", 0, ctypes.c_double(scale))

    def advance(self, seconds: float) -> None:
        """Let simulated time pass at once."""
        self._call("nvsim_advance", ctypes.c_int64(round(seconds * 1e9)))

    def times(
        self,
        *,
        create_gi: int = 0,
        create_ci: int = 0,
        destroy_ci: int = 0,
        destroy_gi: int = 0,
        context: int = 0,
        memset_gb_s: float = 0,
        copy_gb_s: float = 0,
    ) -> None:
        """How long calls take, in milliseconds, and how fast a whole GPU's memory is, in 10⁹ bytes a second.

        A new node takes no time for anything, as 0 says. An A100 takes about 250 ms for a CUDA context, and does
        1,400 GB/s within itself and 25 GB/s from and to the host; a GPU instance has its memory slices' share.
        """
        self.set("create_gpu_instance_ms", create_gi)
        self.set("create_compute_instance_ms", create_ci)
        self.set("destroy_compute_instance_ms", destroy_ci)
        self.set("destroy_gpu_instance_ms", destroy_gi)
        self.set("create_context_ms", context)
        self.set("memset_mb_s", round(memset_gb_s * 1000))
        self.set("copy_mb_s", round(copy_gb_s * 1000))

    # --- memory

    def residue(self, gpu: int) -> list[Residue]:
        """What stands in all of a GPU's memory, ascending; what no holder of a device reaches is among it."""
        return self._rows("nvsim_residue", gpu)

    def readable(self, uuid: str) -> list[Residue]:
        """What the holder of a GPU or of a MIG device can read, ascending."""
        return self._rows("nvsim_readable", uuid.encode())

    def _rows(self, name: str, of: object) -> list[Residue]:
        rows = ctypes.create_string_buffer(_ROWS * _ROW.size)
        count = self._call(name, of, rows, _ROWS)
        return [Residue(*row) for row in _ROW.iter_unpack(rows.raw[: count * _ROW.size])]

    def plant(self, gpu: int, pattern: int, slice_: int | None = None, writer: int = NOBODY) -> None:
        """Fill one memory slice of a GPU, or all of its memory, as a former holder would have left it."""
        self._call("nvsim_plant", gpu, -1 if slice_ is None else slice_, pattern, writer)

    # --- who is there

    def add_process(
        self, gpu: int, pid: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE, memory: int = 0, kind: int = 0
    ) -> None:
        """A process begins to use a GPU or an instance. `memory`: bytes; `kind`: 0 compute, 1 graphics, 2 MPS."""
        self._call("nvsim_add_process", gpu, pid, kind, gi, ci, ctypes.c_uint64(memory))

    def end_process(self, pid: int) -> None:
        """It uses no GPU any more."""
        self._call("nvsim_end_process", pid)

    # --- what goes wrong

    def xid(self, gpu: int, code: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE) -> None:
        """The driver tells of an Xid."""
        self.tell(XID, code, gpu, gi, ci)

    def tell(self, event: int, data: int, gpu: int, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE) -> None:
        """The driver tells of any event (nvmlEventType*)."""
        self._call("nvsim_tell", ctypes.c_uint64(event), ctypes.c_uint64(data), gpu, gi, ci)

    def lose(self, gpu: int) -> None:
        """The GPU falls off the bus: Xid 79, and GPU_IS_LOST from every call until a reboot."""
        self._call("nvsim_lose", gpu)

    def reset(self, gpu: int) -> None:
        """What `nvidia-smi --gpu-reset` does. Raises SimulatorError where it is refused."""
        self._call("nvsim_reset", gpu)

    def reboot(self, seed: int = 1) -> None:
        """A new boot: no process, no instance, energy from nought, chance in memory; an A100's MIG mode stays."""
        self._call("nvsim_reboot", ctypes.c_uint64(seed))

    def fault(
        self,
        symbol: str = "*",
        *,
        gpu: int = -1,
        gi: int = -1,
        result: int = SUCCESS,
        after: int = 0,
        times: int = 0,
        delay_ms: int = 0,
    ) -> Fault:
        """From now on calls of `symbol` (about that GPU or instance) return `result`, or come late, in any process.

        "*" means every call of NVML, and a name that ends so whatever begins like it: "cu*" is every call of CUDA.
        CUDA's calls go by the symbol that the library exports (`cuMemAlloc_v2`), and `result` is then a CUresult.
        `gpu-reset` is what nvidia-smi does by that name.
        The first `after` are left alone; `times` are spoilt then (0: all). In a `with` statement, until its end.
        """
        number = self._call("nvsim_add_fault", symbol.encode(), gpu, gi, after, times, result, delay_ms)
        return Fault(self, number)

    def faults(self) -> list[Fault]:
        """Those that were added and not taken away."""
        return [fault for fault in (Fault(self, number) for number in range(_FAULTS)) if fault.exists]


class FaultRow(NamedTuple):
    """A fault as `Node.fault` was told of it; -1: of any GPU or instance. `seen`: calls that it has matched."""

    symbol: str
    gpu: int
    gi: int
    after: int
    times: int
    seen: int
    result: int
    delay_ms: int


class Fault:
    """A fault that was added to a node."""

    def __init__(self, node: Node, number: int) -> None:
        self._node = node
        self.number = number

    @property
    def seen(self) -> int:
        """Calls that it has matched, those that it left alone included."""
        return self.row.seen

    @property
    def exists(self) -> bool:
        """Whether it is there: added, and not taken away."""
        try:
            return bool(self.row)
        except SimulatorError:
            return False

    @property
    def row(self) -> FaultRow:
        """All about it. Raises SimulatorError where it was taken away."""
        raw = ctypes.create_string_buffer(_FAULT_ROW.size)
        self._node._call("nvsim_fault", self.number, raw)
        symbol, *numbers = _FAULT_ROW.unpack(raw.raw)
        return FaultRow(symbol.rstrip(b"\0").decode(), *numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let calls be as they were."""
        self._node._call("nvsim_remove_fault", self.number)
