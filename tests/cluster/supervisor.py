"""The parent of every program of a control plane: it ends them all, and their folder, when its own parent goes away.

Started as a script by processes.py, with nothing but the standard library on its path so that it is up in a blink.
It holds the temporary folder and the free ports, starts programs on request, reports their ends, and when its standard
input closes or its parent is gone, in whatever manner, it kills them and removes the folder. It may not import anything
of this repository, and it knows nothing of Kubernetes.

Standard input and output carry one JSON object per line:
    in   {"do": "start", "name", "argv", "env", "log"} | {"do": "kill", "name"} | {"do": "detach", "lifetime_seconds"}
    out  {"event": "ready", "directory", "ports"} | {"event": "started", "name", "pid"}
         {"event": "failed", "name", "message"} | {"event": "ended", "name", "pid", "status"}
         {"event": "detached"}
"""

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


class Supervisor:
    """The programs of one control plane, its folder and its ports."""

    def __init__(self, parent: int, directory: Path, ports: list[socket.socket]) -> None:
        self.parent = parent
        self.directory = directory
        self.ports = ports
        self.over = asyncio.Event()
        self.detached = False
        self._processes: dict[str, Process] = {}
        self._reapers: set[asyncio.Task[None]] = set()
        self._die_with_me = die_with_parent(os.getpid())

    async def run(self) -> None:
        """Serve requests until the input closes, a signal comes or the lifetime ends; then leave nothing behind."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.over.set)
        numbers = [port.getsockname()[1] for port in self.ports]
        say({"event": "ready", "directory": str(self.directory), "ports": numbers})
        self._watch_parent()
        requests = asyncio.create_task(self._serve())
        await self.over.wait()
        requests.cancel()
        await self._end()

    def _watch_parent(self) -> None:
        """End with the parent even if something it forked still holds the other end of our input."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            parent = os.pidfd_open(self.parent)
        except ProcessLookupError:
            self._parent_is_gone()
            return
        asyncio.get_running_loop().add_reader(parent, self._parent_gone_once, parent)

    def _parent_gone_once(self, parent: int) -> None:
        asyncio.get_running_loop().remove_reader(parent)
        os.close(parent)
        self._parent_is_gone()

    def _parent_is_gone(self) -> None:
        if not self.detached:
            self.over.set()

    async def _serve(self) -> None:
        reader = asyncio.StreamReader(limit=2**20)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
        )
        while line := await reader.readline():
            await self._obey(json.loads(line))
        self._parent_is_gone()

    async def _obey(self, request: dict[str, Any]) -> None:
        match request["do"]:
            case "start":
                await self._start(request["name"], request["argv"], request["env"], request["log"])
            case "kill":
                if process := self._processes.get(request["name"]):
                    kill(process)
            case "detach":
                self.detached = True
                asyncio.get_running_loop().call_later(request["lifetime_seconds"], self.over.set)
                say({"event": "detached"})
            case unknown:
                raise ValueError(f"the supervisor knows no request {unknown!r}.")

    async def _start(self, name: str, argv: list[str], env: dict[str, str], log: str) -> None:
        try:
            with Path(log).open("ab") as output:  # noqa: ASYNC230 - a local file
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=DEVNULL,
                    stdout=output,
                    stderr=STDOUT,
                    cwd=self.directory,
                    env=env,
                    preexec_fn=self._die_with_me,
                )
        except OSError as error:
            say({"event": "failed", "name": name, "message": str(error)})
            return
        self._processes[name] = process
        say({"event": "started", "name": name, "pid": process.pid})
        reaper = asyncio.create_task(self._reap(name, process))
        self._reapers.add(reaper)
        reaper.add_done_callback(self._reapers.discard)

    async def _reap(self, name: str, process: Process) -> None:
        status = await process.wait()
        say({"event": "ended", "name": name, "pid": process.pid, "status": status})

    async def _end(self) -> None:
        # There is nothing to save: killing at once is quicker than asking, and leaves no half-stopped server.
        for process in self._processes.values():
            kill(process)
        await asyncio.gather(*(process.wait() for process in self._processes.values()))
        shutil.rmtree(self.directory, ignore_errors=True)


def kill(process: Process) -> None:
    """Kill `process` unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def die_with_parent(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program, so that the kernel kills it when the supervisor itself is killed.

    The kernel ties this to the *thread* that forked: the supervisor forks in its main thread only. Linux alone offers
    it; elsewhere only a supervisor that is killed with -9 leaves its children behind.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: a child may not allocate locks

    def preexec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died between the fork and the call above
            os._exit(1)

    return preexec


def reserve_ports(count: int) -> list[socket.socket]:
    """Free loopback ports that nobody else is given while the returned sockets live.

    On Linux a server that sets SO_REUSEADDR, as Go's do, may listen on a port whose other socket set it too and does
    not listen; so the reservation outlives a restart of the server. Elsewhere it is given up at once.
    """
    ports = []
    for _ in range(count):
        port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        ports.append(port)
    return ports


def say(event: dict[str, Any]) -> None:
    """Write one event; a reader that is gone is noticed on the input instead."""
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


async def main(parent: int, port_count: int) -> None:
    """Create the folder and the ports, then supervise for the process `parent`."""
    directory = Path(tempfile.mkdtemp(prefix="gpu-tenancy-"))
    try:
        # Nobody reads our standard error once the starter is gone, and an open one would keep its terminal waiting.
        with (directory / "supervisor.log").open("ab") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        await Supervisor(parent, directory, reserve_ports(port_count)).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
