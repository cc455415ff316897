"""``python -m tests.bench [NAME…]``: measure, print a table, write build/bench.json. See docs/development.md.

Every figure is a median of several runs unless its goal says otherwise. Speed is measured here and never in tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from tests.bench import burst, latency, planner, replay
from tests.bench.figures import Figure, show, write

OUTPUT: Final = Path(__file__).parent.parent.parent / "build" / "bench.json"

Bench = Callable[[int], list[Figure]]

BENCHES: Final[dict[str, Bench]] = {
    "plan_decision_us": planner.run,
    "lease_ready_s": latency.run,
    "burst_ratio": burst.run_raised,
    "burst_ratio_default_rates": burst.run_default,
    "api_writes_per_lease": burst.run_writes,
    "philly_replay_leases": lambda _: replay.run(os.environ.get("TRACE") or None),
}
"""Every figure by the name that `ONLY=` takes; one run may yield several."""


@click.command()
@click.argument("only", nargs=-1)
@click.option("--runs", default=5, show_default=True, help="Runs per figure.")
def main(only: tuple[str, ...], runs: int) -> None:
    """Measure all figures, or only those named."""
    unknown = set(only) - BENCHES.keys()
    if unknown:
        raise click.ClickException(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    figures: list[Figure] = []
    for name in only or BENCHES:
        click.echo(f"measuring {name} …", err=True)
        figures += BENCHES[name](runs)
        write(figures, OUTPUT)
    show(figures)


if __name__ == "__main__":
    sys.exit(main())
