"""`gpu-tenancy plan` on a real control plane: it says what the operator then does, and changes nothing itself."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from gpu_tenancy.kube import resources
from tests.cluster.api import Object
from tests.cluster.world import GpuServer, World, lease
from tests.integration.conftest import Living, settled_world, story
from tests.integration.looks import reported

WHOLE: Final = {"profile": "full"}
WAITS: Final = 3


@pytest.fixture(scope="module")
def living_world() -> Iterator[Living]:
    yield from settled_world(reported, (GpuServer("n1", gpus=2),))


@pytest.fixture
def world(living_world: Living) -> Iterator[Living]:
    yield living_world
    living_world.run(_clear(living_world.world))


async def _clear(world: World) -> None:
    await world.kubectl("delete", "gpuleases", "--all", "--all-namespaces")


async def planned(*words: object) -> tuple[int, dict[str, Any]]:
    """Exit status and answer of the command."""
    command = (sys.executable, "-m", "gpu_tenancy", "plan", *map(str, words), "--output", "json")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(out)


def written(path: Path, *bodies: Object) -> Path:
    path.write_text(yaml.safe_dump_all(bodies))
    return path


async def versions(world: World) -> dict[str, str]:
    """The generation, or version, of everything of ours; of what agents and operator report nothing."""
    found = {}
    for kind in resources.OWN_KINDS:
        for body in await world.items(kind):
            metadata = body["metadata"]
            found[metadata["uid"]] = f"{kind.kind} {metadata['name']} {metadata.get('generation')}"
    return found


@story
async def test_it_says_what_the_operator_then_does_and_writes_nothing(world: World, tmp_path: Path) -> None:
    kubeconfig = world.control_plane.kubeconfig
    wanted = [lease("fits", gpus=WHOLE), lease("waits", gpus={**WHOLE, "count": 2})]
    files = written(tmp_path / "leases.yaml", *wanted)
    before = await versions(world)
    status, found = await planned(files, "--kubeconfig", kubeconfig, "--save", tmp_path / "cluster.json")
    assert await versions(world) == before, "it has written something"
    assert await world.items(resources.GPU_LEASES) == []
    assert status == WAITS
    fits, waits = found["leases"]
    assert (fits["verdict"], waits["verdict"]) == ("Placed", "Waits")
    status, again = await planned(files, "--snapshot", tmp_path / "cluster.json")
    assert status == WAITS
    assert [one["message"] for one in again["leases"]] == [one["message"] for one in found["leases"]]

    for body in wanted:
        await world.create(body)
    placed = await world.condition("fits", "Ready", "True", "Ready")
    queued = await world.condition("waits", "Ready", "False", "Queued")
    assert placed["status"]["nodes"] == ["n1"]
    told = next(one["message"] for one in queued["status"]["conditions"] if one["type"] == "Ready")
    assert told.split(". There will be")[0].rstrip(".") == waits["message"].split(". There will be")[0].rstrip(".")


@story
async def test_an_api_server_that_is_not_there_is_a_sentence(world: World, tmp_path: Path) -> None:
    files = written(tmp_path / "leases.yaml", lease("one", gpus=WHOLE))
    config = yaml.safe_load(world.control_plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "nowhere").write_text(yaml.safe_dump(config))
    command = (sys.executable, "-m", "gpu_tenancy", "plan", str(files), "--kubeconfig", str(tmp_path / "nowhere"))
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert process.returncode == 2
    assert "the cluster cannot be listed" in err.decode()
    assert "Traceback" not in err.decode()
