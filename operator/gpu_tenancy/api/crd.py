"""Generator: models → CustomResourceDefinitions, DeviceClass and field reference.

Pure functions from the models to text; the two `write_…` put that text into files for the command line. What the
schema language of Kubernetes does not know is refused here, not left to the API server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from gpu_tenancy.api import lease, node, pool, pricebook, usage
from gpu_tenancy.api.kinds import Column, Kind, NameLimit
from gpu_tenancy.api.names import CATEGORY, DEVICE_CLASS, DRIVER, GROUP, VERSION

KINDS: Final = (lease.KIND, pool.KIND, node.KIND, pricebook.KIND, usage.KIND)
"""Every kind of the group."""

Schema = dict[str, Any]

_KEPT: Final = frozenset(
    "type format description default enum pattern minLength maxLength minimum maximum items minItems maxItems properties "
    "required additionalProperties maxProperties".split()
)
"""Keywords that mean the same in JSON schema and in a structural schema."""
_HEADER: Final = "# Generated from operator/gpu_tenancy/api by `make verify`; edit the models, not this file.\n"


class _AbsentNotNull(GenerateJsonSchema):
    """pydantic's schema of an optional field, without null: in the Kubernetes API a field is absent instead."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def structural_schema(kind: Kind) -> Schema:
    """OpenAPI v3 schema of a kind as a CustomResourceDefinition wants it: references inlined, bounds kept.

    Raises ValueError for what a structural schema cannot say.
    """
    raw = kind.model.model_json_schema(by_alias=True, mode="validation", schema_generator=_AbsentNotNull)
    schema = _structural(raw, raw.get("$defs", {}), kind.name)
    if "status" in schema["properties"]:
        _drop_defaults(schema["properties"]["status"])
    if kind.name_limit:
        schema["properties"] = {"metadata": _metadata(kind.name_limit)} | schema["properties"]
        schema.setdefault("x-kubernetes-validations", []).append(_name_rule(kind.name_limit))
    return schema


def _structural(raw: Mapping[str, Any], definitions: Mapping[str, Any], where: str) -> Schema:
    """One level of the schema; `where` is the path for error messages."""
    raw = _resolved(raw, definitions)
    schema: Schema = {}
    for key, value in raw.items():
        match key, value:
            case ("title" | "$defs"), _:
                pass
            case "additionalProperties", False:
                pass  # beside `properties` it is illegal; the API server prunes or refuses unknown fields anyway
            case "properties", _:
                schema[key] = {name: _structural(each, definitions, f"{where}.{name}") for name, each in value.items()}
            case ("items" | "additionalProperties"), dict():
                schema[key] = _structural(value, definitions, f"{where}[]")
            case "const", _:
                schema["enum"] = [value]
            case "description", str():
                schema[key] = " ".join(cleandoc(value).split())
            case "default", _:
                pass  # below, where the type is known
            case _ if key in _KEPT or key.startswith("x-kubernetes-"):
                schema[key] = value
            case _:
                raise ValueError(f"{where} uses the JSON schema keyword {key!r}, which a structural schema does not have")
    return schema | _default(raw.get("default"), schema)


def _resolved(raw: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with its reference replaced by what it refers to; what stands beside the reference wins."""
    if "$ref" not in raw:
        return raw
    beside = {key: value for key, value in raw.items() if key != "$ref"}
    return {**definitions[raw["$ref"].removeprefix("#/$defs/")], **beside}


def _default(value: object, schema: Schema) -> Schema:
    """The default that the API server fills in: constants, and `{}` for objects whose fields have defaults."""
    match value:
        case bool() | int() | str():
            return {"default": value}
        case dict() if "properties" in schema:
            return {"default": {}}
        case _:
            return {}  # None, empty lists and maps: absent says the same


def _drop_defaults(schema: Schema) -> None:
    """A status says what is, so nothing is filled in."""
    schema.pop("default", None)
    for each in (*schema.get("properties", {}).values(), schema.get("items", {})):
        _drop_defaults(each)


def _metadata(limit: NameLimit) -> Schema:
    """The one part of metadata that a CustomResourceDefinition may narrow."""
    return {"type": "object", "properties": {"name": {"type": "string", "maxLength": limit.length}}}


def _name_rule(limit: NameLimit) -> Schema:
    return {"rule": f"self.metadata.name.matches('{limit.pattern}')", "message": limit.message}


def custom_resource_definition(kind: Kind) -> Schema:
    """The CustomResourceDefinition of a kind."""
    names = {
        "kind": kind.name,
        "listKind": f"{kind.name}List",
        "plural": kind.plural,
        "singular": kind.name.lower(),
        "shortNames": [kind.short_name],
        "categories": [CATEGORY],
    }
    version: Schema = {"name": VERSION, "served": True, "storage": True, "schema": {"openAPIV3Schema": structural_schema(kind)}}
    if kind.has_status:
        version["subresources"] = {"status": {}}
    if kind.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in kind.selectable]
    version["additionalPrinterColumns"] = [_column(column) for column in kind.columns]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": names,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [version],
        },
    }


def _column(column: Column) -> Schema:
    wide = {"priority": 1} if column.wide else {}
    return {"name": column.name, "type": column.type, "jsonPath": column.path} | wide


def device_class() -> Schema:
    """The DeviceClass that every device of every agent belongs to."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": DEVICE_CLASS},
        "spec": {"selectors": [{"cel": {"expression": f'device.driver == "{DRIVER}"'}}]},
    }


class _Dumper(yaml.SafeDumper):
    """YAML without anchors: equal parts are written out, as kubectl would show them."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 — yaml's signature
        return True


def _yaml(body: Schema) -> str:
    return _HEADER + yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def crd_texts() -> dict[str, str]:
    """Manifests by file name: one per kind, and the DeviceClass."""
    manifests = {f"{kind.plural}.yaml": custom_resource_definition(kind) for kind in KINDS}
    return {name: _yaml(body) for name, body in (manifests | {"deviceclass.yaml": device_class()}).items()}


def write_crds(folder: Path) -> None:
    """Write the manifests into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in crd_texts().items():
        (folder / name).write_text(text)


def reference_texts() -> dict[str, str]:
    """The field reference, by file name."""
    preface = (
        "<!-- Generated from operator/gpu_tenancy/api by `make verify`; edit the models, not this file. -->\n"
        "# Field reference\n\n"
        f"Kinds of `{GROUP}/{VERSION}`. `kubectl explain <kind> --recursive` shows the same. Fields in **bold** are required.\n"
    )
    return {"reference.md": "\n".join([preface, *(line for kind in KINDS for line in _kind_reference(kind))])}


def write_reference(path: Path) -> None:
    """Write the field reference to a file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference_texts()["reference.md"])


def _kind_reference(kind: Kind) -> Iterator[str]:
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
    checks = [check for path, each in _levels(schema, "") for check in _checks(path, each)]
    if checks:
        yield "The API server refuses:\n"
        yield from checks
        yield ""


def _rows(schema: Schema, path: str, *, required: bool) -> Iterator[str]:
    """Table rows of a field and of all below it."""
    name = f"**`{path}`**" if required else f"`{path}`"
    default = f"`{_literal(schema['default'])}`" if "default" in schema else ""
    yield f"| {name} | {_type(schema)} | {default} | {_cell(schema.get('description', ''))} |"
    below = schema["items"] if "items" in schema else schema
    for field, each in below.get("properties", {}).items():
        yield from _rows(each, f"{path}{'[]' if 'items' in schema else ''}.{field}", required=field in below.get("required", []))


def _type(schema: Schema) -> str:
    """Type and bounds of a field in few words."""
    if "enum" in schema:
        return _cell(" \\| ".join(f"`{value}`" for value in schema["enum"]))
    if "items" in schema:
        return f"list of {_type(schema['items'])}{_most(schema, 'maxItems')}"
    if "additionalProperties" in schema:
        return f"map of {_type(schema['additionalProperties'])}{_most(schema, 'maxProperties')}"
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    bounds = f" {schema['minimum']}–{schema['maximum']}" if "minimum" in schema and "maximum" in schema else ""
    return {"date-time": "time"}.get(schema.get("format", ""), schema["type"]) + bounds


def _most(schema: Schema, keyword: str) -> str:
    return f", at most {schema[keyword]}" if keyword in schema else ""


def _literal(value: object) -> str:
    """A default as YAML writes it."""
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n").removesuffix("\n...")


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("<", "&lt;")


def _levels(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """A schema and every schema below it, each with its path."""
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from _levels(each, f"{path}.{name}".removeprefix("."))
    for each in (schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)):
        yield from _levels(each, f"{path}[]")


def _checks(path: str, schema: Schema) -> Iterator[str]:
    """One line for each rule of a level that the API server checks."""
    for each in schema.get("x-kubernetes-validations", []):
        at = f"{path}{each.get('fieldPath', '')}".removeprefix(".")
        yield f"- `{at}`: {each['message']}"
