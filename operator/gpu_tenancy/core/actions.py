"""What a plan may do, as values. The executor turns each into API calls that are harmless when repeated.

In order of execution: records; prices and claim templates; promises (GpuNode.spec); stopping; starting; letting go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple

from gpu_tenancy.api.lease import DeviceHandOver, Preemption, Price, Reason, Reservation
from gpu_tenancy.api.node import Slot, WantedMode
from gpu_tenancy.api.tenant import CommitmentStatus
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.snapshot import (
    Key,
    LeaseFacts,
    LeftClaim,
    MinerFacts,
    PodRef,
    PoolFacts,
    RecordFacts,
    StartingPod,
    TenantFacts,
)
from gpu_tenancy.core.tenancy import Conflict, Holding


@dataclass(frozen=True, slots=True)
class OpenRecord:
    """Begin a billing segment."""

    lease: LeaseFacts
    name: str
    spec: UsageRecordSpec


@dataclass(frozen=True, slots=True)
class CloseRecord:
    """End a billing segment; written before anything of it is stopped."""

    record: RecordFacts
    uid: str
    """UID of the lease, for blame; empty for an orphan."""
    billable_to: datetime
    seconds: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """Copy a closed record that is being deleted into the system namespace, then let it go."""

    record: RecordFacts


@dataclass(frozen=True, slots=True)
class Admit:
    """Take the finalizer and write the lease's price, contract and attempt into its status."""

    lease: LeaseFacts
    attempt: int
    price: Price | None


@dataclass(frozen=True, slots=True)
class SetSlots:
    """Replace what a node should have, if its generation still holds."""

    node: str
    generation: int
    slots: tuple[Slot, ...]
    requires: frozenset[str]
    """UIDs of the leases whose Admit must have succeeded."""
    modes: tuple[WantedMode, ...] = ()
    conversions: tuple[datetime, ...] = ()


@dataclass(frozen=True, slots=True)
class StopMiner:
    """Delete a miner's pod and claim."""

    miner: MinerFacts
    grace_seconds: int


@dataclass(frozen=True, slots=True)
class DeleteClaimTemplate:
    """Stop new pods from claiming the lease's devices."""

    lease: LeaseFacts


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Stop the pods of a placement attempt."""

    lease: LeaseFacts
    job: str
    uid: str


@dataclass(frozen=True, slots=True)
class DeletePod:
    """Stop a pod of the tenant that holds a device which is no longer its lease's, or can never be prepared."""

    lease: LeaseFacts
    pod: PodRef
    message: str


@dataclass(frozen=True, slots=True)
class WarnPod:
    """Say on a pod of a spot lease when it loses its devices, or that it keeps them after all."""

    lease: LeaseFacts
    pod: PodRef
    at: datetime | None
    """None: it keeps them."""


@dataclass(frozen=True, slots=True)
class CreateClaimTemplate:
    """Let pods claim the lease's devices."""

    lease: LeaseFacts


@dataclass(frozen=True, slots=True)
class CreateJob:
    """Run the lease's template on its nodes."""

    lease: LeaseFacts
    attempt: int
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartMiner:
    """Create a miner's claim and pod, whichever is missing."""

    pool: PoolFacts
    node: str
    slot: Slot
    claim_uid: str = ""
    """UID of the claim that is there; empty: it has to be made."""
    missing_pod: bool = True

    @property
    def device(self) -> str:
        """Name of the device that it mines on."""
        return self.slot.device


@dataclass(frozen=True, slots=True)
class Unbind:
    """Remove the settle finalizer: nothing is held and every second is billed."""

    lease: LeaseFacts


@dataclass(frozen=True, slots=True)
class TouchClaim:
    """Write something harmless to a claim that stayed behind, so that kube-controller-manager looks at it again."""

    claim: LeftClaim
    at: datetime


@dataclass(frozen=True, slots=True)
class TouchPod:
    """Write something harmless to a pod that is bound and does not begin, so that kubelet looks at it again."""

    pod: StartingPod
    at: datetime


Action = (
    OpenRecord | CloseRecord | ArchiveRecord | Admit | SetSlots | StopMiner | DeleteClaimTemplate | DeleteJob
    | DeletePod | WarnPod | CreateClaimTemplate | CreateJob | StartMiner | TouchClaim | TouchPod
    | Unbind
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a lease is not placed."""

    reason: Reason
    message: str
    final: bool = False
    """It can never be placed as things are: it is refused, not queued."""


class Outlook(NamedTuple):
    """Everything that the plan found out about one lease; its status is derived from this."""

    lease: LeaseFacts
    duration: str | None
    expires_at: datetime | None = None
    extension_refusal: str = ""
    refusal: Refusal | None = None
    position: int | None = None
    expected_start: datetime | None = None
    """When a lease that waits is expected to be placed; None: nobody knows."""
    attempt: int = 0
    price: Price | None = None
    admitted_now: bool = False
    nodes: tuple[str, ...] = ()
    """Nodes of its placement, planned or written; empty: it holds nothing."""
    waiting: str = ""
    """What its devices are waiting for, as a sentence; empty once all are ready."""
    waiting_reason: Reason = Reason.PREPARING
    """Preparing, or DeviceFailed where one of them could not be made."""
    ready_devices: int = 0
    hand_overs: tuple[DeviceHandOver, ...] = ()
    """How its devices came to it, as far as they are ready."""
    opened: UsageRecordSpec | None = None
    """Segment that begins with this plan."""
    closed: CloseRecord | None = None
    """Segment that ends with this plan."""
    reservation: Reservation | None = None
    """What is promised to a lease that begins later."""
    commitment: str | None = None
    """What a Reserved lease draws on."""
    renewals: int = 0
    """How often its term was renewed."""
    preemption: Preemption | None = None
    """Notice of a spot lease, as it is now; once its devices are gone, that they were taken."""
    end_message: str = ""
    lost: str = ""
    """Why its former devices are gone, while it is placed anew."""
    over: bool = False
    settled: bool = False
    draining: str = ""
    """What still has to stop after the end, as a sentence."""
    silent: str = ""
    """Why the agent of one of its nodes cannot be relied on."""


@dataclass(frozen=True, slots=True)
class PoolOutlook:
    """What the plan found out about one pool."""

    pool: PoolFacts
    assigned: int
    mining: int


@dataclass(frozen=True, slots=True)
class TenantOutlook:
    """What the plan found out about one GpuTenant."""

    tenant: TenantFacts
    holds: Holding
    """What its leases hold once the plan is carried out."""
    used: float
    """Decayed slice-seconds up to now."""
    conflicts: tuple[Conflict, ...] = ()
    """Namespaces that it names and others have."""
    commitments: tuple[CommitmentStatus, ...] = ()
    """What is kept for its commitments."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision of one cycle."""

    actions: tuple[Action, ...] = ()
    """In execution order."""
    moving: tuple[Outlook, ...] = ()
    """Of the leases that something may have happened to, by key."""
    resting: tuple[Outlook, ...] = ()
    """Of those that stay as they are: nothing is to be done for them."""
    pools: tuple[PoolOutlook, ...] = ()
    tenants: tuple[TenantOutlook, ...] = ()
    next_wake: datetime | None = None
    """Earliest instant at which the answer changes by itself."""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By lease UID."""
    fits: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How many devices there is room for beside leases, by model and profile; of `full` on one node at most."""

    @property
    def leases(self) -> tuple[Outlook, ...]:
        """Of all leases, by key."""
        return tuple(sorted((*self.moving, *self.resting), key=_key))

    def __eq__(self, other: object) -> bool:
        """Both say the same; which leases were known to rest saves work and nothing else."""
        if not isinstance(other, Plan):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _SAID)

    __hash__ = None  # type: ignore[assignment]  # nobody keeps plans in sets


_SAID: Final = ("actions", "leases", "pools", "tenants", "next_wake", "refusals", "fits")


def _key(outlook: Outlook) -> Key:
    return outlook.lease.key


def blame(action: Action) -> tuple[str, Key | None]:
    """UID of the lease or pool that an action is for (a node's own actions: empty), and its key."""
    match action:
        case CloseRecord():
            return action.uid, None
        case ArchiveRecord() | SetSlots() | TouchClaim() | TouchPod():
            return "", None
        case StopMiner():
            return action.miner.pool, None
        case StartMiner():
            return action.pool.uid, action.pool.key
        case _:
            return action.lease.uid, action.lease.key
