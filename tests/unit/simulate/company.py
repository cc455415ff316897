"""Companies and traces in few words, for tests of the simulator: what is not said is unremarkable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from gpu_tenancy.simulate.description import Description
from gpu_tenancy.simulate.replay import Planner, Replay
from gpu_tenancy.simulate.result import Result, result_of
from gpu_tenancy.simulate.trace import HEADER, Mapped, Trace, parse

IMAGE: Final = "registry.example.com/miner@sha256:" + "0" * 64
POOL: Final = {"name": "idle-gpus", "spec": {"image": IMAGE}}
PRICES: Final = {
    "name": "list-prices",
    "spec": {
        "currency": "USD",
        "effectiveFrom": "2020-01-01T00:00:00Z",
        "rates": [
            {"model": "A100-SXM4-80GB", "profile": "full", "perHour": "3.60"},
            {"model": "A100-SXM4-80GB", "profile": "full", "tier": "Spot", "perHour": "1.80"},
            {"model": "A100-SXM4-80GB", "profile": "1g.10gb", "perHour": "0.36"},
        ],
    },
}
"""A tenth of a cent for every second of a whole GPU."""

Row = Mapping[str, object]
Nodes = Iterable[Mapping[str, object]]


def company(nodes: Nodes = ({"name": "n", "gpus": 4},), *, pools: bool = True, **more: Any) -> Description:  # noqa: ANN401  (as in YAML)
    """A description; with a pool that mines, unless `pools` says otherwise."""
    return Description.model_validate({"nodes": list(nodes), "pools": [POOL] if pools else [], **more})


def trace(*rows: Row) -> Trace:
    """A trace of leases of one whole GPU for ten minutes, asked for at once, where a row says nothing else."""
    lines = [",".join(HEADER)]
    for number, row in enumerate(rows):
        values = {"name": f"l{number}", "namespace": "team", "submitted": 0, "duration": 600, "gpus": 1, **row}
        lines.append(",".join(str(values.get(name, "")) for name in HEADER))
    found = parse(lines, Mapped())
    assert found.complaints == ()
    return found


def lived(
    description: Description,
    asked: Trace,
    *,
    seed: int = 0,
    until: datetime | None = None,
    decide: Planner | None = None,
) -> Replay:
    """A replay that has been run."""
    replay = Replay(description, asked, seed, decide) if decide else Replay(description, asked, seed)
    replay.run(until)
    return replay


def outcome(description: Description, asked: Trace, *, seed: int = 0, until: datetime | None = None) -> Result:
    """What a trace comes to."""
    return result_of(lived(description, asked, seed=seed, until=until), description, asked, "a test", seed)
