"""MiningPool: the flight sheet of the miners that run on GPUs nobody rents.

Schema, rules and columns only; who mines on what is decided in ``gpu_tenancy.core``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from gpu_tenancy.api.base import ApiModel, ConditionStatus, Message, Quantity, Time
from gpu_tenancy.api.kinds import AGE, Column, Kind, condition_column, list_map, name_limit, rule, rules


class Devices(StrEnum):
    """Which idle devices a pool may mine on."""

    WHOLE = "Whole"
    ANY = "Any"


class PoolConditionType(StrEnum):
    """Conditions of a MiningPool."""

    READY = "Ready"
    STALLED = "Stalled"


class PoolReason(StrEnum):
    """Machine-readable reasons of a MiningPool's conditions."""

    MINING = "Mining"
    STARTING = "Starting"
    SUSPENDED = "Suspended"
    NOTHING_IDLE = "NothingIdle"
    INVALID_SPEC = "InvalidSpec"
    API_REJECTED = "ApiRejected"
    UP_TO_DATE = "UpToDate"


_VARIABLE_REMEDY: Final = "must consist of letters, digits, -, _ and ., and not begin with a digit; rename the variable"


class EnvVar(ApiModel):
    """One literal environment variable of the miner. Secrets do not belong here: use payoutSecretRef."""

    name: str = Field(
        min_length=1,
        max_length=253,
        json_schema_extra=rules(
            rule(
                "self.matches('^[-._a-zA-Z][-._a-zA-Z0-9]*$')",
                f"spec.env[].name {_VARIABLE_REMEDY}",
                computed=f"'spec.env[].name ' + self + ' {_VARIABLE_REMEDY}'",
            )
        ),
    )
    """Name of the variable."""
    value: str = Field(default="", max_length=4096)
    """Literal value."""


class MinerResources(ApiModel):
    """CPU and memory that each miner pod requests and is limited to."""

    cpu: Quantity = "500m"
    """CPU cores, e.g. "500m"."""
    memory: Quantity = "1Gi"
    """Memory, e.g. 1Gi."""


class SecretRef(ApiModel):
    """A Secret in the pool's namespace."""

    name: str = Field(min_length=1, max_length=253)
    """Name of the Secret."""


class MiningPoolSpec(ApiModel):
    """Which miner runs on idle GPUs, and where."""

    image: str = Field(min_length=1, max_length=512)
    """Container image of the miner; pin it by digest."""
    command: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=64)] = []
    """Entry point; absent: the image's own."""
    args: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=128)] = []
    """Arguments. Never a wallet: use payoutSecretRef."""
    env: Annotated[
        list[EnvVar],
        Field(max_length=64, json_schema_extra=list_map("name")),
    ] = []
    """Literal environment variables."""
    resources: MinerResources = MinerResources()
    """CPU and memory of each miner pod; a device whose node lacks them is left idle."""
    payout_secret_ref: SecretRef | None = None
    """Secret that is mounted read-only as files under /etc/gpu-tenancy/payout."""
    devices: Devices = Devices.ANY
    """Whole: whole GPUs, and MIG GPUs of which no slice is rented. Any: also the free slices beside rented ones."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Among pools that may use a device the highest priority mines; ties go to the older pool."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] = {}
    """Labels that a node must have."""
    grace_seconds: int = Field(default=1, ge=0, le=5)
    """Seconds a miner gets to stop when its GPU is rented."""
    suspend: bool = False
    """true stops all miners of the pool and starts none."""


class PoolCondition(ApiModel):
    """metav1.Condition of a pool."""

    type: PoolConditionType
    """Ready or Stalled."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: PoolReason
    """Machine-readable cause."""
    message: Message = ""
    """The cause in plain English, with numbers."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int = Field(ge=0)
    """Generation of the spec that this condition was computed from."""


class MiningPoolStatus(ApiModel):
    """What the pool mines on. Written by the operator only."""

    observed_generation: int | None = None
    """Generation of the spec that this status was computed from."""
    conditions: Annotated[
        list[PoolCondition],
        Field(max_length=8, json_schema_extra=list_map("type")),
    ] = []
    """Ready, Stalled."""
    assigned: int = Field(default=0, ge=0)
    """Devices that the pool holds."""
    mining: int = Field(default=0, ge=0)
    """Devices on which a miner of the pool runs."""


class MiningPool(ApiModel):
    """Miners for GPUs that nobody rents; the first to go when somebody does."""

    spec: MiningPoolSpec
    """Which miner runs on idle GPUs, where, and how it is stopped."""
    status: MiningPoolStatus | None = None
    """What it mines on. Written by the operator only."""


KIND: Final = Kind(
    model=MiningPool,
    plural="miningpools",
    short_name="minepool",
    columns=(
        condition_column("State", "Ready"),
        Column("Assigned", ".status.assigned", "integer"),
        Column("Mining", ".status.mining", "integer"),
        Column("Devices", ".spec.devices"),
        Column("Priority", ".spec.priority", "integer"),
        AGE,
        Column("Image", ".spec.image", wide=True),
    ),
    name_rule=name_limit(
        63,
        "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        "must be at most 63 characters of a-z, 0-9 and -, because the miners of the pool are labelled with it",
    ),
)
