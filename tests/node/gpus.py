"""The GPUs of a real node: a simulated driver, and the agent of the project on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.cluster import driver
from tests.cluster.driver import REAL_TIMES
from tests.cluster.node.realnode import RealNode
from tests.cluster.world import environment

__all__ = ["AGENT", "PORT", "REAL_TIMES", "Driver"]

AGENT: Final = "agent"
PORT: Final = 8081


class Driver(driver.Driver):
    """NVIDIA's driver on a real node, simulated."""

    def __init__(self, node: RealNode, *, gpus: int = 2, mig: Sequence[int] = (1,)) -> None:
        """`mig`: indices of the GPUs that are in MIG mode from the beginning."""
        super().__init__(node.layout.directory / "driver", gpus=gpus, mig=mig)
        self._node = node

    async def start_agent(self, kubeconfig: Path, **settings: Any) -> None:  # noqa: ANN401  (of any type)
        """Start the agent; returns at once."""
        values = {
            "kubelet_root": self._node.kubelet_root,
            "cdi_root": self._node.cdi_root,
            "state_dir": self._node.state_dir,
            "port": PORT,
            "node_seconds": 1,
            "probation_seconds": 2,
            **settings,
        }
        command = self.command(self._node.name, kubeconfig, values)
        await self._node.spawn(AGENT, command, {**environment(), **self.environment})
