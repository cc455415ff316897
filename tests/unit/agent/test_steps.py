"""The order in which devices change hands: on single hand-overs step by step, and under every interleaving."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent import steps
from gpu_tenancy.agent.deadlines import due
from gpu_tenancy.agent.gpus import GpuEvent
from gpu_tenancy.agent.health import learnt
from gpu_tenancy.api.node import GpuMode, Slot, SlotState
from gpu_tenancy.mig.layout import Placement, layouts
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import MIG_GPU, MODEL, WHOLE, World, bits, facts, instance, slot

FULL_LAYOUTS = [
    [Placement("7g.80gb", 0)],
    [Placement("3g.40gb", 0), Placement("3g.40gb", 4)],
    [Placement("1g.10gb", 6)],
]
LAYOUTS = sorted((sorted(layout) for layout in layouts(MODEL)), key=repr)


def names(world: World) -> list[str]:
    return [type(step).__name__ for step in world.history]


def serving(*wanted: Slot) -> World:
    """A world in which these slots are up and published."""
    world = World()
    world.specify(list(wanted))
    world.settle()
    world.history.clear()
    return world


# ---------------------------------------------------------------------------------------------------- single hand-overs


def test_a_slice_is_created_then_stored_as_ready_then_published() -> None:
    world = World()
    world.specify([slot(MIG_GPU, "3g.40gb", 4, 1)])
    world.settle()
    assert names(world) == ["Accept", "Restore", "Create", "Scrub", "Verify", "Store", "Publish"]
    assert world.in_slice == set(world.in_status) == {slot(MIG_GPU, "3g.40gb", 4, 1).device}


def test_nothing_is_taken_away_before_there_is_a_spec() -> None:
    world = serving(slot(MIG_GPU, "3g.40gb", 4, 1))
    assert steps.diff(known.specified(world.agent, [], 0)) == ()


def test_a_whole_gpu_changes_hands_without_its_old_holder_ever_meeting_the_new_one() -> None:
    old, new = slot(WHOLE, FULL, 0, 2), slot(WHOLE, FULL, 0, 1)
    world = serving(old)
    assert world.prepare(old.device, "miner")
    world.specify([new])
    while world.enabled():
        world.take(world.enabled()[0])
    waiting = world.agent.held[new.device]
    assert waiting.state is SlotState.PREPARING
    assert waiting.message == (
        "waits for mining pool team-2/holder-2 to release gpu-whole-full-0-2: "
        "1 claim still prepared (pod team-2/train-0)"
    )
    assert world.in_slice == set()
    world.settle()
    assert world.in_slice == {new.device}
    acts = [name for name in names(world) if name != "Await"]
    assert acts == [
        *("Withdraw", "Drain", "Accept", "Prove", "Forget"),
        *("Restore", "Create", "Scrub", "Verify", "Store", "Publish"),
    ]


def test_a_process_that_outlives_its_claim_keeps_the_slice() -> None:
    old, new = slot(MIG_GPU, "7g.80gb", 0, 2), slot(MIG_GPU, "1g.10gb", 6, 1)
    world = serving(old)
    assert world.prepare(old.device, "miner")
    world.specify([new])
    world.unprepare("miner")
    for _ in range(20):
        world.wake()
        for step in world.enabled():
            world.take(step)
            break
    assert list(world.hardware) == [world.agent.held[old.device].uuid]
    world.processes.clear()
    world.settle()
    assert [one.profile for one in world.hardware.values()] == ["1g.10gb"]


def test_a_lease_is_made_before_a_miner_on_the_same_gpu() -> None:
    world = World()
    world.specify([slot(MIG_GPU, "4g.40gb", 0, 2), slot(MIG_GPU, "3g.40gb", 4, 1)])
    world.agent, _ = steps.settled(world.agent, world.now)
    world.settle()
    created = [step.slot.profile for step in world.history if isinstance(step, steps.Create)]
    assert created == ["3g.40gb", "4g.40gb"]


def test_a_slot_wanted_again_while_it_drains_serves_again_and_is_ready_anew() -> None:
    wanted = slot(MIG_GPU, "3g.40gb", 4, 1)
    world = serving(wanted)
    assert world.prepare(wanted.device, "pod")
    before = world.agent.held[wanted.device]
    world.specify([])
    while world.enabled():
        world.take(world.enabled()[0])
    world.specify([wanted])
    while world.enabled():
        world.take(world.enabled()[0])
    after = world.agent.held[wanted.device]
    assert after.uuid == before.uuid
    assert before.ready_at is not None
    assert after.ready_at is not None
    assert after.ready_at > before.ready_at
    assert world.in_slice == {wanted.device}


def test_an_instance_of_somebody_else_is_named_and_left_alone() -> None:
    world = World()
    stranger = instance(MIG_GPU, "4g.40gb", 0, 99)
    world.hardware[stranger.uuid] = stranger
    world.walk()
    beside, over = slot(MIG_GPU, "3g.40gb", 4, 1), slot(MIG_GPU, "1g.10gb", 0, 1)
    world.specify([beside, over])
    world.settle()
    assert world.in_slice == {beside.device}
    failed = world.agent.held[over.device]
    assert failed.state is SlotState.FAILED
    assert "holds MIG instance 4g.40gb at memory slice 0" in failed.message
    assert stranger.uuid in world.hardware


def test_an_instance_that_was_half_destroyed_when_the_agent_was_killed_is_still_its_own() -> None:
    old, new = slot(MIG_GPU, "3g.40gb", 4, 1), slot(MIG_GPU, "1g.10gb", 6, 3)
    world = serving(old)
    world.specify([new])
    while not any(isinstance(step, steps.Destroy) for step in world.enabled()):
        world.take(world.enabled()[0])
    [whole] = world.hardware.values()
    world.hardware = {"": replace(whole, uuid="", compute_instance=None)}
    world.restart()
    world.settle()
    assert world.in_slice == {new.device}
    assert [one.profile for one in world.hardware.values()] == ["1g.10gb"]


def test_an_instance_that_replaced_the_agents_own_is_not_mistaken_for_it() -> None:
    wanted = slot(MIG_GPU, "3g.40gb", 4, 1)
    world = serving(wanted)
    world.hardware = {"MIG-77": instance(MIG_GPU, "3g.40gb", 4, 77)}
    world.walk()
    world.settle()
    assert world.in_slice == set()
    assert "did not create" in world.agent.held[wanted.device].message
    world.specify([])
    world.settle()
    assert world.agent.held == {}
    assert list(world.hardware) == ["MIG-77"]


def test_a_device_stands_in_the_next_slice_from_the_moment_it_is_stored_until_it_is_unwanted() -> None:
    wanted = slot(MIG_GPU, "3g.40gb", 4, 1)
    world = World()
    world.specify([wanted])
    seen = [steps.slice_next(world.agent, steps.diff(world.agent))]
    while world.enabled():
        world.take(world.enabled()[0])
        seen.append(steps.slice_next(world.agent, steps.diff(world.agent)))
    names_seen = [[held.slot.device for held in one] for one in seen]
    assert names_seen == [*[[]] * 6, [wanted.device], [wanted.device]]
    world.specify([])
    assert steps.slice_next(world.agent, steps.diff(world.agent)) == ()


def test_a_status_that_was_lost_is_stored_again_without_withdrawing_anything() -> None:
    wanted = slot(MIG_GPU, "3g.40gb", 4, 1)
    world = serving(wanted)
    ready_at = world.in_status.pop(wanted.device)
    world.restart()
    world.settle()
    assert names(world) == ["Store"]
    assert world.in_status == {wanted.device: ready_at}


def test_what_no_gpu_can_be_is_said_in_a_sentence_and_tried_on_none() -> None:
    world = World()
    cases = {
        slot("GPU-elsewhere", FULL, 0, 1).device: "is not on this node",
        slot(MIG_GPU, FULL, 0, 1).device: "GPU 0 is in mode MIG, the slot asks for a whole GPU",
        slot(WHOLE, "3g.40gb", 4, 1).device: "GPU 1 is in mode Whole, the slot asks for the MIG profile 3g.40gb",
        slot(MIG_GPU, "3g.20gb", 4, 1).device: "A100-SXM4-80GB has no MIG profile 3g.20gb; it has 1g.10gb",
        slot(MIG_GPU, "4g.40gb", 4, 1).device: "4g.40gb cannot start at memory slice 4 of A100-SXM4-80GB, only at [0]",
    }
    world.specify(
        [
            slot("GPU-elsewhere", FULL, 0, 1),
            slot(MIG_GPU, FULL, 0, 1),
            slot(WHOLE, "3g.40gb", 4, 1),
            slot(MIG_GPU, "3g.20gb", 4, 1),
            slot(MIG_GPU, "4g.40gb", 4, 1),
        ]
    )
    world.settle()
    for device, sentence in cases.items():
        held = world.agent.held[device]
        assert held.state is SlotState.FAILED
        assert sentence in held.message
    assert not {"Create", "Prove", "Destroy"} & set(names(world))


def test_a_sick_gpu_leaves_the_slice_and_its_neighbour_stays() -> None:
    sick, sound = slot(WHOLE, FULL, 0, 1), slot(MIG_GPU, "7g.80gb", 0, 1)
    world = serving(sick, sound)
    broken = known.facts_with(world.agent.gpus[WHOLE], healthy=False, message="it has fallen off the bus")
    world.agent = known.listed(world.agent, [world.agent.gpus[MIG_GPU], broken])
    world.settle()
    assert world.in_slice == {sound.device}
    assert world.agent.held[sick.device].state is SlotState.FAILED
    assert "fallen off the bus" in world.agent.held[sick.device].message
    world.agent = known.listed(world.agent, [world.agent.gpus[MIG_GPU], facts(WHOLE, GpuMode.WHOLE, 1)])
    world.settle()
    assert world.in_slice == {sick.device, sound.device}


def test_what_serves_goes_on_while_its_instances_cannot_be_listed_and_nothing_is_guessed() -> None:
    serves, leaves, comes = (slot(MIG_GPU, "1g.10gb", start, 1) for start in (0, 1, 2))
    world = serving(serves, leaves)
    world.agent = replace(world.agent, instances={})
    world.specify([serves, comes])
    while world.enabled():
        world.take(world.enabled()[0])
    assert world.in_slice == {serves.device}
    assert world.agent.held[serves.device].state is SlotState.READY
    assert {world.agent.held[one.device].message for one in (leaves, comes)} == {steps.UNWALKED}
    assert not {"Create", "Destroy", "Forget", "Remake"} & set(names(world))
    world.walk()
    world.settle()
    assert world.in_slice == {serves.device, comes.device}
    assert len(world.hardware) == 2


def test_an_instance_destroyed_behind_the_agents_back_is_made_again() -> None:
    wanted = slot(MIG_GPU, "2g.20gb", 2, 1)
    world = serving(wanted)
    world.hardware.clear()
    world.walk()
    world.settle()
    assert names(world) == ["Remake", "Withdraw", "Restore", "Create", "Scrub", "Verify", "Store", "Publish"]


def test_a_kill_between_creation_and_its_record_adopts_the_instance() -> None:
    wanted = slot(MIG_GPU, "2g.20gb", 2, 1)
    world = World()
    world.specify([wanted])
    world.take(world.enabled()[0])
    world.begin_creation(wanted)
    world.restart()
    world.settle()
    assert names(world) == ["Accept", "Restore", "Adopt", "Scrub", "Verify", "Store", "Publish"]
    assert len(world.hardware) == 1


def test_what_was_still_being_created_for_a_dropped_slot_is_destroyed_before_its_place_is_used() -> None:
    dropped, wanted = slot(MIG_GPU, "2g.20gb", 2, 1), slot(MIG_GPU, "3g.40gb", 0, 1)
    world = World()
    world.specify([dropped])
    world.take(world.enabled()[0])
    world.begin_creation(dropped)
    world.specify([wanted])
    world.agent, _ = steps.settled(world.agent, world.now)
    assert dropped.device not in world.agent.held
    world.walk()
    world.agent, _ = steps.settled(world.agent, world.now)
    assert world.agent.held[wanted.device].message == (
        "waits for MIG instance 2g.20gb at memory slice 2 of a former device to be destroyed"
    )
    world.settle()
    assert [one.profile for one in world.hardware.values()] == ["3g.40gb"]


def test_a_kill_between_storing_and_publishing_makes_the_device_ready_anew() -> None:
    wanted = slot(MIG_GPU, "2g.20gb", 2, 1)
    world = World()
    world.specify([wanted])
    while not world.in_status:
        world.take(world.enabled()[0])
    early = world.in_status[wanted.device]
    world.restart()
    world.settle()
    assert world.in_slice == {wanted.device}
    assert world.in_status[wanted.device] > early


def test_a_restart_of_a_serving_agent_changes_nothing() -> None:
    wanted = [slot(MIG_GPU, "2g.20gb", 2, 1), slot(WHOLE, FULL, 0, 2)]
    world = serving(*wanted)
    before = world.agent.held
    world.restart()
    assert world.enabled() == ()
    assert world.agent.held == before


def test_after_a_reboot_everything_is_withdrawn_and_made_again() -> None:
    wanted = [slot(MIG_GPU, "2g.20gb", 2, 1), slot(WHOLE, FULL, 0, 2)]
    world = serving(*wanted)
    assert world.prepare(wanted[0].device, "pod")
    world.reboot()
    assert world.agent.prepared == {}
    world.settle()
    assert names(world).count("Withdraw") == names(world).count("Create") == 2
    assert world.in_slice == {one.device for one in wanted}


# ------------------------------------------------------------------------------------------------- every interleaving

numbers = st.integers(1, 4)
several = st.lists(numbers, min_size=7, max_size=7)


def slots_of(layout: list[Placement], who: list[int], whole: int | None) -> list[Slot]:
    mig = [slot(MIG_GPU, profile, start, number) for (profile, start), number in zip(layout, who, strict=False)]
    return mig if whole is None else [*mig, slot(WHOLE, FULL, 0, whole)]


class AnyOrder(RuleBasedStateMachine):
    """Operator, kubelet, holders, driver faults, kills and reboots, between any two steps of the agent.

    Mishaps share one rule, or hardly any run would get as far as a device that changes hands while it is in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.claims = 0

    @initialize(layout=st.sampled_from(FULL_LAYOUTS), who=several, used=st.lists(st.booleans(), min_size=8, max_size=8))
    def a_node_that_serves(self, layout: list[Placement], who: list[int], used: list[bool]) -> None:
        self.world.specify(slots_of(layout, who, who[0]))
        self.world.settle()
        for device, runs in zip(sorted(self.world.in_slice), used, strict=False):
            self.claims += 1
            self.world.prepare(device, f"claim-{self.claims}", runs=runs)

    @rule(layout=st.sampled_from(LAYOUTS), who=several, whole=st.none() | numbers)
    def operator_writes_spec(self, layout: list[Placement], who: list[int], whole: int | None) -> None:
        self.world.specify(slots_of(layout, who, whole))

    @rule(number=numbers, profile=st.sampled_from(["7g.80gb", "4g.40gb", "3g.40gb"]))
    def operator_gives_everything_to_one(self, number: int, profile: str) -> None:
        self.world.specify(slots_of([Placement(profile, 0)], [number], number))

    @rule(data=st.data(), count=st.integers(1, 3))
    def agent_steps(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if enabled := self.world.enabled():
                self.take(data.draw(st.sampled_from(enabled)))

    @rule(data=st.data())
    def agent_goes_on_until_it_has_to_wait(self, data: st.DataObject) -> None:
        for _ in range(100):
            if not (enabled := self.world.enabled()):
                return
            self.take(data.draw(st.sampled_from(enabled)) if len(enabled) < 4 else enabled[0])

    @rule(data=st.data())
    def kubelet_prepares(self, data: st.DataObject) -> None:
        taken = {one.device for claim in self.world.agent.prepared.values() for one in claim.devices}
        if free := sorted(self.world.in_slice - taken):
            self.claims += 1
            device = data.draw(st.sampled_from(free))
            self.world.prepare(device, f"claim-{self.claims}", runs=data.draw(st.booleans()))

    @precondition(lambda self: self.world.agent.prepared)
    @rule(data=st.data())
    def kubelet_unprepares(self, data: st.DataObject) -> None:
        self.world.unprepare(data.draw(st.sampled_from(sorted(self.world.agent.prepared))))

    @precondition(lambda self: self.world.processes)
    @rule(data=st.data())
    def process_ends(self, data: st.DataObject) -> None:
        claims = self.world.agent.prepared.values()
        claimed = {self.world.agent.held[one.device].uuid for claim in claims for one in claim.devices}
        if lingering := sorted(self.world.processes - claimed):
            self.world.processes.discard(data.draw(st.sampled_from(lingering)))

    @rule()
    def time_passes(self) -> None:
        self.world.wake()

    @rule(data=st.data())
    def mishap(self, data: st.DataObject) -> None:
        mishaps = (
            self.driver_refuses,
            self.agent_is_killed,
            self.agent_is_killed_while_creating,
            self.node_reboots,
            self.gpunode_is_made_anew,
            self.gpu_health_changes,
            self.gpu_tells_of_an_xid,
            self.time_heals,
            self.somebody_replaces_an_instance,
        )
        data.draw(st.sampled_from(mishaps))(data)

    def driver_refuses(self, data: st.DataObject) -> None:
        refusable = [one for one in self.world.enabled() if isinstance(one, steps.Hardware)]
        if refusable:
            self.world.take(data.draw(st.sampled_from(refusable)), fails=True)

    def agent_is_killed(self, data: st.DataObject) -> None:
        del data
        self.world.restart()

    def agent_is_killed_while_creating(self, data: st.DataObject) -> None:
        creations = [one for one in self.world.enabled() if isinstance(one, steps.Create) and one.slot.gpu == MIG_GPU]
        if creations:
            self.world.begin_creation(data.draw(st.sampled_from(creations)).slot)
            self.world.restart()

    def node_reboots(self, data: st.DataObject) -> None:
        del data
        self.world.reboot()

    def gpunode_is_made_anew(self, data: st.DataObject) -> None:
        del data
        self.world.in_status.clear()
        self.world.agent = known.unstored(self.world.agent)

    def gpu_tells_of_an_xid(self, data: st.DataObject) -> None:
        gpu = data.draw(st.sampled_from([MIG_GPU, WHOLE]))
        there = [one.gpu_instance for one in self.world.hardware.values() if one.gpu == gpu]
        where = data.draw(st.sampled_from([None, *sorted(there)]))
        event = GpuEvent(gpu, data.draw(st.sampled_from([31, 94, 95, 48])), where)
        self.world.agent = learnt(self.world.agent, event, self.world.now)
        self.world.disk = self.world.agent

    def time_heals(self, data: st.DataObject) -> None:
        del data
        self.world.now += known.PROBATION
        self.world.agent = due(self.world.agent, self.world.now)
        self.world.disk = self.world.agent

    def gpu_health_changes(self, data: st.DataObject) -> None:
        sick = data.draw(st.booleans())
        gpus = [
            known.facts_with(gpu, healthy=not sick, message="sick" * sick) for gpu in self.world.agent.gpus.values()
        ]
        self.world.agent = known.listed(self.world.agent, gpus)

    def somebody_replaces_an_instance(self, data: st.DataObject) -> None:
        """An idle one: the driver would not let go of another."""
        idle = sorted(set(self.world.hardware) - self.world.processes)
        if idle:
            self.world.replace(data.draw(st.sampled_from(idle)))

    def take(self, step: steps.Step) -> None:
        before = self.world.agent
        self.world.take(step)
        match step:
            case steps.Destroy(subject=subject, instance=gone):
                assert gone.uuid not in self.world.foreign, "destroyed what somebody else made"
                held = before.held.get(subject)
                assert held is None or not known.claims_on(before, subject), "destroyed under a prepared claim"
                assert held is None or not held.published, "destroyed while in the slice"
                assert not self.world.has_sleeper(gone.uuid), "destroyed while a process of the holder lived"
                others = [one for one in before.held.values() if one.uuid == gone.uuid and one is not held]
                assert not others, "destroyed another device's instance"
            case steps.Forget(device=device):
                assert not known.claims_on(before, device), "let go of a device with a prepared claim"
                whole = before.held[device].slot.profile == FULL and before.held[device].ready_at is not None
                assert not (whole and self.world.has_sleeper(before.held[device].uuid)), "let go under a process"
            case steps.Publish(device=device):
                held = before.held[device]
                assert self.world.in_status[device] == held.ready_at, "published before it was stored as ready"
            case _:
                pass

    @invariant()
    def instances_never_overlap(self) -> None:
        seen = 0
        for one in self.world.hardware.values():
            assert not seen & bits(one)
            seen |= bits(one)

    @invariant()
    def a_device_in_the_slice_exists_and_is_nobody_elses(self) -> None:
        masks: dict[str, int] = {}
        for device in self.world.in_slice:
            held = self.world.agent.held[device]
            mask = steps.slices(self.world.agent.gpus[held.slot.gpu], held.slot)
            assert not masks.get(held.slot.gpu, 0) & mask, "two devices in the slice share memory"
            masks[held.slot.gpu] = masks.get(held.slot.gpu, 0) | mask

    @invariant()
    def the_next_slice_never_shares_memory_and_takes_away_before_it_gives(self) -> None:
        masks: dict[str, int] = {}
        for held in steps.slice_next(self.world.agent, steps.diff(self.world.agent)):
            mask = steps.slices(self.world.agent.gpus[held.slot.gpu], held.slot)
            assert not masks.get(held.slot.gpu, 0) & mask
            masks[held.slot.gpu] = masks.get(held.slot.gpu, 0) | mask
            assert held.published or self.world.in_status[held.slot.device] == held.ready_at

    @invariant()
    def a_used_device_is_there(self) -> None:
        for uuid in self.world.processes:
            assert uuid in {WHOLE, *self.world.hardware}

    @invariant()
    def two_prepared_claims_never_share_memory(self) -> None:
        masks: dict[str, int] = {}
        for claim in self.world.agent.prepared.values():
            for one in claim.devices:
                held = self.world.agent.held[one.device]
                mask = steps.slices(self.world.agent.gpus[held.slot.gpu], held.slot)
                assert not masks.get(held.slot.gpu, 0) & mask
                masks[held.slot.gpu] = masks.get(held.slot.gpu, 0) | mask

    def teardown(self) -> None:
        """Whatever happened: once everybody lets go, the node is as its spec says, and rests there."""
        self.world.evict_strangers()
        healthy = [known.facts_with(gpu, healthy=True, message="") for gpu in self.world.agent.gpus.values()]
        self.world.agent = known.listed(self.world.agent, healthy)
        for _ in range(2):  # Giving up a place that took too long fences it for a while once more.
            self.world.agent = known.lifted(self.world.agent, self.world.agent.fences)
            self.world.settle()
        wanted = self.world.agent.wanted
        assert self.world.in_slice == set(wanted) == set(self.world.agent.held)
        there = {(one.profile, one.start) for one in self.world.hardware.values()}
        assert there == {(one.profile, one.start) for one in wanted.values() if one.profile != FULL}
        for device in wanted:
            assert self.world.in_status[device] == self.world.agent.held[device].ready_at
        assert steps.diff(self.world.agent) == ()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(stateful_step_count=30)
