"""A simulated GPU node and what can befall it: the hand that no driver shows.

The node lies in one file; every process that loads the library with `$NVSIM_STATE` naming it sees the same node. What
is done here goes through functions that the library exports beside NVML's, so its layout is said in one place.
"""

from __future__ import annotations

import ctypes
import os
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from tests.nvsim.library import library

STATE: Final = "NVSIM_STATE"
"""Environment variable that names the node of a process."""
A100_80GB: Final = "NVIDIA A100-SXM4-80GB"
NO_INSTANCE: Final = 0xFFFFFFFF
"""Of an event or a process that cannot be attributed to an instance."""
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
        return {STATE: str(self.path), "LD_LIBRARY_PATH": str(library().parent)}

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

    @property
    def boot_id(self) -> str:
        """Identity of the node's boot, as /proc/sys/kernel/random/boot_id would say it."""
        text = ctypes.create_string_buffer(64)
        self._call("nvsim_boot_id", text, len(text))
        return text.value.decode()

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

    def times(self, *, create_gi: int, create_ci: int, destroy_ci: int, destroy_gi: int) -> None:
        """How long calls take, in milliseconds; a new node takes none."""
        self.set("create_gpu_instance_ms", create_gi)
        self.set("create_compute_instance_ms", create_ci)
        self.set("destroy_compute_instance_ms", destroy_ci)
        self.set("destroy_gpu_instance_ms", destroy_gi)

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
        """A new boot: no process, no instance, energy from nought; the MIG mode of an A100 stays."""
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

        The first `after` are left alone; `times` are spoilt then (0: all). In a `with` statement, until its end.
        """
        number = self._call("nvsim_add_fault", symbol.encode(), gpu, gi, after, times, result, delay_ms)
        return Fault(self, number)


class Fault:
    """A fault that was added to a node."""

    def __init__(self, node: Node, number: int) -> None:
        self._node = node
        self.number = number

    @property
    def seen(self) -> int:
        """Calls that it has matched, those that it left alone included."""
        return self._node._call("nvsim_fault_seen", self.number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let calls be as they were."""
        self._node._call("nvsim_remove_fault", self.number)
