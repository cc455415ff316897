"""Who is whose tenant, how use fades, and whose turn it is."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.lease import GpuLeaseStatus
from gpu_tenancy.api.tenant import GpuTenantSpec, GpuTenantStatus, Quota
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.core.ordering import in_turn, rank
from gpu_tenancy.core.snapshot import UNLIMITED, Key, LeaseFacts, TenantDefaults, TenantFacts
from gpu_tenancy.core.tenancy import Conflict, Holding, Tenant, Tenants, customer, decayed, faded, holding
from gpu_tenancy.mig.profiles import FULL, KNOWN_NAMES, of_model
from tests.unit.core.builders import MODEL, START, lease_spec
from tests.unit.core.past import past_usage

DAY = timedelta(hours=24)


def tenant(name: str, *namespaces: str, age: float = 0, **spec: object) -> TenantFacts:
    """A GpuTenant that was made so many seconds before START."""
    parsed = GpuTenantSpec.model_validate({"namespaces": list(namespaces), **spec})
    return TenantFacts(name, f"uid-{name}", 1, START - timedelta(seconds=age), parsed, GpuTenantStatus())


# --- who is whose


def test_a_tenant_has_its_namespaces_and_its_limits() -> None:
    found = Tenants([tenant("acme", "a", "b", weight=3, quota={"gpus": 8}, maxTerm="4h")], TenantDefaults())
    acme = found.of("a")
    assert found.of("b") is acme
    assert (acme.title, acme.weight, acme.limits, acme.longest) == (
        "tenant acme",
        3,
        (8, None, None),
        timedelta(hours=4),
    )
    assert found.conflicts == {}


def test_a_namespace_that_nobody_names_is_a_tenant_with_the_defaults() -> None:
    found = Tenants([], TenantDefaults(Quota(memory_slices=16), "72h"))
    assert found.of("a") == Tenant("namespace a", 1, (None, 16, None), "72h", timedelta(hours=72))
    assert found.of("b").title == "namespace b"


def test_a_tenant_is_not_taken_for_the_namespace_of_its_name() -> None:
    found = Tenants([tenant("b", "a")], TenantDefaults())
    assert found.of("a").title != found.of("b").title


def test_a_namespace_that_two_name_belongs_to_the_older_and_the_other_keeps_the_rest() -> None:
    found = Tenants([tenant("new", "a", "b", "c"), tenant("old", "a", "b", age=5)], TenantDefaults())
    assert [found.of(name).title for name in "abc"] == ["tenant old", "tenant old", "tenant new"]
    assert found.conflicts == {"new": (Conflict("old", ("a", "b")),)}


def test_of_two_of_one_age_the_first_by_name_has_it() -> None:
    found = Tenants([tenant("b", "x"), tenant("a", "x")], TenantDefaults())
    assert found.of("x").title == "tenant a"
    assert found.conflicts == {"b": (Conflict("a", ("x",)),)}


def test_a_tenant_that_cannot_be_read_names_nothing() -> None:
    odd = TenantFacts("odd", "uid", 1, START, None, GpuTenantStatus(), "spec.weight: no")
    found = Tenants([odd, tenant("acme", "a")], TenantDefaults())
    assert (found.of("a").title, found.conflicts) == ("tenant acme", {})


@given(
    st.lists(
        st.tuples(st.sampled_from("pqrs"), st.integers(0, 2), st.sets(st.sampled_from("abc"), min_size=1)),
        unique_by=lambda one: one[0],
    )
)
def test_whoever_names_a_namespace_has_it_or_is_told_who_has(claims: list[tuple[str, int, set[str]]]) -> None:
    facts = [tenant(name, *sorted(namespaces), age=age) for name, age, namespaces in claims]
    found = Tenants(facts, TenantDefaults())
    turned = Tenants(facts[::-1], TenantDefaults())
    for one in facts:
        assert one.spec is not None
        told = {
            namespace: conflict.owner
            for conflict in found.conflicts.get(one.name, ())
            for namespace in conflict.namespaces
        }
        for namespace in one.spec.namespaces:
            assert found.of(namespace).title == f"tenant {told.get(namespace, one.name)}"
            assert found.of(namespace) == turned.of(namespace)
    assert found.conflicts == turned.conflicts


# --- what counts


@pytest.mark.parametrize(
    ("profile", "counts"),
    [
        (FULL, (2, 16, 14)),
        ("1g.10gb", (0, 2, 2)),
        ("3g.40gb", (0, 8, 6)),
        ("4g.20gb", (0, 8, 8)),
        ("7g.80gb", (0, 16, 14)),
    ],
)
def test_devices_count_as_the_slices_of_the_geometry(profile: str, counts: tuple[int, int, int]) -> None:
    assert holding(profile, 2) == Holding(*counts)


def test_a_profile_means_the_same_on_every_model_that_has_it() -> None:
    for model in ("A100-SXM4-40GB", MODEL):
        for name, shape in of_model(model).items():
            assert holding(name, 1) == Holding(0, shape.size, shape.compute)
    assert set(KNOWN_NAMES) == {FULL, *of_model("A100-SXM4-40GB"), *of_model(MODEL)}


# --- what fades

INSTANTS = st.integers(-400_000, 0).map(lambda seconds: START + timedelta(seconds=seconds))
HALF_LIVES = st.integers(1, 200).map(lambda hours: timedelta(hours=hours))


@given(st.integers(1, 64), INSTANTS, st.integers(0, 300_000), HALF_LIVES)
def test_use_is_the_integral_of_what_each_second_still_counts(
    slices: int, start: datetime, length: int, half_life: timedelta
) -> None:
    end = min(start + timedelta(seconds=length), START)
    steps, total = 1000, (end - start).total_seconds()
    ages = ((START - start).total_seconds() - total * (step + 0.5) / steps for step in range(steps))
    summed = sum(2 ** (-age / half_life.total_seconds()) for age in ages) * total / steps * slices
    assert decayed(slices, start, end, START, half_life) == pytest.approx(summed, rel=1e-2, abs=1e-9)


@given(st.integers(1, 64), INSTANTS, st.integers(0, 300_000), INSTANTS, HALF_LIVES)
def test_what_was_reckoned_to_one_instant_can_be_brought_to_any_other(
    slices: int, start: datetime, length: int, at: datetime, half_life: timedelta
) -> None:
    end = start + timedelta(seconds=length)
    here = decayed(slices, start, end, START, half_life)
    assert faded(decayed(slices, start, end, at, half_life), at, START, half_life) == pytest.approx(here)


def test_an_hour_that_lies_a_half_life_back_counts_half() -> None:
    hour = timedelta(hours=1)
    now, then = (decayed(8, at - hour, at, START, DAY) for at in (START, START - DAY))
    assert then == pytest.approx(now / 2)
    assert now == pytest.approx(8 * 3600, rel=0.02)


def segment(namespace: str, profile: str, devices: int, ago: float, length: float | None) -> UsageRecordSpec:
    """A segment that began so many seconds ago."""
    start = START - timedelta(seconds=ago)
    end = {} if length is None else {"billable_to": start + timedelta(seconds=length), "seconds": int(length)}
    return UsageRecordSpec.model_validate(
        {
            "contract": "c",
            "segment": 1,
            "lease_namespace": namespace,
            "lease_name": "train",
            "tier": "OnDemand",
            "model": MODEL,
            "profile": profile,
            "devices": [BilledDevice(node="a", device=f"gpu{number}-x", gpu="GPU") for number in range(devices)],
            "billable_from": start,
            "reason": "Expired" if end else None,
            **end,
        }
    )


def test_the_past_of_a_namespace_is_its_closed_segments() -> None:
    one, other = segment("a", FULL, 2, 600, 300), segment("a", "3g.40gb", 1, 500, 100)
    past = past_usage([one, other, segment("a", FULL, 8, 50, None), segment("b", "1g.10gb", 1, 60, 60)], START, DAY)
    assert past.slice_seconds == pytest.approx({"a": 16 * 300 + 4 * 100, "b": 60}, rel=0.02)


# --- whose turn it is


def waiting(namespace: str, number: int) -> LeaseFacts:
    created = START + timedelta(seconds=number)
    return LeaseFacts(Key(namespace, f"l{number}"), f"{namespace}-{number}", 1, created, lease_spec(), GpuLeaseStatus())


@given(
    st.lists(st.sampled_from("abc"), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 5)),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 4)),
    st.sets(st.integers(0, 11)),
)
def test_each_is_looked_at_once_and_nobody_of_a_lower_share_is_passed_over(
    namespaces: list[str], used: dict[str, int], weights: dict[str, int], placed: set[int]
) -> None:
    leases = [waiting(namespace, number) for number, namespace in enumerate(namespaces)]
    tenants = {name: customer(f"namespace {name}", weights.get(name, 1), UNLIMITED, None) for name in "abc"}
    shares = {one.title: used.get(name, 0) / one.weight for name, one in tenants.items()}
    left = list(leases)
    turns = in_turn(
        leases, lambda lease: lease, lambda lease: tenants[lease.key.namespace], lambda one: shares[one.title]
    )
    for lease in turns:
        assert lease == min(left, key=lambda one: (shares[tenants[one.key.namespace].title], rank(one)))
        left.remove(lease)
        if int(lease.key.name[1:]) in placed:
            tenant_of = tenants[lease.key.namespace]
            shares[tenant_of.title] += 2 / tenant_of.weight
    assert left == []


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_with_equal_shares_the_order_is_that_of_age(namespaces: list[str]) -> None:
    leases = [waiting(namespace, number) for number, namespace in enumerate(namespaces)]
    found = Tenants([], TenantDefaults())
    assert list(in_turn(leases, lambda one: one, lambda one: found.of(one.key.namespace), lambda _: 0.0)) == leases


def test_within_a_tenant_the_order_is_that_of_age_whatever_it_is_given() -> None:
    leases = [waiting("ab"[number % 2], number) for number in range(10)]
    found, taken = Tenants([], TenantDefaults()), Counter[str]()
    by_tenant: dict[str, list[LeaseFacts]] = defaultdict(list)
    for one in in_turn(leases, lambda one: one, lambda one: found.of(one.key.namespace), lambda one: taken[one.title]):
        taken[found.of(one.key.namespace).title] += 1
        by_tenant[one.key.namespace].append(one)
    assert all(rank(one) < rank(later) for line in by_tenant.values() for one, later in pairwise(line))
