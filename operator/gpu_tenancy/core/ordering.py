"""Who is planned first. Pure; one line to change when tiers and fair share arrive."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from gpu_tenancy.core.snapshot import Key, LeaseFacts


def in_order(leases: Iterable[LeaseFacts]) -> list[LeaseFacts]:
    """First come, first served; a lease that cannot be placed does not hold up a later one that can."""
    return sorted(leases, key=_rank)


def _rank(lease: LeaseFacts) -> tuple[datetime, Key]:
    return lease.created, lease.key
