"""PriceBook: what a device costs per hour, from when."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from gpu_tenancy.api.base import ApiModel, ConditionStatus, Currency, DecimalString, Time


class BookConditionType(StrEnum):
    """Conditions of a PriceBook."""

    IN_EFFECT = "InEffect"
    CONFLICT = "Conflict"


class BookReason(StrEnum):
    """Machine-readable reasons of a PriceBook's conditions."""

    IN_EFFECT = "InEffect"
    NOT_YET = "NotYet"
    SUPERSEDED = "Superseded"
    SAME_INSTANT = "SameInstant"
    NONE = "None"
    INVALID_SPEC = "InvalidSpec"


class Rate(ApiModel):
    """Price of one device of a model and profile."""

    model: str = Field(min_length=1, max_length=63)
    """GPU model, e.g. A100-SXM4-80GB."""
    profile: str = Field(min_length=1, max_length=16)
    """`full` or a MIG profile of that model."""
    per_hour: DecimalString
    """Price per device and hour as a decimal string, e.g. "145.00"; billed by the second."""


class PriceBookSpec(ApiModel):
    """Rates in one currency from one instant on."""

    currency: Currency
    """ISO 4217 code, e.g. RUB."""
    effective_from: Time
    """When these rates begin, RFC 3339 UTC. In effect is the latest book that has begun; leases already admitted keep
    the price they were admitted with."""
    rates: Annotated[
        list[Rate],
        Field(
            min_length=1,
            max_length=256,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["model", "profile"]},
        ),
    ]
    """One rate per model and profile; a lease for which there is none is refused."""


class BookCondition(ApiModel):
    """metav1.Condition of a price book."""

    type: BookConditionType
    """InEffect or Conflict."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: BookReason
    """Machine-readable cause."""
    message: str = Field(default="", max_length=1024)
    """The cause in plain English."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int = Field(ge=0)
    """Generation of the spec that this condition was computed from."""


class PriceBookStatus(ApiModel):
    """Whether the book is in effect. Written by the operator only."""

    observed_generation: int | None = None
    """Generation of the spec that this status was computed from."""
    conditions: Annotated[
        list[BookCondition],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = []
    """InEffect, Conflict."""


class PriceBook(ApiModel):
    """Rates per model and profile."""

    spec: PriceBookSpec
    """The rates."""
    status: PriceBookStatus | None = None
    """Whether they are in effect."""
