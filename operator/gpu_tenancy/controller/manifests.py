"""The Kubernetes objects that the operator makes, as plain mappings. Pure functions of facts; no I/O.

Names are deterministic, so that creating a thing twice is impossible; every object carries the holder's UID as label
and is owned by the lease or pool, so that nothing outlives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gpu_tenancy.api import names
from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.node import GpuNodeSpec, Slot
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.actions import SetSlots
from gpu_tenancy.core.devices import job_name, miner_name, miner_pod_name
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.podspec import without_nulls
from gpu_tenancy.core.snapshot import Key, LeaseFacts, PoolFacts, RecordFacts

Manifest = dict[str, Any]

REQUEST: Final = "gpu"
"""Name of the one device request in every claim, and of the pods' claim."""
PAYOUT_PATH: Final = "/etc/gpu-tenancy/payout"


def owner(kind: HolderKind, name: str, uid: str) -> Manifest:
    """ownerReference to a lease or pool: garbage collection follows it, its deletion does not wait."""
    return {"apiVersion": names.API_VERSION, "kind": str(kind), "name": name, "uid": uid, "controller": True}


def gpu_node_spec(action: SetSlots) -> Manifest:
    """GpuNode.spec: the devices that should exist, and modes where they are not left to what the Node declares."""
    wanted = GpuNodeSpec(slots=list(action.slots), modes=list(action.modes), conversions=list(action.conversions))
    said = wanted.to_wire()
    return {name: value for name, value in said.items() if value or name == "slots"}


def claim_template(lease: LeaseFacts) -> Manifest:
    """ResourceClaimTemplate with the lease's name: each claim made from it gets one pod's devices."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": _lease_meta(lease, lease.key.name),
        "spec": {
            "metadata": {"labels": _lease_labels(lease)},
            "spec": {"devices": _devices(lease.uid, lease.spec.gpus.count)},
        },
    }


def job(lease: LeaseFacts, attempt: int, nodes: tuple[str, ...]) -> Manifest:
    """Indexed Job of a placement attempt, held to the planned nodes."""
    name = job_name(lease.key.name, attempt)
    template = without_nulls(lease.spec.template or {})
    pod = template.setdefault("spec", {})
    pod.setdefault("restartPolicy", "Never")
    pod["resourceClaims"] = [{"name": REQUEST, "resourceClaimTemplateName": lease.key.name}]
    for container in pod.get("containers") or ():
        container.setdefault("resources", {}).setdefault("claims", []).append({"name": REQUEST})
    pod.setdefault("tolerations", []).append({"key": names.ANY_GPU_TAINT, "operator": "Exists"})
    if lease.spec.pods > 1:
        pod.setdefault("subdomain", lease.key.name)
    _hold_to(pod, nodes)
    labels = template.setdefault("metadata", {}).setdefault("labels", {})
    labels.update(_lease_labels(lease), **{names.LABEL_ATTEMPT: str(attempt)})
    metadata = _lease_meta(lease, name)
    metadata["labels"][names.LABEL_ATTEMPT] = str(attempt)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": lease.spec.pods,
            "parallelism": lease.spec.pods,
            "backoffLimit": 0,
            "template": template,
        },
    }


def service(lease: LeaseFacts) -> Manifest:
    """Headless Service through which the pods of a gang find each other by name."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _lease_meta(lease, lease.key.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {names.LABEL_HOLDER: lease.uid},
        },
    }


def miner_claim(pool: PoolFacts, node: str, slot: Slot) -> Manifest:
    """ResourceClaim of one miner, on its very device: a pool has many, and a stopped miner must free the right one."""
    own = f'device.attributes["{names.DRIVER}"]'
    narrower = (
        f' && {own}.parentUuid == "{slot.gpu}" && {own}.profile == "{slot.profile}" && {own}.start == {slot.start}'
    )
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": _miner_meta(pool, node, slot.device),
        "spec": {"devices": _devices(pool.uid, 1, narrower)},
    }


def miner_pod(pool: PoolFacts, node: str, device: str, claim_uid: str) -> Manifest:
    """Pod of one miner, held to its node. `claim_uid`: UID of the miner's claim."""
    claim = miner_name(node, device)
    spec = pool.spec
    amount = {"cpu": spec.resources.cpu, "memory": spec.resources.memory}
    container: Manifest = {
        "name": "miner",
        "image": spec.image,
        "env": [variable.to_wire() for variable in spec.env],
        "resources": {"requests": amount, "limits": amount, "claims": [{"name": REQUEST}]},
    }
    if spec.command:
        container["command"] = list(spec.command)
    if spec.args:
        container["args"] = list(spec.args)
    pod: Manifest = {
        "restartPolicy": "Always",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": spec.grace_seconds,
        "containers": [container],
        "resourceClaims": [{"name": REQUEST, "resourceClaimName": claim}],
        "tolerations": [{"key": names.ANY_GPU_TAINT, "operator": "Exists"}],
    }
    if spec.payout_secret_ref is not None:
        pod["volumes"] = [{"name": "payout", "secret": {"secretName": spec.payout_secret_ref.name}}]
        container["volumeMounts"] = [{"name": "payout", "mountPath": PAYOUT_PATH, "readOnly": True}]
    _hold_to(pod, (node,))
    metadata = {**_miner_meta(pool, node, device), "name": miner_pod_name(claim, claim_uid)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


def usage_record(lease: Key, name: str, spec: UsageRecordSpec) -> Manifest:
    """An open UsageRecord beside its lease."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "UsageRecord",
        "metadata": {
            "namespace": lease.namespace,
            "name": name,
            "labels": {names.LABEL_LEASE: lease.name[:63].rstrip("-._")},
            "finalizers": [names.FINALIZER_LEDGER],
        },
        "spec": spec.to_wire(),
    }


def archived_record(record: RecordFacts, namespace: str) -> Manifest:
    """Copy of a closed record for the system namespace, which outlives the tenant's."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "UsageRecord",
        "metadata": {"namespace": namespace, "name": record.name},
        "spec": record.spec.to_wire(),
    }


def _devices(holder: str, count: int, narrower: str = "") -> Manifest:
    """spec.devices of a claim for devices of one holder. Selectors guard with `in`: a missing attribute is a CEL error
    that aborts the whole allocation."""
    domain = f'device.attributes["{names.DRIVER}"]'
    expression = (
        f'device.driver == "{names.DRIVER}" && "{names.ATTRIBUTE_HOLDER}" in {domain}'
        f' && {domain}.{names.ATTRIBUTE_HOLDER} == "{holder}"{narrower}'
    )
    exactly = {
        "deviceClassName": names.DEVICE_CLASS,
        "allocationMode": "ExactCount",
        "count": count,
        "selectors": [{"cel": {"expression": expression}}],
    }
    parameters = ClaimHolder(holder=holder).to_wire()
    return {
        "requests": [{"name": REQUEST, "exactly": exactly}],
        "config": [{"requests": [REQUEST], "opaque": {"driver": names.DRIVER, "parameters": parameters}}],
    }


def _hold_to(pod: Manifest, nodes: tuple[str, ...]) -> None:
    """Require one of the nodes, and whatever the template required besides. One term per node: kube-scheduler then
    looks at these nodes only."""
    affinity = pod.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    own = (affinity.get(_REQUIRED) or {}).get("nodeSelectorTerms") or [{}]
    terms = [_with_node(term, node) for node in nodes for term in own]
    affinity[_REQUIRED] = {"nodeSelectorTerms": terms}


_REQUIRED: Final = "requiredDuringSchedulingIgnoredDuringExecution"


def _with_node(term: Mapping[str, Any], node: str) -> Manifest:
    fields = [*(term.get("matchFields") or ()), {"key": "metadata.name", "operator": "In", "values": [node]}]
    return {**term, "matchFields": fields}


def _lease_labels(lease: LeaseFacts) -> dict[str, str]:
    return {names.LABEL_LEASE: lease.key.name[:63].rstrip("-._"), names.LABEL_HOLDER: lease.uid}


def _lease_meta(lease: LeaseFacts, name: str) -> Manifest:
    return {
        "namespace": lease.key.namespace,
        "name": name,
        "labels": _lease_labels(lease),
        "ownerReferences": [owner(HolderKind.GPU_LEASE, lease.key.name, lease.uid)],
    }


def _miner_meta(pool: PoolFacts, node: str, device: str) -> Manifest:
    return {
        "namespace": pool.key.namespace,
        "name": miner_name(node, device),
        "labels": {
            names.LABEL_POOL: pool.key.name[:63].rstrip("-._"),
            names.LABEL_HOLDER: pool.uid,
            names.LABEL_DEVICE: device,
            names.LABEL_REVISION: revision(pool.spec),
        },
        "annotations": {names.LABEL_NODE: node},
        "ownerReferences": [owner(HolderKind.MINING_POOL, pool.key.name, pool.uid)],
    }
