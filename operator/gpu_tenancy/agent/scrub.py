"""Scrubs devices: has a child process overwrite all memory of each, from inside, and waits for what it says.

A child, because a context on a broken GPU can hang for ever and take its process with it. The children are forked by
one process (`scrub_server`), which is started while former holders are still leaving, so that its start costs a
hand-over nothing, and which is let go when nothing more is to be scrubbed. This module never loads CUDA.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import Final, NamedTuple, Protocol, cast

from pydantic import ValidationError

from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.situation import Scrub
from gpu_tenancy.api.base import ApiModel

_log = logging.getLogger(__name__)

SERVER: Final = "gpu_tenancy.agent.scrub_server"
_END_SECONDS: Final = 1.0
"""How long a child or a server may take to end once it is told to, before it is left to its fate."""
_WORDS: Final = 600
"""Characters of a server's complaint that are passed on."""


class Report(ApiModel):
    """What a child says at its end: what it did, or why it did not."""

    scrub: Scrub | None = None
    """What was written and read back."""
    error: str = ""
    """Why it was not, as a sentence; empty where it was."""


class Ended(ApiModel):
    """What the server tells of a child that is gone."""

    number: int
    said: str
    """What it wrote to standard output: a Report, unless it died before."""
    code: int
    """Its exit code, or minus the signal that ended it."""
    complaint: str
    """The last that it wrote to standard error."""


class Fate(NamedTuple):
    """What became of a child."""

    said: str
    """A Report, unless it died before."""
    how: str
    """How it ended, as a part of a sentence."""


class Scrubber(Protocol):
    """Scrubs devices of one node."""

    async def scrub(self, device: str) -> Scrub:
        """Overwrite all memory that a process on the device with this UUID can reach. Raises GpuError."""
        ...

    async def prepare(self, count: int) -> None:
        """So many scrubs are to be expected soon; 0 lets go of what was kept ready for them."""
        ...


class CudaScrubber:
    """Scrubs through the CUDA driver, in a child process for each device."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long a scrub may take before its child is killed."""
        self._seconds = seconds
        self._server: _Server | None = None
        self._expected = 0
        self._starting = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def scrub(self, device: str) -> Scrub:
        """Have a child scrub the device and wait for its report; a child that takes too long is killed."""
        try:
            server = await self._started()
        except OSError as error:
            raise GpuError(f"{device} could not be scrubbed, no child could be started: {error}") from None
        number, answer = server.begin(device)
        try:
            # Shielded: the end of a child that is killed is waited for as well.
            fate = await asyncio.wait_for(asyncio.shield(answer), self._seconds)
        except TimeoutError:
            raise GpuError(
                f"the scrub of {device} did not end within {self._seconds:.0f} s and was killed; "
                f"look for Xid events of its GPU"
            ) from None
        finally:
            await self._let_go(server, number, answer)
        return _result(device, fate)

    async def prepare(self, count: int) -> None:
        """Have the server waiting where scrubs are to come, started while a former holder is still leaving. With 0,
        whatever has nothing to do is gone when this returns."""
        self._expected = count
        try:
            if count:
                await self._started()
        except OSError as error:
            _log.warning("No process could be started for scrubs to come; it is tried again when they come: %s", error)
        self._end_unless_needed(self._server)
        if not count:
            await asyncio.gather(*self._ending)

    async def _started(self) -> _Server:
        """The server, started where there is none; nothing is awaited between its being found and its being used."""
        async with self._starting:
            if self._server is None or self._server.is_gone:
                self._server = await _Server.start()
            return self._server

    async def _let_go(self, server: _Server, number: int, answer: asyncio.Future[Fate]) -> None:
        """A scrub is over, or waited for no longer. One whose child does not even end when it is killed is left to its
        fate, and the server with it: nobody can tell which of the two hangs."""
        if not await server.stop(number, answer) and self._server is server:
            self._server = None
        self._end_unless_needed(server)

    def _end_unless_needed(self, server: _Server | None) -> None:
        """End a server that has nothing to do, unless it is to have soon; no hand-over waits for that."""
        if server is None or server.is_busy or (server is self._server and self._expected):
            return
        if server is self._server:
            self._server = None
        ending = asyncio.create_task(server.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class _Server:
    """The process that forks a child for each scrub, and who waits for which. Made by `start`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        # All three are pipes, which the type of a process leaves open.
        self._input = cast(asyncio.StreamWriter, process.stdin)
        self._output = cast(asyncio.StreamReader, process.stdout)
        self._complaint = cast(asyncio.StreamReader, process.stderr)
        self._answers: dict[int, asyncio.Future[Fate]] = {}
        self._begun = 0
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls) -> _Server:
        """Raises OSError where no process can be started."""
        command = (sys.executable, "-m", SERVER, str(os.getpid()))
        return cls(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE))

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits for a scrub of it."""
        return bool(self._answers)

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._listening.done() or self._process.returncode is not None

    def begin(self, device: str) -> tuple[int, asyncio.Future[Fate]]:
        """Begin a scrub: its number, and what will become of its child."""
        self._begun += 1
        self._answers[self._begun] = asyncio.get_running_loop().create_future()
        self._write(f"scrub {self._begun} {device}")
        return self._begun, self._answers[self._begun]

    async def stop(self, number: int, answer: asyncio.Future[Fate]) -> bool:
        """Kill the child, if it lives; whether it is gone, to which it is given a moment."""
        if not answer.done():
            self._write(f"kill {number}")
            await asyncio.wait([answer], timeout=_END_SECONDS)
        self._answers.pop(number, None)
        return answer.done()

    async def end(self) -> None:
        """Have it end, with every child; one that the kernel cannot end now is left to its fate."""
        self._input.close()
        for _ in range(2):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _END_SECONDS)
                await self._listening
                return
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _write(self, order: str) -> None:
        """A server that is gone hears nothing; who waits for it is told by `_listen`."""
        if not self._input.is_closing():
            self._input.write(f"{order}\n".encode())

    async def _listen(self) -> None:
        """Pass on what it tells, until it ends."""
        async for line in self._output:
            ended = Ended.model_validate_json(line)
            answer = self._answers.get(ended.number)
            if answer is not None and not answer.done():
                answer.set_result(Fate(ended.said, _end_of(ended.code, ended.complaint)))
        epitaph = await self._epitaph()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(Fate("", epitaph))

    async def _epitaph(self) -> str:
        words = (await self._complaint.read()).decode(errors="replace").strip()[-_WORDS:]
        return f"the process that scrubs has ended: {_end_of(await self._process.wait(), words)}"


def _end_of(code: int, complaint: str) -> str:
    """How a process ended, as a part of a sentence."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{how}: {complaint}" if complaint else how


def _result(device: str, fate: Fate) -> Scrub:
    try:
        report = Report.model_validate_json(fate.said)
    except ValidationError:
        raise GpuError(f"the scrub of {device} ended without a report: {fate.how}") from None
    if report.scrub is None:
        raise GpuError(f"{device} could not be scrubbed: {report.error}")
    return report.scrub
