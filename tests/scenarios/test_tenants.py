"""Tenants: what they may hold, whose lease is next, and that over time each gets its part."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.api.tenant import Holds, Quota, TenantReason
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import TenantDefaults
from gpu_tenancy.core.status import REFRESH
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster

LONG = timedelta(seconds=5)
"""A step of those tests in which much time passes."""


def one_node(count: int = 8, mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count, mig=mig)
    cluster.run(1)
    return cluster


def said(cluster: Cluster, lease: str, kind: ConditionType = ConditionType.READY) -> tuple[str, str]:
    """Reason and message of a condition, once the lease has been looked at."""
    cluster.step()
    found = cluster.condition(lease, kind)
    return str(found.reason), found.message


def ready(cluster: Cluster, *leases: str) -> list[str]:
    return [lease for lease in leases if cluster.is_true(lease)]


# --- quotas


def test_a_lease_beyond_the_quota_waits_with_numbers_and_is_placed_once_another_has_ended() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 4})
    first = cluster.create("first", count=3)
    cluster.run(3)
    second = cluster.create("second", count=2)
    assert said(cluster, second) == (
        "OverQuota",
        "Position 1 in the queue: tenant acme holds 3 of 4 GPUs; this lease needs 2.",
    )
    assert cluster.leases[second].status.position == 1
    assert not cluster.is_true(second, ConditionType.STALLED)
    cluster.delete(first)
    cluster.run(5)
    assert cluster.is_true(second)


def test_a_smaller_lease_of_the_tenant_that_its_quota_allows_goes_first() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 4})
    cluster.create("first", count=3)
    large, small = cluster.create("large", count=2), cluster.create("small")
    cluster.run(3)
    assert ready(cluster, large, small) == [small]


def test_the_leases_of_all_namespaces_of_a_tenant_count_and_those_of_others_do_not() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", "lab", quota={"gpus": 4})
    leases = [cluster.create(f"l-{name}", count=2, namespace=name) for name in ("other", "team", "lab")]
    cluster.run(1)
    late = cluster.create("late", namespace="lab")
    cluster.run(3)
    assert ready(cluster, *leases, late) == leases


@pytest.mark.parametrize(
    ("quota", "sentence"),
    [
        ({"memory_slices": 11}, "tenant acme holds 8 of 11 memory slices; this lease needs 4."),
        ({"compute_slices": 9}, "tenant acme holds 7 of 9 compute slices; this lease needs 3."),
    ],
)
def test_slices_count_by_memory_and_by_compute_and_a_whole_gpu_has_eight_and_seven(
    quota: dict[str, int], sentence: str
) -> None:
    cluster = one_node(2, mig=(1,))
    cluster.add_tenant("acme", "team", quota=quota)
    cluster.create("whole")
    cluster.run(3)
    assert said(cluster, cluster.create("slice", "3g.40gb"))[1].endswith(sentence)
    small = cluster.create("small", "1g.10gb")
    cluster.run(3)
    assert cluster.is_true(small)


def test_a_quota_of_gpus_says_nothing_of_slices() -> None:
    cluster = one_node(2, mig=(1,))
    cluster.add_tenant("acme", "team", quota={"gpus": 0})
    lease = cluster.create("slice", "7g.80gb")
    cluster.run(3)
    assert cluster.is_true(lease)


def test_what_is_more_than_the_quota_alone_is_refused_for_good_and_looked_at_again_with_a_larger_quota() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 4})
    lease = cluster.create("train", count=2, pods=3)
    sentence = (
        "Tenant acme may hold 4 GPUs at a time; this lease needs 6. Make it smaller, or ask the platform team for a "
        "larger quota."
    )
    assert said(cluster, lease) == ("QuotaTooSmall", sentence)
    assert said(cluster, lease, ConditionType.STALLED) == ("QuotaTooSmall", sentence)
    assert cluster.leases[lease].status.position is None
    cluster.add_tenant("acme", "team", quota={"gpus": 6})
    cluster.run(3)
    assert cluster.is_true(lease)


def test_a_quota_that_is_lowered_ends_no_lease() -> None:
    cluster = one_node()
    lease = cluster.create("train", count=8)
    cluster.run(3)
    cluster.add_tenant("acme", "team", quota={"gpus": 1}, max_term="1s")
    cluster.run(5)
    assert cluster.is_true(lease)
    assert said(cluster, cluster.create("next", duration="1s", notice="0s"))[1].endswith(
        "tenant acme holds 8 of 1 GPU; this lease needs 1."
    )


def test_namespaces_without_a_tenant_have_the_default_limits_each() -> None:
    cluster = one_node()
    cluster.tenant_defaults = TenantDefaults(Quota(gpus=2), "1h")
    cluster.add_tenant("acme", "lab")
    leases = [cluster.create(f"l-{name}", count=2, namespace=name, duration="1h") for name in ("team", "other")]
    free = cluster.create("free", count=3, namespace="lab")
    late = cluster.create("late", duration="1h")
    cluster.run(3)
    assert ready(cluster, *leases, free, late) == [*leases, free]
    assert said(cluster, late)[1].endswith("namespace team holds 2 of 2 GPUs; this lease needs 1.")
    assert said(cluster, cluster.create("endless"))[0] == "TermTooLong"


def test_one_plan_places_no_more_than_the_quota_and_the_next_one_has_nothing_to_add() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 4})
    leases = [cluster.create(f"l{number}", count=1 + number % 2) for number in range(8)]
    cluster.step()
    admitted = sum(cluster.leases[lease].spec.gpus.count for lease in leases if cluster.slots_of(lease))
    assert admitted == 4
    cluster.run(3)
    assert cluster.last_plan.actions == ()


# --- terms


@pytest.mark.parametrize(
    ("duration", "has"),
    [("5h", "this one has 5h"), (None, "this one has no term.duration")],
)
def test_a_lease_that_is_longer_than_the_tenants_may_be_is_refused(duration: str | None, has: str) -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", max_term="4h")
    lease = cluster.create("train", duration=duration)
    sentence = (
        f"Leases of tenant acme may run for 4h at most; {has}. "
        "Set a term.duration that is not longer, or ask the platform team."
    )
    assert said(cluster, lease) == ("TermTooLong", sentence)
    assert cluster.is_true(lease, ConditionType.STALLED)
    cluster.edit(lease, duration="4h")
    cluster.run(3)
    assert cluster.is_true(lease)


@pytest.mark.parametrize(("duration", "asked"), [("5h", "5h"), (None, "without end")])
def test_an_extension_beyond_the_longest_term_is_refused_and_the_lease_runs_on(
    duration: str | None, asked: str
) -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", max_term="4h")
    lease = cluster.create("train", duration="2h")
    cluster.run(3)
    cluster.edit(lease, duration=duration)
    kept = f"term.duration {asked} was refused: tenant acme may lease for 4h at most; 2h stays in force. "
    assert said(cluster, lease, ConditionType.STALLED) == ("ExtensionRefused", f"{kept}Set a shorter one.")
    assert cluster.is_true(lease)
    cluster.edit(lease, duration="4h")
    assert said(cluster, lease, ConditionType.STALLED)[0] == "UpToDate"
    assert cluster.leases[lease].status.accepted_duration == "4h"


def test_a_lease_that_was_admitted_with_a_longer_term_may_be_shortened_to_one_that_is_still_too_long() -> None:
    cluster = one_node()
    lease = cluster.create("train", duration="8h")
    cluster.run(3)
    cluster.add_tenant("acme", "team", max_term="4h")
    cluster.edit(lease, duration="6h")
    cluster.run(1)
    assert cluster.leases[lease].status.accepted_duration == "6h"


# --- turns


def test_the_tenant_that_has_used_less_is_next_though_its_lease_is_younger() -> None:
    cluster = one_node(2)
    used = cluster.create("used", count=2, duration="30s", notice="1s")
    cluster.run(2)
    older, younger = cluster.create("older", count=2), cluster.create("younger", count=2, namespace="other")
    cluster.run(1)
    assert [cluster.leases[one].status.position for one in (older, younger)] == [2, 1]
    cluster.run(40)
    assert not cluster.is_true(used)
    assert ready(cluster, older, younger) == [younger]


def test_use_counts_for_less_with_more_weight() -> None:
    cluster = one_node(2)
    cluster.add_tenant("acme", "team", weight=3)
    for name in ("team", "other"):
        cluster.create(f"used-{name}", namespace=name, duration="30s", notice="1s")
    cluster.run(3)
    younger, older = cluster.create("y", count=2), cluster.create("x", count=2, namespace="other")
    cluster.leases[older] = replace(cluster.leases[older], created=cluster.leases[younger].created - LONG)
    cluster.run(40)
    assert ready(cluster, younger, older) == [younger]


def test_a_burst_of_a_tenant_that_had_nothing_takes_its_turn_and_not_everything() -> None:
    cluster = one_node()
    burst = [cluster.create(f"burst{number}") for number in range(8)]
    cluster.now += LONG
    others = [cluster.create(f"other{number}", namespace="other") for number in range(4)]
    cluster.run(3)
    assert len(ready(cluster, *burst)) == 4
    assert ready(cluster, *others) == others


def test_what_is_being_handed_over_counts_though_nobody_is_billed_for_it_yet() -> None:
    cluster = one_node()
    cluster.lags = lambda _: True
    first = [cluster.create(f"first{number}") for number in range(4)]
    cluster.run(2)
    late = [cluster.create(f"late{number}") for number in range(8)]
    cluster.now += LONG
    others = [cluster.create(f"other{number}", namespace="other") for number in range(8)]
    cluster.run(2)
    holding = {name: sum(bool(cluster.slots_of(one)) for one in those) for name, those in (("t", late), ("o", others))}
    assert len([one for one in first if cluster.slots_of(one)]) == 4
    assert holding == {"t": 0, "o": 4}


def test_a_restart_forgets_nothing_because_the_records_say_it() -> None:
    cluster = one_node(2)
    cluster.create("used", count=2, duration="30s", notice="1s")
    cluster.run(40)
    cluster.create("older", count=2)
    cluster.run(0.5)
    facts = cluster.snapshot()
    assert facts.past_usage.slice_seconds["team"] == pytest.approx(16 * 30, rel=0.01)
    fresh = replace(facts, nodes=tuple(replace(node) for node in facts.nodes))
    assert plan(fresh, cluster.now) == plan(facts, cluster.now)


# --- over time


class Market:
    """Tenants that always want more, on a cluster that is too small for them."""

    def __init__(
        self,
        weights: dict[str, int],
        gpus: int = 8,
        half_life: timedelta = timedelta(hours=1),
        step: timedelta = LONG,
    ) -> None:
        self.step = step
        self.cluster = one_node(gpus)
        self.cluster.tenant_defaults = TenantDefaults(half_life=half_life)
        self.laws = Laws(self.cluster)
        self.weights = weights
        self.had: Counter[str] = Counter()
        """Slices by steps."""
        self.waits: dict[str, int] = {}
        """Rounds that each lease has waited for, by UID."""
        self.longest = 0
        self.made = 0
        for name, weight in weights.items():
            self.cluster.add_tenant(name, name, weight=weight)

    def want(self, name: str, leases: int, seconds: int = 120) -> None:
        """So many leases of one GPU more."""
        for _ in range(leases):
            self.made += 1
            uid = self.cluster.create(f"l{self.made}", namespace=name, duration=f"{seconds}s", notice="1s")
            self.waits[uid] = 0

    def round(self) -> None:
        """Some time passes; those who have ended leave."""
        self.cluster.step(self.step)
        self.laws.check()
        for uid, lease in list(self.cluster.leases.items()):
            held = self.cluster.slots_of(uid)
            self.had[lease.key.namespace] += 8 * len(held)
            if held:
                self.waits.pop(uid, None)
            elif uid in self.waits:
                self.waits[uid] += 1
                self.longest = max(self.longest, self.waits[uid])
            if lease.status.ended is not None:
                self.cluster.delete(uid)

    def backlog(self, name: str) -> int:
        """Leases of a tenant that wait."""
        return sum(self.cluster.leases[uid].key.namespace == name for uid in self.waits)


@pytest.mark.parametrize("gpus", [6, 8])
def test_tenants_with_weights_three_to_one_come_to_three_to_one_of_the_slices(gpus: int) -> None:
    market = Market({"large": 3, "small": 1}, gpus, timedelta(hours=24), timedelta(minutes=1))
    for _ in range(600):
        for name in market.weights:
            market.want(name, 8 - market.backlog(name), 1200)
        market.round()
    assert market.had["large"] / market.had["small"] == pytest.approx(3, rel=0.1)


def test_who_was_away_gets_more_for_a_while_and_then_its_part() -> None:
    market = Market({"always": 1, "late": 1}, half_life=timedelta(minutes=10))
    for _ in range(120):
        market.want("always", 8 - market.backlog("always"))
        market.round()
    market.had.clear()
    for number in range(480):
        for name in market.weights:
            market.want(name, 8 - market.backlog(name))
        market.round()
        if number == 60:
            assert market.had["late"] > market.had["always"]
            market.had.clear()
        if number == 240:
            market.had.clear()
    assert market.had["late"] / market.had["always"] == pytest.approx(1, rel=0.15)


def test_a_burst_of_one_tenant_does_not_starve_the_other() -> None:
    market = Market({"steady": 1, "burst": 1})
    market.want("burst", 100)
    for number in range(150):
        if number % 12 == 0:
            market.want("steady", 2)
        market.round()
    assert not [
        uid
        for uid, waited in market.waits.items()
        if market.cluster.leases[uid].key.namespace == "steady" and waited > 30
    ]


@settings(max_examples=8)
@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=30, max_size=60), st.sampled_from([60, 120]))
def test_no_lease_waits_for_ever_while_tenants_of_equal_demand_come_and_go(order: list[str], seconds: int) -> None:
    market = Market(dict.fromkeys("abc", 1), gpus=4)
    for name in order:
        if market.backlog(name) < 4:
            market.want(name, 1, seconds)
        market.round()
    # At most twelve wait, four are served at a time, and each of those is through within its term and its hand-over.
    assert market.longest <= (12 / 4 + 1) * (seconds / LONG.total_seconds() + 6)


# --- what is said of a tenant


def test_a_tenants_status_says_what_it_holds_and_has_used() -> None:
    cluster = one_node(2, mig=(1,))
    cluster.add_tenant("acme", "team", "lab")
    cluster.create("whole")
    cluster.create("slice", "3g.40gb", namespace="lab")
    cluster.run(900, lambda: None)
    status = cluster.tenants["acme"].status
    [found] = status.conditions
    assert (found.status, found.reason, found.message) == (
        ConditionStatus.TRUE,
        TenantReason.SERVING,
        "Serves 2 namespaces.",
    )
    assert status.holds == Holds(gpus=1, memory_slices=12, compute_slices=10)
    assert status.share is not None
    assert float(status.share.slice_hours) == pytest.approx(12 * 0.25, rel=0.4)
    assert cluster.now - status.share.as_of <= REFRESH


def test_a_tenants_use_is_rewritten_now_and_then_only() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team")
    cluster.create("train")
    cluster.run(3)
    before, written = cluster.tenants["acme"].status, 0
    for _ in range(130):
        cluster.step(LONG)
        written += cluster.tenants["acme"].status != before
        before = cluster.tenants["acme"].status
    assert written == 2


def test_a_tenant_without_a_namespace_of_its_own_says_whose_they_are() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 2})
    cluster.run(1)
    cluster.add_tenant("zenith", "team", "lab", "other")
    cluster.add_tenant("acme", "team", "lab", quota={"gpus": 2})
    cluster.step()
    [served] = cluster.tenants["acme"].status.conditions
    [found] = cluster.tenants["zenith"].status.conditions
    assert (served.status, served.reason) == (ConditionStatus.TRUE, TenantReason.SERVING)
    assert (found.status, found.reason, found.message) == (
        ConditionStatus.FALSE,
        TenantReason.CONFLICT,
        (
            "Namespaces that belong to others: lab, team to tenant acme. Of two that claim a namespace the older one "
            "has it: take each namespace out of one of them."
        ),
    )


def test_a_tenant_that_cannot_be_read_says_so_and_its_namespaces_have_the_defaults() -> None:
    cluster = one_node()
    cluster.add_tenant("acme", "team", quota={"gpus": 2})
    cluster.tenants["acme"] = replace(cluster.tenants["acme"], spec=None, invalid="spec.weight: not a number")
    lease = cluster.create("train", count=8)
    cluster.run(3)
    [found] = cluster.tenants["acme"].status.conditions
    assert (found.status, found.reason) == (ConditionStatus.FALSE, TenantReason.INVALID_SPEC)
    assert found.message.startswith("spec.weight: not a number. Until it can be read, its namespaces are tenants")
    assert cluster.is_true(lease)


def test_reasons_that_wait_are_no_final_ones() -> None:
    cluster = one_node(1)
    cluster.add_tenant("acme", "team", quota={"gpus": 1})
    cluster.create("first")
    late, large = cluster.create("late"), cluster.create("large", count=2)
    cluster.run(3)
    refusals = cluster.last_plan.refusals
    assert (refusals[late].reason, refusals[late].final) == (Reason.OVER_QUOTA, False)
    assert (refusals[large].reason, refusals[large].final) == (Reason.IMPOSSIBLE, True)
