"""Processes of the node as the kernel shows them: which are left of a pod, and how they are ended.

A container keeps its right to open a device for as long as it lives, whether it uses it or not, and the driver lists
only who uses it. So the former holder's pods are looked for by what they cannot shed: the UID of the pod in the cgroup
that kubelet put them in, and the pod's /etc/hosts or the mark of the claim, mounted where containers have them. The
node's own programs see kubelet's mounts too, but elsewhere. Reads /proc, and asks the container runtime what pods are
called; ends processes by pidfd, so that a number that was given anew is never hit. Source: proc(5), cgroups(7),
pidfd_open(2).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from gpu_tenancy.agent.cdi import MARKS
from gpu_tenancy.agent.gpus import Process
from gpu_tenancy.agent.runtime import pod_names

PROC: Final = Path("/proc")
_MARKS: Final = f"{MARKS}/".encode()
_POD: Final = re.compile(rb"\bpod([0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})\b")
"""A pod's folder among cgroups; systemd's driver writes its UID with _, and that of a static pod has neither."""


class Host(Protocol):
    """What the agent needs of the processes of its node."""

    async def carrying(self, traces: Collection[str]) -> Sequence[Process]:
        """Processes whose cgroup or mounts carry one of these UIDs, of pods or claims."""
        ...

    async def end(self, process: Process, traces: Collection[str]) -> None:
        """Kill the process, if it still carries one of the UIDs; one that is gone is fine."""
        ...

    async def placed(self, processes: Sequence[Process]) -> Sequence[Process]:
        """The same with the pods that they are of."""
        ...


class LinuxHost:
    """The processes of this machine: those of every container, where /proc is the host's."""

    def __init__(self, proc: Path = PROC, runtime_socket: Path | None = None) -> None:
        """`runtime_socket`: of the container runtime, which knows what the pods are called."""
        self._proc = proc
        self._runtime_socket = runtime_socket

    async def carrying(self, traces: Collection[str]) -> Sequence[Process]:
        """Look through /proc, off the event loop."""
        return await asyncio.to_thread(self._carrying, frozenset(traces))

    async def end(self, process: Process, traces: Collection[str]) -> None:
        """SIGKILL through a pidfd that was opened before the last look at who it is."""
        await asyncio.to_thread(self._end, process.pid, frozenset(traces))

    async def placed(self, processes: Sequence[Process]) -> Sequence[Process]:
        """By the cgroup of each, which kubelet names after its pod."""
        uids = {one.pid: self._pod(one.pid) for one in processes}
        if not any(uids.values()):
            return processes
        names = await pod_names(self._runtime_socket) if self._runtime_socket is not None else {}
        return [replace(one, pod=names.get(uids[one.pid], uids[one.pid])) for one in processes]

    def _pod(self, pid: int) -> str:
        """UID of the pod that a process is of; empty where it is none's."""
        found = _POD.search(self._read(pid, "cgroup"))
        return found[1].decode().replace("_", "-") if found else ""

    def _carrying(self, traces: frozenset[str]) -> Sequence[Process]:
        if not traces:
            return []
        holds = self._test(traces)
        return [Process(pid, self._command(pid)) for pid in sorted(self._pids()) if holds(pid)]

    def _test(self, traces: frozenset[str]) -> Callable[[int], bool]:
        """Whether a process carries one of the UIDs; mounts are read once for each mount namespace."""
        wanted = [uid.encode() for uid in _spellings(traces)]
        known: dict[str, bool] = {}

        def carries(text: bytes) -> bool:
            return any(uid in text for uid in wanted)

        def holds(pid: int) -> bool:
            if carries(self._read(pid, "cgroup")):
                return True
            namespace = self._mount_namespace(pid)
            if not namespace:
                return False
            if namespace not in known:
                known[namespace] = any(
                    _is_containers(mount, carries) for mount in self._read(pid, "mountinfo").splitlines()
                )
            return known[namespace]

        known |= dict.fromkeys((self._mount_namespace(pid) for pid in (1, os.getpid())), False)  # The node's own.
        return holds

    def _end(self, pid: int, traces: frozenset[str]) -> None:
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                if self._test(traces)(pid):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)

    def _pids(self) -> Iterator[int]:
        return (int(one.name) for one in self._proc.iterdir() if one.name.isdigit())

    def _command(self, pid: int) -> str:
        return self._read(pid, "comm").decode(errors="replace").strip()

    def _mount_namespace(self, pid: int) -> str:
        """Name of its mount namespace; empty for one that is gone, or may not be looked at."""
        try:
            return str((self._proc / str(pid) / "ns" / "mnt").readlink())
        except OSError:
            return ""

    def _read(self, pid: int, name: str) -> bytes:
        """A file of a process; empty for one that is gone meanwhile."""
        try:
            return (self._proc / str(pid) / name).read_bytes()
        except OSError:
            return b""


def _is_containers(mount: bytes, carries: Callable[[bytes], bool]) -> bool:
    """Whether a line of mountinfo is of a container that carries one of the UIDs.

    Only what nobody else has counts: the mark of a claim in its place, and the pod's own /etc/hosts, which kubelet
    mounts from the pod's folder. Whatever else of that folder is mounted anywhere may be the node's own doing.
    """
    fields = mount.split(b" ", 5)
    if len(fields) < 6:
        return False
    source, place = fields[3], fields[4]
    if place.startswith(_MARKS):
        return carries(place)
    return place == b"/etc/hosts" and source.endswith(b"/etc-hosts") and carries(source)


def _spellings(traces: Collection[str]) -> Iterator[str]:
    """A UID as it is, and as systemd's cgroup driver writes it, in which - separates slices."""
    for uid in traces:
        yield uid
        yield uid.replace("-", "_")
