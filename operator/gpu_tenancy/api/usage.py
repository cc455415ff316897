"""UsageRecord: one billing segment of a lease; the ledger.

Created open when a lease becomes ready, closed by one update, then immutable. Never owned by the lease: it outlives
it. Schema, rules and columns only; segments are opened and closed by ``gpu_tenancy.core``.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field

from gpu_tenancy.api.base import ApiModel, Time
from gpu_tenancy.api.kinds import AGE, Column, Kind, immutable, rule, rules
from gpu_tenancy.api.lease import ENDS, Price, Reason, Tier


class BilledDevice(ApiModel):
    """One device of the segment."""

    node: str = Field(max_length=253)
    """Node it was on."""
    device: str = Field(max_length=63)
    """Name of the device."""
    gpu: str = Field(max_length=96)
    """UUID of its GPU."""


_WRITTEN_ONCE: Final = (
    "contract", "segment", "leaseNamespace", "leaseName", "tier", "model", "profile", "devices", "price",
    "billableFrom",
)  # fmt: skip
SEGMENT_ENDS: Final = (*ENDS, Reason.SUSPENDED, Reason.PREEMPTED, Reason.NODE_LOST)
"""Reasons for which a segment ends."""
_CLOSING: Final = ("billableTo", "seconds", "reason")


_NUMBER: Final = "self.metadata.name.substring(self.spec.contract.size() + 1)"
"""CEL: the number in a record's name. (The other way about, number to text, the API server holds to be too costly.)"""


def _stays(field: str) -> str:
    """CEL: a closing field that was there is there unchanged."""
    return f"!has(oldSelf.{field}) || (has(self.{field}) && self.{field} == oldSelf.{field})"


class UsageRecordSpec(ApiModel):
    """What was held, by whom, from when to when, at which price. Written open, closed once, then final."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.billableTo) == has(self.seconds) && has(self.seconds) == has(self.reason)",
                "spec.billableTo, spec.seconds and spec.reason close a segment together: set all three or none",
            ),
            rule(
                "!has(self.billableTo) || self.billableTo >= self.billableFrom",
                "spec.billableTo must not be before spec.billableFrom",
                field=".billableTo",
            ),
            rule(
                "!has(self.billableTo) || !has(self.seconds) || self.billableTo < self.billableFrom"
                " || (self.billableTo - self.billableFrom).getSeconds() == self.seconds",
                "spec.seconds must be the whole seconds from spec.billableFrom to spec.billableTo",
                field=".seconds",
            ),
            *(
                rule(
                    _stays(field),
                    f"spec.{field} is final once the segment is closed; corrections are new records",
                    field=f".{field}",
                    forbids=True,
                )
                for field in _CLOSING
            ),
            *(
                immutable(field, f"spec.{field} is immutable, because the record is evidence of what was billed")
                for field in _WRITTEN_ONCE
            ),
        )
    )

    contract: str = Field(max_length=64)
    """Identity of the contract: the first UID of the lease."""
    segment: int = Field(ge=1)
    """Number of this segment within the contract; the record is named <contract>-<segment>."""
    lease_namespace: str = Field(max_length=63)
    """Namespace of the lease."""
    lease_name: str = Field(max_length=253)
    """Name of the lease."""
    tier: Tier
    """Tier of the lease."""
    model: str = Field(max_length=63)
    """GPU model."""
    profile: str = Field(max_length=16)
    """`full` or a MIG profile."""
    devices: Annotated[
        list[BilledDevice],
        Field(min_length=1, max_length=1024, json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ]
    """The devices held; quantity billed = their number × seconds."""
    price: Price | None = None
    """Price per device and hour; absent for leases admitted without any PriceBook."""
    billable_from: Time
    """First billed instant (inclusive), whole seconds, UTC."""
    billable_to: Time | None = None
    """Last billed instant (exclusive), whole seconds, UTC; absent while the segment is open."""
    seconds: int | None = Field(default=None, ge=0)
    """billableTo − billableFrom; absent while the segment is open."""
    reason: Reason | None = Field(default=None, json_schema_extra={"enum": [str(one) for one in SEGMENT_ENDS]})
    """Why the segment ended: its term, its Job, its owner, a lease of a firmer tier (Preempted), or the loss of its
    devices (NodeLost)."""


class UsageRecord(ApiModel):
    """One billing segment of a lease: the ledger. Written by the operator only; open, then closed once, then final."""

    spec: UsageRecordSpec
    """What was held, by whom, from when to when, at which price."""


KIND: Final = Kind(
    model=UsageRecord,
    plural="usagerecords",
    short_name="usage",
    columns=(
        Column("Lease", ".spec.leaseName"),
        Column("Segment", ".spec.segment", "integer"),
        Column("Profile", ".spec.profile"),
        Column("From", ".spec.billableFrom"),
        Column("To", ".spec.billableTo"),
        Column("Seconds", ".spec.seconds", "integer"),
        # Of a list the API server prints the first entry only: the number of devices can be no column.
        Column("Price", ".spec.price.perHour"),
        Column("Currency", ".spec.price.currency"),
        Column("Reason", ".spec.reason"),
        AGE,
        Column("Contract", ".spec.contract", wide=True),
    ),
    selectable=(".spec.contract", ".spec.leaseNamespace", ".spec.leaseName"),
    name_rule=rule(
        "self.metadata.name.startsWith(self.spec.contract + '-')"
        f" && {_NUMBER}.matches('^[1-9][0-9]{{0,8}}$') && int({_NUMBER}) == self.spec.segment",
        "metadata.name must be <spec.contract>-<spec.segment>, so that no segment can be recorded twice",
        field=".metadata.name",
    ),
)
