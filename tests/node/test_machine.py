"""The machine under a real node: what it keeps apart, and that nothing of it is ever left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.components import API_ONLY
from tests.cluster.control_plane import ControlPlane
from tests.cluster.eventually import eventually
from tests.cluster.node.machines import INIT, Machine
from tests.cluster.node.procfs import below
from tests.cluster.node.realnode import RealNode
from tests.cluster.processes import ProgramError
from tests.node.site import TEAM, Bare, pod
from tests.node.test_pods import alive

ROOT = Path(__file__).parents[2]
ADDRESS = "10.76.0.99"
ESCAPING = "setsid sh -c 'mount -t tmpfs none {folder}; setsid sleep 100000 & sleep 100000' & setsid sleep 100000 &"
"""Processes that leave their session and their parent, with a mount: what a shim does."""

pytestmark = pytest.mark.usefixtures("possible")


@dataclass(frozen=True)
class Traces:
    """What is of this host, and must be as it was before."""

    devices: frozenset[Path]
    namespaces: frozenset[Path]

    @classmethod
    def now(cls) -> Traces:
        return cls(frozenset(Path("/sys/class/net").iterdir()), frozenset(Path("/run").glob("netns/*")))


def left_of(directory: Path, processes: list[int]) -> list[str]:
    """What is left of a machine with that folder and those processes."""
    left = [f"process {pid}" for pid in processes if alive(pid)]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]
    try:
        left += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{directory.name}")]
    except FileNotFoundError as error:  # One went while it was looked at: look again.
        left.append(str(error))
    return left + ([str(directory)] if directory.exists() else [])


def text_of(path: str) -> str:
    """What stands in a file."""
    return Path(path).read_text()


def there(paths: list[str]) -> list[str]:
    """Those that exist."""
    return [path for path in paths if Path(path).exists()]


async def machine_at_work() -> Machine:
    machine = Machine()
    await machine.start_supervisor(0)
    await machine.boot(ADDRESS)
    folder = machine.directory / "mounted"
    folder.mkdir()
    await machine.run("escaping", ["sh", "-c", ESCAPING.format(folder=folder)], dict(os.environ))
    return machine


async def started(machine: Machine, count: int) -> list[int]:
    """Wait for that many processes on the machine; all of them, with its first one."""

    async def look() -> list[int]:
        found = below(machine.pid_of(INIT))
        return found if len(found) >= count else []

    return [*await eventually(f"{count} processes", look), machine.pid_of(INIT)]


def test_a_machine_sees_its_own_processes_boot_and_network_only() -> None:
    async def body() -> None:
        machine = await machine_at_work()
        try:
            script = "echo /proc/[0-9]*; cat /proc/sys/kernel/random/boot_id /proc/net/dev"
            shown = await machine.run("look", ["sh", "-c", script], {})
        finally:
            await machine.close()
        assert f"/proc/{os.getpid()}" not in shown.splitlines()[0].split()
        assert text_of("/proc/sys/kernel/random/boot_id") not in shown
        devices = [line.split(":")[0].strip() for line in shown.splitlines() if ":" in line]
        assert devices == ["lo"]

    asyncio.run(body())


def test_what_a_node_writes_to_fixed_places_is_not_written_to_the_hosts() -> None:
    marks = ["/run/containerd/x", "/var/lib/kubelet/x", "/var/lib/cni/x", "/var/log/containers/x"]
    sysctl = "/proc/sys/vm/overcommit_memory"
    before = text_of(sysctl)

    async def body() -> None:
        machine = await machine_at_work()
        try:
            await machine.run("touch", ["sh", "-ec", f"touch {' '.join(marks)}; echo 2 > {sysctl}"], {})
            assert there(marks) == []
            assert text_of(sysctl) == before
        finally:
            await machine.close()

    asyncio.run(body())


def test_nothing_is_left_of_a_machine_that_is_switched_off() -> None:
    async def body() -> None:
        traces = Traces.now()
        machine = await machine_at_work()
        directory, processes = machine.directory, await started(machine, 3)
        assert str(directory) in text_of(f"/proc/{processes[0]}/mountinfo")
        await machine.close()
        assert left_of(directory, processes) == []
        assert Traces.now() == traces

    asyncio.run(body())


def test_nothing_is_left_of_a_machine_that_was_itself_killed_once_its_starter_lets_go_of_it() -> None:
    async def body() -> None:
        machine = await machine_at_work()
        directory, processes = machine.directory, await started(machine, 3)
        os.kill(machine.supervisor_pid, signal.SIGKILL)
        await machine.close()

        async def look() -> bool:
            return left_of(directory, processes) == []

        await eventually("nothing of the machine to be left", look)

    asyncio.run(body())


def test_power_that_is_cut_ends_all_processes_and_a_new_boot_begins_without_them() -> None:
    async def body() -> None:
        machine = await machine_at_work()
        try:
            processes = await started(machine, 3)
            boot_id = (machine.directory / "boot-id").read_text()
            await machine.cut_power()
            assert not [pid for pid in processes if alive(pid)]
            with pytest.raises(ProgramError, match="the machine is off"):
                await machine.start("x", ["true"], {})
            await machine.boot(ADDRESS)
            assert below(machine.pid_of(INIT)) == []
            assert (machine.directory / "boot-id").read_text() != boot_id
            assert await machine.run("y", ["echo", "on"], {}) == "on\n"
        finally:
            await machine.close()

    asyncio.run(body())


def test_a_program_that_cannot_be_started_says_which_and_why() -> None:
    async def body() -> None:
        machine = await machine_at_work()
        try:
            with pytest.raises(ProgramError, match=r"odd cannot be started: .*No such file.*'/no/such/program'"):
                await machine.start("odd", ["/no/such/program"], {})
            with pytest.raises(ProgramError, match=r"sh -c .* ended with 7: help"):
                await machine.run("fails", ["sh", "-c", "echo help; exit 7"], {})
        finally:
            await machine.close()

    asyncio.run(body())


def test_nothing_is_left_of_a_machine_whose_starter_is_killed() -> None:
    code = (
        "import asyncio, json, sys; from tests.node import test_machine as t\n"
        "async def body():\n"
        "    machine = await t.machine_at_work()\n"
        "    print(json.dumps([str(machine.directory), await t.started(machine, 3)]), flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(body())"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "operator")])
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert starter.stdout is not None
    directory, processes = json.loads(starter.stdout.readline())
    assert left_of(Path(directory), processes)
    starter.send_signal(signal.SIGKILL)
    starter.communicate()

    async def look() -> bool:
        return left_of(Path(directory), processes) == []

    asyncio.run(eventually("nothing of the machine to be left", look))


def test_nothing_is_left_of_a_node_that_ran_pods_and_was_stopped_in_the_middle_of_it() -> None:
    async def body() -> None:
        traces = Traces.now()
        plane = ControlPlane(components=API_ONLY)
        here = Bare(plane, RealNode(plane, "short", number=20))
        try:
            await here.start()
            for name in ("polite", "stubborn"):
                words = ["sleep"] if name == "polite" else ["ignore-term", "sleep"]
                await here.create(pod(name, *words, nodeName="short"))
                await here.said(name, "sleeping")
            directory, processes = here.node.layout.directory, here.node.all_processes()
            names = {text_of(f"/proc/{pid}/comm").strip() for pid in processes}
            assert {"kubelet", "containerd", "containerd-shim", "gpu-probe"} <= names
            assert await here.node.logs(TEAM, "polite") == "sleeping\n"
        finally:
            await here.stop()
        assert left_of(directory, processes) == []
        assert Traces.now() == traces

    asyncio.run(body())
