"""philly_replay_leases: 300 consecutive jobs of a trace, lived through as GpuLeases on a real control plane.

The trace is a CSV file with the columns timestamp (submission), duration (seconds), num_gpus and cluster (a virtual
cluster, here a namespace), as the flattened Philly trace has them. Of all stretches of 300 jobs, in the order of
submission, that begin at a multiple of 300, the one with the most jobs of several GPUs is taken.

Mapping, the same for every trace: submissions are squeezed evenly into 150 s; durations are divided by the same factor,
rounded to whole seconds, at least 1 s and at most 60 s (how many were cut is said), and become `term.duration`; a job
of up to 8 GPUs is one pod, a larger one a gang of equal pods of at most 8. The cluster has three quarters of the GPUs
that the jobs would hold at the busiest moment if none had to wait, so that some do; what is not leased mines.

The figure is the number of leases that are settled and billed exactly: every UsageRecord closed, their seconds together
equal to the term, the record's devices as many as the job's GPUs, the end an expiry. Everything is read from the API
server after the run; waiting is from the create call to the event that says Ready.
"""

from __future__ import annotations

import asyncio
import csv
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.kube import resources
from tests.bench import fleet
from tests.bench.figures import Figure, figure
from tests.cluster.api import Object
from tests.cluster.world import World, condition_of, lease, pool, price_book, template

JOBS: Final = 300
SUBMIT_SECONDS: Final = 150.0
"""The last job is submitted so long after the first."""
SHORTEST, LONGEST = 1, 60
"""Seconds of a term."""
SHARE_OF_PEAK: Final = 0.75
"""GPUs of the cluster, as a share of what would be held at the busiest moment if nobody waited."""
RUN_SECONDS: Final = 360.0
"""How long a run may take, starting the cluster included; what is not settled by then does not count."""
SEED: Final = 0
MINING: Final = "mining"


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a trace, in the trace's own time."""

    submitted: float
    """Seconds, from any origin."""
    seconds: float
    gpus: int
    cluster: str


@dataclass(frozen=True, slots=True)
class Tenancy:
    """A job as a lease."""

    name: str
    namespace: str
    at: float
    """Seconds after the first submission."""
    term: int
    """Whole seconds."""
    pods: int
    gpus: int
    """Per pod."""

    @property
    def devices(self) -> int:
        """GPUs in all."""
        return self.pods * self.gpus

    def manifest(self) -> Object:
        """The GpuLease."""
        return lease(
            self.name,
            self.namespace,
            gpus={"profile": "full", "count": self.gpus},
            pods=self.pods,
            term={"duration": f"{self.term}s", "notice": "0s"},
            template=template(),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of them."""

    exact: int
    """Settled and billed to the second."""
    waits: list[float]
    """Seconds from the create call to Ready, of those that became Ready."""
    mined: float
    """Share of the GPU-seconds that nobody leased in which a miner ran."""


def run(trace: str | None) -> list[Figure]:
    """Replay the trace, or a sample of our own making where there is none. One run, at most six minutes."""
    if trace is None:
        fleet.say(
            f"philly_replay_leases needs TRACE=, the path of a trace; instead {JOBS} jobs made up with seed {SEED} are "
            "replayed, as sample_replay_leases"
        )
        return _figures("sample_replay", "made-up jobs", sample(SEED))
    return _figures("philly_replay", "jobs", busiest(read(Path(trace))))


def _figures(name: str, what: str, jobs: Sequence[Job]) -> list[Figure]:
    outcome = asyncio.run(_replay(squeezed(jobs)))
    return [
        figure(f"{name}_leases", [outcome.exact], "leases", f"{len(jobs)} of {len(jobs)} {what}, billed exactly"),
        figure(f"{name}_wait_s", outcome.waits, "s", "none: create to Ready, waiting for room included"),
        figure(f"{name}_mined_share", [outcome.mined], "", "none: mined part of the GPU time that nobody leased"),
    ]


# --- the jobs -----------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Job]:
    """The jobs of a trace by time of submission. Raises ValueError for a file with other columns."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = {"timestamp", "duration", "num_gpus", "cluster"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; it is not a trace of the Philly kind")
        jobs = [
            Job(
                datetime.fromisoformat(row["timestamp"]).timestamp(),
                float(row["duration"]),
                int(row["num_gpus"]),
                row["cluster"],
            )
            for row in rows
        ]
    return sorted(jobs, key=lambda job: job.submitted)


def busiest(jobs: Sequence[Job]) -> Sequence[Job]:
    """The stretch with the most jobs of several GPUs; the first of equals."""
    stretches = [jobs[start : start + JOBS] for start in range(0, max(1, len(jobs) - JOBS + 1), JOBS)]
    return max(stretches, key=lambda stretch: sum(job.gpus > 1 for job in stretch))


def sample(seed: int) -> list[Job]:
    """Made-up jobs: arrivals at random, most of one GPU and short, some gangs and some long."""
    dice = random.Random(seed)
    sizes, weights = (1, 2, 4, 8, 16, 32), (60, 12, 12, 12, 3, 1)
    now, jobs = 0.0, []
    for _ in range(JOBS):
        now += dice.expovariate(1 / 120)
        [gpus] = dice.choices(sizes, weights)
        jobs.append(Job(now, dice.lognormvariate(6.5, 1.8), gpus, f"{dice.randrange(6):02d}"))
    return jobs


def squeezed(jobs: Sequence[Job]) -> list[Tenancy]:
    """The jobs as leases; see the module's mapping."""
    first = jobs[0].submitted
    factor = max(1e-9, (jobs[-1].submitted - first) / SUBMIT_SECONDS)
    terms = [max(SHORTEST, round(job.seconds / factor)) for job in jobs]
    cut = sum(term > LONGEST for term in terms)
    fleet.say(f"{len(jobs)} jobs, 1 s stands for {factor:.0f} s, {cut} terms cut to {LONGEST} s")
    tenancies = []
    for index, (job, term) in enumerate(zip(jobs, terms, strict=True)):
        pods, gpus = gang(job.gpus)
        at = (job.submitted - first) / factor
        tenancies.append(Tenancy(f"job-{index:03d}", f"vc-{job.cluster}", at, min(LONGEST, term), pods, gpus))
    return tenancies


def gang(gpus: int) -> tuple[int, int]:
    """Pods, and GPUs of each: as few equal pods of at most 8 GPUs as there can be."""
    pods = next(pods for pods in range(-(-gpus // fleet.GPUS), gpus + 1) if gpus % pods == 0)
    return pods, gpus // pods


def size(tenancies: Sequence[Tenancy]) -> int:
    """Nodes of the cluster."""
    starts = [(one.at, one.devices) for one in tenancies]
    ends = [(one.at + one.term, -one.devices) for one in tenancies]
    held = peak = 0
    for _, change in sorted(starts + ends):
        held += change
        peak = max(peak, held)
    largest = max(one.pods for one in tenancies)
    return max(2, largest, -(-round(peak * SHARE_OF_PEAK) // fleet.GPUS))


# --- the run ------------------------------------------------------------------------------------------------------


async def _replay(tenancies: Sequence[Tenancy]) -> Outcome:
    deadline = time.monotonic() + RUN_SECONDS
    nodes = size(tenancies)
    namespaces = sorted({one.namespace for one in tenancies})
    async with World(fleet.servers(nodes), agents_apart=False, namespaces=[*namespaces, MINING]) as world:
        await world.create(price_book())
        await world.create(pool(resources={"cpu": "1", "memory": "1Gi"}))
        await world.mining(nodes * fleet.GPUS)
        fleet.say(f"{nodes * fleet.GPUS} GPUs on {nodes} nodes, all mining; {len(namespaces)} virtual clusters")
        before = await _slice_seconds(world)
        waits = await _live(world, tenancies, deadline)
        after = await _slice_seconds(world)
        wrong = await _wrong(world, tenancies)
    for name, why in list(wrong.items())[:10]:
        fleet.say(f"{name}: {why}")
    unleased = {state: after[state] - before[state] for state in after if state != "leased"}
    return Outcome(len(tenancies) - len(wrong), waits, unleased["mining"] / sum(unleased.values()))


async def _live(world: World, tenancies: Sequence[Tenancy], deadline: float) -> list[float]:
    """Submit everything in its time and wait until all are settled, or the deadline (time.monotonic); the waits."""
    states = await fleet.states(world.api, resources.GPU_LEASES, fleet.Lease)
    created: dict[str, float] = {}
    ready: dict[str, float] = {}
    follower = asyncio.create_task(_follow(states, len(tenancies), ready))
    began = time.monotonic()
    async with asyncio.TaskGroup() as submissions:
        for one in tenancies:
            await asyncio.sleep(max(0.0, began + one.at - time.monotonic()))
            created[one.name] = time.monotonic()
            submissions.create_task(fleet.post(world.api, [(resources.GPU_LEASES, one.manifest())]))
    fleet.say(f"all submitted after {time.monotonic() - began:.0f} s")
    await asyncio.wait((follower,), timeout=max(0.0, deadline - time.monotonic()))
    if not follower.done():
        follower.cancel()
    fleet.say(f"over after {time.monotonic() - began:.0f} s")
    return [ready[name] - created[name] for name in ready]


async def _follow(states: AsyncGenerator[fleet.Lease, None], count: int, ready: dict[str, float]) -> None:
    """Note when each lease is Ready; ends when all are settled."""
    settled: set[str] = set()
    async for one in states:
        if one.is_true(ConditionType.READY):
            ready.setdefault(one.metadata.name, time.monotonic())
        if one.is_true(ConditionType.SETTLED):
            settled.add(one.metadata.name)
            if len(settled) == count:
                return


async def _slice_seconds(world: World) -> dict[str, float]:
    """Slice-seconds by state, by the operator's metric."""
    _, text = await world.ask("/metrics")
    return {
        sample.labels["state"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "gpu_tenancy_slice_seconds_total"
    }


# --- the check ----------------------------------------------------------------------------------------------------


async def _wrong(world: World, tenancies: Sequence[Tenancy]) -> dict[str, str]:
    """Leases that are not settled or not billed exactly, and why."""
    records: dict[str, list[Object]] = defaultdict(list)
    for record in await world.items(resources.USAGE_RECORDS):
        records[record["spec"]["leaseName"]].append(record["spec"])
    leases = {one["metadata"]["name"]: one for one in await world.items(resources.GPU_LEASES)}
    found = {one.name: _fault(one, leases.get(one.name), records) for one in tenancies}
    return {name: why for name, why in found.items() if why}


def _fault(one: Tenancy, body: Object | None, records: Mapping[str, Sequence[Object]]) -> str:
    """What is wrong with a lease, as a sentence; empty where nothing is."""
    settled = condition_of(body, ConditionType.SETTLED) if body else None
    if body is None or settled is None or settled["status"] != "True":
        return f"is not settled: {condition_of(body, ConditionType.READY) if body else 'it is not there'}"
    specs = records.get(one.name, ())
    seconds: list[int | None] = [spec.get("seconds") for spec in specs]
    if None in seconds or sum(filter(None, seconds)) != one.term:
        return f"is billed {seconds} s for a term of {one.term} s"
    if any(len(spec["devices"]) != one.devices for spec in specs):
        return f"is billed for {[len(spec['devices']) for spec in specs]} GPUs instead of {one.devices}"
    if body["status"]["ended"]["reason"] != Reason.EXPIRED:
        return f"ended by {body['status']['ended']['reason']}"
    return ""
