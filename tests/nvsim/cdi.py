"""What `nvidia-ctk cdi generate` would say of a simulated node: how its driver gets into a container.

The agent takes this in place of NVIDIA's own tool, which knows real drivers only. Writes nothing itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tests.nvsim.files import CONTROL
from tests.nvsim.library import SMI, driver

if TYPE_CHECKING:
    from tests.nvsim.node import Node

STATE: Final = "/run/nvsim"
"""Where a container has the node's state; no image has anything there."""
DRIVER: Final = f"{STATE}/driver"


def specification(node: Node) -> dict[str, Any]:
    """A CDI specification with the edits that every container with a GPU of the node needs.

    The container sees the devices whose nodes it has in its /dev, as with a real driver; see src/caller.h.
    """
    mounts = [_mount(str(path), f"{DRIVER}/{path.name}", "ro", "exec") for path in sorted(driver().iterdir())]
    mounts.append(_mount(f"{driver()}/{SMI}", f"/usr/bin/{SMI}", "ro", "exec"))
    mounts += [_mount(str(path), f"{STATE}/{path.name}", "rw") for path in node.files]
    variables = {
        "NVSIM_STATE": f"{STATE}/{node.path.name}",
        "NVSIM_DEV": "/dev",
        "LD_LIBRARY_PATH": DRIVER,
        "NVIDIA_VISIBLE_DEVICES": "void",
    }
    edits = {
        "env": [f"{name}={value}" for name, value in variables.items()],
        "deviceNodes": [{"path": f"/dev/{name}"} for name in CONTROL],
        "mounts": mounts,
    }
    return {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [], "containerEdits": edits}


def _mount(host: str, container: str, *options: str) -> dict[str, Any]:
    return {"hostPath": host, "containerPath": container, "options": ["bind", "nosuid", "nodev", *options]}
