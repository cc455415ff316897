"""nvidia-smi: what it lists, and the one thing that NVML cannot do, a reset."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pynvml
import pytest

from tests.nvsim.library import driver
from tests.nvsim.node import Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.client import Client


def smi(node: Node, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines."""
    done = subprocess.run(
        [driver() / "nvidia-smi", *arguments],
        env={**os.environ, **node.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_it_lists_gpus_and_mig_devices(node: Node) -> None:
    calls.in_mig_mode(1)
    made = [
        (calls.create(calls.gpu(1), profile, Placement(start, size)), slices)
        for profile, start, size, slices in ((9, 0, 4, 3), (19, 4, 1, 1))
    ]
    for instance, slices in made:
        calls.full_width(instance, slices)
    migs = [pynvml.nvmlDeviceGetUUID(one) for one in calls.mig_devices(calls.gpu(1)).values()]
    code, lines = smi(node, "-L")
    assert code == 0
    assert lines[0] == f"GPU 0: NVIDIA A100-SXM4-80GB (UUID: {pynvml.nvmlDeviceGetUUID(calls.gpu(0))})"
    assert lines[2:4] == [
        f"  MIG 3g.40gb     Device  0: (UUID: {migs[0]})",
        f"  MIG 1g.10gb     Device  1: (UUID: {migs[1]})",
    ]
    assert len(lines) == 10
    node.lose(0)
    code, lines = smi(node, "-L")
    assert code == 15
    assert lines[0].startswith("Unable to determine the device handle for GPU 0000:07:00.0: GPU is lost.")


def test_it_resets_gpus_by_index_uuid_and_address(node: Node) -> None:
    before = [node.get("generation", index) for index in range(8)]
    uuid = pynvml.nvmlDeviceGetUUID(calls.gpu(3))
    assert smi(node, "--gpu-reset", "-i", f"1,{uuid},0000:90:00.0") == (
        0,
        [f"GPU 00000000:{bus}:00.0 was successfully reset." for bus in ("0F", "4E", "90")] + ["All done."],
    )
    reset = [node.get("generation", index) - before[index] for index in range(8)]
    assert reset == [0, 1, 0, 1, 0, 1, 0, 0]


def test_a_reset_makes_a_pending_mode_real_and_leaves_memory_as_it_is(node: Node) -> None:
    node.set("mig_reset_required", 1, gpu=0)
    node.plant(0, 0x5EC12E7D)
    pynvml.nvmlDeviceSetMigMode(calls.gpu(), 1)
    assert smi(node, "-r", "-i", "0")[0] == 0
    assert pynvml.nvmlDeviceGetMigMode(calls.gpu()) == [1, 1]
    assert {row.pattern for row in node.residue(0)} == {0x5EC12E7D}


def test_a_gpu_in_use_is_not_reset_and_persistence_mode_is_a_use(node: Node) -> None:
    pynvml.nvmlDeviceSetPersistenceMode(calls.gpu(1), 1)
    with Client(node) as client:
        client.begin()
        code, lines = smi(node, "--gpu-reset", "--id=0,1,2")
        assert code == 255
        assert lines[:4] == [
            "GPU 00000000:47:00.0 was successfully reset.",
            "The following GPUs could not be reset:",
            "  GPU 00000000:07:00.0: In use by another client",
            "  GPU 00000000:0F:00.0: In use by another client",
        ]
        assert lines[5].startswith("2 devices are currently being used by one or more other processes")
    assert smi(node, "-r", "-i", "0")[0] == 0
    pynvml.nvmlDeviceSetPersistenceMode(calls.gpu(1), 0)
    assert smi(node, "-r", "-i", "1")[0] == 0


@pytest.mark.parametrize(("field", "code", "why"), [("reset_refused", 3, "Not Supported"), ("lost", 15, "GPU is lost")])
def test_a_reset_that_cannot_be_says_why(node: Node, field: str, code: int, why: str) -> None:
    node.set(field, 1, gpu=0)
    assert smi(node, "-r", "-i", "0") == (
        code,
        ["The following GPUs could not be reset:", f"  GPU 00000000:07:00.0: {why}"],
    )
    assert smi(node, "-r", "-i", "1", NVSIM_UNPRIVILEGED="1")[0] == 4


def test_a_reset_suffers_faults(node: Node) -> None:
    with node.fault("gpu-reset", gpu=0, result=pynvml.NVML_ERROR_UNKNOWN, times=1) as fault:
        assert smi(node, "-r", "-i", "0,1")[0] == pynvml.NVML_ERROR_UNKNOWN & 0xFF
        assert smi(node, "-r", "-i", "0")[0] == 0
        assert fault.seen == 1


def test_what_is_not_there_it_does_not_find(node: Node, tmp_path: Path) -> None:
    for unknown in ("8", "GPU-nonsense", "0000:ff:00.0", "0,8", ""):
        assert smi(node, "-r", "-i", unknown) == (6, ["No devices were found"])
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert smi(node, "-L", NVSIM_DEV=str(tmp_path / "dev")) == (6, ["No devices were found"])
    for gone in ({"NVSIM_STATE": "/nonexistent"}, {"NVSIM_DEV": str(tmp_path)}):
        code, lines = smi(node, "-L", **gone)
        assert code == 9
        assert lines[0].startswith("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")


def test_what_it_does_not_know_it_says(node: Node) -> None:
    assert smi(node, "--version")[1][2] == "DRIVER version      : 570.148.08"
    for unknown in ((), ("-q",), ("-L", "-r"), ("-i", "0"), ("-L", "-i", "0"), ("-r", "-i")):
        code, lines = smi(node, *unknown)
        assert code == 2
        assert "--gpu-reset" in lines[0]
