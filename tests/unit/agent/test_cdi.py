"""What a container gets: only the devices of its claim, however many there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gpu_tenancy.agent import cdi
from gpu_tenancy.agent import situation as known
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


def test_devices_of_one_request_bring_the_same_variables_in_any_order() -> None:
    world = serving()
    spec = cdi.spec(world.agent, claim(WHOLE_SLOT.device, SLICE.device))
    uuid = world.agent.held[SLICE.device].uuid
    variables = [
        "NVIDIA_VISIBLE_DEVICES=void",
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
    world.agent = known.made_ready(world.agent, SLICE.device, instance, EPOCH)
    devices = cdi.spec(world.agent, claim(SLICE.device, WHOLE_SLOT.device))["devices"]
    assert [device["containerEdits"]["deviceNodes"] for device in devices] == [
        [{"path": "/dev/nvidia-caps/nvidia-cap12"}],
        [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidiactl"}],
    ]
    assert "deviceNodes" not in cdi.spec(serving().agent, claim(SLICE.device))["devices"][0]["containerEdits"]


def test_the_file_is_there_after_writing_and_gone_after_removing(tmp_path: Path) -> None:
    spec = cdi.spec(serving().agent, claim(SLICE.device))
    cdi.write(tmp_path / "cdi", "c-1", spec)
    assert json.loads(cdi.path_of(tmp_path / "cdi", "c-1").read_text()) == spec
    cdi.remove(tmp_path / "cdi", "c-1")
    cdi.remove(tmp_path / "cdi", "c-1")
    assert list((tmp_path / "cdi").iterdir()) == []
