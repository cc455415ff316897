"""A result as one HTML page that needs nothing else: plots as SVG within it, one run or two over one another.

The plots are drawn by matplotlib, which is an extra: `pip install 'gpu-tenancy[simulate]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Final

from rich.console import Console

from gpu_tenancy.simulate.result import STATES, Group, Result
from gpu_tenancy.simulate.tables import complaints, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = dict(zip(STATES, ("#2b6cb0", "#c7a008", "#9f7aea", "#cbd5e0", "#c53030", "#000000"), strict=True))
FAINT: Final = "#d5dae1"
DAY: Final = 86_400
WAITS: Final = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h", 864_000: "10 d"}
"""Marks of an axis of waiting times, by seconds."""
MOST_BARS: Final = 20
"""Tenants that a plot shows: those that leased most."""
STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #1a202c }
html { color-scheme: light; background: #fff }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.15rem } p { margin: .2rem 0 .6rem } svg { width: 100%; height: auto }
pre { font: 12px/1.3 ui-monospace, monospace; overflow-x: auto }
"""
Draw = Callable[["Axes", Result, Result | None], None]


def check() -> None:
    """Raises ValueError where plots cannot be drawn, before anything is simulated."""
    if find_spec("matplotlib") is None:
        raise ValueError("--html needs matplotlib: pip install 'gpu-tenancy[simulate]', or leave --html out")


def html(result: Result, against: Result | None = None) -> str:
    """The page."""
    parts = [
        f"<h2>{title}</h2>\n<p>{text}</p>\n{_plot(draw, result, against)}" for title, text, draw in _plots(against)
    ]
    title = escape(result.title)
    than = f" against {escape(against.title)}, seed {against.seed}" if against else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}, seed {result.seed}{than}</h1>\n"
        f"<pre>{escape(_text(result, against))}</pre>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _text(result: Result, against: Result | None) -> str:
    """The tables and complaints, as the terminal shows them."""
    out = StringIO()
    console = Console(file=out, width=150, color_system=None)
    for table in tables(result, against):
        console.print(table)
    for sentence in complaints(result):
        console.print(sentence, markup=False, highlight=False)
    return out.getvalue()


def _plots(against: Result | None) -> Sequence[tuple[str, str, Draw]]:
    other = " Dashed: the other run." if against else ""
    return (
        ("GPUs by state", "Mean of each stretch of time; a slice counts by its part of the GPU's memory.", _states),
        ("Leases that wait", f"Mean of each stretch of time.{other}", _waiting),
        (
            "Waiting times by tier",
            f"Until all devices were ready; 50, 95 and 99 of 100 leases waited no longer. Logarithmic.{other}",
            _tiers,
        ),
        ("Waiting times by tenant", f"The same of the tenants that leased most.{other}", _tenants),
        (
            "Room",
            f"Devices of each profile that would fit if it alone were asked for; what mines is in nobody's way.{other}",
            _room,
        ),
        ("Largest pod", f"Most whole GPUs that no lease has on one node.{other}", _widest),
        ("Pre-emptions and faults", f"Times that leases lost their devices, by tier.{other}", _losses),
        ("Money", "What leases were billed by tier, and what mining brought in.", _money),
    )


def _plot(draw: Draw, result: Result, against: Result | None) -> str:
    import matplotlib as mpl  # noqa: PLC0415  (an extra; nothing else needs it)
    from matplotlib.figure import Figure  # noqa: PLC0415

    out = StringIO()
    with mpl.rc_context({"svg.hashsalt": "gpu-tenancy", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 3), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, color=FAINT)
        axes.set_axisbelow(True)
        draw(axes, result, against)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    return text[text.index("<svg") :]


# --- over time --------------------------------------------------------------------------------------------------------


def _days(result: Result) -> list[float]:
    return [number * result.stretch_seconds / DAY for number in range(len(result.series))]


def _states(axes: Axes, result: Result, _: Result | None) -> None:
    shown = [state for state in STATES if any(one.gpus.get(state) for one in result.series)]
    if shown:
        values = [[one.gpus.get(state, 0.0) for one in result.series] for state in shown]
        colours = [COLOURS[state] for state in shown]
        axes.stackplot(_days(result), values, labels=shown, colors=colours, step="post")
    _over_time(axes, result)
    axes.set_ylabel("GPUs")


def _over_time(axes: Axes, *results: Result | None) -> None:
    longest = max((one.seconds for one in results if one), default=0.0)
    axes.set_xlabel("days")
    axes.set_xlim(0, longest / DAY or 1)
    axes.set_ylim(bottom=0)


def _lines(
    axes: Axes, result: Result, against: Result | None, values: Callable[[Result], dict[str, list[float]]]
) -> None:
    for one, dashes in ((result, "-"), (against, "--")):
        if one is None:
            continue
        axes.set_prop_cycle(None)
        for name, series in values(one).items():
            axes.step(_days(one), series, dashes, where="post", linewidth=1, label=name if one is result else None)
    _over_time(axes, result, against)


def _waiting(axes: Axes, result: Result, against: Result | None) -> None:
    _lines(axes, result, against, lambda one: {"": [point.waiting for point in one.series]})
    axes.set_ylabel("leases")


def _room(axes: Axes, result: Result, against: Result | None) -> None:
    profiles = sorted({profile for point in result.series for profile in point.fits})
    _lines(axes, result, against, lambda one: {p: [point.fits.get(p, 0) for point in one.series] for p in profiles})
    axes.set_ylabel("devices")


def _widest(axes: Axes, result: Result, against: Result | None) -> None:
    _lines(axes, result, against, lambda one: {"": [point.widest for point in one.series]})
    axes.set_ylabel("GPUs")


# --- by group ---------------------------------------------------------------------------------------------------------


def _bars(axes: Axes, names: Sequence[str], values: dict[str, list[float]], others: dict[str, list[float]]) -> None:
    """Bars side by side, with the other run's values as dashes over them."""
    width = 0.8 / max(1, len(values))
    for number, (name, heights) in enumerate(values.items()):
        places = [index + (number - (len(values) - 1) / 2) * width for index in range(len(names))]
        axes.bar(places, heights, width, label=name)
        if name in others:
            axes.hlines(others[name], [x - width / 2 for x in places], [x + width / 2 for x in places], "k", "dashed")
    axes.set_xticks(range(len(names)), [name.removeprefix("namespace ").removeprefix("tenant ") for name in names])


def _wait_bars(axes: Axes, names: Sequence[str], groups: dict[str, Group], others: dict[str, Group]) -> None:
    def values(found: dict[str, Group]) -> dict[str, list[float]]:
        waits = [found[name].waits if name in found else None for name in names]
        return {share: [getattr(one, share) if one else 0.0 for one in waits] for share in ("p50", "p95", "p99")}

    _bars(axes, names, values(groups), values(others) if others else {})
    most = max((group.waits.p99 for group in (*groups.values(), *others.values())), default=0.0)
    marks = [seconds for seconds in WAITS if seconds <= 10 * most] or [1]
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(1.0, most) * 1.5)
    axes.set_yticks([0, *marks], ["0", *(WAITS[seconds] for seconds in marks)])
    axes.minorticks_off()
    axes.set_ylabel("waited")


def _tiers(axes: Axes, result: Result, against: Result | None) -> None:
    _wait_bars(axes, list(result.tiers), result.tiers, against.tiers if against else {})


def _tenants(axes: Axes, result: Result, against: Result | None) -> None:
    biggest = sorted(result.tenants, key=lambda name: (-result.tenants[name].gpu_hours, name))[:MOST_BARS]
    _wait_bars(axes, biggest, result.tenants, against.tenants if against else {})


def _losses(axes: Axes, result: Result, against: Result | None) -> None:
    def values(one: Result) -> dict[str, list[float]]:
        found = [one.tiers.get(tier) for tier in result.tiers]
        return {
            "pre-empted": [float(group.preempted) if group else 0.0 for group in found],
            "lost to faults": [float(group.lost) if group else 0.0 for group in found],
        }

    _bars(axes, list(result.tiers), values(result), values(against) if against else {})
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel("times")


def _money(axes: Axes, result: Result, against: Result | None) -> None:
    """Bars by currency, for what is of two cannot be compared."""
    currencies = sorted({currency for one in (result, against) if one for currency in (*one.all.money, *one.mined)})

    def values(one: Result) -> dict[str, list[float]]:
        billed = [one.tiers[tier].money if tier in one.tiers else {} for tier in result.tiers]
        return {currency: [float(found.get(currency, 0)) for found in (*billed, one.mined)] for currency in currencies}

    _bars(axes, [*result.tiers, "mining"], values(result), values(against) if against else {})
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel(" or ".join(currencies) or "money")
