"""What a process sees of the node by the device nodes that it has, and what it may do by its capabilities."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from tests.nvsim import cdi
from tests.nvsim.files import CONTROL, capabilities
from tests.nvsim.node import A100_80GB, STATE, Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.client import Client
from tests.unit.nvsim.test_clients import needs_namespaces

NO_DEVICE, UNKNOWN = 100, 999


def container(folder: Path, *names: str) -> dict[str, str]:
    """The environment of a container whose /dev has these nodes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return {"NVSIM_DEV": str(folder)}


def nodes_of(node: Node, mig: Any) -> list[str]:  # noqa: ANN401
    """Device nodes that a container with the MIG device has."""
    minor = pynvml.nvmlDeviceGetMinorNumber(pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig))
    gi, ci = pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)
    numbers = (node.capability(minor, gi), node.capability(minor, gi, ci))
    return [f"nvidia{minor}", *(f"nvidia-caps/nvidia-cap{number}" for number in numbers)]


SEEN = """
import json, pynvml
def seen():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        assert pynvml.nvmlDeviceGetIndex(device) == index
        found.append(pynvml.nvmlDeviceGetUUID(device))
        for at in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
            try:
                found.append(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, at)))
            except pynvml.NVMLError_NotFound:
                pass
    return found
def finds(uuid):
    try:
        return bool(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError_NotFound:
        return False
import sys
print(json.dumps([seen(), [finds(one) for one in sys.argv[1:]]]))
"""


def seen_by(node: Node, environment: dict[str, str], *uuids: str) -> Any:  # noqa: ANN401
    """UUIDs that NVML enumerates to a process, and which of some it finds."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN, *uuids],
        env={**os.environ, **node.environment, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def mig_on(index: int, start: int = 0) -> Any:  # noqa: ANN401
    instance = calls.create(calls.gpu(index), 9, Placement(start, 4))
    return pynvml.nvmlComputeInstanceGetInfo(calls.full_width(instance, 3)).device


def test_a_container_sees_the_gpus_whose_nodes_it_has(node: Node, tmp_path: Path) -> None:
    every = [pynvml.nvmlDeviceGetUUID(calls.gpu(index)) for index in range(8)]
    inside = container(tmp_path / "dev", *CONTROL, "nvidia2", "nvidia5")
    assert seen_by(node, inside, every[1], every[2]) == [[every[2], every[5]], [False, True]]
    with Client(node, **inside) as client:
        client.ok("cuInit", 0)
        assert client.ok("cuDeviceGetCount") == 2
        assert client.ok("cuDeviceGetPCIBusId", 20, 1) == "0000:90:00.0"
    with Client(node, **inside, CUDA_VISIBLE_DEVICES=every[1]) as client:
        assert client.code("cuInit", 0) == NO_DEVICE


def test_a_container_sees_the_slices_whose_capabilities_it_has(node: Node, tmp_path: Path) -> None:
    calls.in_mig_mode(4)
    own, other = mig_on(4), mig_on(4, start=4)
    names = [pynvml.nvmlDeviceGetUUID(one) for one in (own, other)]
    gpu = pynvml.nvmlDeviceGetUUID(calls.gpu(4))
    inside = container(tmp_path / "dev", *CONTROL, *nodes_of(node, own))
    assert seen_by(node, inside, *names) == [[gpu, names[0]], [True, False]]
    with Client(node, **inside) as client:
        client.begin()
        assert client.ok("cuDeviceGetUuid", 0) == names[0].partition("-")[2].replace("-", "")
        assert calls.pids(own) == [client.pid]
    with Client(node, **inside, CUDA_VISIBLE_DEVICES=names[1]) as client:
        assert client.code("cuInit", 0) == NO_DEVICE
    # One of the two capabilities is not enough.
    (tmp_path / "dev" / nodes_of(node, own)[2]).unlink()
    assert seen_by(node, inside) == [[gpu], []]


def test_a_container_without_control_nodes_reaches_no_driver(node: Node, tmp_path: Path) -> None:
    inside = container(tmp_path / "dev", "nvidia0")
    assert seen_by(node, inside)[0] == "Driver Not Loaded"
    with Client(node, **inside) as client:
        assert client.code("cuInit", 0) == NO_DEVICE
    container(tmp_path / "dev", "nvidiactl")
    with Client(node, **inside) as client:
        assert client.code("cuInit", 0) == UNKNOWN
    container(tmp_path / "dev", "nvidia-uvm")
    with Client(node, **inside) as client:
        assert client.code("cuInit", 0) == 0


# --- containers -----------------------------------------------------------------------------------------------------

# What a container runtime does with CDI edits, on /run and /dev of a mount namespace of its own; $1: the mounts.
RUNTIME = """
set -e
mount -t tmpfs none /run
mount -t tmpfs none /dev
while read -r host container; do
    mkdir -p "$(dirname "$container")"
    touch "$container"
    mount --bind "$host" "$container"
done < "$1"
shift
exec "$@"
"""


@needs_namespaces
def test_the_edits_for_a_container_are_all_that_it_needs(node: Node, tmp_path: Path) -> None:
    """In namespaces of its own, with these files alone: its GPU, its memory, and a process that the host sees."""
    edits = cdi.specification(node)["containerEdits"]
    container(tmp_path / "dev", "nvidia3", *CONTROL)
    mounts = [(mount["hostPath"], mount["containerPath"]) for mount in edits["mounts"]]
    mounts = [(host, inside) for host, inside in mounts if inside.startswith("/run/")]
    mounts += [(str(path), f"/dev/{path.name}") for path in (tmp_path / "dev").iterdir()]
    table = tmp_path / "mounts"
    table.write_text("".join(f"{host} {inside}\n" for host, inside in mounts))
    runtime = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", RUNTIME, "sh")
    variables = dict(one.split("=", 1) for one in edits["env"])
    with Client(node, inside=(*runtime, str(table)), **variables) as client:
        client.begin()
        assert client.ok("cuDeviceGetCount") == 1
        assert client.ok("cuDeviceGetPCIBusId", 20, 0) == "0000:4E:00.0"
        assert client.ok("own process", 0) == ([1], 1)
        assert len(calls.pids(calls.gpu(3))) == 1
        client.ok("cuMemsetD8", client.everything()[0], 0x77, 4096)
        assert 0x77777777 in {row.pattern for row in node.residue(3)}
    while calls.pids(calls.gpu(3)):
        time.sleep(0.001)  # The process is a grandchild: that it has ended is not waited for.


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_drivers_files_are_those_of_the_node(node: Node, tmp_path: Path) -> None:
    node.make_files(tmp_path / "root")
    dev, proc = tmp_path / "root" / "dev", tmp_path / "root" / "proc"
    assert {path.name for path in dev.iterdir()} == {*CONTROL, *(f"nvidia{minor}" for minor in range(8)), "nvidia-caps"}
    lines = (proc / "driver/nvidia-caps/mig-minors").read_text().splitlines()
    assert lines[:2] == ["config 1", "monitor 2"]
    numbers = [int(line.rpartition(" ")[2]) for line in lines]
    assert numbers == list(range(1, 1083))
    assert {path.name for path in (dev / "nvidia-caps").iterdir()} == {f"nvidia-cap{number}" for number in numbers}
    assert re.search(r"^gpu1/gi0/access 138$", "\n".join(lines), re.MULTILINE)
    assert dict(capabilities(node))["gpu7/gi14/ci7/access"] == node.capability(7, 14, 7) == 1082
    assert node.driver_version in (proc / "driver/nvidia/version").read_text()
    boot_id = proc / "sys/kernel/random/boot_id"
    assert boot_id.read_text().strip() == node.boot_id
    node.reboot()
    node.make_files(tmp_path / "root")
    assert boot_id.read_text().strip() == node.boot_id


def test_all_files_show_all_devices(node: Node, tmp_path: Path) -> None:
    calls.in_mig_mode(1)
    mig = pynvml.nvmlDeviceGetUUID(mig_on(1))
    node.make_files(tmp_path)
    seen, _ = seen_by(node, {"NVSIM_DEV": str(tmp_path / "dev")})
    assert len(seen) == 9
    assert mig in seen


# --- who may --------------------------------------------------------------------------------------------------------

TRY = """
import ctypes, os, sys
import pynvml
pynvml.nvmlInit()
try:
    pynvml.nvmlDeviceSetPowerManagementLimit(pynvml.nvmlDeviceGetHandleByIndex(0), 200_000)
    print("done")
except pynvml.NVMLError as error:
    print(error)
"""
WITHOUT_CAPABILITY = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def ran(node: Node, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, **node.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@needs_namespaces
def test_root_without_cap_sys_admin_may_change_nothing(node: Node) -> None:
    assert ran(node, TRY) == "done"
    assert ran(node, WITHOUT_CAPABILITY, TRY) == "Insufficient Permissions"


@needs_namespaces
def test_an_ordinary_user_may_change_a_node_of_their_own_and_nobody_elses(node: Node) -> None:
    """So that the tests need not run as root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        path = Path(name) / "node"
        assert as_user(65534, node, path, create=True)
        assert not as_user(65533, node, path)


def as_user(number: int, loaded: Node, path: Path, *, create: bool = False) -> bool:
    """Whether that user, in a process that has the library loaded, may change the node at `path`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(number)
            os.setuid(number)
            if create:
                loaded._library.nvsim_create(os.fsencode(path), A100_80GB.encode(), 1, 0, 0)
            os.environ[STATE] = str(path)
            pynvml.nvmlShutdown()
            pynvml.nvmlInit()
            pynvml.nvmlDeviceSetPowerManagementLimit(calls.gpu(), 200_000)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_unprivileged_are_not_told_what_others_have(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    device = calls.in_mig_mode()
    instance = calls.create(device, 9, Placement(0, 4))
    mig = pynvml.nvmlComputeInstanceGetInfo(calls.full_width(instance, 3)).device
    gi = pynvml.nvmlDeviceGetGpuInstanceId(mig)
    node.add_process(0, 4711, gi=gi, ci=0)
    refused: tuple[Callable[[], object], ...] = (
        lambda: calls.placements(device, 9),
        lambda: calls.instances(device),
        lambda: pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity(device, 9),
        lambda: pynvml.nvmlDeviceGetGpuInstanceById(device, gi),
        lambda: pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, 0),
        lambda: pynvml.nvmlGpuInstanceGetComputeInstanceRemainingCapacity(instance, 2),
        lambda: pynvml.nvmlDeviceGetMemoryInfo(device),
        lambda: calls.pids(device),
    )
    for ask in refused:
        ask()
    monkeypatch.setenv("NVSIM_UNPRIVILEGED", "1")
    for ask in refused:
        with pytest.raises(pynvml.NVMLError_NoPermission):
            ask()
    assert calls.profiles(device)
    assert calls.pids(mig) == [4711]
    assert pynvml.nvmlDeviceGetMemoryInfo(mig).total
    assert pynvml.nvmlDeviceGetMemoryInfo(calls.gpu(1)).total


def test_a_process_may_give_its_privilege_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    del node
    monkeypatch.setenv("NVSIM_UNPRIVILEGED", "1")
    with pytest.raises(pynvml.NVMLError_NoPermission):
        pynvml.nvmlDeviceSetPowerManagementLimit(calls.gpu(), 200_000)
    monkeypatch.delenv("NVSIM_UNPRIVILEGED")
    pynvml.nvmlDeviceSetPowerManagementLimit(calls.gpu(), 200_000)
