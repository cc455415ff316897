"""Promises on record: what the statuses of leases and tenants say is kept for whom, GPU by GPU. Pure.

Read before anything is planned, because whether a lease may be extended depends on who was promised its devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from gpu_tenancy.api.node import Slot
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts, TenantFacts
from gpu_tenancy.mig.layout import device_mask

LEAD: Final = timedelta(minutes=1)
"""So long before a promise begins its devices have to be free of leases: a hand-over takes a second or two, a pod up to
30 s to stop, and nobody's start is to be late because somebody's end was."""


def lease_key(uid: str) -> str:
    """Under which devices are kept for a lease."""
    return f"lease:{uid}"


def commitment_key(tenant: str, name: str) -> str:
    """Under which devices are kept for a tenant's commitment, followed by from when on."""
    return f"commitment:{tenant}/{name}@"


class _Kept(NamedTuple):
    key: str
    profile: str
    start: int
    begins: datetime


class Promises:
    """What is promised to whom."""

    def __init__(self, leases: Iterable[LeaseFacts], tenants: Iterable[TenantFacts]) -> None:
        self._kept: dict[str, list[_Kept]] = defaultdict(list)
        """By UUID of the GPU."""
        for lease in leases:
            if (reservation := lease.status.reservation) is not None and not lease.status.ended:
                key, profile = lease_key(lease.uid), lease.spec.gpus.profile
                for place in reservation.places:
                    self._kept[place.gpu].append(_Kept(key, profile, place.start, reservation.begins))
        for tenant in tenants:
            profiles = {one.name: one.profile for one in tenant.spec.commitments} if tenant.spec else {}
            for said in tenant.status.commitments:
                key = commitment_key(tenant.name, said.name)
                for kept in said.places if said.name in profiles else ():
                    self._kept[kept.gpu].append(_Kept(key, profiles[said.name], kept.start, kept.begins))

    def earliest(self, lease: LeaseFacts, held: Iterable[tuple[NodeFacts, Slot]]) -> datetime | None:
        """From when on some part of what a lease holds is promised to somebody else; None: of nothing."""
        own, found = lease_key(lease.uid), []
        for node, slot in held:
            kept, gpu = self._kept.get(slot.gpu), node.gpu_of.get(slot.gpu)
            if not kept or gpu is None:
                continue
            mask = device_mask(gpu.model, slot.profile, slot.start)
            found += [
                one.begins for one in kept if one.key != own and mask & device_mask(gpu.model, one.profile, one.start)
            ]
        return min(found, default=None)
