"""Laws of what is kept for later, over random leases: a promise is kept to the second, and nobody starves."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.api.base import format_time
from gpu_tenancy.mig.layout import device_mask
from tests.unit.core.builders import MODEL
from tests.unit.core.simulation import Cluster

STEP = timedelta(seconds=15)
PROFILES = ("1g.10gb", "2g.20gb", "3g.40gb", "7g.80gb", "full")

Wish = tuple[int, str, int, int, int | None]
"""Minute of its creation, profile, whole GPUs, minutes that it lasts, minutes after its creation at which it begins."""

WISHES = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.sampled_from(PROFILES),
        st.integers(1, 2),
        st.integers(1, 12),
        st.none() | st.integers(2, 25),
    ),
    max_size=9,
)


def cluster_of(gpus: int = 3) -> Cluster:
    cluster = Cluster()
    cluster.add_node("a", gpus, mig=(0,))
    cluster.add_pool()
    cluster.run(1)
    return cluster


def create(cluster: Cluster, number: int, wish: Wish) -> str:
    _, profile, count, minutes, later = wish
    start = format_time(cluster.now + timedelta(minutes=later)) if later is not None else None
    many = count if profile == "full" else 1
    return cluster.create(f"lease-{number}", profile, many, duration=f"{minutes}m", notice="30s", start=start)


@settings(max_examples=25)
@given(WISHES)
def test_what_was_promised_begins_to_the_second_whatever_comes_between(wishes: list[Wish]) -> None:
    cluster, promised = cluster_of(), dict[str, datetime]()
    waiting = sorted(enumerate(wishes), key=lambda one: one[1][0])
    for minute in range(50):
        while waiting and waiting[0][1][0] <= minute:
            create(cluster, *waiting.pop(0))
        for _ in range(4):
            cluster.step(STEP)
            _note_promises(cluster, promised)
    for lease, begins in promised.items():
        assert _begun(cluster, lease) == [begins]


def _begun(cluster: Cluster, lease: str) -> list[datetime]:
    """When each of its segments began."""
    records = (*cluster.archive.values(), *cluster.records.values())
    return [record.spec.billable_from for record in records if record.spec.contract == lease]


def _note_promises(cluster: Cluster, promised: dict[str, datetime]) -> None:
    """Every promise made, and that no two of them overlap."""
    on: dict[str, list[tuple[int, datetime, datetime]]] = defaultdict(list)
    for lease in cluster.leases.values():
        if (found := lease.status.reservation) is None:
            continue
        promised[lease.uid] = found.begins
        assert found.until is not None
        for place in found.places:
            mask = device_mask(MODEL, lease.spec.gpus.profile, place.start)
            on[place.gpu].append((mask, found.begins, found.until))
    for spans in on.values():
        for (mask, begins, until), (other, opens, ends) in combinations(spans, 2):
            assert not (mask & other and begins < ends and opens < until)


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6)), min_size=12, max_size=20))
def test_a_large_lease_waits_no_longer_than_for_those_that_ran_when_it_came(small: list[tuple[int, int]]) -> None:
    """However many small ones come after it."""
    cluster = Cluster()
    cluster.add_node("a", 4)
    cluster.run(1)
    for number, (count, minutes) in enumerate(small[:4]):
        cluster.create(f"early-{number}", count=count, duration=f"{minutes}m", notice="30s", namespace="early")
    cluster.run(4)
    running = [lease.status.expires_at for lease in cluster.leases.values() if lease.status.expires_at]
    large = cluster.create("large", count=4, namespace="first")
    for number, (count, minutes) in enumerate(small[4:]):
        cluster.create(f"late-{number}", count=count, duration=f"{minutes}m", notice="30s", namespace="late")
    cluster.run(1)
    deadline = max(running) + timedelta(minutes=2)
    more = 0
    while cluster.now < deadline and not cluster.is_true(large):
        more += 1
        cluster.create(f"more-{more}", duration="3m", namespace="late")
        cluster.step(STEP)
    assert cluster.is_true(large)
