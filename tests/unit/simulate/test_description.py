"""A description: defaults, what a change over it does, the machines it comes to, and sentences for what is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.controller.settings import Conversion, Settings
from gpu_tenancy.simulate.description import Description, Policies, machines
from tests.unit.simulate.company import POOL, company

LEAST: Final = "nodes:\n  - {name: n}\n"


def load(folder: Path, text: str, *changes: str) -> Description:
    path = folder / "company.yaml"
    path.write_text(text)
    return Description.load(path, changes)


def test_the_least_description_is_one_node_of_eight_gpus_on_which_nothing_mines_and_nothing_breaks(
    tmp_path: Path,
) -> None:
    found = load(tmp_path, LEAST)
    [machine] = machines(found)
    assert (machine.name, len(machine.gpus)) == ("n", 8)
    assert {gpu.mode for gpu in machine.gpus} == {GpuMode.WHOLE}
    assert found.pools == []
    assert found.faults.node_mean_days is None
    assert found.faults.xid_mean_days is None


def test_nodes_of_a_group_are_numbered_and_their_last_gpus_are_those_in_mig_mode() -> None:
    first, second = machines(company([{"name": "n", "count": 2, "gpus": 3, "mig": 1, "labels": {"rack": "r1"}}]))
    assert (first.name, second.name) == ("n-0", "n-1")
    assert [gpu.mode for gpu in first.gpus] == [GpuMode.WHOLE, GpuMode.WHOLE, GpuMode.MIG]
    assert first.labels == second.labels == {"rack": "r1"}
    assert len({gpu.uuid for machine in (first, second) for gpu in machine.gpus}) == 6


def test_policies_begin_as_the_operators_settings_do() -> None:
    ours, theirs = Policies(), Settings()
    shared = ours.model_dump().keys() - {"mining", "conversion"}
    assert shared <= theirs.model_dump().keys()
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert ours.conversion == (theirs.conversion is Conversion.ON_DEMAND)


@pytest.mark.parametrize("name", ["usage_half_life_hours", "usageHalfLifeHours"])
@pytest.mark.parametrize("written", ["usage_half_life_hours", "usageHalfLifeHours"])
def test_a_policy_is_changed_under_either_spelling(tmp_path: Path, name: str, written: str) -> None:
    found = load(tmp_path, f"{LEAST}policies: {{{written}: 12}}\n", f"{name}=6", "mining=false")
    assert found.policies.tenant_defaults.half_life == timedelta(hours=6)
    assert not found.policies.mining


def test_any_other_part_is_changed_under_its_name(tmp_path: Path) -> None:
    found = load(tmp_path, LEAST, "hand_over.whole=7.4", "faults.xidMeanDays=90")
    assert found.hand_over.whole == 7.4
    assert found.faults.xid_mean_days == 90
    assert found.faultless().faults.xid_mean_days is None


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("nodes: [", (), "company.yaml is not YAML: "),
        ("- a\n- b\n", (), "company.yaml is not a description: write `nodes:`"),
        ("", (), "company.yaml is not a description: write `nodes:`"),
        ("pools: []\n", (), "company.yaml: nodes: Field required"),
        ("nodes: []\n", (), "company.yaml: nodes: List should have at least 1 item"),
        ("nodes:\n  - {name: n, gpus: 0}\n", (), "company.yaml: nodes.0.gpus: Input should be greater than"),
        ("nodes:\n  - {name: N n}\n", (), "company.yaml: nodes.0.name: String should match pattern"),
        (f"{LEAST}nodez: []\n", (), "company.yaml: nodez: Extra inputs are not permitted"),
        (LEAST, ("mining",), '"mining" changes nothing; write name=value, e.g. mining=false'),
        (LEAST, ("=1",), '"=1" changes nothing; write name=value, e.g. mining=false'),
        (LEAST, ("mine=false",), "company.yaml: policies.mine: Extra inputs are not permitted"),
        (LEAST, ("nodes.count=3",), '"nodes.count=3": nodes is a list; change it in the description'),
        (LEAST, ("spot_notice_max=soon",), "company.yaml: policies.spot"),
        (LEAST, ("mining=[",), '"mining=[": the value is not YAML'),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_field(
    tmp_path: Path, text: str, changes: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the sentence is compared below)
        load(tmp_path, text, *changes)
    assert said in str(caught.value)


def test_of_many_mistakes_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    wrong = "".join(f"field{number}: 1\n" for number in range(8))
    with pytest.raises(ValueError, match=r"field4: Extra inputs are not permitted; and 3 more$"):
        load(tmp_path, LEAST + wrong)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"name": "n", "gpus": 4, "mig": 5}, "5 GPUs in MIG mode are more than the node has; write mig: 4 or less"),
        ({"name": "n", "mig": 1, "model": "V100-SXM2-32GB"}, "the MIG profiles of a V100-SXM2-32GB are not known"),
    ],
)
def test_nodes_that_cannot_be_are_refused(group: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        company([group])


def test_what_has_a_name_has_it_alone() -> None:
    with pytest.raises(ValueError, match="node n-0 is there twice; give each node a name of its own"):
        company([{"name": "n", "count": 2}, {"name": "n-0"}])
    with pytest.raises(ValueError, match="tenant acme is there twice"):
        company(tenants=[{"name": "acme", "spec": {"namespaces": [name]}} for name in "ab"])
    with pytest.raises(ValueError, match="pool mining/idle-gpus is there twice"):
        company(pools=False).model_validate({"nodes": [{"name": "n"}], "pools": [POOL, POOL]})
