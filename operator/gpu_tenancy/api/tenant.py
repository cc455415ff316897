"""GpuTenant: which namespaces are one customer, its weight in the queue, and what it may hold at a time.

Schema, rules and columns only; who is whose tenant and who is next is decided in ``gpu_tenancy.core``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from gpu_tenancy.api.base import (
    DURATION_PATTERN,
    ApiModel,
    ConditionStatus,
    DecimalString,
    Duration,
    Message,
    PlannedTime,
    Profile,
    Time,
)
from gpu_tenancy.api.kinds import AGE, Column, Kind, condition_column, list_map, rule, rules
from gpu_tenancy.api.lease import Place, Tier


class TenantConditionType(StrEnum):
    """Conditions of a GpuTenant."""

    READY = "Ready"


class TenantReason(StrEnum):
    """Machine-readable reasons of a GpuTenant's conditions."""

    SERVING = "Serving"
    SHORT = "Short"
    CONFLICT = "Conflict"
    INVALID_SPEC = "InvalidSpec"


_LABEL_REMEDY: Final = (
    "is no name of a namespace: write at most 63 characters of a-z, 0-9 and -, with no - at either end"
)

Namespace = Annotated[
    str,
    Field(
        min_length=1,
        max_length=63,
        json_schema_extra=rules(
            rule(
                "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                f"an entry of spec.namespaces {_LABEL_REMEDY}",
                computed=f"'spec.namespaces: ' + self + ' {_LABEL_REMEDY}'",
            )
        ),
    ),
]
"""Name of a namespace."""

FULL_PROFILE: Final = "full"
MOST_COMMITTED: Final = 512
"""Devices of one commitment: their places stand in the tenant's status."""
MOST_GPUS: Final = 1_000_000
"""More than any quota needs; a bound that the schema can check."""


class Quota(ApiModel):
    """What a tenant may hold at a time, over all of its namespaces; what is absent is not limited."""

    gpus: int | None = Field(default=None, ge=0, le=MOST_GPUS)
    """Whole GPUs at a time."""
    memory_slices: int | None = Field(default=None, ge=0, le=8 * MOST_GPUS)
    """Memory slices of all devices at a time; a whole GPU counts as 8, a 3g as 4."""
    compute_slices: int | None = Field(default=None, ge=0, le=7 * MOST_GPUS)
    """Compute slices of all devices at a time; a whole GPU counts as 7, a 3g as 3."""


class Step(ApiModel):
    """A change of a commitment's size."""

    begins: PlannedTime = Field(validation_alias="from", serialization_alias="from")
    """From when on."""
    count: int = Field(ge=0, le=MOST_COMMITTED)
    """Devices from then on."""


class Commitment(ApiModel):
    """Capacity that is kept for a tenant's Reserved leases."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.until) || self.until > self.from",
                "spec.commitments[].until must be after from; leave it out for a commitment without end",
                field=".until",
            ),
            rule(
                "!has(self.ramp) || self.ramp.all(step, step.from > self.from && (!has(self.until) || "
                "step.from < self.until))",
                "spec.commitments[].ramp: every step must lie between from and until",
                field=".ramp",
            ),
            rule(
                "!has(self.ramp) || self.ramp.all(step, self.ramp.exists_one(other, other.from == step.from))",
                "spec.commitments[].ramp has two steps at one instant; leave one of the two out",
                field=".ramp",
            ),
        )
    )

    name: str = Field(min_length=1, max_length=63)
    """Name, by which leases refer to it."""
    model: str = Field(min_length=1, max_length=63)
    """GPU model, e.g. A100-SXM4-80GB."""
    profile: Profile = FULL_PROFILE
    """`full` for whole GPUs, or a MIG profile by its name on that model."""
    count: int = Field(ge=0, le=MOST_COMMITTED)
    """Devices at the beginning."""
    begins: PlannedTime = Field(validation_alias="from", serialization_alias="from")
    """From when on capacity is kept. Until then leases that end in time use it, and miners and Spot leases always do
    while no Reserved lease draws on it."""
    until: PlannedTime | None = None
    """Until when; absent: without end."""
    ramp: Annotated[list[Step], Field(max_length=32)] = []
    """Later sizes, each from its instant on."""


class GpuTenantSpec(ApiModel):
    """Who is one customer, and what it may have."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.namespaces.all(one, self.namespaces.exists_one(other, other == one))",
                "spec.namespaces names a namespace twice; leave one of the two out",
                field=".namespaces",
            ),
            rule(
                f"!has(self.maxTerm) || !self.maxTerm.matches('{DURATION_PATTERN}')"
                " || duration(self.maxTerm) > duration('0s')",
                "spec.maxTerm must be longer than zero; leave it out for leases of any length",
                computed="'spec.maxTerm ' + self.maxTerm + ' must be longer than zero; leave it out for leases of any "
                "length'",
                field=".maxTerm",
            ),
        )
    )

    namespaces: Annotated[list[Namespace], Field(min_length=1, max_length=64)]
    """Namespaces whose leases are this tenant's. One that another tenant claims too belongs to the older of the two."""
    weight: int = Field(default=1, ge=1, le=1000)
    """Its part of what tenants share over time: one with weight 3 gets three times as much as one with weight 1 while
    both have leases that wait."""
    quota: Quota = Quota()
    """What it may hold at a time. Running leases are never ended because a quota was lowered."""
    commitments: Annotated[list[Commitment], Field(max_length=16, json_schema_extra=list_map("name"))] = []
    """Capacity that is kept for its leases of tier Reserved. What it costs is finance's."""
    max_term: Duration | None = None
    """Longest term.duration of its leases, e.g. 72h: a lease without a duration, or with a longer one, is refused, and
    so is an extension beyond it. Absent: no limit."""
    tiers: Annotated[
        list[Tier] | None,
        Field(min_length=1, max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = None
    """Tiers of which it may have new leases, e.g. [Spot]. Absent: all."""


class TenantCondition(ApiModel):
    """metav1.Condition of a tenant."""

    type: TenantConditionType
    """Ready."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: TenantReason
    """Machine-readable cause."""
    message: Message = ""
    """The cause in plain English."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int = Field(ge=0)
    """Generation of the spec that this condition was computed from."""


class Holds(ApiModel):
    """What a tenant's leases hold now."""

    gpus: int = Field(default=0, ge=0)
    """Whole GPUs."""
    memory_slices: int = Field(default=0, ge=0)
    """Memory slices of all devices; 8 for a whole GPU."""
    compute_slices: int = Field(default=0, ge=0)
    """Compute slices of all devices; 7 for a whole GPU."""


class DecayedUsage(ApiModel):
    """What a tenant has used, the past counting less and less, up to `asOf`."""

    slice_hours: DecimalString
    """Billed hours × memory slices; what lies one half-life back counts half. For the order of the queue, not for
    money."""
    as_of: Time
    """Instant up to which this was computed; moves on transitions, else at most every five minutes."""


class KeptPlace(Place):
    """A device that is kept for a commitment."""

    begins: Time = Field(validation_alias="from", serialization_alias="from")
    """From when on: others may use it until then."""


class CommitmentStatus(ApiModel):
    """What is kept for one commitment, and what of it is in use."""

    name: str = Field(max_length=63)
    """The commitment."""
    count: int = Field(ge=0)
    """Devices that are committed now."""
    drawn: int = Field(ge=0)
    """Devices that Reserved leases hold."""
    kept: int = Field(ge=0)
    """Devices that are kept free for more of them now, and not in use."""
    short: int = Field(ge=0)
    """Devices that are committed, now or later, and that nothing could be kept for: firm leases hold them, or they are
    broken or not there."""
    places: Annotated[list[KeptPlace], Field(max_length=MOST_COMMITTED)] = []
    """What is kept, now and for later steps."""


class GpuTenantStatus(ApiModel):
    """Whether the tenant is served, and what it has. Written by the operator only."""

    observed_generation: int | None = None
    """Generation of the spec that this status was computed from."""
    conditions: Annotated[
        list[TenantCondition],
        Field(max_length=8, json_schema_extra=list_map("type")),
    ] = []
    """Ready."""
    holds: Holds | None = None
    """What its leases hold now."""
    commitments: Annotated[list[CommitmentStatus], Field(max_length=16, json_schema_extra=list_map("name"))] = []
    """What is kept for its commitments."""
    share: DecayedUsage | None = None
    """What it has used. Of two tenants whose leases wait, the one with less of it for its weight is next."""


class GpuTenant(ApiModel):
    """One customer: the namespaces that belong to it, its weight in the queue, and its limits. A namespace that no
    tenant claims is a tenant of its own, with weight 1 and the default limits of the operator's settings."""

    spec: GpuTenantSpec
    """Who is one customer, and what it may have."""
    status: GpuTenantStatus | None = None
    """Whether it is served, what it holds and has used. Written by the operator only."""


KIND: Final = Kind(
    model=GpuTenant,
    plural="gputenants",
    short_name="gputen",
    namespaced=False,
    columns=(
        condition_column("State", "Ready"),
        Column("Weight", ".spec.weight", "integer"),
        Column("GPUs", ".status.holds.gpus", "integer"),
        Column("Quota", ".spec.quota.gpus", "integer"),
        Column("Slices", ".status.holds.memorySlices", "integer"),
        Column("Used", ".status.share.sliceHours"),
        AGE,
        Column("Compute", ".status.holds.computeSlices", "integer", wide=True),
        Column("MaxTerm", ".spec.maxTerm", wide=True),
    ),
)
