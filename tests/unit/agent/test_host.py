"""Whose processes are found on a host: those of the former holder's containers, and none that only see its mounts."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_tenancy.agent.gpus import Process
from gpu_tenancy.agent.host import LinuxHost

POD = "0d1e4b5c-1111-2222-3333-444455556666"
CLAIM = "7c1e4b5c-aaaa-bbbb-cccc-444455556666"
KUBELET = f"/var/lib/kubelet/pods/{POD}"
HOST_MOUNTS = (
    "25 1 259:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
    f"90 25 0:60 / {KUBELET}/volumes/kubernetes.io~projected/token rw shared:9 - tmpfs tmpfs rw\n"
    f"91 25 259:1 {KUBELET}/volume-x {KUBELET}/volume-subpaths/x rw - ext4 /dev/sda1 rw\n"
)
"""What the node's own programs see, and whatever has its mounts."""
CONTAINER_MOUNTS = (
    f"200 25 0:70 / / rw - overlay overlay rw\n201 200 259:1 {KUBELET}/etc-hosts /etc/hosts rw - ext4 /dev/sda1 rw\n"
)
MARKED_MOUNTS = (
    "300 25 0:71 / / rw - overlay overlay rw\n"
    f"301 300 259:1 /var/lib/gpu-tenancy/claims/{CLAIM} /run/gpu-tenancy/claims/{CLAIM} ro - ext4 /dev/sda1 rw\n"
)


class Proc:
    """A /proc of our own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, name: str = "sh", *, cgroup: str = "0::/system.slice\n", mounts: str = HOST_MOUNTS) -> None:
        """A process; those with the same mounts share their namespace."""
        folder = self.root / str(pid)
        (folder / "ns").mkdir(parents=True)
        (folder / "comm").write_text(f"{name}\n")
        (folder / "cgroup").write_text(cgroup)
        (folder / "mountinfo").write_text(mounts)
        (folder / "ns" / "mnt").symlink_to(f"mnt:[{abs(hash(mounts))}]")

    def carrying(self, *traces: str) -> list[Process]:
        """What the agent finds."""
        return list(asyncio.run(LinuxHost(self.root).carrying(traces)))


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    """One with the node's own first process."""
    one = Proc(tmp_path)
    one.add(1, "systemd")
    return one


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/kubepods/burstable/pod{POD}/abc\n",
        f"11:memory:/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-abc.scope\n1:name=systemd:/\n",
    ],
)
def test_a_process_in_the_pods_cgroup_is_found_however_it_is_spelt(proc: Proc, cgroup: str) -> None:
    proc.add(50, "python3", cgroup=cgroup)
    assert proc.carrying(POD) == [Process(50, "python3")]


def test_a_process_with_the_pods_files_among_its_mounts_is_found(proc: Proc) -> None:
    proc.add(50, "sleep", mounts=CONTAINER_MOUNTS)
    proc.add(51, "sleep", mounts=CONTAINER_MOUNTS)
    assert [one.pid for one in proc.carrying(POD)] == [50, 51]


def test_a_process_with_the_claims_mark_is_found_whatever_pod_it_is_of(proc: Proc) -> None:
    proc.add(50, mounts=MARKED_MOUNTS)
    assert [one.pid for one in proc.carrying(CLAIM)] == [50]
    assert proc.carrying(POD) == []


def test_programs_of_the_node_that_see_kubelets_mounts_are_left_alone(proc: Proc) -> None:
    """A service with mounts of its own has a copy of the node's; so has a pod that mounts the node's root."""
    proc.add(50, "systemd-logind", mounts=HOST_MOUNTS + "99 25 0:99 / /tmp rw - tmpfs tmpfs rw\n")
    inside = HOST_MOUNTS.replace("/var/lib/kubelet/pods", "/host/var/lib/kubelet/pods", 1)
    proc.add(51, "node-exporter", mounts=inside)
    bound = HOST_MOUNTS + f"98 25 259:1 {KUBELET}/volumes/x /mnt rw - ext4 /dev/sda1 rw\n"
    proc.add(52, "bash", mounts=bound)
    assert proc.carrying(POD, CLAIM) == []


def test_the_nodes_own_mounts_are_never_a_containers(proc: Proc) -> None:
    """Whatever an administrator mounts where: the first process and all that share its mounts are the node's."""
    odd = HOST_MOUNTS + f"97 25 259:1 {KUBELET}/etc-hosts /etc/hosts rw - ext4 /dev/sda1 rw\n"
    (proc.root / "1" / "mountinfo").write_text(odd)
    proc.add(53, "kubelet")
    assert proc.carrying(POD) == []


def test_a_process_that_ends_while_it_is_looked_at_is_nobody(proc: Proc) -> None:
    (proc.root / "77").mkdir()
    assert proc.carrying(POD) == []


def test_nobody_is_found_without_a_uid_to_look_for(proc: Proc) -> None:
    proc.add(50, mounts=CONTAINER_MOUNTS)
    assert proc.carrying() == []


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A real process."""
    with subprocess.Popen(["sleep", "60"]) as one:
        yield one
        one.kill()


def test_what_is_found_is_killed(proc: Proc, victim: subprocess.Popen[bytes]) -> None:
    proc.add(victim.pid, mounts=CONTAINER_MOUNTS)
    asyncio.run(LinuxHost(proc.root).end(Process(victim.pid, "sleep"), [POD]))
    assert victim.wait(10) == -9


def test_a_number_that_was_given_anew_is_not_killed(proc: Proc, victim: subprocess.Popen[bytes]) -> None:
    proc.add(victim.pid)
    asyncio.run(LinuxHost(proc.root).end(Process(victim.pid, "sleep"), [POD]))
    assert victim.poll() is None


def test_one_that_is_gone_is_fine(proc: Proc) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    asyncio.run(LinuxHost(proc.root).end(Process(pid, "true"), [POD]))
