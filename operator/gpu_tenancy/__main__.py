"""Command line: `gpu-tenancy operator`, `agent`, `crds`. Parses arguments and starts things; nothing else."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import click

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
