"""Field reference: the models' docstrings, bounds, defaults and rules as one page of Markdown.

Pure functions over the generated schemas, so the page says what the API server enforces; `write_reference` puts it
into a file for the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import yaml

from gpu_tenancy.api.crd import KINDS, Schema, levels, structural_schema
from gpu_tenancy.api.kinds import Kind
from gpu_tenancy.api.names import API_VERSION

_PREFACE: Final = f"""\
<!-- Generated from operator/gpu_tenancy/api by `make verify`; edit the models, not this file. -->
# Field reference

The kinds of `{API_VERSION}`; `kubectl explain <kind>.<field>` says the same. Fields in **bold** are required.
"""


def reference_texts() -> dict[str, str]:
    """The page, by file name."""
    return {"reference.md": "\n".join([_PREFACE, *(line for kind in KINDS for line in _kind(kind))])}


def write_reference(path: Path) -> None:
    """Write the page to a file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference_texts()["reference.md"])


def _kind(kind: Kind) -> Iterator[str]:
    """The lines on one kind."""
    schema = structural_schema(kind)
    scope = "in a namespace" if kind.namespaced else "of the cluster"
    yield f"## {kind.name}\n"
    yield f"{schema['description']}\n"
    yield f"`{kind.plural}`, `{kind.name.lower()}`, `{kind.short_name}`; {scope}.\n"
    for part in ("spec", "status"):
        if part in schema["properties"]:
            yield "| field | type | default | meaning |\n|---|---|---|---|"
            yield from _rows(schema["properties"][part], part, required=part in schema.get("required", []))
            yield ""
    refusals = list(_refusals(schema))
    if refusals:
        yield "The API server refuses what breaks one of these rules:\n"
        yield from refusals
        yield ""


def _rows(schema: Schema, path: str, *, required: bool) -> Iterator[str]:
    """Table rows of a field and of all below it."""
    name = f"**`{path}`**" if required else f"`{path}`"
    default = f"`{_literal(schema['default'])}`" if "default" in schema else ""
    yield f"| {name} | {_type(schema)} | {default} | {_cell(schema.get('description', ''))} |"
    below, suffix = (schema["items"], "[]") if "items" in schema else (schema, "")
    for field, each in below.get("properties", {}).items():
        yield from _rows(each, f"{path}{suffix}.{field}", required=field in below.get("required", []))


def _type(schema: Schema) -> str:
    """Type and bounds of a field in few words."""
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}, at most {schema['maxItems']}"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'])}, at most {schema['maxProperties']}"
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if schema.get("format") == "date-time":
        return "time"
    bounds = f", {schema['minimum']} to {schema['maximum']}" if {"minimum", "maximum"} <= schema.keys() else ""
    return f"{schema['type']}{bounds}"


def _literal(value: object) -> str:
    """A default as YAML writes it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _refusals(schema: Schema) -> Iterator[str]:
    """One line for each rule that the API server checks on a spec."""
    for path, level in levels(schema, ""):
        for each in level.get("x-kubernetes-validations", []) if not path.startswith("status") else []:
            at = f"{path}{each.get('fieldPath', '')}".removeprefix(".")
            yield f"- `{at or 'metadata.name'}`: {each['message']}"
