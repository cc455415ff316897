"""A result as tables for the terminal, one run or two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from rich.table import Table

from gpu_tenancy.core.amounts import counted
from gpu_tenancy.simulate.result import STATES, Group, Result

SHOWN = 20
"""Rows of a trace, and tenants, that are shown; all are in the JSON."""

UNITS: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


class Row(NamedTuple):
    """A row of a table with one run or two."""

    name: str
    text: str
    value: float | None = None
    """What the text says, to be compared with the other run; None: there is no telling."""
    is_time: bool = False


def span(seconds: float) -> str:
    """A length of time in the largest unit of which it is more than two."""
    unit, length = next(((unit, length) for unit, length in UNITS if abs(seconds) > 2 * length), UNITS[-1])
    return f"{seconds / length:,.1f} {unit}"


def tables(result: Result, against: Result | None = None) -> Iterator[Table]:
    """All tables; with another result a column of its numbers, and one of what is different."""
    yield _table(f"{result.title}, seed {result.seed}", _whole, result, against)
    if against is None:
        yield _groups("Tier", result.tiers)
        yield _groups("Tenant", result.tenants)
    else:
        for tier in result.tiers:
            yield _table(f"Tier {tier}", lambda one, tier=tier: _group_rows(one.tiers.get(tier)), result, against)  # type: ignore[misc]


def complaints(result: Result) -> Iterator[str]:
    """What of the trace could not be read or never be placed, as sentences; the first of them, and how many."""
    for what, sentences in (("could not be read", result.unread), ("was refused for good", result.refused)):
        if sentences:
            yield f"{counted(len(sentences), 'row')} of the trace {what}:"
            yield from (f"  {sentence}" for sentence in sentences[:SHOWN])
            if len(sentences) > SHOWN:
                yield f"  … and {len(sentences) - SHOWN} more; --json writes them all."


def _table(title: str, rows: Callable[[Result], Sequence[Row]], result: Result, against: Result | None) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "this run", *(("the other", "difference") if against else ())):
        table.add_column(name, justify="left" if not name else "right")
    others = {row.name: row for row in rows(against)} if against else {}
    for row in rows(result):
        other = others.get(row.name)
        cells = (other.text if other else "–", _difference(row, other)) if against else ()
        table.add_row(row.name, row.text, *cells)
    return table


def _difference(row: Row, other: Row | None) -> str:
    if other is None or row.value is None or other.value is None:
        return ""
    more = row.value - other.value
    if not more:
        return "="
    return f"{'+' if more > 0 else ''}{span(more)}" if row.is_time else f"{more:+,.4g}"


def _whole(result: Result) -> list[Row]:
    return [
        _time("simulated", result.seconds),
        _number("GPUs", result.gpus),
        *_group_rows(result.all),
        *(_percent(f"{state} slices", result.shares[state]) for state in STATES if result.shares.get(state)),
        _percent("idle slices that mined", result.idle_mined_pct),
        *(_amount(f"mined {currency}", amount) for currency, amount in result.mined.items()),
        Row("Jain index of shares", f"{result.jain:.4f}", result.jain),
        Row("Jain index of demand met", f"{result.jain_of_demand:.4f}", result.jain_of_demand),
        _number("faults", result.faults),
        Row("every slice in one hand", "yes" if result.conservation.holds else "NO"),
        _number("rows not read", len(result.unread)),
    ]


def _group_rows(group: Group | None) -> list[Row]:
    if group is None:
        return []
    waits = group.waits
    return [
        _number("leases asked for", group.asked),
        _number("started", group.started),
        _number("refused", group.refused),
        _number("still waiting", group.waiting),
        _time("wait p50", waits.p50),
        _time("wait p95", waits.p95),
        _time("wait p99", waits.p99),
        _time("wait max", waits.max),
        _number("pre-empted", group.preempted),
        _number("lost to faults", group.lost),
        Row("GPU-hours leased", f"{group.gpu_hours:,.1f}", group.gpu_hours),
        *(_amount(f"billed {currency}", amount) for currency, amount in group.money.items()),
    ]


def _number(name: str, value: int) -> Row:
    return Row(name, f"{value:,}", value)


def _time(name: str, seconds: float) -> Row:
    return Row(name, span(seconds), seconds, is_time=True)


def _percent(name: str, value: float | None) -> Row:
    return Row(name, "–" if value is None else f"{value:.3f} %", value)


def _amount(name: str, amount: str) -> Row:
    return Row(name, f"{float(amount):,.2f}", float(amount))


def _groups(what: str, groups: Mapping[str, Group]) -> Table:
    table = Table(title=f"By {what.lower()}", title_justify="left")
    table.add_column(what)
    for name in ("asked", "started", "refused", "wait p50", "p95", "p99", "max", "pre-empted", "GPU-hours", "billed"):
        table.add_column(name, justify="right")
    biggest = sorted(groups, key=lambda name: (-groups[name].gpu_hours, name)) if len(groups) > SHOWN else list(groups)
    for name in biggest[:SHOWN]:
        table.add_row(name, *_cells(groups[name]))
    if len(groups) > SHOWN:
        table.add_row(f"… and {len(groups) - SHOWN} more")
    return table


def _cells(group: Group) -> Iterator[str]:
    yield from (f"{number:,}" for number in (group.asked, group.started, group.refused))
    yield from map(span, (group.waits.p50, group.waits.p95, group.waits.p99, group.waits.max))
    yield f"{group.preempted:,}"
    yield f"{group.gpu_hours:,.1f}"
    yield ", ".join(f"{float(amount):,.2f} {currency}" for currency, amount in group.money.items()) or "–"
