"""What people hear of a node: each error and each recovery once, and nothing of its daily work."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.deadlines import due
from gpu_tenancy.agent.gpus import GpuEvent
from gpu_tenancy.agent.health import learnt
from gpu_tenancy.agent.news import news
from gpu_tenancy.agent.situation import PROBATION, Situation
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import EPOCH, MIG_GPU, WHOLE, World, slot

LOW = slot(MIG_GPU, "3g.40gb", 0, 1)
WHOLE_SLOT = slot(WHOLE, FULL, 0, 2)


def told(before: Situation, after: Situation) -> list[tuple[str, str]]:
    """Types and reasons."""
    return [(note.type, note.reason) for note in news(before, after)]


def test_a_device_that_comes_and_goes_is_no_news() -> None:
    world = World()
    start = world.agent
    world.specify([LOW, WHOLE_SLOT])
    world.settle()
    assert told(start, world.agent) == []
    serving = world.agent
    world.specify([])
    world.settle()
    assert told(serving, world.agent) == []


def test_a_fence_is_told_when_it_comes_when_its_remedy_changes_and_when_it_goes() -> None:
    world = World()
    start = world.agent
    fenced = learnt(start, GpuEvent(WHOLE, 95), EPOCH)
    (note,) = news(start, fenced)
    assert (note.type, note.reason) == ("Warning", "Fenced")
    assert "Xid 95, an uncontained memory error; it is reset once nobody is on it" in note.message
    assert told(fenced, fenced) == []
    reset = known.reset_done(fenced, WHOLE, EPOCH)
    assert told(fenced, reset) == [("Warning", "Fenced")]
    lifted = due(reset, EPOCH + PROBATION)
    (note,) = news(reset, lifted)
    assert (note.type, note.reason) == ("Normal", "FenceLifted")
    assert note.message == f"All memory slices of GPU {WHOLE} are used again."


def test_a_gpu_that_fails_and_answers_again_is_told_of_twice() -> None:
    here = World().agent
    gpus = [replace(gpu, healthy=gpu.uuid != WHOLE, message="GPU 1 is lost") for gpu in here.gpus.values()]
    sick = known.listed(here, gpus)
    assert [note.message for note in news(here, sick)] == ["GPU 1 is lost"]
    assert told(here, sick) == [("Warning", "GpuUnhealthy")]
    assert told(sick, known.listed(sick, here.gpus.values())) == [("Normal", "GpuHealthy")]


def test_a_device_that_does_not_get_on_is_told_of_once() -> None:
    world = World()
    before = known.accepted(world.agent, WHOLE_SLOT, EPOCH)
    before = known.waiting(before, WHOLE_SLOT.device, before.held[WHOLE_SLOT.device].state, "waits for process 7")
    late = known.overdue(before, WHOLE_SLOT.device)
    (note,) = news(before, late)
    assert note.reason == "Quarantined"
    assert note.message == f"{WHOLE_SLOT.device} does not get on: waits for process 7; its memory slices are not used."
    assert told(late, due(late, EPOCH + timedelta(days=1))) == []
