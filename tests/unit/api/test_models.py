"""The models as readers and writers of manifests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import pytest
import yaml
from annotated_types import MaxLen
from pydantic import TypeAdapter, ValidationError

from gpu_tenancy.api.base import ApiModel
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.crd import KINDS
from gpu_tenancy.api.lease import GpuLeaseSpec, LeaseCondition, LeaseEnd, Term
from gpu_tenancy.api.names import API_VERSION, GROUP, VERSION
from gpu_tenancy.api.node import Gpu, NodeCondition, ObservedSlot
from gpu_tenancy.api.pool import PoolCondition
from gpu_tenancy.api.pricebook import BookCondition
from gpu_tenancy.api.tenant import TenantCondition

EXAMPLES: Final = Path(__file__).parents[3] / "examples"
MODELS: Final = {kind.name: kind.model for kind in KINDS}

Body = dict[str, Any]


def own_examples() -> list[Body]:
    """The manifests of this group in examples/."""
    bodies = [body for path in sorted(EXAMPLES.glob("*.yaml")) for body in yaml.safe_load_all(path.read_text())]
    return [body for body in bodies if body["apiVersion"] == API_VERSION]


@pytest.mark.parametrize("body", own_examples(), ids=lambda body: f"{body['kind']}-{body['metadata']['name']}")
def test_examples_hold_no_unknown_field_and_survive_a_round_trip(body: Body) -> None:
    model = MODELS[body["kind"]]
    read = model.model_validate({"spec": body["spec"]})
    written = read.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert model.model_validate(written) == read
    assert included(body["spec"], written["spec"])


def included(part: object, whole: object) -> bool:
    """Whether everything that the part says is said in the whole."""
    match part, whole:
        case dict(), dict():
            return all(key in whole and included(value, whole[key]) for key, value in part.items())
        case list(), list():
            return len(part) == len(whole) and all(map(included, part, whole))
        case _:
            return part == whole


def test_there_is_an_example_of_each_kind_that_people_write() -> None:
    assert {body["kind"] for body in own_examples()} == {"GpuLease", "GpuTenant", "MiningPool", "PriceBook"}


def test_unknown_fields_are_refused_unless_the_reader_is_told_otherwise() -> None:
    manifest = {"gpus": {"profile": "full", "color": "red"}}
    with pytest.raises(ValidationError, match="color"):
        GpuLeaseSpec.model_validate(manifest)
    assert GpuLeaseSpec.model_validate(manifest, extra="ignore").gpus.profile == "full"


def models(of: type[ApiModel]) -> Iterator[type[ApiModel]]:
    """All models of the API."""
    for model in of.__subclasses__():
        if model.__module__.startswith("gpu_tenancy.api."):
            yield model
        yield from models(model)


def test_every_message_is_cut_to_its_bound_so_that_no_sentence_from_elsewhere_can_break_a_status() -> None:
    found = {model: model.model_fields["message"] for model in models(ApiModel) if "message" in model.model_fields}
    assert found.keys() >= {
        LeaseCondition,
        LeaseEnd,
        PoolCondition,
        BookCondition,
        TenantCondition,
        NodeCondition,
        Gpu,
        ObservedSlot,
    }
    for model, field in found.items():
        (bound,) = (one.max_length for one in field.metadata if isinstance(one, MaxLen))
        assert len(TypeAdapter(Annotated[str, *field.metadata]).validate_python("x" * 5000)) == bound, model


def test_absent_fields_are_left_out_and_never_null() -> None:
    assert Term().to_wire() == {"notice": "5m", "renew": False}


def test_a_claim_holder_is_written_as_an_object_of_the_group() -> None:
    written = ClaimHolder(holder="1f0c").to_wire()
    assert written == {"apiVersion": "gpu-tenancy.dev/v1alpha1", "kind": "ClaimHolder", "holder": "1f0c"}
    assert ClaimHolder.model_validate(written) == ClaimHolder(holder="1f0c")


@pytest.mark.parametrize(
    "foreign",
    [
        {"apiVersion": "other.dev/v1", "kind": "ClaimHolder", "holder": "1f0c"},
        {"apiVersion": "gpu-tenancy.dev/v1alpha1", "kind": "Other", "holder": "1f0c"},
        {"apiVersion": "gpu-tenancy.dev/v1alpha1", "kind": "ClaimHolder", "holder": ""},
        {"apiVersion": "gpu-tenancy.dev/v1alpha1", "kind": "ClaimHolder"},
    ],
)
def test_foreign_parameters_are_no_claim_holder(foreign: Body) -> None:
    with pytest.raises(ValidationError):
        ClaimHolder.model_validate(foreign)


def test_the_api_version_is_group_and_version() -> None:
    assert f"{GROUP}/{VERSION}" == API_VERSION
