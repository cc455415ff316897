"""A replay: every lease is served, waits or is refused; slices are in one hand; the same again and again."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.api.lease import Reason, Tier
from gpu_tenancy.core.actions import CloseRecord, OpenRecord, Plan
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.simulate import replay
from gpu_tenancy.simulate.replay import Replay, UnsettledError
from gpu_tenancy.simulate.tally import MICROSECOND
from gpu_tenancy.simulate.trace import EPOCH
from tests.unit.simulate.company import Row, company, lived, outcome, trace

HAND_OVER: Final = 1.1
"""Seconds of a whole GPU's, unless a description says otherwise."""

# --- one lease --------------------------------------------------------------------------------------------------------


def test_a_lease_waits_for_the_hand_over_runs_for_its_term_and_is_billed_for_that() -> None:
    found = outcome(company(priceBooks=[_prices()]), trace({"duration": 600, "gpus": 2}))
    assert (found.all.asked, found.all.started, found.all.ended) == (1, 1, 1)
    assert found.all.waits.max == HAND_OVER
    assert found.all.gpu_hours == pytest.approx(2 * 600 / 3600, abs=1e-3)
    assert found.all.money == {"USD": "1.20"}
    assert found.conservation.holds


def test_a_slice_is_recut_and_a_gang_is_ready_when_all_of_it_is() -> None:
    nodes = [{"name": "n", "count": 2, "gpus": 2, "mig": 1}]
    found = outcome(
        company(nodes, handOver={"whole": 3, "recut": 5}),
        trace({"profile": "2g.20gb", "namespace": "a"}, {"pods": 2, "namespace": "b"}),
    )
    assert found.tenants["namespace a"].waits.max == 5
    assert found.tenants["namespace b"].waits.max == 3


def test_an_endless_lease_runs_to_the_end_of_the_simulation() -> None:
    found = outcome(company(), trace({"duration": ""}), until=EPOCH + timedelta(hours=2))
    assert (found.all.started, found.all.ended, found.all.waiting) == (1, 0, 0)
    assert found.seconds == 7200
    assert found.all.gpu_hours == pytest.approx(2, abs=1e-3)
    assert found.conservation.holds


def test_a_simulation_ends_when_nothing_is_left_that_a_lease_would_notice() -> None:
    found = outcome(company(), trace({"duration": 600}))
    billed_from = 2  # the first whole second in which its GPU is ready
    assert found.seconds == pytest.approx(billed_from + 600 + HAND_OVER)


def test_a_trace_of_nothing_is_a_simulation_of_nothing() -> None:
    found = outcome(company(), trace())
    assert (found.all.asked, found.seconds, found.series) == (0, 0.0, [])
    assert found.conservation.holds


# --- who goes for whom ------------------------------------------------------------------------------------------------


def test_a_firm_lease_takes_the_gpus_of_a_spot_lease_with_notice_and_the_spot_lease_comes_back() -> None:
    asked = trace(
        {"tier": "Spot", "gpus": 4, "duration": 3600, "notice": "1m"}, {"submitted": 600, "gpus": 4, "duration": 600}
    )
    found = outcome(company(), asked)
    assert found.tiers["OnDemand"].waits.max == pytest.approx(60 + HAND_OVER)
    assert (found.tiers["Spot"].preempted, found.tiers["Spot"].ended) == (1, 1)
    assert found.tiers["Spot"].gpu_hours == pytest.approx(4, abs=1e-3)
    assert found.conservation.holds


def test_no_lease_goes_for_mining_and_mining_makes_no_lease_wait() -> None:
    rows: list[Row] = [{"submitted": 300 * number, "gpus": 1 + number % 4} for number in range(12)]
    waits = {mining: outcome(company(policies={"mining": mining}), trace(*rows)).all.waits for mining in (True, False)}
    assert waits[True] == waits[False]


def test_a_lease_that_can_never_be_placed_is_refused_at_once_and_said_with_its_line() -> None:
    found = outcome(company(), trace({"gpus": 8}, {"model": "A100-PCIE-40GB"}, {"duration": 60}))
    assert (found.all.asked, found.all.refused, found.all.ended) == (3, 2, 1)
    assert [sentence.split(": ")[0] for sentence in found.refused] == ["line 2", "line 3"]
    assert all(len(sentence) > 20 for sentence in found.refused)


def test_a_quota_makes_a_tenant_wait_for_itself() -> None:
    tenants = [{"name": "acme", "spec": {"namespaces": ["team"], "quota": {"gpus": 2}}}]
    found = outcome(company(tenants=tenants), trace({"gpus": 2}, {"gpus": 2}))
    assert found.tenants["tenant acme"].waits.p50 == HAND_OVER
    assert found.tenants["tenant acme"].waits.max > 600


def test_what_a_lease_waits_for_is_never_no_lease() -> None:
    seen = Reasons()
    lived(company(), trace({"gpus": 4}, {"submitted": 60, "gpus": 4}), decide=seen)
    assert any("when 1 lease on n must have ended" in one for one in seen.told)
    assert [one for one in seen.told if "0 leases" in one] == []
    assert any("There will be as soon as n is handed over." in one for one in seen.told)


def test_a_commitment_is_kept_for_its_tenant_and_steps_with_its_ramp() -> None:
    begins = (EPOCH + timedelta(hours=1)).isoformat()
    grows = {"count": 4, "from": (EPOCH + timedelta(hours=2)).isoformat()}
    ends = (EPOCH + timedelta(hours=4)).isoformat()
    held = {"name": "base", "model": "A100-SXM4-80GB", "count": 2, "from": begins, "until": ends, "ramp": [grows]}
    spec = {"namespaces": ["team"], "tiers": ["Reserved", "OnDemand"], "commitments": [held]}
    others: list[Row] = [{"namespace": "other", "submitted": 600 * number, "duration": 900} for number in range(24)]
    mine: list[Row] = [{"submitted": 3 * 3600, "tier": "Reserved", "gpus": 4, "duration": 600}]
    asked = trace(*others, *mine)
    run = lived(company(tenants=[{"name": "acme", "spec": spec}]), asked, until=EPOCH + timedelta(minutes=170))
    [kept] = run.cluster.tenants[0].status.commitments
    assert (kept.count, kept.kept, kept.short) == (4, 4, 0)
    found = outcome(company(tenants=[{"name": "acme", "spec": spec}]), asked)
    assert found.tiers["Reserved"].waits.max == HAND_OVER
    assert found.tiers["OnDemand"].waits.max > 3600
    assert found.all.ended == 25


def test_an_end_before_the_beginning_is_a_simulation_of_no_time() -> None:
    found = outcome(company(), trace({"submitted": 60}), until=EPOCH)
    assert (found.seconds, found.all.started) == (0.0, 0)
    assert found.conservation.holds


# --- policies and faults ----------------------------------------------------------------------------------------------


def test_without_mining_nothing_mines() -> None:
    found = outcome(company(policies={"mining": False}), trace({}))
    assert found.shares[SliceState.MINING] == 0
    assert found.shares[SliceState.IDLE] > 0
    assert found.idle_mined_pct == 0


def test_a_gpu_is_converted_for_a_lease_that_waits_unless_the_policy_says_never() -> None:
    nodes = [{"name": "n", "gpus": 1, "convertible": True}]
    asked = trace({"profile": "3g.40gb", "duration": 600})
    until = EPOCH + timedelta(hours=1)
    assert outcome(company(nodes), asked, until=until).all.ended == 1
    assert outcome(company(nodes, policies={"conversion": False}), asked, until=until).all.ended == 0


def test_the_longest_term_of_a_namespace_is_a_policy() -> None:
    asked = trace({"duration": 7200})
    assert outcome(company(), asked).all.ended == 1
    refused = outcome(company(policies={"defaultMaxTerm": "1h"}), asked, until=EPOCH + timedelta(minutes=170))
    assert refused.all.started == 0


def test_what_breaks_is_mended_and_every_lease_ends_all_the_same() -> None:
    faults = {"nodeMeanDays": 0.1, "nodeRepair": "30m", "xidMeanDays": 0.2, "xidRepair": "10m"}
    nodes = [{"name": "n", "count": 3, "gpus": 2, "mig": 1}]
    rows: list[Row] = [
        {"submitted": 1800 * number, "duration": 7200, "pods": 1 + number % 3 // 2} for number in range(20)
    ]
    rows += [{"submitted": 900 * number, "duration": 3600, "profile": "3g.40gb"} for number in range(20)]
    found = outcome(company(nodes, faults=faults), trace(*rows), seed=3)
    assert found.faults > 10
    assert found.all.lost > 0
    assert found.all.ended == found.all.asked == 40
    assert found.shares[SliceState.FAULTY] > 0
    assert found.conservation.holds


def test_another_seed_breaks_other_things_and_none_breaks_nothing() -> None:
    faults = {"xidMeanDays": 0.5}
    asked = trace({"gpus": 4, "duration": 86_400})
    first, second, again = (outcome(company(faults=faults), asked, seed=seed) for seed in (1, 2, 1))
    assert first == again
    assert first.series != second.series
    assert outcome(company(faults=faults).faultless(), asked, seed=1).faults == 0


# --- for any trace ----------------------------------------------------------------------------------------------------

ROW: Final = st.fixed_dictionaries(
    {
        "submitted": st.integers(0, 3_000),
        "duration": st.sampled_from([1, 60, 599, 2_000]),
        "namespace": st.sampled_from(["a", "b", "c"]),
        "tier": st.sampled_from(["OnDemand", "Spot"]),
        "shape": st.sampled_from(
            [("full", 1, 1), ("full", 2, 1), ("full", 1, 2), ("1g.10gb", 1, 1), ("4g.40gb", 1, 2)]
        ),
    }
)
FAULTS: Final = st.sampled_from(
    [{}, {"xidMeanDays": 0.02, "xidRepair": "3m"}, {"nodeMeanDays": 0.02, "nodeRepair": "5m"}]
)
TENANTS: Final = st.sampled_from(
    [[], [{"name": "t", "spec": {"namespaces": ["a", "b"], "weight": 3, "quota": {"gpus": 2}}}]]
)


def rows(drawn: list[dict[str, Any]]) -> list[Row]:
    found: list[Row] = []
    for one in drawn:
        profile, gpus, pods = one.pop("shape")
        found.append({**one, "profile": profile, "gpus": gpus, "pods": pods})
    return found


@settings(max_examples=25)
@given(st.lists(ROW, min_size=1, max_size=12), FAULTS, TENANTS, st.integers(0, 3), st.booleans())
def test_any_trace_ends_with_every_slice_in_one_hand_and_every_lease_accounted_for(
    drawn: list[dict[str, Any]], faults: dict[str, object], tenants: list[dict[str, object]], seed: int, mining: bool
) -> None:
    nodes = [{"name": "n", "count": 2, "gpus": 2, "mig": 1, "convertible": True}]
    description = company(nodes, faults=faults, tenants=tenants, policies={"mining": mining})
    asked, closed = trace(*rows(drawn)), Reasons()
    run = lived(description, asked, seed=seed, decide=closed)
    assert closed.of.get(Tier.ON_DEMAND, set()) <= {Reason.EXPIRED, Reason.NODE_LOST}
    assert closed.together == 0
    slice_microseconds = 4 * 8 * ((run.tally.now - run.tally.began) // MICROSECOND)
    assert sum(run.tally.states.values()) == slice_microseconds
    assert sum(number for point in run.tally.points for number in point.states.values()) == slice_microseconds
    assert run.tally.states[SliceState.LEASED] == run.tally.leased
    assert run.tally.states[SliceState.CONTESTED] == 0
    sides = run.tally.sides.values()
    assert sum(side.asked for side in sides) == len(drawn)
    assert sum(side.ended + side.refused for side in sides) == len(drawn)
    assert len(run.refused) == sum(side.refused for side in sides)


class Reasons:
    """The planner, and why segments were closed that it closed."""

    def __init__(self) -> None:
        self.of: dict[Tier, set[Reason]] = {}
        self.together = 0
        """Segments of one lease that were open at a time beside another."""
        self.told: set[str] = set()
        """Why leases wait."""
        self._open: set[str] = set()

    def __call__(self, snapshot: Snapshot, now: datetime) -> Plan:
        decided = plan(snapshot, now)
        self.told |= {refusal.message for refusal in decided.refusals.values()}
        for action in decided.actions:
            if isinstance(action, CloseRecord):
                self.of.setdefault(action.record.spec.tier, set()).add(action.reason)
                self._open.discard(action.uid)
            elif isinstance(action, OpenRecord):
                self.together += action.lease.uid in self._open
                self._open.add(action.lease.uid)
        return decided


@settings(max_examples=10)
@given(st.lists(ROW, min_size=1, max_size=8), FAULTS, st.integers(0, 3))
def test_the_same_trace_and_seed_come_to_the_same(
    drawn: list[dict[str, Any]], faults: dict[str, object], seed: int
) -> None:
    nodes = [{"name": "n", "count": 2, "gpus": 2, "mig": 1}]
    description, asked = company(nodes, faults=faults), trace(*rows(drawn))
    once, again = (outcome(description, asked, seed=seed).model_dump_json() for _ in range(2))
    assert once == again


# --- the run itself ---------------------------------------------------------------------------------------------------


def test_how_far_it_is_is_told_and_ends_with_all() -> None:
    told: list[float] = []
    run = Replay(company(), trace(*({"submitted": 10 * number, "duration": 5} for number in range(200))))
    run.run(tell=told.append)
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] == 1.0


def test_a_plan_that_does_not_settle_is_a_sentence_and_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "_turn", lambda _: True)
    with pytest.raises(UnsettledError, match="the plan for 2026-01-01T00:00:00\\+00:00 does not settle"):
        Replay(company(), trace({})).run()
    assert replay.MOST_TURNS == 100


def _prices() -> dict[str, object]:
    rate = {"model": "A100-SXM4-80GB", "profile": "full", "perHour": "3.60"}
    spec = {"currency": "USD", "effectiveFrom": "2020-01-01T00:00:00Z", "rates": [rate]}
    return {"name": "list-prices", "spec": spec}
