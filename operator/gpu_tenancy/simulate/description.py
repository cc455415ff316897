"""What is simulated: nodes, pools, tenants, prices, how long a hand-over takes, what breaks, and the policies.

A YAML file, checked by models; pools, tenants and prices have the very spec of their manifests. Everything that is left
out has a default, the times of hand-overs as they were measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from gpu_tenancy.api.base import Currency, DecimalString, Duration, Quantity, parse_duration
from gpu_tenancy.api.node import Gpu, GpuMode
from gpu_tenancy.api.pool import MiningPoolSpec
from gpu_tenancy.api.pricebook import PriceBookSpec
from gpu_tenancy.api.tenant import GpuTenantSpec, Quota
from gpu_tenancy.core.amounts import Amount, cpu_milli, memory_bytes
from gpu_tenancy.core.snapshot import ConversionRules, SpotLimits, TenantDefaults
from gpu_tenancy.mig.profiles import of_model

MODEL: Final = "A100-SXM4-80GB"
NAMED: Final = 5
"""Errors of a file that its sentence names; of more it gives the number."""


class Part(BaseModel):
    """Base of everything in a description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


class NodeGroup(Part):
    """Nodes that are alike."""

    name: str = Field(pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=50)
    """Name; with a count the nodes are called name-0, name-1, …"""
    count: int = Field(default=1, ge=1, le=100_000)
    """How many."""
    gpus: int = Field(default=8, ge=1, le=16)
    """GPUs of each."""
    mig: int = Field(default=0, ge=0, le=16)
    """How many of them are in MIG mode."""
    convertible: bool = False
    """The operator may convert them between whole and MIG by demand."""
    model: str = MODEL
    """Model of the GPUs by its NVML name."""
    memory_mib: int = Field(default=81_920, ge=1)
    """Memory of a GPU."""
    cpu: Quantity = "128"
    """CPU cores for pods."""
    memory: Quantity = "1Ti"
    """Memory for pods."""
    pods: int = Field(default=250, ge=1)
    """Pod slots."""
    labels: dict[str, str] = {}
    """Labels of the nodes."""

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.mig > self.gpus:
            raise ValueError(f"{self.mig} GPUs in MIG mode are more than the node has; write mig: {self.gpus} or less")
        if self.mig and not of_model(self.model):
            raise ValueError(
                f"the MIG profiles of a {self.model} are not known; write mig: 0, or a model such as {MODEL}"
            )
        return self

    @property
    def names(self) -> list[str]:
        """Of its nodes."""
        return [self.name] if self.count == 1 else [f"{self.name}-{number}" for number in range(self.count)]


class PoolPart(Part):
    """A MiningPool."""

    name: str
    """Its name."""
    namespace: str = "mining"
    """Its namespace."""
    spec: MiningPoolSpec
    """As in its manifest."""


class TenantPart(Part):
    """A GpuTenant."""

    name: str
    """Its name."""
    spec: GpuTenantSpec
    """As in its manifest."""


class BookPart(Part):
    """A PriceBook."""

    name: str
    """Its name."""
    spec: PriceBookSpec
    """As in its manifest."""


class HandOver(Part):
    """Seconds from the operator's decision until a device is ready for its new holder."""

    whole: float = Field(default=1.1, ge=0, le=3600)
    """A whole GPU: its holder stops, it is proven empty, scrubbed and verified."""
    recut: float = Field(default=1.5, ge=0, le=3600)
    """A MIG slice: the same, and instances are destroyed and made."""
    convert: float = Field(default=20.0, ge=0, le=3600)
    """A GPU between whole and MIG: it is reset and answers again."""


class Mining(Part):
    """What a miner earns."""

    per_gpu_hour: DecimalString = "0.00"
    """Of a whole GPU in an hour, after energy; a slice earns its part by memory."""
    currency: Currency = "USD"
    """ISO 4217 code."""


class Faults(Part):
    """What breaks by chance; nothing, unless a mean time is given."""

    node_mean_days: float | None = Field(default=None, gt=0)
    """Mean days between two losses of a node."""
    node_repair: Duration = "4h"
    """How long a lost node is away."""
    xid_mean_days: float | None = Field(default=None, gt=0)
    """Mean days between two faults of a GPU."""
    xid_repair: Duration = "30m"
    """How long a GPU that has a fault is out of use."""


class Policies(Part):
    """What the platform team may change: settings of the operator, and whether anything mines."""

    mining: bool = True
    """false: the pools are left out."""
    usage_half_life_hours: int = Field(default=24, ge=1, le=8760)
    """As in the operator's settings."""
    spot_notice_max: Duration = "5m"
    """As in the operator's settings."""
    conversion: bool = True
    """false: no GPU is converted, convertible or not."""
    conversion_dwell: Duration = "30m"
    """As in the operator's settings."""
    conversions_per_node_hour: int = Field(default=4, ge=0, le=64)
    """As in the operator's settings."""
    default_quota_gpus: int | None = Field(default=None, ge=0)
    """As in the operator's settings."""
    default_quota_memory_slices: int | None = Field(default=None, ge=0)
    """As in the operator's settings."""
    default_quota_compute_slices: int | None = Field(default=None, ge=0)
    """As in the operator's settings."""
    default_max_term: Duration | None = None
    """As in the operator's settings."""

    @property
    def tenant_defaults(self) -> TenantDefaults:
        """What they say of tenants."""
        quota = Quota(
            gpus=self.default_quota_gpus,
            memory_slices=self.default_quota_memory_slices,
            compute_slices=self.default_quota_compute_slices,
        )
        return TenantDefaults(quota, self.default_max_term, timedelta(hours=self.usage_half_life_hours))

    @property
    def spot_limits(self) -> SpotLimits:
        """What they say of spot leases."""
        return SpotLimits(parse_duration(self.spot_notice_max))

    @property
    def conversion_rules(self) -> ConversionRules:
        """What they say of conversions by demand."""
        dwell = parse_duration(self.conversion_dwell)
        return ConversionRules(self.conversion, dwell, self.conversions_per_node_hour)


class Description(Part):
    """A company: what it has, whom it serves, and how."""

    nodes: list[NodeGroup] = Field(min_length=1)
    """Its GPU nodes."""
    pools: list[PoolPart] = []
    """What mines on idle GPUs."""
    tenants: list[TenantPart] = []
    """Its customers; a namespace of the trace that none of them has is a tenant of its own."""
    price_books: list[BookPart] = []
    """Its prices; none: leases run unpriced."""
    hand_over: HandOver = HandOver()
    """How long hand-overs take."""
    mining: Mining = Mining()
    """What mining earns."""
    faults: Faults = Faults()
    """What breaks."""
    policies: Policies = Policies()
    """How it is run."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        named = {
            "node": (name for group in self.nodes for name in group.names),
            "pool": (f"{one.namespace}/{one.name}" for one in self.pools),
            "tenant": (one.name for one in self.tenants),
            "price book": (one.name for one in self.price_books),
        }
        for what, names in named.items():
            if twice := [name for name, times in Counter(names).items() if times > 1]:
                raise ValueError(f"{what} {twice[0]} is there twice; give each {what} a name of its own")
        return self

    @classmethod
    def load(cls, path: Path, changes: Iterable[str] = ()) -> Self:
        """A description from a file. `changes`: `name=value`, each over what the file says; the name is that of a
        policy, or of any other part with its own before a dot: `hand_over.whole=7.4`, `faults.xid_mean_days=90`.

        Raises ValueError with a sentence that names the file and the field.
        """
        values = _read(path)
        for change in changes:
            _change(values, change)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{path}: {in_words(error)}") from error

    def faultless(self) -> Self:
        """The same company, in which nothing breaks."""
        return self.model_copy(update={"faults": Faults()})


def in_words(error: ValidationError) -> str:
    """What is wrong with a file, as clauses that name the fields."""
    found = [_in_words(one["loc"], one["msg"].removeprefix("Value error, ")) for one in error.errors()]
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _in_words(where: tuple[int | str, ...], what: str) -> str:
    return f"{'.'.join(map(str, where))}: {what}" if where else what


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a description: write `nodes:` and, under it, groups of nodes")  # noqa: TRY004
    return values


def _change(values: dict[str, Any], change: str) -> None:
    name, equals, value = change.partition("=")
    if not (name and equals):
        raise ValueError(f'"{change}" changes nothing; write name=value, e.g. mining=false')
    part, _, field = name.rpartition(".")
    section = values.setdefault(_key(values, part or "policies"), {})
    if not isinstance(section, dict):
        raise ValueError(f'"{change}": {part} is a list; change it in the description')  # noqa: TRY004
    try:
        section[_key(section, field)] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f'"{change}": the value is not YAML') from error


def _key(values: Mapping[str, Any], name: str) -> str:
    """The name as the file has it, in whichever of the two spellings."""
    return next((key for key in values if to_camel(str(key)) == to_camel(name)), to_camel(name))


# --- what it comes to -------------------------------------------------------------------------------------------------


class Machine(Part):
    """A node as described."""

    name: str
    """Its name."""
    gpus: tuple[Gpu, ...]
    """Its GPUs."""
    labels: dict[str, str]
    """Its labels."""
    allocatable: tuple[int, int, int]
    """CPU in thousandths, memory in bytes, pod slots."""

    @property
    def amount(self) -> Amount:
        """What it has for pods."""
        return Amount(*self.allocatable)


def machines(description: Description) -> Iterator[Machine]:
    """Every node of a description, in its order."""
    for group in description.nodes:
        allocatable = (cpu_milli(group.cpu), memory_bytes(group.memory), group.pods)
        for name in group.names:
            gpus = tuple(_gpu(group, name, index) for index in range(group.gpus))
            yield Machine(name=name, gpus=gpus, labels=group.labels, allocatable=allocatable)


def _gpu(group: NodeGroup, node: str, index: int) -> Gpu:
    """The last ones of a node are those in MIG mode."""
    mode = GpuMode.MIG if index >= group.gpus - group.mig else GpuMode.WHOLE
    return Gpu(
        index=index,
        uuid=f"GPU-{node}-{index}",
        model=group.model,
        memory_mib=group.memory_mib,
        mode=mode,
        declared=mode,
        convertible=group.convertible,
    )
