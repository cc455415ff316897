"""The term of a lease: when it was billed, when it ends, and why. Pure arithmetic on records and whole seconds.

A lease is billed in segments. Its term counts billed seconds only: waiting, hand-over and suspension do not use it up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from gpu_tenancy.api.base import format_duration, format_time, parse_duration
from gpu_tenancy.api.lease import ENDS, OnCompletion, Reason
from gpu_tenancy.core.promises import LEAD
from gpu_tenancy.core.snapshot import JobFacts, LeaseFacts, RecordFacts
from gpu_tenancy.core.tenancy import Tenant

FINAL_REASONS: Final = frozenset(ENDS)
"""Segment ends after which the lease is over; after the others it is queued or suspended."""

SECOND: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Ending:
    """A fact that ends a segment, with its time."""

    at: datetime
    reason: Reason
    message: str

    @property
    def final(self) -> bool:
        """The lease itself is over, not only this segment."""
        return self.reason in FINAL_REASONS


class Term(NamedTuple):
    """The duration in force and what became of a wish to change it."""

    duration: str | None
    """None: until deleted."""
    refusal: str = ""
    """Why the duration in the spec is not in force, or why the lease is not renewed."""
    renewals: int = 0
    """How often the duration of the spec was added to it by term.renew."""

    @property
    def length(self) -> timedelta | None:
        """Length of the term."""
        return parse_duration(self.duration) if self.duration else None


def ceil_second(instant: datetime) -> datetime:
    """The first whole second not before `instant`: a started second is not charged."""
    floor = floor_second(instant)
    return floor if floor == instant else floor + SECOND


def floor_second(instant: datetime) -> datetime:
    """The last whole second not after `instant`."""
    return instant.replace(microsecond=0)


def seconds_between(start: datetime, end: datetime) -> int:
    """Whole seconds from start to end; 0 where end is earlier."""
    return max(0, int((end - start) // SECOND))


def billed_seconds(records: tuple[RecordFacts, ...]) -> int:
    """Seconds of the closed segments together."""
    return sum(record.spec.seconds or 0 for record in records)


def expiry(lease: LeaseFacts, term: Term) -> datetime | None:
    """When the running segment uses up the term; None without a duration or a running segment. What was said last
    counts where a record cannot be read: nobody knows the seconds that it uses up."""
    record, length = lease.open_record, term.length
    if record is None or length is None:
        return None
    if lease.unreadable_record:
        return lease.status.expires_at
    return record.spec.billable_from + length - timedelta(seconds=billed_seconds(lease.records))


def begins_later(lease: LeaseFacts, now: datetime) -> bool:
    """It has a start that has not come: nothing of it runs and nothing is billed before."""
    start = lease.spec.term.start
    return start is not None and not lease.records and now < start


def term_of(lease: LeaseFacts, now: datetime, tenant: Tenant, promised_from: datetime | None) -> Term:
    """The duration in force. A changed spec is an admission, and so is a renewal: refused where the new term would
    already be over, is an extension to more than the tenant may have, or to devices that are promised to others.

    `promised_from`: when the first promise to somebody else of what it holds begins; None: nothing is promised.
    """
    renewals = lease.status.renewals
    term = _asked(lease, lengthened(lease.spec.term.duration, renewals), now, tenant, promised_from)
    term = term._replace(renewals=renewals)
    if term.refusal or not _renews(lease, term, now):
        return term
    longer = lengthened(lease.spec.term.duration, renewals + 1)
    renewed = _asked(lease, longer, now, tenant, promised_from)
    return term._replace(refusal=renewed.refusal) if renewed.refusal else renewed._replace(renewals=renewals + 1)


def lengthened(duration: str | None, renewals: int) -> str | None:
    """A duration that was renewed so many times."""
    if duration is None or renewals == 0:
        return duration
    return format_duration(parse_duration(duration) * (1 + renewals))


def _renews(lease: LeaseFacts, term: Term, now: datetime) -> bool:
    """It is time for notice, and the lease is to go on. One that was not seen in time goes on as well: nobody else has
    had its devices."""
    if not lease.spec.term.renew or lease.spec.suspend or lease.deleted_at is not None:
        return False
    ends = expiry(lease, term)
    return ends is not None and ends - parse_duration(lease.spec.term.notice) <= now


def _asked(
    lease: LeaseFacts, wanted: str | None, now: datetime, tenant: Tenant, promised_from: datetime | None
) -> Term:
    status = lease.status
    if status.admitted_at is None or wanted == status.accepted_duration:
        return Term(wanted)
    extends, asked = _extends(wanted, status.accepted_duration), wanted or "without end"
    if extends and too_long(wanted, tenant):
        return _kept(lease, asked, f"{tenant.title} may lease for {tenant.max_term} at most", "Set a shorter one.")
    if extends and promised_from is not None and _lasts_until(lease, wanted) > promised_from - LEAD:
        why = f"some of its devices are promised to others from {format_time(promised_from)}"
        return _kept(lease, asked, why, "Set a term that ends before, or lease others besides.")
    if wanted is None:
        return Term(None)
    used = timedelta(seconds=billed_seconds(lease.records))
    if record := lease.open_record:
        over_at = record.spec.billable_from + parse_duration(wanted) - used
        if over_at > now:
            return Term(wanted)
        return _kept(lease, wanted, f"the lease would have ended at {format_time(over_at)}", END_NOW)
    if parse_duration(wanted) > used:
        return Term(wanted)
    return _kept(lease, wanted, f"the lease has already run {format_duration(used)}", END_NOW)


def _lasts_until(lease: LeaseFacts, wanted: str | None) -> datetime:
    """When a lease that is billed now would end; one that is not yet is planned anew with its new term."""
    record = lease.open_record
    if record is None:
        return datetime.min.replace(tzinfo=UTC)
    if wanted is None:
        return datetime.max.replace(tzinfo=UTC)
    used = timedelta(seconds=billed_seconds(lease.records))
    return record.spec.billable_from + parse_duration(wanted) - used


def too_long(duration: str | None, tenant: Tenant) -> bool:
    """Whether a lease of that duration, or without one, is longer than the tenant's may be."""
    if tenant.longest is None:
        return False
    return duration is None or parse_duration(duration) > tenant.longest


def _extends(wanted: str | None, accepted: str | None) -> bool:
    return accepted is not None and (wanted is None or parse_duration(wanted) > parse_duration(accepted))


END_NOW: Final = "Delete the lease to end it now."


def _kept(lease: LeaseFacts, wanted: str, why: str, remedy: str) -> Term:
    """The duration in force stays. The sentence names no moving number: it is a status, written when it changes."""
    kept = lease.status.accepted_duration
    rest = f"{kept} stays in force" if kept else "the lease stays without a term"
    return Term(kept, f"term.duration {wanted} was refused: {why}; {rest}. {remedy}")


def ending(
    lease: LeaseFacts, term: Term, now: datetime, *, lost: str = "", lost_at: datetime | None = None
) -> Ending | None:
    """The earliest fact that ends the lease or its running segment, or None while it goes on.

    `lost` says why its devices are not there any more (node lost, slots removed), as a sentence; `lost_at` since when.
    """
    if not (lost or lease.records or lease.jobs or lease.deleted_at or lease.spec.suspend):
        return None  # nothing has happened to it yet
    facts = list(_endings(lease, term, now))
    if lost:
        facts.append(Ending(lost_at or now, Reason.NODE_LOST, lost))
    return min(facts, key=lambda one: one.at) if facts else None


def _endings(lease: LeaseFacts, term: Term, now: datetime) -> Iterator[Ending]:
    """Every fact that ends it by now; of those with one time the first counts."""
    if lease.deleted_at is not None:
        yield Ending(min(lease.deleted_at, now), Reason.DELETED, "The lease was deleted.")
    expires = expiry(lease, term)
    if expires is not None and expires <= now:
        yield Ending(expires, Reason.EXPIRED, f"The term of {term.duration} ended at {format_time(expires)}.")
    elif expires is None and _used_up(lease, term):
        yield Ending(now, Reason.EXPIRED, f"The term of {term.duration} is used up.")
    job = current_job(lease)
    releases = lease.spec.on_completion is OnCompletion.RELEASE and not lease.invalid
    if job is not None and job.finished and releases:
        yield _completion(job, now)
    if lease.spec.suspend:
        yield Ending(now, Reason.SUSPENDED, "spec.suspend is true.")


def current_job(lease: LeaseFacts) -> JobFacts | None:
    """The Job of the current placement attempt."""
    if not lease.jobs:
        return None
    return next((job for job in lease.jobs if job.attempt == lease.status.attempt), None)


def is_over(lease: LeaseFacts) -> bool:
    """Ended for good by what is already written down."""
    if lease.deleted_at is not None or lease.status.ended is not None:
        return True
    return bool(lease.records) and not lease.records[-1].is_open and lease.records[-1].spec.reason in FINAL_REASONS


def _used_up(lease: LeaseFacts, term: Term) -> bool:
    if not lease.records or lease.unreadable_record or term.length is None:
        return False
    return lease.open_record is None and timedelta(seconds=billed_seconds(lease.records)) >= term.length


def _completion(job: JobFacts, now: datetime) -> Ending:
    reason = Reason.COMPLETED if job.finished == "Complete" else Reason.FAILED
    verb = "finished" if reason is Reason.COMPLETED else "failed"
    detail = f": {job.message}" if job.message else ""
    return Ending(min(job.finished_at or now, now), reason, f"Job {job.name} {verb}{detail}.")
