"""Which statuses are worth a write: what lasts at once, what passes only if it does not, what did not change never."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, Reason
from gpu_tenancy.controller.statuses import LINGER, LONGEST_LINGER, STEPS, Statuses
from gpu_tenancy.core.actions import Outlook, Plan, Refusal
from gpu_tenancy.core.snapshot import Failure, LeaseFacts
from gpu_tenancy.core.status import REFRESH
from tests.unit.controller.facts import NOW, admitted, lease, record

LATER = NOW + LINGER
MOMENT = timedelta(milliseconds=10)
PRICE = {"perHour": "145.00", "currency": "RUB", "book": "list"}
START = datetime(2026, 3, 1, 11, tzinfo=UTC)
"""When the segment of a running lease began."""


def _placed(one: LeaseFacts, waiting: str = "0 of 1 devices are ready.") -> Outlook:
    return Outlook(one, None, attempt=1, nodes=("n1",), waiting=waiting)


def _refused(one: LeaseFacts, reason: Reason) -> Outlook:
    return Outlook(one, None, refusal=Refusal(reason, "So it is."))


def _running(**spec: Any) -> Outlook:  # noqa: ANN401  (handed on)
    one = replace(admitted(**spec), records=(record(price=PRICE),))
    return Outlook(one, one.spec.term.duration, attempt=1, nodes=("n1",), ready_devices=1)


def _over(*, draining: str = "", settled: bool = False) -> Outlook:
    closed = record(billableTo="2026-03-01T11:30:00Z", seconds=1800, reason="Completed")
    one = replace(admitted(), records=(closed,))
    return Outlook(one, None, attempt=1, over=True, draining=draining, settled=settled)


def _is_due(statuses: Statuses, outlook: Outlook, now: datetime) -> bool:
    new = statuses.derive(outlook, None, now)
    return not statuses.is_said(outlook.lease.uid) and statuses.is_due(outlook.lease, new, now)


PASSING = {
    "template asked about": _refused(lease(), Reason.CHECKING_TEMPLATE),
    "device being made": _placed(admitted()),
    "segment just closed": _over(),
    "device being taken away": _over(draining="1 device is being withdrawn."),
}
LASTING = {
    "queued": _refused(lease(), Reason.QUEUED),
    "refused": _refused(lease(), Reason.NO_RATE)._replace(refusal=Refusal(Reason.NO_RATE, "No rate.", final=True)),
    "ready": _running(),
    "settled": _over(settled=True),
    "device failed": _placed(admitted())._replace(waiting_reason=Reason.DEVICE_FAILED),
    "devices lost": _placed(admitted(), waiting="")._replace(lost="1 of 1 devices are gone from n1."),
    "extension refused": _placed(admitted())._replace(extension_refusal="term.duration 1s was refused."),
}


@pytest.mark.parametrize("outlook", PASSING.values(), ids=PASSING)
def test_what_is_over_in_a_moment_is_written_only_if_it_lasts(outlook: Outlook) -> None:
    statuses = Statuses()
    assert not _is_due(statuses, outlook, NOW)
    assert statuses.wake == LATER
    assert not _is_due(statuses, outlook, LATER - MOMENT)
    assert _is_due(statuses, outlook, LATER)


@pytest.mark.parametrize("outlook", LASTING.values(), ids=LASTING)
def test_what_lasts_is_written_at_once(outlook: Outlook) -> None:
    statuses = Statuses()
    assert _is_due(statuses, outlook, NOW)
    assert statuses.wake is None


def test_one_passing_status_after_another_is_still_written_after_a_second() -> None:
    statuses = Statuses()
    assert not _is_due(statuses, _over(), NOW)
    assert not _is_due(statuses, _over(draining="1 device is being withdrawn."), NOW + LINGER / 2)
    assert _is_due(statuses, _over(draining="1 device is waiting for pods to stop."), LATER)


def test_what_follows_a_passing_status_takes_its_place() -> None:
    statuses = Statuses()
    assert not _is_due(statuses, _over(draining="1 device is being withdrawn."), NOW)
    settled = _over(settled=True)
    assert _is_due(statuses, settled, NOW + MOMENT)
    statuses.stored(settled.lease.uid, NOW + MOMENT)
    assert statuses.wake is None


def test_a_stored_status_is_not_looked_at_again_until_something_changes() -> None:
    statuses, outlook = Statuses(), _running()
    first = statuses.derive(outlook, None, NOW)
    statuses.stored(outlook.lease.uid, NOW)
    assert statuses.derive(outlook._replace(), None, NOW + MOMENT) is first
    assert statuses.is_said(outlook.lease.uid)
    changed = outlook._replace(silent="the agent of n1 is silent")
    assert statuses.derive(changed, None, NOW + MOMENT) is not first
    assert not statuses.is_said(outlook.lease.uid)


def test_cost_alone_is_written_every_five_minutes_at_most() -> None:
    statuses, outlook = Statuses(), _running()
    written = statuses.derive(outlook, None, NOW)
    statuses.stored(outlook.lease.uid, NOW)
    seen = outlook._replace(lease=replace(outlook.lease, status=written))
    assert not _is_due(statuses, seen, NOW + timedelta(minutes=4))
    assert _is_due(statuses, seen, NOW + REFRESH)


def test_notice_is_given_though_nothing_else_happens() -> None:
    statuses = Statuses()
    outlook = _running(term={"duration": "2h", "notice": "5m"})._replace(expires_at=START + timedelta(hours=2))
    statuses.derive(outlook, None, NOW)
    statuses.stored(outlook.lease.uid, NOW)
    at = START + timedelta(hours=1, minutes=55)
    assert _reason(statuses.derive(outlook, None, at - MOMENT)) is Reason.RUNNING
    assert _reason(statuses.derive(outlook, None, at)) is Reason.NOTICE_GIVEN


def _reason(status: GpuLeaseStatus) -> Reason:
    return next(one.reason for one in status.conditions if one.type is ConditionType.EXPIRED)


def test_leases_that_are_gone_wake_nobody() -> None:
    statuses, outlook = Statuses(), _placed(admitted())
    assert not _is_due(statuses, outlook, NOW)
    statuses.keep({outlook.lease.uid})
    assert statuses.wake == LATER
    statuses.keep(set())
    assert statuses.wake is None


def test_while_cycles_are_slow_what_passes_waits_for_several_of_them_but_not_for_long() -> None:
    statuses, outlook = Statuses(), _placed(admitted())
    statuses.paced(LINGER)
    assert not _is_due(statuses, outlook, NOW)
    assert not _is_due(statuses, outlook, NOW + STEPS * LINGER - MOMENT)
    assert _is_due(statuses, outlook, NOW + STEPS * LINGER)
    slow = Statuses()
    slow.paced(LONGEST_LINGER)
    assert not _is_due(slow, outlook, NOW)
    assert slow.wake == NOW + LONGEST_LINGER


def test_of_leases_at_rest_only_those_are_looked_at_that_may_say_something_else() -> None:
    statuses, running = Statuses(), _running()
    uid, resting = running.lease.uid, Plan(resting=(running,))
    assert statuses.changing(resting, {}, NOW).keys() == {uid}, "nothing is known of it yet"
    assert statuses.changing(resting, {}, NOW).keys() == {uid}, "it is not stored yet"
    statuses.stored(uid, NOW)
    assert not statuses.changing(resting, {}, NOW + MOMENT)
    assert statuses.changing(Plan(moving=(running,)), {}, NOW + MOMENT).keys() == {uid}
    assert statuses.changing(resting, {}, NOW + REFRESH).keys() == {uid}, "its cost is told now and then"
    statuses.derive(running, Failure("ApiRejected", "No.", NOW), NOW)
    statuses.stored(uid, NOW)
    assert statuses.changing(resting, {}, NOW + MOMENT).keys() == {uid}, "what the API server refused is over"
    other = running._replace(ready_devices=0)
    assert statuses.changing(Plan(resting=(other,)), {}, NOW + MOMENT)[uid].ready_devices is None


def test_states_are_counted_of_all_leases_that_are_there() -> None:
    statuses, running = Statuses(), _running()
    statuses.derive(running, None, NOW)
    assert statuses.states() == {"Ready": 1}
    statuses.keep(set[str]())
    assert not statuses.states()
