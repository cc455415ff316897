"""What each tenant holds and has used, as the plan changes it. Pure.

A tenant's share decides whose lease is looked at next: what it has used, the past fading, for its weight. What it has
just been given counts as if it had been used for a while already, so that a burst of a tenant that had nothing does not
take everything before anybody's clock has moved.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from math import expm1, fsum
from operator import attrgetter
from typing import Final

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.core.rest import Billed, Stocks
from gpu_tenancy.core.snapshot import LeaseFacts, Snapshot
from gpu_tenancy.core.stock import Stock
from gpu_tenancy.core.tenancy import Holding, Tenant, Tenants, decay_rate, decayed, faded, holding
from gpu_tenancy.core.terms import expiry

ENTRY_SECONDS: Final = 600
"""Seconds that every device which is held counts for at least: in the plan that places it, while it is handed over, and
until it was billed for as long."""

_HOLDS: Final = attrgetter("holds")


class Standing:
    """One tenant within one plan."""

    def __init__(self) -> None:
        self.used = 0.0
        """Decayed slice-seconds up to now."""
        self.entry = 0.0
        """Slice-seconds that what it holds lacks of ENTRY_SECONDS."""
        self._gpus = self._memory = self._compute = 0
        self._awaited: list[Holding] = []

    @property
    def holds(self) -> Holding:
        """What its leases hold, those placed in this plan included."""
        return Holding(self._gpus, self._memory, self._compute)

    @property
    def claims(self) -> Holding:
        """What its leases hold, and what is being freed for others of them."""
        if not self._awaited:
            return self.holds
        return Holding(*(sum(each) for each in zip(self.holds, *self._awaited, strict=True)))

    def expect(self, devices: Holding) -> None:
        """Count devices that are being freed for it."""
        self._awaited.append(devices)
        self.entry += devices.memory_slices * ENTRY_SECONDS

    def hold(self, devices: Holding, lacking: float) -> None:
        """Count devices that it holds. `lacking`: seconds for which they were not billed yet, of ENTRY_SECONDS."""
        gpus, memory, compute = devices
        self._gpus += gpus
        self._memory += memory
        self._compute += compute
        self.entry += memory * lacking


class Shares:
    """The standings of all tenants."""

    def __init__(self, tenants: Tenants, snapshot: Snapshot, stocks: Stocks, now: datetime) -> None:
        self._tenants, self._snapshot, self._stocks, self._now = tenants, snapshot, stocks, now
        self._placed: list[LeaseFacts] = []
        """Leases that were placed before anybody asked for a standing."""

    @cached_property
    def _standings(self) -> dict[str, Standing]:
        """By the tenants' titles. Found out when somebody asks: where one tenant without limits waits, nobody does."""
        running: dict[str, list[Billed]] = defaultdict(list)
        used: dict[str, list[float]] = defaultdict(list)
        for namespace, billed in self._stocks.billed():
            running[self._tenants.of(namespace).title] += billed
        for namespace, slice_seconds in self._past():
            used[self._tenants.of(namespace).title].append(slice_seconds)
        standings: dict[str, Standing] = defaultdict(Standing)
        for title, all_of_one in running.items():
            standings[title] = self._standing(all_of_one)
            used[title] += self._used(all_of_one)
        for title, parts in used.items():
            standings[title].used = fsum(parts)  # exact, whatever order the facts are listed in
        for lease in self._placed:
            standings[self.tenant(lease).title].hold(asked(lease), ENTRY_SECONDS)
        return standings

    def _standing(self, running: Sequence[Billed]) -> Standing:
        """What a tenant holds."""
        now, standing = self._now.timestamp(), Standing()
        # Counted by kind: there are many devices and few kinds of them.
        for holds, count in Counter(map(_HOLDS, running)).items():
            standing.hold(Holding(*(each * count for each in holds)), 0.0)
        new = now - ENTRY_SECONDS
        lacking = [holds[1] * min(since - new, ENTRY_SECONDS) for holds, _, since in running if since > new]
        unbilled = sum(holds[1] for holds, slices, _ in running if not slices)
        standing.entry = fsum(lacking) + unbilled * ENTRY_SECONDS
        return standing

    def _used(self, running: Iterable[Billed]) -> list[float]:
        """Decayed slice-seconds of open segments up to now."""
        now, rate = self._now.timestamp(), decay_rate(self._snapshot.tenant_defaults.half_life)
        spans = ((slices, now - since) for _, slices, since in running if slices)
        return [slices / rate * -expm1(-rate * span) for slices, span in spans if span > 0.0]

    def _past(self) -> Iterator[tuple[str, float]]:
        """Namespace and decayed slice-seconds of what is closed, or open though its lease is gone."""
        past, half_life = self._snapshot.past_usage, self._snapshot.tenant_defaults.half_life
        for namespace, used in past.slice_seconds.items():
            yield namespace, faded(used, past.at, self._now, half_life)
        for record in self._snapshot.orphans:
            if (spec := record.spec).billable_to is None:
                slices = holding(spec.profile, len(spec.devices)).memory_slices
                yield spec.lease_namespace, decayed(slices, spec.billable_from, self._now, self._now, half_life)

    def tenant(self, lease: LeaseFacts) -> Tenant:
        """Whose lease it is."""
        return self._tenants.of(lease.key.namespace)

    def standing(self, title: str) -> Standing:
        """What a tenant, by its title, holds and has used."""
        return self._standings[title]

    def share(self, tenant: Tenant) -> float:
        """What a tenant has had for its weight; the lowest is next."""
        standing = self._standings[tenant.title]
        return (standing.used + standing.entry) / tenant.weight

    def take(self, lease: LeaseFacts) -> None:
        """The plan gives the lease its devices."""
        if "_standings" in self.__dict__:
            self._standings[self.tenant(lease).title].hold(asked(lease), ENTRY_SECONDS)
        else:
            self._placed.append(lease)

    def booked(self, lease: LeaseFacts) -> Holding:
        """What the tenant's other leases will hold, as far as is known, while a lease that begins later runs."""
        title, begins = self.tenant(lease).title, lease.spec.term.start or self._now
        length = lease.spec.term.duration
        until = begins + parse_duration(length) if length else None
        others = [
            asked(stock.lease)
            for stock in self._stocks.all
            if stock.lease.uid != lease.uid
            and self.tenant(stock.lease).title == title
            and _overlaps(stock, begins, until)
        ]
        return Holding(*(sum(each) for each in zip(Holding(), *others, strict=True)))

    def expect(self, lease: LeaseFacts) -> None:
        """Devices are being freed for the lease: its tenant has had its turn."""
        self._standings[self.tenant(lease).title].expect(asked(lease))


def _overlaps(stock: Stock, begins: datetime, until: datetime | None) -> bool:
    """A lease holds devices, or was promised some, within a time."""
    promised = stock.lease.status.reservation
    if stock.keeps:
        ends = expiry(stock.lease, stock.term)
        return ends is None or ends > begins
    if promised is None or stock.over or stock.lease.records:
        return False
    return (until is None or promised.begins < until) and (promised.until is None or promised.until > begins)


def asked(lease: LeaseFacts) -> Holding:
    """What the whole lease counts as."""
    return holding(lease.spec.gpus.profile, lease.devices)
