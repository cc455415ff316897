"""api_writes_per_lease: what operator and agents write to the API server over the whole life of a lease.

A life: created → Ready → its Job completes → settled → deleted → gone. Every write is counted that the API server
finished, also refused ones and those that only conflict, by its own audit log (see `tests.bench.audit`); the operator's
metric `gpu_tenancy_api_requests` has to agree with it, or the bench fails. Not in the figures, but in the lines on the
terminal: Events (they are for people and may be lost), dry runs (they store nothing), heartbeats of the agents (they
depend on time and nodes only). Nothing mines: a miner that is stopped and started again costs its own writes.

A burst fills whole nodes, so that the leases of a node share writes to GpuNode and ResourceSlice; a lease that is alone
shares with nobody. Both are measured.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from gpu_tenancy.api.lease import ConditionType
from gpu_tenancy.kube import resources
from tests.bench import fleet
from tests.bench.audit import AGENT, OPERATOR, AuditLog, Writes
from tests.bench.figures import Figure, figure
from tests.cluster.components import Component
from tests.cluster.control_plane import ControlPlane
from tests.cluster.world import World, lease, price_book, template

NODES: Final = 16
TOGETHER: Final = NODES * fleet.GPUS
ALONE: Final = 4
"""Lives one after the other, per run."""
NAMESPACE: Final = "team-a"
RUN_SECONDS: Final = 5.0
"""How long the pods run."""
QUIET_SECONDS: Final = 3.0
"""No write for so long: nothing is left to be said about the leases that were."""
PATIENCE_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Writes per lease."""

    operator: float
    agents: float


def run(runs: int) -> list[Figure]:
    """`runs` bursts of 128 leases onto 128 GPUs, and four times as many leases one after the other."""
    bursts, singles = asyncio.run(_measure(runs))
    return [
        *_rows("", bursts, f"in a burst of {TOGETHER}; nothing mines"),
        *_rows("_alone", singles, "one lease at a time; nothing mines"),
    ]


def _rows(suffix: str, costs: Sequence[Cost], how: str) -> tuple[Figure, Figure]:
    return (
        figure(f"api_writes_per_lease_operator{suffix}", [one.operator for one in costs], "writes", f"≤ 10 ({how})"),
        figure(f"api_writes_per_lease_agent{suffix}", [one.agents for one in costs], "writes", f"≤ 4 ({how})"),
    )


async def _measure(runs: int) -> tuple[list[Cost], list[Cost]]:
    with tempfile.TemporaryDirectory() as folder:
        log = AuditLog(Path(folder))
        world = World(fleet.servers(NODES), agents_apart=False, namespaces=(NAMESPACE,))
        # The audit log has to be asked for before the API server starts.
        world.control_plane = ControlPlane(hold_until_prepared=True, extra_args={Component.APISERVER: log.flags})
        async with world:
            await world.create(price_book())
            await fleet.gpu_nodes(world)
            bursts = [await _lives(world, log, f"burst-{index}", TOGETHER) for index in range(runs)]
            singles = [await _lives(world, log, f"alone-{index}", 1) for index in range(runs * ALONE)]
    return bursts, singles


async def _lives(world: World, log: AuditLog, name: str, count: int) -> Cost:
    """Writes per lease while `count` leases live together."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        await _quiet(log)
        start, counted = log.position(), await _own_count(world)
        await _live(world, name, count)
        await _quiet(log)
        operator, agents = log.since(start, OPERATOR), log.since(start, AGENT)
        _agree(operator, await _own_count(world) - counted)
    for program, found in (("operator", operator), ("agents", agents)):
        fleet.say(f"{name}: {program} {_text(found, count)}")
    return Cost(operator.total / count, agents.total / count)


async def _live(world: World, name: str, count: int) -> None:
    """From the first create until the last lease is gone."""
    states = await fleet.states(world.api, resources.GPU_LEASES, fleet.Lease)
    settled = asyncio.create_task(fleet.last_seen(states, _settled, count))
    job = template(RUN_SECONDS)
    bodies = [lease(f"{name}-{index}", NAMESPACE, gpus={"profile": "full"}, template=job) for index in range(count)]
    await fleet.at_once(fleet.post(world.api, [(resources.GPU_LEASES, body)]) for body in bodies)
    await settled
    await fleet.empty(world.api, resources.GPU_LEASES, NAMESPACE)


def _settled(one: fleet.Lease) -> str:
    """Settled and let go: whoever deletes it earlier makes the operator's last write conflict with the deletion."""
    return one.metadata.name if one.is_true(ConditionType.SETTLED) and not one.metadata.finalizers else ""


async def _quiet(log: AuditLog) -> None:
    """Wait until neither program has anything to write; heartbeats go on."""
    while True:
        start = log.position()
        await asyncio.sleep(QUIET_SECONDS)
        if not any(found.total + found.events for found in (log.since(start, OPERATOR), log.since(start, AGENT))):
            return


async def _own_count(world: World) -> int:
    """Writes by the operator's own metric."""
    _, text = await world.ask("/metrics")
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "gpu_tenancy_api_requests_total"
        and sample.labels["verb"] in ("create", "update", "patch", "apply", "delete")
    )


def _agree(audited: Writes, own: int) -> None:
    if audited.total + audited.events != own:
        raise RuntimeError(
            f"the API server's audit log has {audited.total} writes and {audited.events} Events of the operator, its "
            f"own metric counts {own} together: one of the two is wrong, and the figure cannot be believed"
        )


def _text(found: Writes, count: int) -> str:
    parts = ", ".join(f"{what} {times / count:.2f}" for what, times in Counter(found.counted).most_common())
    beside = f"beside it {found.events / count:.2f} Events, {found.dry_runs / count:.2f} dry runs"
    return f"{found.total / count:.2f} per lease: {parts}; {beside}, {found.heartbeats} heartbeats in all"
