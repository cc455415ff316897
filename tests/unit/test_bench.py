"""What the benches say about their figures: the command that makes them, and what they hold under. Nothing is measured.

A figure that nobody can make again, or whose conditions are not said beside it, proves nothing.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import pytest
from click.testing import CliRunner

from tests.bench import __main__ as bench
from tests.bench import agent, burst, handover, replay, writes
from tests.bench.agent import Idle
from tests.bench.figures import Figure, NotMeasurable, figure, percentile
from tests.bench.replay import Outcome
from tests.bench.timeline import Mark, Timeline

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
    assert "no bench plan_increment_ms; there are control_plane_ready_s, plan_decision_us" in ran.output


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


def hand_over(*marks: float, **steps: float) -> Timeline:
    """A hand-over with these seconds from one mark to the next, and these steps in milliseconds."""
    line = Timeline("train")
    at = 1_700_000_000.0
    for mark, seconds in zip(Mark, (0.0, *marks), strict=True):
        at += seconds
        line.mark(mark, at)
    line.steps = steps
    return line


HAND_OVER: Final = (0.1, 0.9, 0.02, 0.01, 0.03, 0.06, 0.2)


def test_the_parts_of_a_hand_over_add_up_to_all_of_it() -> None:
    line = hand_over(*HAND_OVER, Evict=250, Scrub=450)
    assert line.seconds == pytest.approx(1.32)
    parts = line.parts()
    assert sum(parts.values()) == pytest.approx(1320, abs=0.1)
    assert parts["agent: Scrub"] == 450
    assert line.own_milliseconds == pytest.approx(480, abs=0.1)
    assert parts["agent: hears of the spec, and between steps"] == pytest.approx(200, abs=0.1)


def test_only_the_first_time_that_something_is_seen_counts() -> None:
    line = Timeline("train")
    line.mark(Mark.BOUND, 1.0)
    line.mark(Mark.BOUND, 2.0)
    assert line.marks == {Mark.BOUND: 1.0}


def test_hand_overs_say_how_eight_at_once_compare_to_one_and_where_the_time_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = hand_over(*HAND_OVER, Scrub=450)
    eight = [hand_over(*(2 * seconds for seconds in HAND_OVER), Scrub=900)] * 8
    monkeypatch.setattr(handover, "missing", lambda: None)
    monkeypatch.setattr(handover, "_whole", answering(([one], eight[:1], [eight], [one])))
    found = {one.name: one for one in handover.run_whole(1)}
    assert list(found) == [
        "handover_whole_s", "handover_token_s", "handover_node_ratio", "handover_eight_s", "handover_eight_ratio",
        "handover_eight_own_ms",
    ]  # fmt: skip
    assert found["handover_eight_ratio"].median == found["handover_node_ratio"].median == pytest.approx(2)
    assert found["handover_whole_s"].parts["agent: Scrub"].median == 450
    assert found["handover_eight_s"].parts["agent: Scrub"].median == 900
    assert "1.2" in found["handover_whole_s"].goal


def test_a_figure_that_cannot_be_measured_here_says_why_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(handover, "missing", lambda: "A real kubelet needs root.")
    sound = {"sound": lambda _: [figure("sound", [1.0], "s", "", parts={"waiting": [400.0, 600.0]})]}
    monkeypatch.setattr(bench, "OUTPUT", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "BENCHES", {"handover_mig_s": handover.run_mig, **sound})
    ran = CliRunner().invoke(bench.main)
    assert ran.exit_code == 0
    assert "handover_mig_s is not measured: A real kubelet needs root." in ran.output
    [written] = json.loads((tmp_path / "bench.json").read_text())
    assert written["name"] == "sound"
    assert written["parts"] == {"waiting": {"median": 500.0, "p95": 600.0}}


def test_the_agent_s_figures_say_how_many_slices_they_hold_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "_idle", answering(([Idle(90.0, 80.0, 0.5, 120.0)], [16.0])))
    monkeypatch.setattr(agent, "_prepare", answering([5.0] * 99 + [80.0]))
    figures = [*agent.run_idle(1), *agent.run_prepare(1)]
    assert [one.goal for one in figures if "56 slices" not in one.goal and one.name != "dra_prepare_p99_ms"] == []
    assert next(one for one in figures if one.name == "dra_prepare_p99_ms").median == 5.0


def test_the_simulated_driver_is_not_asked_for_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotMeasurable, match="needs Linux; this is darwin"):
        agent.run_idle(1)


@pytest.mark.parametrize(("count", "share", "rank"), [(20, 0.95, 19), (100, 0.99, 99), (100, 0.07, 7), (21, 0.95, 20)])
def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed(count: int, share: float, rank: int) -> None:
    assert percentile(range(count, 0, -1), share) == rank


def test_a_percentile_of_few_samples_is_one_of_them() -> None:
    assert percentile([3.0]) == percentile([3.0], 0.0) == 3.0
    assert percentile([1.0, 2.0], 1.0) == 2.0
