"""What is kept for later: the place of the first in the queue, reservations, commitments; and extensions."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from gpu_tenancy.api.base import ConditionStatus, format_time
from gpu_tenancy.api.lease import ConditionType
from gpu_tenancy.api.tenant import TenantReason
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.promises import LEAD
from tests.unit.core.builders import MODEL, START
from tests.unit.core.simulation import Cluster

STEP = timedelta(seconds=5)
"""A step where much time passes."""


def one_node(count: int = 8, mig: tuple[int, ...] = ()) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", count, mig=mig)
    cluster.run(1)
    return cluster


def until(cluster: Cluster, at: datetime) -> None:
    """Let time pass, in long steps."""
    while cluster.now < at:
        cluster.step(min(STEP, at - cluster.now))


def after(minutes: float) -> str:
    return format_time(START + timedelta(minutes=minutes))


def ready(cluster: Cluster, *leases: str) -> list[str]:
    return [lease for lease in leases if cluster.is_true(lease)]


def said(cluster: Cluster, lease: str, kind: ConditionType = ConditionType.READY) -> tuple[str, str]:
    """Reason and message of a condition."""
    found = cluster.condition(lease, kind)
    return str(found.reason), found.message


def settles(cluster: Cluster) -> bool:
    """Planning again for the same instant writes nothing more."""
    cluster.operator()
    return not plan(cluster.snapshot(), cluster.now).actions


# --- the first in the queue


def test_small_leases_go_ahead_of_a_large_one_only_as_long_as_they_do_not_delay_it() -> None:
    cluster = one_node(2)
    first = cluster.create("first", duration="10m")
    cluster.run(3)
    large = cluster.create("large", count=2)
    cluster.run(2)
    short = cluster.create("short", duration="5m")
    long = cluster.create("long", duration="20m")
    endless = cluster.create("endless")
    cluster.run(4)
    assert ready(cluster, first, short, long, endless) == [first, short]
    ends = cluster.leases[first].status.expires_at
    assert ends is not None
    assert cluster.leases[large].status.expected_start == ends
    assert said(cluster, large)[1] == (
        f"Position 1 in the queue: needs 2 free GPUs ({MODEL}) on one node; the best node has 0 beside the leases that "
        f"run. There will be by {format_time(ends)}, when 2 leases on a must have ended."
    )
    assert "1 more GPU is free and kept for others" not in said(cluster, long)[1]
    until(cluster, ends + timedelta(minutes=1))
    assert ready(cluster, large, long, endless) == [large]


def test_what_becomes_free_is_kept_for_a_large_lease_though_nobody_knows_when_the_rest_will() -> None:
    cluster = one_node(2)
    leases = [cluster.create(f"lease-{number}") for number in range(2)]
    cluster.run(3)
    large = cluster.create("large", count=2)
    cluster.run(1)
    small = cluster.create("small", duration="1m")
    cluster.run(1)
    cluster.delete(leases[0])
    cluster.run(6)
    assert ready(cluster, small) == []
    assert said(cluster, small)[1].endswith(
        "the best node has 0 beside the leases that run; 1 more GPU is free and kept for others."
    )
    assert settles(cluster)
    cluster.delete(leases[1])
    cluster.run(6)
    assert ready(cluster, large) == [large]


def test_what_is_kept_is_no_more_than_the_large_lease_needs_and_miners_use_it() -> None:
    cluster = one_node(4)
    cluster.add_pool()
    cluster.create("first", count=3, duration="10m")
    cluster.run(3)
    cluster.create("large", count=3)
    cluster.run(1)
    small = cluster.create("small")
    cluster.run(4)
    assert ready(cluster, small) == [small], "the large lease needs the three, and not the fourth"
    other = one_node(2)
    other.add_pool()
    other.create("first", duration="10m")
    other.run(3)
    other.create("large", count=2)
    other.run(4)
    assert other.mining()["full"] == 1


def test_the_place_of_slices_is_kept_too() -> None:
    cluster = one_node(1, mig=(0,))
    small = [cluster.create(f"small-{number}", "1g.10gb", duration="10m") for number in range(2)]
    cluster.run(3)
    wide = cluster.create("wide", "7g.80gb")
    cluster.run(1)
    endless = cluster.create("endless", "1g.10gb")
    short = cluster.create("short", "1g.10gb", duration="5m")
    cluster.run(4)
    assert ready(cluster, *small, endless, short) == [*small, short]
    until(cluster, START + timedelta(minutes=11))
    assert ready(cluster, wide, endless) == [wide]


# --- reservations


def test_devices_are_promised_from_a_start_and_used_by_others_until_then() -> None:
    cluster = one_node(2)
    cluster.add_pool()
    late = cluster.create("late", count=2, duration="10m", start=after(10))
    cluster.run(3)
    assert said(cluster, late) == ("Reserved", f"2 devices on a reserved from {after(10)} to {after(20)}.")
    assert cluster.is_true(late, ConditionType.ADMITTED)
    assert cluster.mining()["full"] == 2
    short = cluster.create("short", duration="5m")
    long = cluster.create("long", duration="15m")
    cluster.run(5)
    assert ready(cluster, short, long) == [short]
    assert settles(cluster)
    until(cluster, START + timedelta(minutes=9, seconds=30))
    assert said(cluster, late) == ("Reserved", f"All 2 devices are ready; the lease begins at {after(10)}.")
    assert not cluster.leases[late].claim_template
    assert cluster.mining()["full"] == 0
    until(cluster, START + timedelta(minutes=10, seconds=2))
    assert ready(cluster, late, long) == [late]
    assert cluster.lease(late).claim_template
    status = cluster.leases[late].status
    assert (status.billable_from, status.expires_at) == (START + timedelta(minutes=10), START + timedelta(minutes=20))
    assert status.reservation is None
    until(cluster, START + timedelta(minutes=21))
    assert cluster.ledger(late) == [(600, "Expired")]
    assert ready(cluster, long) == [long]


def test_nothing_is_promised_twice() -> None:
    cluster = one_node(2)
    one = cluster.create("one", count=2, duration="10m", start=after(10))
    cluster.run(2)
    overlapping = cluster.create("overlapping", duration="5m", start=after(15))
    afterwards = cluster.create("afterwards", count=2, duration="10m", start=after(21))
    before = cluster.create("before", count=2, duration="5m", start=after(4))
    cluster.run(2)
    reserved = [uid for uid in (one, overlapping, afterwards, before) if cluster.leases[uid].status.reservation]
    assert reserved == [one, afterwards, before]
    reason, message = said(cluster, overlapping)
    assert reason == "NotReservable"
    needs = f"Needs room for 1 pod with 1 × full each from {after(15)} to {after(20)}"
    assert message.startswith(f"{needs}; as far as is known there will be room for 0")
    cluster.delete(one)
    cluster.run(2)
    assert said(cluster, overlapping)[0] == "Reserved"
    until(cluster, START + timedelta(minutes=4, seconds=10))
    assert ready(cluster, before) == [before]


def test_a_lease_that_runs_on_until_after_the_start_is_not_promised_away() -> None:
    cluster = one_node(2)
    cluster.create("endless")
    cluster.create("long", duration="1h")
    cluster.run(3)
    late = cluster.create("late", duration="10m", start=after(30))
    later = cluster.create("later", duration="10m", start=after(70))
    cluster.run(2)
    assert [said(cluster, one)[0] for one in (late, later)] == ["NotReservable", "Reserved"]


def test_where_a_promised_gpu_breaks_another_is_promised() -> None:
    cluster = one_node(2)
    late = cluster.create("late", duration="10m", start=after(10))
    cluster.run(2)
    reservation = cluster.leases[late].status.reservation
    assert reservation is not None
    [place] = reservation.places
    cluster.break_gpu("a", int(place.gpu[-1]))
    cluster.run(2)
    again = cluster.leases[late].status.reservation
    assert again is not None
    assert again.places[0].gpu != place.gpu
    assert settles(cluster)


def test_spot_leases_use_what_is_promised_and_are_told_in_time() -> None:
    cluster = one_node(1)
    late = cluster.create("late", duration="10m", start=after(10))
    cluster.run(2)
    spot = cluster.create("spot", tier="Spot", preemption_notice="2m")
    cluster.run(4)
    assert ready(cluster, spot) == [spot]
    until(cluster, START + timedelta(minutes=10, seconds=1))
    assert ready(cluster, spot, late) == [late]
    assert cluster.leases[late].status.billable_from == START + timedelta(minutes=10)


def test_a_start_that_is_over_is_no_start() -> None:
    cluster = one_node(1)
    lease = cluster.create("lease", start=format_time(START - timedelta(hours=1)))
    cluster.run(3)
    assert ready(cluster, lease) == [lease]
    begins = cluster.leases[lease].status.billable_from
    assert begins is not None
    assert begins > START


def test_the_quota_counts_what_runs_and_is_promised_at_the_same_time() -> None:
    cluster = one_node(4)
    cluster.add_tenant("acme", "team", quota={"gpus": 2})
    cluster.create("now", count=2, duration="10m")
    cluster.run(3)
    later = cluster.create("later", count=2, duration="10m", start=after(20))
    cluster.run(2)
    another = cluster.create("another", duration="10m", start=after(25))
    cluster.run(2)
    assert [said(cluster, one)[0] for one in (later, another)] == ["Reserved", "OverQuota"]


# --- extensions


def test_an_extension_into_what_is_promised_to_others_is_refused() -> None:
    cluster = one_node(1)
    first = cluster.create("first", duration="10m")
    cluster.run(3)
    cluster.create("late", duration="10m", start=after(20))
    cluster.run(2)
    cluster.edit(first, duration="15m")
    cluster.run(2)
    assert cluster.leases[first].status.accepted_duration == "15m"
    cluster.edit(first, duration="30m")
    cluster.run(2)
    assert cluster.leases[first].status.accepted_duration == "15m"
    assert said(cluster, first, ConditionType.STALLED)[0] == "ExtensionRefused"
    assert f"promised to others from {after(20)}" in said(cluster, first, ConditionType.STALLED)[1]


def test_a_lease_that_renews_itself_does_so_until_it_is_told_not_to() -> None:
    cluster = one_node(1)
    lease = cluster.create("lease", duration="5m", notice="1m", renew=True)
    cluster.run(3)
    begins = cluster.leases[lease].status.billable_from
    assert begins is not None
    until(cluster, begins + timedelta(minutes=4))
    assert cluster.leases[lease].status.accepted_duration == "10m"
    assert cluster.leases[lease].status.renewals == 1
    assert cluster.leases[lease].status.expires_at == begins + timedelta(minutes=10)
    assert settles(cluster)
    until(cluster, begins + timedelta(minutes=9, seconds=5))
    assert cluster.leases[lease].status.accepted_duration == "15m"
    cluster.edit(lease, renew=False)
    until(cluster, begins + timedelta(minutes=16))
    assert cluster.ledger(lease) == [(900, "Expired")]


def test_a_renewal_is_refused_where_others_were_promised_the_devices() -> None:
    cluster = one_node(1)
    lease = cluster.create("lease", duration="5m", notice="1m", renew=True)
    cluster.run(3)
    late = cluster.create("late", duration="10m", start=after(8))
    cluster.run(2)
    assert said(cluster, late)[0] == "Reserved"
    until(cluster, START + timedelta(minutes=4, seconds=30))
    assert said(cluster, lease, ConditionType.STALLED)[0] == "ExtensionRefused"
    until(cluster, START + timedelta(minutes=8, seconds=5))
    assert cluster.ledger(lease) == [(300, "Expired")]
    assert ready(cluster, late) == [late]


def test_a_renewal_that_nobody_saw_in_time_holds_all_the_same() -> None:
    cluster = one_node(1)
    lease = cluster.create("lease", duration="5m", notice="1m", renew=True)
    cluster.run(3)
    cluster.now += timedelta(minutes=7)
    cluster.run(1)
    assert ready(cluster, lease) == [lease]
    assert cluster.leases[lease].status.renewals == 1
    assert cluster.ledger(lease) == []


# --- commitments


def commitment(count: int, begins: float = 0, **more: object) -> dict[str, object]:
    return {"name": "base", "model": MODEL, "count": count, "from": after(begins), **more}


def commitments(cluster: Cluster) -> tuple[int, int, int, int]:
    """Count, drawn, kept and short of the one commitment."""
    [one] = cluster.tenants["acme"].status.commitments
    return one.count, one.drawn, one.kept, one.short


def test_committed_capacity_is_kept_for_reserved_leases_and_miners_and_spot_use_it_meanwhile() -> None:
    cluster = one_node(4)
    cluster.add_pool()
    cluster.add_tenant("acme", "team", commitments=[commitment(3)])
    cluster.run(2)
    assert commitments(cluster) == (3, 0, 3, 0)
    other = [cluster.create(f"other-{number}", namespace="other") for number in range(2)]
    spot = cluster.create("spot", tier="Spot", namespace="other")
    cluster.run(5)
    assert ready(cluster, *other, spot) == [other[0], spot]
    assert cluster.mining()["full"] == 2
    own = cluster.create("own", tier="Reserved", count=2)
    cluster.run(5)
    assert ready(cluster, own, spot) == [own, spot]
    assert commitments(cluster) == (3, 2, 1, 0)
    assert cluster.leases[own].status.commitment == "base"
    assert settles(cluster)
    last = cluster.create("last", tier="Reserved")
    cluster.run(45)
    assert ready(cluster, own, last, spot) == [own, last], "the spot lease had to go"
    assert commitments(cluster) == (3, 3, 0, 0)
    more = cluster.create("more", tier="Reserved")
    cluster.run(1)
    has = f"commitment base of tenant acme is 3 × full ({MODEL}) now, of which 3 are in use"
    assert said(cluster, more) == ("CommitmentInUse", f"Position 1 in the queue: {has}; this lease needs 1.")
    cluster.delete(own)
    cluster.run(8)
    assert ready(cluster, more) == [more]
    assert commitments(cluster) == (3, 2, 1, 0)
    assert ready(cluster, other[1]) == []


@pytest.mark.parametrize(
    ("namespace", "words"),
    [
        ("nobody", "Namespace nobody has no commitment for full; it has none."),
        ("team", f"Tenant acme has no commitment for 1g.10gb; it has base (full ({MODEL}))."),
    ],
)
def test_a_reserved_lease_without_a_commitment_is_refused(namespace: str, words: str) -> None:
    cluster = one_node(2, mig=(1,))
    cluster.add_tenant("acme", "team", commitments=[commitment(1)])
    profile = "full" if namespace == "nobody" else "1g.10gb"
    lease = cluster.create("lease", profile, tier="Reserved", namespace=namespace)
    cluster.run(2)
    reason, message = said(cluster, lease)
    assert reason == "NoCommitment"
    assert message.startswith(words)
    assert cluster.is_true(lease, ConditionType.STALLED)


def test_a_later_step_is_kept_from_its_date_on_and_used_until_then() -> None:
    cluster = one_node(3)
    steps = [{"from": after(10), "count": 2}, {"from": after(30), "count": 0}]
    cluster.add_tenant("acme", "team", commitments=[commitment(1, 5, ramp=steps)])
    cluster.run(2)
    assert commitments(cluster) == (0, 0, 0, 0)
    short = cluster.create("short", count=3, duration="2m", namespace="other")
    cluster.run(4)
    assert ready(cluster, short) == [short]
    until(cluster, START + timedelta(minutes=3))
    long = [cluster.create(f"long-{number}", duration="1h", namespace="other") for number in range(3)]
    cluster.run(4)
    assert ready(cluster, *long) == [long[0]]
    until(cluster, START + timedelta(minutes=6))
    assert commitments(cluster) == (1, 0, 1, 0)
    until(cluster, START + timedelta(minutes=11))
    assert commitments(cluster) == (2, 0, 2, 0)
    own = cluster.create("own", tier="Reserved", count=2, duration="30m")
    cluster.run(4)
    assert ready(cluster, own) == [own]
    until(cluster, START + timedelta(minutes=31))
    assert commitments(cluster)[0] == 0
    assert ready(cluster, own) == [own], "a lease that runs is never ended because a commitment shrank"


def test_what_cannot_be_kept_is_said_and_kept_as_soon_as_it_is_free() -> None:
    cluster = one_node(2)
    first = cluster.create("first", namespace="other")
    cluster.create("second", namespace="other")
    cluster.run(3)
    cluster.add_tenant("acme", "team", commitments=[commitment(1)])
    cluster.run(2)
    assert commitments(cluster) == (1, 0, 0, 1)
    [condition] = cluster.tenants["acme"].status.conditions
    assert (condition.status, condition.reason) == (ConditionStatus.FALSE, TenantReason.SHORT)
    third = cluster.create("third", namespace="other")
    cluster.run(1)
    cluster.delete(first)
    cluster.run(6)
    assert commitments(cluster) == (1, 0, 1, 0)
    assert ready(cluster, third) == []


def test_slices_can_be_committed() -> None:
    cluster = one_node(2, mig=(0,))
    cluster.add_tenant("acme", "team", commitments=[commitment(2, profile="3g.40gb")])
    cluster.run(2)
    assert commitments(cluster) == (2, 0, 2, 0)
    small = cluster.create("small", "1g.10gb", namespace="other")
    own = cluster.create("own", "3g.40gb", pods=2, tier="Reserved")
    cluster.run(4)
    assert ready(cluster, small, own) == [own]


def test_reserved_leases_go_first() -> None:
    cluster = one_node(1)
    first = cluster.create("first", duration="1m")
    cluster.run(3)
    cluster.create("waiting")
    cluster.add_tenant("acme", "acme", commitments=[commitment(1)])
    cluster.run(1)
    own = cluster.create("own", tier="Reserved", namespace="acme")
    cluster.delete(first)
    cluster.run(6)
    assert ready(cluster, own) == [own]


def test_the_lead_is_long_enough_for_a_hand_over() -> None:
    assert timedelta(seconds=30) < LEAD


# --- what must not come apart -----------------------------------------------------------------------------------------


def committed(cluster: Cluster, count: int = 1) -> None:
    """A commitment of tenant acme to whole GPUs, from the start on and without an end."""
    kept = {"name": "base", "model": MODEL, "profile": "full", "count": count, "from": format_time(START)}
    cluster.add_tenant("acme", "acme", commitments=[kept])
    cluster.run(2)


def test_what_a_commitment_lends_to_its_lease_is_promised_to_nobody_from_that_ones_end_on() -> None:
    cluster = one_node(1)
    committed(cluster)
    first = cluster.create("first", namespace="acme", tier="Reserved", duration="30m")
    cluster.run(4)
    other = cluster.create("other", duration="5h", start=after(60))
    cluster.run(2)
    assert said(cluster, other)[0] == "NotReservable"
    until(cluster, START + timedelta(minutes=35))
    second = cluster.create("second", namespace="acme", tier="Reserved", duration="10h")
    cluster.run(4)
    assert ready(cluster, first, second) == [second]


def test_a_reserved_lease_that_begins_later_draws_on_its_own_commitment() -> None:
    cluster = one_node(2)
    committed(cluster)
    late = cluster.create("late", namespace="acme", tier="Reserved", duration="30m", start=after(30))
    cluster.run(2)
    assert said(cluster, late)[0] == "Reserved"
    other = cluster.create("other", duration="5h")
    cluster.run(4)
    assert ready(cluster, other) == [other], "one commitment keeps two GPUs"
    until(cluster, START + timedelta(minutes=31))
    assert ready(cluster, late) == [late]


def test_a_shortening_that_was_refused_opens_no_promise() -> None:
    cluster = one_node(1)
    lease = cluster.create("long", duration="4h")
    cluster.run(4)
    until(cluster, START + timedelta(hours=2))
    cluster.edit(lease, term={"duration": "1h"})
    cluster.run(2)
    cluster.edit(lease, suspend=True)
    cluster.run(10)
    late = cluster.create("late", duration="3h", start=after(140))
    cluster.run(2)
    cluster.edit(lease, suspend=False)
    cluster.run(8)
    until(cluster, START + timedelta(minutes=145))
    assert ready(cluster, lease, late) == [late]


def test_a_promise_that_is_due_does_not_wait_for_the_first_of_a_firmer_tier() -> None:
    cluster = one_node(1)
    cluster.create("now", duration="20m")
    cluster.run(4)
    late = cluster.create("late", duration="5h", start=after(40))
    cluster.run(2)
    committed(cluster)
    firmer = cluster.create("firmer", namespace="acme", tier="Reserved")
    cluster.run(2)
    until(cluster, START + timedelta(minutes=50))
    assert ready(cluster, late, firmer) == [late]
    until(cluster, START + timedelta(minutes=345))
    assert ready(cluster, late, firmer) == [firmer]


def test_nothing_is_kept_for_a_lease_that_is_refused_for_good() -> None:
    cluster = one_node(1)
    cluster.add_tenant("acme", "acme", quota={"gpus": 4})
    late = cluster.create("late", namespace="acme", duration="1h", start=after(20))
    cluster.run(2)
    cluster.add_tenant("acme", "acme", quota={"gpus": 0})
    other = cluster.create("other")
    until(cluster, START + timedelta(minutes=30))
    assert said(cluster, late)[0] == "QuotaTooSmall"
    assert ready(cluster, other) == [other]


@pytest.mark.parametrize("created", [2, 8.5])
def test_a_spot_lease_enters_what_is_promised_only_if_it_can_be_told_in_time(created: float) -> None:
    cluster = one_node(1)
    late = cluster.create("late", duration="1h", start=after(10))
    cluster.run(2)
    until(cluster, START + timedelta(minutes=created))
    spot = cluster.create("spot", tier="Spot", preemption_notice="5m")
    cluster.run(20)
    assert ready(cluster, spot) == ([spot] if created == 2 else [])
    until(cluster, START + timedelta(minutes=11))
    assert ready(cluster, late, spot) == [late]


def test_nothing_is_promised_on_a_node_that_is_dead() -> None:
    cluster = one_node(1)
    cluster.add_node("b", 1)
    cluster.run(1)
    late = cluster.create("late", duration="1h", start=after(20))
    cluster.run(2)
    reservation = cluster.leases[late].status.reservation
    assert reservation is not None
    dead = cluster.nodes[reservation.places[0].node]
    dead.ready = dead.agent = False
    until(cluster, START + timedelta(minutes=7))
    moved = cluster.leases[late].status.reservation
    assert moved is not None
    assert moved.places[0].node != dead.name


def test_the_place_that_a_lease_of_slices_is_told_of_is_kept_for_it() -> None:
    cluster = Cluster()
    cluster.add_node("a", 1, mig={0})
    small = [cluster.create(f"small-{number}", "1g.10gb") for number in range(7)]
    cluster.run(6)
    by_slice = {slot.start: lease for lease in small for _, slot in cluster.slots_of(lease)}
    for start in by_slice.keys() - {0, 4}:
        cluster.delete(by_slice[start])
    cluster.run(12)
    wide = cluster.create("wide", "3g.40gb")
    cluster.run(2)
    assert "there is room at slices 0-3 of GPU 0 on a once 1g.10gb at slice 0 ends" in said(cluster, wide)[1]
    later = cluster.create("later", "1g.10gb")
    cluster.run(6)
    assert ready(cluster, later) == [later]
    cluster.delete(by_slice[0])
    cluster.run(12)
    assert ready(cluster, wide) == [wide]
