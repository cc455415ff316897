"""The few fields of Kubernetes' own kinds that the operator looks at, for partial decoding of high-volume watches.

A field that is not named here costs nothing and wakes nobody. No behaviour beyond reading.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from gpu_tenancy.api import names


class Wire(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """A part of an object as it is on the wire; absent is empty."""


class Owner(Wire, frozen=True):
    """metadata.ownerReferences[]."""

    kind: str = ""
    name: str = ""
    uid: str = ""


class Meta(Wire, frozen=True):
    """metadata."""

    name: str
    uid: str = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: datetime | None = None
    owner_references: tuple[Owner, ...] = ()


class LeanMeta(Wire, frozen=True):
    """metadata of kinds whose annotations change all the time."""

    name: str
    uid: str = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    deletion_timestamp: datetime | None = None


class PodMarks(Wire, frozen=True):
    """metadata.annotations of a pod: of what many write for many reasons, only the operator's own."""

    touched_at: str = msgspec.field(name=names.ANNOTATION_TOUCHED, default="")
    preempted_at: str = msgspec.field(name=names.ANNOTATION_PREEMPTED, default="")


class PodMeta(Wire, frozen=True):
    """metadata of a pod."""

    name: str
    uid: str = ""
    namespace: str = ""
    labels: dict[str, str] = {}
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None
    owner_references: tuple[Owner, ...] = ()
    annotations: PodMarks = PodMarks()


class ResourceLists(Wire, frozen=True):
    """A container's resources."""

    requests: dict[str, str | int | float] = {}
    limits: dict[str, str | int | float] = {}


class Container(Wire, frozen=True):
    """A container, as far as its resources go."""

    resources: ResourceLists = ResourceLists()
    restart_policy: str = ""


class PodClaim(Wire, frozen=True):
    """spec.resourceClaims[] of a pod."""

    resource_claim_name: str = ""
    resource_claim_template_name: str = ""


class PodSpec(Wire, frozen=True):
    """spec of a pod."""

    node_name: str = ""
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    overhead: dict[str, str | int | float] = {}
    resource_claims: tuple[PodClaim, ...] = ()
    resources: ResourceLists = ResourceLists()
    """Pod-level resources: where set, they are what the scheduler counts."""
    termination_grace_period_seconds: int = 30


class PodStatus(Wire, frozen=True):
    """status of a pod."""

    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")


class Pod(Wire, frozen=True):
    """A Pod."""

    metadata: PodMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class WireTaint(Wire, frozen=True):
    """spec.taints[] of a node."""

    key: str = ""
    value: str = ""
    effect: str = ""


class NodeSpec(Wire, frozen=True):
    """spec of a node."""

    unschedulable: bool = False
    taints: tuple[WireTaint, ...] = ()


class StateOf(Wire, frozen=True):
    """A condition, without the heartbeat that would wake everybody."""

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class NodeStatus(Wire, frozen=True):
    """status of a node."""

    allocatable: dict[str, str | int | float] = {}
    conditions: tuple[StateOf, ...] = ()


class Node(Wire, frozen=True):
    """A Node."""

    metadata: LeanMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class TimedState(Wire, frozen=True):
    """A condition with its time."""

    type: str = ""
    status: str = ""
    message: str = ""
    last_transition_time: datetime | None = None


class JobStatus(Wire, frozen=True):
    """status of a Job."""

    conditions: tuple[TimedState, ...] = ()


class Job(Wire, frozen=True):
    """A Job of the operator's making."""

    metadata: Meta
    status: JobStatus = JobStatus()


class Opaque(Wire, frozen=True):
    """Opaque device configuration."""

    driver: str = ""
    parameters: dict[str, Any] = {}


class ClaimConfig(Wire, frozen=True):
    """spec.devices.config[]."""

    opaque: Opaque | None = None


class ClaimDevices(Wire, frozen=True):
    """spec.devices of a claim."""

    config: tuple[ClaimConfig, ...] = ()


class ClaimSpec(Wire, frozen=True):
    """spec of a claim."""

    devices: ClaimDevices = ClaimDevices()


class AllocatedDevice(Wire, frozen=True):
    """status.allocation.devices.results[]."""

    driver: str = ""
    pool: str = ""
    device: str = ""


class AllocatedDevices(Wire, frozen=True):
    """status.allocation.devices."""

    results: tuple[AllocatedDevice, ...] = ()


class Allocation(Wire, frozen=True):
    """status.allocation."""

    devices: AllocatedDevices = AllocatedDevices()


class Consumer(Wire, frozen=True):
    """status.reservedFor[]."""

    resource: str = ""
    name: str = ""
    uid: str = ""


class ClaimStatus(Wire, frozen=True):
    """status of a claim."""

    allocation: Allocation | None = None
    reserved_for: tuple[Consumer, ...] = ()


class Claim(Wire, frozen=True):
    """A ResourceClaim."""

    metadata: Meta
    spec: ClaimSpec = ClaimSpec()
    status: ClaimStatus = ClaimStatus()


class ClaimTemplate(Wire, frozen=True):
    """A ResourceClaimTemplate of the operator's making."""

    metadata: Meta


class SliceDevice(Wire, frozen=True):
    """spec.devices[] of a ResourceSlice."""

    name: str = ""


class SlicePool(Wire, frozen=True):
    """spec.pool of a ResourceSlice."""

    name: str = ""
    generation: int = 0


class SliceSpec(Wire, frozen=True):
    """spec of a ResourceSlice."""

    node_name: str = ""
    pool: SlicePool = SlicePool()
    devices: tuple[SliceDevice, ...] = ()


class Slice(Wire, frozen=True):
    """A ResourceSlice of the driver."""

    metadata: LeanMeta
    spec: SliceSpec = SliceSpec()


class HeartbeatSpec(Wire, frozen=True):
    """spec of a coordination Lease."""

    renew_time: datetime | None = None
    lease_duration_seconds: int = 40


class Heartbeat(Wire, frozen=True):
    """A coordination Lease of an agent."""

    metadata: Meta
    spec: HeartbeatSpec = HeartbeatSpec()


class NamespaceStatus(Wire, frozen=True):
    """status of a namespace."""

    phase: str = ""


class Namespace(Wire, frozen=True):
    """A Namespace."""

    metadata: LeanMeta
    status: NamespaceStatus = NamespaceStatus()


class ClosedSegment(Wire, frozen=True):
    """spec of a UsageRecord whose segment is over."""

    lease_namespace: str
    profile: str
    devices: tuple[Any, ...]
    billable_from: datetime
    billable_to: datetime
