"""docs/simulate.md, held against the code: every field with its default, every column, every option, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gpu_tenancy.__main__ import simulate
from gpu_tenancy.simulate.description import Description, Faults, HandOver, Mining, NodeGroup, Policies
from gpu_tenancy.simulate.trace import HEADER, Mapped

PAGE: Final = Path(__file__).parents[3] / "docs" / "simulate.md"
TABLES: Final[dict[str, type[BaseModel]]] = {
    "Nodes": NodeGroup,
    "Hand-overs": HandOver,
    "Money from mining": Mining,
    "Faults": Faults,
    "Policies": Policies,
    "Foreign files": Mapped,
}
OWN_WORDS: Final = {"columns": "the trace's own", "units": "s"}
"""Defaults that the page says in words."""


def section(heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def rows(heading: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("heading", TABLES)
def test_every_field_is_there_with_its_default(heading: str) -> None:
    shown = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(heading)}
    fields = {str(info.alias): info.default for info in TABLES[heading].model_fields.values()}
    assert shown == {name: OWN_WORDS.get(name, written(default)) for name, default in fields.items()}


def written(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return "–"
    return str(default) if isinstance(default, str) else json.dumps(default)


def test_every_part_of_a_description_is_there() -> None:
    assert [cells[0].strip("`") for cells in rows("The description")] == [
        str(info.alias) for info in Description.model_fields.values()
    ]


def test_every_column_of_a_trace_is_there_in_its_order() -> None:
    assert [cells[0].strip("`") for cells in rows("The trace")] == list(HEADER)


def test_every_option_is_there() -> None:
    shown = set(re.findall(r"`(--[a-z]+)", section("The company in a box: `gpu-tenancy simulate`")))
    assert shown == {name for one in simulate.params for name in one.opts if name.startswith("--")}
