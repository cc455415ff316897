"""What a simulation comes to: percentiles, fairness, shares, money and series; written, read again and compared."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.simulate.result import Conservation, Result, jain, percentile
from gpu_tenancy.simulate.tables import SHOWN, complaints, span, tables
from gpu_tenancy.simulate.trace import EPOCH
from tests.unit.simulate.company import PRICES, company, outcome, trace

# --- numbers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-9, 9), min_size=1), st.sampled_from([50, 95, 99, 100]))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[int], share: int) -> None:
    found = percentile(sorted(values), share)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= share * len(values)
    assert sum(value < found for value in values) * 100 < share * len(values)


@pytest.mark.parametrize(
    ("values", "index"),
    [([5.0, 5.0, 5.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([2.0, 1.0], 0.9), ([0.0, 0.0], 1.0), ([], 1.0)],
)
def test_jains_index_is_one_where_all_have_the_same_and_a_share_where_one_has_all(
    values: list[float], index: float
) -> None:
    assert jain(values) == pytest.approx(index)


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9), st.floats(0.1, 1e3))
def test_jains_index_does_not_depend_on_the_unit(values: list[float], unit: float) -> None:
    assert jain([value * unit for value in values]) == pytest.approx(jain(values), abs=1e-5)
    assert 1 / len(values) - 1e-6 <= jain(values) <= 1


def test_tenants_are_measured_by_their_weight() -> None:
    tenants = [{"name": "a", "spec": {"namespaces": ["a"], "weight": 3}}, {"name": "b", "spec": {"namespaces": ["b"]}}]
    asked = trace({"namespace": "a", "duration": 1800}, {"namespace": "b", "duration": 600})
    assert outcome(company(tenants=tenants), asked).jain == 1.0
    assert outcome(company(), asked).jain == pytest.approx(0.8)
    assert outcome(company(), asked).jain_of_demand == 1.0


# --- a whole result ---------------------------------------------------------------------------------------------------

ROWS: Final = (
    {"gpus": 4, "namespace": "a", "duration": 3600},
    {"gpus": 2, "namespace": "b", "submitted": 60, "duration": 3600},
    {"gpus": 1, "namespace": "b", "submitted": 120, "tier": "Spot"},
    {"gpus": 9, "namespace": "b", "submitted": 180},
)


def some_result(**policies: object) -> Result:
    mining = {"perGpuHour": "0.10", "currency": "EUR"}
    return outcome(company(priceBooks=[PRICES], mining=mining, policies=policies), trace(*ROWS))


def test_groups_add_up_to_all() -> None:
    found = some_result()
    for groups in (found.tiers, found.tenants):
        for name in ("asked", "started", "ended", "refused", "waiting", "preempted", "lost"):
            assert sum(getattr(group, name) for group in groups.values()) == getattr(found.all, name), name
        assert sum(group.gpu_hours for group in groups.values()) == pytest.approx(found.all.gpu_hours, abs=0.01)
        assert sum(float(group.money["USD"]) for group in groups.values()) == pytest.approx(
            float(found.all.money["USD"]), abs=0.02
        )


def test_shares_are_percents_of_all_and_mining_is_paid_for_its_own() -> None:
    found = some_result()
    assert sum(found.shares.values()) == pytest.approx(100, abs=0.001)
    hours = found.gpus * found.seconds / 3600 * found.shares[SliceState.MINING] / 100
    assert float(found.mined["EUR"]) == pytest.approx(0.1 * hours, abs=0.01)
    idle = sum(found.shares[state] for state in (SliceState.MINING, SliceState.IDLE, SliceState.HAND_OVER))
    assert found.idle_mined_pct == pytest.approx(100 * found.shares[SliceState.MINING] / idle, abs=0.01)


def test_a_simulation_without_idle_time_has_no_share_of_it() -> None:
    asked = trace({"gpus": 1, "duration": ""})
    nodes = [{"name": "n", "gpus": 1}]
    found = outcome(company(nodes, pools=False, handOver={"whole": 0}), asked, until=EPOCH + timedelta(hours=1))
    assert found.idle_mined_pct is None


def test_the_series_is_the_whole_time_in_equal_stretches() -> None:
    found = some_result()
    assert (len(found.series) - 1) * found.stretch_seconds < found.seconds <= len(found.series) * found.stretch_seconds
    assert all(sum(stretch.gpus.values()) == pytest.approx(found.gpus, abs=0.01) for stretch in found.series)
    assert [found.series[number].fits for number in (0, -1)] == [{"full": 0}, {"full": 2}]
    assert max(stretch.waiting for stretch in found.series) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"slice_microseconds": 101}, False),
        ({"leased_by_records": 59}, False),
        ({"by_state": {"leased": 60, "mining": 39, "contested": 1}}, False),
    ],
)
def test_conservation_holds_where_nothing_is_missing_and_nothing_is_there_twice(
    change: dict[str, object], holds: bool
) -> None:
    sound = {"slice_microseconds": 100, "by_state": {"leased": 60, "mining": 40}, "leased_by_records": 60}
    assert Conservation.model_validate({**sound, **change}).holds is holds


def test_a_result_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    found, path = some_result(), tmp_path / "result.json"
    path.write_text(found.model_dump_json(by_alias=True))
    assert Result.load(path) == found


@pytest.mark.parametrize("text", ["", "{", "[]", '{"title": "x"}', json.dumps({"title": 1})])
def test_what_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"result.json is no result of a simulation: "):
        Result.load(path)


# --- as tables --------------------------------------------------------------------------------------------------------


def shown(result: Result, against: Result | None = None) -> str:
    out = StringIO()
    console = Console(file=out, width=160, color_system=None)
    for table in tables(result, against):
        console.print(table)
    for sentence in complaints(result):
        console.print(sentence, markup=False, highlight=False)
    return out.getvalue()


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of that name."""
    [line, *_] = [line for line in text.splitlines() if line.strip("│ ").startswith(name)]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_tables_say_what_a_run_came_to_by_tier_and_by_tenant() -> None:
    text = shown(some_result())
    assert row(text, "leases asked for")[1] == "4"
    assert row(text, "every slice in one hand")[1] == "yes"
    assert row(text, "wait p50")[1] == "58.1 min"
    assert row(text, "OnDemand")[1:4] == ["3", "2", "1"]
    assert row(text, "namespace b")[1:4] == ["3", "2", "1"]
    assert "1 row of the trace was refused for good:" in text
    assert "  line 5: " in text


def test_two_runs_stand_side_by_side_with_what_is_different() -> None:
    text = shown(some_result(), some_result(mining=False))
    assert row(text, "mining slices")[2:] == ["–", ""]
    assert row(text, "leases asked for")[1:] == ["4", "4", "="]
    mined = row(text, "idle slices that mined")
    assert mined[2] == "0.000 %"
    assert mined[3] == f"+{float(mined[1].split()[0]):.4g}"
    assert "Tier OnDemand" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (120, "120.0 s"), (121, "2.0 min"), (-5400, "-90.0 min"), (9000, "2.5 h"), (1e6, "11.6 d")],
)
def test_times_are_shown_in_the_largest_unit_that_they_are_two_of(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_what_was_refused_is_shown_up_to_a_number_and_then_counted() -> None:
    many = {"unread": [f"line {number}: no." for number in range(2, SHOWN + 5)]}
    text = shown(some_result().model_copy(update=many))
    assert f"{SHOWN + 3} rows of the trace could not be read:" in text
    assert "… and 3 more; --json writes them all." in text
    assert f"line {SHOWN + 1}: no." in text
    assert f"line {SHOWN + 2}: no." not in text
