"""The agent against a real API server: the order of its writes, who gets a device, and what a kill leaves behind."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from gpu_tenancy.agent.checkpoint import UnreadableCheckpoint
from gpu_tenancy.api.names import SYSTEM_NAMESPACE
from gpu_tenancy.kube.resources import COORDINATION_LEASES, GPU_NODES, RESOURCE_SLICES
from tests.cluster.api import MERGE, Object
from tests.cluster.control_plane import ControlPlane
from tests.fakes.gpus import Faults
from tests.integration.agents import LEASE, POOL, Bench, Seen, cluster

Story = Callable[[Bench], Coroutine[Any, Any, None]]


class Stage:
    """A control plane that plain tests can play stories on."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._entering = cluster()
        self.control_plane: ControlPlane = self._runner.run(self._entering.__aenter__())

    def play(self, story: Coroutine[Any, Any, None]) -> None:
        """Play a story to its end."""
        self._runner.run(story)

    def close(self) -> None:
        """End the control plane."""
        try:
            self._runner.run(self._entering.__aexit__(None, None, None))
        finally:
            self._runner.close()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    try:
        yield stage
    finally:
        stage.close()


def play(stage: Stage, story: Story) -> None:
    """Play a story with an agent at work in this process."""

    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join()
        async with bench.agent():
            await story(bench)

    stage.play(run())


def first(history: list[Seen], kind: str, condition: Callable[[Seen], bool]) -> int:
    """Version of the first state that fulfils the condition."""
    return next(seen.version for seen in history if seen.kind == kind and condition(seen))


def stored(history: list[Seen], device: str) -> int:
    """Version of the first status that calls the device ready."""
    return first(history, "GpuNode", lambda seen: device in seen.ready)


def published(history: list[Seen], device: str) -> int:
    """Version of the first slice with the device."""
    return first(history, "ResourceSlice", lambda seen: device in seen.published)


# ------------------------------------------------------------------------------------------------------- the order


def test_a_device_is_stored_as_ready_before_it_is_published(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        whole, part = bench.slot(0, "full", 0, LEASE), bench.slot(7, "3g.40gb", 4, LEASE)
        async with bench.watching():
            await bench.specify(whole, part)
            history = await bench.told(await bench.published(whole, part))
        for device in (whole["device"], part["device"]):
            assert stored(history, device) < published(history, device)
        instants = {slot["device"]: slot["readyAt"] for slot in (await bench.gpu_node()).slots}
        for seen in history:
            told = {slot["device"]: slot.get("readyAt") for slot in seen.slots if slot["state"] == "Ready"}
            assert told.items() <= instants.items()
        assert bench.gpus.layout(7) == {("3g.40gb", 4)}

    play(stage, story)


def test_a_lease_is_withdrawn_then_said_to_drain_then_gone(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(slot)
        await bench.published(slot)
        claim = await bench.claim("train", slot)
        assert not (await bench.prepare(claim)).error
        async with bench.watching():
            await bench.specify()
            await bench.status("Draining", lambda seen: seen.states == {slot["device"]: "Draining"})
            assert bench.gpus.layout(7) == {("3g.40gb", 4)}
            assert not await bench.unprepare(claim)
            history = await bench.told(await bench.status("an empty node", lambda seen: not seen.slots))
        withdrawn = first(history, "ResourceSlice", lambda seen: not seen.published)
        drains = first(history, "GpuNode", lambda seen: seen.states.get(slot["device"]) == "Draining")
        gone = first(history, "GpuNode", lambda seen: not seen.slots)
        assert withdrawn < drains < gone
        assert bench.gpus.layout(7) == set()
        assert bench.gpus.calls == [("create", "3g.40gb@4"), ("destroy", "3g.40gb@4")]

    play(stage, story)


def test_a_new_holder_waits_until_kubelet_has_given_every_claim_of_the_old_one_back(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        miner, lease = bench.slot(6, "7g.80gb", 0, POOL), bench.slot(6, "3g.40gb", 4, LEASE)
        beside = bench.slot(7, "1g.10gb", 6, LEASE)
        await bench.specify(miner, beside)
        await bench.published(miner, beside)
        claim = await bench.claim("miner", miner)
        assert not (await bench.prepare(claim)).error
        await bench.specify(lease, beside)
        waiting = await bench.status("a reason", lambda seen: any(one["message"] for one in seen.slots))
        said = {one["device"]: one["message"] for one in waiting.slots}
        reason = f"waits for mining pool mining/miners to release {miner['device']}: 1 claim still prepared"
        assert said[lease["device"]] == f"{reason} (pod mining/miner-pod)"
        assert said[beside["device"]] == ""
        assert (await bench.slice()).published == {beside["device"]}
        assert bench.gpus.layout(6) == {("7g.80gb", 0)}
        assert not await bench.unprepare(claim)
        await bench.settled(lease, beside)
        assert bench.gpus.layout(6) == {("3g.40gb", 4)}

    play(stage, story)


def test_processes_that_outlive_their_claim_keep_the_gpu(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        miner, lease = bench.slot(0, "full", 0, POOL), bench.slot(0, "full", 0, LEASE)
        await bench.specify(miner)
        await bench.published(miner)
        bench.gpus.occupy(bench.gpus.uuids[0], pid=99, name="lolMiner")
        await bench.specify(lease)
        await bench.status(
            "a named process", lambda seen: any("process 99 (lolMiner)" in s["message"] for s in seen.slots)
        )
        assert (await bench.slice()).published == set()
        bench.gpus.vacate(bench.gpus.uuids[0])
        await bench.settled(lease)

    play(stage, story)


def test_slots_that_come_together_share_their_writes(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slots = [bench.slot(index, "full", 0, LEASE) for index in range(6)]
        async with bench.watching():
            await bench.specify(*slots)
            history = await bench.told(await bench.published(*slots))
        assert len([seen for seen in history if seen.kind == "ResourceSlice"]) == 1
        assert len([seen for seen in history if seen.kind == "GpuNode" and seen.ready]) == 1

    play(stage, story)


def test_a_gpu_that_fails_leaves_the_slice_and_no_other_is_delayed(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        sick, sound = bench.slot(6, "3g.40gb", 4, LEASE), bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(sick, sound)
        await bench.published(sick, sound)
        bench.gpus.fail(6, Faults(lost=True))
        await bench.published(sound)
        seen = await bench.status("a failed device", lambda seen: seen.states[sick["device"]] == "Failed")
        assert "fallen off the bus" in {one["device"]: one["message"] for one in seen.slots}[sick["device"]]
        gpus = {gpu["index"]: gpu["healthy"] for gpu in seen.body["status"]["gpus"]}
        assert (gpus[6], gpus[7]) == (False, True)
        more = bench.slot(7, "1g.10gb", 0, LEASE)
        await bench.specify(sick, sound, more)
        await bench.published(sound, more)

    play(stage, story)


def test_a_driver_that_errs_once_costs_nobody_a_device(stage: Stage) -> None:
    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join()
        slots = [bench.slot(0, "full", 0, LEASE), bench.slot(7, "3g.40gb", 4, LEASE)]
        more = bench.slot(7, "1g.10gb", 0, LEASE)
        async with bench.agent():
            await bench.specify(*slots)
            await bench.settled(*slots)
        for index in (0, 7):
            bench.gpus.fail(index, Faults(unsure=1, unlisted=2))
        async with bench.watching(), bench.agent():
            await bench.specify(*slots, more)
            await bench.settled(*slots, more)
            bench.gpus.fail(0, Faults(unsure=1))
            await until_true(bench, lambda: not bench.gpus.hardware.faults[0].unsure)
            await bench.specify(*slots)
            history = await bench.told(await bench.settled(*slots))
        devices = {slot["device"] for slot in slots}
        assert all(devices <= seen.published for seen in history if seen.kind == "ResourceSlice")
        assert all(devices <= seen.ready for seen in history if seen.kind == "GpuNode" and seen.slots)

    stage.play(run())


def test_a_hand_over_outlives_the_api_server(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        miner, lease = bench.slot(7, "7g.80gb", 0, POOL), bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(miner)
        await bench.published(miner)
        bench.gpus.fail(7, Faults(slow_seconds=0.5))
        await bench.specify(lease)
        await bench.control_plane.restart_apiserver()
        await bench.settled(lease)
        assert bench.gpus.layout(7) == {("3g.40gb", 4)}

    play(stage, story)


def test_what_others_say_about_the_node_stays(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        mark: Object = {
            "type": "AgentSilent",
            "status": "True",
            "reason": "HeartbeatMissed",
            "message": "Nobody is heard.",
        }
        mark |= {"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}
        body = (await bench.status("conditions", lambda seen: seen.body.get("status", {}).get("conditions"))).body
        conditions = [*body["status"]["conditions"], mark]
        path = GPU_NODES.path(None, bench.node, "status")
        await bench.api.patch(path, {"status": {"conditions": conditions}}, MERGE)
        slot = bench.slot(0, "full", 0, LEASE)
        await bench.specify(slot)
        seen = await bench.settled(slot)
        told = {one["type"]: one["status"] for one in seen.body["status"]["conditions"]}
        assert told == {"Ready": "True", "Conflict": "False", "AgentSilent": "True"}

    play(stage, story)


# ----------------------------------------------------------------------------------------------- who gets a device


def test_the_holders_claim_gets_its_device_and_a_file_for_the_container_runtime(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(slot)
        await bench.published(slot)
        claim = await bench.claim("train", slot)
        answer = await bench.prepare(claim)
        assert answer.error == ""
        [device] = answer.devices
        assert (device.pool_name, device.device_name) == (bench.node, slot["device"])
        assert list(device.request_names) == ["gpus"]
        [file] = bench.cdi_files()
        spec = json.loads(file.read_text())
        assert list(device.cdi_device_ids) == [f"{spec['kind']}={spec['devices'][0]['name']}"]
        assert "NVIDIA_VISIBLE_DEVICES=void" in spec["containerEdits"]["env"]
        assert (await bench.prepare(claim)).SerializeToString() == answer.SerializeToString()
        for _ in range(2):
            assert not await bench.unprepare(claim)
        assert bench.cdi_files() == []

    play(stage, story)


def test_a_claim_that_is_not_the_holders_is_refused_with_a_sentence(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(slot)
        await bench.published(slot)
        thief = await bench.claim("thief", slot, namespace="mining")
        assert "claim mining/thief-" in (said := (await bench.prepare(thief)).error)
        assert "is of another namespace" in said
        cousin = await bench.claim("cousin", slot, holder="lease-uid-3")
        assert "was made for lease-uid-3" in (await bench.prepare(cousin)).error
        own = await bench.claim("own", slot)
        own["metadata"]["uid"] = "another-uid"
        assert "it was deleted and made anew" in (await bench.prepare(own)).error
        absent = {"metadata": {"namespace": "team-a", "name": "absent", "uid": "u"}}
        assert (await bench.prepare(absent)).error == "claim team-a/absent does not exist (any more)"
        assert bench.cdi_files() == []

    play(stage, story)


def test_an_agent_that_has_lost_its_memory_touches_nothing(stage: Stage) -> None:
    """Who had the devices, and may have them still, is not known to anybody any more."""

    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join()
        async with bench.agent():
            slot = bench.slot(7, "3g.40gb", 4, LEASE)
            await bench.specify(slot)
            await bench.published(slot)
        bench.settings.checkpoint.unlink()
        with pytest.raises(UnreadableCheckpoint, match="has 1 devices of this boot, and the checkpoint"):
            await asyncio.wait_for(bench.run_agent(), 60)
        bench.gpus.reboot()
        async with bench.agent():
            await bench.published(slot)

    stage.play(run())


def test_a_claim_waits_for_a_device_that_is_still_being_made(stage: Stage) -> None:
    """kubelet would ask again a minute later only."""

    async def story(bench: Bench) -> None:
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(slot)
        await bench.published(slot)
        claim = await bench.claim("train", slot)
        bench.gpus.fail(7, Faults(slow_seconds=0.5))  # It takes longer than a status lingers.
        bench.gpus.wipe(7)
        await bench.status("its loss", lambda seen: slot["device"] not in seen.ready)
        assert (await bench.prepare(claim)).error == ""

    play(stage, story)


def test_a_claim_that_comes_in_the_moment_of_withdrawal_is_refused(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        await bench.specify(slot)
        await bench.published(slot)
        held = await bench.claim("first", slot)
        assert not (await bench.prepare(held)).error
        late = await bench.claim("late", slot)
        await bench.specify()
        await bench.status("Draining", lambda seen: seen.states == {slot["device"]: "Draining"})
        assert "is being taken away from team-a/train" in (await bench.prepare(late)).error
        assert not await bench.unprepare(held)
        await bench.status("an empty node", lambda seen: not seen.slots)
        assert "does not exist on this node any more" in (await bench.prepare(late)).error

    play(stage, story)


# ---------------------------------------------------------------------------------------------------- lost objects


def test_what_somebody_deletes_comes_back_as_it_was(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        slot = bench.slot(0, "full", 0, LEASE)
        await bench.specify(slot)
        before = (await bench.published(slot)).body["spec"]["devices"]
        await bench.api.delete(RESOURCE_SLICES.path(None, bench.slice_name))
        assert (await bench.published(slot)).body["spec"]["devices"] == before
        await bench.api.delete(GPU_NODES.path(None, bench.node))
        await bench.specify(slot)
        seen = await bench.settled(slot)
        assert len(seen.body["status"]["gpus"]) == 8

    play(stage, story)


def test_the_agent_says_that_it_lives_and_whose_it_is(stage: Stage) -> None:
    async def story(bench: Bench) -> None:
        path = COORDINATION_LEASES.path(SYSTEM_NAMESPACE, f"agent-{bench.node}")
        lease = await bench.api.get(path)
        assert lease["metadata"]["labels"] == {"gpu-tenancy.dev/agent": "true", "gpu-tenancy.dev/node": bench.node}
        assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseDurationSeconds"]) == (bench.node, 40)
        node = await bench.api.get(f"/api/v1/nodes/{bench.node}")
        for owned in (lease, (await bench.gpu_node()).body, (await bench.slice()).body):
            assert owned["metadata"]["ownerReferences"][0]["uid"] == node["metadata"]["uid"]

    play(stage, story)


def _gpus(seen: Seen) -> list[dict[str, Any]]:
    return sorted(seen.body["status"]["gpus"], key=lambda gpu: gpu["index"])


def test_a_gpu_in_another_mode_than_declared_is_fenced_and_converted_while_nothing_is_on_it(stage: Stage) -> None:
    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join("5,6")
        async with bench.agent():
            first = await bench.status("GPUs", lambda seen: seen.body.get("status", {}).get("gpus"))
            last = await bench.status("no fence", lambda seen: not any(gpu.get("fenced") for gpu in _gpus(seen)))
        assert {gpu["index"] for gpu in _gpus(first) if gpu.get("fenced")} == {5, 7}
        assert "in mode Whole, the Node declares MIG: it is converted" in _gpus(first)[5]["message"]
        assert {gpu["index"] for gpu in _gpus(last) if gpu["mode"] == "MIG"} == {5, 6}
        assert sorted(bench.gpus.calls) == [("reset", "5"), ("reset", "7")]

    stage.play(run())


# ----------------------------------------------------------------------------------------------------------- kills

MOMENTS = (
    "creating", "stored", "published", "prepared", "withdrawn", "waiting", "released", "destroying", "done",
)  # fmt: skip


async def hand_over(bench: Bench, moment: str) -> None:
    """A miner's GPU becomes a lease's; at that moment the agent is killed and started again."""

    async def reached(name: str) -> None:
        if name == moment:
            await bench.kill()
            await bench.start()

    miner, lease = bench.slot(7, "7g.80gb", 0, POOL), bench.slot(7, "3g.40gb", 4, LEASE)
    await bench.specify(miner)
    await until_true(bench, lambda: any(not made.uuid for made in bench.checkpoint().made))
    await reached("creating")
    await bench.status("the miner's device ready", lambda seen: miner["device"] in seen.ready)
    await reached("stored")
    before = await bench.published(miner)
    await reached("published")
    await bench.published(miner)
    claim = await bench.claim(f"miner-{moment}", miner)
    assert not (await bench.prepare(claim)).error
    await reached("prepared")
    assert not (await bench.prepare(claim)).error
    assert (await bench.published(miner)).body["spec"]["devices"] == before.body["spec"]["devices"]
    await bench.specify(lease)
    await bench.published()
    await reached("withdrawn")
    await bench.status("a reason", lambda seen: any("still prepared" in one["message"] for one in seen.slots))
    await reached("waiting")
    assert bench.gpus.layout(7) == {("7g.80gb", 0)}
    assert not await bench.unprepare(claim)
    await reached("released")
    await until_true(bench, lambda: not bench.checkpoint().prepared)
    await reached("destroying")
    await bench.settled(lease)
    await reached("done")
    await check_outcome(bench, miner, lease, claim)


async def check_outcome(bench: Bench, miner: Object, lease: Object, claim: Object) -> None:
    seen = await bench.settled(lease)
    assert bench.gpus.layout(7) == {("3g.40gb", 4)}
    assert bench.gpus.hardware.serial == 2, "more instances were created than the two that were asked for"
    ready_at = {slot["readyAt"] for slot in seen.slots}
    uuids = [slot["attributes"]["uuid"]["string"] for slot in (await bench.slice()).body["spec"]["devices"]]
    assert [slot["uuid"] for slot in seen.slots] == uuids
    assert len(ready_at) == 1
    assert "does not exist on this node any more" in (await bench.prepare(claim)).error
    assert miner["device"] not in seen.states


def kill_at(stage: Stage, moment: str) -> None:
    async def run() -> None:
        bench = Bench(stage.control_plane)
        bench.gpus.fail(7, Faults(slow_seconds=0.3))
        await bench.join()
        await bench.start()
        try:
            await hand_over(bench, moment)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{stage.control_plane.log_tail(f'agent-{bench.node}')}") from error
        finally:
            await bench.kill()

    stage.play(run())


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_changes_nothing_about_the_outcome(stage: Stage, moment: str) -> None:
    kill_at(stage, moment)


def test_a_kill_at_a_sampled_moment_changes_nothing_about_the_outcome(stage: Stage, seed: int) -> None:
    for moment in random.Random(seed).sample(MOMENTS, 2):
        kill_at(stage, moment)


def test_a_restart_keeps_instants_and_names_of_what_serves(stage: Stage) -> None:
    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join()
        slots = [bench.slot(0, "full", 0, LEASE), bench.slot(7, "3g.40gb", 4, LEASE)]
        async with bench.agent():
            await bench.specify(*slots)
            before, there = await bench.settled(*slots), await bench.published(*slots)
        async with bench.watching():
            async with bench.agent():
                more = bench.slot(1, "full", 0, LEASE)
                await bench.specify(*slots, more)
                after = await bench.settled(*slots, more)
            history = await bench.told(after)
        kept = [slot for slot in after.slots if slot["device"] != more["device"]]
        assert kept == before.slots
        for seen in history:
            if seen.kind == "ResourceSlice":
                assert {slot["device"] for slot in slots} <= seen.published
        assert bench.gpus.hardware.serial == 1
        assert there.body["metadata"]["uid"] == (await bench.slice()).body["metadata"]["uid"]

    stage.play(run())


def test_after_a_reboot_devices_are_withdrawn_made_again_and_ready_later(stage: Stage) -> None:
    async def run() -> None:
        bench = Bench(stage.control_plane)
        await bench.join()
        slot = bench.slot(7, "3g.40gb", 4, LEASE)
        async with bench.agent():
            await bench.specify(slot)
            before = await bench.settled(slot)
            claim = await bench.claim("train", slot)
            assert not (await bench.prepare(claim)).error
        bench.gpus.reboot()
        async with bench.watching(), bench.agent():
            later = await bench.status("another instant", lambda seen: seen.slots != before.slots and seen.ready)
            history = await bench.told(await bench.published(slot))
        assert any(seen.kind == "ResourceSlice" and not seen.published for seen in history)
        assert later.slots[0]["readyAt"] > before.slots[0]["readyAt"]
        assert bench.checkpoint().prepared == ()

    stage.play(run())


async def until_true(bench: Bench, condition: Callable[[], bool]) -> None:
    async def look() -> bool:
        return condition()

    await bench.until("what the test waits for", look)
