"""``python -m tests.bench [NAME…]``: measure, print a table, write build/bench.json. See docs/development.md.

Every figure is a median of several runs unless its goal says otherwise. Speed is measured here and never in tests.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import click

from tests.bench import (
    admission,
    agent,
    burst,
    cycle,
    fill,
    handover,
    latency,
    planner,
    preemption,
    replay,
    simulate,
    startup,
)
from tests.bench.figures import Figure, NotMeasurable, show, write

OUTPUT: Final = Path(__file__).parent.parent.parent / "build" / "bench.json"

Bench = Callable[[int], list[Figure]]

REPLAY: Final = "philly_replay_leases"
"""The one that reads a trace."""
BENCHES: Final[dict[str, Bench]] = {
    "control_plane_ready_s": startup.run,
    "plan_decision_us": planner.run,
    "cycle_incremental_ms": cycle.run,
    "lease_ready_s": latency.run,
    "burst_ratio": burst.run_raised,
    "burst_ratio_default_rates": burst.run_default,
    "api_writes_per_lease": burst.run_writes,
    "handover_whole_s": handover.run_whole,
    "handover_mig_s": handover.run_mig,
    "agent_rss_mb": agent.run_idle,
    "dra_prepare_ms": agent.run_prepare,
    "preempt_decisions_per_s": preemption.run,
    "openb_fill_pct": fill.run,
    "mig_gap_closed_pct": admission.run,
    "simulate_philly_s": simulate.run,
    REPLAY: lambda _: replay.run(_trace()),
}
"""Every bench by the name that `ONLY=` takes; one may yield several figures."""


@click.command()
@click.argument("only", nargs=-1)
@click.option("--runs", default=5, show_default=True, help="Runs per figure.")
def main(only: tuple[str, ...], runs: int) -> None:
    """Run all benches, or only those named."""
    unknown = set(only) - BENCHES.keys()
    if unknown:
        raise click.ClickException(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    if (trace := _trace()) and not Path(trace).is_file():
        raise click.ClickException(f"TRACE={trace} is no file; give the path of a trace, or leave TRACE= out")
    figures: list[Figure] = []
    left_out: list[str] = []
    for name in only or BENCHES:
        click.echo(f"measuring {name} …", err=True)
        try:
            figures += [replace(one, command=_repeating(name)) for one in BENCHES[name](runs)]
        except NotMeasurable as why:
            left_out.append(f"{name} is not measured: {why}")
        write(figures, OUTPUT)
    show(figures)
    for sentence in left_out:
        click.echo(sentence)


def _repeating(name: str) -> str:
    """The command that runs a bench again."""
    trace = _trace() if name == REPLAY else None
    return f"make bench ONLY={name}" + (f" TRACE={shlex.quote(trace)}" if trace else "")


def _trace() -> str | None:
    """The path that `TRACE=` names, if any."""
    return os.environ.get("TRACE") or None


if __name__ == "__main__":
    sys.exit(main())
