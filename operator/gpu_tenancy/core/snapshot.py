"""Snapshot: every fact that a decision may depend on, frozen. Gathered by the controller, read by everything in core.

Facts are what the API server says; nothing here is remembered from an earlier cycle but what follows from facts that
are still the same. What cannot be read (written by a newer version, say) is not nothing: `unreadable` says so, and
whatever may depend on it is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, wraps
from typing import Any, Final, NamedTuple, TypeVar, TypeVarTuple, cast

from gpu_tenancy.api.base import HolderKind, format_time
from gpu_tenancy.api.lease import GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.node import Gpu, NodeCondition, ObservedSlot, Slot, WantedMode
from gpu_tenancy.api.pool import MiningPoolSpec, MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookSpec, PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantSpec, GpuTenantStatus, Quota
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.podspec import PodNeeds, Taint


class Key(NamedTuple):
    """Namespace and name of an object."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class NodeFacts:
    """A GPU node: its Kubernetes Node, its GpuNode and its ResourceSlice.

    Of a large fleet few nodes change from one plan to the next: what follows from these facts alone is found out once
    (the cached properties, and what is `once_per_node`)."""

    name: str
    generation: int
    """Generation of the GpuNode; its spec is written only if this still holds."""
    gpus: tuple[Gpu, ...]
    slots: tuple[Slot, ...]
    """Wanted devices (GpuNode.spec)."""
    observed: tuple[ObservedSlot, ...]
    """Devices as the agent reports them (GpuNode.status)."""
    published: frozenset[str] = frozenset()
    """Names of the devices in the node's ResourceSlice."""
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    allocatable: Amount = NOTHING
    foreign: Amount = NOTHING
    """Requests of the pods on it that belong to no lease and no pool."""
    ready: bool = True
    """The Node's Ready condition."""
    cordoned: bool = False
    conditions: tuple[NodeCondition, ...] = ()
    """Conditions of the GpuNode."""
    agent_until: datetime | None = None
    """Until when the agent's last heartbeat counts; None: no agent was ever heard."""
    unreadable: str = ""
    """Why the GpuNode cannot be read, as a clause; empty where it can. `slots` or the agent's reports are not known
    then: nothing on the node is planned, written, started or stopped."""
    mentions: frozenset[str] = frozenset()
    """Every word in a GpuNode that cannot be read: a lease whose UID is among them may hold a device there."""
    modes: tuple[WantedMode, ...] = ()
    """Modes that the operator wants of GPUs, whatever their Node declares (GpuNode.spec)."""
    conversions: tuple[datetime, ...] = ()
    """When conversions by demand were decided (GpuNode.spec)."""

    @cached_property
    def answers(self) -> dict[Hashable, object]:
        """What was found out about these facts. Those that differ in `agent_until` alone share it: nothing in it may
        depend on that."""
        return {}

    def heard(self, agent_until: datetime | None) -> NodeFacts:
        """The same facts after another heartbeat."""
        found = replace(self, agent_until=agent_until)
        found.__dict__["answers"] = self.answers
        return found

    @cached_property
    def gpu_of(self) -> Mapping[str, Gpu]:
        """Its GPUs by UUID."""
        return {gpu.uuid: gpu for gpu in self.gpus}

    @cached_property
    def models(self) -> Mapping[str, int]:
        """Models of its GPUs, with their memory in MiB."""
        return {gpu.model: gpu.memory_mib for gpu in self.gpus}

    @cached_property
    def has_convertible(self) -> bool:
        """Some GPU of it may be converted by demand."""
        return any(gpu.convertible for gpu in self.gpus)

    @cached_property
    def changing(self) -> Mapping[str, WantedMode]:
        """What GPUs should become that the agent has not brought into that mode yet, by UUID."""
        wanted = {one.gpu: one for one in self.modes}
        return {
            gpu.uuid: wanted[gpu.uuid]
            for gpu in self.gpus
            if gpu.convertible and gpu.uuid in wanted and wanted[gpu.uuid].mode is not gpu.mode
        }

    @cached_property
    def lasting_taints(self) -> tuple[Taint, ...]:
        """Its taints but for those that only say how the node is right now."""
        return tuple(taint for taint in self.taints if not taint.transitory)

    @cached_property
    def leased(self) -> tuple[Slot, ...]:
        """Wanted devices of leases."""
        return tuple(slot for slot in self.slots if slot.holder.kind is HolderKind.GPU_LEASE)

    @cached_property
    def leased_reports(self) -> tuple[ObservedSlot, ...]:
        """What the agent reports about devices of leases."""
        return tuple(report for report in self.observed if report.holder.kind is HolderKind.GPU_LEASE)

    @cached_property
    def holders(self) -> frozenset[str]:
        """UIDs of the leases that have a device on it, wanted or reported; of what cannot be read, all that may be."""
        wanted = (slot.holder.uid for slot in self.leased)
        return self.mentions.union(wanted, (report.holder.uid for report in self.leased_reports))

    @cached_property
    def mined(self) -> Mapping[tuple[str, str], Slot]:
        """Wanted devices of pools, by names of node and device."""
        return {(self.name, slot.device): slot for slot in self.slots if slot.holder.kind is HolderKind.MINING_POOL}

    def objection(self, now: datetime) -> str:
        """Why nothing new is planned on the node, as a sentence; empty where it can be planned on."""
        if self.unreadable:
            return self.unreadable
        if not self.ready:
            return f"node {self.name} is not Ready"
        if self.cordoned:
            return f"node {self.name} is cordoned"
        return self.agent_objection(now)

    def agent_objection(self, now: datetime) -> str:
        """Why the agent cannot be relied on; empty where it can."""
        if self.agent_until is None:
            return f"no agent has been heard on node {self.name}"
        if self.agent_until < now:
            return f"the agent on node {self.name} is silent: its heartbeat ran out at {format_time(self.agent_until)}"
        return ""


def as_before(found: NodeFacts, before: NodeFacts | None) -> NodeFacts:
    """Facts that were found anew: the former object where it says the same, or one that shares what is remembered with
    it where the agent has been heard again and nothing else has happened. What is remembered with facts that are
    superseded is forgotten: it refers to them, and so would be garbage of the kind that is collected late."""
    if before is None or before == found:
        return before or found
    if replace(before, agent_until=found.agent_until) == found:
        return before.heard(found.agent_until)
    before.answers.clear()
    return found


T = TypeVar("T")
Further = TypeVarTuple("Further")


def once_per_node(function: Callable[[NodeFacts, *Further], T]) -> Callable[[NodeFacts, *Further], T]:
    """Remember the answer of a pure function with the facts that it was given first: the same object is not asked about
    again with the same further arguments, which must be hashable. A newer version of the facts begins without."""

    @wraps(function)
    def remembering(facts: NodeFacts, /, *further: *Further) -> T:
        answers, key = facts.answers, (function, further) if further else function
        if key not in answers:
            answers[key] = function(facts, *further)
        return cast("T", answers[key])

    return remembering


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """A lease's pod template as far as planning goes."""

    needs: PodNeeds
    verdict: str | None
    """None: not checked by the API server yet; empty: accepted; else the sentence with which it was refused."""


@dataclass(frozen=True, slots=True)
class JobFacts:
    """The Job of a lease's placement attempt."""

    name: str
    uid: str
    attempt: int
    finished: str = ""
    """Empty, "Complete" or "Failed"."""
    finished_at: datetime | None = None
    message: str = ""
    deleting: bool = False


class PodRef(NamedTuple):
    """A pod that a claim is reserved for."""

    namespace: str
    name: str
    uid: str
    grace_seconds: int | None = None
    """Its own terminationGracePeriodSeconds; None: not known."""
    warned_of: datetime | None = None
    """When, as it was told by an annotation, it loses its devices."""


@dataclass(frozen=True, slots=True)
class ClaimFacts:
    """A ResourceClaim that was allocated a device of ours, or asks for one."""

    namespace: str
    name: str
    uid: str
    holder: str
    """Holder UID in the claim's opaque parameters; empty where it has none."""
    devices: tuple[tuple[str, str], ...] = ()
    """Allocated (node, device) pairs of our driver."""
    users: tuple[PodRef, ...] = ()
    """Pods in reservedFor."""


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """A UsageRecord of a lease."""

    namespace: str
    name: str
    spec: UsageRecordSpec
    deleting: bool = False
    finalized: bool = True
    """Carries the ledger finalizer: no archived copy exists yet."""

    @property
    def is_open(self) -> bool:
        """The segment is still running."""
        return self.spec.billable_to is None


@dataclass(frozen=True, slots=True)
class LeaseFacts:
    """A GpuLease and what was made for it."""

    key: Key
    uid: str
    generation: int
    created: datetime
    spec: GpuLeaseSpec
    status: GpuLeaseStatus
    invalid: str = ""
    """Why the object could not be read; empty where it could. `spec` is meaningless otherwise."""
    unreadable: str = ""
    """Why its status cannot be read, as a clause; empty where it can. `status` is meaningless otherwise: nothing of the
    lease is decided, and its status is not written."""
    unreadable_record: str = ""
    """Why one of its UsageRecords cannot be read, as a clause; `records` are the others. Empty where all can be."""
    deleted_at: datetime | None = None
    """When its deletion was asked for."""
    finalized: bool = False
    """Carries the settle finalizer."""
    namespace_ends: bool = False
    """Its namespace is being deleted: nothing can be created in it any more."""
    template: TemplateFacts | None = None
    claim_template: str = ""
    """UID of its ResourceClaimTemplate; empty: there is none."""
    jobs: tuple[JobFacts, ...] = ()
    claims: tuple[ClaimFacts, ...] = ()
    records: tuple[RecordFacts, ...] = ()
    """Its UsageRecords, by segment."""
    rest: Any = field(default=None, init=False, repr=False, compare=False)
    """What the last plan found out about it, if that can be used again (a core.rest.Rest)."""

    def remember(self, rest: object) -> None:
        """Keep what a plan found out: it follows from these facts, and goes with them."""
        object.__setattr__(self, "rest", rest)

    @property
    def devices(self) -> int:
        """Devices of the whole lease."""
        return self.spec.pods * self.spec.gpus.count

    @property
    def open_record(self) -> RecordFacts | None:
        """The segment that is being billed now."""
        return self.records[-1] if self.records and self.records[-1].is_open else None


@dataclass(frozen=True, slots=True)
class MinerFacts:
    """What exists of one miner: its pod, its claim, or both."""

    name: str
    """Name of the claim."""
    namespace: str
    pool: str
    """UID of the pool that it was made for."""
    node: str
    device: str
    pod_name: str = ""
    """Empty: no pod."""
    pod_uid: str = ""
    """Empty: no pod."""
    claim_uid: str = ""
    """Empty: no claim."""
    revision: str = ""
    """Hash of what its pod was made from."""
    running: bool = False
    finished: bool = False
    """The pod has stopped for good (evicted, failed) and must be replaced."""
    deleting: bool = False
    """Pod or claim is already going."""
    bereft: bool = False
    """Of its pod and its claim one is going and the other is not: somebody deleted the one alone. Both have to go, so
    that the next pod has another claim, and with it another name."""


@dataclass(frozen=True, slots=True)
class LeftClaim:
    """A claim on a device that is being deleted, and that no pod uses any more."""

    namespace: str
    name: str
    uid: str
    deleted_at: datetime
    touched_at: datetime | None = None
    """When it was last written so that kube-controller-manager looks at it."""


@dataclass(frozen=True, slots=True)
class StartingPod:
    """A pod of a lease or of a miner that is bound, and of which kubelet has not told anything since."""

    namespace: str
    name: str
    uid: str
    node: str
    bound_at: datetime
    """When it was first seen bound."""
    touched_at: datetime | None = None
    """When it was last written so that kubelet looks at it."""


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A MiningPool."""

    key: Key
    uid: str
    generation: int
    created: datetime
    spec: MiningPoolSpec
    status: MiningPoolStatus
    invalid: str = ""
    deleting: bool = False

    @property
    def active(self) -> bool:
        """May hold devices at all."""
        return not (self.invalid or self.deleting or self.spec.suspend)


@dataclass(frozen=True, slots=True)
class BookFacts:
    """A PriceBook."""

    name: str
    uid: str
    generation: int
    created: datetime
    spec: PriceBookSpec | None
    status: PriceBookStatus
    invalid: str = ""


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """A GpuTenant."""

    name: str
    uid: str
    generation: int
    created: datetime
    spec: GpuTenantSpec | None
    status: GpuTenantStatus
    invalid: str = ""


UNLIMITED: Final = Quota()


@dataclass(frozen=True, slots=True)
class TenantDefaults:
    """What the operator's settings say of tenants."""

    quota: Quota = UNLIMITED
    """Of a namespace that no GpuTenant claims."""
    max_term: str | None = None
    """Of a namespace that no GpuTenant claims."""
    half_life: timedelta = timedelta(hours=24)
    """After so long what was used counts half."""


@dataclass(frozen=True, slots=True)
class SpotLimits:
    """What the operator's settings say of spot leases."""

    longest_notice: timedelta = timedelta(minutes=5)
    """Longest notice that a spot lease may ask for."""


@dataclass(frozen=True, slots=True)
class ConversionRules:
    """What the operator's settings say of conversions by demand."""

    on_demand: bool = True
    """Convert at all, where the Node lets it."""
    dwell: timedelta = timedelta(minutes=30)
    """A GPU keeps its new mode for so long, whoever asks."""
    per_node_and_hour: int = 4
    """Conversions of one node within an hour, there and back."""


class PastUsage(NamedTuple):
    """What the closed segments of each namespace's leases come to."""

    at: datetime
    """The instant that the sums are reckoned to."""
    slice_seconds: Mapping[str, float]
    """Decayed billed seconds × memory slices, by namespace of the lease."""


NO_PAST: Final = PastUsage(datetime(2000, 1, 1, tzinfo=UTC), {})


class Failure(NamedTuple):
    """An action that the API server refused for good; it is tried again at `retry_at` or when the object changes."""

    reason: str
    message: str
    retry_at: datetime


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the decision may depend on."""

    leases: tuple[LeaseFacts, ...] = ()
    pools: tuple[PoolFacts, ...] = ()
    nodes: tuple[NodeFacts, ...] = ()
    books: tuple[BookFacts, ...] = ()
    miners: tuple[MinerFacts, ...] = ()
    orphans: tuple[RecordFacts, ...] = ()
    """UsageRecords whose lease no longer exists."""
    left_claims: tuple[LeftClaim, ...] = ()
    """Claims that should be gone."""
    starting: tuple[StartingPod, ...] = ()
    """Pods that should have begun."""
    failures: Mapping[str, Failure] = field(default_factory=dict)
    """Refused actions by UID of the lease or pool they were for."""
    tenants: tuple[TenantFacts, ...] = ()
    tenant_defaults: TenantDefaults = TenantDefaults()
    spot_limits: SpotLimits = SpotLimits()
    conversion_rules: ConversionRules = ConversionRules()
    topology_levels: tuple[str, ...] = ()
    """Node labels by which places are told apart, the coarsest first."""
    past_usage: PastUsage = NO_PAST
