"""The scrub as it runs on a node: a child process, NVIDIA's own bindings, and the simulated driver underneath."""

from __future__ import annotations

import asyncio
import ctypes
import os
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
    """Run a story with a scrubber; afterwards no child of it is left."""

    async def run() -> None:
        before = children()
        scrubber = CudaScrubber(seconds)
        try:
            await story(scrubber)
        finally:
            await scrubber.prepare(0)
        assert children() <= before

    asyncio.run(run())


def children() -> set[int]:
    """Processes that this one has started, other tests' among them."""
    return {child.pid for child in psutil.Process().children()}


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


def test_several_devices_are_scrubbed_at_a_time_by_children_that_were_ready(node: Node, gpus: NvmlGpus) -> None:
    devices = [uuids(gpus)[0], *(one.uuid for one in halves(gpus))]

    async def story(scrubber: CudaScrubber) -> None:
        before = children()
        await scrubber.prepare(len(devices))
        ready = children() - before
        assert len(ready) == len(devices)
        await asyncio.gather(*(scrubber.scrub(device) for device in devices))
        assert not ready & children()

    play(story)
    assert not any(leaks(node, device) for device in devices)


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
            until = monotonic() + 20
            while not reading.seen:
                assert monotonic() < until
                await asyncio.sleep(0.01)
            node.plant(0, SECRET)  # While it waits to read what it wrote, something else comes to stand there.
            with pytest.raises(GpuError, match="is not what was written; retire the GPU"):
                await scrub

    play(story)


def test_a_context_that_hangs_is_killed_and_lets_the_device_go(node: Node, gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        with node.fault("cuMemsetD32_v2", delay_ms=120_000), pytest.raises(GpuError, match="did not end within"):
            await scrubber.scrub(device)
        until = monotonic() + 20
        while await gpus.processes(device):
            assert monotonic() < until
            await asyncio.sleep(0.02)

    play(story, seconds=3.0)


def test_a_device_that_is_gone_is_a_sentence(gpus: NvmlGpus) -> None:
    high = halves(gpus)[1]
    asyncio.run(gpus.destroy(high))

    async def story(scrubber: CudaScrubber) -> None:
        with pytest.raises(GpuError, match=f"{high.uuid} could not be scrubbed: cu"):
            await scrubber.scrub(high.uuid)

    play(story)


def test_a_child_that_dies_without_a_word_is_a_sentence(gpus: NvmlGpus) -> None:
    device = uuids(gpus)[0]

    async def story(scrubber: CudaScrubber) -> None:
        before = children()
        await scrubber.prepare(1)
        [pid] = children() - before
        child = psutil.Process(pid)
        child.kill()
        child.wait()
        with pytest.raises(GpuError, match="ended without a report"):
            await scrubber.scrub(device)

    play(story)


def test_children_that_are_let_go_while_a_scrub_takes_one_disturb_nobody(node: Node, gpus: NvmlGpus) -> None:
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
