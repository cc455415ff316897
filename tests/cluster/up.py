"""The demo's world: how it is furnished, left running in the background, and ended.

It starts and ends processes through `World` and `detached` only.
"""

import asyncio
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gpu_tenancy.kube import resources
from tests.cluster import binaries
from tests.cluster.detached import Detached, detach, end, find, state_file
from tests.cluster.world import MODEL, ROOT, GpuServer, World, driver_root

SERVERS: Final = (GpuServer("gpu-a"), GpuServer("gpu-b", mig=(6, 7)))
"""Two nodes of 8 × A100-SXM4-80GB; the last two GPUs of the second are in MIG mode."""
GPUS: Final = sum(server.gpus for server in SERVERS)
EXAMPLES: Final = ROOT / "examples"
BOOK, POOL, LEASE = (EXAMPLES / name for name in ("2-pricebook.yaml", "3-miningpool.yaml", "4-whole-gpus.yaml"))
NAMESPACES: Final = ("team-a", "mining")
"""Those of examples/1-namespaces.yaml; the world makes them, and waits until pods can be created in them."""
LIFETIME_SECONDS: Final = 8 * 3600.0


async def furnish(world: World) -> None:
    """The platform team's and finance's part: the miners' wallet, the mining pool, the prices."""
    secret = {"metadata": {"name": "payout"}, "stringData": {"wallet": "a-wallet-of-nobody"}}
    await world.api.create(resources.SECRETS.path("mining"), secret)
    await world.kubectl("apply", "-f", str(BOOK), "-f", str(POOL))


def up(say: Callable[[str], None], path: Path | None = None) -> None:
    """Start the world and leave it running for at most eight hours; where it runs already only that is said.

    say: is told what happens, and at last how to use it; path: where it is remembered. Raises BuildError and
    ProgramError where it cannot be started.
    """
    path = path or state_file()
    if found := find(path):
        say(f"It runs already.\n\n{_instructions(found)}")
        return
    say(f"Starting a Kubernetes control plane, an operator, and {len(SERVERS)} nodes of 8 × {MODEL}.")
    detached = asyncio.run(_start(path))
    hours = LIFETIME_SECONDS / 3600
    say(f"All {GPUS} GPUs are mining. It goes on in the background, for at most {hours:.0f} hours.\n")
    say(_instructions(detached))


async def _start(path: Path) -> Detached:
    async with World(SERVERS, namespaces=NAMESPACES, drivers=True) as world:
        await furnish(world)
        await world.mining(GPUS)
        return await detach(world.control_plane, path, LIFETIME_SECONDS)


def down(say: Callable[[str], None], path: Path | None = None) -> None:
    """End the world that `up` left running, if there is one."""
    if end(path or state_file()):
        say("Ended; nothing is left of it.")
    else:
        say("Nothing to end: it does not run. `make up` starts it.")


def _instructions(detached: Detached) -> str:
    folder = binaries.ensure(["kubectl"])["kubectl"].parent
    lease = shlex.quote(_typed(LEASE))
    state = driver_root(detached.directory, SERVERS[0].name) / "state" / "node"
    faults = f"{shlex.quote(_typed(Path(sys.executable)))} -m tests.nvsim {shlex.quote(str(state))}"
    tries = (
        (f"kubectl apply -f {lease}", "rent four GPUs: four miners go"),
        ("kubectl get gpul,gpun,minepool -A", "what became of it; kubectl get gpul -A -w watches it"),
        (f"kubectl delete -f {lease}", "give them back: the miners return"),
        (f"{faults} show", "a node's GPUs as their driver has them"),
        (f"{faults} xid 0 95", "an uncontained memory error on one of them: fenced, reset, on probation"),
    )
    wide = max(len(command) for command, _ in tries)
    return "\n".join(
        [
            "Its API server, and a kubectl of its version:\n",
            f"  export KUBECONFIG={shlex.quote(str(detached.kubeconfig))}",
            f"  export PATH={shlex.quote(str(folder))}:$PATH",
            "\nTry:\n",
            *(f"  {command:<{wide}}   # {meaning}" for command, meaning in tries),
            "\n`make down` ends it.",
        ]
    )


def _typed(path: Path) -> str:
    """As one types it in the root of the repository; elsewhere the whole path."""
    return str(path.relative_to(ROOT)) if Path.cwd() == ROOT and path.is_relative_to(ROOT) else str(path)
