"""NVML behind the `Gpus` Protocol, beyond what every backend must do: its traps, its faults, its device nodes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import stat
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pynvml
import pytest

from gpu_tenancy.agent import nvml
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.gpus import GpuError, GpuLost, InsufficientResources, InUse
from gpu_tenancy.agent.nvml import NvmlGpus, calls, model_name, profiles
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.api.node import GpuMode, Slot
from gpu_tenancy.mig.profiles import of_model
from tests.nvsim.library import SMI, driver, library
from tests.nvsim.node import STATE, Node
from tests.unit.agent.world import EPOCH, holder, instance

T = TypeVar("T")

PROFILES = ("nvmlDeviceGetGpuInstanceProfileInfo*", "nvmlGpuInstanceGetComputeInstanceProfileInfo*")
"""The calls that ask for profiles."""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node of two A100; the second is in MIG mode."""
    one = Node.create(tmp_path / "node", gpus=2)
    one.set("mig_current", 1, gpu=1)
    one.set("mig_pending", 1, gpu=1)
    monkeypatch.setenv(STATE, str(one.path))
    ctypes.CDLL(str(library()))
    return one


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The host's file system."""
    folder = tmp_path / "host"
    folder.mkdir()
    return folder


@pytest.fixture
def gpus(node: Node, root: Path) -> Iterator[NvmlGpus]:
    """Its GPUs through NVML."""
    del node
    one = NvmlGpus.open(root=root)
    yield one
    one.close()


def run(call: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(call)


def uuid_of(index: int) -> str:
    uuid: str = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
    return uuid


# --- facts --------------------------------------------------------------------------------------------------------


def test_what_a_gpu_is(gpus: NvmlGpus, root: Path) -> None:
    (root / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (root / "dev" / name).touch()
    first, second = run(gpus.list())
    assert (first.index, first.model, first.memory_mib, first.multiprocessors) == (0, "A100-SXM4-80GB", 81920, 108)
    assert (first.mode, first.healthy, first.pci_bus_id) == (GpuMode.WHOLE, True, "0000:07:00.0")
    assert first.nodes == ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm")
    assert (second.mode, second.nodes) == (GpuMode.MIG, ("/dev/nvidiactl", "/dev/nvidia-uvm"))


@pytest.mark.parametrize(
    ("name", "model", "narrowest"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB", "1g.5gb"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB", "1g.5gb"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe", "1g.10gb"),
        ("A100-SXM4-80GB", "A100-SXM4-80GB", "1g.10gb"),
    ],
)
def test_a_model_has_a_name_that_the_geometry_knows(name: str, model: str, narrowest: str) -> None:
    assert model_name(name) == model
    assert next(iter(of_model(model))) == narrowest


def test_a_gpu_that_does_not_answer_holds_up_nobody(
    gpus: NvmlGpus, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(gpus.list())
    monkeypatch.setattr(nvml, "ANSWER_SECONDS", 0.05)
    with node.fault("nvmlDeviceGetName", gpu=0, delay_ms=1000, times=1) as fault:
        for _ in range(3):
            first, second = run(gpus.list())
            assert (first.healthy, second.healthy) == (False, True)
            assert "GPU 0 has not answered" in first.message
        assert fault.seen == 1  # nothing is asked of it again before it has answered
        monkeypatch.setattr(nvml, "ANSWER_SECONDS", 30.0)
        before = time.monotonic()
        assert [one.healthy for one in run(gpus.list())] == [False, True]
        assert time.monotonic() - before < 0.5  # it was waited for once
        wait(tuple(gpus._asked.values()))
        node.lose(0)
        assert [one.healthy for one in run(gpus.list())] == [False, True]  # the late answer is not the present


def test_overlapping_lists_in_one_loop_after_another(gpus: NvmlGpus) -> None:
    async def twice() -> list[int]:
        return [len(one) for one in await asyncio.gather(gpus.list(), gpus.list())]

    assert [run(twice()), run(twice())] == [[2, 2], [2, 2]]


def test_a_count_that_fails_is_a_sentence(gpus: NvmlGpus, node: Node) -> None:
    with (
        node.fault("nvmlDeviceGetCount_v2", result=pynvml.NVML_ERROR_UNKNOWN),
        pytest.raises(GpuError, match="the GPUs of this node: "),
    ):
        run(gpus.list())


HANGS = """
import asyncio, time, pynvml
from gpu_tenancy.agent.nvml import NvmlGpus
pynvml.nvmlInit = pynvml.nvmlShutdown = lambda: None
pynvml.nvmlDeviceGetCount = lambda: time.sleep(60)
gpus = NvmlGpus.open()
try:
    asyncio.run(asyncio.wait_for(gpus.list(), 0.1))
except TimeoutError:
    gpus.close()
"""


def test_the_process_can_exit_while_a_call_hangs() -> None:
    subprocess.run([sys.executable, "-c", HANGS], check=True, timeout=20)


def test_devices_that_nobody_knows_share_a_thread(gpus: NvmlGpus) -> None:
    for number in range(5):
        run(gpus.processes(f"MIG-{number}"))
    assert set(gpus._threads) == {"devices"}


def test_a_lost_gpu_is_told_of_as_it_was(gpus: NvmlGpus, node: Node) -> None:
    before, _ = run(gpus.list())
    node.lose(0)
    after, _ = run(gpus.list())
    assert (after.uuid, after.healthy) == (before.uuid, False)
    assert after.message == "GPU 0: GPU is lost; reset the GPU or reboot the node"


@pytest.mark.parametrize(
    ("action", "sound", "reset"), [(0, True, False), (1, False, True), (2, False, False), (4, True, False)]
)
def test_what_the_driver_asks_for_shows_in_the_list_whoever_heard_its_xid(
    gpus: NvmlGpus, node: Node, action: int, sound: bool, reset: bool
) -> None:
    """Draining (4) is for the next hand-over to see: who is served goes on."""
    node.set("recovery_action", action, gpu=1)
    first, second = run(gpus.list())
    assert (first.healthy, first.needs_reset) == (True, False)
    assert (second.healthy, second.needs_reset) == (sound, reset)
    assert bool(second.message) is not sound


def test_a_gpu_that_never_said_what_it_is_is_left_out(gpus: NvmlGpus, node: Node) -> None:
    node.lose(0)
    assert [one.index for one in run(gpus.list())] == [1]


def test_without_library_or_driver_a_sentence_says_what_to_do(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.set("driver_loaded", 0)
    with pytest.raises(GpuError, match=r"NVML cannot be initialised: .*is NVIDIA's kernel module loaded\?"):
        NvmlGpus.open()

    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    with pytest.raises(GpuError, match=r"no libnvidia-ml\.so\.1; install NVIDIA's driver"):
        NvmlGpus.open()


# --- instances ----------------------------------------------------------------------------------------------------


def test_a_compute_instance_that_fails_leaves_nothing_behind(gpus: NvmlGpus, node: Node) -> None:
    with (
        node.fault("nvmlGpuInstanceCreateComputeInstance", result=pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES),
        pytest.raises(InsufficientResources, match=r"MIG instance 3g\.40gb at memory slice 4"),
    ):
        run(gpus.create(uuid_of(1), "3g.40gb", 4))
    assert list(run(gpus.instances(uuid_of(1)))) == []
    run(gpus.create(uuid_of(1), "3g.40gb", 4))


def test_an_instance_without_a_compute_instance_is_found_and_taken_away(gpus: NvmlGpus) -> None:
    device = pynvml.nvmlDeviceGetHandleByIndex(1)
    pynvml.nvmlDeviceCreateGpuInstance(device, 9)
    [orphan] = run(gpus.instances(uuid_of(1)))
    assert (orphan.profile, orphan.uuid, orphan.compute_instance) == ("3g.40gb", "", None)
    run(gpus.destroy(orphan))
    assert list(run(gpus.instances(uuid_of(1)))) == []


def test_an_id_that_another_has_got_meanwhile_is_not_touched(gpus: NvmlGpus) -> None:
    gone = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    run(gpus.destroy(gone))
    other = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    assert other.gpu_instance == gone.gpu_instance
    run(gpus.destroy(gone))
    assert list(run(gpus.instances(uuid_of(1)))) == [other]


def test_a_destroy_that_is_refused_halfway_is_taken_up_again(gpus: NvmlGpus, node: Node) -> None:
    made = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    with node.fault("nvmlGpuInstanceDestroy", result=pynvml.NVML_ERROR_IN_USE, times=1):
        with pytest.raises(InUse, match="In use by another client; stop what uses it, DCGM among others"):
            run(gpus.destroy(made))
        [left] = run(gpus.instances(uuid_of(1)))
        assert left.uuid == ""
        run(gpus.destroy(made))
    assert list(run(gpus.instances(uuid_of(1)))) == []


def test_an_orphan_that_has_got_the_id_is_somebody_elses(gpus: NvmlGpus) -> None:
    gone = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    run(gpus.destroy(gone))
    made = pynvml.nvmlDeviceCreateGpuInstance(pynvml.nvmlDeviceGetHandleByIndex(1), 9)
    [orphan] = run(gpus.instances(uuid_of(1)))
    same = replace(gone, start=orphan.start, gpu_instance=pynvml.nvmlGpuInstanceGetInfo(made).id)
    run(gpus.destroy(same))
    run(gpus.destroy(replace(orphan, start=orphan.start ^ 4)))
    run(gpus.destroy(replace(orphan, profile="4g.40gb")))
    assert list(run(gpus.instances(uuid_of(1)))) == [orphan]


def test_an_instance_that_somebody_else_divided_is_seen_and_left(gpus: NvmlGpus) -> None:
    made = pynvml.nvmlDeviceCreateGpuInstance(pynvml.nvmlDeviceGetHandleByIndex(1), 9)
    shape = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(made, 0, 0)
    pynvml.nvmlGpuInstanceCreateComputeInstance(made, shape.id)
    [found] = run(gpus.instances(uuid_of(1)))
    assert (found.uuid[:4], found.compute_instance) == ("MIG-", 0)
    with pytest.raises(GpuError, match="somebody else divided it"):
        run(gpus.destroy(found))
    assert list(run(gpus.instances(uuid_of(1)))) == [found]


@pytest.mark.parametrize("call", ["instances", "destroy"])
@pytest.mark.parametrize("known", [False, True], ids=["at-first", "later"])
def test_a_stale_handle_is_not_taken_for_no_instances(
    gpus: NvmlGpus, node: Node, root: Path, call: str, known: bool
) -> None:
    made = run(NvmlGpus(root=root).create(uuid_of(1), "3g.40gb", 4))  # Which tells `gpus` of no profiles.
    if known:
        run(gpus.instances(made.gpu))
    ask = (lambda: gpus.instances(made.gpu)) if call == "instances" else (lambda: gpus.destroy(made))
    symbols = PROFILES if not known else ("nvmlDeviceGetGpuInstances", "nvmlDeviceGetGpuInstanceById")
    with ExitStack() as faults:
        for symbol in symbols:
            faults.enter_context(node.fault(symbol, result=pynvml.NVML_ERROR_INVALID_ARGUMENT))
        with pytest.raises(GpuError, match="Invalid Argument"):
            run(asyncio.wait_for(ask(), 5))


def test_a_profile_that_is_not_listed_is_a_sentence(gpus: NvmlGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    device = pynvml.nvmlDeviceGetHandleByIndex(1)
    info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, pynvml.NVML_GPU_INSTANCE_PROFILE_1_SLICE)
    made = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "profiles_of", lambda _: iter((info,)))
        fresh = NvmlGpus()
        with pytest.raises(GpuError, match="which its GPU does not list"):
            run(asyncio.wait_for(fresh.destroy(made), 5))
    run(fresh.destroy(made))  # It was asked anew.
    assert list(run(gpus.instances(made.gpu))) == []


def test_profiles_are_asked_once(gpus: NvmlGpus, node: Node) -> None:
    run(gpus.create(uuid_of(1), "3g.40gb", 4))
    first = run(gpus.instances(uuid_of(1)))
    with node.fault(PROFILES[0]) as of_gpu, node.fault(PROFILES[1]) as of_instance:
        second = run(gpus.instances(uuid_of(1)))
        run(gpus.destroy(second[0]))
        run(gpus.create(uuid_of(1), "3g.40gb", 4))
        assert (of_gpu.seen, of_instance.seen) == (0, 0)
    assert first == second


@pytest.mark.parametrize("how", ["reset", "mode", "mode-by-others"])
def test_profiles_are_asked_anew_when_they_may_be_others(node: Node, root: Path, how: str) -> None:
    gpus = NvmlGpus.open(root=root, nvidia_smi=str(driver() / SMI))
    gpu = uuid_of(1)
    run(gpus.destroy(run(gpus.create(gpu, "3g.40gb", 4))))
    if how == "reset":
        run(gpus.reset(gpu))
    for mode in (GpuMode.WHOLE, GpuMode.MIG):
        if how == "mode":
            assert run(gpus.set_mode(gpu, mode))
        elif how == "mode-by-others":
            assert pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(1), int(mode is GpuMode.MIG)) == 0
            run(gpus.instances(gpu))
    with node.fault(PROFILES[0]) as of_gpu, node.fault(PROFILES[1]) as of_instance:
        run(gpus.create(gpu, "3g.40gb", 4))
        assert of_instance.seen == 1
        if how != "mode-by-others":  # There the look in the new mode has asked already.
            assert of_gpu.seen > 1
    gpus.close()


def test_a_clean_up_that_fails_does_not_hide_why(gpus: NvmlGpus, node: Node) -> None:
    with (
        node.fault("nvmlGpuInstanceCreateComputeInstance", result=pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES),
        node.fault("nvmlGpuInstanceDestroy", result=pynvml.NVML_ERROR_IN_USE),
        pytest.raises(InsufficientResources),
    ):
        run(gpus.create(uuid_of(1), "3g.40gb", 4))


@pytest.mark.parametrize(("capability", "cores", "count"), [((8, 0), 6912, 108), ((8, 6), 10752, 84)])
def test_cores_per_multiprocessor_hang_on_the_minor_number_too(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cores: int, count: int
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _: list(capability))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetNumGpuCores", lambda _: cores)
    assert calls.multiprocessors_of(None) == count


def test_without_privileges_a_sentence_says_what_to_do(gpus: NvmlGpus, node: Node) -> None:
    node.set("unprivileged", 1)
    with pytest.raises(GpuError, match="the agent must run as root in a privileged pod"):
        run(gpus.create(uuid_of(1), "3g.40gb", 4))


def test_a_gpu_that_is_not_there_is_lost(gpus: NvmlGpus) -> None:
    with pytest.raises(GpuLost, match="there is no GPU GPU-elsewhere on this node"):
        run(gpus.instances("GPU-elsewhere"))
    assert list(run(gpus.processes("MIG-elsewhere"))) == []


def test_a_whole_gpu_has_no_instances(gpus: NvmlGpus) -> None:
    assert list(run(gpus.instances(uuid_of(0)))) == []


def test_the_capabilities_of_an_instance_are_among_its_device_nodes(gpus: NvmlGpus, root: Path) -> None:
    made = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    gi = made.gpu_instance
    table = root / "proc/driver/nvidia-caps/mig-minors"
    table.parent.mkdir(parents=True)
    table.write_text(
        f"config 1\nmonitor 2\ngpu0/gi{gi}/access 20\ngpu1/gi{gi}/access 30\ngpu1/gi{gi}/ci0/access 31\n"
        f"gpu1/gi{gi}/ci1/access 32\ngpu1/gi{gi + 1}/access 40\n"
    )
    (root / "dev/nvidia-caps").mkdir(parents=True)
    for name in ("nvidia1", "nvidiactl", *(f"nvidia-caps/nvidia-cap{number}" for number in (20, 30, 31, 32, 40))):
        (root / "dev" / name).touch()
    [found] = run(gpus.instances(uuid_of(1)))
    assert found.nodes == (
        "/dev/nvidia1",
        "/dev/nvidia-caps/nvidia-cap30",
        "/dev/nvidia-caps/nvidia-cap31",
        "/dev/nvidiactl",
    )


def test_processes_of_every_kind_are_named(gpus: NvmlGpus, node: Node, root: Path) -> None:
    for kind, pid in enumerate((71, 72, 73)):
        node.add_process(0, pid, kind=kind)
    (root / "proc/72").mkdir(parents=True)
    (root / "proc/72/comm").write_text("Xorg\n")
    assert [(one.pid, one.name) for one in run(gpus.processes(uuid_of(0)))] == [(71, ""), (72, "Xorg"), (73, "")]


def test_the_boot_is_the_kernels(gpus: NvmlGpus) -> None:
    assert run(gpus.boot_id()) == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_capability_node_that_nobody_has_made_yet_is_made(gpus: NvmlGpus, node: Node, root: Path) -> None:
    """Without it a container that has the GPU's node sees no instance."""
    node.make_files(root)
    devices = root / "proc/devices"
    devices.write_text("Character devices:\n  1 mem\n237 nvidia-caps\n")
    made = run(gpus.create(uuid_of(1), "3g.40gb", 4))
    capabilities = [one for one in made.nodes if "nvidia-cap" in one]
    assert len(capabilities) == 2
    gone = root / capabilities[0].lstrip("/")
    gone.unlink()
    if os.geteuid() != 0:
        with pytest.raises(GpuError, match=r"cannot be made: .*; run the agent as root"):
            run(gpus.instances(uuid_of(1)))
        return
    run(gpus.instances(uuid_of(1)))
    assert stat.S_ISCHR(gone.stat().st_mode)
    assert os.major(gone.stat().st_rdev) == 237
    gone.unlink()
    devices.unlink()
    with pytest.raises(GpuError, match="run nvidia-smi once"):
        run(gpus.instances(uuid_of(1)))


def test_half_an_instance_that_a_failed_creation_leaves_stays_the_agents_own() -> None:
    slot = Slot(device="d", gpu="GPU-1", profile="3g.40gb", start=4, holder=holder(1), since=EPOCH)
    half = replace(instance("GPU-1", "3g.40gb", 4, 7), uuid="", compute_instance=None)
    there = known.walked(known.intended(Situation(), slot), "GPU-1", [half])
    assert known.is_own(known.not_created(there, slot), half)
    whole = known.walked(there, "GPU-1", [instance("GPU-1", "3g.40gb", 4, 7)])
    assert known.not_created(whole, slot, nothing=True).made == frozenset()


def test_a_reset_that_does_not_end_is_given_up_and_nvml_is_open_again(gpus: NvmlGpus, tmp_path: Path) -> None:
    """Though the tool cannot be killed: here it is, but nobody waits for its end."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 5\n")
    tool.chmod(0o755)
    gpus._nvidia_smi, gpus.reset_seconds = str(tool), 0.2
    [first, *_] = run(gpus.list())
    with pytest.raises(GpuError, match=r"was not reset within 0 s"):
        run(gpus.reset(first.uuid))
    assert len(run(gpus.list())) == 2
