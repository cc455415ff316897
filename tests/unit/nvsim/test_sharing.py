"""Several processes see one node, and whichever of them is killed at whatever instruction, the others see it whole."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pynvml
import pytest

from tests.nvsim.node import STATE, Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement

SPAWN = multiprocessing.get_context("spawn")


def _make_and_destroy(path: Path, gpu: int) -> None:
    """For ever: two slices, their compute instances, and everything away again."""
    os.environ[STATE] = str(path)
    _loaded()
    while True:
        device = calls.gpu(gpu)
        for profile, place, slices in ((9, Placement(0, 4), 3), (14, Placement(4, 2), 2)):
            with suppress(pynvml.NVMLError):
                calls.full_width(calls.create(device, profile, place), slices)
        _clear(gpu)


def _loaded() -> None:
    import ctypes  # noqa: PLC0415  (in the child only)

    from tests.nvsim.library import library  # noqa: PLC0415

    ctypes.CDLL(str(library()))
    pynvml.nvmlInit()


def _clear(gpu: int) -> None:
    """As an agent would after a restart: what is there, whole or half, goes."""
    device = calls.gpu(gpu)
    for instance in calls.instances(device).values():
        for mig in calls.mig_devices(device).values():
            with suppress(pynvml.NVMLError):
                if pynvml.nvmlDeviceGetGpuInstanceId(mig) == pynvml.nvmlGpuInstanceGetInfo(instance).id:
                    number = pynvml.nvmlDeviceGetComputeInstanceId(mig)
                    compute = pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, number)
                    pynvml.nvmlComputeInstanceDestroy(compute)
        pynvml.nvmlGpuInstanceDestroy(instance)


def test_what_one_process_does_another_sees(node: Node) -> None:
    device = calls.in_mig_mode()
    child = SPAWN.Process(target=_make_one, args=(node.path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    [instance] = calls.instances(device).values()
    assert pynvml.nvmlGpuInstanceGetInfo(instance).placement.start == 4
    assert len(calls.mig_devices(device)) == 1


def _make_one(path: Path) -> None:
    os.environ[STATE] = str(path)
    _loaded()
    calls.full_width(calls.create(calls.gpu(), 9, Placement(4, 4)), 3)


def test_a_process_killed_at_any_instruction_leaves_the_node_whole(node: Node) -> None:
    calls.in_mig_mode(0)
    for round_ in range(12):
        child = SPAWN.Process(target=_make_and_destroy, args=(node.path, 0))
        child.start()
        _first_work(node)
        time.sleep(0.003 * (round_ % 4) + 0.0007 * round_)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        # Nobody waits for a lock that the dead one had, and what it left can be named and taken away.
        _clear(0)
        assert calls.instances(calls.gpu()) == {}
        assert pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(calls.gpu(), 0) == 1


def _first_work(node: Node) -> None:
    """Wait until the child has made something."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(calls.gpu(), 0) == 0:
            return
        time.sleep(0.001)
    pytest.fail(f"the child has made nothing on {node.path}")


def test_a_child_made_by_fork_has_a_lock_of_its_own(node: Node) -> None:
    calls.in_mig_mode(0)
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            for _ in range(200):
                instance = calls.create(calls.gpu(), 9, Placement(0, 4))
                pynvml.nvmlGpuInstanceDestroy(instance)
            code = 0
        os._exit(code)
    for _ in range(200):
        instance = calls.create(calls.gpu(), 9, Placement(4, 4))
        pynvml.nvmlGpuInstanceDestroy(instance)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert calls.instances(calls.gpu()) == {}
    assert node.get("generation", gpu=0) == 2


def test_one_process_controls_several_nodes(node: Node, tmp_path: Path) -> None:
    other = Node.create(tmp_path / "other", gpus=2, seed=7)
    assert other.boot_id != node.boot_id
    other.set("celsius", 80, gpu=0)
    assert pynvml.nvmlDeviceGetTemperature(calls.gpu(), 0) == 33
    node.set("celsius", 50, gpu=0)
    assert pynvml.nvmlDeviceGetTemperature(calls.gpu(), 0) == 50
    assert other.get("celsius", gpu=0) == 80


def test_a_node_made_anew_under_its_name_is_the_one_that_is_controlled(tmp_path: Path) -> None:
    path = tmp_path / "node"
    Node.create(path).set("celsius", 70, gpu=0)
    assert Node.create(path).get("celsius", gpu=0) == 33
