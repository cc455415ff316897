"""`gpu-tenancy simulate`: reads what is simulated, shows how far it is, and writes what it came to."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.simulate import report
from gpu_tenancy.simulate.description import Description
from gpu_tenancy.simulate.replay import Replay
from gpu_tenancy.simulate.result import Result, result_of
from gpu_tenancy.simulate.tables import complaints, tables
from gpu_tenancy.simulate.trace import Mapped, Trace, read

COLLECT_AFTER: Final = (50_000, 20, 50)
"""Thresholds of Python's cyclic garbage collector: what a plan makes is freed by reference counts."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be simulated, and where it is to be written."""

    description: Path
    trace: Path
    mapping: Path | None = None
    policy: tuple[str, ...] = ()
    """`name=value` over what the description says."""
    faults: tuple[str, ...] = ()
    """The same of its faults; "none": nothing breaks."""
    seed: int = 0
    until: str | None = None
    """A time, or a duration since the first lease; None: until all is over."""
    against: Path | None = None
    json: Path | None = None
    html: Path | None = None


def run(order: Order, console: Console, progress: Console) -> Result:
    """Simulate, print and write. Raises ValueError with a sentence where something cannot be read."""
    _check_outputs(order)
    description = _description(order)
    mapped = Mapped.load(order.mapping) if order.mapping else None
    against = Result.load(order.against) if order.against else None
    trace = read(order.trace, mapped)
    replay = _replay(order, description, trace, progress)
    title = f"{order.description.stem} · {order.trace.stem}"
    result = result_of(replay, description, trace, title, order.seed)
    if order.json is not None:
        order.json.write_text(result.model_dump_json(by_alias=True, indent=1) + "\n")
    if order.html is not None:
        order.html.write_text(report.html(result, against))
    for table in tables(result, against):
        console.print(table)
    for sentence in complaints(result):
        console.print(sentence, markup=False, highlight=False)
    return result


def _check_outputs(order: Order) -> None:
    """Before anything is simulated: that may take minutes."""
    for path in (order.json, order.html):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if order.html is not None:
        report.check()


def _description(order: Order) -> Description:
    rates = (f"faults.{one}" for one in order.faults if one != "none")
    description = Description.load(order.description, (*order.policy, *rates))
    return description.faultless() if "none" in order.faults else description


def _replay(order: Order, description: Description, trace: Trace, console: Console) -> Replay:
    replay = Replay(description, trace, order.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    with rarely_collected(), bar:
        task = bar.add_task(f"{len(trace.requests):,} leases", total=1.0)
        replay.run(_until(order.until, trace), lambda share: bar.update(task, completed=share))
    return replay


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Python's cyclic garbage collector runs less often, and not over what is there already."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _until(text: str | None, trace: Trace) -> datetime | None:
    """When the simulation ends at the latest."""
    if text is None:
        return None
    began = trace.requests[0].submitted if trace.requests else datetime.min.replace(tzinfo=UTC)
    try:
        return began + (parse_duration(text) or timedelta())
    except ValueError:
        pass  # then it is a time
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f'--until "{text}" is not understood; write 72h, or 2026-01-31T12:00:00Z') from error
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
