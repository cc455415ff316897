"""A preview in words: as tables for the terminal, or as JSON for programs. Derives, prints nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from gpu_tenancy.api.base import format_time
from gpu_tenancy.controller.preview import Preview
from gpu_tenancy.core import explain
from gpu_tenancy.core.actions import Action, Outlook, SetSlots, StartMiner, StopMiner, blame
from gpu_tenancy.core.amounts import counted
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.core.spot import beneficiary_of

LISTED: Final = 4
"""Places and names that a cell shows; of more it gives the number."""


class Verdict(StrEnum):
    """What becomes of a lease."""

    PLACED = "Placed"
    WAITS = "Waits"
    REFUSED = "Refused"
    RUNS = "Runs"
    ENDS = "Ends"


UNSERVED: Final = frozenset({Verdict.WAITS, Verdict.REFUSED})


@dataclass(frozen=True, slots=True)
class Line:
    """What the next cycle would do with one lease."""

    lease: str
    verdict: Verdict
    places: tuple[str, ...]
    stops: tuple[str, ...]
    """Miners that stop for it, and spot leases that are given notice."""
    message: str
    """Why it waits or is refused; of one that is placed, why there."""
    expected_start: str | None
    named: bool
    """A manifest is about it."""


def lines(preview: Preview) -> list[Line]:
    """Every lease that the cycle knows, in the order of their names."""
    return [_line(one, preview) for one in preview.plan.leases]


def _line(one: Outlook, preview: Preview) -> Line:
    snapshot, uid = preview.snapshot, one.lease.uid
    seats = explain.seats(one.lease, preview.plan, snapshot) if one.admitted_now else ()
    miners = [f"miner on {seat.node.name} {slot.device}" for seat in seats for slot in seat.stops]
    spots = [
        f"spot lease {other.lease.key}"
        for other in preview.plan.leases
        if other.preemption is not None and beneficiary_of(other.preemption.cause) == uid
    ]
    why = one.refusal.message if one.refusal else explain.reason(one.lease, seats, snapshot, preview.at)
    return Line(
        str(one.lease.key),
        _verdict(one),
        tuple(seat.place for seat in seats) or one.nodes,
        (*miners, *spots),
        why or one.waiting or one.end_message,
        format_time(one.expected_start) if one.expected_start else None,
        uid in preview.named,
    )


def _verdict(one: Outlook) -> Verdict:
    if one.refusal is not None:
        return Verdict.REFUSED if one.refusal.final else Verdict.WAITS
    if one.over or one.closed is not None:
        return Verdict.ENDS
    return Verdict.PLACED if one.admitted_now else Verdict.RUNS


def status(preview: Preview) -> int:
    """Exit status: 0, or 3 where a lease of the manifests would not be served; without manifests, any lease."""
    found = [line for line in lines(preview) if line.named or not preview.named]
    return 3 if any(line.verdict in UNSERVED for line in found) else 0


# --- for people -------------------------------------------------------------------------------------------------------


def tables(preview: Preview) -> Iterator[Table | str]:
    """Leases with which something happens, and the actions."""
    found = lines(preview)
    shown = [line for line in found if line.named or line.verdict is not Verdict.RUNS]
    if shown:
        table = Table(title=f"Leases in the next cycle, {format_time(preview.at)}", title_justify="left")
        for name in ("Lease", "Verdict", "Where", "Stops", "Why"):
            table.add_column(name, overflow="fold")
        for line in shown:
            cells = (line.lease, line.verdict, _some(line.places), _some(line.stops), line.message)
            table.add_row(*map(escape, cells))
        yield table
    if others := len(found) - len(shown):
        yield f"{counted(others, 'more lease')} {'runs' if others == 1 else 'run'} on unchanged."
    if preview.plan.actions:
        table = Table(title="Actions, in their order", title_justify="left")
        for name in ("Action", "On", "For"):
            table.add_column(name, overflow="fold")
        for row in _actions(preview):
            table.add_row(*map(escape, row.values()))
        yield table
    else:
        yield "There is nothing to do."


def _some(parts: Iterable[str]) -> str:
    found = list(parts)
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return "\n".join([*found[:LISTED], *more])


def _actions(preview: Preview) -> list[dict[str, str]]:
    owners = {one.uid: str(one.key) for one in preview.snapshot.leases}
    owners |= {one.uid: str(one.key) for one in preview.snapshot.pools}
    return [_action(one, owners, preview.snapshot) for one in preview.plan.actions]


def _action(action: Action, owners: dict[str, str], snapshot: Snapshot) -> dict[str, str]:
    uid, key = blame(action)
    for_whom = owners.get(uid, str(key or ""))
    on = ""
    match action:
        case SetSlots():
            before = next(node for node in snapshot.nodes if node.name == action.node)
            gone = {slot.device for slot in before.slots} - {slot.device for slot in action.slots}
            new = {slot.device for slot in action.slots} - {slot.device for slot in before.slots}
            on = f"{action.node}: {counted(len(new), 'new device')}, {len(gone)} gone"
            for_whom = ", ".join(sorted(owners.get(one, one) for one in action.requires))
        case StopMiner():
            on = f"{action.miner.node} {action.miner.device}"
        case StartMiner():
            on = f"{action.node} {action.device}"
        case _:
            on = next((getattr(action, name) for name in ("name", "job") if hasattr(action, name)), "")
    return {"action": type(action).__name__, "on": on, "for": for_whom}


# --- for programs -----------------------------------------------------------------------------------------------------


def as_json(preview: Preview) -> dict[str, Any]:
    """The whole preview."""
    wake = preview.plan.next_wake
    return {
        "at": format_time(preview.at),
        "leases": [asdict(line) for line in lines(preview)],
        "actions": _actions(preview),
        "nextWake": format_time(wake) if wake else None,
    }
