"""What goes wrong on real nodes, on demand: calls that fail or come late, lost GPUs, drivers that lack functions."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pynvml
import pytest

from tests.nvsim.library import library
from tests.nvsim.node import STATE, Node, SimulatorError
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.conftest import driver_of

THREE_G = 9


def test_the_first_fault_that_matches_wins_and_counts_its_calls(node: Node) -> None:
    broken = calls.gpu(2)
    with (
        node.fault("nvmlDeviceGetName", gpu=2, result=pynvml.NVML_ERROR_UNKNOWN, after=1, times=2) as fault,
        node.fault("nvmlDeviceGetName", result=pynvml.NVML_ERROR_TIMEOUT) as later,
    ):
        assert pynvml.nvmlDeviceGetName(broken)
        for _ in range(2):
            with pytest.raises(pynvml.NVMLError_Unknown):
                pynvml.nvmlDeviceGetName(broken)
        with pytest.raises(pynvml.NVMLError_Timeout):
            pynvml.nvmlDeviceGetName(broken)
        assert (fault.seen, later.seen) == (3, 1)
        assert pynvml.nvmlDeviceGetUUID(broken)
    assert pynvml.nvmlDeviceGetName(broken)


def test_a_slow_call_is_slow_and_does_not_hold_up_others(node: Node) -> None:
    with node.fault("nvmlDeviceGetHandleByUUID", delay_ms=1000) as fault:
        uuid = pynvml.nvmlDeviceGetUUID(calls.gpu())
        before = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            slow = threads.submit(pynvml.nvmlDeviceGetHandleByUUID, uuid)
            while not fault.seen:
                time.sleep(0.001)
            assert pynvml.nvmlDeviceGetName(calls.gpu(1))
            assert not slow.done()
        assert time.monotonic() - before >= 1.0


def test_a_gpu_instance_that_stays_in_use_for_a_while(node: Node) -> None:
    device = calls.in_mig_mode()
    instance = calls.create(device, THREE_G, Placement(0, 4))
    pynvml.nvmlComputeInstanceDestroy(calls.full_width(instance, 3))
    gi = pynvml.nvmlGpuInstanceGetInfo(instance).id
    with node.fault("nvmlGpuInstanceDestroy", gpu=0, gi=gi, result=pynvml.NVML_ERROR_IN_USE, times=2):
        for _ in range(2):
            with pytest.raises(pynvml.NVMLError_InUse):
                pynvml.nvmlGpuInstanceDestroy(instance)
        pynvml.nvmlGpuInstanceDestroy(instance)


def test_a_compute_instance_that_cannot_be_made_leaves_an_orphan(node: Node) -> None:
    device = calls.in_mig_mode()
    with node.fault("nvmlGpuInstanceCreateComputeInstance", result=pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES):
        instance = calls.create(device, THREE_G, Placement(0, 4))
        with pytest.raises(pynvml.NVMLError_InsufficientResources):
            calls.full_width(instance, 3)
    assert len(calls.instances(device)) == 1
    assert calls.mig_devices(device) == {}


def test_a_lost_gpu_answers_nothing_until_a_reboot_and_its_neighbours_do(node: Node) -> None:
    device, neighbour = calls.gpu(0), calls.gpu(1)
    node.lose(0)
    questions: tuple[Callable[[], object], ...] = (
        lambda: pynvml.nvmlDeviceGetName(device),
        lambda: pynvml.nvmlDeviceGetPowerUsage(device),
        lambda: calls.gpu(0),
        lambda: pynvml.nvmlDeviceSetMigMode(device, 1),
    )
    for ask in questions:
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            ask()
    assert pynvml.nvmlDeviceGetName(neighbour)
    with pytest.raises(SimulatorError):
        node.reset(0)
    node.reboot()
    assert pynvml.nvmlDeviceGetName(calls.gpu(0))


def test_errors_have_the_words_of_the_driver(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    instance = calls.create(device, THREE_G, Placement(0, 4))
    calls.full_width(instance, 3)
    with pytest.raises(pynvml.NVMLError_InUse, match="In use by another client"):
        pynvml.nvmlGpuInstanceDestroy(instance)
    with pytest.raises(pynvml.NVMLError_InsufficientResources, match="Insufficient Resources"):
        calls.create(device, THREE_G, Placement(0, 4))


def test_before_init_nothing_answers(node: Node) -> None:
    del node
    device = calls.gpu()
    pynvml.nvmlShutdown()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetName(device)
    pynvml.nvmlInit()


def test_initialisations_are_counted(node: Node) -> None:
    del node
    pynvml.nvmlInit()
    pynvml.nvmlShutdown()
    assert pynvml.nvmlDeviceGetCount() == 8


def test_a_driver_that_is_not_loaded(node: Node) -> None:
    pynvml.nvmlShutdown()
    node.set("driver_loaded", 0)
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
        pynvml.nvmlInit()
    node.set("driver_loaded", 1)
    pynvml.nvmlInit()


def test_without_a_node_there_is_no_driver(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml.nvmlShutdown()
    for nothing in ("/nonexistent", str(Path(__file__))):
        monkeypatch.setenv(STATE, nothing)
        with pytest.raises(pynvml.NVMLError_DriverNotLoaded):
            pynvml.nvmlInit()
    monkeypatch.setenv(STATE, str(node.path))
    pynvml.nvmlInit()


@pytest.mark.parametrize(
    "forged", [0, 1, 0x5A10_0000_0000_0000, 0x5A10_0FF0_0000_0001, 0x5A1F_F000_0000_0001, 2**64 - 1]
)
def test_a_handle_that_nobody_gave_is_an_invalid_argument(node: Node, forged: int) -> None:
    del node
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetName(ctypes.c_void_p(forged))


def _run(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )
    return done.stdout.strip() or done.stderr


def test_an_older_driver_lacks_a_function(node: Node) -> None:
    older = library(without=("nvmlDeviceGetTemperatureV", "nvmlDeviceGetSramEccErrorStatus"))
    script = """
import pynvml
pynvml.nvmlInit()
device = pynvml.nvmlDeviceGetHandleByIndex(0)
print(pynvml.nvmlDeviceGetTemperature(device, 0))
try:
    pynvml.nvmlDeviceGetTemperatureV(device, 0)
except pynvml.NVMLError_FunctionNotFound as error:
    print(error)
"""
    assert _run(script, {**node.environment, "LD_LIBRARY_PATH": str(older.parent)}).split("\n") == [
        "33",
        "Function Not Found",
    ]


def test_without_a_library_nvidia_ml_py_says_so(tmp_path: Path) -> None:
    script = """
import pynvml
try:
    pynvml.nvmlInit()
except pynvml.NVMLError_LibraryNotFound as error:
    print(error)
"""
    assert _run(script, {"LD_LIBRARY_PATH": str(tmp_path)}) == "NVML Shared Library Not Found"


def test_what_there_is_not_is_refused_by_the_hand(node: Node, tmp_path: Path) -> None:
    for refused in (
        lambda: node.set("colour", 1),
        lambda: node.set("lost", 1, gpu=8),
        lambda: node.end_process(1),
        lambda: node.xid(8, 79),
        lambda: Node(tmp_path / "nowhere").reboot(),
        lambda: Node.create(tmp_path / "other", board="NVIDIA Voodoo2"),
    ):
        with pytest.raises(SimulatorError, match="there is no"):
            refused()


def test_the_number_of_gpus_is_not_to_be_set(node: Node) -> None:
    with pytest.raises(SimulatorError):
        node.set("gpu_count", 100)


@pytest.mark.parametrize(("board", "told"), [("NVIDIA A100-SXM4-80GB", False), ("NVIDIA H100 80GB HBM3", True)])
def test_hopper_tells_its_profiles_whatever_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: str, told: bool
) -> None:
    with driver_of(Node.create(tmp_path / "node", board=board), monkeypatch):
        if told:
            assert pynvml.nvmlDeviceGetGpuInstanceProfileInfo(calls.gpu(), 0).sliceCount == 1
        else:
            with pytest.raises(pynvml.NVMLError_NotSupported):
                pynvml.nvmlDeviceGetGpuInstanceProfileInfo(calls.gpu(), 0)
