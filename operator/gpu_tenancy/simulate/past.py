"""What the closed segments of each namespace come to, kept as running sums: a plan asks for it every time. Pure."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Final

from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.snapshot import NO_PAST, PastUsage
from gpu_tenancy.core.tenancy import decayed, faded, holding

REBASED_AFTER: Final = 64
"""Half-lives after which the sums are reckoned to a later instant, so that they stay within what a float can hold."""


class Past:
    """Sums of decayed slice-seconds."""

    def __init__(self, half_life: timedelta) -> None:
        self._half_life = half_life
        self._sums: dict[str, float] = defaultdict(float)
        self._at: datetime | None = None
        self._usage: PastUsage | None = NO_PAST

    def note(self, closed: UsageRecordSpec) -> None:
        """A segment was closed."""
        end = closed.billable_to
        if end is None:
            raise AssertionError("an open segment is not past")
        at = self._rebased(end)
        slices = holding(closed.profile, len(closed.devices)).memory_slices
        worth = decayed(slices, closed.billable_from, end, end, self._half_life)
        self._sums[closed.lease_namespace] += faded(worth, end, at, self._half_life)
        self._usage = None

    def usage(self) -> PastUsage:
        """As it stands: the same object until another segment is closed."""
        if self._usage is None:
            self._usage = PastUsage(self._rebased(None), dict(self._sums))
        return self._usage

    def _rebased(self, to: datetime | None) -> datetime:
        """The instant that the sums are reckoned to, moved to `to` where that is far later."""
        if self._at is None:
            self._at = to or NO_PAST.at
        elif to is not None and to - self._at > REBASED_AFTER * self._half_life:
            for namespace, worth in self._sums.items():
                self._sums[namespace] = faded(worth, self._at, to, self._half_life)
            self._at = to
        return self._at
