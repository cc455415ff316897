"""Scrubs a device: has a child process overwrite all of its memory, from inside, and waits for what it says.

A child, because a context on a broken GPU can hang for ever and take its process with it. Some are started while
former holders are still leaving, so that their start costs a hand-over nothing. The child is `scrub_child`; this module
never loads CUDA.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from typing import Final, Protocol

from pydantic import ValidationError

from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.situation import Scrub
from gpu_tenancy.api.base import ApiModel

_log = logging.getLogger(__name__)

CHILD: Final = "gpu_tenancy.agent.scrub_child"
MOST_READY: Final = 8
"""Children that wait at most: one for each GPU of a node."""
_WORDS: Final = 600
"""Characters of a child's complaint that are passed on."""


class Report(ApiModel):
    """What the child says at its end: what it did, or why it did not."""

    scrub: Scrub | None = None
    """What was written and read back."""
    error: str = ""
    """Why it was not, as a sentence; empty where it was."""


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
        self._ready: list[Process] = []
        self._starting = asyncio.Lock()

    async def scrub(self, device: str) -> Scrub:
        """Hand the device to a child and wait for its report; a child that takes too long is killed."""
        try:
            child = self._ready.pop() if self._ready else await _spawn()
        except OSError as error:
            raise GpuError(f"{device} could not be scrubbed, no child could be started: {error}") from None
        try:
            said, complaint = await asyncio.wait_for(child.communicate(f"{device}\n".encode()), self._seconds)
        except TimeoutError:
            raise GpuError(
                f"the scrub of {device} did not end within {self._seconds:.0f} s and was killed; "
                f"look for Xid events of its GPU"
            ) from None
        finally:
            await _end(child)
        return _result(device, said, complaint)

    async def prepare(self, count: int) -> None:
        """Have so many children waiting, and no more: started while a former holder is still leaving."""
        async with self._starting:
            self._ready = [child for child in self._ready if child.returncode is None]
            try:
                while len(self._ready) < min(count, MOST_READY):
                    self._ready.append(await _spawn())
            except OSError as error:
                _log.warning(
                    "No child could be started for a scrub to come; it is tried again when it comes: %s", error
                )
            # Taken out before anything is awaited: a scrub may take those that stay at any time.
            surplus, self._ready = self._ready[count:], self._ready[:count]
            for child in surplus:
                await _end(child)


async def _spawn() -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", CHILD, str(os.getpid()), stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


async def _end(child: Process) -> None:
    """Kill it, if it lives, and reap it; one that the kernel cannot end now is left to its fate."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), 1.0)


def _result(device: str, said: bytes, complaint: bytes) -> Scrub:
    try:
        report = Report.model_validate_json(said)
    except ValidationError:
        words = complaint.decode(errors="replace").strip()[-_WORDS:] or "it said nothing"
        raise GpuError(f"the scrub of {device} ended without a report: {words}") from None
    if report.scrub is None:
        raise GpuError(f"{device} could not be scrubbed: {report.error}")
    return report.scrub
