"""What NVIDIA's driver shows of a node in the file system: device nodes, and what it says in /proc.

Makes files below a folder that the caller names and nowhere else: character devices where the process may make them (no
driver answers behind them; what counts is that they are there), else plain files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from tests.nvsim.node import Node

GPU_MAJOR: Final = 195
UVM_MAJOR: Final = 510
CAPS_MAJOR: Final = 237
"""The kernel gives the latter two anew at each boot; these are ones that it often gives."""
GPU_INSTANCES: Final = 15
"""Ids that a GPU instance may have."""
COMPUTE_INSTANCES: Final = 8
CONFIG, MONITOR = 1, 2
CONTROL: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
"""Device nodes that every user of a GPU needs beside its own."""


class DeviceNode(NamedTuple):
    """A character device below /dev."""

    name: str
    major: int
    minor: int


def device_nodes(node: Node) -> Iterator[DeviceNode]:
    """All that there are on the node, whatever instances exist."""
    for name, (major, minor) in zip(CONTROL, ((GPU_MAJOR, 255), (UVM_MAJOR, 0), (UVM_MAJOR, 1)), strict=True):
        yield DeviceNode(name, major, minor)
    for gpu in range(node.gpus):
        minor = node.get("minor", gpu)
        yield DeviceNode(f"nvidia{minor}", GPU_MAJOR, minor)
    for _, number in capabilities(node):
        yield DeviceNode(f"nvidia-caps/nvidia-cap{number}", CAPS_MAJOR, number)


def capabilities(node: Node) -> Iterator[tuple[str, int]]:
    """The capabilities of MIG, as the driver names them, and the minor numbers of their device nodes."""
    yield "config", CONFIG
    yield "monitor", MONITOR
    for gpu in range(node.gpus):
        minor = node.get("minor", gpu)
        for gi in range(GPU_INSTANCES):
            yield f"gpu{minor}/gi{gi}/access", node.capability(minor, gi)
            for ci in range(COMPUTE_INSTANCES):
                yield f"gpu{minor}/gi{gi}/ci{ci}/access", node.capability(minor, gi, ci)


def make_files(node: Node, root: Path) -> None:
    """Make what the driver shows of the node as it is below `root`; again after a reboot, for its new boot id."""
    for device in device_nodes(node):
        _make_device(root / "dev" / device.name, device)
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {node.driver_version}  Wed Apr 23 23:35:42 UTC 2025\n"
    texts = {
        "proc/driver/nvidia/version": version,
        "proc/driver/nvidia-caps/mig-minors": "".join(f"{name} {number}\n" for name, number in capabilities(node)),
        "proc/sys/kernel/random/boot_id": f"{node.boot_id}\n",
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        fresh = (root / path).with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(root / path)


def _make_device(path: Path, device: DeviceNode) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(device.major, device.minor))
    except PermissionError:
        path.touch()
    path.chmod(0o666)  # mknod's mode is less the umask.
