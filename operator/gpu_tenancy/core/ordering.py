"""Who is planned first: the firmer tier, the tenant with least for its weight, the oldest of its leases. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from heapq import heapify, heappop, heapreplace
from typing import Final, TypeVar

from gpu_tenancy.api.lease import Tier
from gpu_tenancy.core.snapshot import Key, LeaseFacts
from gpu_tenancy.core.tenancy import Tenant

T = TypeVar("T")
Rank = tuple[datetime, Key]

TIERS: Final = (Tier.RESERVED, Tier.ON_DEMAND, Tier.SPOT)
"""The firmest first."""
PREEMPTIBLE: Final = Tier.SPOT
"""The tier that gives way, with notice, to every other, and for which nobody but miners gives way."""


def in_order(leases: Iterable[LeaseFacts]) -> list[LeaseFacts]:
    """First come, first served; a lease that cannot be placed does not hold up a later one that can."""
    return sorted(leases, key=rank)


def rank(lease: LeaseFacts) -> Rank:
    """Its place by age."""
    return lease.created, lease.key


def in_turn(
    waiting: Iterable[T],
    lease_of: Callable[[T], LeaseFacts],
    tenant_of: Callable[[LeaseFacts], Tenant],
    share: Callable[[Tenant], float],
    ahead: Collection[str] = (),
) -> Iterator[T]:
    """Those who wait: by tier, then those that are `ahead` of all others of it (UIDs: others make room for them
    already), then by the shares of their tenants as they are when the next one is asked for; then by age.

    `waiting` is in order of age. Between two of them only the share of the former one's tenant may change.
    """
    tiers: dict[Tier, tuple[list[T], list[T]]] = {tier: ([], []) for tier in TIERS}
    for one in waiting:
        lease = lease_of(one)
        tiers[lease.spec.tier][lease.uid not in ahead].append(one)
    for first, others in tiers.values():
        yield from first
        if others:
            yield from _by_shares(others, lease_of, tenant_of, share)


def _by_shares(
    waiting: Iterable[T],
    lease_of: Callable[[T], LeaseFacts],
    tenant_of: Callable[[LeaseFacts], Tenant],
    share: Callable[[Tenant], float],
) -> Iterator[T]:
    lines: dict[str, tuple[Tenant, deque[T]]] = {}
    for one in waiting:
        tenant = tenant_of(lease_of(one))
        _, line = lines.get(tenant.title) or lines.setdefault(tenant.title, (tenant, deque()))
        line.append(one)
    if len(lines) == 1:
        yield from next(iter(lines.values()))[1]
        return
    # No two leases have one rank: tenants and lines are never compared.
    heads = [(share(tenant), rank(lease_of(line[0])), tenant, line) for tenant, line in lines.values()]
    heapify(heads)
    while heads:
        _, _, tenant, line = heads[0]
        yield line.popleft()
        if line:
            heapreplace(heads, (share(tenant), rank(lease_of(line[0])), tenant, line))
        else:
            heappop(heads)
