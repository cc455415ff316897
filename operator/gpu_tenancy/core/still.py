"""What leases have of a node, entered into the working copy: one by one, or at once where all of them rest. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Final, NamedTuple

from gpu_tenancy.core.amounts import NOTHING
from gpu_tenancy.core.books import NodeBook, Still
from gpu_tenancy.core.checks import needs_of
from gpu_tenancy.core.placement import filing_of
from gpu_tenancy.core.rest import Rest
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.core.stock import Stock

_KEY: Final = "still"


class _Known(NamedTuple):
    """How a node was entered when these leases rested on it."""

    rests: tuple[Rest, ...]
    still: Still


def hold(node: NodeBook, stock: Stock, lasts: int) -> None:
    """Enter what a lease has of a node; each pod's CPU and memory count once. `lasts`: a span."""
    per_pod, per_node = needs_of(stock.lease).amount, stock.lease.spec.gpus.count
    slots = (slot for facts, slot in stock.held if facts.name == node.facts.name)
    for number, slot in enumerate(slots):
        node.hold(slot, NOTHING if number % per_node else per_pod, lasts)


def still_node(facts: NodeFacts, rests: Sequence[Rest]) -> Still | None:
    """How a node is entered on which these leases rest; None where others have something of it as well."""
    known = facts.answers.get(_KEY)
    if isinstance(known, _Known) and len(known.rests) == len(rests) and all(map(is_, known.rests, rests)):
        return known.still
    if len(facts.holders) != len(rests):
        return None
    node = NodeBook(facts, "")
    for rest in rests:
        hold(node, rest.stock, rest.lasts)
    gpus = {uuid: (book.hard, book.lasts) for uuid, book in node.gpus.items()}
    still = Still(tuple(node.slots), node.free, gpus, filing_of(node))
    facts.answers[_KEY] = _Known(tuple(rests), still)
    return still
