"""GpuNode: the channel between operator and agent, one per GPU node.

`spec` is what should be (written by the operator, by compare-and-swap on the generation); `status` is what is
(written by the node's agent). A slot that is in status but no longer in spec is being taken away.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import ConfigDict, Field

from gpu_tenancy.api.base import ApiModel, ConditionStatus, Holder, Message, MicroTime, Profile, ShortMessage, Time
from gpu_tenancy.api.kinds import AGE, Column, Kind, condition_column, list_map, replaced_whole, rule, rules


class GpuMode(StrEnum):
    """Mode of a GPU."""

    WHOLE = "Whole"
    MIG = "MIG"


class SlotState(StrEnum):
    """Life of a device on its node."""

    PREPARING = "Preparing"
    """Wanted; waits for the former holder to be gone and for its partition."""
    READY = "Ready"
    """Exists, empty of others, stored as ready; published in the node's ResourceSlice."""
    DRAINING = "Draining"
    """No longer wanted and withdrawn from scheduling; waits until its holder has let go."""
    FAILED = "Failed"
    """Could not be made; the message says why. The agent keeps trying."""
    QUARANTINED = "Quarantined"
    """A step of its hand-over did not end in time; the message says which and why. Its memory slices are fenced, its
    neighbours go on, the agent keeps trying."""


BROKEN: Final = frozenset({SlotState.FAILED, SlotState.QUARANTINED})
"""States in which a device serves nobody until somebody or something mends it."""


class HandOverStepType(StrEnum):
    """Steps in which a device passes from one holder to the next, in their order."""

    EVICT = "Evict"
    """The former holder's pods stop and kubelet gives their claims back."""
    PROVE_EMPTY = "ProveEmpty"
    """No process of the former holder is left on the host, and the driver lists none on the device, twice."""
    DESTROY = "Destroy"
    """The former holder's MIG instance is destroyed."""
    RESET = "Reset"
    """Clocks, power limit and compute mode are put back; only where nobody else has a slice of the GPU."""
    PARTITION = "Partition"
    """The MIG instance is created at its exact placement; of a whole GPU: nobody else is on it."""
    SCRUB = "Scrub"
    """All memory that the new holder can reach is written, from inside the new device, and samples are read back."""
    VERIFY = "Verify"
    """Memory errors, row remapping, recovery action, power limit and PCIe link of the GPU are as they should be."""


class NodeConditionType(StrEnum):
    """Conditions of a GpuNode: `Ready` and `Conflict` are the agent's, `AgentSilent` the operator's."""

    READY = "Ready"
    CONFLICT = "Conflict"
    AGENT_SILENT = "AgentSilent"


class NodeReason(StrEnum):
    """Machine-readable reasons of a GpuNode's conditions."""

    READY = "Ready"
    WORKING = "Working"
    NO_GPUS = "NoGpus"
    DEVICE_FAILED = "DeviceFailed"
    SOLE_OWNER = "SoleOwner"
    OTHER_OWNER = "OtherOwner"
    RUNTIME_UNKNOWN = "RuntimeUnknown"
    HEARTBEAT_MISSED = "HeartbeatMissed"


_DEVICE_REMEDY: Final = (
    "must consist of a-z, 0-9 and -, and begin and end with a letter or digit, because the device is published under "
    "that name; rename the device"
)


class Slot(ApiModel):
    """One device that should exist and whom it belongs to."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.profile != 'full' || self.start == 0",
                "start of a whole GPU must be 0: profile full takes every memory slice",
                computed="'start of device ' + self.device + ' must be 0: profile full takes every memory slice'",
                field=".start",
            )
        )
    )

    device: str = Field(
        max_length=63,
        json_schema_extra=rules(
            rule(
                "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
                f"spec.slots[].device {_DEVICE_REMEDY}",
                computed=f"'spec.slots[].device ' + self + ' {_DEVICE_REMEDY}'",
            )
        ),
    )
    """Name of the device in the ResourceSlice: its placement and a hash of its holder, e.g. gpu3-9f2c41 or
    gpu3-1g10gb-6-9f2c41. A new holder is a new name."""
    gpu: str = Field(max_length=96)
    """UUID of the GPU."""
    profile: Profile
    """`full` for a whole GPU, else a MIG profile."""
    start: int = Field(default=0, ge=0, le=7)
    """First memory slice of the placement; 0 for a whole GPU."""
    holder: Holder
    """Whom the device belongs to."""
    attempt: int = Field(default=1, ge=1)
    """Placement attempt of the lease; 1 for pools."""
    since: MicroTime
    """When the operator decided this; a lease is never billed from before it."""


class WantedMode(ApiModel):
    """The mode that a convertible GPU should have, whatever its Node declares."""

    gpu: str = Field(max_length=96)
    """UUID of the GPU."""
    mode: GpuMode
    """Whole or MIG."""
    since: MicroTime
    """When the operator decided this; it decides otherwise after a dwell only."""


class GpuNodeSpec(ApiModel):
    """The devices that should exist on the node. Written by the operator only."""

    slots: Annotated[
        list[Slot],
        Field(max_length=112, json_schema_extra=list_map("device")),
    ] = []
    """Wanted devices; at most 7 on each of 16 GPUs."""
    modes: Annotated[
        list[WantedMode],
        Field(max_length=16, json_schema_extra=list_map("gpu")),
    ] = []
    """GPUs that were converted by demand, or a moment ago back. Every other GPU has the mode that its Node declares."""
    conversions: Annotated[list[MicroTime], Field(max_length=64)] = []
    """When conversions by demand were decided, there and back; those of the last hour count against the budget."""


class HandOverStep(ApiModel):
    """One step of a hand-over."""

    step: HandOverStepType
    """What was done."""
    milliseconds: int = Field(ge=0)
    """How long it took, waiting included."""


class HandOver(ApiModel):
    """How a device came to its holder, as evidence: nothing of the former holder is left on it."""

    model_config = ConfigDict(json_schema_extra=replaced_whole())

    holder: Holder | None = None
    """Whom it was made ready for."""
    at: MicroTime | None = None
    """When it was, on the node's clock."""
    former: Annotated[list[Holder], Field(max_length=8)] = []
    """Who had any of its memory slices last, as far as the agent knows; empty on a new or rebooted node."""
    steps: Annotated[list[HandOverStep], Field(max_length=16)] = []
    """Steps in the order in which they ended. The former holder's own are those of the device that gave way last."""
    scrubbed_bytes: int = Field(default=0, ge=0)
    """Bytes of device memory that were overwritten."""
    samples: int = Field(default=0, ge=0)
    """Places, spread over all of them, that were read back and held what had been written."""
    ecc_uncorrected: int | None = Field(default=None, ge=0)
    """Uncorrectable memory errors of the GPU since its driver was loaded, when the device was verified."""
    ecc_uncorrected_before: int | None = Field(default=None, ge=0)
    """The same at the GPU's last hand-over; absent where there was none in this boot, or what happened since was dealt
    with by a fence. More now than then, and the GPU is reset first."""
    xids: int = Field(default=0, ge=0)
    """Xid events of the GPU in this boot that the agent had counted by then, application faults included."""
    xids_before: int | None = Field(default=None, ge=0)
    """The same at the GPU's last hand-over; absent as above."""
    driver: str = Field(default="", max_length=64)
    """Version of NVIDIA's driver."""
    vbios: str = Field(default="", max_length=64)
    """Version of the GPU's firmware."""


class Gpu(ApiModel):
    """One GPU as NVML shows it."""

    index: int = Field(ge=0, le=63)
    """NVML index on the node."""
    uuid: str = Field(max_length=96)
    """NVML UUID."""
    model: str = Field(max_length=63)
    """NVML name without the vendor, with - for spaces: A100-SXM4-80GB, A100-80GB-PCIe."""
    memory_mib: int = Field(ge=1)
    """Total memory in MiB."""
    pci_bus_id: str = Field(default="", max_length=32)
    """PCI bus id."""
    mode: GpuMode
    """Whole or MIG, as observed."""
    declared: GpuMode | None = None
    """Mode that the Node declares for it; absent where it declares none."""
    convertible: bool = False
    """The Node lets the operator convert it by demand."""
    healthy: bool = True
    """false: nothing is planned on it, and what is on it has failed."""
    fenced: Annotated[list[Annotated[int, Field(ge=0, le=7)]], Field(max_length=8)] = []
    """Memory slices on which nothing new is planned; who is served there is left alone."""
    message: ShortMessage = ""
    """Why it is not healthy, or why slices are fenced."""

    @property
    def fenced_mask(self) -> int:
        """Fenced memory slices as bits."""
        return sum(1 << number for number in self.fenced)


class ObservedSlot(ApiModel):
    """One device that exists or is being made or taken away."""

    device: str = Field(max_length=63)
    """Name of the device."""
    gpu: str = Field(max_length=96)
    """UUID of the GPU."""
    profile: str = Field(max_length=16)
    """`full` or a MIG profile."""
    start: int = Field(default=0, ge=0, le=7)
    """First memory slice."""
    holder: Holder
    """Whom it belongs to."""
    state: SlotState
    """Preparing, Ready, Draining, Failed or Quarantined."""
    uuid: str = Field(default="", max_length=96)
    """NVML UUID of the device itself (GPU-… or MIG-…), once it exists."""
    ready_at: MicroTime | None = None
    """When the device was ready; stored before it is published."""
    hand_over: HandOver | None = None
    """How it was made ready for its holder; absent until it is."""
    message: ShortMessage = ""
    """What it waits for, or why it failed."""


class NodeCondition(ApiModel):
    """metav1.Condition of a node."""

    type: NodeConditionType
    """Ready, Conflict or AgentSilent."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: NodeReason
    """Machine-readable cause."""
    message: Message = ""
    """The cause in plain English."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: int = Field(ge=0)
    """Generation of the spec that this condition was computed from."""


class GpuNodeStatus(ApiModel):
    """The devices that are. Written by the node's agent; its condition AgentSilent by the operator."""

    observed_generation: int | None = None
    """Generation of the spec that the agent has acted upon."""
    boot_id: str = Field(default="", max_length=64)
    """Boot of the node that the devices belong to."""
    gpus: Annotated[
        list[Gpu],
        Field(max_length=16, json_schema_extra=list_map("uuid")),
    ] = []
    """GPUs of the node."""
    slots: Annotated[
        list[ObservedSlot],
        Field(max_length=224, json_schema_extra=list_map("device")),
    ] = []
    """Devices that exist, are being made, or are being taken away."""
    conditions: Annotated[
        list[NodeCondition],
        Field(max_length=8, json_schema_extra=list_map("type")),
    ] = []
    """Ready; Conflict, True while somebody else hands out the node's GPUs; while nobody is heard, AgentSilent."""


class GpuNode(ApiModel):
    """Wanted and observed devices of one GPU node; named as the Node."""

    spec: GpuNodeSpec = GpuNodeSpec()
    """The devices that should exist, and whose they are. Written by the operator only."""
    status: GpuNodeStatus | None = None
    """The GPUs and devices that exist. Written by the node's agent; its condition AgentSilent by the operator."""


KIND: Final = Kind(
    model=GpuNode,
    plural="gpunodes",
    short_name="gpun",
    namespaced=False,
    columns=(
        condition_column("Ready", "Ready", "status"),
        condition_column("State", "Ready"),
        Column("Silent", '.status.conditions[?(@.type=="AgentSilent")].status'),
        Column("Model", ".status.gpus[0].model"),
        Column("Generation", ".metadata.generation", "integer", wide=True),
        Column("Observed", ".status.observedGeneration", "integer", wide=True),
        AGE,
    ),
)
