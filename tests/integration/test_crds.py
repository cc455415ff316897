"""The kinds on a real API server: what it accepts, what it refuses and in which words, and what kubectl shows.

Every rule in ``crds/`` has a manifest that keeps it and one that breaks it, in ``crd_cases.yaml``; a test below sees to
that.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from gpu_tenancy.api.crd import KINDS, custom_resource_definition, levels, structural_schema
from gpu_tenancy.api.kinds import Kind
from tests.api_server import ApiServer, Body, refusal

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "examples"
CRDS: Final = ROOT / "crds"

CASES: Final = yaml.safe_load((Path(__file__).parent / "crd_cases.yaml").read_text())
MANIFESTS: Final = CASES["manifests"]
ON_CREATION: Final = CASES["on-creation"]
ON_CHANGE: Final = CASES["on-change"]

Change = Mapping[str, Any]
"""Path of a field → its new value; None takes the field away."""


def changed(body: Body, change: Change) -> Body:
    """The manifest with some fields set or taken away."""
    body = copy.deepcopy(body)
    for path, value in change.items():
        *parents, last = (int(step) if step.isdigit() else step for step in path.split("."))
        place: Any = body
        for step in parents:
            place = place[step]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)
    return body


@pytest.mark.parametrize("case", ON_CREATION.values(), ids=ON_CREATION.keys())
def test_what_keeps_a_rule_is_accepted_and_what_breaks_it_is_refused(control_plane_api: ApiServer, case: Body) -> None:
    manifest = MANIFESTS[case["manifest"]]
    control_plane_api.try_create(changed(manifest, case["keeps"]))
    assert case["refusal"] in refusal(control_plane_api.try_create, changed(manifest, case["breaks"]))


@pytest.fixture(scope="module")
def stored(control_plane_api: ApiServer) -> Callable[[str], Body]:
    """Each manifest as an object on the server, made when first asked for, under a name that no other test creates."""

    @cache
    def get(manifest: str) -> Body:
        body, name = MANIFESTS[manifest], f"stored-{manifest}"
        named: Change = {"metadata.name": name}
        if body["kind"] == "UsageRecord":
            named = {"metadata.name": f"{name}-{body['spec']['segment']}", "spec.contract": name}
        return control_plane_api.create(changed(body, named))

    return get


@pytest.mark.parametrize("case", ON_CHANGE.values(), ids=ON_CHANGE.keys())
def test_a_change_that_keeps_a_rule_is_accepted_and_one_that_breaks_it_is_refused(
    control_plane_api: ApiServer, stored: Callable[[str], Body], case: Body
) -> None:
    before = stored(case["manifest"])
    control_plane_api.try_replace(changed(before, case["keeps"]))
    assert case["refusal"] in refusal(control_plane_api.try_replace, changed(before, case["breaks"]))


def spec_rules() -> Iterator[tuple[str, Body]]:
    """Every rule on a spec, with the field that it refuses."""
    for kind in KINDS:
        for path, level in levels(structural_schema(kind), ""):
            for rule in () if path.startswith("status") else level.get("x-kubernetes-validations", []):
                yield f"{kind.name} {path}{rule.get('fieldPath', '')}".replace(" .", " "), rule


def words(rule: Body) -> re.Pattern[str]:
    """What the server says where the rule is broken, with any value in it."""
    said = rule.get("messageExpression", "'" + rule["message"] + "'").removeprefix("'").removesuffix("'")
    return re.compile(".*".join(re.escape(part) for part in re.split(r"' \+ .*? \+ '", said)))


@pytest.mark.parametrize(
    ("where", "rule"), [(where, rule) for where, rule in spec_rules() if not where.endswith(" spec.tier")]
)
def test_every_rule_has_a_case(where: str, rule: Body) -> None:
    kind, field = where.split()
    for case in (*ON_CREATION.values(), *ON_CHANGE.values()):
        said = re.sub(r"\[\d+\]", "[]", case["refusal"])
        of_kind = MANIFESTS[case["manifest"]]["kind"] == kind
        if of_kind and field in said and words(rule).search(case["refusal"]):
            return
    pytest.fail(f"no case in crd_cases.yaml breaks the rule on {where}: {rule['message']}")


OTHER_GROUP: Final = "second-tier.example.com"


def with_second_tier(kind: Kind) -> Body:
    """The definition of a kind in a group of its own, where the tier can change."""
    definition = custom_resource_definition(kind)
    definition["metadata"]["name"] = f"{kind.plural}.{OTHER_GROUP}"
    definition["spec"]["group"] = OTHER_GROUP
    definition["spec"]["names"].pop("shortNames")
    definition["spec"]["names"].pop("categories")
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    spec["properties"]["tier"]["enum"] = ["OnDemand", "Later"]
    return definition


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("lease", "spec.tier: Forbidden: spec.tier is immutable, because the price was agreed for it"),
        ("record", "spec.tier: Forbidden: spec.tier is immutable, because the record is evidence of what was billed"),
    ],
)
def test_the_tier_stays_once_there_is_another_to_change_to(
    control_plane_api: ApiServer, manifest: str, said: str
) -> None:
    body = MANIFESTS[manifest]
    kind = next(kind for kind in KINDS if kind.name == body["kind"])
    control_plane_api.apply(with_second_tier(kind))
    body = changed(body, {"apiVersion": f"{OTHER_GROUP}/v1alpha1"})
    control_plane_api.apply(body)
    assert said in refusal(control_plane_api.try_apply, changed(body, {"spec.tier": "Later"}))


def test_defaults_are_filled_in_where_nothing_is_said(control_plane_api: ApiServer) -> None:
    body = {**MANIFESTS["lease"], "spec": {"gpus": {"profile": "full"}, "podResources": {"cpu": "2"}}}
    assert control_plane_api.try_create(body)["spec"] == {
        "gpus": {"profile": "full", "count": 1},
        "pods": 1,
        "podResources": {"cpu": "2", "memory": "1Gi"},
        "tier": "OnDemand",
        "term": {"notice": "5m", "renew": False},
        "suspend": False,
        "onCompletion": "Release",
    }


def test_a_node_without_devices_has_a_spec_that_can_be_replaced(control_plane_api: ApiServer) -> None:
    body = changed(MANIFESTS["node"], {"spec": None})
    assert control_plane_api.try_create(body)["spec"] == {}


def test_pod_resources_are_not_made_up(control_plane_api: ApiServer) -> None:
    assert "podResources" not in control_plane_api.try_create(MANIFESTS["lease"])["spec"]


def test_a_template_is_kept_as_given(control_plane_api: ApiServer) -> None:
    given = MANIFESTS["lease-with-template"]
    assert control_plane_api.try_create(given)["spec"]["template"] == given["spec"]["template"]


def test_unknown_fields_are_refused(control_plane_api: ApiServer) -> None:
    body = changed(MANIFESTS["lease"], {"spec.gpuCount": 4})
    assert 'unknown field "spec.gpuCount"' in refusal(control_plane_api.try_create, body)


@pytest.fixture(scope="module")
def namespaces(control_plane_api: ApiServer) -> None:
    """The namespaces of the examples, in which the others are tried."""
    control_plane_api.kubectl("apply", "--filename", str(EXAMPLES / "1-namespaces.yaml"))


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_accepted(control_plane_api: ApiServer, path: Path) -> None:
    for body in yaml.safe_load_all(path.read_text()):
        control_plane_api.try_apply(body)


def test_kubectl_applies_the_definitions(control_plane_api: ApiServer) -> None:
    printed = control_plane_api.kubectl("apply", "--filename", str(CRDS))
    assert printed.count("configured") + printed.count("unchanged") == len(list(CRDS.glob("*.yaml")))


STATUS: Final = yaml.safe_load("""
observedGeneration: 1
conditions:
  - {type: Ready, status: "True", reason: Ready, lastTransitionTime: "2026-01-01T00:00:00Z", observedGeneration: 1}
  - type: Admitted
    status: "True"
    reason: Unpriced
    lastTransitionTime: "2026-01-01T00:00:00Z"
    observedGeneration: 1
devices: 8
nodes: [node-1]
nodeNames: node-1
position: 3
expiresAt: "2126-01-01T04:00:00Z"
price: {perHour: "145.00", currency: RUB, book: first}
cost: {amount: "1160.00", currency: RUB, seconds: 3600, asOf: "2026-01-01T01:00:00Z"}
""")


@pytest.fixture(scope="module")
def shown(control_plane_api: ApiServer) -> None:
    """A lease with a status for kubectl to show."""
    lease = control_plane_api.create(changed(MANIFESTS["lease"], {"metadata.name": "shown"}))
    control_plane_api.replace_status({**lease, "status": STATUS})


def table(printed: str) -> list[list[str]]:
    """Cells of what `kubectl get` prints."""
    return [re.split(r"\s{2,}", line.rstrip()) for line in printed.splitlines()]


@pytest.mark.usefixtures("shown")
@pytest.mark.parametrize("name", ["gpul", "gpulease", "gpuleases"])
def test_kubectl_get_shows_state_gpus_nodes_expiry_and_cost(control_plane_api: ApiServer, name: str) -> None:
    header, row = table(control_plane_api.kubectl("get", name, "shown"))
    assert header == ["NAME", "STATE", "GPUS", "PROFILE", "NODES", "EXPIRES", "COST", "AGE"]
    assert row[:7] == ["shown", "Ready", "8", "full", "node-1", "2126-01-01T04:00:00Z", "1160.00"]


@pytest.mark.usefixtures("shown")
def test_kubectl_get_wide_adds_position_price_with_its_currency_and_reason(control_plane_api: ApiServer) -> None:
    header, row = table(control_plane_api.kubectl("get", "gpul", "shown", "--output", "wide"))
    assert header[8:] == ["POSITION", "PRICE", "CURRENCY", "REASON"]
    assert row[8:] == ["3", "145.00", "RUB", "Unpriced"]


@pytest.fixture(scope="module")
def recorded(control_plane_api: ApiServer) -> None:
    """A closed record of three devices for kubectl to show."""
    devices = [{"node": "a", "device": f"gpu{index}-9f2c41", "gpu": f"GPU-{index}"} for index in range(3)]
    closed = {
        "metadata.name": "printed-1",
        "spec.contract": "printed",
        "spec.devices": devices,
        "spec.billableTo": "2026-01-01T01:00:00Z",
        "spec.seconds": 3600,
        "spec.reason": "Expired",
    }
    control_plane_api.create(changed(MANIFESTS["record"], closed))


@pytest.mark.usefixtures("recorded")
def test_kubectl_get_shows_seconds_and_price_of_a_record_with_its_currency(control_plane_api: ApiServer) -> None:
    header, row = table(control_plane_api.kubectl("get", "usage", "printed-1"))
    assert header == [
        "NAME", "LEASE", "SEGMENT", "PROFILE", "FROM", "TO", "SECONDS", "PRICE", "CURRENCY", "REASON", "AGE"
    ]  # fmt: skip
    assert row[6:10] == ["3600", "145.00", "RUB", "Expired"]


@pytest.mark.usefixtures("recorded")
def test_the_finance_pages_command_prints_the_factors_of_a_bill(control_plane_api: ApiServer) -> None:
    page = (ROOT / "docs" / "finance.md").read_text()
    (typed,) = re.findall(r"^\$ kubectl (get usagerecords -A -o go-template='[^']*')$", page, re.MULTILINE)
    assert "default/train: 3 × 3600 s × 145.00 RUB/h" in control_plane_api.kubectl(*shlex.split(typed)).splitlines()


@pytest.mark.usefixtures("shown")
def test_kubectl_waits_for_a_condition(control_plane_api: ApiServer) -> None:
    printed = control_plane_api.kubectl("wait", "--for=condition=Ready", "gpul/shown", "--timeout=30s")
    assert printed == "gpulease.gpu-tenancy.dev/shown condition met\n"


@pytest.mark.usefixtures("shown")
def test_kubectl_finds_leases_by_profile(control_plane_api: ApiServer) -> None:
    found = control_plane_api.kubectl("get", "gpul", "--output=name", "--field-selector=spec.gpus.profile=full")
    others = control_plane_api.kubectl("get", "gpul", "--output=name", "--field-selector=spec.gpus.profile=1g.5gb")
    assert "gpulease.gpu-tenancy.dev/shown" in found.splitlines()
    assert "gpulease.gpu-tenancy.dev/shown" not in others.splitlines()


def test_the_category_lists_every_kind(control_plane_api: ApiServer) -> None:
    printed = control_plane_api.kubectl("api-resources", "--categories=gpu-tenancy", "--no-headers", "--output=name")
    assert sorted(printed.split()) == sorted(f"{kind.plural}.gpu-tenancy.dev" for kind in KINDS)


@pytest.mark.parametrize(("short", "kind"), [(kind.short_name, kind.name) for kind in KINDS])
def test_kubectl_knows_short_names(control_plane_api: ApiServer, short: str, kind: str) -> None:
    assert f"KIND:       {kind}\n" in control_plane_api.kubectl("explain", short)


@pytest.mark.parametrize(
    ("field", "lesson"),
    [
        ("spec.gpus.count", "because CUDA sees only one MIG device per process. Default: 1."),
        ("spec.term.duration", "Absent: until the lease is deleted."),
        ("spec.template", "bring your own pods, which refer to the ResourceClaimTemplate that has the lease's name"),
        ("spec.template.spec.nodeName", "Refused: the operator places the pods; leave it out."),
    ],
)
def test_kubectl_explain_teaches(control_plane_api: ApiServer, field: str, lesson: str) -> None:
    printed = " ".join(control_plane_api.kubectl("explain", f"gpulease.{field}").split())
    assert lesson in printed


def test_kubectl_explain_lists_the_fields_of_a_lease(control_plane_api: ApiServer) -> None:
    printed = control_plane_api.kubectl("explain", "gpulease.spec", "--recursive")
    fields = set(re.findall(r"^  (\w+)\t", printed, re.MULTILINE))
    assert fields == {
        "gpus", "pods", "podResources", "tier", "commitment", "topology", "term", "suspend", "onCompletion", "template"
    }  # fmt: skip
