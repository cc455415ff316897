"""The real agent on GPUs in memory, for one simulated node or many: ``python -m tests.cluster.agent --node n1 …``.

Nothing of the agent is replaced but the hardware behind it. Each node has its own kubelet folder and checkpoint below
the given roots, as a node's own disk would have.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

import click

from gpu_tenancy.agent import home
from gpu_tenancy.agent.cycle import Seat, run_agents
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.kube.client import KubeClient
from tests.fakes.gpus import FakeGpus
from tests.fakes.machine import machine

_PR_SET_PDEATHSIG: Final = 1


@click.command(context_settings={"show_default": True})
@click.option("--node", "nodes", multiple=True, required=True, help="Name of a node; once for each.")
@click.option("--kubeconfig", type=click.Path(dir_okay=False, exists=True), required=True, help="API server to use.")
@click.option("--root", type=click.Path(path_type=Path), required=True, help="Folder of kubelet roots, one per node.")
@click.option("--state", type=click.Path(path_type=Path), required=True, help="Folder of checkpoints and hardware.")
@click.option("--gpus", "count", default=8, help="GPUs of each node.")
@click.option("--model", default="A100-SXM4-80GB", help="Their model.")
@click.option("--heartbeat", default=10.0, help="Seconds between heartbeats.")
@click.option("--heartbeat-lease", default=40, help="Seconds that a heartbeat is good for.")
@click.option("--die-with-parent", is_flag=True, help="End when the process that started this one ends.")
@click.option("--log-level", default="INFO", help="Least severity that is logged.")
def main(
    nodes: tuple[str, ...],
    kubeconfig: str,
    root: Path,
    state: Path,
    count: int,
    model: str,
    heartbeat: float,
    heartbeat_lease: int,
    die_with_parent: bool,
    log_level: str,
) -> None:
    """Run the agents of these nodes until SIGTERM or SIGINT."""
    if die_with_parent:
        _die_with_parent()
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    template = AgentSettings(heartbeat_seconds=heartbeat, heartbeat_lease_seconds=heartbeat_lease)
    asyncio.run(_run(nodes, kubeconfig, _Folders(root, state), _Hardware(count, model), template))


class _Folders:
    """Where the files of each node are."""

    def __init__(self, root: Path, state: Path) -> None:
        self._root = root
        self._state = state

    def settings(self, template: AgentSettings, node: str) -> AgentSettings:
        """The template with the node's own folders."""
        own = {
            "kubelet_root": self._root / node,
            "cdi_root": self._root / node / "cdi",
            "state_dir": self._state / node,
            "runtime_socket": None,
        }
        return template.model_copy(update=own)

    def hardware(self, node: str) -> Path:
        """File of the node's hardware."""
        return self._state / node / "hardware.json"


class _Hardware:
    """What each node has."""

    def __init__(self, count: int, model: str) -> None:
        self._count = count
        self._model = model

    def gpus(self, node: str, mig: frozenset[int], state: Path) -> FakeGpus:
        """The node's GPUs."""
        return FakeGpus(node, count=self._count, model=self._model, mig=mig, state=state)


async def _run(
    nodes: tuple[str, ...], kubeconfig: str, folders: _Folders, hardware: _Hardware, template: AgentSettings
) -> None:
    async with KubeClient.connect(kubeconfig, user_agent="gpu-tenancy-agent") as client:
        here = await asyncio.gather(*(home.Reader(client, node, template).read() for node in nodes))
        seats = {
            one.owner.name: Seat(
                machine(hardware.gpus(one.owner.name, one.mig_gpus, folders.hardware(one.owner.name))),
                folders.settings(template, one.owner.name),
            )
            for one in here
        }
        work = asyncio.ensure_future(run_agents(seats, client))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, work.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await work


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; nothing can be forgotten that way. Linux only."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the parent was gone before this process began")


if __name__ == "__main__":
    main()
