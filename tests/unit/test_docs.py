"""The documentation, held against the code: links, manifests, reasons, settings, metrics, fields and names.

What is written for people goes stale in silence; here it cannot. The prose itself is not judged.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, TypeAdapter, ValidationError

from gpu_tenancy.agent.metrics import Metrics as AgentMetrics
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import Situation, listed
from gpu_tenancy.api import names
from gpu_tenancy.api.base import Currency, DecimalString
from gpu_tenancy.api.crd import KINDS
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpusSpec, PodResources, Reason, Term, TopologySpec
from gpu_tenancy.api.node import HandOver, HandOverStep, HandOverStepType, NodeReason
from gpu_tenancy.api.pool import PoolReason
from gpu_tenancy.api.pricebook import BookReason
from gpu_tenancy.api.tenant import TenantReason
from gpu_tenancy.api.usage import UsageRecord
from gpu_tenancy.configuration import ENVIRONMENT_PREFIX
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.core import ledger
from tests.fakes.clock import FakeClock
from tests.fakes.gpus import FakeGpus

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = tuple(sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))))
WRITTEN: Final = tuple(page for page in PAGES if page.name != "reference.md")
"""Pages that people write; the reference is generated from the models."""
DECISIONS: Final = tuple(sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")))
DECISION_PARTS: Final = ("Context", "Decision", "Consequences", "Measured", "When to revisit")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- reading Markdown -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


def blocks(page: Path, language: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if found[1] == language:
            yield Block(relative(page), language, found[2])


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """What stands under a heading, down to the next of the same or a higher level."""
    text = page.read_text()
    start = re.search(rf"^(#+) {re.escape(heading)}\n", text, re.MULTILINE)
    assert start is not None, f"{relative(page)} has no heading {heading!r}"
    end = re.compile(rf"^#{{1,{len(start[1])}}} ", re.MULTILINE).search(text, start.end())
    return text[start.end() : end.start() if end else None]


def first_cells(text: str) -> list[str]:
    """Words in the first column of the tables of a text."""
    return re.findall(r"^\| `([^`]+)` ", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What can follow the # of a link to the page, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def links(page: Path) -> Iterator[str]:
    yield from (found[1] for found in LINK.finditer(prose(page)))


# --- links and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WRITTEN, ids=relative)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readmes_table_of_questions_names_files_and_each_is_there() -> None:
    rows = re.findall(r"^\| .+\? \| (.+) \|$", section(ROOT / "README.md", "Where to look next"), re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        found = LINK.findall(row)
        assert found, row
        assert [link for link in found if not (ROOT / link).exists()] == []


def test_the_name_of_a_file_and_what_it_links_to_agree() -> None:
    named = [found.groups() for page in WRITTEN for found in re.finditer(r"\[([\w/]+\.py)\]\(([^)]+)\)", prose(page))]
    assert named
    assert [pair for pair in named if not pair[1].endswith(f"/{pair[0]}")] == []


def test_every_decision_is_in_the_index_and_has_its_parts() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    assert DECISIONS
    for page in DECISIONS:
        assert f"({page.name})" in index
        assert tuple(re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)) == DECISION_PARTS


def test_every_path_that_is_named_is_there() -> None:
    named = {
        (relative(page), found[1])
        for page in WRITTEN
        for found in re.finditer(r"`((?:crds|docs|examples|operator|tests)/[\w./-]*)`", prose(page))
    }
    assert named
    assert {(page, path) for page, path in named if not (ROOT / path).exists()} == set()


# --- manifests --------------------------------------------------------------------------------------------------------

MODELS: Final[Mapping[str, type[BaseModel]]] = {kind.name: kind.model for kind in KINDS}
MANIFESTS: Final = tuple(block for page in WRITTEN for block in blocks(page, "yaml"))


def own_manifests() -> Iterator[tuple[Block, dict[str, Any]]]:
    for block in MANIFESTS:
        for body in yaml.safe_load_all(block.text):
            if str(body.get("apiVersion", "")).startswith(f"{names.GROUP}/"):
                yield block, body


def test_every_manifest_of_our_kinds_can_be_read_by_its_model() -> None:
    seen = set()
    for block, body in own_manifests():
        seen.add(body["kind"])
        assert body["apiVersion"] == names.API_VERSION
        try:
            MODELS[body["kind"]].model_validate({key: body[key] for key in body.keys() & {"spec", "status"}})
        except ValidationError as error:
            pytest.fail(f"{block.page}: {body['kind']} {body['metadata']['name']}: {error}")
    assert seen >= {"GpuLease", "GpuTenant", "MiningPool", "PriceBook", "UsageRecord"}


def test_the_pods_of_a_page_ask_for_the_claim_template_of_its_lease() -> None:
    for page in WRITTEN:
        text = page.read_text()
        asked = set(re.findall(r"resourceClaimTemplateName: (\w+)", text))
        leases = {body["metadata"]["name"] for block, body in own_manifests() if body["kind"] == "GpuLease"}
        assert asked <= leases, relative(page)


def test_the_readme_explains_every_field_of_a_leases_spec_and_no_other() -> None:
    explained = [word for word in first_cells(section(ROOT / "README.md", "The lease, line by line")) if "." in word]
    top = [word for word in first_cells(section(ROOT / "README.md", "The lease, line by line")) if "." not in word]
    nested: dict[str, type[BaseModel]] = {
        "gpus": GpusSpec,
        "term": Term,
        "podResources": PodResources,
        "topology": TopologySpec,
    }
    fields = {str(info.alias) for info in GpuLeaseSpec.model_fields.values()}
    assert set(top) == fields - nested.keys()
    below = {f"{name}.{info.alias}" for name, model in nested.items() for info in model.model_fields.values()}
    assert set(explained) == below | {"metadata.name"}


# --- words ------------------------------------------------------------------------------------------------------------

REASONS: Final[Mapping[str, type[StrEnum]]] = {
    "Reasons of a GpuLease": Reason,
    "Reasons of a MiningPool": PoolReason,
    "Reasons of a PriceBook": BookReason,
    "Reasons of a GpuTenant": TenantReason,
    "Reasons of a GpuNode": NodeReason,
}


@pytest.mark.parametrize("heading", REASONS)
def test_every_reason_is_explained_once_and_no_other(heading: str) -> None:
    explained = first_cells(section(ROOT / "docs" / "troubleshooting.md", heading))
    assert sorted(explained) == sorted(REASONS[heading])


def test_tenants_are_told_of_every_condition() -> None:
    told = first_cells(section(ROOT / "docs" / "tenant.md", "Waiting, and knowing why"))
    assert told == list(ConditionType)


def test_every_setting_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| ", section(ROOT / "docs" / "platform-team.md", "Settings"), re.MULTILINE
    )
    shown = {name: default.strip("`") for name, default in rows}
    fields = Settings.model_fields.items()
    assert shown == {name: "–" if info.default is None else _yaml(info.default) for name, info in fields}
    assert ENVIRONMENT_PREFIX in section(ROOT / "docs" / "platform-team.md", "Settings")


def _yaml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def test_every_setting_of_the_agent_is_documented_with_its_default() -> None:
    text = section(ROOT / "docs" / "platform-team.md", "Settings of the agent")
    rows = {name: default.strip("`") for name, default in re.findall(r"^\| `(\w+)` \| (\S+) \| ", text, re.MULTILINE)}
    fields = AgentSettings.model_fields.items()
    assert rows == {name: "–" if info.default is None else _yaml(info.default) for name, info in fields}


def test_every_metric_of_an_agent_is_documented_with_its_labels() -> None:
    gpus = FakeGpus("n1", count=1)
    situation = listed(Situation(), asyncio.run(gpus.list()))
    agents = AgentMetrics(gpus, lambda: situation, FakeClock())
    agents.hand_over(HandOver(steps=[HandOverStep(step=HandOverStepType.SCRUB, milliseconds=1)]))
    there = {f"{one.name}_total" if one.type == "counter" else one.name for one in agents.registry.collect()}
    text = section(ROOT / "docs" / "platform-team.md", "Metrics of the agents")
    assert set(re.findall(r"^\| `(gpu_tenancy_\w+)` \|", text, re.MULTILINE)) == there


def test_every_metric_is_documented_with_its_labels() -> None:
    there = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = f"{family.name}_total" if family.type == "counter" else family.name
            there[name] = tuple(metric._labelnames)
    rows = re.findall(
        r"^\| `(gpu_tenancy_\w+)` \|(.*?)\| ", section(ROOT / "docs" / "platform-team.md", "Metrics"), re.MULTILINE
    )
    assert {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows} == there


KNOWN_NAMES: Final = {value for value in vars(names).values() if isinstance(value, str)}


@pytest.mark.parametrize("page", WRITTEN, ids=relative)
def test_labels_annotations_and_finalizers_are_those_of_the_code(page: Path) -> None:
    used = set(re.findall(rf"{re.escape(names.GROUP)}/[a-z0-9-]+", page.read_text()))
    assert used <= KNOWN_NAMES


@pytest.mark.parametrize("page", WRITTEN, ids=relative)
def test_make_has_every_target_that_is_named(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("page", WRITTEN, ids=relative)
def test_kubectl_is_given_resources_that_exist(page: Path) -> None:
    ours = {name for kind in KINDS for name in (kind.plural, kind.name.lower(), kind.short_name)} | {names.CATEGORY}
    others = {
        "node",
        "namespace",
        "events",
        "pod",
        "pods",
        "resourceclaims",
        "resourceslices",
        "leases.coordination.k8s.io",
    }
    verbs = "get|describe|delete|patch|explain|annotate|create"
    named = re.findall(rf"kubectl (?:{verbs}) ([a-z][a-z0-9.-]+)", page.read_text())
    assert {name.removesuffix(".spec").removesuffix(".spec.template") for name in named} <= ours | others


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_the_bill_of_the_finance_page_is_the_ledgers_own() -> None:
    page = ROOT / "docs" / "finance.md"
    (script,) = blocks(page, "python")
    bodies = [body for block, body in own_manifests() if block.page == relative(page) and body["kind"] == "UsageRecord"]
    (closed,) = bodies
    archived = {**closed, "metadata": {**closed["metadata"], "namespace": names.SYSTEM_NAMESPACE}}
    running = {name: closed["spec"][name] for name in closed["spec"].keys() - {"billableTo", "seconds", "reason"}}
    second = {"metadata": {"name": "open-2"}, "spec": {**running, "segment": 2}}
    listed = json.dumps({"items": [closed, archived, second]})
    ran = subprocess.run([sys.executable, "-c", script.text], input=listed, capture_output=True, text=True, check=True)
    spec = UsageRecord.model_validate({"spec": closed["spec"]}).spec
    assert spec.price is not None
    assert spec.seconds is not None
    exact = ledger.amount(spec.price, len(spec.devices), spec.seconds)
    assert ran.stdout == f"team-a/train {exact.quantize(ledger.CENT)} RUB\n"
    assert f"which is {exact.quantize(ledger.CENT)}." in " ".join(prose(page).split())


def test_money_in_manifests_is_written_as_the_ledger_wants_it() -> None:
    amount, currency = TypeAdapter(DecimalString), TypeAdapter(Currency)
    for _, body in own_manifests():
        for rate in body["spec"].get("rates", ()):
            amount.validate_python(rate["perHour"], strict=True)
        if "currency" in body["spec"]:
            currency.validate_python(body["spec"]["currency"], strict=True)
