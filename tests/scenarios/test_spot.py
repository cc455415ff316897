"""Spot leases: they give way to firm ones, with notice, no more of them than must, and run on once there is room."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.api.tenant import Holds
from gpu_tenancy.core.snapshot import SpotLimits
from tests.unit.core.builders import book_spec
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster

NOTICE = 30
"""Seconds of notice where a lease does not ask for another."""


def one_node(count: int = 2, mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count, mig=mig)
    cluster.run(1)
    return cluster


def spot(
    cluster: Cluster,
    name: str = "spot",
    profile: str = "full",
    count: int = 1,
    pods: int = 1,
    **more: Any,  # noqa: ANN401  (handed on)
) -> str:
    """A spot lease with a Deployment on it, running."""
    namespace = more.pop("namespace", "team")
    lease = cluster.create(name, profile, count, pods, namespace=namespace, tier="Spot", **more)
    cluster.deploy(lease, cluster.leases[lease].spec.pods)
    cluster.run(3)
    return lease


def told(cluster: Cluster, *leases: str) -> list[str]:
    """Those of the leases that have notice."""
    return [one for one in leases if cluster.condition(one, ConditionType.PREEMPTED).reason is Reason.PREEMPTION_NOTICE]


def ready(cluster: Cluster, *leases: str) -> list[str]:
    return [one for one in leases if cluster.is_true(one)]


# --- one for one


def test_a_firm_lease_that_finds_no_room_gets_that_of_a_spot_lease_after_its_notice() -> None:
    cluster = one_node(1)
    victim = spot(cluster)
    firm = cluster.create("firm", namespace="other")
    cluster.step()
    notice = cluster.leases[victim].status.preemption
    assert notice is not None
    assert notice.cause == firm
    assert timedelta(0) <= notice.at - cluster.now - timedelta(seconds=NOTICE) < timedelta(seconds=1)
    assert cluster.condition(firm).reason is Reason.PREEMPTING
    assert cluster.condition(firm).message == (
        f"Position 1 in the queue: Waits for 1 spot lease to end by {notice.at:%Y-%m-%dT%H:%M:%SZ}; its room is held "
        "for it."
    )
    assert cluster.leases[firm].status.expected_start == notice.at
    cluster.run(NOTICE - 2)
    assert ready(cluster, victim, firm) == [victim]
    assert {pod.warned_of for pod in cluster.pods.values()} == {notice.at}
    cluster.run(8)
    assert ready(cluster, victim, firm) == [firm]
    assert cluster.condition(victim).reason is Reason.QUEUED
    assert cluster.is_true(victim, ConditionType.PREEMPTED)
    [record] = [record.spec for record in cluster.records.values() if record.spec.contract == victim]
    assert (record.billable_to, record.reason) == (notice.at, Reason.PREEMPTED)


def test_it_runs_on_with_what_is_left_of_its_term_at_its_price_once_there_is_room() -> None:
    cluster = one_node(1)
    cluster.add_book("book", book_spec())
    victim = spot(cluster, duration="100s", notice="1s")
    firm = cluster.create("firm", duration="20s", notice="1s")
    cluster.add_book("later", book_spec({"full": "9999.00"}, begins=cluster.now + timedelta(seconds=40)))
    cluster.run(NOTICE + 40)
    assert ready(cluster, victim, firm) == [victim]
    assert cluster.leases[victim].status.preemption is None
    assert cluster.condition(victim, ConditionType.PREEMPTED).reason is Reason.PREEMPTIBLE
    cluster.run(100)
    segments = cluster.ledger(victim)
    assert [reason for _, reason in segments] == ["Preempted", "Expired"]
    assert sum(seconds for seconds, _ in segments) == 100
    prices = {record.spec.price.per_hour for record in cluster.records.values() if record.spec.price}
    assert prices == {"3600.00"}


def test_a_firm_lease_is_never_taken_and_a_spot_lease_takes_nobody() -> None:
    cluster = one_node(1)
    firm = cluster.create("firm")
    cluster.run(3)
    other, cheap = cluster.create("other"), cluster.create("cheap", tier="Spot")
    cluster.run(60)
    assert ready(cluster, firm, other, cheap) == [firm]
    cluster.delete(firm)
    cluster.run(5)
    assert ready(cluster, other, cheap) == [other]


def test_miners_go_first_and_at_once() -> None:
    cluster = one_node(2)
    cluster.add_pool()
    victim = spot(cluster)
    firm = cluster.create("firm")
    cluster.run(5)
    assert ready(cluster, victim, firm) == [victim, firm]


def test_the_notice_is_as_long_as_the_lease_asks_for_and_the_platform_allows() -> None:
    cluster = one_node(1)
    cluster.spot_limits = SpotLimits(timedelta(minutes=2))
    proud = cluster.create("proud", tier="Spot", preemption_notice="3m")
    cluster.run(1)
    assert cluster.condition(proud).reason is Reason.NOTICE_TOO_LONG
    assert cluster.condition(proud).message == (
        "term.preemptionNotice may be 2m at most; this lease has 3m. Set a shorter one."
    )
    victim = spot(cluster, preemption_notice="90s")
    cluster.create("firm")
    cluster.step()
    notice = cluster.leases[victim].status.preemption
    assert notice is not None
    assert timedelta(seconds=90) <= notice.at - cluster.now < timedelta(seconds=91)


def test_what_does_not_run_yet_needs_no_notice() -> None:
    cluster = one_node(1)
    cluster.lags = lambda _: True
    victim = cluster.create("spot", tier="Spot")
    cluster.run(2)
    firm = cluster.create("firm")
    cluster.step()
    cluster.lags = lambda _: False
    cluster.run(4)
    assert ready(cluster, victim, firm) == [firm]
    assert cluster.ledger(victim) == []


def test_a_lease_that_ends_before_its_notice_has_run_out_ends_as_it_would_have() -> None:
    cluster = one_node(1)
    victim = spot(cluster, duration="10s", notice="1s")
    firm = cluster.create("firm")
    cluster.run(20)
    assert cluster.ledger(victim) == [(10, "Expired")]
    assert ready(cluster, firm) == [firm]


# --- as few as possible


def test_the_lease_that_loses_least_work_goes() -> None:
    cluster = one_node(2)
    old = spot(cluster, "old")
    cluster.run(60)
    young = spot(cluster, "young")
    cluster.create("firm")
    cluster.step()
    assert told(cluster, old, young) == [young]


def test_one_lease_goes_rather_than_two_where_it_costs_no_more() -> None:
    cluster = one_node(4)
    both = [spot(cluster, f"single-{number}") for number in range(2)]
    pair = spot(cluster, "pair", count=2)
    cluster.create("firm", count=2)
    cluster.step()
    assert told(cluster, *both, pair) == [pair]


def test_a_gang_is_taken_as_a_whole_and_two_firm_leases_share_what_comes_free() -> None:
    """Two one-GPU leases do not end two leases where one of them is enough for both."""
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.add_node(name, 2)
    cluster.run(1)
    gangs = [spot(cluster, f"gang-{number}", pods=2) for number in range(2)]
    firm = [cluster.create(f"firm-{number}") for number in range(2)]
    cluster.step()
    assert len(told(cluster, *gangs)) == 1
    cluster.run(NOTICE + 8)
    assert ready(cluster, *firm) == firm
    assert len(ready(cluster, *gangs)) == 1


def test_a_firm_lease_that_would_find_no_room_even_so_ends_nobody() -> None:
    cluster = one_node(4)
    cluster.create("firm")
    cluster.run(3)
    victims = [spot(cluster, f"spot-{number}") for number in range(3)]
    large = cluster.create("large", count=4)
    gang = cluster.create("gang", count=2, pods=2)
    cluster.run(5)
    assert told(cluster, *victims) == []
    assert [cluster.condition(one).reason for one in (large, gang)] == [Reason.QUEUED] * 2


def test_a_firm_gang_makes_exactly_those_go_that_it_needs() -> None:
    cluster = Cluster()
    for name in ("a", "b", "c"):
        cluster.add_node(name, 2)
    cluster.run(1)
    victims = [spot(cluster, f"spot-{number}") for number in range(5)]
    gang = cluster.create("gang", count=2, pods=2)
    cluster.step()
    gone = told(cluster, *victims)
    cluster.run(NOTICE + 8)
    assert ready(cluster, gang, *victims) == [gang, *(one for one in victims if one not in gone)]
    assert len(gone) == 3


def test_a_lease_that_is_ending_anyway_is_waited_for() -> None:
    cluster = one_node(2)
    ending = cluster.create("ending")
    cluster.run(3)
    victim = spot(cluster)
    firm = cluster.create("firm")
    cluster.delete(ending)
    cluster.run(8)
    assert ready(cluster, victim, firm) == [victim, firm]
    assert cluster.condition(victim, ConditionType.PREEMPTED).reason is Reason.PREEMPTIBLE


def test_slices_make_room_at_a_place_where_the_profile_can_begin() -> None:
    cluster = one_node(1, mig=(0,))
    victims = [spot(cluster, f"spot-{number}", profile="1g.10gb") for number in range(7)]
    firm = cluster.create("firm", "3g.40gb")
    cluster.step()
    gone = told(cluster, *victims)
    assert len(gone) in {3, 4}
    cluster.run(NOTICE + 8)
    assert ready(cluster, firm, *victims) == [firm, *(one for one in victims if one not in gone)]


def test_room_in_cpu_is_made_as_well() -> None:
    cluster = one_node(2)
    victim = spot(cluster, cpu="100", memory="1Gi")
    firm = cluster.create("firm", cpu="64", memory="1Gi")
    cluster.step()
    assert told(cluster, victim) == [victim]
    cluster.run(NOTICE + 8)
    assert ready(cluster, firm) == [firm]


# --- what is freed is the beneficiary's


def test_the_first_victim_to_go_does_not_come_back_while_the_second_has_notice() -> None:
    cluster = one_node(2)
    first = spot(cluster, "first", duration="60s", notice="1s")
    second = spot(cluster, "second", preemption_notice="2m")
    firm = cluster.create("firm", count=2)
    cluster.step()
    assert told(cluster, first, second) == [first, second]
    cluster.delete(first)
    late = cluster.create("late", tier="Spot")
    cluster.run(100)
    assert ready(cluster, second, firm, late) == [second]
    cluster.run(30)
    assert ready(cluster, second, firm, late) == [firm]
    assert [reason for _, reason in cluster.ledger(second)] == ["Preempted"]


def test_neither_miners_nor_later_leases_get_what_is_held() -> None:
    cluster = one_node(3)
    cluster.add_pool()
    spot(cluster, count=2)
    cluster.run(2)
    assert cluster.mining() == {"full": 1}
    firm = cluster.create("firm", count=3)
    cluster.run(2)
    late = cluster.create("late")
    cluster.run(5)
    assert cluster.mining() == {}
    assert ready(cluster, firm, late) == []
    cluster.run(NOTICE)
    assert ready(cluster, firm, late) == [firm]


def test_the_beneficiary_keeps_its_turn_though_another_tenant_has_had_less() -> None:
    cluster = one_node(1)
    victim = spot(cluster, namespace="third")
    firm = cluster.create("firm")
    cluster.run(2)
    cluster.add_tenant("zenith", "other", weight=1000)
    late = cluster.create("late", namespace="other")
    cluster.run(NOTICE + 8)
    assert ready(cluster, victim, firm, late) == [firm]


@pytest.mark.parametrize("change", ["deleted", "suspended", "placed elsewhere"])
def test_a_notice_is_taken_back_where_it_is_not_needed_any_more(change: str) -> None:
    cluster = one_node(2)
    keeper = cluster.create("keeper")
    cluster.run(3)
    victim = spot(cluster)
    firm = cluster.create("firm")
    cluster.run(10)
    assert told(cluster, victim) == [victim]
    if change == "deleted":
        cluster.delete(firm)
    elif change == "suspended":
        cluster.edit(firm, suspend=True)
    else:
        cluster.delete(keeper)
    cluster.run(6)
    assert cluster.condition(victim, ConditionType.PREEMPTED).reason is Reason.NOTICE_WITHDRAWN
    assert cluster.leases[victim].status.preemption is None
    assert {pod.warned_of for pod in cluster.pods.values() if pod.claim.holder == victim} == {None}
    cluster.run(NOTICE)
    assert ready(cluster, victim) == [victim]
    assert cluster.ledger(victim) == []


def test_no_lease_goes_twice_for_one_that_waits_once() -> None:
    cluster = one_node(1)
    victim = spot(cluster)
    firm = cluster.create("firm")
    while firm not in {slot.holder.uid for slot in cluster.nodes["a"].slots}:
        cluster.step()
    cluster.lags = lambda _: True
    cluster.run(2)
    cluster.edit(firm, suspend=True)
    cluster.lags = lambda _: False
    cluster.run(16)
    assert not cluster.ledger(firm), "it has never run"
    assert ready(cluster, victim) == [victim]
    assert cluster.leases[victim].status.preempted_for == [firm]
    cluster.edit(firm, suspend=False)
    cluster.run(NOTICE + 10)
    assert ready(cluster, victim) == [victim]
    other = cluster.create("other")
    cluster.run(NOTICE + 10)
    assert ready(cluster, other) == [other]


def test_who_has_run_and_waits_again_may_make_the_same_one_go_once_more() -> None:
    cluster = one_node(1)
    victim = spot(cluster)
    firm = cluster.create("firm")
    for number in range(2):
        cluster.edit(firm, suspend=False)
        cluster.run(NOTICE + 12)
        assert ready(cluster, firm) == [firm]
        cluster.edit(firm, suspend=True)
        cluster.run(12)
        assert ready(cluster, victim) == [victim]
        assert len(cluster.leases[victim].status.preempted_for) == number + 1


def test_a_victim_whose_pods_do_not_stop_keeps_neither_other_victims_nor_other_leases_waiting() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.add_node(name, 1)
    cluster.run(1)
    victims = [spot(cluster, f"spot-{number}") for number in range(2)]
    cluster.nodes["a"].stuck = True
    firm = [cluster.create(f"firm-{number}") for number in range(2)]
    cluster.run(NOTICE + 10)
    assert len(ready(cluster, *firm)) == 1
    assert ready(cluster, *victims) == []
    assert [len(cluster.slots_of(one)) for one in firm] == [1, 1]


def test_with_a_notice_running_nothing_is_written_until_it_ends() -> None:
    cluster = one_node(2)
    cluster.add_pool()
    spot(cluster, count=2)
    firm = cluster.create("firm")
    cluster.run(3)
    notice = cluster.leases[firm].status.expected_start
    for _ in range(40):
        reports = cluster.reports
        cluster.step()
        assert not cluster.last_plan.actions
        assert cluster.reports == reports
        assert cluster.last_plan.next_wake == notice


def test_an_operator_that_was_away_ends_only_whom_it_still_has_to_and_bills_up_to_the_deadline() -> None:
    for deleted in (False, True):
        cluster = one_node(1)
        victim = spot(cluster)
        firm = cluster.create("firm")
        cluster.step()
        notice = cluster.leases[victim].status.preemption
        assert notice is not None
        if deleted:
            cluster.delete(firm)
        for _ in range(200):
            cluster.now += timedelta(seconds=1)
            cluster.everybody_else()
        cluster.run(8)
        assert ready(cluster, victim) == ([victim] if deleted else [])
        records = [record.spec for record in cluster.records.values() if record.spec.contract == victim]
        assert [record.billable_to for record in records] == [None if deleted else notice.at]


# --- who may, and what it costs


def test_a_tenant_may_be_held_to_some_tiers() -> None:
    cluster = one_node(1)
    cluster.add_tenant("acme", "team", tiers=["Spot"])
    firm = cluster.create("firm")
    cluster.run(3)
    assert cluster.condition(firm).reason is Reason.TIER_NOT_ALLOWED
    assert cluster.condition(firm).message == (
        "Leases of tenant acme may be of tier Spot; this one is OnDemand. Make a new lease of another tier, or ask the "
        "platform team."
    )
    assert ready(cluster, spot(cluster)) != []


def test_the_price_is_that_of_the_tier() -> None:
    cluster = one_node(2)
    book = book_spec()
    cheap = book.rates[0].model_copy(update={"tier": "Spot", "per_hour": "1800.00"})
    cluster.add_book("book", book.model_copy(update={"rates": [*book.rates, cheap]}))
    leases = [cluster.create("firm"), cluster.create("spot", tier="Spot")]
    cluster.run(3)
    prices = [cluster.leases[one].status.price for one in leases]
    assert [price.per_hour for price in prices if price] == ["3600.00", "1800.00"]
    records = {record.spec.lease_name: record.spec.tier for record in cluster.records.values()}
    assert records == {"firm": "OnDemand", "spot": "Spot"}


def test_what_is_being_freed_counts_towards_the_quota_of_whom_it_is_for() -> None:
    cluster = one_node(2)
    spot(cluster, namespace="other", count=2)
    cluster.add_tenant("acme", "team", quota={"gpus": 1})
    leases = [cluster.create(f"l-{number}") for number in range(2)]
    cluster.step()
    assert [cluster.condition(one).reason for one in leases] == [Reason.PREEMPTING, Reason.OVER_QUOTA]
    assert cluster.tenants["acme"].status.holds == Holds()


def test_laws_hold_all_the_way() -> None:
    cluster = one_node(2, mig=(1,))
    cluster.add_pool()
    laws = Laws(cluster)
    victims = [spot(cluster, "whole"), spot(cluster, "slice", profile="3g.40gb")]
    firm = [cluster.create("firm", duration="20s", notice="1s"), cluster.create("full", "7g.80gb", works=5.0)]
    cluster.run(NOTICE + 50, laws.check)
    assert [[reason for _, reason in cluster.ledger(one)] for one in firm] == [["Expired"], ["Completed"]]
    assert ready(cluster, *victims) == victims


def test_a_gang_makes_the_cheapest_go_though_they_lie_where_its_other_pods_are() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1, mig={0})
    cluster.run(1)
    for number in range(2):
        cluster.create(f"firm-{number}", "1g.10gb")
    cluster.run(4)
    dear = cluster.create("dear", "1g.10gb", pods=2, tier="Spot")
    spot = [dear]
    for name in ("middle", "cheap"):
        for _ in range(60):
            cluster.step(timedelta(seconds=2))
        spot.append(cluster.create(name, "1g.10gb", tier="Spot"))
        cluster.run(4)
    cluster.create("gang", "1g.10gb", pods=4)
    cluster.run(1)
    told = [one for one in spot if cluster.leases[one].status.preemption is not None]
    assert told == [dear, spot[2]], "two slices and one more are enough, and the cheapest one does"
