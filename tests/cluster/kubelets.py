"""The stand-in for kubelet as a process of its own, for worlds that outlive the command that made them."""

import asyncio
import signal
from pathlib import Path

import click

from tests.cluster.kubelet import StandInKubelet


@click.command()
@click.option("--node", "nodes", multiple=True, required=True, help="Node to serve; may be repeated.")
@click.option("--kubeconfig", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--root", type=click.Path(path_type=Path), required=True, help="Folder with one kubelet root per node.")
def main(nodes: tuple[str, ...], kubeconfig: Path, root: Path) -> None:
    """Prepare and unprepare the claims of the nodes' pods until told to stop."""
    asyncio.run(_serve(nodes, kubeconfig, root))


async def _serve(nodes: tuple[str, ...], kubeconfig: Path, root: Path) -> None:
    stop = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    async with StandInKubelet(nodes, kubeconfig, lambda node: root / node, mark_prepared=True):
        await stop.wait()


if __name__ == "__main__":
    main()
