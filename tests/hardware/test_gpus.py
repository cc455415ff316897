"""The agent's NVML and CUDA calls on whatever GPU is present: ``pytest -m hardware``, on the node, as root.

Only looks, unless ``--allow-writes``: then GPUs on which nobody is are partitioned, scrubbed and put back to their
settings, and left as they were found. A GPU with a process on it is never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import TypeVar

import pytest

from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.nvml import NvmlGpus
from gpu_tenancy.agent.scrub import CudaScrubber
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.mig.profiles import of_model
from tests.contract import CHANGING, LOOKING, Law, NoSuchGpu

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


def run(call: Awaitable[T]) -> T:
    """Play a call."""

    async def play() -> T:
        return await call

    return asyncio.run(play())


@pytest.mark.parametrize("law", LOOKING, ids=lambda law: law.__name__)
def test_the_contract_holds(gpus: NvmlGpus, law: Law) -> None:
    law(gpus, run)


@pytest.mark.parametrize("law", CHANGING, ids=lambda law: law.__name__)
def test_the_contract_holds_for_what_is_changed(gpus: NvmlGpus, writes: None, law: Law) -> None:  # noqa: ARG001
    try:
        law(gpus, run)
    except NoSuchGpu as error:
        pytest.skip(str(error))


def test_a_container_would_get_device_nodes(gpus: NvmlGpus) -> None:
    for gpu in run(gpus.list()):
        assert gpu.nodes, gpu


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
