"""What the operator exports about slices: every state, by the second, and who is billed for them."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseStatus, Tier
from gpu_tenancy.api.node import ObservedSlot, Slot, SlotState
from gpu_tenancy.api.tenant import GpuTenantSpec, GpuTenantStatus
from gpu_tenancy.api.usage import BilledDevice, UsageRecordSpec
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.core.actions import TenantOutlook
from gpu_tenancy.core.devices import device_name
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.snapshot import Key, LeaseFacts, NodeFacts, RecordFacts, Snapshot, TenantFacts
from gpu_tenancy.core.tenancy import Holding
from tests.unit.core.builders import MODEL, START, gpus, lease_spec

HOLDER = Holder(kind=HolderKind.GPU_LEASE, namespace="team", name="train", uid="train")
DEVICE = device_name(0, "full", 0, "train", 1)
SLOT = Slot(device=DEVICE, gpu="GPU-a-0", profile="full", holder=HOLDER, since=START)
READY = ObservedSlot(device=DEVICE, gpu="GPU-a-0", profile="full", holder=HOLDER, state=SlotState.READY)
NODE = NodeFacts("a", 1, tuple(gpus("a", 2)), (SLOT,), (READY,), agent_until=START + timedelta(hours=1))


def record(contract: str, segment: int = 1) -> RecordFacts:
    """An open segment for the one device."""
    spec = UsageRecordSpec(
        contract=contract,
        segment=segment,
        lease_namespace="team",
        lease_name="train",
        tier=Tier.ON_DEMAND,
        model=MODEL,
        profile="full",
        devices=[BilledDevice(node="a", device=DEVICE, gpu="GPU-a-0")],
        billable_from=START,
    )
    return RecordFacts("team", f"{contract}-{segment}", spec)


def lease(*records: RecordFacts) -> LeaseFacts:
    return LeaseFacts(Key("team", "train"), "train", 1, START, lease_spec(), GpuLeaseStatus(), records=records)


def counted(snapshot: Snapshot) -> dict[str, float]:
    """Slice-seconds of ten seconds in which everything stayed as it is, without the states that none was in."""
    metrics = Metrics()
    for seconds in (0, 4, 10):
        metrics.account(snapshot, START + timedelta(seconds=seconds))
    samples = {
        str(state): metrics.registry.get_sample_value("gpu_tenancy_slice_seconds_total", {"state": str(state)})
        for state in SliceState
    }
    assert None not in samples.values(), "every state is exported, also while no slice is in it"
    return {state: value for state, value in samples.items() if value}


def test_a_tenants_slices_and_its_share_are_shown_and_one_that_is_gone_is_not() -> None:
    metrics = Metrics()

    def shown(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"gpu_tenancy_tenant_{name}", labels)

    spec = GpuTenantSpec(namespaces=["team"], weight=4)
    acme = TenantFacts("acme", "uid", 1, START, spec, GpuTenantStatus())
    metrics.show_tenants([TenantOutlook(acme, Holding(1, 12, 10), 7200.0)])
    assert shown("slices", tenant="acme", resource="memory") == 12
    assert shown("slices", tenant="acme", resource="compute") == 10
    assert shown("share", tenant="acme") == 0.5
    metrics.show_tenants([TenantOutlook(replace(acme, spec=None, invalid="odd"), Holding(), 0.0)])
    assert shown("slices", tenant="acme", resource="memory") == 0
    assert shown("share", tenant="acme") is None
    metrics.show_tenants([])
    assert shown("slices", tenant="acme", resource="memory") is None


def test_a_leased_gpu_and_an_idle_one_are_counted_by_the_second() -> None:
    assert counted(Snapshot(nodes=(NODE,), leases=(lease(record("train")),))) == {"leased": 80.0, "idle": 80.0}


def test_a_segment_whose_lease_is_gone_is_billed_until_it_is_closed() -> None:
    assert counted(Snapshot(nodes=(NODE,), orphans=(record("train"),))) == {"leased": 80.0, "idle": 80.0}


@pytest.mark.parametrize(
    "snapshot",
    [
        Snapshot(nodes=(NODE,), leases=(lease(record("train"), record("train", 2)),)),
        Snapshot(nodes=(NODE,), leases=(lease(record("train")),), orphans=(record("gone"),)),
    ],
    ids=["two open segments of one lease", "a segment of a lease that is gone"],
)
def test_slices_that_two_open_segments_bill_are_contested(snapshot: Snapshot) -> None:
    assert counted(snapshot) == {"contested": 80.0, "idle": 80.0}
