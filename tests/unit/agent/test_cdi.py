"""What a container gets: only the devices of its claim, however many there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_tenancy.agent import cdi
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import PreparedClaim, PreparedDevice
from gpu_tenancy.mig.profiles import FULL
from tests.unit.agent.world import EPOCH, MIG_GPU, WHOLE, World, slot

WHOLE_SLOT = slot(WHOLE, FULL, 0, 1)
SLICE = slot(MIG_GPU, "3g.40gb", 4, 1)


def claim(*devices: str, requests: tuple[str, ...] = ("gpus",)) -> PreparedClaim:
    prepared = tuple(PreparedDevice(device=device, requests=requests) for device in devices)
    return PreparedClaim(uid="c-1", namespace="team-1", name="train", devices=prepared)


def serving() -> World:
    world = World()
    world.specify([WHOLE_SLOT, SLICE])
    world.settle()
    return world


def spec_of(
    world: World,
    claim: PreparedClaim,
    driver: cdi.DriverPart = cdi.NO_DRIVER,
    dev_root: str = "/",
) -> dict[str, Any]:
    return cdi.spec(world.agent, claim, driver, Path("/state/claims/c-1"), Path(dev_root))


def test_devices_of_one_request_bring_the_same_variables_in_any_order() -> None:
    world = serving()
    spec = spec_of(world, claim(WHOLE_SLOT.device, SLICE.device))
    uuid = world.agent.held[SLICE.device].uuid
    variables = [
        f"GPU_TENANCY_DEVICE={WHOLE_SLOT.device},{SLICE.device}",
        f"GPU_TENANCY_UUID={WHOLE},{uuid}",
    ]
    assert [device["containerEdits"]["env"] for device in spec["devices"]] == [variables, variables]
    assert spec["kind"] == "gpu-tenancy.dev/device"
    names = [device["name"] for device in spec["devices"]]
    assert [f"{spec['kind']}={name}" for name in names] == [
        cdi.device_id(claim(), WHOLE_SLOT.device),
        cdi.device_id(claim(), SLICE.device),
    ]


def test_device_nodes_are_those_of_the_instance_and_never_of_its_gpu() -> None:
    world = World()
    gpus = [replace(gpu, nodes=("/dev/nvidia0", "/dev/nvidiactl")) for gpu in world.agent.gpus.values()]
    world.agent = known.listed(world.agent, gpus)
    world.specify([WHOLE_SLOT, SLICE])
    world.settle()
    instance = replace(next(iter(world.hardware.values())), nodes=("/dev/nvidia-caps/nvidia-cap12",))
    world.agent = known.partitioned(world.agent, SLICE.device, instance, EPOCH)
    devices = spec_of(world, claim(SLICE.device, WHOLE_SLOT.device))["devices"]
    assert [device["containerEdits"]["deviceNodes"] for device in devices] == [
        [{"path": "/dev/nvidia-caps/nvidia-cap12"}],
        [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidiactl"}],
    ]
    assert "deviceNodes" not in spec_of(serving(), claim(SLICE.device))["devices"][0]["containerEdits"]


def test_a_driver_that_is_elsewhere_on_the_host_is_named_to_the_runtime() -> None:
    world = World()
    gpus = [replace(gpu, nodes=("/dev/nvidia0",)) for gpu in world.agent.gpus.values()]
    world.agent = known.listed(world.agent, gpus)
    world.specify([WHOLE_SLOT])
    world.settle()
    edits = spec_of(world, claim(WHOLE_SLOT.device), dev_root="/driver")["devices"][0]["containerEdits"]
    assert edits["deviceNodes"] == [{"path": "/dev/nvidia0", "hostPath": "/driver/dev/nvidia0"}]


def test_every_container_of_a_claim_gets_the_drivers_files_and_the_mark_of_the_claim() -> None:
    library = {"hostPath": "/usr/lib/libcuda.so.1", "containerPath": "/usr/lib/libcuda.so.1", "options": ["ro"]}
    driver = {"env": ["NVIDIA_CTK=1"], "mounts": [library], "hooks": [{"hookName": "createContainer"}]}
    edits = spec_of(serving(), claim(SLICE.device), cdi.DriverPart(driver))["containerEdits"]
    assert edits["env"] == ["NVIDIA_CTK=1", "NVIDIA_VISIBLE_DEVICES=void"]
    assert edits["hooks"] == driver["hooks"]
    assert [(one["hostPath"], one["containerPath"]) for one in edits["mounts"]] == [
        ("/usr/lib/libcuda.so.1", "/usr/lib/libcuda.so.1"),
        ("/state/claims/c-1", "/run/gpu-tenancy/claims/c-1"),
    ]


def test_the_file_says_the_newer_of_the_two_cdi_versions() -> None:
    for driver, said in (("0.5.0", "0.6.0"), ("0.6.0", "0.6.0"), ("0.10.0", "0.10.0")):
        spec = spec_of(serving(), claim(SLICE.device), cdi.DriverPart({}, driver))
        assert spec["cdiVersion"] == said


def files(tmp_path: Path) -> cdi.ClaimFiles:
    return cdi.ClaimFiles(AgentSettings(cdi_root=tmp_path / "cdi", state_dir=tmp_path / "state"), cdi.NO_DRIVER)


def test_the_file_is_there_after_writing_and_gone_after_removing(tmp_path: Path) -> None:
    here = files(tmp_path)
    here.write(serving().agent, claim(SLICE.device))
    there = json.loads(cdi.path_of(tmp_path / "cdi", "c-1").read_text())
    assert Path(there["containerEdits"]["mounts"][0]["hostPath"]).is_dir()
    here.remove("c-1")
    here.remove("c-1")
    assert list((tmp_path / "cdi").iterdir()) == list((tmp_path / "state" / "claims").iterdir()) == []


def test_what_killed_agents_left_of_claims_is_removed_and_what_is_prepared_stays(tmp_path: Path) -> None:
    here, world = files(tmp_path), serving()
    for uid in ("c-1", "c-2", "c-3"):
        here.write(world.agent, claim(SLICE.device).model_copy(update={"uid": uid}))
    cdi.path_of(tmp_path / "cdi", "c-3").unlink()
    (tmp_path / "cdi" / "nvidia.json").write_text("{}")
    here.remove_all_but({"c-1"})
    assert {one.name for one in (tmp_path / "cdi").iterdir()} == {"gpu-tenancy.dev-claim_c-1.json", "nvidia.json"}
    assert [one.name for one in (tmp_path / "state" / "claims").iterdir()] == ["c-1"]
