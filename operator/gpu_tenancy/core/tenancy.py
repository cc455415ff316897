"""Who is whose tenant, what its limits are, and how its use of the past fades. Pure.

A GpuTenant makes several namespaces one customer; a namespace that none claims is a tenant of its own, with the
defaults of the operator's settings. What tenants hold and who is next is in `core.shares`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from math import expm1, log
from typing import Final, NamedTuple

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.api.lease import Tier
from gpu_tenancy.api.tenant import Quota
from gpu_tenancy.core.snapshot import TenantDefaults, TenantFacts
from gpu_tenancy.mig.profiles import FULL, widths

FORGOTTEN: Final = 20
"""Half-lives after which a closed segment counts for nothing: a millionth of what it was is left."""
_LN2: Final = log(2)


Limits = tuple[int | None, int | None, int | None]
"""Most whole GPUs, memory slices and compute slices; None: as many as there are."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One customer."""

    title: str
    """What sentences call it, and what tells it from others: "tenant acme", "namespace team-a"."""
    weight: int
    limits: Limits | None
    """What it may hold at a time; None: as much as there is."""
    max_term: str | None
    """Longest term of its leases, as it was written."""
    longest: timedelta | None
    """The same as a length."""
    tiers: tuple[Tier, ...] = ()
    """Tiers of its leases; none: all."""


def customer(
    title: str, weight: int, quota: Quota, max_term: str | None, tiers: Sequence[Tier] | None = None
) -> Tenant:
    """A tenant with what its limits come to, which is asked for each lease."""
    limits = (quota.gpus, quota.memory_slices, quota.compute_slices)
    return Tenant(
        title,
        weight,
        None if limits == (None, None, None) else limits,
        max_term,
        parse_duration(max_term) if max_term else None,
        tuple(tiers or ()),
    )


def title_of(name: str) -> str:
    """Title of the tenant that a GpuTenant makes."""
    return f"tenant {name}"


class Conflict(NamedTuple):
    """Another tenant, and the namespaces that it has of those that two claim."""

    owner: str
    namespaces: tuple[str, ...]


class Tenants:
    """All customers of one snapshot."""

    def __init__(self, facts: Iterable[TenantFacts], defaults: TenantDefaults) -> None:
        """Of two that claim a namespace the older one has it, and of those of one age the first by name."""
        self._defaults = defaults
        self._of: dict[str, Tenant] = {}
        self.conflicts: dict[str, tuple[Conflict, ...]] = {}
        """By name of the GpuTenant that does without."""
        owners: dict[str, str] = {}
        for one in sorted(facts, key=lambda one: (one.created, one.name)):
            if one.spec is None:
                continue
            spec = one.spec
            tenant = customer(title_of(one.name), spec.weight, spec.quota, spec.max_term, spec.tiers)
            for namespace in spec.namespaces:
                owners.setdefault(namespace, one.name)
                self._of.setdefault(namespace, tenant)
            if lost := _lost(one.name, spec.namespaces, owners):
                self.conflicts[one.name] = lost

    def of(self, namespace: str) -> Tenant:
        """The customer that the leases of a namespace belong to now."""
        tenant = self._of.get(namespace)
        if tenant is None:
            defaults = self._defaults
            tenant = self._of[namespace] = customer(f"namespace {namespace}", 1, defaults.quota, defaults.max_term)
        return tenant


def _lost(name: str, namespaces: Iterable[str], owners: Mapping[str, str]) -> tuple[Conflict, ...]:
    by_owner: dict[str, set[str]] = defaultdict(set)
    for namespace in namespaces:
        if owners[namespace] != name:
            by_owner[owners[namespace]].add(namespace)
    return tuple(Conflict(owner, tuple(sorted(found))) for owner, found in sorted(by_owner.items()))


class Holding(NamedTuple):
    """Devices, counted as quotas count them."""

    gpus: int = 0
    """Whole GPUs."""
    memory_slices: int = 0
    """Of all devices; a whole GPU has 8."""
    compute_slices: int = 0
    """Of all devices; a whole GPU has 7."""


@lru_cache(maxsize=4096)
def holding(profile: str, devices: int) -> Holding:
    """What so many devices of a profile count as."""
    memory, compute = widths(profile)
    return Holding(devices if profile == FULL else 0, memory * devices, compute * devices)


# --- what fades -------------------------------------------------------------------------------------------------------


def decay_rate(half_life: timedelta) -> float:
    """Of what fades, per second."""
    return _LN2 / half_life.total_seconds()


def decayed(slices: int, start: datetime, end: datetime, at: datetime, half_life: timedelta) -> float:
    """Slice-seconds of a segment as they count at an instant: the integral over its seconds of 2^(-age / half-life).

    `at` may be before its end: sums reckoned to one instant are brought to another by `faded`.
    """
    rate = decay_rate(half_life)
    length = max(0.0, (end - start).total_seconds())
    since = 1.0 if end is at else _power((at - end) / half_life)
    return slices / rate * since * -expm1(-rate * length)


def faded(slice_seconds: float, since: datetime, at: datetime, half_life: timedelta) -> float:
    """What was reckoned to one instant, as it counts at another."""
    return slice_seconds * _power((at - since) / half_life)


def _power(half_lives: float) -> float:
    """What is left after so many half-lives."""
    return float(2.0**-half_lives)
