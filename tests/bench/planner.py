"""The decisions alone: 3,456 GPUs, everything mining, a thousand leases at once; then one more on the busy fleet.

No API server and no agent take part: a fleet is written down as facts, planned, and what was planned is taken for done.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import cycle, islice
from typing import Final

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.node import Gpu, GpuMode, ObservedSlot, Slot, SlotState
from gpu_tenancy.api.pool import MiningPoolSpec, MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookSpec, PriceBookStatus
from gpu_tenancy.controller.run import COLLECT_AFTER
from gpu_tenancy.core.actions import OpenRecord, Plan, SetSlots
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.devices import device_name, miner_name
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import (
    BookFacts,
    Key,
    LeaseFacts,
    MinerFacts,
    NodeFacts,
    PoolFacts,
    RecordFacts,
    Snapshot,
)
from gpu_tenancy.core.status import lease_status
from gpu_tenancy.mig.profiles import FULL, of_model
from tests.bench.figures import Figure, figure

NOW: Final = datetime(2026, 3, 1, tzinfo=UTC)
MODEL: Final = "A100-SXM4-80GB"
NODES: Final = 432
GPUS: Final = 8
LEASES: Final = 1000
WISHES: Final = (
    *(("1g.10gb", 1), ("2g.20gb", 1), ("3g.40gb", 1), ("4g.40gb", 1), ("7g.80gb", 1)) * 4,
    *((FULL, 1), (FULL, 2), (FULL, 4), (FULL, 8)),
)
"""Slices of every width alike, on the half of the nodes that is in MIG mode, and whole GPUs on the other half."""
POOL: Final = PoolFacts(Key("mining", "pool"), "pool-uid", 1, NOW, MiningPoolSpec(image="miner"), MiningPoolStatus())
BOOK: Final = PriceBookSpec.model_validate(
    {
        "currency": "USD",
        "effective_from": NOW - timedelta(days=1),
        "rates": [{"model": MODEL, "profile": profile, "per_hour": "1.00"} for profile in (FULL, *of_model(MODEL))],
    }
)


def run(runs: int) -> list[Figure]:
    """`plan_decision_us` and `plan_increment_ms`, each the median of `runs` plans after one that warms up."""
    queue = Snapshot(
        leases=tuple(leases(LEASES)),
        pools=(POOL,),
        nodes=tuple(nodes()),
        books=(BookFacts("book", "book-uid", 1, NOW, BOOK, PriceBookStatus()),),
        miners=tuple(miners(nodes())),
    )
    placed = plan(queue, NOW)
    if placed.refusals:
        raise RuntimeError(f"{len(placed.refusals)} of {LEASES} leases found no room: this measures something else")
    busy = at_rest(queue, placed)
    more = replace(busy, leases=(*busy.leases, *leases(1, "more")))
    return [
        figure(
            "plan_decision_us", [second * 1e6 / LEASES for second in timed(queue, runs)], "µs", "≤ 60 at 3,456 GPUs"
        ),
        figure("plan_increment_ms", [second * 1e3 for second in timed(more, runs)], "ms", "one lease, 3,456 GPUs"),
    ]


def timed(snapshot: Snapshot, runs: int) -> list[float]:
    """Seconds that each plan takes. The fleet is out of the garbage collector's sight: it is not what is measured."""
    plan(snapshot, NOW)
    with collected():
        return [_seconds(snapshot) for _ in range(runs)]


@contextmanager
def collected() -> Iterator[None]:
    """The garbage collector as the operator sets it, what is there already out of its sight."""
    gc.collect()
    gc.freeze()
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _seconds(snapshot: Snapshot) -> float:
    """CPU time: a plan waits for nothing, so on an idle machine that is the time it takes."""
    started = time.process_time()
    plan(snapshot, NOW)
    return time.process_time() - started


def nodes(count: int = NODES) -> Iterator[NodeFacts]:
    """The fleet, every GPU mining; every second node in MIG mode."""
    for number in range(count):
        name, profile = f"node-{number:03d}", "7g.80gb" if number % 2 else FULL
        mode = GpuMode.MIG if number % 2 else GpuMode.WHOLE
        gpus = tuple(
            Gpu(index=index, uuid=f"GPU-{number}-{index}", model=MODEL, memory_mib=81_920, mode=mode)
            for index in range(GPUS)
        )
        yield _running(NodeFacts(name, 1, gpus, tuple(_mining(gpu, profile) for gpu in gpus), ()))


def _mining(gpu: Gpu, profile: str) -> Slot:
    holder = Holder(kind=HolderKind.MINING_POOL, namespace=POOL.key.namespace, name=POOL.key.name, uid=POOL.uid)
    name = device_name(gpu.index, profile, 0, POOL.uid, 1)
    return Slot(device=name, gpu=gpu.uuid, profile=profile, holder=holder, since=NOW)


def _running(node: NodeFacts) -> NodeFacts:
    """The node once its agent has made and published what is wanted."""
    return replace(
        node,
        observed=tuple(_ready(slot) for slot in node.slots),
        published=frozenset(slot.device for slot in node.slots),
        allocatable=Amount(cpu_milli=128_000, memory=2048 * 2**30, pods=110),
        agent_until=NOW + timedelta(seconds=40),
    )


def _ready(slot: Slot) -> ObservedSlot:
    return ObservedSlot(
        device=slot.device,
        gpu=slot.gpu,
        profile=slot.profile,
        start=slot.start,
        holder=slot.holder,
        state=SlotState.READY,
        ready_at=NOW,
    )


def leases(count: int, name: str = "lease") -> Iterator[LeaseFacts]:
    """Leases of an hour, all widths mixed, in the order of their age."""
    for number, (profile, gpus) in enumerate(islice(cycle(WISHES), count)):
        spec = GpuLeaseSpec.model_validate({"gpus": {"profile": profile, "count": gpus}, "term": {"duration": "1h"}})
        created = NOW - timedelta(hours=1) + timedelta(seconds=number)
        yield LeaseFacts(Key("team", f"{name}-{number}"), f"{name}-uid-{number}", 1, created, spec, GpuLeaseStatus())


def miners(fleet: Iterable[NodeFacts]) -> Iterator[MinerFacts]:
    """A running miner on every device of the pool."""
    made_from = revision(POOL.spec)
    for node in fleet:
        for slot in node.slots:
            if slot.holder.uid == POOL.uid:
                name, place = miner_name(node.name, slot.device), (node.name, slot.device)
                yield MinerFacts(name, "mining", POOL.uid, *place, name, "pod", "claim", made_from, running=True)


def at_rest(queue: Snapshot, placed: Plan) -> Snapshot:
    """The fleet when everything that was planned has happened: every lease is billed, every miner runs."""
    promised = {action.node: action.slots for action in placed.actions if isinstance(action, SetSlots)}
    fleet = tuple(_running(replace(node, slots=promised.get(node.name, node.slots))) for node in queue.nodes)
    admitted = tuple(
        replace(one.lease, status=lease_status(one, None, NOW), finalized=True, claim_template="template")
        for one in placed.leases
    )
    facts = replace(queue, leases=admitted, nodes=fleet, miners=tuple(miners(fleet)))
    opened = {one.lease.uid: one for one in plan(facts, NOW).actions if isinstance(one, OpenRecord)}
    billed = tuple(replace(lease, records=(_record(opened[lease.uid]),)) for lease in admitted)
    facts = replace(facts, leases=billed)
    if left := plan(facts, NOW).actions:
        raise RuntimeError(f"the fleet is not at rest, {len(left)} actions are left: {left[0]}")
    return facts


def _record(action: OpenRecord) -> RecordFacts:
    return RecordFacts(action.lease.key.namespace, action.name, action.spec)
