"""What the agent says: every device in status and slice as it is, and which changes somebody waits for."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gpu_tenancy.agent import report, steps
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.home import Home, Owner, declared_modes, home_of
from gpu_tenancy.agent.situation import Fence, Remedy, Situation
from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.names import ANNOTATION_CONVERTIBLE_GPUS as CONVERTIBLE
from gpu_tenancy.api.names import ANNOTATION_MIG_GPUS as MIG
from gpu_tenancy.api.node import GpuMode, GpuNodeStatus, NodeReason, Slot, SlotState, WantedMode
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import EPOCH, MIG_GPU, WHOLE, World, instance, slot

ALL = list(range(8))

HOME = Home(Owner("n1", "node-uid"), frozenset({0}), declares=True)
LEASED, MINED = slot(MIG_GPU, "3g.40gb", 4, 1), slot(WHOLE, FULL, 0, 2)


def status_of(situation: Situation, before: GpuNodeStatus | None = None, seconds: int = 0) -> GpuNodeStatus:
    return report.status(situation, "boot-1", HOME, before, EPOCH + timedelta(seconds=seconds))


def serving(*wanted: Slot) -> World:
    world = World()
    world.specify(list(wanted))
    world.settle()
    return world


def test_a_serving_node_is_ready_and_lists_its_devices_with_their_instants() -> None:
    world = serving(LEASED, MINED)
    status = status_of(world.agent)
    assert {one.device: one.ready_at for one in status.slots} == world.in_status
    assert {one.device: one.uuid for one in status.slots} == {LEASED.device: "MIG-1", MINED.device: WHOLE}
    assert (status.conditions[0].status, status.conditions[0].reason) == (ConditionStatus.TRUE, NodeReason.READY)
    assert status.observed_generation == world.agent.generation


def test_a_device_in_the_making_has_no_instant_and_the_node_is_at_work() -> None:
    world = World()
    world.specify([LEASED])
    world.take(world.enabled()[0])
    status = status_of(world.agent)
    assert [(one.state, one.ready_at) for one in status.slots] == [(SlotState.PREPARING, None)]
    assert status.conditions[0].reason is NodeReason.WORKING


def test_the_condition_moves_its_time_only_when_it_flips() -> None:
    world = serving(LEASED)
    first = status_of(world.agent, seconds=0)
    second = status_of(world.agent, first, seconds=60)
    assert second == first
    broken = status_of(known.failed(world.agent, LEASED.device, "no room", EPOCH), second, seconds=120)
    assert broken.conditions[0].last_transition_time == EPOCH + timedelta(seconds=120)
    assert broken.conditions[0].message == f"{LEASED.device}: no room"


def test_a_node_without_gpus_says_so() -> None:
    assert status_of(Situation()).conditions[0].reason is NodeReason.NO_GPUS


def with_mode(world: World, index: int, mode: GpuMode) -> Situation:
    gpus = [replace(gpu, mode=mode) if gpu.index == index else gpu for gpu in world.agent.gpus.values()]
    return known.listed(world.agent, gpus)


def test_a_gpu_whose_mode_is_not_the_declared_one_is_not_planned_on() -> None:
    situation = with_mode(World(), 0, GpuMode.WHOLE)
    told = {one.index: one for one in status_of(situation).gpus}
    assert told[0].message.startswith("GPU 0 is in mode Whole, the Node declares MIG: it is converted once nothing is")
    assert [told[number].fenced for number in (0, 1)] == [ALL, []]
    assert {one.healthy for one in told.values()} == {True}


def test_a_gpu_in_mig_mode_of_a_node_that_declares_nothing_is_left_alone_and_not_planned_on() -> None:
    here = home_of({"name": "n1", "uid": "u"})
    told = {one.index: one for one in report.status(World().agent, "boot-1", here, None, EPOCH).gpus}
    assert "has no annotation gpu-tenancy.dev/mig-gpus that says whether it should be" in told[0].message
    assert told[0].fenced == ALL
    assert declared_modes(here, [0, 1]) == {}


def converting(mode: GpuMode, convertible: str = "0,1") -> tuple[Situation, Home]:
    """GPU 0 is in MIG mode, as its Node declares; the spec asks for that mode."""
    here = home_of({"name": "n1", "uid": "u", "annotations": {MIG: "0", CONVERTIBLE: convertible}})
    situation = known.declared(World().agent, declared_modes(here, [0, 1]), "", here.convertible_gpus)
    asked = WantedMode(gpu=MIG_GPU, mode=mode, since=EPOCH)
    return known.specified(situation, (), 1, [asked]), here


def test_a_gpu_that_is_converted_by_demand_is_fenced_and_no_fault_of_its_node() -> None:
    situation, here = converting(GpuMode.WHOLE)
    told = report.status(situation, "boot-1", here, None, EPOCH)
    gpu = next(one for one in told.gpus if one.uuid == MIG_GPU)
    assert (gpu.mode, gpu.declared, gpu.convertible, gpu.fenced) == (GpuMode.MIG, GpuMode.MIG, True, ALL)
    assert gpu.message == "GPU 0 is converted by demand from MIG to Whole once nothing is on it"
    assert (told.conditions[0].reason, gpu.message in told.conditions[0].message) == (NodeReason.WORKING, True)


def test_a_gpu_that_was_converted_by_demand_is_not_fenced_though_its_node_declares_another_mode() -> None:
    situation, here = converting(GpuMode.WHOLE)
    done = [replace(gpu, mode=GpuMode.WHOLE) for gpu in situation.gpus.values()]
    told = report.status(known.listed(situation, done), "boot-1", here, None, EPOCH)
    assert [one.fenced for one in told.gpus] == [[], []]
    assert told.conditions[0].reason is NodeReason.READY


def test_a_gpu_that_its_node_does_not_name_as_convertible_stays_as_declared() -> None:
    situation, here = converting(GpuMode.WHOLE, "1")
    told = {one.index: one for one in report.status(situation, "boot-1", here, None, EPOCH).gpus}
    assert (told[0].convertible, told[0].fenced) == (False, [])
    assert steps.diff(situation) == ()
    assert [step for step in steps.diff(converting(GpuMode.WHOLE)[0]) if isinstance(step, steps.Convert)]


@pytest.mark.parametrize(
    ("annotations", "remark"),
    [
        ({CONVERTIBLE: "0"}, "no GPU is convertible before annotation gpu-tenancy.dev/mig-gpus of the Node says"),
        ({MIG: "0", CONVERTIBLE: "all"}, 'annotation gpu-tenancy.dev/convertible-gpus="all" of the Node is not'),
    ],
)
def test_what_is_not_understood_of_convertible_gpus_makes_none_so_and_is_told(
    annotations: dict[str, str], remark: str
) -> None:
    here = home_of({"name": "n1", "uid": "u", "annotations": annotations})
    assert (here.convertible_gpus, here.mistake) == (frozenset(), "")
    assert here.remark.startswith(remark)
    declared = home_of({"name": "n1", "uid": "u", "annotations": {**annotations, MIG: "0"}})
    told = report.status(World().agent, "boot-1", replace(declared, remark=here.remark), None, EPOCH)
    assert told.conditions[0].message.endswith(here.remark)


def test_a_strangers_instance_fences_its_own_slices_and_no_others() -> None:
    world = World()
    world.hardware["MIG-99"] = instance(MIG_GPU, "1g.10gb", 3, 99)
    world.walk()
    told = {one.uuid: one for one in status_of(world.agent).gpus}
    assert "that gpu-tenancy did not create" in told[MIG_GPU].message
    assert (told[MIG_GPU].fenced, told[WHOLE].fenced) == ([3], [])
    assert {one.healthy for one in told.values()} == {True}


def test_a_device_that_is_overdue_is_quarantined_and_its_slices_are_fenced() -> None:
    world = serving(LEASED, MINED)
    late = known.overdue(known.drained(world.agent, LEASED.device, 0xFF, EPOCH), LEASED.device)
    late = known.waiting(late, LEASED.device, SlotState.DRAINING, "waits for process 7 (sleep)")
    told = status_of(late)
    assert {one.device: one.state for one in told.slots} == {
        LEASED.device: SlotState.QUARANTINED,
        MINED.device: SlotState.READY,
    }
    gpu = next(one for one in told.gpus if one.uuid == LEASED.gpu)
    assert (gpu.healthy, gpu.fenced) == (True, [4, 5, 6, 7])
    assert gpu.message == f"{LEASED.device} is quarantined: waits for process 7 (sleep)"
    assert told.conditions[0].reason is NodeReason.DEVICE_FAILED


@pytest.mark.parametrize(("text", "indices"), [("6,7", [6, 7]), (" 6 , 7 ", [6, 7]), ("0", [0]), ("", []), (None, [])])
def test_the_declaration_of_mig_gpus_is_read(text: str | None, indices: list[int]) -> None:
    annotations = {} if text is None else {"gpu-tenancy.dev/mig-gpus": text}
    here = home_of({"name": "n1", "uid": "u", "annotations": annotations})
    assert (sorted(here.mig_gpus), here.mistake) == (indices, "")


def test_a_declaration_that_is_not_understood_stops_planning_and_says_how_to_write_it() -> None:
    here = home_of({"name": "n1", "uid": "u", "annotations": {"gpu-tenancy.dev/mig-gpus": "six"}})
    told = report.status(World().agent, "boot-1", here, None, EPOCH).gpus
    assert [one.fenced for one in told] == [ALL, ALL]
    assert (
        'gpu-tenancy.dev/mig-gpus="six" of the Node is not understood; write GPU indices, e.g. "6,7"' in told[0].message
    )


# ---------------------------------------------------------------------------------------------- who waits for what


def change(before: Situation, after: Situation) -> bool:
    return report.is_awaited(status_of(before), status_of(after))


def test_a_device_that_became_ready_or_failed_is_awaited() -> None:
    world = serving(LEASED, MINED)
    for device in (LEASED.device, MINED.device):
        preparing = known.undone(world.agent, device, EPOCH)
        assert change(preparing, world.agent)
        assert change(preparing, known.failed(preparing, device, "no room", EPOCH))
        assert not change(world.agent, preparing)


def test_the_end_of_a_lease_is_awaited_and_that_of_a_miner_is_not() -> None:
    world = serving(LEASED, MINED)
    assert change(world.agent, known.drained(world.agent, LEASED.device, 0xFF, EPOCH))
    assert change(world.agent, known.forgotten(world.agent, LEASED.device, 0xFF, EPOCH))
    assert not change(world.agent, known.drained(world.agent, MINED.device, 0xFF, EPOCH))
    assert not change(world.agent, known.forgotten(world.agent, MINED.device, 0xFF, EPOCH))


def test_a_message_or_a_generation_alone_is_not_awaited_and_health_is() -> None:
    world = serving(LEASED)
    waiting = known.waiting(world.agent, LEASED.device, SlotState.READY, "hm")
    assert not change(world.agent, waiting)
    assert not change(world.agent, known.specified(world.agent, [LEASED], 99))
    sick = known.facts_with(world.agent.gpus[WHOLE], healthy=False, message="Xid 79")
    assert change(world.agent, known.listed(world.agent, [sick, world.agent.gpus[MIG_GPU]]))
    assert report.is_awaited(None, status_of(world.agent))


# ------------------------------------------------------------------------------------------------------- the slice


def test_a_slice_lists_each_device_with_its_holder() -> None:
    world = serving(LEASED, MINED)
    devices = report.slice_devices(world.agent, steps.slice_next(world.agent, steps.diff(world.agent)))
    assert [one["name"] for one in devices] == sorted([LEASED.device, MINED.device])
    by_name = {one["name"]: one for one in devices}
    assert by_name[LEASED.device] == {
        "name": LEASED.device,
        "attributes": {
            "uuid": {"string": "MIG-1"},
            "parentUuid": {"string": MIG_GPU},
            "model": {"string": "A100-SXM4-80GB"},
            "profile": {"string": "3g.40gb"},
            "start": {"int": 4},
            "holder": {"string": "uid-1"},
            "resource.kubernetes.io/pciBusID": {"string": "0000:00:00.0"},
        },
        "capacity": {"memory": {"value": "38Gi"}, "multiprocessors": {"value": "14"}},
    }
    assert by_name[MINED.device]["capacity"] == {"memory": {"value": "80Gi"}, "multiprocessors": {"value": "108"}}


def test_a_slice_belongs_to_the_node_and_is_the_whole_pool() -> None:
    body = report.resource_slice(HOME.owner, [], 7)
    assert body["metadata"]["name"] == "n1-gpu-tenancy.dev"
    assert body["metadata"]["ownerReferences"][0]["uid"] == "node-uid"
    assert body["spec"]["pool"] == {"name": "n1", "generation": 7, "resourceSliceCount": 1}
    assert body["spec"]["nodeName"] == "n1"


def test_a_gpu_that_is_to_be_reset_gets_nobody_new_on_any_slice_and_serves_those_it_serves() -> None:
    world = serving(LEASED)
    fence = Fence(gpu=MIG_GPU, mask=0b1, reason="it is reset once nobody is on it", remedy=Remedy.RESET)
    here = known.fenced(world.agent, fence)
    [gpu] = [one for one in status_of(here).gpus if one.uuid == MIG_GPU]
    assert (gpu.fenced, gpu.healthy) == (ALL, True)
    assert [slot.state for slot in status_of(here).slots] == [SlotState.READY]
    timed = known.fenced(world.agent, fence.model_copy(update={"remedy": Remedy.TIME, "until": EPOCH}))
    assert next(one for one in status_of(timed).gpus if one.uuid == MIG_GPU).fenced == [0]
