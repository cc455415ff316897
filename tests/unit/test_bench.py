"""What the benches say about their figures: the command that makes them, and what they hold under. Nothing is measured.

A figure that nobody can make again, or whose conditions are not said beside it, proves nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import pytest
from click.testing import CliRunner

from tests.bench import __main__ as bench
from tests.bench import burst, replay, writes
from tests.bench.figures import Figure, figure
from tests.bench.replay import Outcome

T = TypeVar("T")

TRACE: Final = "the traces/philly.csv"


def answering(result: T) -> Callable[..., Awaitable[T]]:
    """In place of a run: what it would have found."""

    async def run(*_: object) -> T:
        return result

    return run


@pytest.mark.parametrize("trace", ["", TRACE])
def test_every_figure_says_the_command_that_makes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str
) -> None:
    made_by: dict[str, str] = {}
    monkeypatch.chdir(tmp_path)
    Path(TRACE).parent.mkdir()
    Path(TRACE).touch()

    def faked(name: str) -> bench.Bench:
        def run(_: int) -> list[Figure]:
            made_by.update({f"{name}-{number}": name for number in range(2)})
            return [figure(f"{name}-{number}", [1.0], "", "") for number in range(2)]

        return run

    monkeypatch.setenv("TRACE", trace)
    monkeypatch.setattr(bench, "OUTPUT", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "BENCHES", {name: faked(name) for name in bench.BENCHES})
    ran = CliRunner().invoke(bench.main)
    assert ran.exit_code == 0
    commands = {one["name"]: shlex.split(one["command"]) for one in json.loads((tmp_path / "bench.json").read_text())}
    assert {name: command[:3] for name, command in commands.items()} == {
        name: ["make", "bench", f"ONLY={bench_name}"] for name, bench_name in made_by.items()
    }
    rest = {name.rpartition("-")[0]: command[3:] for name, command in commands.items() if command[3:]}
    assert rest == ({"philly_replay_leases": [f"TRACE={trace}"]} if trace else {})


def test_a_trace_that_there_is_not_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACE", "no such/trace.csv")
    ran = CliRunner().invoke(bench.main)
    assert ran.exit_code != 0
    assert "TRACE=no such/trace.csv is no file; give the path of a trace" in ran.output


def test_a_bench_that_there_is_not_is_refused_with_the_names_of_those_there_are() -> None:
    ran = CliRunner().invoke(bench.main, ["plan_increment_ms"])
    assert ran.exit_code != 0
    assert "no bench plan_increment_ms; there are control_plane_ready_s, plan_decision_us, lease_ready_s" in ran.output


def test_a_replay_without_a_trace_says_what_it_needs_and_what_is_replayed_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replay, "_replay", answering(Outcome(300, [1.0], 0.9)))
    first, *others = replay.run(None)
    assert "philly_replay_leases needs TRACE=, the path of a trace; instead 300 jobs made up" in capsys.readouterr().err
    assert (first.name, first.median) == ("sample_replay_leases", 300)
    assert first.goal == "300 of 300 made-up jobs, billed exactly"
    assert all(one.name.startswith("sample_replay_") for one in others)


def test_a_replay_of_a_trace_yields_the_figure_that_is_promised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp,duration,num_gpus,cluster\n2017-10-03 00:00:00,60,1,a\n2017-10-03 01:00:00,90,16,b\n")
    monkeypatch.setattr(replay, "_replay", answering(Outcome(2, [1.0], 0.9)))
    first, *_ = replay.run(str(trace))
    assert (first.name, first.median, first.goal) == ("philly_replay_leases", 2, "2 of 2 jobs, billed exactly")


def test_every_figure_of_the_burst_says_its_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst, "one_run", answering(burst.Run(raw=50.0, ready=45.0, leased=40.0, with_job=30.0)))
    figures = [*burst.run_raised(1), *burst.run_default(1)]
    assert len({one.name for one in figures}) == len(figures)
    assert [one.name for one in figures if "nothing mines, ≤ 64 bare pods not Running" not in one.goal] == []
    assert [one.goal for one in figures if "burst_ratio" in one.name and "≥ 0.5, aim 0.8" not in one.goal] == []


def test_every_figure_of_the_writes_says_its_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writes, "_measure", answering(([writes.Cost(6.0, 1.0)], [writes.Cost(7.0, 3.0)])))
    assert {one.name.removeprefix("api_writes_per_lease_"): one.goal for one in writes.run(1)} == {
        "operator": "≤ 10 (in a burst of 128; nothing mines)",
        "agent": "≤ 4 (in a burst of 128; nothing mines)",
        "operator_alone": "≤ 10 (one lease at a time; nothing mines)",
        "agent_alone": "≤ 4 (one lease at a time; nothing mines)",
    }
