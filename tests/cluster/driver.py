"""A node's simulated driver, and the command that starts the project's agent on it, as a DaemonSet would.

Nothing of the agent is replaced: it loads libnvidia-ml.so.1, its scrubs load libcuda.so.1, and what containers get of
both is in a file that stands for what nvidia-ctk would say. Writes below the folder that it is given; starts nothing.
"""

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pynvml
import yaml

from tests.nvsim.library import SMI, driver, library
from tests.nvsim.node import A100_80GB, STATE, Node

_INSIDE: Final = "/driver"
"""Where containers have the driver's libraries and the simulator's state."""
REAL_TIMES: Final = {
    "create_gi": 150, "create_ci": 50, "destroy_ci": 50, "destroy_gi": 150,
    "context": 250, "memset_gb_s": 1400, "copy_gb_s": 25,
}  # fmt: skip
"""What an A100 takes, for `Node.times`."""


class Driver:
    """NVIDIA's driver on one node: its state, its files, and what agent and containers are told of it."""

    def __init__(
        self, root: Path, *, board: str = A100_80GB, gpus: int = 8, mig: Sequence[int] = (), seed: int = 0
    ) -> None:
        """A new one below `root`. `mig`: indices of the GPUs that are in MIG mode; `seed`: makes UUIDs its own."""
        self.root = root
        root.mkdir(parents=True)
        self._state = root / "state"
        self._state.mkdir(mode=0o777)
        self._state.chmod(0o777)  # Containers run as anybody.
        self.gpu = Node.create(self._state / "node", board=board, gpus=gpus, seed=seed)
        self.gpu.times(**REAL_TIMES)
        for index in mig:
            self.gpu.set("mig_current", 1, gpu=index)
            self.gpu.set("mig_pending", 1, gpu=index)
        self.gpu.make_files(root)

    def command(self, node: str, kubeconfig: Path, settings: Mapping[str, Any]) -> list[str]:
        """The command of the agent; `settings` beside those that say where the driver is."""
        path = self._settings(settings)
        arguments = ["--node", node, "--kubeconfig", str(kubeconfig), "--settings", str(path)]
        return [sys.executable, "-m", "gpu_tenancy", "agent", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """What the agent needs to find the driver."""
        return self.gpu.environment

    def edits(self) -> Mapping[str, Any]:
        """What every container with a GPU needs: the driver's libraries, and how to find them."""
        mounts = [
            {
                "hostPath": str(driver()),
                "containerPath": f"{_INSIDE}/lib",
                "options": ["ro", "nosuid", "nodev", "bind"],
            },
            {"hostPath": str(self._state), "containerPath": f"{_INSIDE}/state", "options": ["rw", "nosuid", "bind"]},
        ]
        variables = {
            STATE: f"{_INSIDE}/state/{self.gpu.path.name}",
            "NVSIM_DEV": "/dev",
            "LD_LIBRARY_PATH": f"{_INSIDE}/lib",
        }
        return {"env": [f"{name}={value}" for name, value in variables.items()], "mounts": mounts}

    def reboot(self, seed: int) -> None:
        """The driver's part of a reboot of the node."""
        self.gpu.reboot(seed)
        self.gpu.make_files(self.root)

    def xid(self, gpu: int, code: int, uuid: str) -> None:
        """The GPU tells of an Xid that befell the MIG device with this UUID."""
        with self._seen():
            device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            gi, ci = pynvml.nvmlDeviceGetGpuInstanceId(device), pynvml.nvmlDeviceGetComputeInstanceId(device)
        self.gpu.xid(gpu, code, gi=gi, ci=ci)

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """This process sees the node's GPUs through NVML."""
        ctypes.CDLL(str(library()))
        before = os.environ.get(STATE)
        os.environ[STATE] = str(self.gpu.path)
        pynvml.nvmlInit()
        try:
            yield
        finally:
            pynvml.nvmlShutdown()
            if before is None:
                del os.environ[STATE]
            else:
                os.environ[STATE] = before

    def _settings(self, more: Mapping[str, Any]) -> Path:
        edits = self.root / "driver-cdi.json"
        edits.write_text(json.dumps({"containerEdits": self.edits()}))
        values = {
            "driver_root": self.root,
            "dev_root": self.root,
            "driver_cdi": edits,
            "nvidia_smi": driver() / SMI,
            "host": "127.0.0.1",
            **more,
        }
        path = self.root / "agent.yaml"
        plain = {name: str(one) if isinstance(one, Path) else one for name, one in values.items()}
        path.write_text(yaml.safe_dump(plain))
        return path
