"""`gpu-tenancy simulate`: what it prints and writes, what it says of bad input, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner, Result

from gpu_tenancy.__main__ import main
from tests.unit.simulate.company import POOL, PRICES

EXAMPLES: Final = Path(__file__).parents[3] / "examples" / "simulate"
HEADER: Final = "name,namespace,submitted,duration,gpus,tier\n"
ROWS: Final = HEADER + "train,team,0,3600,4,OnDemand\nwait,team,60,600,2,OnDemand\nodd,team,soon,600,2,OnDemand\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a company and a trace, one row of which cannot be read."""
    nodes = [{"name": "n", "gpus": 4}]
    description = {"nodes": nodes, "pools": [POOL], "priceBooks": [PRICES], "faults": {"xidMeanDays": 0.1}}
    (tmp_path / "company.yaml").write_text(yaml.safe_dump(description))
    (tmp_path / "trace.csv").write_text(ROWS)
    return tmp_path


def simulate(folder: Path, *arguments: str, trace: str = "trace.csv") -> Result:
    options = ["simulate", str(folder / "company.yaml"), "--trace", str(folder / trace), *arguments]
    return CliRunner().invoke(main, options)


def written(folder: Path, *arguments: str, name: str = "result.json") -> dict[str, Any]:
    path = folder / name
    ran = simulate(folder, "--json", str(path), *arguments)
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_run_is_shown_with_the_rows_that_could_not_be_read(folder: Path) -> None:
    ran = simulate(folder, "--faults", "none")
    assert ran.exit_code == 0
    assert "company · trace, seed 0" in ran.output
    assert "1 row of the trace could not be read:" in ran.output
    assert 'line 4: submitted "soon" is no time; write 2026-01-31T12:00:00Z, or seconds.' in ran.output


def test_a_run_is_written_as_json_and_as_a_page(folder: Path) -> None:
    found = written(folder, "--html", str(folder / "page.html"))
    assert found["title"] == "company · trace"
    assert found["unread"] == ['line 4: submitted "soon" is no time; write 2026-01-31T12:00:00Z, or seconds.']
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(folder: Path) -> None:
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        written(folder, "--seed", seed, name=name)
    assert (folder / "first").read_bytes() == (folder / "again").read_bytes()
    assert (folder / "first").read_bytes() != (folder / "other").read_bytes()


def test_policies_and_faults_are_switched_on_the_command_line(folder: Path) -> None:
    assert written(folder, "--faults", "none")["faults"] == 0
    assert written(folder, "--policy", "mining=false", "--faults", "xid_mean_days=0.01")["mined"] == {}
    assert (
        written(folder, "--faults", "none", "--policy", "handOver.whole=5")["tiers"]["OnDemand"]["waits"]["p50"] == 5.0
    )


@pytest.mark.parametrize("until", ["30m", "2026-01-01T00:30:00Z", "2026-01-01 01:30:00+01:00", "2026-01-01T00:30:00"])
def test_a_run_ends_where_it_is_told_to(folder: Path, until: str) -> None:
    found = written(folder, "--until", until, "--faults", "none")
    assert found["seconds"] == 1800.0
    assert found["all"]["waiting"] == 1


def test_two_runs_are_shown_side_by_side(folder: Path) -> None:
    written(folder, "--faults", "none")
    page = folder / "page.html"
    ran = simulate(
        folder, "--faults", "none", "--policy", "mining=false", "--against", str(folder / "result.json"),
        "--html", str(page),
    )  # fmt: skip
    assert ran.exit_code == 0
    assert "the other" in ran.output
    assert "difference" in ran.output
    assert "Dashed: the other run." in page.read_text()


BAD: Final = {
    "a trace that is not there": (["--trace", "nowhere.csv"], "nowhere.csv"),
    "an end that is none": (["--until", "later"], '--until "later" is not understood; write 72h, or 2026-01-31T12:00'),
    "a policy that there is not": (["--policy", "mine=1"], "company.yaml: policies.mine: Extra inputs"),
    "a policy without a value": (["--policy", "mining"], '"mining" changes nothing; write name=value'),
    "a fault that there is not": (["--faults", "fire=1"], "company.yaml: faults.fire: Extra inputs"),
    "a result that is none": (["--against", "trace.csv"], "trace.csv is no result of a simulation"),
    "a mapping that is none": (["--mapping", "trace.csv"], "trace.csv is not a mapping"),
    "a file that cannot be written": (
        ["--json", "no/folder/result.json"],
        "no/folder/result.json cannot be written: there is no folder no/folder",
    ),
    "a page that cannot be written": (["--html", "no/folder/page.html"], "no/folder/page.html cannot be written"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence_on_standard_error_and_exit_status_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    arguments, said = BAD[name]
    ran = simulate(folder, *arguments)
    assert ran.exit_code == 2
    assert said in " ".join(ran.stderr.split())
    assert ran.stdout == ""
    assert "Traceback" not in ran.output


def test_a_description_and_a_trace_that_are_none_are_bad_input(folder: Path) -> None:
    (folder / "trace.csv").write_text("a,b\n1,2\n")
    ran = simulate(folder)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "trace.csv has no column submitted, gpus; it has a, b" in ran.stderr
    (folder / "company.yaml").write_text("nodes: 3\n")
    ran = simulate(folder)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "company.yaml: nodes: Input should be a valid list" in ran.stderr


def test_the_example_is_a_company_whose_trace_can_be_read_and_served(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = [str(EXAMPLES / "company.yaml"), "--trace", str(EXAMPLES / "trace.csv"), "--until", "12h"]
    ran = CliRunner().invoke(main, ["simulate", *arguments, "--json", str(path)])
    assert ran.exit_code == 0
    found = json.loads(path.read_text())
    assert found["unread"] == found["refused"] == []
    assert found["all"]["started"] > 20
