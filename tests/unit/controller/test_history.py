"""What closed records come to: found out once, whatever comes and goes, and the same after a restart."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.names import SYSTEM_NAMESPACE
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.controller import history as module
from gpu_tenancy.controller.history import REBASED, History
from gpu_tenancy.core.snapshot import PastUsage
from gpu_tenancy.core.tenancy import FORGOTTEN, decayed, faded
from gpu_tenancy.kube import resources
from tests.unit.controller.facts import NOW, Object, body, record_spec
from tests.unit.controller.seen import Seen
from tests.unit.core.past import past_usage

DAY: Final = timedelta(hours=24)


def record(name: str = "c-1", ago: float = 3600, seconds: int | None = 600, **more: Any) -> Object:  # noqa: ANN401
    """A record that began so many seconds ago; open without seconds. `namespace` is the lease's; `at` the record's."""
    start = NOW - timedelta(seconds=ago)
    contract, _, segment = name.rpartition("-")
    namespace, at = more.pop("namespace", "team-a"), more.pop("at", None)
    version = more.pop("version", 1)
    spec = record_spec(
        contract, int(segment), leaseNamespace=namespace, billableFrom=format_time(start), **more
    ).to_wire()
    if seconds is not None:
        spec |= {"billableTo": format_time(start + timedelta(seconds=seconds)), "seconds": seconds, "reason": "Expired"}
    one = body("UsageRecord", name, at or namespace, version=version, spec=spec)
    one["metadata"]["uid"] = f"{at or namespace}/{name}"
    return one


def now(past: PastUsage) -> dict[str, float]:
    """What it counts now."""
    return {name: faded(used, past.at, NOW, DAY) for name, used in past.slice_seconds.items() if used}


def test_closed_segments_count_by_the_namespace_of_their_lease_and_open_ones_do_not() -> None:
    bodies = [
        record(),
        record("d-1", profile="3g.40gb", at=SYSTEM_NAMESPACE),
        record("e-1", namespace="team-b"),
        record("f-1", seconds=None),
    ]
    counted = now(History(DAY).usage(bodies, NOW))
    assert counted == pytest.approx({"team-a": 600 * (8 + 4), "team-b": 600 * 8}, rel=0.05)


def test_a_segment_counts_once_while_its_archived_copy_exists_beside_it_and_afterwards() -> None:
    history, original, copy = History(DAY), record(), record(at=SYSTEM_NAMESPACE)
    counts = [now(history.usage(bodies, NOW)) for bodies in ([original], [copy, original], [copy], [])]
    assert counts[0] == counts[1] == counts[2] != {}
    assert counts[3] == {}


def test_a_record_is_read_once_also_when_it_is_listed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []

    def counting(*segment: Any) -> float:  # noqa: ANN401  (handed on)
        read.append(segment)
        return decayed(*segment)

    monkeypatch.setattr(module, "decayed", counting)
    history, first, second = History(DAY), record(), record("d-1")
    history.usage([first], NOW)
    history.usage([first, second], NOW)
    history.usage([{**first}, second], NOW + timedelta(seconds=5))
    assert len(read) == 2
    history.usage([record(version=2), second], NOW)
    assert len(read) == 3


def test_what_ended_long_ago_is_not_even_read_and_what_cannot_be_read_comes_to_nothing() -> None:
    ancient = record("old-1", ago=(FORGOTTEN * DAY).total_seconds() + 700)
    ancient["spec"]["devices"] = "none"
    odd = record("odd-1")
    odd["spec"]["billableFrom"] = "yesterday"
    assert now(History(DAY).usage([ancient, odd, record()], NOW)) == pytest.approx({"team-a": 4800}, rel=0.05)


def test_the_sums_are_reckoned_to_a_later_instant_before_their_numbers_grow_out_of_bounds() -> None:
    history, one = History(timedelta(hours=1)), record(seconds=60)
    before = history.usage([one], NOW)
    later = NOW + timedelta(hours=REBASED + 1)
    after = history.usage([one], later)
    assert (before.at, after.at) == (NOW, later)
    assert after.slice_seconds == {}


Segments = list[tuple[str, int, int]]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 200_000), st.integers(0, 5)), max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_came_and_went_the_sums_are_those_of_the_records_that_are_there(listings: list[Segments]) -> None:
    known: dict[tuple[str, int, int], Object] = {}
    history = History(DAY)
    for listing in listings:
        bodies = []
        for number, (namespace, ago, minutes) in enumerate(sorted(set(listing))):
            key = (namespace, ago, minutes)
            one = record(f"{namespace}x{ago}x{minutes}-1", ago + 60 * minutes, 60 * minutes, namespace=namespace)
            bodies.append(known.setdefault(key, one) if number % 2 else one)
        past = history.usage(bodies, NOW)
        specs = [UsageRecordSpec.model_validate(one["spec"]) for one in bodies]
        expected = {name: used for name, used in past_usage(specs, NOW, DAY).slice_seconds.items() if used}
        assert now(past) == pytest.approx(expected)
        assert past.slice_seconds == {**dict.fromkeys(past.slice_seconds, 0), **now(History(DAY).usage(bodies, NOW))}


def test_the_history_of_a_lease_that_is_settled_and_gone_is_in_the_snapshot() -> None:
    seen = Seen()
    seen.own(record(), record("d-1", namespace="team-b"))
    snapshot = seen.snapshot()
    assert (snapshot.leases, snapshot.orphans) == ((), ())
    assert snapshot.past_usage.at == NOW
    assert snapshot.past_usage.slice_seconds == pytest.approx({"team-a": 4800, "team-b": 4800}, rel=0.05)
    gone = seen.views.store.all(resources.USAGE_RECORDS)[0]
    seen.own(gone, event="DELETED")
    assert list(now(seen.snapshot().past_usage)) == ["team-b"]
