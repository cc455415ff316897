"""A node on which somebody else hands out the GPUs: nothing is planned there, and it is said who, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import binaries
from tests.cluster.eventually import eventually
from tests.cluster.world import condition_of
from tests.node import legacy_runtime
from tests.node.conftest import Living, living, story
from tests.node.gpu_site import GpuSite
from tests.node.site import TEAM, pod
from tests.node.test_hand_over import devices


@pytest.fixture(scope="module")
def here(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:  # noqa: ARG001
    """A node whose default runtime is NVIDIA's legacy one."""
    folder = tmp_path_factory.mktemp("runtime")
    runc = binaries.ensure(["runc-unconfined"])["runc-unconfined"]
    program = legacy_runtime.install(folder, runc)
    site = LegacySite(folder, program)
    yield from living(site)


class LegacySite(GpuSite):
    """The same as its parent, but for the runtime."""

    def __init__(self, folder: Path, program: Path) -> None:
        super().__init__("legacy", number=4, default_runtime=("nvidia", program))
        self._folder = folder

    async def start(self) -> None:
        """Bring everything up, with the danger in place."""
        await super().start()
        nodes = ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"]
        legacy_runtime.arm(self._folder, self.driver.edits(), self.driver.root / "dev", nodes)

    async def clear(self) -> None:
        """Nothing is left of the test; the fences are the point."""
        await self.control_plane.kubectl("delete", "gpul,pods", "--all", "-n", TEAM, "--wait=false")
        await eventually("no pods", self._no_pods)


@story
async def test_a_runtime_that_gives_gpus_to_whoever_asks_is_a_conflict_and_the_node_is_refused(
    here: LegacySite,
) -> None:
    body = pod("thief", "devices", "exit=0", nodeName=here.node.name)
    body["spec"]["containers"][0]["env"] = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    await here.create(body)
    await here.phase("thief", "Succeeded")
    assert len(devices(await here.node.logs(TEAM, "thief"))) == 1, "the stand-in is harmless: this test proves nothing"

    found = await here.node_condition("Conflict")
    assert (found["status"], found["reason"]) == ("True", "OtherOwner")
    assert "any pod that sets NVIDIA_VISIBLE_DEVICES would see all GPUs; make runc the default" in found["message"]
    assert (await here.gpu(0))["fenced"] == (await here.gpu(1))["fenced"] == list(range(8))

    await here.ask("train", "full")

    async def refused() -> str:
        ready = condition_of(await here.lease_of("train"), "Ready")
        return str(ready["message"]) if ready else ""

    assert await here.eventually("the lease to be looked at", refused)
    assert not (await here.slots())
