"""UsageRecord: one billing segment of a lease; the ledger.

Created open when a lease becomes ready, closed by one update, then immutable. Never owned by the lease: it outlives it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gpu_tenancy.api.base import ApiModel, Time
from gpu_tenancy.api.lease import Price, Reason, Tier


class BilledDevice(ApiModel):
    """One device of the segment."""

    node: str = Field(max_length=253)
    """Node it was on."""
    device: str = Field(max_length=63)
    """Name of the device."""
    gpu: str = Field(max_length=96)
    """UUID of its GPU."""


class UsageRecordSpec(ApiModel):
    """What was held, by whom, from when to when, at which price."""

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
    reason: Reason | None = None
    """Why the segment ended: Expired, Completed, Failed, Deleted, Suspended or NodeLost."""


class UsageRecord(ApiModel):
    """One billing segment of a lease."""

    spec: UsageRecordSpec
    """The segment."""
