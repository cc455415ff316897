"""Who is planned first: the tenant that has had least for its weight, then the oldest of its leases. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from heapq import heapify, heappop, heapreplace
from typing import TypeVar

from gpu_tenancy.core.snapshot import Key, LeaseFacts
from gpu_tenancy.core.tenancy import Tenant

T = TypeVar("T")
Rank = tuple[datetime, Key]


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
) -> Iterator[T]:
    """Those who wait, by the shares of their tenants as they are when the next one is asked for; then by age.

    `waiting` is in order of age. Between two of them only the share of the former one's tenant may change.
    """
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
