"""A result as tables for the terminal, one run or two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table

from gpu_tenancy.core.amounts import counted
from gpu_tenancy.simulate.result import STATES, Group, Result

SHOWN = 20
"""Rows of a trace, and tenants, that are shown; all are in the JSON."""

Row = tuple[str, str]
"""Name and value."""


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
    others = dict(rows(against)) if against else {}
    for name, value in rows(result):
        cells = (others.get(name, "–"), _difference(value, others.get(name))) if against else ()
        table.add_row(name, value, *cells)
    return table


def _difference(value: str, other: str | None) -> str:
    """Of two numbers; the unit behind them is the same."""
    try:
        mine, theirs = (float(text.split()[0].replace(",", "")) for text in (value, other or ""))
    except (ValueError, IndexError):
        return ""
    return f"{mine - theirs:+,.4g}" if mine != theirs else "="


def _whole(result: Result) -> list[Row]:
    hours = result.seconds / 3600
    idle = result.idle_mined_pct
    return [
        ("simulated", f"{hours:,.1f} h"),
        ("GPUs", f"{result.gpus:,}"),
        *_group_rows(result.all),
        *(
            (f"{state} slices", f"{result.shares.get(state, 0.0):.3f} %")
            for state in STATES
            if result.shares.get(state)
        ),
        ("idle slices that mined", "–" if idle is None else f"{idle:.3f} %"),
        *((f"mined {currency}", f"{float(amount):,.2f}") for currency, amount in result.mined.items()),
        ("Jain index of shares", f"{result.jain:.4f}"),
        ("Jain index of demand met", f"{result.jain_of_demand:.4f}"),
        ("faults", f"{result.faults:,}"),
        ("every slice in one hand", "yes" if result.conservation.holds else "NO"),
        ("rows not read", f"{len(result.unread):,}"),
    ]


def _group_rows(group: Group | None) -> list[Row]:
    if group is None:
        return []
    waits = group.waits
    return [
        ("leases asked for", f"{group.asked:,}"),
        ("started", f"{group.started:,}"),
        ("refused", f"{group.refused:,}"),
        ("still waiting", f"{group.waiting:,}"),
        ("wait p50", f"{waits.p50:,.1f} s"),
        ("wait p95", f"{waits.p95:,.1f} s"),
        ("wait p99", f"{waits.p99:,.1f} s"),
        ("wait max", f"{waits.max:,.1f} s"),
        ("pre-empted", f"{group.preempted:,}"),
        ("lost to faults", f"{group.lost:,}"),
        ("GPU-hours leased", f"{group.gpu_hours:,.1f}"),
        *((f"billed {currency}", f"{float(amount):,.2f}") for currency, amount in group.money.items()),
    ]


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
    yield from (f"{wait:,.1f} s" for wait in (group.waits.p50, group.waits.p95, group.waits.p99, group.waits.max))
    yield f"{group.preempted:,}"
    yield f"{group.gpu_hours:,.1f}"
    yield ", ".join(f"{float(amount):,.2f} {currency}" for currency, amount in group.money.items()) or "–"
