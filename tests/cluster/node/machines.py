"""A machine as seen by its starter: the other end of machine.py's pipe.

It may start that script and talk to it, and nothing else; what runs on the machine is realnode.py's matter.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.cluster.node.machine import remove_groups
from tests.cluster.processes import Processes, ProgramError

SCRIPT: Final = Path(__file__).with_name("machine.py")
RELAY: Final = Path(__file__).with_name("relay.py")
INIT: Final = "init"
"""The machine's first process; while it lives the machine is on."""
_RUN_SECONDS: Final = 60.0
"""How long what should take a moment may take on a busy machine."""


class Machine(Processes):
    """A machine in one temporary folder: `boot` it, `start` programs on it, `cut_power`.

    Bound to the event loop in which `start_supervisor` was awaited. Several may live side by side: none sees another's
    processes, mounts or network, and nothing on it can outlive it.
    """

    def __init__(self) -> None:
        super().__init__(SCRIPT)

    async def boot(self, address: str) -> None:
        """Switch the machine on. Its loopback device has `address` too. Raises ProgramError where it cannot be."""
        await self._begin("boot", INIT, {"address": address})

    async def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start a program on the machine; as in Processes. The process id is the one that it has outside."""
        return await self._start(name, argv, env, inside=True)

    async def start_outside(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start a program that ends with the machine, but has our network and files."""
        return await self._start(name, argv, env, inside=False)

    async def run(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> str:
        """Run a program on the machine to its end; returns what it wrote. Raises ProgramError when it failed."""
        self.log_of(name).unlink(missing_ok=True)
        await self.start(name, argv, env)
        async with asyncio.timeout(_RUN_SECONDS):
            status = await self.ended(name)
        written = self.log_of(name).read_text(errors="replace")
        if status != 0:
            raise ProgramError(f"{' '.join(argv)} ended with {status}: {written.strip()}")
        return written

    async def ended(self, name: str) -> int:
        """Wait for the end of a program; its exit status."""
        program = self._programs[name]
        while program.status is None:
            program.changed.clear()
            await program.changed.wait()
        return program.status

    async def cut_power(self) -> None:
        """Everything on the machine ends at once, and with it its mounts and its network."""
        for program in self._programs.values():
            program.killed = True
        await self.kill(INIT)
        async with asyncio.timeout(_RUN_SECONDS):
            for name, program in self._programs.items():
                if program.pid is not None:
                    await self.ended(name)

    async def close(self) -> None:
        """End everything and remove every trace of it. Can be repeated."""
        await super().close()
        if self.directory != Path():
            # It has done so itself, unless it was killed.
            await asyncio.to_thread(remove_groups, self.directory.name)

    async def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str], *, inside: bool) -> int:
        details = {"argv": list(argv), "env": dict(env), "log": str(self.log_of(name)), "inside": inside}
        return await self._begin("start", name, details)
