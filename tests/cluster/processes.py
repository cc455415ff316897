"""The programs of one control plane as seen by its starter: the other end of supervisor.py's pipe.

It may start the supervisor and talk to it, and nothing else; what the programs are is components.py's matter.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SUPERVISOR: Final = Path(__file__).with_name("supervisor.py")
PATIENCE_SECONDS: Final = 20.0
"""How long the supervisor may take to answer: it does nothing slow, but the machine may be busy."""


class ProgramError(RuntimeError):
    """A program did not start or has ended; the message holds the last lines of its log."""


@dataclass(slots=True)
class _Program:
    """What is known of one named program: its latest process."""

    log: Path
    pid: int | None = None
    status: int | None = None
    message: str | None = None
    killed: bool = False
    """Whether its end was asked for."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Processes:
    """Programs that run below one supervisor, in one temporary folder, with a few reserved loopback ports.

    Bound to the event loop in which `start_supervisor` was awaited.
    """

    def __init__(self, supervisor: Path = SUPERVISOR) -> None:
        """Nothing is started here. supervisor: the script at the other end of the pipe."""
        self._script = supervisor
        self.directory = Path()
        """The folder; it vanishes with the supervisor."""
        self.ports: list[int] = []
        self._programs: dict[str, _Program] = {}
        self._detached = asyncio.Event()
        # Not asyncio's own kind of process: that one kills its child when it is forgotten, even a detached one.
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._listener: asyncio.Task[None] | None = None

    @property
    def supervisor_pid(self) -> int:
        """Process id of the supervisor. Raises RuntimeError before `start_supervisor`."""
        return self._running().pid

    async def start_supervisor(self, port_count: int) -> None:
        """Start the supervisor and learn its folder and ports. Raises ProgramError when it does not come up."""
        self._supervisor = subprocess.Popen(  # noqa: ASYNC220 - a fork and an exec, no wait
            [sys.executable, "-I", "-S", str(self._script), str(os.getpid()), str(port_count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal goes to its starter alone, which then ends it in order
        )
        events = asyncio.StreamReader()
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(events), self._supervisor.stdout
        )
        try:
            ready = json.loads(await asyncio.wait_for(events.readline(), PATIENCE_SECONDS))
        except (TimeoutError, json.JSONDecodeError) as error:
            raise ProgramError(f"the supervisor of the control plane did not come up: {error!r}") from error
        self.directory, self.ports = Path(ready["directory"]), ready["ports"]
        self._listener = asyncio.create_task(self._listen(events))

    async def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start a program under `name` (again, if the former one has ended); returns its process id.

        Its output is appended to `log_of(name)`. Raises ProgramError when it cannot be executed or `name` still runs.
        """
        return await self._begin("start", name, {"argv": list(argv), "env": dict(env), "log": str(self.log_of(name))})

    async def _begin(self, do: str, name: str, details: Mapping[str, object]) -> int:
        if name in self._programs and self.alive(name):
            raise ProgramError(f"{name} runs already (pid {self._programs[name].pid}); kill it first.")
        program = self._programs[name] = _Program(log=self.log_of(name))
        self._ask({"do": do, "name": name, **details})
        await self._until(program, lambda: program.pid is not None or program.message is not None)
        if program.pid is None:
            raise ProgramError(f"{name} cannot be started: {program.message}")
        return program.pid

    async def kill(self, name: str) -> None:
        """Kill the program with SIGKILL and wait for its end; no error when it has ended."""
        program = self._programs[name]
        program.killed = True
        if program.status is None:
            self._ask({"do": "kill", "name": name})
        await self._until(program, lambda: program.status is not None)

    def alive(self, name: str) -> bool:
        """Whether the program was started and has not ended."""
        program = self._programs.get(name)
        return program is not None and program.pid is not None and program.status is None

    def pid_of(self, name: str) -> int:
        """Process id of the program's latest process. Raises KeyError for a name never started."""
        pid = self._programs[name].pid
        if pid is None:
            raise KeyError(name)
        return pid

    def log_of(self, name: str) -> Path:
        """The file with the program's output."""
        return self.directory / f"{name}.log"

    def check_alive(self, names: Iterable[str]) -> None:
        """Raises ProgramError, with the last lines of its log, for the first of `names` that has ended by itself."""
        for name in names:
            program = self._programs.get(name)
            if program is not None and program.status is not None and not program.killed:
                raise ProgramError(f"{name} ended with {program.status}; its last lines:\n{self.log_tail(name)}")

    def log_tail(self, name: str, lines: int = 15) -> str:
        """The last lines of the program's log; empty where there is none."""
        try:
            return "\n".join(self.log_of(name).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    async def detach(self, lifetime_seconds: float) -> None:
        """Let the programs outlive this process, at most `lifetime_seconds`."""
        self._ask({"do": "detach", "lifetime_seconds": lifetime_seconds})
        await asyncio.wait_for(self._detached.wait(), PATIENCE_SECONDS)

    async def close(self) -> None:
        """End every program and remove the folder, or, once detached, only let go of them. Can be repeated."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        if not self._detached.is_set():
            # The end of its input is what it acts on; the rest is for a supervisor that is stuck or was killed.
            try:
                await asyncio.to_thread(supervisor.wait, PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                await asyncio.to_thread(supervisor.wait)
            if self.directory != Path():
                shutil.rmtree(self.directory, ignore_errors=True)
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        if self._pipe is not None:
            self._pipe.close()

    async def _listen(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            self._note(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        if event["event"] == "detached":
            self._detached.set()
            return
        program = self._programs[event["name"]]
        match event["event"]:
            case "started":
                program.pid = event["pid"]
            case "failed":
                program.message = event["message"]
            case "ended" if event["pid"] == program.pid:
                program.status = event["status"]
        program.changed.set()

    async def _until(self, program: _Program, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not true():
                program.changed.clear()
                await program.changed.wait()

    def _ask(self, request: dict[str, Any]) -> None:
        stdin = self._running().stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise ProgramError("the supervisor of the control plane has ended, and everything with it.") from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._supervisor is None:
            raise RuntimeError("the supervisor of this control plane is not running.")
        return self._supervisor
