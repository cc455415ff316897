"""What a benchmark yields: figures with their goal, and the table and file they are shown in. Measures nothing."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

PERCENTILE: Final = 0.95


class NotMeasurable(Exception):  # noqa: N818  (not a mistake)
    """A figure cannot be measured on this machine; the message is a sentence that says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of what was measured, in milliseconds."""

    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure."""

    name: str
    median: float
    p95: float
    unit: str
    goal: str
    """What is aimed at, in words and numbers."""
    baseline: float | None = None
    """The same thing done without us, in the same run."""
    ratio: float | None = None
    """median / baseline."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Where the time went, by what it was spent on; empty where that was not measured."""
    rows: Sequence[Mapping[str, str | float]] = ()
    """What the samples were taken from, where they are of different things: a table, by its columns."""
    command: str = ""
    """What repeats it; said by whoever runs the bench."""


def percentile(samples: Sequence[float], share: float = PERCENTILE) -> float:
    """Nearest-rank percentile of at least one sample."""
    ordered = sorted(samples)
    rank = math.ceil(round(share * len(ordered), 6))  # 0.07 × 100 is a little more than 7 to a computer.
    return ordered[max(rank, 1) - 1]


def figure(
    name: str,
    samples: Sequence[float],
    unit: str,
    goal: str,
    *,
    baseline: float | None = None,
    parts: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Median and 95th percentile of samples. `parts`: samples in milliseconds of where the time went."""
    median = statistics.median(samples)
    ratio = None if not baseline else round(median / baseline, 3)
    spent = {part: _part(took) for part, took in (parts or {}).items()}
    return Figure(name, round(median, 4), round(percentile(samples), 4), unit, goal, baseline, ratio, spent)


def _part(took: Sequence[float]) -> Part:
    return Part(round(statistics.median(took), 1), round(percentile(took), 1))


def show(figures: Sequence[Figure]) -> None:
    """Print the table, and one for each figure that has parts or rows."""
    table = Table(title="gpu-tenancy: figures")
    for column in ("figure", "median", "p95", "unit", "goal", "baseline", "ratio"):
        # fold: a narrow terminal breaks a name, and does not cut it short.
        table.add_column(column, justify="left" if column in ("figure", "unit", "goal") else "right", overflow="fold")
    for one in figures:
        numbers = ("" if value is None else f"{value:g}" for value in (one.baseline, one.ratio))
        table.add_row(one.name, f"{one.median:g}", f"{one.p95:g}", one.unit, one.goal, *numbers)
    console = Console()
    console.print(table)
    for one in figures:
        if one.parts:
            console.print(_parts_table(one))
        if one.rows:
            console.print(_rows_table(one))


def _parts_table(one: Figure) -> Table:
    table = Table(title=f"{one.name}: where each millisecond goes (the medians of parts need not add up)")
    table.add_column("part", overflow="fold")
    for column in ("median ms", "p95 ms"):
        table.add_column(column, justify="right")
    for name, part in one.parts.items():
        table.add_row(name, f"{part.median:g}", f"{part.p95:g}")
    return table


def _rows_table(one: Figure) -> Table:
    table = Table(title=f"{one.name}: what it is made of")
    for column in one.rows[0]:
        table.add_column(column, overflow="fold")
    for row in one.rows:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def write(figures: Iterable[Figure], path: Path) -> None:
    """Write build/bench.json; figures measured before and not now stay in it."""
    fresh = {one.name: asdict(one) for one in figures}
    known = {one["name"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list({**known, **fresh}.values()), indent=2) + "\n")
