"""Whether real nodes can run here, found out by switching an empty machine on and off again."""

import asyncio
import functools
import os
import sys
from typing import Final

from tests.cluster.node.machines import Machine
from tests.cluster.processes import ProgramError

_ANY_ADDRESS: Final = "10.76.0.1"


@functools.cache
def missing() -> str | None:
    """What this machine lacks for real nodes, as a sentence; None where it lacks nothing."""
    if sys.platform != "linux":
        return f"A real kubelet needs Linux; this is {sys.platform}."
    if os.geteuid() != 0:
        return "A real kubelet needs root: run the tests as root, or in a container that is privileged."
    if complaint := asyncio.run(_complaint()):
        return f"A real kubelet needs namespaces, mounts and control groups of its own; here {complaint}"
    return None


async def _complaint() -> str | None:
    machine = Machine()
    try:
        await machine.start_supervisor(0)
        await machine.boot(_ANY_ADDRESS)
    except ProgramError as error:
        return str(error)
    finally:
        await machine.close()
    return None
