"""Settings of the operator."""

from __future__ import annotations

import re
from enum import StrEnum

from pydantic import Field, field_validator

from gpu_tenancy.api.base import LABEL_KEY_PATTERN, Duration
from gpu_tenancy.api.names import SYSTEM_NAMESPACE
from gpu_tenancy.configuration import Configuration


class Conversion(StrEnum):
    """Whether GPUs are converted between whole and MIG because leases wait for the other mode."""

    NEVER = "Never"
    """None is; those that were go back to their declared mode."""
    ON_DEMAND = "OnDemand"
    """Those are that their Node names as convertible."""


class Settings(Configuration):
    """What a platform team may tune."""

    kubeconfig: str | None = None
    """Path of a kubeconfig; absent: the pod's service account, else ~/.kube/config."""
    system_namespace: str = SYSTEM_NAMESPACE
    """Namespace of archived UsageRecords and of the agents' heartbeats: those of agents that are told another are not
    seen, and nothing is planned on their nodes."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of /metrics, /healthz and /readyz; 0: any free one."""
    host: str = "0.0.0.0"  # noqa: S104  (a pod's own address; the embedded control plane passes the loopback)
    """Address to listen on."""
    coalesce_ms: int = Field(default=20, ge=0, le=1000)
    """How long to wait for further events before a cycle, in milliseconds, at least: as long as the last cycle was work
    where that is longer, up to 500 ms."""
    resync_seconds: int = Field(default=60, ge=5, le=3600)
    """How often all kinds are listed anew, against lost events, in seconds."""
    drain_grace_seconds: int = Field(default=30, ge=0, le=3600)
    """Longest grace of a tenant's pods after the end of their lease, in seconds."""
    max_in_flight: int = Field(default=32, ge=1, le=512)
    """Concurrent requests to the API server."""
    events: bool = True
    """Write Kubernetes Events on transitions."""
    spot_notice_max: Duration = "5m"
    """Longest term.preemptionNotice that a spot lease may ask for: so long a firmer lease may have to wait for it."""
    conversion: Conversion = Conversion.ON_DEMAND
    """Whether GPUs that their Node names as convertible change between whole and MIG because leases wait for the other
    mode: Never or OnDemand."""
    conversion_dwell: Duration = "30m"
    """How long a GPU that was converted keeps its mode, whoever asks; empty after that, it goes back to its declared
    one."""
    conversions_per_node_hour: int = Field(default=4, ge=0, le=64)
    """Conversions of GPUs of one node within an hour, there and back."""
    topology_levels: str | None = None
    """Labels of nodes that say where they stand, the coarsest first, separated by commas, e.g.
    example.com/block,example.com/rack: gangs are placed within one value of the finest that has room for them."""
    usage_half_life_hours: int = Field(default=24, ge=1, le=8760)
    """After so many hours what a tenant has used counts half in the order of the queue."""
    default_quota_gpus: int | None = Field(default=None, ge=0)
    """Whole GPUs that a namespace without a GpuTenant may hold at a time."""
    default_quota_memory_slices: int | None = Field(default=None, ge=0)
    """Memory slices of all devices that it may hold at a time; a whole GPU has 8."""
    default_quota_compute_slices: int | None = Field(default=None, ge=0)
    """Compute slices of all devices that it may hold at a time; a whole GPU has 7."""
    default_max_term: Duration | None = None
    """Longest term of its leases, e.g. 72h."""

    @field_validator("topology_levels")
    @classmethod
    def _are_labels(cls, value: str | None) -> str | None:
        odd = [one for one in (value or "").split(",") if value and not re.match(LABEL_KEY_PATTERN, one.strip())]
        if odd:
            raise ValueError(f'"{odd[0]}" is no key of a label; write them as example.com/block,example.com/rack')
        return value

    @property
    def levels(self) -> tuple[str, ...]:
        """The labels of `topology_levels`."""
        return tuple(one.strip() for one in self.topology_levels.split(",")) if self.topology_levels else ()
