"""Generator: models → CustomResourceDefinitions and DeviceClass.

Pure functions from the models to text; `write_crds` puts that text into files for the command line. What the schema
language of Kubernetes does not know is refused here, not left to the API server.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from gpu_tenancy.api import lease, node, pool, pricebook, tenant, usage
from gpu_tenancy.api.kinds import Column, Kind
from gpu_tenancy.api.names import CATEGORY, DEVICE_CLASS, DRIVER, GROUP, VERSION

KINDS: Final = (lease.KIND, pool.KIND, node.KIND, pricebook.KIND, tenant.KIND, usage.KIND)
"""Every kind of the group."""

Schema = dict[str, Any]

_LEVELS: Final = ("properties", "items", "additionalProperties")
"""Keywords under which further schemas stand."""
_KEPT: Final = frozenset({
    "type", "format", "description", "enum", "pattern", "minLength", "maxLength", "minimum", "maximum", "minItems",
    "maxItems", "minProperties", "maxProperties", "required",
})  # fmt: skip
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
    # A status says what is, so nothing is filled in there.
    for _, level in levels(schema["properties"].get("status", {}), "status"):
        level.pop("default", None)
    if kind.name_rule:
        schema["properties"] = {"metadata": _metadata()} | schema["properties"]
        schema.setdefault("x-kubernetes-validations", []).append(kind.name_rule)
    return schema


def levels(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """A schema and every schema below it, each with the path of its field: `spec.rates[].model`."""
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from levels(each, f"{path}.{name}".removeprefix("."))
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from levels(schema[key], f"{path}[]")


def _structural(raw: Mapping[str, Any], definitions: Mapping[str, Any], where: str) -> Schema:
    """One level of the schema with all below it; `where` is the path for error messages."""
    raw = _resolved(raw, definitions)
    schema = {key: _keyword(key, value, where) for key, value in raw.items() if _is_kept(key)}
    if raw.get("properties"):
        fields = raw["properties"].items()
        schema["properties"] = {name: _structural(each, definitions, f"{where}.{name}") for name, each in fields}
    for key in ("items", "additionalProperties"):
        # `additionalProperties: false` is illegal beside `properties`; the API server drops unknown fields anyway.
        if raw.get(key, False) is not False:
            schema[key] = _structural(raw[key], definitions, f"{where}[]")
    return schema | _default(raw.get("default"), schema)


def _is_kept(key: str) -> bool:
    return key not in (*_LEVELS, "title", "$defs", "default")


def _keyword(key: str, value: Any, where: str) -> Any:  # noqa: ANN401 — a JSON value
    if key == "description":
        return " ".join(cleandoc(value).split())
    if key in _KEPT or key.startswith("x-kubernetes-"):
        return value
    raise ValueError(f"{where} uses the JSON schema keyword {key!r}, which a structural schema does not have")


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


def _metadata() -> Schema:
    """The one part of metadata that a CustomResourceDefinition may spell out; a rule needs its bound."""
    return {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}}


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
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": names,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [_version(kind)],
        },
    }


def _version(kind: Kind) -> Schema:
    version: Schema = {"name": VERSION, "served": True, "storage": True}
    if kind.has_status:
        version["subresources"] = {"status": {}}
    version["additionalPrinterColumns"] = [_column(column) for column in kind.columns]
    if kind.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in kind.selectable]
    schema = structural_schema(kind)
    for _, level in levels(schema, ""):
        if level.get("default", {}) != {}:
            # `kubectl explain` shows no defaults by itself.
            level["description"] += f" Default: {json.dumps(level['default'])}."
    return version | {"schema": {"openAPIV3Schema": schema}}


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

    def ignore_aliases(self, _data: object) -> bool:
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
