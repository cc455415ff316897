"""Questions that the story asks about what was observed, answered in the API's own types.

Pure reading of `Observed`: nothing is asked of the API server, and nothing is remembered.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gpu_tenancy.api import names
from gpu_tenancy.api.base import ConditionStatus, HolderKind
from gpu_tenancy.api.lease import ConditionType, GpuLeaseStatus, LeaseCondition, Reason
from gpu_tenancy.api.node import GpuNodeStatus, ObservedSlot, SlotState
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.observed import Observed

Device = tuple[str, str]
"""Names of node and device."""

KINDS: Final = (
    resources.GPU_NODES,
    resources.GPU_LEASES,
    resources.USAGE_RECORDS,
    resources.PODS,
    resources.RESOURCE_CLAIMS,
)
"""What has to be observed for these questions."""


@dataclass(frozen=True, slots=True)
class Roster:
    """Which miners there were at some instant."""

    running: Mapping[str, Device]
    """By the UID of their pod."""
    ever: frozenset[str]
    """UIDs of all that had been seen until then."""


class Sights:
    """What can be seen in one tenant's namespace and on the nodes."""

    def __init__(self, observed: Observed, tenant: str) -> None:
        self.observed = observed
        self._tenant = tenant

    # --- miners and devices

    def roster(self) -> Roster:
        """The miners as they are now, to compare with later."""
        pods = self.observed.ever(resources.PODS)
        return Roster(self.miners(), frozenset(pod["metadata"]["uid"] for pod in pods if _mines(pod)))

    def miners(self) -> dict[str, Device]:
        """Running miners by the UID of their pod, each with its device."""
        return {
            pod["metadata"]["uid"]: (pod["spec"]["nodeName"], pod["metadata"]["labels"][names.LABEL_DEVICE])
            for pod in self.observed.all(resources.PODS)
            if _mines(pod) and runs(pod)
        }

    def stopped(self, since: Roster) -> dict[str, Device]:
        """Miners that ran and do not run any more, each with its device."""
        now = self.miners()
        return {uid: device for uid, device in since.running.items() if uid not in now}

    def started(self, since: Roster) -> frozenset[str]:
        """UIDs of the miners that came since, whether they run or not."""
        return self.roster().ever - since.ever

    def mined(self, gpu: str | None = None) -> Counter[str]:
        """How many miners run on which profile; on all GPUs, or on the one with the UUID `gpu`."""
        slots = {(node, slot.device): slot for node, slot in self._slots() if gpu in (None, slot.gpu)}
        return Counter(slots[device].profile for device in self.miners().values() if device in slots)

    def gpus(self) -> dict[Device, str]:
        """UUID of the GPU of every device."""
        return {(node, slot.device): slot.gpu for node, slot in self._slots()}

    def devices(self, lease: str) -> list[tuple[str, ObservedSlot]]:
        """The ready devices of a lease, each with its node."""
        return [
            (node, slot)
            for node, slot in self._slots()
            if slot.holder.kind is HolderKind.GPU_LEASE
            and (slot.holder.namespace, slot.holder.name) == (self._tenant, lease)
            and slot.state is SlotState.READY
        ]

    def _slots(self) -> Iterator[tuple[str, ObservedSlot]]:
        for node in self.observed.all(resources.GPU_NODES):
            for slot in GpuNodeStatus.model_validate(node.get("status") or {}).slots:
                yield node["metadata"]["name"], slot

    # --- leases

    def lease(self, name: str) -> Object | None:
        """The last version of a lease, also of one that is gone."""
        found = [one for one in self.observed.ever(resources.GPU_LEASES) if one["metadata"]["name"] == name]
        return found[-1] if found else None

    def exists(self, name: str) -> bool:
        """Whether the lease is there now."""
        return self.observed.get(resources.GPU_LEASES, name, self._tenant) is not None

    def status(self, name: str) -> GpuLeaseStatus:
        """What the lease says of itself; empty where there is none."""
        lease = self.lease(name)
        return status_of(lease) if lease else GpuLeaseStatus()

    def condition(self, name: str, kind: ConditionType) -> LeaseCondition | None:
        """A condition of the lease as it is now."""
        return _condition(self.status(name), kind)

    def ever(self, name: str, kind: ConditionType, status: ConditionStatus, reason: Reason) -> LeaseCondition | None:
        """The condition of the lease in the first version that had it so."""
        conditions = (_condition(one, kind) for _, one in self._statuses(name))
        return next((one for one in conditions if one and (one.status, one.reason) == (status, reason)), None)

    def seconds_to_ready(self, name: str) -> float:
        """From the first sight of the lease to the first sight of Ready=True; 0 where it was never ready."""
        statuses = list(self._statuses(name))
        ready = [at for at, one in statuses if _is_true(_condition(one, ConditionType.READY))]
        return ready[0] - statuses[0][0] if ready else 0.0

    def _statuses(self, name: str) -> Iterator[tuple[float, GpuLeaseStatus]]:
        """Every version of the lease's status, with the time at which it was shown."""
        lease = self.lease(name)
        for version in self.observed.versions(lease["metadata"]["uid"]) if lease else ():
            yield version.at, status_of(version.body)

    def state(self, name: str) -> str:
        """A lease in a sentence, for somebody who expected something else."""
        ready = self.condition(name, ConditionType.READY)
        if ready is None:
            return f"lease {name} has no condition Ready" if self.lease(name) else f"no lease {name}"
        return f"lease {name} Ready={ready.status} {ready.reason}: {ready.message}"

    # --- the ledger

    def records(self, lease: str | None = None) -> list[Object]:
        """UsageRecords of the tenant, or of one lease."""
        return [
            one
            for one in self.observed.all(resources.USAGE_RECORDS)
            if one["spec"]["leaseNamespace"] == self._tenant and lease in (None, one["spec"]["leaseName"])
        ]

    def segments(self, lease: str | None = None) -> list[UsageRecordSpec]:
        """The same as segments."""
        return [UsageRecordSpec.model_validate(one["spec"]) for one in self.records(lease)]

    # --- pods of the tenant

    def pods(self, app: str) -> list[Object]:
        """Pods with the label app=`app` that exist."""
        return [one for one in self.observed.all(resources.PODS) if _app(one) == (self._tenant, app)]

    def ever_bound(self, app: str) -> set[str]:
        """UIDs of the pods with the label app=`app` that were ever sent to a node."""
        pods = (one for one in self.observed.ever(resources.PODS) if _app(one) == (self._tenant, app))
        return {pod["metadata"]["uid"] for pod in pods if pod["spec"].get("nodeName")}

    def allocated(self, pod: Object) -> set[Device]:
        """Devices that kube-scheduler has allocated to a pod's claims."""
        claims = {one.get("resourceClaimName") for one in pod.get("status", {}).get("resourceClaimStatuses") or ()}
        return {
            (result["pool"], result["device"])
            for claim in self.observed.all(resources.RESOURCE_CLAIMS)
            if claim["metadata"]["name"] in claims and claim["metadata"]["namespace"] == self._tenant
            for result in claim.get("status", {}).get("allocation", {}).get("devices", {}).get("results", ())
        }


def status_of(lease: Object) -> GpuLeaseStatus:
    """Status of a GpuLease; empty where it has none yet."""
    return GpuLeaseStatus.model_validate(lease.get("status") or {})


def runs(pod: Object) -> bool:
    """Whether a pod runs and nobody has told it to stop."""
    return pod.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]


def _condition(status: GpuLeaseStatus, kind: ConditionType) -> LeaseCondition | None:
    return next((one for one in status.conditions if one.type is kind), None)


def _is_true(condition: LeaseCondition | None) -> bool:
    return condition is not None and condition.status is ConditionStatus.TRUE


def _mines(pod: Object) -> bool:
    return names.LABEL_POOL in pod["metadata"].get("labels", {})


def _app(pod: Object) -> tuple[str, str]:
    metadata = pod["metadata"]
    return metadata["namespace"], metadata.get("labels", {}).get("app", "")
