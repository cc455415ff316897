"""The demo's world: how it is furnished, left running in the background, and ended.

It starts and ends processes through `World` and `detached` only.
"""

import asyncio
import shlex
from pathlib import Path
from typing import Final

from gpu_tenancy.kube import resources
from tests.cluster import binaries
from tests.cluster.detached import Detached, detach, end, find, state_file
from tests.cluster.world import ROOT, GpuServer, World

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


async def up(path: Path | None = None) -> str:
    """Start the world and leave it running for at most eight hours; returns what to tell its user.

    path: where it is remembered. Where it runs already, only that is said.
    """
    path = path or state_file()
    if found := find(path):
        return "It runs already.\n\n" + _instructions(found)
    async with World(SERVERS, namespaces=NAMESPACES) as world:
        await furnish(world)
        await world.mining(GPUS)
        detached = await detach(world.control_plane, path, LIFETIME_SECONDS)
    hours = LIFETIME_SECONDS / 3600
    return (
        f"{len(SERVERS)} nodes, {GPUS} GPUs, all mining. It runs in the background until `make down`, "
        f"at most {hours:.0f} hours.\n\n" + _instructions(detached)
    )


def down(path: Path | None = None) -> str:
    """End the world that `up` left running; returns what to tell its user."""
    if end(path or state_file()):
        return "Ended; nothing is left of it."
    return "Nothing to end: it does not run. `make up` starts it."


def run_up() -> str:
    """`up` for the command line."""
    return asyncio.run(up())


def _instructions(detached: Detached) -> str:
    kubectl = binaries.ensure(["kubectl"])["kubectl"]
    lease = shlex.quote(_short(LEASE))
    return f"""\
  export KUBECONFIG={shlex.quote(str(detached.kubeconfig))}
  export PATH={shlex.quote(str(kubectl.parent))}:$PATH      # kubectl, if you have none: {kubectl}

Try:

  kubectl apply -f {lease}       # rent four GPUs: four miners go
  kubectl get gpul,gpun,minepool -A -o wide         # what became of it (kubectl get gpul -A -w watches it)
  kubectl delete -f {lease}      # give them back: the miners return
"""


def _short(path: Path) -> str:
    """As one types it in the root of the repository; elsewhere the whole path."""
    return str(path.relative_to(ROOT)) if Path.cwd() == ROOT else str(path)
