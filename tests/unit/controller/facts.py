"""Facts and objects in few words, for tests of the controller: what is not said is unremarkable."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from gpu_tenancy.api import names
from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.node import Slot
from gpu_tenancy.api.pool import MiningPoolSpec, MiningPoolStatus
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import Key, LeaseFacts, PoolFacts, RecordFacts, TemplateFacts

Object = dict[str, Any]

NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
CREATED: Final = "2026-03-01T11:00:00Z"
CONTAINERS: Final = {"spec": {"containers": [{"name": "main", "image": "train"}]}}


def lease(name: str = "train", *, status: GpuLeaseStatus | None = None, **spec: object) -> LeaseFacts:
    """A lease of one whole GPU that nothing has been done for yet; `spec` uses the API's own field names."""
    wanted = GpuLeaseSpec.model_validate({"gpus": {"profile": "full"}, **spec})
    template = TemplateFacts(PodNeeds(Amount(1000, 2**30, 1)), None) if wanted.template else None
    return LeaseFacts(
        key=Key("team-a", name),
        uid=f"uid-{name}",
        generation=1,
        created=NOW,
        spec=wanted,
        status=status or GpuLeaseStatus(),
        template=template,
    )


def admitted(name: str = "train", **spec: object) -> LeaseFacts:
    """A lease whose finalizer and first status are written."""
    one = lease(name, status=GpuLeaseStatus(admitted_at=NOW, attempt=1, contract=f"uid-{name}"), **spec)
    return replace(one, finalized=True)


def pool(name: str = "idle", **spec: object) -> PoolFacts:
    """A pool that mines on everything; `spec` uses the API's own field names."""
    wanted = MiningPoolSpec.model_validate({"image": "miner", **spec})
    return PoolFacts(Key("mining", name), f"uid-{name}", 1, NOW, wanted, MiningPoolStatus())


def slot(holder: str = "uid-idle", device: str = "gpu3-9f2c41") -> Slot:
    """A whole GPU held by a pool."""
    owner = Holder(kind=HolderKind.MINING_POOL, namespace="mining", name="idle", uid=holder)
    return Slot(device=device, gpu="GPU-3", profile="full", start=0, holder=owner, since=NOW)


def record_spec(contract: str = "uid-train", segment: int = 1, **more: object) -> UsageRecordSpec:
    """A segment; open unless `billableTo`, `seconds` and `reason` are given."""
    return UsageRecordSpec.model_validate({
        "contract": contract, "segment": segment, "leaseNamespace": "team-a", "leaseName": "train",
        "tier": "OnDemand", "model": "A100-SXM4-80GB", "profile": "full",
        "devices": [{"node": "n1", "device": "gpu3-9f2c41", "gpu": "GPU-3"}],
        "billableFrom": CREATED, **more,
    })  # fmt: skip


def record(namespace: str = "team-a", **spec: Any) -> RecordFacts:  # noqa: ANN401  (handed on)
    """A record beside its lease."""
    one = record_spec(**spec)
    return RecordFacts(namespace, f"{one.contract}-{one.segment}", one)


def body(kind: str, name: str, namespace: str | None = "team-a", *, version: int = 1, **parts: object) -> Object:
    """An object of the project as the API server returns it; `labels` and `finalizers` go into its metadata."""
    metadata: Object = {
        "name": name,
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "generation": 1,
        "creationTimestamp": CREATED,
        **{field: parts.pop(field) for field in ("labels", "finalizers", "deletionTimestamp") if field in parts},
    }
    if namespace is not None:
        metadata["namespace"] = namespace
    return {"apiVersion": names.API_VERSION, "kind": kind, "metadata": metadata, **parts}
