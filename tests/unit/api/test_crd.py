"""What is generated from the models: that it is current, structural, bounded, and agrees with the rest of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import pytest
import yaml
from pydantic import BaseModel, Field

from gpu_tenancy.api.base import PROFILES
from gpu_tenancy.api.crd import KINDS, crd_texts, custom_resource_definition, levels, structural_schema, write_crds
from gpu_tenancy.api.kinds import Kind
from gpu_tenancy.api.reference import reference_texts, write_reference
from gpu_tenancy.kube.resources import OWN_KINDS
from gpu_tenancy.mig.profiles import of_model

ROOT: Final = Path(__file__).parents[3]
BY_NAME: Final = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
CLIENT_SIDE_APPLY_BYTES: Final = 262_144
"""What kubectl may keep of an object in its annotation; larger ones cannot be applied client-side."""


def test_committed_definitions_are_those_of_the_models() -> None:
    committed = {path.name: path.read_text() for path in (ROOT / "crds").iterdir()}
    assert committed == crd_texts(), "run `make verify` and commit crds/"


def test_committed_reference_is_that_of_the_models() -> None:
    committed = {"reference.md": (ROOT / "docs" / "reference.md").read_text()}
    assert committed == reference_texts(), "run `make verify` and commit docs/reference.md"


def test_writers_write_what_is_generated(tmp_path: Path) -> None:
    write_crds(tmp_path / "crds")
    write_reference(tmp_path / "docs" / "page.md")
    assert {path.name: path.read_text() for path in (tmp_path / "crds").iterdir()} == crd_texts()
    assert (tmp_path / "docs" / "page.md").read_text() == reference_texts()["reference.md"]


@BY_NAME
def test_every_string_list_and_map_is_bounded_so_that_rules_have_a_cost(kind: Kind) -> None:
    unbounded = [path for path, level in levels(structural_schema(kind), kind.name) if not is_bounded(level)]
    # Refused wherever they stand, whatever they hold.
    assert [path for path in unbounded if not path.startswith("GpuLease.spec.template.spec.")] == []


def is_bounded(level: dict[str, Any]) -> bool:
    match level:
        case {"type": "string"}:
            return not level.keys().isdisjoint({"maxLength", "enum", "format"})
        case {"type": "array"}:
            return "maxItems" in level
        case {"type": "object", "additionalProperties": _}:
            return "maxProperties" in level
        case _:
            return True


@BY_NAME
def test_every_field_is_described(kind: Kind) -> None:
    schema = structural_schema(kind)
    fields = [f"{path}.{name}" for path, level in levels(schema, kind.name) for name in level.get("properties", {})]
    described = {path for path, level in levels(schema, kind.name) if level.get("description")}
    opaque = {f"{kind.name}.metadata", f"{kind.name}.metadata.name"}
    inside_template = {field for field in fields if field.endswith((".resources", ".resources.claims"))}
    assert set(fields) - described - opaque <= inside_template - {"MiningPool.spec.resources"}


@BY_NAME
def test_nothing_is_filled_in_below_status(kind: Kind) -> None:
    status = structural_schema(kind)["properties"].get("status", {})
    assert [path for path, level in levels(status, "status") if "default" in level] == []


@BY_NAME
def test_no_keyword_is_left_that_structural_schemas_lack(kind: Kind) -> None:
    for _, level in levels(structural_schema(kind), kind.name):
        assert level.keys().isdisjoint({"title", "$ref", "$defs", "anyOf", "allOf", "oneOf", "nullable", "const"})
        assert level.get("additionalProperties") is not False


@BY_NAME
def test_definitions_fit_into_the_annotation_of_a_client_side_apply(kind: Kind) -> None:
    assert len(json.dumps(custom_resource_definition(kind)).encode()) < CLIENT_SIDE_APPLY_BYTES


@BY_NAME
def test_columns_and_selectors_point_at_fields_that_exist(kind: Kind) -> None:
    schema = structural_schema(kind)
    known = {f".{path}" for path, _ in levels(schema, "")} | {".metadata.creationTimestamp", ".metadata.generation"}
    for path in (*(column.path for column in kind.columns), *kind.selectable):
        condition = path.startswith(".status.conditions[?(@.type==") and path.endswith((".reason", ".status"))
        assert condition or path.replace("[0]", "[]") in known


@BY_NAME
def test_condition_columns_name_conditions_that_exist(kind: Kind) -> None:
    schema = dict(levels(structural_schema(kind), ""))
    for column in kind.columns:
        if column.path.startswith(".status.conditions"):
            named = column.path.split('"')[1]
            assert named in schema["status.conditions[].type"]["enum"]


def test_the_definitions_and_the_client_agree_on_names_and_scopes() -> None:
    defined = {(kind.name, kind.plural, kind.namespaced) for kind in KINDS}
    assert {(each.kind, each.plural, each.namespaced) for each in OWN_KINDS} == defined


def test_profiles_are_those_of_the_geometry() -> None:
    known = {"full", *of_model("A100-SXM4-40GB"), *of_model("A100-SXM4-80GB")}
    assert set(PROFILES) == known
    assert len(PROFILES) == len(known)


def test_the_device_class_selects_the_driver() -> None:
    manifest = yaml.safe_load(crd_texts()["deviceclass.yaml"])
    assert manifest["spec"]["selectors"] == [{"cel": {"expression": 'device.driver == "gpu-tenancy.dev"'}}]


class Choice(BaseModel):
    """A model with a field that a structural schema cannot describe."""

    either: Annotated[int, Field(gt=0)] | str


def test_what_a_structural_schema_cannot_say_is_refused_by_name() -> None:
    kind = Kind(model=Choice, plural="choices", short_name="ch", columns=())
    with pytest.raises(ValueError, match=r"Choice\.either uses the JSON schema keyword 'anyOf'"):
        structural_schema(kind)


def test_the_reference_has_every_field() -> None:
    page = reference_texts()["reference.md"]
    for kind in KINDS:
        section = page.partition(f"## {kind.name}\n")[2].partition("\n## ")[0]
        for path, _ in levels(structural_schema(kind), ""):
            if path and not path.startswith("metadata") and not path.endswith("[]"):
                assert f"`{path}`" in section
