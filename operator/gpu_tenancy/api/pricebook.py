"""PriceBook: what a device costs per hour, from when.

Schema, rules and columns only; which book is in effect is decided in ``gpu_tenancy.core``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from gpu_tenancy.api.base import ApiModel, ConditionStatus, Currency, DecimalString, Message, Profile, Time
from gpu_tenancy.api.kinds import AGE, Column, Kind, condition_column, immutable, list_map, rules


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


class RateTier(StrEnum):
    """Tiers that a rate is for."""

    ANY = "Any"
    RESERVED = "Reserved"
    ON_DEMAND = "OnDemand"
    SPOT = "Spot"


class Rate(ApiModel):
    """Price of one device of a model and profile, for leases of one tier or of any."""

    model: str = Field(min_length=1, max_length=63)
    """GPU model, e.g. A100-SXM4-80GB."""
    profile: Profile
    """`full` or a MIG profile of that model."""
    tier: RateTier = RateTier.ANY
    """Tier of the leases that it is for. Any, which is meant where it is absent: all tiers that have no rate of their
    own for that model and profile."""
    per_hour: DecimalString
    """Price per device and hour as a decimal string, e.g. "145.00"; billed by the second."""


_NEW_BOOK: Final = "because leases may have been priced from it; make a new PriceBook with a later effectiveFrom"


class PriceBookSpec(ApiModel):
    """Rates in one currency from one instant on. A book is never rewritten: prices change by a new book."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            immutable("currency", f"spec.currency is immutable, {_NEW_BOOK}"),
            immutable("effectiveFrom", f"spec.effectiveFrom is immutable, {_NEW_BOOK}"),
            immutable("rates", f"spec.rates is immutable, {_NEW_BOOK}"),
        )
    )

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
            json_schema_extra=list_map("model", "profile", "tier"),
        ),
    ]
    """One rate per model, profile and tier; a lease for which there is none is refused."""


class BookCondition(ApiModel):
    """metav1.Condition of a price book."""

    type: BookConditionType
    """InEffect or Conflict."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: BookReason
    """Machine-readable cause."""
    message: Message = ""
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
        Field(max_length=8, json_schema_extra=list_map("type")),
    ] = []
    """InEffect, Conflict."""


class PriceBook(ApiModel):
    """What a device costs per hour, by model and profile, from an instant on. Never rewritten: prices change by a new
    book, and leases already admitted keep the price they were admitted with."""

    spec: PriceBookSpec
    """Currency, rates, and when they begin."""
    status: PriceBookStatus | None = None
    """Whether they are in effect. Written by the operator only."""


KIND: Final = Kind(
    model=PriceBook,
    plural="pricebooks",
    short_name="pbook",
    namespaced=False,
    columns=(
        condition_column("InEffect", "InEffect", "status"),
        condition_column("Conflict", "Conflict", "status"),
        Column("Currency", ".spec.currency"),
        Column("From", ".spec.effectiveFrom"),
        AGE,
        condition_column("Reason", "InEffect", wide=True),
    ),
)
