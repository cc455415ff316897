"""Steps on hardware: serial on one GPU, side by side on several, and patient with drivers that refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent import steps
from gpu_tenancy.agent.deadlines import due
from gpu_tenancy.agent.gpus import GpuEvent, Instance, Vitals
from gpu_tenancy.agent.health import learnt
from gpu_tenancy.agent.lanes import Lanes
from gpu_tenancy.agent.machine import Machine
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import PROBATION, Fence, Made, PreparedClaim, PreparedDevice, Remedy, Situation
from gpu_tenancy.api.node import GpuMode, HandOverStepType, Slot, SlotState, WantedMode
from gpu_tenancy.mig.profiles import FULL
from tests.fakes.clock import FakeClock
from tests.fakes.gpus import FakeGpus, Faults
from tests.fakes.machine import BYTES_PER_SECOND, CONTEXT_SECONDS, FakeHost, FakeScrubber
from tests.unit.agent.world import EPOCH, holder

MIG = range(4, 8)
SCRUB = CONTEXT_SECONDS + (80 << 30) / BYTES_PER_SECOND
"""Seconds that a scrub takes: a slice has its share of the memory and of the bandwidth."""


class Unwritten(Memory):
    """Memory without a disk; what would have been written at each `saved` is kept."""

    def __init__(self, situation: Situation, clock: FakeClock) -> None:
        super().__init__(Path("nowhere"), "boot", situation, clock)
        self.writes: list[Situation] = []

    async def saved(self) -> None:
        """Remember what would be written."""
        self.writes.append(self.situation)


class Bench:
    """Lanes on a fake node, with an API server that takes everything at once."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.gpus = FakeGpus("n1", mig=MIG, clock=self.clock)
        self.scrubber = FakeScrubber(self.gpus, self.clock)
        self.host = FakeHost()
        self.memory = Unwritten(Situation(), self.clock)

    def slot(self, index: int, profile: str, start: int = 0, number: int = 1) -> Slot:
        """A slot on the GPU of that index."""
        device = f"gpu{index}-{profile.replace('.', '')}-{start}-{number}"
        return Slot(
            device=device,
            gpu=self.gpus.uuids[index],
            profile=profile,
            start=start,
            holder=holder(number),
            since=self.clock.now(),
        )

    def specify(self, *slots: Slot) -> None:
        """The operator writes the spec."""
        self.memory.update(lambda now: known.specified(now, slots, now.generation + 1))

    async def work(self) -> None:
        """What the agent's cycle and outbox do, without an API server."""
        async with asyncio.TaskGroup() as tasks:
            machine = Machine(self.gpus, self.scrubber, self.host)
            lanes = Lanes(self.memory, machine, self.clock, AgentSettings(), tasks)
            await asyncio.gather(*(lanes.look(self.gpus.uuids[index]) for index in MIG))
            while True:
                self.memory.learn(announced(self.memory.situation, self.clock.now()))
                lanes.start()
                await self.memory.changed.wait()
                self.memory.changed.clear()

    def state(self, slot: Slot) -> SlotState | None:
        """State of a device; None where there is none."""
        held = self.memory.situation.held.get(slot.device)
        return held.state if held else None

    def message(self, slot: Slot) -> str:
        """Its message."""
        return self.memory.situation.held[slot.device].message

    def are(self, state: SlotState | None, *slots: Slot) -> Callable[[], bool]:
        """A condition: all of them are in that state."""
        return lambda: all(self.state(slot) is state for slot in slots)


def announced(situation: Situation, now: datetime) -> Situation:
    """Everything that can be stored or published is."""
    situation, _ = steps.settled(situation, now)
    ready_at = {device: held.ready_at for device, held in situation.held.items() if held.ready_at is not None}
    situation, left = steps.settled(known.stored(situation, ready_at), now)
    return known.published(situation, [held.slot.device for held in steps.slice_next(situation, left)])


def play(story: Callable[[Bench], Awaitable[None]]) -> None:
    """Run a story beside a working agent."""

    async def run() -> None:
        bench = Bench()
        bench.memory.learn(known.listed(bench.memory.situation, await bench.gpus.list()))
        work = asyncio.ensure_future(bench.work())
        try:
            await bench.clock.until(lambda: len(bench.memory.situation.instances) == len(MIG))
            await story(bench)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    asyncio.run(run())


def test_gpus_are_partitioned_side_by_side_and_each_in_turn() -> None:
    async def story(bench: Bench) -> None:
        slots = [bench.slot(index, "1g.10gb", start) for index in (4, 5, 6) for start in (0, 1)]
        bench.specify(*slots)
        await bench.clock.until(bench.are(SlotState.READY, *slots))
        assert bench.clock.seconds == pytest.approx(2 * 0.16 + SCRUB)

    play(story)


def test_a_creation_is_on_disk_before_the_driver_is_asked() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb", 4)
        bench.specify(slot)
        await bench.clock.until(lambda: bool(bench.memory.writes))
        assert bench.gpus.layout(4) == set()
        assert Made(gpu=slot.gpu, profile="3g.40gb", start=4) in bench.memory.writes[0].made

    play(story)


def test_ready_is_not_said_before_the_instance_exists() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "7g.80gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        held = bench.memory.situation.held[slot.device]
        assert held.ready_at is not None
        assert (held.ready_at - FakeClock().now()).total_seconds() == pytest.approx(0.24 + SCRUB, abs=1e-5)
        assert bench.gpus.layout(4) == {("7g.80gb", 0)}

    play(story)


def test_a_lost_gpu_delays_nobody_else() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(4, Faults(lost=True))
        bad, good = bench.slot(4, "3g.40gb"), bench.slot(5, "3g.40gb")
        bench.specify(bad, good)
        await bench.clock.until(bench.are(SlotState.READY, good))
        await bench.clock.until(bench.are(SlotState.FAILED, bad))
        assert bench.clock.seconds == pytest.approx(0.20 + SCRUB)
        assert "fallen off the bus" in bench.message(bad)

    play(story)


def test_a_call_that_hangs_hangs_alone() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(4, Faults(slow_seconds=10_000))
        bad, good = bench.slot(4, "3g.40gb"), bench.slot(5, "3g.40gb")
        bench.specify(bad, good)
        await bench.clock.until(bench.are(SlotState.READY, good))
        assert bench.clock.seconds == pytest.approx(0.20 + SCRUB)
        assert bench.state(bad) is SlotState.PREPARING

    play(story)


def test_a_refused_creation_says_why_and_is_tried_again_more_and_more_slowly() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(4, Faults(no_room=3))
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert bench.message(slot) == "GPU 4 has no room for 3g.40gb; list its instances"
        await bench.clock.until(bench.are(SlotState.READY, slot))
        assert bench.clock.seconds == pytest.approx(4 * 0.20 + 0.5 + 1 + 2 + SCRUB)

    play(story)


def test_a_refused_creation_leaves_no_claim_on_what_somebody_else_makes_there() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb")
        bench.gpus.fail(4, Faults(no_room=1))
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        bench.gpus.intrude(4, "3g.40gb", 0)
        await bench.clock.until(lambda: "did not create" in bench.message(slot))
        bench.specify()
        await bench.clock.until(bench.are(None, slot))
        assert bench.gpus.layout(4) == {("3g.40gb", 0)}

    play(story)


def test_a_driver_that_says_in_use_after_the_last_process_is_asked_again() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        bench.gpus.fail(4, Faults(in_use=2))
        bench.specify()
        await bench.clock.until(bench.are(SlotState.DRAINING, slot))
        await bench.clock.until(lambda: "is in use, says the driver" in bench.message(slot))
        await bench.clock.until(bench.are(None, slot))
        assert bench.gpus.layout(4) == set()

    play(story)


def test_a_device_with_a_process_is_kept_and_the_process_is_named() -> None:
    async def story(bench: Bench) -> None:
        old, new = bench.slot(4, "7g.80gb", number=2), bench.slot(4, "3g.40gb", number=1)
        bench.specify(old)
        await bench.clock.until(bench.are(SlotState.READY, old))
        uuid = bench.memory.situation.held[old.device].uuid
        bench.gpus.occupy(uuid, pid=77, name="lolMiner")
        bench.host.pods[77] = "mining/miner-n1-gpu4"
        bench.specify(new)
        await bench.clock.pass_by(30)
        named = "process 77 (lolMiner) of pod mining/miner-n1-gpu4"
        assert bench.message(old) == f"waits for {named} on {old.device} to end"
        assert bench.gpus.layout(4) == {("7g.80gb", 0)}
        assert old.device in bench.message(new)
        assert bench.gpus.layout(4) == {("7g.80gb", 0)}
        bench.gpus.vacate(uuid)
        await bench.clock.until(bench.are(SlotState.READY, new))
        assert bench.gpus.calls[1:] == [("destroy", "7g.80gb@0"), ("create", "3g.40gb@0")]

    play(story)


def test_processes_are_looked_for_twice() -> None:
    async def story(bench: Bench) -> None:
        old = bench.slot(0, FULL, number=2)
        bench.specify(old)
        await bench.clock.until(bench.are(SlotState.READY, old))
        bench.specify()
        appearing = asyncio.ensure_future(appear_after(bench, 0.01))
        await bench.clock.pass_by(1)
        assert appearing.done()
        assert bench.state(old) is SlotState.DRAINING
        assert "process 4711" in bench.message(old)

    async def appear_after(bench: Bench, seconds: float) -> None:
        await bench.clock.sleep(seconds)
        bench.gpus.occupy(bench.gpus.uuids[0])

    play(story)


def test_a_whole_gpu_that_a_stranger_uses_is_not_handed_out() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.occupy(bench.gpus.uuids[0], name="Xorg")
        slot = bench.slot(0, FULL)
        bench.specify(slot)
        await bench.clock.pass_by(5)
        assert bench.state(slot) is SlotState.PREPARING
        assert "Xorg" in bench.message(slot)
        bench.gpus.vacate(bench.gpus.uuids[0])
        await bench.clock.until(bench.are(SlotState.READY, slot))

    play(story)


def test_a_slot_dropped_while_it_is_being_created_leaves_no_instance() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(lambda: bool(bench.memory.writes))
        bench.specify()
        await bench.clock.until(lambda: ("destroy", "3g.40gb@0") in bench.gpus.calls)
        assert bench.gpus.layout(4) == set()
        assert bench.memory.situation.held == {}
        assert bench.memory.situation.made == frozenset()

    play(story)


def test_a_driver_that_lists_no_usable_instance_is_not_believed() -> None:
    class Liar(FakeGpus):
        async def instances(self, gpu: str) -> list[Instance]:
            del gpu
            return []

    async def story(bench: Bench) -> None:
        bench.gpus.__class__ = Liar
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert "lists no usable 3g.40gb at memory slice 0" in bench.message(slot)

    play(story)


def test_a_device_is_scrubbed_before_it_is_ready_and_says_how_it_came_to_its_holder() -> None:
    async def story(bench: Bench) -> None:
        old, new = bench.slot(4, "7g.80gb", number=2), bench.slot(4, "3g.40gb", number=1)
        bench.specify(old)
        await bench.clock.until(bench.are(SlotState.READY, old))
        bench.specify(new)
        await bench.clock.until(bench.are(SlotState.READY, new))
        held = bench.memory.situation.held[new.device]
        assert bench.scrubber.scrubbed[-1] == held.uuid
        assert held.hand_over is not None
        assert [one.name for one in held.hand_over.former] == ["holder-2"]
        assert [one.step for one in held.hand_over.steps] == list(HandOverStepType)[1:]
        took = {one.step: one.milliseconds for one in held.hand_over.steps}
        assert (took[HandOverStepType.DESTROY], took[HandOverStepType.PARTITION]) == (220, 200)
        assert took[HandOverStepType.SCRUB] == round(SCRUB * 1000)
        assert held.hand_over.scrubbed_bytes == 40192 << 20
        assert held.hand_over.driver == "570.148.08"

    play(story)


def test_scrubs_on_one_gpu_run_side_by_side() -> None:
    async def story(bench: Bench) -> None:
        slots = [bench.slot(4, "1g.10gb", start) for start in range(7)]
        bench.specify(*slots)
        await bench.clock.until(bench.are(SlotState.READY, *slots))
        assert bench.clock.seconds == pytest.approx(7 * 0.16 + SCRUB)
        assert len(set(bench.scrubber.scrubbed)) == 7

    play(story)


def test_a_scrub_that_fails_is_said_and_tried_again() -> None:
    async def story(bench: Bench) -> None:
        bench.scrubber.failing["*"] = 1
        slot = bench.slot(0, FULL)
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert "CUDA_ERROR_ECC_UNCORRECTABLE" in bench.message(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))

    play(story)


def test_a_process_of_the_former_holder_that_uses_nothing_is_found_and_killed() -> None:
    async def story(bench: Bench) -> None:
        old, new = bench.slot(0, FULL, number=2), bench.slot(0, FULL, number=1)
        bench.specify(old)
        await bench.clock.until(bench.are(SlotState.READY, old))
        device = PreparedDevice(device=old.device)
        claim = PreparedClaim(uid="c", namespace="mining", name="miner", devices=(device,), pods=("p",))
        bench.memory.update(lambda now: known.claimed(now, claim))
        bench.host.running = {5: ("p", "sleep"), 6: ("c", "sh"), 7: ("q", "other")}
        bench.specify(new)
        await bench.clock.pass_by(1)
        assert bench.host.ended == []
        bench.memory.update(lambda now: known.unclaimed(now, "c", bench.clock.now()))
        await bench.clock.until(bench.are(SlotState.READY, new))
        assert bench.host.ended == [5, 6]
        assert list(bench.host.running) == [7]

    play(story)


def test_what_cannot_be_proven_empty_in_time_is_quarantined_and_recovers() -> None:
    async def story(bench: Bench) -> None:
        old, beside = bench.slot(4, "3g.40gb", 4, number=2), bench.slot(4, "3g.40gb", 0, number=1)
        bench.specify(old, beside)
        await bench.clock.until(bench.are(SlotState.READY, old, beside))
        uuid = bench.memory.situation.held[old.device].uuid
        bench.gpus.occupy(uuid, pid=77, name="dcgm")
        bench.specify(beside)
        await bench.clock.pass_by(61)
        bench.memory.learn(due(bench.memory.situation, bench.clock.now()))
        assert bench.memory.situation.held[old.device].overdue
        assert bench.state(beside) is SlotState.READY
        bench.gpus.vacate(uuid)
        await bench.clock.until(bench.are(None, old))
        assert bench.memory.situation.fences == ()

    play(story)


def test_a_place_where_a_device_could_not_be_made_is_left_alone_for_a_while() -> None:
    async def story(bench: Bench) -> None:
        bench.scrubber.failing["*"] = 1000
        slot = bench.slot(4, "3g.40gb", 4)
        bench.specify(slot)
        await bench.clock.pass_by(121)
        bench.memory.learn(due(bench.memory.situation, bench.clock.now()))
        assert bench.memory.situation.held[slot.device].overdue
        bench.specify()
        await bench.clock.until(bench.are(None, slot))
        (fence,) = bench.memory.situation.fences
        assert (fence.gpu, fence.mask) == (slot.gpu, 0xF0)
        bench.scrubber.failing.clear()
        bench.memory.learn(due(bench.memory.situation, bench.clock.now() + known.PROBATION))
        assert bench.memory.situation.fences == ()

    play(story)


def test_settings_of_a_gpu_go_back_before_a_lease_and_never_under_one() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.tune(4, 250_000)
        first, second = bench.slot(4, "3g.40gb", 4), bench.slot(4, "3g.40gb", 0, number=3)
        bench.specify(first)
        await bench.clock.until(bench.are(SlotState.READY, first))
        assert bench.gpus.hardware.power_limits_mw == {}
        bench.gpus.tune(4, 390_000)
        bench.specify(first, second)
        await bench.clock.until(bench.are(SlotState.FAILED, second))
        assert "its power limit is 390 W of 400 W" in bench.message(second)
        assert bench.gpus.hardware.power_limits_mw == {4: 390_000}

    play(story)


def test_a_gpu_with_a_row_to_be_remapped_serves_nobody() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(0, Faults(remap_pending=True))
        slot = bench.slot(0, FULL)
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert "a memory row waits to be remapped; reset the GPU" in bench.message(slot)

    play(story)


def declare(bench: Bench, index: int, mode: GpuMode) -> None:
    """The Node declares another mode for a GPU."""
    bench.memory.update(lambda now: known.declared(now, {index: mode}, ""))


def test_a_gpu_on_which_nothing_is_takes_the_declared_mode_by_a_reset_of_it_alone() -> None:
    async def story(bench: Bench) -> None:
        beside = bench.slot(5, "3g.40gb")
        bench.specify(beside)
        await bench.clock.until(bench.are(SlotState.READY, beside))
        declare(bench, 0, GpuMode.MIG)
        await bench.clock.until(lambda: bench.memory.situation.gpus[bench.gpus.uuids[0]].mode is GpuMode.MIG)
        assert [call for call in bench.gpus.calls if call[0] == "reset"] == [("reset", "0")]
        slot = bench.slot(0, "1g.10gb", 6)
        bench.specify(beside, slot)
        await bench.clock.until(bench.are(SlotState.READY, slot, beside))

    play(story)


def ask(bench: Bench, index: int, mode: GpuMode, *slots: Slot) -> None:
    """The spec asks for another mode of a GPU that its Node lets be converted."""
    bench.memory.update(lambda now: known.declared(now, {index: GpuMode.WHOLE}, "", frozenset({index})))
    asked = WantedMode(gpu=bench.gpus.uuids[index], mode=mode, since=EPOCH)
    bench.memory.update(lambda now: known.specified(now, slots, now.generation + 1, [asked]))


def test_a_gpu_takes_the_mode_that_the_spec_asks_for_and_goes_back_when_it_does_no_more() -> None:
    async def story(bench: Bench) -> None:
        uuid = bench.gpus.uuids[0]
        ask(bench, 0, GpuMode.MIG)
        await bench.clock.until(lambda: bench.memory.situation.gpus[uuid].mode is GpuMode.MIG)
        slot = bench.slot(0, "1g.10gb", 6)
        ask(bench, 0, GpuMode.MIG, slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        bench.specify(slot)
        await bench.clock.pass_by(60)
        assert bench.state(slot) is SlotState.READY
        bench.specify()
        await bench.clock.until(lambda: bench.memory.situation.gpus[uuid].mode is GpuMode.WHOLE)

    play(story)


def test_a_gpu_that_somebody_has_is_not_converted_under_them() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(0, FULL)
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        declare(bench, 0, GpuMode.MIG)
        await bench.clock.pass_by(60)
        assert bench.state(slot) is SlotState.READY
        bench.specify()
        await bench.clock.until(lambda: bench.memory.situation.gpus[slot.gpu].mode is GpuMode.MIG)

    play(story)


def test_a_reset_that_is_refused_quarantines_that_gpu_and_is_not_repeated() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(0, Faults(reset_refused=True))
        bench.specify()
        declare(bench, 0, GpuMode.MIG)
        await bench.clock.until(lambda: bool(bench.memory.situation.fences))
        (fence,) = bench.memory.situation.fences
        assert fence.reason == ("GPU 0 was not reset: Resetting GPU 0 is not supported.; reboot the node")
        bench.gpus.fail(0, Faults())
        beside = bench.slot(1, FULL)
        bench.specify(beside)
        await bench.clock.until(bench.are(SlotState.READY, beside))
        await bench.clock.pass_by(600)
        assert not [call for call in bench.gpus.calls if call[0] == "reset"]

    play(story)


def test_a_gpu_whose_error_asks_for_a_reset_is_reset_once_nobody_is_on_it() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        bench.memory.learn(learnt(bench.memory.situation, GpuEvent(slot.gpu, 95), bench.clock.now()))
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert ("reset", "4") not in bench.gpus.calls
        bench.specify()
        await bench.clock.until(lambda: ("reset", "4") in bench.gpus.calls)
        await bench.clock.pass_by(1)
        (fence,) = bench.memory.situation.fences
        assert fence.remedy is Remedy.TIME
        assert fence.until is not None
        assert PROBATION - timedelta(seconds=3) < fence.until - bench.clock.now() <= PROBATION

    play(story)


def test_a_gpu_that_answers_nothing_but_that_it_needs_a_reset_is_reset_once_nobody_is_on_it() -> None:
    async def story(bench: Bench) -> None:
        bench.specify()
        sick = [
            replace(gpu, healthy=gpu.index != 0, message="GPU 0 needs a reset", needs_reset=gpu.index == 0)
            for gpu in await bench.gpus.list()
        ]
        bench.memory.learn(known.listed(bench.memory.situation, sick))
        await bench.clock.until(lambda: ("reset", "0") in bench.gpus.calls)
        await bench.clock.until(lambda: bench.memory.situation.gpus[bench.gpus.uuids[0]].healthy)
        assert [fence.remedy for fence in bench.memory.situation.fences] == [Remedy.TIME]

    play(story)


def test_memory_errors_that_nobody_was_told_of_keep_a_slice_back_until_its_gpu_is_reset() -> None:
    async def story(bench: Bench) -> None:
        beside, first, second = (bench.slot(4, "3g.40gb"), bench.slot(4, "1g.10gb", 4), bench.slot(4, "1g.10gb", 5, 2))
        bench.specify(beside, first)
        await bench.clock.until(bench.are(SlotState.READY, beside, first))
        bench.gpus.fail(4, Faults(errors=2))
        bench.specify(beside, first, second)
        await bench.clock.until(bench.are(SlotState.FAILED, second))
        assert "has had 2 uncorrectable memory errors since it was last examined" in bench.message(second)
        await bench.clock.pass_by(600)
        assert bench.are(SlotState.READY, beside, first)(), "who is served is left alone"
        assert ("reset", "4") not in bench.gpus.calls
        bench.specify()
        await bench.clock.until(lambda: ("reset", "4") in bench.gpus.calls)
        await bench.clock.pass_by(1)
        bench.memory.learn(due(bench.memory.situation, bench.clock.now() + PROBATION))
        bench.specify(second)
        await bench.clock.until(bench.are(SlotState.READY, second))

    play(story)


def test_a_device_that_is_condemned_while_it_is_verified_is_not_ready_by_that() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(0, FULL)
        asked = bench.gpus.vitals

        async def condemning(gpu: str) -> Vitals:
            found = await asked(gpu)
            fence = Fence(gpu=gpu, mask=0xFF, reason="Xid 94", until=bench.clock.now() + PROBATION)
            bench.memory.update(lambda now: known.condemned(now, fence, [slot.device]))
            return found

        bench.gpus.vitals = condemning  # type: ignore[method-assign]
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        bench.gpus.vitals = asked  # type: ignore[method-assign]
        bench.memory.update(lambda now: known.lifted(now, now.fences))
        await bench.clock.until(bench.are(SlotState.READY, slot))
        assert len(bench.scrubber.scrubbed) == 2, "what was scrubbed before counts for nothing"

    play(story)


def test_a_hand_over_tells_what_the_gpu_had_counted_before_and_after() -> None:
    async def story(bench: Bench) -> None:
        one, two = bench.slot(4, "1g.10gb", 4), bench.slot(4, "1g.10gb", 5, 2)
        bench.specify(one)
        await bench.clock.until(bench.are(SlotState.READY, one))
        bench.memory.learn(learnt(bench.memory.situation, GpuEvent(one.gpu, 13), bench.clock.now()))
        bench.specify(one, two)
        await bench.clock.until(bench.are(SlotState.READY, two))
        first, second = (bench.memory.situation.held[slot.device].hand_over for slot in (one, two))
        assert first is not None
        assert (first.xids_before, first.xids, first.ecc_uncorrected_before, first.ecc_uncorrected) == (
            None,
            0,
            None,
            0,
        )
        assert second is not None
        assert (second.xids_before, second.xids, second.ecc_uncorrected_before) == (0, 1, 0)
        assert second.holder == two.holder
        assert second.at == bench.memory.situation.held[two.device].ready_at

    play(story)


def test_the_time_of_a_reset_is_nobody_elses() -> None:
    async def story(bench: Bench) -> None:
        bench.specify()
        await bench.clock.pass_by(1)
        leaving = bench.slot(1, FULL)
        bench.memory.learn(known.accepted(bench.memory.situation, leaving, bench.clock.now()))
        begun = bench.memory.situation.held[leaving.device].since
        situation = known.maintenance_began(bench.memory.situation, bench.gpus.uuids[0])
        late = bench.clock.now() + timedelta(hours=1)
        assert due(situation, late).held == situation.held, "no step can go on, so none is late"
        ended = known.maintenance_ended(situation, bench.gpus.uuids[0], timedelta(seconds=90))
        assert begun is not None
        assert ended.held[leaving.device].since == begun + timedelta(seconds=90)
        assert not ended.maintained

    play(story)


def test_a_gpu_that_is_not_listed_any_more_is_lost_and_no_mode_is_changed_by_index() -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(1, FULL)
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        bench.gpus.fail(1, Faults(unseen=True))
        bench.memory.learn(known.listed(bench.memory.situation, await bench.gpus.list()))
        await bench.clock.until(bench.are(SlotState.FAILED, slot))
        assert "GPU 1 is not listed by the driver any more" in bench.message(slot)
        declare(bench, 0, GpuMode.MIG)
        await bench.clock.pass_by(60)
        assert not [call for call in bench.gpus.calls if call[0] == "reset"]

    play(story)


@pytest.mark.parametrize("forgets", [0, 1])
def test_an_instance_that_one_listing_misses_is_looked_for_again_before_its_lease_is_lost(forgets: int) -> None:
    class Forgetful(FakeGpus):
        looks = 0

        async def instances(self, gpu: str) -> list[Instance]:
            found = list(await super().instances(gpu))
            self.looks += 1
            return [] if self.looks <= forgets else found

    async def story(bench: Bench) -> None:
        slot = bench.slot(4, "3g.40gb")
        bench.specify(slot)
        await bench.clock.until(bench.are(SlotState.READY, slot))
        await bench.clock.until(lambda: bench.memory.situation.held[slot.device].published)
        before = bench.memory.situation.held[slot.device]
        bench.gpus.__class__ = Forgetful
        async with asyncio.TaskGroup() as tasks:
            machine = Machine(bench.gpus, bench.scrubber, bench.host)
            look = tasks.create_task(Lanes(bench.memory, machine, bench.clock, AgentSettings(), tasks).look(slot.gpu))
            await bench.clock.until(look.done)
        assert bench.gpus.looks == 1 + forgets  # type: ignore[attr-defined]  # it is one now
        assert bench.memory.situation.held[slot.device] == before
        assert bench.memory.situation.instances[slot.gpu]

    play(story)
