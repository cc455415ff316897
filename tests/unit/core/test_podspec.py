"""What a pod asks of a node, as kube-scheduler counts it."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.podspec import Expression, PodNeeds, Taint, Toleration, needs, requests

GI = 2**30


def container(cpu: str = "", memory: str = "", **more: Any) -> dict[str, Any]:  # noqa: ANN401
    wanted = {name: value for name, value in (("cpu", cpu), ("memory", memory)) if value}
    return {"name": "c", "resources": {"requests": wanted}, **more}


SIDECAR = {"restartPolicy": "Always"}
REQUESTS = [
    pytest.param({"containers": [container("1", "1Gi"), container("500m", "2Gi")]}, Amount(1500, 3 * GI, 1), id="sum"),
    pytest.param({"containers": [{"name": "c"}]}, Amount(0, 0, 1), id="nothing asked"),
    pytest.param(
        {"containers": [{"name": "c", "resources": {"limits": {"cpu": "2", "nvidia.com/gpu": 1}}}]},
        Amount(2000, 0, 1),
        id="a limit without a request is a request",
    ),
    pytest.param(
        {"containers": [container("1")], "initContainers": [container("4"), container("3")]},
        Amount(4000, 0, 1),
        id="the largest init container",
    ),
    pytest.param(
        {"containers": [container("1")], "initContainers": [container("2", **SIDECAR), container("2")]},
        Amount(4000, 0, 1),
        id="an init container beside a sidecar that was started before it",
    ),
    pytest.param(
        {"containers": [container("3")], "initContainers": [container("2"), container("2", **SIDECAR)]},
        Amount(5000, 0, 1),
        id="a sidecar stays beside the containers",
    ),
    pytest.param(
        {"containers": [container("1", "1Gi")], "overhead": {"cpu": "250m", "memory": "1Gi"}},
        Amount(1250, 2 * GI, 1),
        id="overhead comes on top",
    ),
    pytest.param(
        {"containers": [container("1", "1Gi")], "resources": {"requests": {"cpu": "8"}}},
        Amount(8000, GI, 1),
        id="resources of the pod itself count instead of its containers'",
    ),
    pytest.param({"containers": [container("0.0001", "1")]}, Amount(1, 1, 1), id="rounded up"),
]


@pytest.mark.parametrize(("spec", "amount"), REQUESTS)
def test_the_effective_request_of_a_pod(spec: dict[str, Any], amount: Amount) -> None:
    assert requests(spec) == amount


def test_a_quantity_that_is_none_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match='quantity "many" is not understood; write a number'):
        needs({"containers": [container("many")]})


TAINT = Taint("team", "b", "NoSchedule")
TOLERATIONS = [
    pytest.param(Toleration("team", "Equal", "b", "NoSchedule"), True, id="exact"),
    pytest.param(Toleration("team", "Equal", "b", ""), True, id="any effect"),
    pytest.param(Toleration("team", "Exists", "", ""), True, id="any value"),
    pytest.param(Toleration("", "Exists", "", ""), True, id="everything"),
    pytest.param(Toleration("team", "Equal", "a", ""), False, id="another value"),
    pytest.param(Toleration("other", "Exists", "", ""), False, id="another key"),
    pytest.param(Toleration("team", "Exists", "", "NoExecute"), False, id="another effect"),
    pytest.param(Toleration("", "Equal", "b", ""), False, id="no key, but a value"),
]


@pytest.mark.parametrize(("toleration", "tolerates"), TOLERATIONS)
def test_tolerations(toleration: Toleration, tolerates: bool) -> None:
    assert toleration.tolerates(TAINT) is tolerates
    objection = PodNeeds(Amount(), tolerations=(toleration,)).objection("a", {}, [TAINT])
    assert objection == ("" if tolerates else "taint team=b:NoSchedule is not tolerated")


LABELS = {"disk": "ssd", "size": "8", "word": "x"}
EXPRESSIONS = [
    pytest.param(("disk", "In", ("hdd", "ssd")), True, id="in"),
    pytest.param(("disk", "In", ("hdd",)), False, id="not in the list"),
    pytest.param(("none", "In", ("",)), False, id="absent is in no list"),
    pytest.param(("disk", "NotIn", ("hdd",)), True, id="notin"),
    pytest.param(("none", "NotIn", ("hdd",)), True, id="absent is notin"),
    pytest.param(("disk", "Exists", ()), True, id="exists"),
    pytest.param(("none", "Exists", ()), False, id="absent does not exist"),
    pytest.param(("none", "DoesNotExist", ()), True, id="doesnotexist"),
    pytest.param(("size", "Gt", ("7",)), True, id="greater"),
    pytest.param(("size", "Gt", ("8",)), False, id="equal is not greater"),
    pytest.param(("size", "Lt", ("9",)), True, id="less"),
    pytest.param(("word", "Gt", ("1",)), False, id="a word is not greater"),
    pytest.param(("none", "Lt", ("9",)), False, id="absent is not less"),
    pytest.param(("disk", "Near", ("ssd",)), False, id="an unknown operator matches nothing"),
]


@pytest.mark.parametrize(("expression", "matches"), EXPRESSIONS)
def test_expressions_of_node_affinity(expression: tuple[str, str, tuple[str, ...]], matches: bool) -> None:
    assert Expression(*expression).matches(LABELS) is matches


def affinity(*terms: dict[str, Any]) -> PodNeeds:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)}}
    return needs({"containers": [], "affinity": {"nodeAffinity": required}})


def test_terms_are_alternatives_and_the_expressions_of_a_term_all_hold() -> None:
    ssd = {"key": "disk", "operator": "In", "values": ["ssd"]}
    large = {"key": "size", "operator": "Gt", "values": ["100"]}
    assert affinity({"matchExpressions": [ssd]}).objection("a", LABELS, ()) == ""
    assert affinity({"matchExpressions": [ssd, large]}).objection("a", LABELS, ()) != ""
    assert affinity({"matchExpressions": [large]}, {"matchExpressions": [ssd]}).objection("a", LABELS, ()) == ""


def test_a_term_may_name_nodes_and_an_empty_one_matches_none() -> None:
    here = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}
    assert affinity(here).objection("a", {}, ()) == ""
    assert affinity(here).objection("b", {}, ()) == "its required node affinity does not match"
    assert affinity({}).objection("a", LABELS, ()) == "its required node affinity does not match"


def test_the_first_objection_is_told() -> None:
    picky = needs({"containers": [], "nodeSelector": {"disk": "hdd"}})
    assert picky.objection("a", LABELS, [TAINT]) == "node selector disk=hdd does not match"
