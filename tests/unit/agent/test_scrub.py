"""The scrub as it runs on a node: its processes, NVIDIA's own bindings, and the simulated driver underneath."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic

import psutil
import pytest

from gpu_tenancy.agent.gpus import GpuError, Instance
from gpu_tenancy.agent.nvml import NvmlGpus
from gpu_tenancy.agent.scrub import CudaScrubber
from tests.nvsim.library import library
from tests.nvsim.node import Node

SECRET = 0xDEADBEEF


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Two GPUs, the second one in MIG mode, and somebody's data on all of both."""
    one = Node.create(tmp_path / "node", gpus=2)
    one.set("mig_current", 1, gpu=1)
    one.set("mig_pending", 1, gpu=1)
    for gpu in (0, 1):
        one.plant(gpu, SECRET)
    for name, value in one.environment.items():
        monkeypatch.setenv(name, value)
    ctypes.CDLL(str(library()))
    return one


@pytest.fixture
def gpus(node: Node) -> Iterator[NvmlGpus]:
    """Its GPUs through NVML."""
    del node
    one = NvmlGpus.open()
    yield one
    one.close()


def uuids(gpus: NvmlGpus) -> list[str]:
    return [one.uuid for one in asyncio.run(gpus.list())]


def halves(gpus: NvmlGpus) -> list[Instance]:
    """Both halves of the second GPU."""
    gpu = uuids(gpus)[1]
    return [asyncio.run(gpus.create(gpu, "3g.40gb", start)) for start in (0, 4)]


def play(story: Callable[[CudaScrubber], Awaitable[None]], seconds: float = 60.0) -> None:
    """Run a story with a scrubber; afterwards no process of it is left."""

    async def run() -> None:
        before = children()
        scrubber = CudaScrubber(seconds)
        try:
            await story(scrubber)
        finally:
            await scrubber.prepare(0)
        assert children() <= before

    asyncio.run(run())


def children(of: int | None = None) -> set[int]:
    """Processes that this one, or another, has started; other tests' among them."""
    return {child.pid for child in psutil.Process(of).children()}


async def server(scrubber: CudaScrubber) -> int:
    """The process that the scrubber's scrubs are forked from."""
    before = children()
    await scrubber.prepare(1)
    [pid] = children() - before
    return pid


async def until(look: Callable[[], object]) -> None:
    """Wait for something that the other processes are about to do."""
    end = monotonic() + 20
    while not look():
        assert monotonic() < end
        await asyncio.sleep(0.01)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def leaks(node: Node, device: str) -> bool:
    """Whether the holder of a device could read what was planted."""
    return any(row.pattern == SECRET for row in node.readable(device))


def test_nothing_that_the_next_holder_can_reach_outlives_a_scrub(node: Node, gpus: NvmlGpus) -> None:
    whole = uuids(gpus)[0]
    assert leaks(node, whole)

    async def story(scrubber: CudaScrubber) -> None:
        done = await scrubber.scrub(whole)
        total = (await gpus.list())[0].memory_mib << 20
        assert 0.98 * total < done.bytes <= total
        assert done.samples >= done.bytes >> 29

    play(story)
    assert not leaks(node, whole)


def test_a_scrub_of_a_slice_leaves_its_neighbour_alone(node: Node, gpus: NvmlGpus) -> None:
    low, high = halves(gpus)

    async def story(scrubber: CudaScrubber) -> None:
        done = await scrubber.scrub(high.uuid)
        assert 0.98 * high.memory_mib < done.bytes >> 20 <= high.memory_mib

    play(story)
    assert (leaks(node, low.uuid), leaks(node, high.uuid)) == (True, False)


def test_several_devices_are_scrubbed_at_a_time_by_children_of_the_process_that_was_ready(
    node: Node, gpus: NvmlGpus
) -> None:
    devices = [uuids(gpus)[0], *(one.uuid for one in halves(gpus))]

    async def story(scrubber: CudaScrubber) -> None:
        ready, before = await server(scrubber), children()
        with node.fault("cuMemsetD32_v2", delay_ms=2_000, times=3) as writing:
            scrubs = asyncio.gather(*(scrubber.scrub(device) for device in devices))
            await until(lambda: writing.seen)
            await until(lambda: len(children(ready)) == len(devices))
            await scrubber.prepare(0)  # None is to come: those that run are not disturbed by that.
            await scrubs
        await until(lambda: children() == before - {ready})

    play(story)
    assert not any(leaks(node, device) for device in devices)


def test_a_process_that_is_ready_serves_one_scrub_after_the_other(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        await server(scrubber)
        ready = children()
        for _ in range(3):
            await scrubber.scrub(device)
            assert children() == ready

    play(story)


def test_a_process_that_was_not_ready_ends_with_its_last_scrub(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        before = children()
        await scrubber.scrub(device)
        await until(lambda: children() == before)

    play(story)


@pytest.mark.parametrize(
    ("symbol", "result", "name"),
    [
        ("cuInit", 100, "CUDA_ERROR_NO_DEVICE"),
        ("cuDevicePrimaryCtxRetain", 46, "CUDA_ERROR_DEVICE_UNAVAILABLE"),
        ("cuMemsetD32_v2", 214, "CUDA_ERROR_ECC_UNCORRECTABLE"),
        ("cuCtxSynchronize", 999, "CUDA_ERROR_UNKNOWN"),
    ],
)
def test_what_the_driver_refuses_is_a_sentence_with_its_name(
    node: Node, gpus: NvmlGpus, symbol: str, result: int, name: str
) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        with node.fault(symbol, result=result), pytest.raises(GpuError, match=f"could not be scrubbed: .*{name}"):
            await scrubber.scrub(device)

    play(story)


def test_memory_that_does_not_hold_what_was_written_is_found_out(node: Node, gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        with node.fault("cuMemcpyDtoH_v2", delay_ms=2_000, times=1) as reading:
            scrub = asyncio.ensure_future(scrubber.scrub(device))
            await until(lambda: reading.seen)
            node.plant(0, SECRET)  # While it waits to read what it wrote, something else comes to stand there.
            with pytest.raises(GpuError, match="is not what was written; retire the GPU"):
                await scrub

    play(story)


def test_a_context_that_hangs_is_killed_lets_the_device_go_and_holds_up_no_other(node: Node, gpus: NvmlGpus) -> None:
    device, other = uuids(gpus)[0], halves(gpus)[1].uuid

    async def story(scrubber: CudaScrubber) -> None:
        ready = await server(scrubber)
        with node.fault("cuMemsetD32_v2", gpu=0, delay_ms=120_000) as hanging:
            hung = asyncio.ensure_future(scrubber.scrub(device))
            await until(lambda: hanging.seen)
            await scrubber.scrub(other)
            assert not hung.done()
            with pytest.raises(GpuError, match="did not end within 3 s and was killed; look for Xid events"):
                await hung
        assert await gpus.processes(device) == []
        assert children(ready) == set()

    play(story, seconds=3.0)
    assert (leaks(node, device), leaks(node, other)) == (True, False)


def test_a_scrub_that_nobody_waits_for_any_more_lets_the_device_go(node: Node, gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        with node.fault("cuMemsetD32_v2", delay_ms=120_000) as hanging:
            scrub = asyncio.ensure_future(scrubber.scrub(device))
            await until(lambda: hanging.seen)
            scrub.cancel()
            with pytest.raises(asyncio.CancelledError):
                await scrub
        assert await gpus.processes(device) == []

    play(story)


def test_a_device_that_is_gone_is_a_sentence(gpus: NvmlGpus) -> None:
    high = halves(gpus)[1]
    asyncio.run(gpus.destroy(high))

    async def story(scrubber: CudaScrubber) -> None:
        with pytest.raises(GpuError, match=f"{high.uuid} could not be scrubbed: cu"):
            await scrubber.scrub(high.uuid)

    play(story)


def test_a_child_that_is_killed_is_a_sentence_and_no_other_dies_of_it(node: Node, gpus: NvmlGpus) -> None:
    device, other = uuids(gpus)[0], halves(gpus)[1].uuid

    async def story(scrubber: CudaScrubber) -> None:
        ready = await server(scrubber)
        with node.fault("cuMemsetD32_v2", delay_ms=2_000, times=2):
            first = asyncio.ensure_future(scrubber.scrub(device))
            await until(lambda: children(ready))
            [child] = children(ready)
            second = asyncio.ensure_future(scrubber.scrub(other))
            await until(lambda: len(children(ready)) == 2)
            kill(child)
            with pytest.raises(GpuError, match=f"{device} ended without a report: signal SIGKILL"):
                await first
            await second

    play(story)
    assert not leaks(node, other)


def test_a_child_that_breaks_down_is_a_sentence_with_its_last_words(
    gpus: NvmlGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = uuids(gpus)[0]
    (tmp_path / "libcuda.so.1").write_text("no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))

    async def story(scrubber: CudaScrubber) -> None:
        with pytest.raises(GpuError, match=r"ended without a report: exit code 1: \S*Error: .*cuda"):
            await scrubber.scrub(device)

    play(story)


def test_when_the_process_of_the_scrubs_is_killed_they_fail_and_the_next_has_a_new_one(
    node: Node, gpus: NvmlGpus
) -> None:
    device, other = uuids(gpus)[0], halves(gpus)[1].uuid

    async def story(scrubber: CudaScrubber) -> None:
        ready = await server(scrubber)
        with node.fault("cuMemsetD32_v2", delay_ms=120_000):
            scrubs = [asyncio.ensure_future(scrubber.scrub(one)) for one in (device, other)]
            await until(lambda: len(children(ready)) == 2)
            orphans = children(ready)
            kill(ready)
            for one, scrub in zip((device, other), scrubs, strict=True):
                why = "the process that scrubs has ended: signal SIGKILL"
                with pytest.raises(GpuError, match=f"the scrub of {one} ended without a report: {why}"):
                    await scrub
            await until(lambda: not any(map(is_alive, orphans)))  # Else they would hold the devices.
        await scrubber.scrub(device)

    play(story)
    assert not leaks(node, device)


def test_a_process_of_the_scrubs_that_died_while_it_was_idle_is_replaced(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        kill(await server(scrubber))
        before = children()
        while not children() - before:
            await scrubber.prepare(1)
            await asyncio.sleep(0.01)
        await scrubber.scrub(device)

    play(story)


def test_a_process_of_the_scrubs_that_hangs_is_replaced(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        ready = await server(scrubber)
        os.kill(ready, signal.SIGSTOP)
        with pytest.raises(GpuError, match="did not end within 3 s"):
            await scrubber.scrub(device)
        await until(lambda: ready not in children())
        await scrubber.scrub(device)

    play(story, seconds=3.0)


AGENT = """
import asyncio, sys
from gpu_tenancy.agent.scrub import CudaScrubber
asyncio.run(CudaScrubber(600.0).scrub(sys.argv[1]))
"""


def test_nothing_is_left_when_the_agent_is_killed(node: Node, gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(_: CudaScrubber) -> None:
        with node.fault("cuMemsetD32_v2", delay_ms=120_000) as hanging:
            agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, device)
            try:
                await until(lambda: hanging.seen)
                theirs = {child.pid for child in psutil.Process(agent.pid).children(recursive=True)}
                assert len(theirs) == 2
            finally:
                agent.kill()
                await agent.wait()
            await until(lambda: not any(map(is_alive, theirs)))

    play(story)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which whoever takes in orphans may be slow to reap."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_that_is_let_go_while_a_scrub_takes_it_disturbs_nobody(node: Node, gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        await scrubber.prepare(4)
        await asyncio.gather(scrubber.prepare(1), scrubber.scrub(device), scrubber.prepare(0))

    play(story)
    assert not leaks(node, device)


def test_a_machine_that_can_start_no_child_is_a_sentence(gpus: NvmlGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        monkeypatch.setattr("gpu_tenancy.agent.scrub.sys.executable", "/nowhere/python")
        await scrubber.prepare(1)
        with pytest.raises(GpuError, match="no child could be started"):
            await scrubber.scrub(device)

    play(story)


TAKER = """
from cuda.bindings import driver as cuda
def ok(error, value=None):
    assert error == cuda.CUresult.CUDA_SUCCESS, error
    return value
ok(*cuda.cuInit(0))
ok(*cuda.cuCtxSetCurrent(ok(*cuda.cuDevicePrimaryCtxRetain(ok(*cuda.cuDeviceGet(0))))))
ok(*cuda.cuMemAlloc(20 << 30))
print("taken", flush=True)
input()
"""


def test_memory_that_somebody_else_holds_is_no_scrubbed_memory(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    with subprocess.Popen(
        [sys.executable, "-c", TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as taker:
        try:
            assert taker.stdout is not None
            assert taker.stdout.readline() == "taken\n"

            async def story(scrubber: CudaScrubber) -> None:
                with pytest.raises(GpuError, match="somebody else is on the device"):
                    await scrubber.scrub(device)

            play(story)
        finally:
            taker.kill()
