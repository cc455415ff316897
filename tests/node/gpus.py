"""The GPUs of a real node: a simulated driver, and the agent of the project on it, started as a DaemonSet would.

Nothing of the agent is replaced: it loads libnvidia-ml.so.1, its scrubs load libcuda.so.1, containers get both through
CDI with the device nodes of their claim, and see what those let them see.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pynvml
import pytest
import yaml

from tests.cluster.node.realnode import RealNode
from tests.cluster.world import environment
from tests.nvsim.library import SMI, driver, library
from tests.nvsim.node import STATE, Node

AGENT: Final = "agent"
PORT: Final = 8081
_INSIDE: Final = "/driver"
"""Where containers have the driver's libraries and the simulator's state."""
REAL_TIMES: Final = {
    "create_gi": 150, "create_ci": 50, "destroy_ci": 50, "destroy_gi": 150,
    "context": 250, "memset_gb_s": 1400, "copy_gb_s": 25,
}  # fmt: skip
"""What an A100 takes, for `Node.times`."""


class Driver:
    """NVIDIA's driver on a real node, simulated: its state, its files, and what agent and containers are told of it."""

    def __init__(self, node: RealNode, *, gpus: int = 2, mig: Sequence[int] = (1,)) -> None:
        """`mig`: indices of the GPUs that are in MIG mode from the beginning."""
        self._node = node
        self.root = node.layout.directory / "driver"
        self.root.mkdir()
        self._state = self.root / "state"
        self._state.mkdir(mode=0o777)
        self._state.chmod(0o777)  # Containers run as anybody.
        self.gpu = Node.create(self._state / "node", gpus=gpus)
        self.gpu.times(**REAL_TIMES)
        for index in mig:
            self.gpu.set("mig_current", 1, gpu=index)
            self.gpu.set("mig_pending", 1, gpu=index)
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
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(STATE, str(self.gpu.path))
            pynvml.nvmlInit()
            try:
                yield
            finally:
                pynvml.nvmlShutdown()

    def reboot(self, seed: int) -> None:
        """The driver's part of a reboot of the node."""
        self.gpu.reboot(seed)
        self.gpu.make_files(self.root)

    async def start_agent(self, kubeconfig: Path, **settings: Any) -> None:  # noqa: ANN401  (of any type)
        """Start the agent; returns at once."""
        command = [
            sys.executable, "-m", "gpu_tenancy", "agent", "--node", self._node.name,
            "--kubeconfig", str(kubeconfig), "--settings", str(self._settings(settings)),
        ]  # fmt: skip
        await self._node.spawn(AGENT, command, {**environment(), **self.gpu.environment})

    def _settings(self, more: Mapping[str, Any]) -> Path:
        edits = self.root / "driver-cdi.json"
        edits.write_text(json.dumps(self._cdi()))
        path = self.root / "agent.yaml"
        values = {
            "kubelet_root": self._node.kubelet_root,
            "cdi_root": self._node.cdi_root,
            "state_dir": self._node.state_dir,
            "driver_root": self.root,
            "dev_root": self.root,
            "driver_cdi": edits,
            "nvidia_smi": driver() / SMI,
            "host": "127.0.0.1",
            "port": PORT,
            "node_seconds": 1,
            "probation_seconds": 2,
            **more,
        }
        path.write_text(
            yaml.safe_dump({name: str(one) if isinstance(one, Path) else one for name, one in values.items()})
        )
        return path

    def _cdi(self) -> Mapping[str, Any]:
        """What nvidia-ctk would tell of a driver."""
        return {"containerEdits": self.edits()}

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
        env = [f"{name}={value}" for name, value in variables.items()]
        return {"env": env, "mounts": mounts}
