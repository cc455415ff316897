"""Steps on hardware: serial on one GPU, side by side on several, and patient with drivers that refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent import steps
from gpu_tenancy.agent.gpus import Instance
from gpu_tenancy.agent.lanes import Lanes
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import Made, Situation
from gpu_tenancy.api.node import Slot, SlotState
from gpu_tenancy.mig.profiles import FULL
from tests.fakes.clock import FakeClock
from tests.fakes.gpus import FakeGpus, Faults
from tests.unit.agent.world import holder

MIG = range(4, 8)


class Unwritten(Memory):
    """Memory without a disk; what would have been written at each `saved` is kept."""

    def __init__(self, situation: Situation) -> None:
        super().__init__(Path("nowhere"), "boot", situation)
        self.writes: list[Situation] = []

    async def saved(self) -> None:
        """Remember what would be written."""
        self.writes.append(self.situation)


class Bench:
    """Lanes on a fake node, with an API server that takes everything at once."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.gpus = FakeGpus("n1", mig=MIG, clock=self.clock)
        self.memory = Unwritten(Situation())

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
            lanes = Lanes(self.memory, self.gpus, self.clock, AgentSettings(), tasks)
            await asyncio.gather(*(lanes.look(self.gpus.uuids[index]) for index in MIG))
            while True:
                self.memory.learn(announced(self.memory.situation))
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


def announced(situation: Situation) -> Situation:
    """Everything that can be stored or published is."""
    situation, _ = steps.settled(situation)
    ready_at = {device: held.ready_at for device, held in situation.held.items() if held.ready_at is not None}
    situation, left = steps.settled(known.stored(situation, ready_at))
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
        assert bench.clock.seconds == 2 * 0.16

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
        assert (held.ready_at - FakeClock().now()).total_seconds() == 0.24
        assert bench.gpus.layout(4) == {("7g.80gb", 0)}

    play(story)


def test_a_lost_gpu_delays_nobody_else() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(4, Faults(lost=True))
        bad, good = bench.slot(4, "3g.40gb"), bench.slot(5, "3g.40gb")
        bench.specify(bad, good)
        await bench.clock.until(bench.are(SlotState.READY, good))
        await bench.clock.until(bench.are(SlotState.FAILED, bad))
        assert bench.clock.seconds == 0.20
        assert "fallen off the bus" in bench.message(bad)

    play(story)


def test_a_call_that_hangs_hangs_alone() -> None:
    async def story(bench: Bench) -> None:
        bench.gpus.fail(4, Faults(slow_seconds=10_000))
        bad, good = bench.slot(4, "3g.40gb"), bench.slot(5, "3g.40gb")
        bench.specify(bad, good)
        await bench.clock.until(bench.are(SlotState.READY, good))
        assert bench.clock.seconds == 0.20
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
        assert bench.clock.seconds == 4 * 0.20 + 0.5 + 1 + 2

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
        bench.specify(new)
        await bench.clock.pass_by(30)
        assert bench.message(old) == f"waits for process 77 (lolMiner) on {old.device} to end"
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
