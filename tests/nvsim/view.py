"""A simulated node as tables for a terminal: what NVML says of it, its faults, what stands in its memory.

Reads through NVML, as anybody would, and through the hand of node.py; changes nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pynvml
from rich.table import Table

from tests.nvsim.library import library
from tests.nvsim.node import DRIVER, NOBODY, STATE, Node, Residue

NOTABLE: Final = (
    "mig_busy", "mig_reset_required", "reset_refused", "draining", "persistence", "compute_mode", "remap_pending",
    "remap_failed", "ecc_volatile.corrected", "ecc_volatile.uncorrected", "recovery_action", "hidden_indices",
    "pcie_generation", "pcie_width",
)  # fmt: skip
"""Fields of a GPU that are 0 while nothing is the matter."""


def node_table(node: Node) -> Table:
    """What NVML says of the GPUs, their MIG devices and processes."""
    title = f"{node.path}: driver {node.driver_version}, boot {node.boot_id}"
    table = Table("GPU", "UUID", "is", "processes", "state", title=title, title_justify="left")
    with _nvml(node):
        for index in range(node.gpus):
            for row in _rows(node, index):
                table.add_row(*row)
    return table


@contextmanager
def _nvml(node: Node) -> Iterator[None]:
    ctypes.CDLL(str(library()))  # nvidia-ml-py finds by its SONAME what is loaded already.
    os.environ[STATE] = str(node.path)
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _rows(node: Node, index: int) -> Iterator[tuple[str, ...]]:
    """A GPU and its MIG devices."""
    if node.get("lost", index):
        yield str(index), "", "", "", "lost, until a reboot"
        return
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, watts = pynvml.nvmlDeviceGetName(device), pynvml.nvmlDeviceGetPowerUsage(device) / 1000
    yield str(index), pynvml.nvmlDeviceGetUUID(device), f"{name}, {watts:.0f} W", _pids(device), _state(node, index)
    for mig in _mig_devices(device):
        profile = pynvml.nvmlDeviceGetName(mig).rpartition("MIG ")[2]
        gi, ci = pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)
        yield "", pynvml.nvmlDeviceGetUUID(mig), f"{profile}, gi {gi}, ci {ci}", _pids(mig), ""


def _mig_devices(device: Any) -> Iterator[Any]:  # noqa: ANN401  (pynvml is untyped)
    for at in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            yield pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, at)
        except pynvml.NVMLError_NotFound:
            continue


def _pids(device: Any) -> str:  # noqa: ANN401
    asked = (
        pynvml.nvmlDeviceGetComputeRunningProcesses(device),
        pynvml.nvmlDeviceGetGraphicsRunningProcesses(device),
        pynvml.nvmlDeviceGetMPSComputeRunningProcesses(device),
    )
    return ", ".join(str(one.pid) for found in asked for one in found)


def _state(node: Node, index: int) -> str:
    """The MIG mode, and what is not as it should be by the names of the fields."""
    current, pending = node.get("mig_current", index), node.get("mig_pending", index)
    mode = "MIG" if current else "whole"
    found = [f"{field} {value}" for field in NOTABLE if (value := node.get(field, index))]
    return ", ".join([mode if current == pending else f"{mode}, to change", *found])


def fault_table(node: Node) -> Table:
    """The faults that calls suffer, first match first."""
    table = Table("N", "symbol", "GPU", "gi", "after", "times", "seen", "result", "delay ms")
    for fault in node.faults():
        row = fault.row
        where = ("any" if one == -1 else str(one) for one in (row.gpu, row.gi))
        how = (row.after, row.times, row.seen, row.result, row.delay_ms)
        table.add_row(str(fault.number), row.symbol, *where, *map(str, how))
    return table


def residue_table(rows: Sequence[Residue]) -> Table:
    """What stands in memory, and who wrote it."""
    table = Table("slice", "pattern", "MiB", "written by")
    for row in rows:
        writer = {NOBODY: "nobody", DRIVER: "the driver"}.get(row.writer, f"pid {row.writer}")
        table.add_row(str(row.slice), f"0x{row.pattern:08x}", f"{row.size / 2**20:,.1f}", writer)
    return table
