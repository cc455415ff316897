"""Conversion by demand on a real control plane, with the real agent on the simulated driver: there, and back again.

One world of one small server on which everything mines, and an operator with a short dwell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Final

import pytest

from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.eventually import eventually
from tests.cluster.world import GpuServer, World, lease, pool
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import lease_where, told

DWELL: Final = 12
"""Seconds for which a converted GPU keeps its mode."""
OPERATOR: Final = ("env", f"GPU_TENANCY_CONVERSION_DWELL={DWELL}s", sys.executable, "-m", "gpu_tenancy", "operator")
SLICE: Final = {"profile": "3g.40gb"}


@pytest.fixture(scope="module")
def world() -> Iterator[Living]:
    server = GpuServer("n1", gpus=2, convertible=(0, 1))
    yield from settled_world(_settle, (server,), drivers=True, operator_command=OPERATOR)


async def _settle(world: World) -> None:
    await world.create(pool(resources={"cpu": "1", "memory": "1Gi"}))
    await world.mining(2)


async def _node(world: World) -> Object:
    node = await world.get(resources.GPU_NODES, "n1")
    assert node is not None
    return node


async def _modes(world: World, *modes: str) -> None:
    """Wait until the GPUs have these modes, and none is fenced."""

    async def look() -> bool:
        gpus = sorted((await _node(world))["status"]["gpus"], key=lambda gpu: gpu["index"])
        return [gpu["mode"] for gpu in gpus] == list(modes) and not any(gpu.get("fenced") for gpu in gpus)

    await eventually(f"the modes {modes}", look)


@story
async def test_a_gpu_becomes_mig_for_a_lease_of_slices_and_whole_again_once_nobody_wants_them(world: World) -> None:
    gpus = (await _node(world))["status"]["gpus"]
    assert {(gpu["declared"], gpu["convertible"]) for gpu in gpus} == {("Whole", True)}
    await world.create(lease("slice", gpus=SLICE))
    waiting = await lease_where(world, "slice", "waiting", lambda one: "is being converted" in told(one, "Ready"))
    assert told(waiting, "Ready") == (
        "Position 1 in the queue: 1 GPU of n1 is being converted to MIG for it, which takes about 20 s."
    )
    ready = await world.ready("slice")
    await _modes(world, "Whole", "MIG")
    [hand_over] = ready["status"]["handOvers"]
    assert hand_over["record"]["scrubbedBytes"] > 0, hand_over
    await world.mining(2)
    spec = (await _node(world))["spec"]
    [wanted] = spec["modes"]
    assert (wanted["mode"], spec["conversions"]) == ("MIG", [wanted["since"]])

    await world.kill_operator()
    await world.start_operator()
    await world.operator_ready()
    await world.delete(resources.GPU_LEASES, "slice", "team-a")
    await _modes(world, "Whole", "Whole")
    miners = await world.mining(2)
    assert {device.count("-") for _, device in miners} == {1}
    spec = (await _node(world))["spec"]
    [back] = spec["modes"]
    assert len(spec["conversions"]) == 2
    lasted = datetime.fromisoformat(back["since"]) - datetime.fromisoformat(wanted["since"])
    assert lasted.total_seconds() >= DWELL
    _, metrics = await world.ask("/metrics")
    assert 'gpu_tenancy_largest_fit{model="A100-SXM4-80GB",profile="full"} 2.0' in metrics
