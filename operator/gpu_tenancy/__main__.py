"""Command line: `gpu-tenancy operator`, `agent`, `plan`, `simulate`, `crds`. Parses arguments and starts things."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpu-tenancy")
def main() -> None:
    """Rent A100 servers by the second, whole or as MIG slices, and mine on what is not rented."""


@main.command()
@click.option("--settings", "path", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="YAML file.")
@click.option("--kubeconfig", help="Kubeconfig; absent: the pod's service account, else ~/.kube/config.")
@click.option("--host", help="Address of /metrics, /healthz and /readyz.")
@click.option("--port", type=int, help="Port of /metrics, /healthz and /readyz.")
@click.option(
    "--log-level", default="INFO", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), show_default=True
)
def operator(path: Path | None, kubeconfig: str | None, host: str | None, port: int | None, log_level: str) -> None:
    """Run the operator until it is told to stop."""
    from gpu_tenancy.controller.run import run  # noqa: PLC0415  (the other commands need neither kopf nor a cluster)
    from gpu_tenancy.controller.settings import Settings  # noqa: PLC0415

    logging.basicConfig(level=log_level, format=LOG_FORMAT)
    try:
        settings = Settings.load(path, kubeconfig=kubeconfig, host=host, port=port)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    asyncio.run(run(settings))


@main.command()
@click.option("--node", envvar="NODE_NAME", required=True, help="Name of the Node; in a pod, spec.nodeName.")
@click.option("--settings", "path", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="YAML file.")
@click.option("--kubeconfig", help="Kubeconfig; absent: the pod's service account, else ~/.kube/config.")
@click.option("--host", help="Address of /metrics, /healthz and /readyz.")
@click.option("--port", type=int, help="Port of /metrics, /healthz and /readyz.")
@click.option(
    "--log-level", default="INFO", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), show_default=True
)
def agent(
    node: str, path: Path | None, kubeconfig: str | None, host: str | None, port: int | None, log_level: str
) -> None:
    """Run the agent of a GPU node until it is told to stop: as root, with NVIDIA's driver."""
    from gpu_tenancy.agent.checkpoint import UnreadableCheckpoint  # noqa: PLC0415  (the others need no driver)
    from gpu_tenancy.agent.gpus import GpuError  # noqa: PLC0415
    from gpu_tenancy.agent.run import run  # noqa: PLC0415
    from gpu_tenancy.agent.settings import AgentSettings  # noqa: PLC0415

    logging.basicConfig(level=log_level, format=LOG_FORMAT)
    try:
        settings = AgentSettings.load(path, kubeconfig=kubeconfig, host=host, port=port)
        asyncio.run(run(node, settings))
    except* (ValueError, GpuError, UnreadableCheckpoint) as group:
        raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from group


EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
WRITTEN = click.Path(path_type=Path, dir_okay=False, writable=True)
PIPED_WIDTH = 160
"""Columns of what is not printed on a terminal."""


class BadInput(click.ClickException):
    """Something that was given cannot be used."""

    exit_code = 2


@main.command()
@click.argument("files", nargs=-1, type=EXISTING)
@click.option("--snapshot", type=EXISTING, help="File with a cluster, instead of the one of the kubeconfig.")
@click.option("--save", type=WRITTEN, help="File to write the cluster into, as it is before the manifests.")
@click.option("--settings", type=EXISTING, help="Settings of the operator, as it has them.")
@click.option("--kubeconfig", help="Kubeconfig; absent: $KUBECONFIG, else ~/.kube/config.")
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def plan(**order: Any) -> None:  # noqa: ANN401  (click's values, each as its option says)
    """Show what the next cycle would do with the manifests in FILES, and do nothing.

    Exit status: 0 where all their leases would be served, 3 where one would wait or be refused, 2 for bad input."""
    from gpu_tenancy.controller.preview_run import Order, run  # noqa: PLC0415

    try:
        status = asyncio.run(run(Order(**order), _console()))
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    sys.exit(status)


@main.command()
@click.argument("description", type=EXISTING)
@click.option("--trace", type=EXISTING, required=True, help="CSV file of what is asked for, and when.")
@click.option("--mapping", type=EXISTING, help="YAML file that says what the columns of a foreign CSV file are.")
@click.option("--policy", multiple=True, metavar="NAME=VALUE", help="A policy, over what the description says.")
@click.option("--faults", multiple=True, metavar="NAME=VALUE", help="A rate of faults, likewise; or: none.")
@click.option("--seed", type=int, default=0, show_default=True, help="What chance is drawn from.")
@click.option("--until", help="Latest end: a time, or a duration since the first lease.")
@click.option("--against", type=EXISTING, help="JSON of another run, to be shown beside this one.")
@click.option("--json", type=WRITTEN, help="File for the result as JSON.")
@click.option("--html", type=WRITTEN, help="File for the result as a page with plots.")
def simulate(**order: Any) -> None:  # noqa: ANN401  (click's values, each as its option says)
    """Live through a trace on the cluster of a DESCRIPTION, with the operator's own planner on a virtual clock."""
    from rich.console import Console  # noqa: PLC0415

    from gpu_tenancy.simulate.run import Order, run  # noqa: PLC0415

    try:
        run(Order(**order), _console(), Console(stderr=True))
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415

    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)


@main.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the YAML.")
@click.option("--docs", type=click.Path(path_type=Path, dir_okay=False), help="File for the field reference.")
def crds(out: Path, docs: Path | None) -> None:
    """Write the CustomResourceDefinitions, and the field reference."""
    from gpu_tenancy.api.crd import write_crds  # noqa: PLC0415
    from gpu_tenancy.api.reference import write_reference  # noqa: PLC0415

    write_crds(out)
    if docs is not None:
        write_reference(docs)


if __name__ == "__main__":
    main()
