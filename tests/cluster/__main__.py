"""The command line of the embedded control plane, ``python -m tests.cluster``: wiring only, no decisions."""

import sys

import click
from rich.console import Console

from tests.cluster import binaries
from tests.cluster.node.possible import missing
from tests.cluster.processes import ProgramError


@click.group()
def main() -> None:
    """A whole Kubernetes control plane on this machine."""


@main.command()
def build() -> None:
    """Build the programs of the control plane, once, into the user's cache; where real nodes can run, theirs too."""
    wanted = binaries.CONTROL_PLANE if missing() else binaries.BINARIES
    try:
        binaries.ensure([one.name for one in wanted])
    except binaries.BuildError as error:
        raise click.ClickException(str(error)) from error


@main.command()
def demo() -> None:
    """Tell the story of a few leases on a real API server; fails unless every step was observed."""
    from tests.cluster import demo as story  # noqa: PLC0415  (the other commands are up sooner without)

    sys.exit(story.run(Console()))


@main.command()
def up() -> None:
    """Start the demo's world and leave it running in the background."""
    from tests.cluster import up as background  # noqa: PLC0415

    try:
        background.up(click.echo)
    except (binaries.BuildError, ProgramError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
def down() -> None:
    """End what `up` has started."""
    from tests.cluster import up as background  # noqa: PLC0415

    background.down(click.echo)


if __name__ == "__main__":
    sys.exit(main())
