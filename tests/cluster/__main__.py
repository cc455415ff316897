"""The command line of the embedded control plane, ``python -m tests.cluster``: wiring only, no decisions."""

import sys

import click

from tests.cluster import binaries


@click.group()
def main() -> None:
    """A whole Kubernetes control plane on this machine."""


@main.command()
def build() -> None:
    """Build the programs of the control plane, once, into the user's cache."""
    try:
        binaries.ensure()
    except binaries.BuildError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
