"""simulate_philly_s: a whole production trace lived through by `gpu-tenancy simulate`, and what mining costs leases.

Every job of the [Philly trace](../data/README.md) is an OnDemand lease, a job of more than 8 GPUs a gang; the virtual
clusters are tenants of equal weight without quota. The company has 871 GPUs, as many as the trace's jobs hold at its
99th percentile, on nodes of 8 and one of 7, and everything that is not leased mines. Hand-overs take as long as they
were measured to.

What mining costs is how much longer leases wait than in the same company without mining, and a hand-over besides:
without a miner, a GPU that nobody has could be ready at once, so all of its time counts as mining's. The seconds are
those of the simulation alone, one run, of processor time on one core.
"""

from __future__ import annotations

import lzma
import time
from pathlib import Path
from typing import Final, NamedTuple

from gpu_tenancy.simulate.description import Description, HandOver
from gpu_tenancy.simulate.replay import Replay
from gpu_tenancy.simulate.result import Result, result_of
from gpu_tenancy.simulate.run import rarely_collected
from gpu_tenancy.simulate.trace import Mapped, Trace, parse
from tests.bench import fleet
from tests.bench.figures import Figure, figure

ROOT: Final = Path(__file__).parents[2]
TRACE: Final = ROOT / "tests" / "data" / "philly.csv.xz"
MAPPING: Final = ROOT / "examples" / "simulate" / "philly.yaml"
NODES: Final = ({"name": "eight", "count": 108, "gpus": 8}, {"name": "seven", "gpus": 7})
POOL: Final = {"name": "idle-gpus", "spec": {"image": "registry.example.com/miner"}}


class Lived(NamedTuple):
    """A simulation that was run."""

    result: Result
    seconds: float
    """Of processor time."""


def run(_: int) -> list[Figure]:
    """One run with mining, and one without."""
    trace = philly()
    mining, alone = lived(company(), trace), lived(company(mines=False), trace)
    return figures(mining, alone)


def figures(mining: Lived, alone: Lived) -> list[Figure]:
    """What the two come to. Raises RuntimeError where slices went missing or were in two hands."""
    for one in (mining, alone):
        if not one.result.conservation.holds:
            raise RuntimeError(f"slices are not conserved: {one.result.conservation}")
    found, other = mining.result, alone.result
    what = f"{found.all.asked:,} jobs, {found.gpus} GPUs"
    more = found.all.waits.p99 - other.all.waits.p99 + HandOver().whole
    said = (
        f"philly: waits {_waits(found)} with mining, {_waits(other)} without; "
        f"{found.all.gpu_hours:,.0f} GPU-hours leased, {found.plans:,} plans, without mining {alone.seconds:.0f} s"
    )
    fleet.say(said)
    return [
        figure("simulate_philly_s", [mining.seconds], "s", f"≤ 120, one core ({what})"),
        figure("idle_mined_pct", [found.idle_mined_pct or 0.0], "% of idle slices", f"≥ 99.5 ({what})"),
        figure("mining_wait_p99_s", [more], "s", f"≤ 1.5 more than without mining, hand-over included ({what})"),
        figure("philly_jain", [found.jain], "", "none: Jain's index of GPU time, 15 tenants whose demand differs"),
        figure("philly_jain_of_demand", [found.jain_of_demand], "", "1: all get the same part of what they ask for"),
    ]


def _waits(result: Result) -> str:
    waits = result.all.waits
    return f"p50 {waits.p50:.1f} s, p95 {waits.p95:.1f} s, p99 {waits.p99:,.1f} s"


def philly(first: int | None = None) -> Trace:
    """The trace, or its first jobs. Raises RuntimeError where a row of it cannot be read."""
    with lzma.open(TRACE, "rt", newline="") as file:
        trace = parse(file, Mapped.load(MAPPING), TRACE.name)
    if trace.complaints:
        raise RuntimeError(f"{TRACE.name} is not read as it is: {trace.complaints[0]}")
    return Trace(trace.requests[:first], ())


def company(*, mines: bool = True) -> Description:
    """The cluster."""
    return Description.model_validate({"nodes": NODES, "pools": [POOL] if mines else []})


def lived(description: Description, trace: Trace) -> Lived:
    """A simulation, and the time that it took."""
    replay = Replay(description, trace)
    with rarely_collected():
        started = time.process_time()
        replay.run()
        seconds = time.process_time() - started
    return Lived(result_of(replay, description, trace, "philly", 0), seconds)
