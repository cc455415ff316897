"""What status each lease has, and whether it is worth a write now. No I/O; what a status says is core.status' alone.

Deriving a status costs more than noticing that nothing of it can have changed, so it is derived anew only where
something may have. And a status that says what is over in a moment (a template being asked about, a device being made
or taken away) waits for the one that follows it: the UsageRecord is the authority on seconds, not the status. What is
remembered here saves work and writes; a process that restarts without it writes the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from gpu_tenancy.api.base import ConditionStatus, parse_duration
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, LeaseCondition, Reason
from gpu_tenancy.core import status
from gpu_tenancy.core.actions import Outlook, Plan
from gpu_tenancy.core.snapshot import Failure, LeaseFacts

LINGER: Final = timedelta(seconds=1)
LONGEST_LINGER: Final = timedelta(seconds=5)
"""How long a status that is about to change waits for the next one: in a burst, when a cycle takes long, for as many
cycles as a lease usually needs to get from one state to the next."""
STEPS: Final = 4
"""From the end of a segment: slots, withdrawal, release, settlement."""
PASSING: Final = frozenset({Reason.CHECKING_TEMPLATE, Reason.PREPARING, Reason.DRAINING})
"""Reasons of a lease on its way to being Ready, or away from it, that usually last for less than LINGER."""


@dataclass(slots=True)
class _Known:
    """A status and what it was derived from."""

    outlook: Outlook
    failure: Failure | None
    status: GpuLeaseStatus
    until: datetime
    """From then on it may say something else though nothing happened."""
    state: str
    """It in one word."""
    said: bool = False
    """It is stored, or differs too little to be."""


class Statuses:
    """Statuses of leases, by UID."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._written: dict[str, datetime] = {}
        self._held: dict[str, datetime] = {}
        self._linger = LINGER

    @property
    def wake(self) -> datetime | None:
        """When the first status that was held back is due; None: none is."""
        return min(self._held.values(), default=None)

    def changing(self, plan: Plan, failures: Mapping[str, Failure], now: datetime) -> dict[str, GpuLeaseStatus]:
        """The statuses of all leases, by UID, but for those that are said already and cannot have changed."""
        known = self._known
        roused = [
            one
            for one in plan.resting
            if (held := known.get(one.lease.uid)) is None
            or held.outlook is not one
            or not held.said
            or held.failure is not None
            or now >= held.until
        ]
        return {one.lease.uid: self.derive(one, failures.get(one.lease.uid), now) for one in (*plan.moving, *roused)}

    def derive(self, outlook: Outlook, failure: Failure | None, now: datetime) -> GpuLeaseStatus:
        """The status of a lease."""
        uid = outlook.lease.uid
        known = self._known.get(uid)
        if known is None or now >= known.until or (known.outlook, known.failure) != (outlook, failure):
            fresh = status.lease_status(outlook, failure, now)
            known = self._known[uid] = _Known(outlook, failure, fresh, self._lasts_until(outlook, now), _state(fresh))
        known.outlook = outlook  # equal, and the one that is compared next
        return known.status

    def states(self) -> Counter[str]:
        """Leases by their one-word state."""
        return Counter(known.state for known in self._known.values())

    def is_said(self, uid: str) -> bool:
        """The status derived last needs no write any more."""
        known = self._known.get(uid)
        return known is not None and known.said

    def is_due(self, lease: LeaseFacts, new: GpuLeaseStatus, now: datetime) -> bool:
        """Whether to write a status that is not the stored one."""
        uid = lease.uid
        if not status.differs(lease.status, new, self._written.get(uid), now):
            self._settle(uid)
            return False
        return not _is_passing(new) or now >= self._held.setdefault(uid, now + self._linger)

    def stored(self, uid: str, now: datetime) -> None:
        """The status derived last is what the API server has."""
        self._written[uid] = now
        self._settle(uid)

    def paced(self, cycle: timedelta) -> None:
        """The last cycle took so long."""
        self._linger = min(LONGEST_LINGER, max(LINGER, STEPS * cycle))

    def keep(self, present: AbstractSet[str]) -> None:
        """Forget all other leases."""
        for memory in (self._known, self._written, self._held):
            for uid in memory.keys() - present:
                del memory[uid]

    def _lasts_until(self, outlook: Outlook, now: datetime) -> datetime:
        """Costs are brought up to date now and then, and notice is given without anything else happening."""
        changes = [now + status.REFRESH, self._written.get(outlook.lease.uid, now) + status.REFRESH]
        if outlook.expires_at is not None:
            changes.append(outlook.expires_at - parse_duration(outlook.lease.spec.term.notice))
        return min(change for change in changes if change > now)

    def _settle(self, uid: str) -> None:
        self._held.pop(uid, None)
        if known := self._known.get(uid):
            known.said = True


def _state(one: GpuLeaseStatus) -> str:
    return next((str(condition.reason) for condition in one.conditions if condition.type is ConditionType.READY), "New")


def _is_passing(new: GpuLeaseStatus) -> bool:
    """Usually over in less than LINGER. Never: that nothing moves, a failure, or a device that was lost."""
    conditions = {one.type: one for one in new.conditions}
    if _holds(conditions[ConditionType.READY]) or _holds(conditions[ConditionType.STALLED]):
        return False
    if new.ended is not None:
        return not _holds(conditions[ConditionType.SETTLED])
    reconciling = conditions[ConditionType.RECONCILING]
    draining = _holds(reconciling) and reconciling.reason is Reason.DRAINING
    return draining or conditions[ConditionType.READY].reason in PASSING


def _holds(condition: LeaseCondition) -> bool:
    return condition.status is ConditionStatus.TRUE
