"""The process that scrubs are forked from: ``python -m gpu_tenancy.agent.scrub_server PARENT``.

A fresh interpreter that loads NVIDIA's bindings takes a tenth of a second of processor time; a fork of one that has
them loaded takes a few milliseconds. So this process loads them once and forks a child (`scrub_child`) for each scrub.
It makes no CUDA call itself, because CUDA does not survive a fork, and it waits for no child, because one that hangs in
the kernel ends when it likes.

It reads lines from standard input: ``scrub NUMBER UUID`` begins a scrub, ``kill NUMBER`` ends one. To standard output
it writes one line of JSON for each child once that is gone, and so has let its device go: `number`; `said`, what the
child wrote; `code`, its exit code, or minus the signal that ended it; `complaint`, the last that it wrote to standard
error. It ends with its parent and with its standard input, and its children with it. It imports nothing else of the
project. Linux only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

from gpu_tenancy.agent import scrub_child

WORDS: Final = 600
"""Characters that are passed on of what a child wrote: a line must be shorter than what a pipe takes as a whole
(PIPE_BUF), so that the agent never reads half of one."""
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_LAST_SECONDS: Final = 0.5
"""How long children may take to end once they are killed at the end of this process."""


def main() -> None:
    """Serve until standard input ends."""
    scrub_child.end_with(int(sys.argv[1]))
    Server().serve()
    os._exit(0)  # Nothing is left to tidy up, and whoever lets it go waits for this process to be gone.


@dataclass(frozen=True, slots=True)
class Child:
    """A scrub that runs."""

    pid: int
    report: BinaryIO
    """What it writes to standard output."""
    complaint: BinaryIO
    """What it writes to standard error."""


class Server:
    """The children that run, by the numbers that the agent gave them."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}
        self._woken, self._waker = os.pipe()
        self._rest = b""

    def serve(self) -> None:
        """Do as standard input says until it ends; then end every child."""
        self._listen_for_ends()
        while True:
            ready, _, _ = select.select([_STDIN, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, select.PIPE_BUF)
                self._tell_of_ends()
            if _STDIN in ready:
                if not (found := os.read(_STDIN, select.PIPE_BUF)):
                    break
                for order in self._orders(found):
                    self._obey(order)
        self._leave()

    def _listen_for_ends(self) -> None:
        """Have a child's end wake `select`."""
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _orders(self, found: bytes) -> Iterator[list[str]]:
        *lines, self._rest = (self._rest + found).split(b"\n")
        yield from (line.decode().split() for line in lines)

    def _obey(self, order: list[str]) -> None:
        match order:
            case ["scrub", number, device]:
                self._begin(int(number), device)
            case ["kill", number] if (child := self._children.get(int(number))) is not None:
                os.kill(child.pid, signal.SIGKILL)

    def _begin(self, number: int, device: str) -> None:
        try:
            self._children[number] = self._fork(device)
        except OSError as error:
            self._tell(number, said="", code=1, complaint=f"no child could be forked: {error}")

    def _fork(self, device: str) -> Child:
        server, report, complaint = os.getpid(), _file("report"), _file("complaint")
        if pid := os.fork():
            return Child(pid, report, complaint)
        # The child: nothing of the server goes on in it.
        try:
            scrub_child.end_with(server)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # It may outlive the server where the kernel cannot end it: it holds on to none of the agent's pipes.
            os.dup2(os.open(os.devnull, os.O_RDONLY), _STDIN)
            os.dup2(report.fileno(), _STDOUT)
            os.dup2(complaint.fileno(), _STDERR)
            scrub_child.run(device)
        except BaseException as error:  # noqa: BLE001  (whatever it is, the server tells of it)
            sys.stderr.write("".join(traceback.format_exception_only(error)))
            sys.stderr.flush()
        finally:
            os._exit(1)  # Not reached by a child that has reported.

    def _tell_of_ends(self) -> None:
        for number, child in list(self._children.items()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                del self._children[number]
                said, complaint = _last_words(child.report), _last_words(child.complaint)
                self._tell(number, said=said, code=os.waitstatus_to_exitcode(status), complaint=complaint)

    def _tell(self, number: int, *, said: str, code: int, complaint: str) -> None:
        line = json.dumps({"number": number, "said": said, "code": code, "complaint": complaint})
        os.write(_STDOUT, f"{line}\n".encode())

    def _leave(self) -> None:
        """Kill the children and reap them, that none is left to whoever takes in orphans; but wait for none that
        hangs."""
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        until = time.monotonic() + _LAST_SECONDS
        while self._children and time.monotonic() < until:
            with suppress(BrokenPipeError):  # Nobody may be left to be told.
                self._tell_of_ends()
            time.sleep(0.005)


def _file(name: str) -> BinaryIO:
    """A file in memory, which takes whatever is written without anybody having to read meanwhile."""
    return os.fdopen(os.memfd_create(name), "w+b", buffering=0)


def _last_words(file: BinaryIO) -> str:
    """The end of what was written, in one line; closes the file."""
    with file:
        file.seek(0)
        text = file.read().decode(errors="replace").strip()
    return "".join(one if one.isascii() and one.isprintable() else " " for one in text[-WORDS:])


if __name__ == "__main__":
    main()
