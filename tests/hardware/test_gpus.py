"""The agent's NVML and CUDA calls on whatever GPU is present: ``pytest -m hardware``, on the node, as root.

Only looks, unless ``--allow-writes``: then GPUs on which nobody is are partitioned, scrubbed and put back to their
settings, and left as they were found. A GPU with a process on it is never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from gpu_tenancy.agent.gpus import GpuError, GpuFacts
from gpu_tenancy.agent.nvml import NvmlGpus
from gpu_tenancy.agent.scrub import CudaScrubber
from gpu_tenancy.agent.vetting import objection
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.mig.profiles import of_model

pytestmark = pytest.mark.hardware

T = TypeVar("T")


@pytest.fixture
def gpus() -> Iterator[NvmlGpus]:
    """The GPUs of this machine."""
    try:
        one = NvmlGpus.open()
    except GpuError as error:
        pytest.skip(f"no GPU to test on: {error}")
    yield one
    one.close()


@pytest.fixture
def writes(request: pytest.FixtureRequest) -> None:
    """Skips unless the GPUs may be changed."""
    if not request.config.getoption("--allow-writes"):
        pytest.skip("changes GPUs: say --allow-writes where nobody needs them")


def run(call: Coroutine[Any, Any, T]) -> T:
    """Play a call."""
    return asyncio.run(call)


def idle(gpus: NvmlGpus, mode: GpuMode) -> list[GpuFacts]:
    """GPUs in that mode on which nobody is and no instance lies; skips where there is none."""
    found = [
        gpu
        for gpu in run(gpus.list())
        if gpu.healthy and gpu.mode is mode and not run(gpus.processes(gpu.uuid)) and not run(gpus.instances(gpu.uuid))
    ]
    if not found:
        pytest.skip(f"no GPU in mode {mode} is empty")
    return found


def test_every_gpu_says_what_it_is(gpus: NvmlGpus) -> None:
    listed = run(gpus.list())
    assert listed
    for gpu in listed:
        assert gpu.healthy, gpu.message
        assert gpu.uuid.startswith("GPU-")
        assert gpu.memory_mib > 0
        assert gpu.multiprocessors > 0
        assert gpu.nodes, "a container would get no device node of it"


def test_instances_lie_where_the_geometry_allows_them_and_never_over_each_other(gpus: NvmlGpus) -> None:
    for gpu in run(gpus.list()):
        taken = 0
        for one in run(gpus.instances(gpu.uuid)):
            mask = ((1 << one.size) - 1) << one.start
            assert not taken & mask
            taken |= mask
            known = of_model(gpu.model).get(one.profile)
            assert known is None or (one.start in known.starts and one.size == known.size)


def test_a_gpu_can_be_examined_and_measured(gpus: NvmlGpus) -> None:
    for gpu in run(gpus.list()):
        vitals, telemetry = run(gpus.vitals(gpu.uuid)), run(gpus.telemetry(gpu.uuid))
        assert vitals.driver
        assert telemetry.memory_used
        assert objection(vitals) is None, f"GPU {gpu.index} is not fit to serve"


def test_settings_go_back_and_stay(gpus: NvmlGpus, writes: None) -> None:  # noqa: ARG001
    for gpu in idle(gpus, GpuMode.WHOLE):
        run(gpus.restore(gpu.uuid))
        assert not run(gpus.restore(gpu.uuid))


def test_every_placement_can_be_made_and_is_gone_again(gpus: NvmlGpus, writes: None) -> None:  # noqa: ARG001
    gpu = idle(gpus, GpuMode.MIG)[0]
    for profile in of_model(gpu.model).values():
        for start in profile.starts:
            made = run(gpus.create(gpu.uuid, profile.name, start))
            try:
                assert (made.profile, made.start, made.size) == (profile.name, start, profile.size)
                assert run(gpus.instances(gpu.uuid)) == [made]
            finally:
                run(gpus.destroy(made))
            assert run(gpus.instances(gpu.uuid)) == []


def test_a_whole_gpu_and_a_slice_can_be_scrubbed(gpus: NvmlGpus, writes: None) -> None:  # noqa: ARG001
    async def scrub(device: str) -> int:
        scrubber = CudaScrubber(60.0)
        try:
            return (await scrubber.scrub(device)).bytes
        finally:
            await scrubber.prepare(0)

    for gpu in run(gpus.list()):
        if gpu.healthy and not run(gpus.processes(gpu.uuid)) and not run(gpus.instances(gpu.uuid)):
            if gpu.mode is GpuMode.WHOLE:
                assert run(scrub(gpu.uuid)) > 0.95 * (gpu.memory_mib << 20)
                continue
            made = run(gpus.create(gpu.uuid, next(iter(of_model(gpu.model))), 0))
            try:
                assert run(scrub(made.uuid)) > 0.9 * (made.memory_mib << 20)
            finally:
                run(gpus.destroy(made))
