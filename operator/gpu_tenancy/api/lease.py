"""GpuLease: the contract between a tenant and the owner of the GPUs.

Schema, rules and columns only; what a lease leads to is decided in ``gpu_tenancy.core``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema

from gpu_tenancy.api.base import (
    DURATION_PATTERN,
    EARLIEST,
    LATEST,
    ApiModel,
    ConditionStatus,
    Currency,
    DecimalString,
    Duration,
    LabelKey,
    Message,
    MicroTime,
    PlannedTime,
    Profile,
    Quantity,
    Time,
    format_time,
)
from gpu_tenancy.api.kinds import (
    AGE,
    Column,
    Kind,
    condition_column,
    immutable,
    list_map,
    name_limit,
    replaced_whole,
    rule,
    rules,
)
from gpu_tenancy.api.node import HandOver


class Tier(StrEnum):
    """How firm a lease is."""

    RESERVED = "Reserved"
    ON_DEMAND = "OnDemand"
    SPOT = "Spot"


class OnCompletion(StrEnum):
    """What a finished Job means for the lease."""

    RELEASE = "Release"
    HOLD = "Hold"


class ConditionType(StrEnum):
    """Conditions of a GpuLease; `Ready` is the roll-up and its reason is the State column."""

    READY = "Ready"
    ADMITTED = "Admitted"
    ALLOCATED = "Allocated"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    EXPIRED = "Expired"
    PREEMPTED = "Preempted"
    SETTLED = "Settled"


class Reason(StrEnum):
    """Machine-readable reasons of a GpuLease's conditions."""

    # waiting and refusing
    QUEUED = "Queued"
    FRAGMENTED = "Fragmented"
    PREEMPTING = "Preempting"
    SUSPENDED = "Suspended"
    RESERVED = "Reserved"
    NOT_RESERVABLE = "NotReservable"
    NO_COMMITMENT = "NoCommitment"
    COMMITMENT_IN_USE = "CommitmentInUse"
    CHECKING_TEMPLATE = "CheckingTemplate"
    OVER_QUOTA = "OverQuota"
    QUOTA_TOO_SMALL = "QuotaTooSmall"
    TERM_TOO_LONG = "TermTooLong"
    TIER_NOT_ALLOWED = "TierNotAllowed"
    NOTICE_TOO_LONG = "NoticeTooLong"
    IMPOSSIBLE = "Impossible"
    NO_RATE = "NoRate"
    INVALID_TEMPLATE = "InvalidTemplate"
    INVALID_SPEC = "InvalidSpec"
    NAME_TAKEN = "NameTaken"
    EXTENSION_REFUSED = "ExtensionRefused"
    API_REJECTED = "ApiRejected"
    UNREADABLE = "Unreadable"
    # running
    ADMITTED = "Admitted"
    UNPRICED = "Unpriced"
    PLACED = "Placed"
    PREPARING = "Preparing"
    DEVICE_FAILED = "DeviceFailed"
    NODE_LOST = "NodeLost"
    READY = "Ready"
    # making room for others
    PREEMPTIBLE = "Preemptible"
    PREEMPTION_NOTICE = "PreemptionNotice"
    NOTICE_WITHDRAWN = "NoticeWithdrawn"
    PREEMPTED = "Preempted"
    # ending
    RUNNING = "Running"
    UNTIL_DELETED = "UntilDeleted"
    NOTICE_GIVEN = "NoticeGiven"
    DRAINING = "Draining"
    EXPIRED = "Expired"
    COMPLETED = "Completed"
    FAILED = "Failed"
    DELETED = "Deleted"
    OPEN = "Open"
    SETTLED = "Settled"
    UP_TO_DATE = "UpToDate"


QUEUED: Final = (
    Reason.QUEUED, Reason.FRAGMENTED, Reason.OVER_QUOTA, Reason.COMMITMENT_IN_USE, Reason.PREEMPTING
)  # fmt: skip
"""Reasons for which a lease waits for room, or for its tenant's other leases to end, with a position."""
ENDS: Final = (Reason.EXPIRED, Reason.COMPLETED, Reason.FAILED, Reason.DELETED)
"""Reasons for which a lease is over."""


class GpusSpec(ApiModel):
    """The GPUs of each pod."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.profile == 'full' || self.count == 1",
                "a MIG slice is leased one per pod, because CUDA sees only one MIG device per process; "
                "set spec.gpus.count to 1 and raise spec.pods, or take profile full",
                computed="'spec.gpus.count must be 1 with profile ' + self.profile + ': a MIG slice is leased one per "
                "pod, because CUDA sees only one MIG device per process; raise spec.pods, or take profile full'",
                field=".count",
            )
        )
    )

    profile: Profile
    """`full` for whole GPUs, or a MIG profile by its name on that model: 1g.5gb, 2g.10gb, 3g.20gb, 4g.20gb, 7g.40gb
    on A100 40 GB; 1g.10gb, 2g.20gb, 3g.40gb, 4g.40gb, 7g.80gb on A100 80 GB."""
    count: int = Field(default=1, ge=1, le=16)
    """Devices per pod, all on one node: 1 to 16 for `full`; exactly 1 for a slice, because CUDA sees only one MIG
    device per process."""
    model: str | None = Field(default=None, min_length=1, max_length=63)
    """GPU model by its NVML name without the vendor, with - for spaces: A100-SXM4-80GB, A100-80GB-PCIe. Absent: any
    model that fits, the same for all pods; of several the one on which fewest miners stop, then the one with least
    memory."""


class PodResources(ApiModel):
    """What each pod needs besides GPUs; planned together with them."""

    cpu: Quantity = "1"
    """CPU cores per pod, e.g. "16" or "500m"."""
    memory: Quantity = "1Gi"
    """Memory per pod, e.g. 128Gi."""


def _understood(field: str) -> str:
    """CEL: the duration is well formed, so that `duration()` can be asked; its own rule reports it where it is not."""
    return f"self.{field}.matches('{DURATION_PATTERN}')"


class Term(ApiModel):
    """How long the lease runs."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!has(self.start) || (self.start >= timestamp('{format_time(EARLIEST)}') && "
                f"self.start < timestamp('{format_time(LATEST)}'))",
                f"spec.term.start must be within the years {EARLIEST.year} to {LATEST.year - 1}",
                field=".start",
            ),
            rule(
                f"!has(self.duration) || !{_understood('duration')} || duration(self.duration) > duration('0s')",
                "spec.term.duration must be longer than zero; leave it out for a lease that runs until it is deleted",
                computed="'spec.term.duration ' + self.duration + ' must be longer than zero; leave it out for a lease "
                "that runs until it is deleted'",
                field=".duration",
            ),
            rule(
                f"!has(self.duration) || !{_understood('duration')} || !{_understood('notice')}"
                " || duration(self.notice) < duration(self.duration)",
                "spec.term.notice (5m unless set) must be shorter than spec.term.duration; set a shorter notice",
                computed="'spec.term.notice ' + self.notice + ' must be shorter than spec.term.duration ' + "
                "self.duration + '; set a shorter notice (it is 5m unless set)'",
                field=".notice",
            ),
        )
    )

    duration: Duration | None = None
    """Length of the lease from the first billed second, e.g. 4h. Absent: until the lease is deleted. May be changed
    while the lease runs; the change is an admission that can be refused: status.expiresAt is the authority."""
    start: PlannedTime | None = None
    """When the lease begins, e.g. 2026-12-01T08:00:00Z: GPUs are promised to it from then on, and kept free of leases
    that would last longer; until then others use them. Billing begins then, and not before. Absent or past: as soon as
    there is room. Immutable."""
    renew: bool = False
    """true extends the lease by its duration each time that notice would be given, until it is set to false. Every
    extension is an admission that can be refused, with condition Stalled and reason ExtensionRefused."""
    notice: Duration = "5m"
    """How long before the end the tenant is told (condition Expired with reason NoticeGiven, and an Event). Shorter
    than duration."""
    preemption_notice: Duration | None = None
    """With tier Spot: how long before its GPUs are taken for a lease of a firmer tier the tenant is told (condition
    Preempted with reason PreemptionNotice, an Event, and an annotation on the pods). 30s unless set; the operator's
    settings bound it."""


_OPEN: Final[dict[str, JsonValue]] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
"""An object whose fields are kept as given; only those that a rule needs are spelled out."""
_CLAIMS: Final[dict[str, JsonValue]] = {"type": "array", "maxItems": 32, "items": _OPEN}
OPERATORS_FIELDS: Final = (
    ("nodeName", "the operator places the pods; leave it out"),
    ("schedulerName", "the pods need kube-scheduler, which knows their devices; leave it out"),
    ("priorityClassName", "the order of leases and miners is the operator's; leave it out"),
    ("resourceClaims", "the operator adds the claim of the lease's devices; leave it out"),
)
"""Fields of the template's pod that are not the tenant's to set, and why."""


def _containers(description: str, least: int) -> dict[str, JsonValue]:
    """Schema of a list of containers: kept as given, but that claims can be seen and refused."""
    resources: dict[str, JsonValue] = {**_OPEN, "properties": {"claims": _CLAIMS}}
    refused = rule(
        "!has(self.resources) || !has(self.resources.claims)",
        "spec.template: resources.claims of a container may not be set: the operator adds the claim of the lease's "
        "devices; leave it out",
        field=".resources.claims",
        forbids=True,
    )
    item: dict[str, JsonValue] = {**_OPEN, "properties": {"resources": resources}, **rules(refused)}
    return {"type": "array", "description": description, "minItems": least, "maxItems": 32, "items": item}


_POD_SPEC: Final[dict[str, JsonValue]] = {
    **_OPEN,
    "description": "PodSpec, kept as given and checked by a dry run of the Job; the operator adds the claim.",
    "required": ["containers"],
    "properties": {
        "containers": _containers("Containers of each pod, as in a PodSpec.", 1),
        "initContainers": _containers("Init containers of each pod, as in a PodSpec.", 0),
        **{
            field: {**(_CLAIMS if field == "resourceClaims" else {"type": "string"}), "description": f"Refused: {why}."}
            for field, why in OPERATORS_FIELDS
        },
    },
    **rules(
        *(
            rule(
                f"!has(self.{field})",
                f"spec.template.spec.{field} may not be set: {why}",
                field=f".{field}",
                forbids=True,
            )
            for field, why in OPERATORS_FIELDS
        )
    ),
}

Template = Annotated[
    dict[str, Any],
    WithJsonSchema({**_OPEN, "required": ["spec"], "properties": {"spec": _POD_SPEC}}),
]
"""Pod template as the tenant wrote it."""

_NEW_LEASE: Final = "make a new lease instead"


def _begins(spec: str) -> str:
    """CEL: the lease has a start."""
    return f"has({spec}.term) && has({spec}.term.start)"


class TopologySpec(ApiModel):
    """How close to each other the pods are, by a label that their nodes share."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.required) != has(self.preferred)",
                "spec.topology needs exactly one of required and preferred",
            ),
        )
    )

    required: LabelKey | None = None
    """Label of nodes, e.g. example.com/rack: all pods are on nodes with one value of it, or the lease waits."""
    preferred: LabelKey | None = None
    """Label of nodes: the pods are on nodes with one value of it where that stops no more miners, else as close as the
    operator's levels have it, else anywhere."""


class GpuLeaseSpec(ApiModel):
    """What is rented, for how long, at which tier, and optionally what runs on it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            immutable("gpus", f"spec.gpus is immutable, because GPUs were reserved and priced for it; {_NEW_LEASE}"),
            immutable("pods", f"spec.pods is immutable, because the gang was placed as a whole; {_NEW_LEASE}"),
            rule(
                f"({_begins('self')}) == ({_begins('oldSelf')}) && (!({_begins('self')}) || "
                "self.term.start == oldSelf.term.start)",
                f"spec.term.start is immutable, because others are planned around it; {_NEW_LEASE}",
                field=".term.start",
                forbids=True,
            ),
            rule(
                "!has(self.commitment) || self.tier == 'Reserved'",
                "spec.commitment is set and spec.tier is not Reserved: only Reserved leases draw on a commitment; set "
                "tier to Reserved, or leave spec.commitment out",
                field=".commitment",
                forbids=True,
            ),
            immutable("commitment", f"spec.commitment is immutable, because its capacity is counted; {_NEW_LEASE}"),
            immutable("tier", f"spec.tier is immutable, because the price was agreed for it; {_NEW_LEASE}"),
            immutable("topology", f"spec.topology is immutable, because the gang was placed as a whole; {_NEW_LEASE}"),
            immutable("template", f"spec.template is immutable, because its Job was started from it; {_NEW_LEASE}"),
            rule(
                "!(has(self.template) && has(self.podResources))",
                "spec.podResources and spec.template are both set: with a template, CPU and memory are those that its "
                "containers request; leave spec.podResources out",
                field=".podResources",
                forbids=True,
            ),
            rule(
                "!has(self.term) || !has(self.term.preemptionNotice) || self.tier == 'Spot'",
                "spec.term.preemptionNotice has a meaning with spec.tier Spot only, because no other lease is "
                "pre-empted; leave it out or take tier Spot",
                field=".term.preemptionNotice",
            ),
            rule(
                "self.onCompletion != 'Hold' || has(self.template)",
                "spec.onCompletion Hold has no meaning without spec.template, because then no Job completes; "
                "leave it out or add a template",
                field=".onCompletion",
            ),
        )
    )

    gpus: GpusSpec
    """The GPUs of each pod. Immutable."""
    pods: int = Field(default=1, ge=1, le=64)
    """Size of the gang: that many pods, each with its GPUs on one node; placed all together or not at all.
    Immutable."""
    pod_resources: PodResources | None = None
    """CPU and memory of each pod, planned with the GPUs. Taken from the template where there is one."""
    tier: Tier = Tier.ON_DEMAND
    """Reserved: draws on a commitment of its tenant, and goes first. OnDemand: never pre-empted. Spot: gives way, with
    notice, to a lease of a firmer tier that finds no room otherwise; what is left of its term runs on once there is
    room again. Immutable."""
    term: Term = Term()
    """How long the lease runs."""
    commitment: str | None = Field(default=None, min_length=1, max_length=63)
    """Name of the commitment of its GpuTenant that a Reserved lease draws on. Absent: the first that has the profile
    and model, and room. Immutable."""
    topology: TopologySpec | None = None
    """How close to each other the pods of a gang are. Absent: as close as possible, by the levels in the operator's
    settings, where that stops no more miners. Immutable."""
    suspend: bool = False
    """true gives the GPUs back and stops billing; the lease keeps its name and price. false queues it again."""
    on_completion: OnCompletion = OnCompletion.RELEASE
    """With a template: Release ends the lease when its Job has finished or failed; Hold keeps the GPUs (and bills)."""
    template: Template | None = None
    """Pod template {metadata, spec} to run as an indexed Job of `pods` pods. Absent: bring your own pods, which refer
    to the ResourceClaimTemplate that has the lease's name. Immutable."""


class LeaseCondition(ApiModel):
    """metav1.Condition of a lease."""

    type: ConditionType
    """Ready, Admitted, Allocated, Reconciling, Stalled, Expired, Preempted or Settled."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: Reason
    """Machine-readable cause."""
    message: Message = ""
    """The cause in plain English, with numbers."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int = Field(ge=0)
    """Generation of the spec that this condition was computed from."""


class Price(ApiModel):
    """Price of one device for one hour, copied from the PriceBook when the lease was admitted."""

    per_hour: DecimalString
    """Decimal string per device and hour."""
    currency: Currency
    """ISO 4217 currency."""
    book: str = Field(max_length=253)
    """PriceBook it was copied from."""


class Cost(ApiModel):
    """Money and the seconds it stands for, up to `asOf`."""

    amount: DecimalString
    """Rounded half-even to 1/100 for display; invoices are computed from UsageRecords."""
    currency: Currency
    """ISO 4217 currency."""
    seconds: int = Field(ge=0)
    """Billed seconds of the lease so far, all segments; each of its devices is billed for all of them."""
    as_of: Time
    """Instant up to which this was computed; moves on transitions, else at most every five minutes."""


class Preemption(ApiModel):
    """A spot lease's notice that its devices are needed by a lease of a firmer tier."""

    at: Time
    """When it loses them; it is billed until then at most."""
    cause: str = Field(max_length=64)
    """UID of the lease that needs them, with a number where that has run before and waits once more. What it is and
    whose is not for this tenant."""


class LeaseEnd(ApiModel):
    """How a lease ended for good."""

    at: Time
    """The last billed instant (exclusive), or the instant of the decision where nothing was billed."""
    reason: Reason = Field(json_schema_extra={"enum": [str(one) for one in ENDS]})
    """Expired, Completed, Failed or Deleted."""
    message: Message = ""
    """In plain English."""


class Place(ApiModel):
    """Where one device is, or is to be."""

    node: str = Field(max_length=253)
    """Node."""
    gpu: str = Field(max_length=96)
    """UUID of the GPU."""
    start: int = Field(default=0, ge=0, le=7)
    """First memory slice; 0 for a whole GPU."""


class Reservation(ApiModel):
    """Devices that are promised for later."""

    begins: Time
    """From when on they are the lease's: its term.start."""
    until: Time | None = None
    """Until when; absent where the lease has no duration."""
    places: Annotated[list[Place], Field(min_length=1, max_length=1024)]
    """The devices, pod by pod. Where one of them breaks, others are looked for."""


class DeviceHandOver(ApiModel):
    """How one device of the lease came to it."""

    node: str = Field(max_length=253)
    """Node that it is on."""
    device: str = Field(max_length=63)
    """Name of the device."""
    record: HandOver
    """What was done before the lease had it, as the node's agent wrote it down. Of its former holders only pools and
    those of the same namespace are named."""


class GpuLeaseStatus(ApiModel):
    """What became of the lease. Written by the operator only."""

    model_config = ConfigDict(json_schema_extra=replaced_whole())

    observed_generation: int | None = None
    """Generation of the spec that this status was computed from."""
    conditions: Annotated[
        list[LeaseCondition],
        Field(max_length=16, json_schema_extra=list_map("type")),
    ] = []
    """Ready, Admitted, Allocated, Reconciling, Stalled, Expired, Settled; of a spot lease also Preempted."""
    contract: str | None = Field(default=None, max_length=64)
    """Identity of the contract in the ledger: UsageRecords are named <contract>-<segment>."""
    admitted_at: MicroTime | None = None
    """When the lease was first admitted; its price was locked then."""
    price: Price | None = None
    """Locked price; absent while not admitted and for leases admitted without any PriceBook."""
    accepted_duration: Duration | None = None
    """The term.duration in force; differs from spec.term.duration where a change was refused."""
    attempt: int = Field(default=0, ge=0)
    """Placement attempts so far; the Job of attempt n is named <lease>-n."""
    devices: int | None = Field(default=None, ge=1)
    """Devices of the lease in all: pods × gpus.count."""
    ready_devices: int | None = Field(default=None, ge=0)
    """Devices that are published for the lease now."""
    nodes: Annotated[list[Annotated[str, Field(max_length=253)]], Field(max_length=64)] = []
    """Nodes on which its devices are."""
    node_names: str | None = Field(default=None, max_length=4096)
    """The same nodes as one string, for people; absent while it holds none."""
    reservation: Reservation | None = None
    """What is promised to a lease that begins at term.start; absent once it has been billed."""
    commitment: str | None = Field(default=None, max_length=63)
    """Commitment that a Reserved lease draws on."""
    renewals: int = Field(default=0, ge=0)
    """How often term.renew has extended it by its duration."""
    position: int | None = Field(default=None, ge=1)
    """Place in the queue: 1 is looked at first, and a later one that fits goes ahead of it; absent when not queued."""
    expected_start: Time | None = None
    """When it is expected to be placed, as things are; absent where that is not known, and when not queued."""
    segment: int = Field(default=0, ge=0)
    """Number of the current or last billing segment."""
    billable_from: Time | None = None
    """Start of the current or last billing segment."""
    billable_to: Time | None = None
    """End of the last billing segment (exclusive); absent while one is open."""
    expires_at: Time | None = None
    """When the lease ends by itself; absent without a duration and before the first billed second."""
    preemption: Preemption | None = None
    """Notice of a spot lease that gives way; taken back where its devices are no longer needed. Stays until the lease
    has devices again."""
    preempted_for: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=32)] = []
    """UIDs of the leases that it has given way to, the last 32: to none of them twice."""
    cost: Cost | None = None
    """What the lease has cost so far; absent when unpriced or not yet billed."""
    hand_overs: Annotated[list[DeviceHandOver], Field(max_length=64)] = []
    """How its devices came to it, those of the last placement where it has none any more: evidence that nothing of the
    former holder was left on them. At most 64 are shown."""
    ended: LeaseEnd | None = None
    """Present once the lease is over for good."""


class GpuLease(ApiModel):
    """A rental of GPUs, whole or as MIG slices, billed by the second. It becomes a ResourceClaimTemplate of the same
    name in its namespace: with a template the operator runs a Job on it, without one any pod of the namespace refers
    to it."""

    spec: GpuLeaseSpec
    """What is rented, for how long, and optionally what runs on it."""
    status: GpuLeaseStatus | None = None
    """What became of it: conditions, price, expiry and cost. Written by the operator only."""


KIND: Final = Kind(
    model=GpuLease,
    plural="gpuleases",
    short_name="gpul",
    columns=(
        condition_column("State", "Ready"),
        Column("GPUs", ".status.devices", "integer"),
        Column("Profile", ".spec.gpus.profile"),
        Column("Nodes", ".status.nodeNames"),
        Column("Expires", ".status.expiresAt"),
        Column("Cost", ".status.cost.amount"),
        AGE,
        Column("Position", ".status.position", "integer", wide=True),
        Column("Price", ".status.price.perHour", wide=True),
        Column("Currency", ".status.price.currency", wide=True),
        condition_column("Reason", "Admitted", wide=True),
    ),
    selectable=(".spec.gpus.profile", ".spec.tier"),
    name_rule=name_limit(
        52,
        "^[a-z]([-a-z0-9]*[a-z0-9])?$",
        "must be at most 52 characters of a-z, 0-9 and -, beginning with a letter, because the Job and the Service of "
        "the lease are named after it",
    ),
)
