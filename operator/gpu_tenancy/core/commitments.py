"""Commitments: how much capacity each tenant is owed and when, and which Reserved lease draws on which. Pure.

Where the capacity is kept is `core.bookings`' business; what it costs is finance's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final

from gpu_tenancy.api.lease import Reason, Tier
from gpu_tenancy.api.tenant import Commitment, KeptPlace
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.rest import Stocks
from gpu_tenancy.core.snapshot import LeaseFacts, TenantFacts
from gpu_tenancy.core.tenancy import Tenants, title_of

ASK: Final = "Ask the platform team for a larger commitment, or take another tier."


class Committed:
    """One commitment of one tenant, and what is drawn on it in a plan."""

    def __init__(self, tenant: str, spec: Commitment, places: Sequence[KeptPlace], now: datetime) -> None:
        """`places`: where it is kept, as the tenant's status said last."""
        self.tenant = tenant
        self.spec = spec
        self.places = places
        self.drawn = 0
        """Devices that Reserved leases hold, those placed in this plan included."""
        self._now = now

    @property
    def title(self) -> str:
        """What sentences call it."""
        return f"commitment {self.spec.name} of {title_of(self.tenant)}"

    @property
    def kind(self) -> str:
        """What it consists of, for people."""
        return f"{self.spec.profile} ({self.spec.model})"

    @property
    def count(self) -> int:
        """Devices that are committed now."""
        return self.size(self._now)

    @property
    def largest(self) -> int:
        """The most devices that it has from now on."""
        return max(self.size(at) for at in self.changes())

    def size(self, at: datetime) -> int:
        """Devices that are committed at an instant."""
        spec = self.spec
        if at < spec.begins or (spec.until is not None and at >= spec.until):
            return 0
        steps = sorted((step.begins, step.count) for step in spec.ramp if step.begins <= at)
        return steps[-1][1] if steps else spec.count

    def changes(self) -> list[datetime]:
        """Now, and each later instant at which its size changes."""
        spec = self.spec
        instants = (spec.begins, *(step.begins for step in spec.ramp), *([spec.until] if spec.until else []))
        return sorted({self._now, *(instant for instant in instants if instant > self._now)})

    def suits(self, lease: LeaseFacts) -> bool:
        """A lease asks for what it consists of."""
        gpus = lease.spec.gpus
        return gpus.profile == self.spec.profile and gpus.model in (None, self.spec.model)


class Pledges:
    """All commitments, and what leases draw on them."""

    def __init__(self, facts: Iterable[TenantFacts], tenants: Tenants, now: datetime) -> None:
        self._tenants = tenants
        self._of: dict[str, list[Committed]] = defaultdict(list)
        """By title of the tenant."""
        for tenant in facts:
            places = {said.name: said.places for said in tenant.status.commitments}
            for spec in tenant.spec.commitments if tenant.spec else ():
                if spec.until is None or spec.until > now:
                    self._of[title_of(tenant.name)].append(Committed(tenant.name, spec, places.get(spec.name, ()), now))

    def __iter__(self) -> Iterator[Committed]:
        return (committed for all_of_one in self._of.values() for committed in all_of_one)

    def of_tenant(self, name: str) -> Sequence[Committed]:
        """The commitments of a GpuTenant."""
        return self._of.get(title_of(name), ())

    def take_stock(self, stocks: Stocks) -> None:
        """Count what leases hold already."""
        if self._of:
            for stock in stocks.of_tier(Tier.RESERVED):
                if stock.keeps and stock.held:
                    self.draw(stock.lease)

    def draw(self, lease: LeaseFacts) -> None:
        """A Reserved lease holds its devices, or gets them in this plan."""
        if (committed := self.of(lease)) is not None:
            committed.drawn += lease.devices

    def of(self, lease: LeaseFacts) -> Committed | None:
        """What a Reserved lease draws on: what it was admitted under, what it names, or the first that suits and has
        room, else the first that suits."""
        if lease.spec.tier is not Tier.RESERVED:
            return None
        suitable = [one for one in self._of.get(self._title(lease), ()) if one.suits(lease)]
        if name := lease.status.commitment or lease.spec.commitment:
            return next((one for one in suitable if one.spec.name == name), None)
        roomy = (one for one in suitable if one.drawn + lease.devices <= one.count)
        return next(roomy, suitable[0] if suitable else None)

    def named(self, lease: LeaseFacts) -> str | None:
        """Name of what a lease draws on."""
        committed = self.of(lease)
        return committed.spec.name if committed else None

    def refusal(self, lease: LeaseFacts) -> Refusal | None:
        """Why a Reserved lease may not be placed; None where it may, and for every other tier."""
        if lease.spec.tier is not Tier.RESERVED:
            return None
        committed = self.of(lease)
        if committed is None:
            return Refusal(Reason.NO_COMMITMENT, f"{self._none(lease)} {ASK}", final=True)
        needs = f"this lease needs {lease.devices}"
        if lease.devices > committed.largest:
            has = f"{committed.title} is {committed.largest} × {committed.kind} at most"
            return Refusal(Reason.NO_COMMITMENT, f"{has[0].upper()}{has[1:]}; {needs}. {ASK}", final=True)
        if committed.drawn + lease.devices <= committed.count:
            return None
        has = f"{committed.title} is {committed.count} × {committed.kind} now, of which {committed.drawn} are in use"
        return Refusal(Reason.COMMITMENT_IN_USE, f"{has}; {needs}.")

    def _none(self, lease: LeaseFacts) -> str:
        asked = lease.spec.commitment
        named = f" named {asked}" if asked else ""
        gpus = lease.spec.gpus
        what = f"{gpus.profile}{f' ({gpus.model})' if gpus.model else ''}"
        others = ", ".join(f"{one.spec.name} ({one.kind})" for one in self._of.get(self._title(lease), ()))
        has = f"it has {others}" if others else "it has none"
        title = self._title(lease)
        return f"{title[0].upper()}{title[1:]} has no commitment{named} for {what}; {has}."

    def _title(self, lease: LeaseFacts) -> str:
        return self._tenants.of(lease.key.namespace).title
