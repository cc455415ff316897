"""What an Xid does: who is fenced, who is not, and how it ends."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.deadlines import due
from gpu_tenancy.agent.dra_health import told
from gpu_tenancy.agent.gpus import GpuEvent
from gpu_tenancy.agent.health import APPLICATION, NOTED, RESET, learnt
from gpu_tenancy.agent.proto.dra_health_v1alpha1_pb2 import HEALTHY, UNHEALTHY
from gpu_tenancy.agent.situation import PROBATION, Remedy
from gpu_tenancy.api.node import SlotState
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import EPOCH, MIG_GPU, WHOLE, World, slot

LOW, HIGH = slot(MIG_GPU, "3g.40gb", 0, 1), slot(MIG_GPU, "3g.40gb", 4, 3)
FULL_SLOT = slot(WHOLE, FULL, 0, 5)
ALL = {LOW.device, HIGH.device, FULL_SLOT.device}


def serving() -> World:
    world = World()
    world.specify([LOW, HIGH, FULL_SLOT])
    world.settle()
    assert world.in_slice == ALL
    return world


def after(world: World, event: GpuEvent) -> set[str]:
    """Devices in the slice once the agent has acted upon the event."""
    world.agent = learnt(world.agent, event, EPOCH)
    for _ in range(30):
        if not (enabled := world.enabled()):
            break
        world.take(enabled[0])
    return world.in_slice


def gpu_instance(world: World, device: str) -> int:
    return next(one.gpu_instance for one in world.hardware.values() if one.uuid == world.agent.held[device].uuid)


@pytest.mark.parametrize("xid", sorted(APPLICATION | NOTED))
def test_an_applications_own_fault_is_counted_and_fences_nobody(xid: int) -> None:
    world = serving()
    assert after(world, GpuEvent(MIG_GPU, xid, gpu_instance(world, LOW.device), 0)) == ALL
    assert (world.agent.xids, world.agent.fences) == ({MIG_GPU: 1}, ())


def test_a_contained_error_fences_the_slice_it_befell() -> None:
    world = serving()
    assert after(world, GpuEvent(MIG_GPU, 94, gpu_instance(world, HIGH.device), 0)) == ALL - {HIGH.device}
    failed = world.agent.held[HIGH.device]
    assert failed.state is SlotState.FAILED
    assert failed.message == (
        f"GPU 0: Xid 94, a contained memory error on GPU instance {gpu_instance(world, HIGH.device)}; "
        f"it is used again after 600 s"
    )


@pytest.mark.parametrize("event", [GpuEvent(MIG_GPU, 94), GpuEvent(MIG_GPU, 94, 99, 0), GpuEvent(MIG_GPU, 999)])
def test_what_cannot_be_attributed_befell_every_device_of_the_gpu(event: GpuEvent) -> None:
    assert after(serving(), event) == {FULL_SLOT.device}


@pytest.mark.parametrize("xid", sorted(RESET | {79}))
def test_an_error_of_the_gpu_fences_all_of_it_whatever_it_names_and_no_other(xid: int) -> None:
    world = serving()
    assert after(world, GpuEvent(MIG_GPU, xid, gpu_instance(world, LOW.device), 0)) == {FULL_SLOT.device}


def test_a_lost_gpu_needs_a_reboot_and_is_on_probation_after_it() -> None:
    world = serving()
    after(world, GpuEvent(WHOLE, lost=True))
    (fence,) = world.agent.fences
    assert (fence.remedy, fence.until) == (Remedy.REBOOT, None)
    assert due(world.agent, EPOCH + timedelta(days=30)).fences == (fence,)
    world.disk = world.agent
    world.reboot()
    (fence,) = world.agent.fences
    assert (fence.remedy, fence.until) == (Remedy.TIME, world.now + PROBATION)


def test_a_fence_outlasts_its_time_while_somebody_has_a_device_behind_it() -> None:
    world = serving()
    after(world, GpuEvent(MIG_GPU, 94, gpu_instance(world, HIGH.device), 0))
    later = EPOCH + PROBATION + timedelta(hours=1)
    assert due(world.agent, later).fences == world.agent.fences
    world.specify([LOW, FULL_SLOT])
    world.settle()
    assert due(world.agent, later).fences == ()


def test_a_device_that_was_fenced_is_scrubbed_before_anybody_gets_it_again() -> None:
    world = serving()
    after(world, GpuEvent(MIG_GPU, 94, gpu_instance(world, HIGH.device), 0))
    assert world.agent.held[LOW.device].hand_over is not None
    assert world.agent.held[HIGH.device].hand_over is None
    world.history.clear()
    world.agent = known.lifted(world.agent, world.agent.fences)
    world.settle()
    assert "Scrub" in [type(step).__name__ for step in world.history]
    assert world.in_slice == ALL


def test_kubelet_is_told_of_every_device_that_a_pod_may_have() -> None:
    world = serving()
    assert {(device, health) for device, health, _ in told(world.agent)} == {(device, HEALTHY) for device in ALL}
    after(world, GpuEvent(MIG_GPU, 94, gpu_instance(world, HIGH.device), 0))
    [(device, health, message)] = [one for one in told(world.agent) if one[1] != HEALTHY]
    assert (device, health) == (HIGH.device, UNHEALTHY)
    assert "Xid 94" in message


def test_what_is_easier_to_end_does_not_take_the_place_of_what_is_harder() -> None:
    world = serving()
    after(world, GpuEvent(MIG_GPU, 79))
    after(world, GpuEvent(MIG_GPU, 95))
    after(world, GpuEvent(MIG_GPU, 94))
    assert [one.remedy for one in world.agent.fences] == [Remedy.REBOOT]
