"""Every string that is shared with the cluster: group, finalizers, labels, annotations.

Nothing else in the project spells these out. A rename here is a breaking API change.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

GROUP: Final = "gpu-tenancy.dev"
VERSION: Final = "v1alpha1"
ApiVersion: TypeAlias = Literal["gpu-tenancy.dev/v1alpha1"]
"""The type whose only value is API_VERSION."""
API_VERSION: Final[ApiVersion] = "gpu-tenancy.dev/v1alpha1"
"""apiVersion of every kind of the group: GROUP/VERSION."""
CATEGORY: Final = "gpu-tenancy"
"""`kubectl get gpu-tenancy` lists every kind of the group."""

DRIVER: Final = GROUP
"""Name of the DRA driver: the domain of its device attributes and of its kubelet socket."""
DEVICE_CLASS: Final = GROUP
"""The one DeviceClass; every device of every agent belongs to it."""
SYSTEM_NAMESPACE: Final = "gpu-tenancy-system"
"""Default namespace of operator, agents, agent heartbeats and of archived UsageRecords."""

FINALIZER_SETTLE: Final = f"{GROUP}/settle"
"""On a GpuLease: its GPUs are still held or its last second is not billed yet."""
FINALIZER_LEDGER: Final = f"{GROUP}/ledger"
"""On a UsageRecord: no archived copy exists yet."""

LABEL_LEASE: Final = f"{GROUP}/lease"
"""Name of the GpuLease that an object was made for."""
LABEL_POOL: Final = f"{GROUP}/pool"
"""Name of the MiningPool that an object was made for."""
LABEL_HOLDER: Final = f"{GROUP}/holder"
"""UID of the GpuLease or MiningPool that holds the device."""
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
"""Placement attempt of the lease that an object belongs to."""
LABEL_DEVICE: Final = f"{GROUP}/device"
"""Name of the device that a miner pod runs on."""
LABEL_REVISION: Final = f"{GROUP}/revision"
"""Hash of what a miner pod was made from: a pool that changed replaces the miners that differ."""
LABEL_NODE: Final = f"{GROUP}/node"
"""Node that a heartbeat Lease, a claim or a miner pod is for."""
LABEL_AGENT: Final = f"{GROUP}/agent"
"""Marks the coordination Lease in which an agent renews its heartbeat."""

ANNOTATION_MIG_GPUS: Final = f"{GROUP}/mig-gpus"
"""On a Node: indices of the GPUs that are in MIG mode, e.g. "6,7". Absent: all GPUs are whole."""

ANNOTATION_CONVERTIBLE_GPUS: Final = f"{GROUP}/convertible-gpus"
"""On a Node: indices of the GPUs that the operator may convert between whole and MIG by demand. Absent: none."""

ANNOTATION_TOUCHED: Final = f"{GROUP}/touched-at"
"""On a ResourceClaim that stayed behind: when the operator last made kube-controller-manager look at it again."""

ANNOTATION_PREEMPTED: Final = f"{GROUP}/preempted-at"
"""On the pods of a spot lease that has been given notice: when it loses its devices."""

ATTRIBUTE_HOLDER: Final = "holder"
"""Device attribute (domain: the driver) that carries the UID of the lease or pool that a device belongs to."""

ANY_GPU_TAINT: Final = "nvidia.com/gpu"
"""Customary taint of GPU nodes; every pod that runs on a leased device is taken to tolerate it."""
