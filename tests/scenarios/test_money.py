"""Prices and seconds: which book counts, when billing begins and ends, what a lease costs."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.lease import ConditionType, Price, Reason
from gpu_tenancy.api.pricebook import BookConditionType, BookReason
from gpu_tenancy.core.planner import plan
from tests.unit.core.builders import MODEL, START, book_spec
from tests.unit.core.simulation import Cluster


def cluster_with(**books: dict[str, str]) -> Cluster:
    """One node; each book begins a day after the one before, the last an hour ago."""
    cluster = Cluster()
    cluster.add_node("a", 4, mig={3})
    for number, (name, rates) in enumerate(reversed(books.items())):
        cluster.add_book(name, book_spec(rates, begins=START - timedelta(days=number, hours=1)))
    cluster.run(1)
    return cluster


def test_the_price_is_copied_when_the_lease_is_admitted_and_stays() -> None:
    cluster = cluster_with(old={"full": "36.00"})
    lease = cluster.create("train", count=2)
    cluster.run(3)
    cluster.add_book("dear", book_spec({"full": "99.00"}, begins=cluster.now))
    cluster.run(10)
    price = cluster.leases[lease].status.price
    assert price == Price(per_hour="36.00", currency="USD", book="old")
    assert [record.spec.price for record in cluster.records.values()] == [price]
    later = cluster.create("later")
    cluster.step()
    assert cluster.condition(later, ConditionType.ADMITTED).message == (
        "99.00 USD per device and hour, from PriceBook dear."
    )


def test_a_book_in_the_future_waits_for_its_time_and_wakes_the_plan() -> None:
    cluster = cluster_with(old={"full": "36.00"})
    cluster.nodes["a"].agent_until += timedelta(hours=1)
    begins = cluster.now + timedelta(seconds=20)
    cluster.add_book("next", book_spec({"full": "99.00"}, begins=begins))
    assert plan(cluster.snapshot(), cluster.now).next_wake == begins
    cluster.operator()
    assert _states(cluster, "next")[BookConditionType.IN_EFFECT] is BookReason.NOT_YET
    cluster.run(21)
    assert _states(cluster, "next")[BookConditionType.IN_EFFECT] is BookReason.IN_EFFECT
    assert _states(cluster, "old")[BookConditionType.IN_EFFECT] is BookReason.SUPERSEDED


def test_a_twin_of_the_book_in_effect_changes_nothing_but_is_told_of() -> None:
    cluster = cluster_with(old={"full": "36.00"})
    cluster.run(1)
    begins = cluster.now
    cluster.add_book("list", book_spec({"full": "72.00"}, begins=begins))
    cluster.run(1)
    cluster.add_book("twin", book_spec({"full": "7.20"}, begins=begins))
    cluster.run(1)
    stays = "PriceBook list stays in effect. Delete all but one."
    told = {one.type: one for one in cluster.books["list"].status.conditions}
    assert told[BookConditionType.IN_EFFECT].reason is BookReason.IN_EFFECT
    assert told[BookConditionType.CONFLICT].message == f"PriceBook twin has the same effectiveFrom; {stays}"
    told = {one.type: one for one in cluster.books["twin"].status.conditions}
    assert told[BookConditionType.IN_EFFECT].status is ConditionStatus.FALSE
    assert told[BookConditionType.CONFLICT].message == f"PriceBook list has the same effectiveFrom; {stays}"
    lease = cluster.create("train")
    cluster.run(3)
    assert _book_of(cluster, lease) == "list"


def test_books_of_one_instant_that_has_not_come_leave_the_price_before_them() -> None:
    cluster = cluster_with(old={"full": "36.00"})
    begins = cluster.now + timedelta(seconds=5)
    for name in ("one", "other"):
        cluster.add_book(name, book_spec({"full": "99.00"}, begins=begins))
        cluster.run(1)
    cluster.run(6)
    assert {_states(cluster, name)[BookConditionType.IN_EFFECT] for name in ("one", "other")} == {
        BookReason.SAME_INSTANT
    }
    lease = cluster.create("train")
    cluster.run(3)
    assert _book_of(cluster, lease) == "old"


def test_where_two_books_of_one_instant_are_all_there_is_both_say_that_nothing_is_sold() -> None:
    cluster = cluster_with()
    for name in ("one", "other"):
        cluster.add_book(name, book_spec({"full": "99.00"}, begins=START))
    lease = cluster.create("train")
    cluster.run(1)
    (message,) = {
        one.message for one in cluster.books["one"].status.conditions if one.reason is BookReason.SAME_INSTANT
    }
    assert message == "PriceBook other has the same effectiveFrom; no PriceBook is in effect. Delete all but one."
    assert cluster.condition(lease).reason is Reason.NO_RATE
    del cluster.books["other"]
    cluster.run(3)
    assert _book_of(cluster, lease) == "one"


def _book_of(cluster: Cluster, lease: str) -> str | None:
    price = cluster.leases[lease].status.price
    return price.book if price else None


def test_two_books_of_one_instant_conflict_and_the_older_price_stays() -> None:
    cluster = cluster_with(old={"full": "36.00"})
    for name in ("one", "other"):
        cluster.add_book(name, book_spec({"full": "99.00"}, begins=START))
    cluster.run(1)
    for name in ("one", "other"):
        assert _states(cluster, name)[BookConditionType.CONFLICT] is BookReason.SAME_INSTANT
    assert _states(cluster, "old")[BookConditionType.CONFLICT] is BookReason.NONE
    lease = cluster.create("train")
    cluster.run(3)
    price = cluster.leases[lease].status.price
    assert price is not None
    assert price.book == "old"


def test_without_a_rate_a_lease_is_refused_until_finance_adds_one() -> None:
    cluster = cluster_with(book={"full": "36.00"})
    lease = cluster.create("notebook", "3g.40gb")
    cluster.step()
    assert cluster.condition(lease).reason is Reason.NO_RATE
    assert cluster.condition(lease).message == (
        f"PriceBook book has no rate for profile 3g.40gb of model {MODEL} at tier OnDemand; "
        "finance must add one before it can be leased."
    )
    cluster.add_book("fixed", book_spec({"full": "36.00", "3g.40gb": "18.00"}))
    cluster.run(3)
    assert cluster.is_true(lease)


def test_books_of_which_none_has_begun_leave_no_rate() -> None:
    cluster = cluster_with()
    cluster.add_book("next", book_spec(begins=START + timedelta(days=1)))
    lease = cluster.create("train")
    cluster.step()
    assert cluster.condition(lease).message == (
        f"None of the PriceBooks is in effect, so there is no rate for profile full of model {MODEL} at tier OnDemand; "
        "finance must add one before it can be leased."
    )


def test_without_any_book_leases_run_unpriced_with_a_warning() -> None:
    cluster = cluster_with()
    lease = cluster.create("train", duration="5s", notice="1s")
    cluster.run(12)
    admitted = cluster.condition(lease, ConditionType.ADMITTED)
    assert admitted.reason is Reason.UNPRICED
    assert admitted.message.startswith("Warning")
    assert cluster.leases[lease].status.cost is None
    assert cluster.ledger(lease) == [(5, "Expired")]


def test_a_lease_that_names_no_model_is_placed_only_where_there_is_a_rate() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1, model="A100-PCIE-40GB")
    cluster.add_node("b", 1)
    cluster.add_book("book", book_spec({"full": "36.00"}))
    lease = cluster.create("train")
    cluster.run(3)
    assert [node for node, _ in cluster.slots_of(lease)] == ["b"]


def test_a_lease_that_is_placed_anew_stays_on_the_model_that_its_price_is_for() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1)
    cluster.add_node("b", 1, model="A100-PCIE-40GB")
    cluster.add_book("book", book_spec({"full": "36.00"}))
    lease = cluster.create("train")
    cluster.run(3)
    cluster.edit(lease, suspend=True)
    cluster.add_book("next", book_spec({"full": "9.00"}, begins=cluster.now, model="A100-PCIE-40GB"))
    cluster.run(4)
    cluster.edit(lease, suspend=False)
    cluster.run(4)
    assert [node for node, _ in cluster.slots_of(lease)] == ["a"]
    price = cluster.leases[lease].status.price
    assert price is not None
    assert price.per_hour == "36.00"


def test_billing_begins_when_the_last_device_is_ready_and_ends_with_the_term() -> None:
    cluster = cluster_with(book={"full": "3600.00"})
    cluster.lags = lambda _: cluster.now < START + timedelta(seconds=7)
    lease = cluster.create("train", count=3, duration="10s", notice="2s")
    cluster.run(30)
    (record,) = (record.spec for record in cluster.records.values())
    assert record.billable_from == START + timedelta(seconds=8)
    assert record.billable_to == START + timedelta(seconds=18)
    assert cluster.ledger(lease) == [(10, "Expired")]
    cost = cluster.leases[lease].status.cost
    assert cost is not None
    assert (cost.amount, cost.currency, cost.seconds) == ("30.00", "USD", 10)


def test_the_clock_of_an_agent_that_runs_ahead_or_behind_does_not_move_the_bill() -> None:
    for skew in (timedelta(hours=1), timedelta(hours=-1)):
        cluster = cluster_with(book={"full": "36.00"})
        lease = cluster.create("train")
        while not cluster.records:
            cluster.step()
            for device in cluster.nodes["a"].held.values():
                device.ready_at = device.ready_at and START + skew
        (record,) = (record.spec for record in cluster.records.values())
        decided = cluster.leases[lease].status.admitted_at
        assert decided is not None
        assert decided <= record.billable_from <= cluster.now + timedelta(seconds=1)


def test_running_cost_moves_on_transitions_and_else_every_five_minutes() -> None:
    cluster = cluster_with(book={"full": "3600.00"})
    lease = cluster.create("train")
    cluster.run(4)
    assert cluster.is_true(lease)
    seen = set()
    for _ in range(35):
        cluster.step(timedelta(seconds=20))
        cost = cluster.leases[lease].status.cost
        assert cost is not None
        seen.add(cost.seconds)
    assert len(seen) == 3
    assert max(seen) >= 600


@pytest.mark.parametrize(("devices", "seconds", "amount"), [(1, 1, "0.01"), (3, 7, "0.21"), (2, 30, "0.60")])
def test_money_is_exact_to_the_second(devices: int, seconds: int, amount: str) -> None:
    cluster = cluster_with(book={"full": "36.00"})
    lease = cluster.create("train", count=devices, duration=f"{seconds}s", notice="0s")
    cluster.run(seconds + 8)
    cost = cluster.leases[lease].status.cost
    assert cost is not None
    assert cost.amount == amount


def _states(cluster: Cluster, book: str) -> dict[BookConditionType, BookReason]:
    return {one.type: one.reason for one in cluster.books[book].status.conditions}
