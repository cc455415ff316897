"""The conservation law, where it can fail: slice-seconds that the operator counts against those that it bills.

Two ways to one number. The metric looks in every cycle in whose hand each slice is; the ledger has the first and the
last instant of every segment, in whole seconds. Between them stands when the API server showed a record open and when
closed, which neither of them can choose. Pure, but for `read`.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from gpu_tenancy.api import names
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.ledger import double_billings
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.kube import resources
from gpu_tenancy.mig.profiles import slices
from tests.cluster.api import MERGE
from tests.cluster.observed import NotSeenError, Observed
from tests.cluster.world import World

STARTED_SECONDS: Final = 2.0
"""A segment's first and last second are free unless they are whole: less than one second at either end."""
DELIVERY_SECONDS: Final = 0.25
"""How late a change may be shown to one of two watches on a machine that has other work; pauses of 20 ms included."""
PATIENCE_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Reading:
    """What the operator has counted, and between which instants (of `time.monotonic`) it last did so."""

    states: Mapping[str, float]
    """Slice-seconds by state."""
    cycles: Mapping[float, float]
    """How many cycles took at most so many seconds."""
    earliest: float
    latest: float

    @property
    def total(self) -> float:
        """Slice-seconds of all states together."""
        return sum(self.states.values())


@dataclass(frozen=True, slots=True)
class Stand:
    """A closed segment, and for how long the API server showed it open."""

    segment: UsageRecordSpec
    seconds_open: float

    @property
    def width(self) -> int:
        """Memory slices that it is billed for at any time."""
        return len(self.segment.devices) * slices(self.segment.model, self.segment.profile)

    @property
    def billed(self) -> int:
        """Slice-seconds on record."""
        return self.width * (self.segment.seconds or 0)


async def read(world: World, pool: str, namespace: str = "mining") -> Reading:
    """What is counted after a cycle that began now: an annotation on a MiningPool makes the operator look."""
    earliest, before = time.monotonic(), await _counted(world)
    path = resources.MINING_POOLS.path(namespace, pool)
    await world.api.patch(path, {"metadata": {"annotations": {f"{names.GROUP}/looked-at": f"{earliest}"}}}, MERGE)
    while time.monotonic() < earliest + PATIENCE_SECONDS:
        (states, cycles), now = await _counted(world), time.monotonic()
        if sum(states.values()) > sum(before[0].values()):
            return Reading(states, cycles, earliest, now)
        await asyncio.sleep(LOOK_SECONDS)
    raise NotSeenError("gpu_tenancy_slice_seconds_total to grow", f"{before[0]}", PATIENCE_SECONDS)


async def _counted(world: World) -> tuple[dict[str, float], dict[float, float]]:
    """Slice-seconds by state, and cycles by the most seconds that they took."""
    status, text = await world.ask("/metrics")
    if status != 200:
        raise NotSeenError("the operator's /metrics to answer", f"status {status}: {text}")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return (
        {one.labels["state"]: one.value for one in samples if one.name == "gpu_tenancy_slice_seconds_total"},
        {float(one.labels["le"]): one.value for one in samples if one.name == "gpu_tenancy_cycle_seconds_bucket"},
    )


def stands(observed: Observed) -> list[Stand]:
    """Every segment that was ever seen and is closed."""
    found = []
    for record in observed.ever(resources.USAGE_RECORDS):
        versions = observed.versions(record["metadata"]["uid"])
        closed = [version.at for version in versions if "billableTo" in version.body["spec"]]
        if closed:
            segment = UsageRecordSpec.model_validate(record["spec"])
            found.append(Stand(segment, closed[0] - versions[0].at))
    return found


def gained(first: Reading, last: Reading) -> dict[str, float]:
    """Slice-seconds by state between two readings."""
    return {state: last.states[state] - first.states.get(state, 0.0) for state in sorted(last.states)}


def sampling_seconds(first: Reading, last: Reading) -> float:
    """How late the operator may notice something: once the cycle that is under way is over, at most the longest one
    between the two readings, and once it was told. Both the ledger and the metric are as late as that, not later: a
    cycle begins with the look at the slices, and writes records first."""
    took = {bound: last.cycles[bound] - first.cycles.get(bound, 0.0) for bound in sorted(last.cycles)}
    all_of_them = max(took.values(), default=0.0)
    finite = [bound for bound in took if bound != float("inf")]
    longest = next((bound for bound in finite if took[bound] == all_of_them), max(finite))
    return longest + DELIVERY_SECONDS


def breaches(first: Reading, last: Reading, segments: Sequence[Stand]) -> list[str]:
    """How the law was broken between two readings, as sentences. `segments`: all that were billed between them."""
    lag, counted = sampling_seconds(first, last), gained(first, last)
    return [
        *_twice(counted, [one.segment for one in segments]),
        *(sentence for one in segments if (sentence := _misbilled(one, lag))),
        *_miscounted(counted[SliceState.LEASED], segments, lag),
    ]


def _twice(counted: Mapping[str, float], segments: Iterable[UsageRecordSpec]) -> list[str]:
    """Nothing is in two hands, on record or in the operator's eyes; there is no tolerance."""
    contested = counted[SliceState.CONTESTED]
    found = [f"{contested:.1f} slice-seconds were contested"] if contested else []
    return found + [f"records {one.first} and {one.second} both bill {one.gpu}" for one in double_billings(segments)]


def _misbilled(one: Stand, lag: float) -> str:
    """A segment is billed for the time that its record stood open, less the started seconds. An end that the operator
    noticed late moves the record's stand and not the segment: the first end makes the stand shorter, the other makes
    it longer, each by at most `lag`."""
    segment, billed = one.segment, one.segment.seconds or 0
    least, most = one.seconds_open - STARTED_SECONDS - lag, one.seconds_open + lag
    if least <= billed <= most:
        return ""
    return (
        f"{segment.lease_name} is billed {billed} s, but its record stood open for {one.seconds_open:.2f} s "
        f"({least:.2f} to {most:.2f} s were due)"
    )


def _miscounted(leased: float, segments: Sequence[Stand], lag: float) -> list[str]:
    """Slices count as leased from the cycle that sees the record open to the one that sees it closed. What the first
    comes late is lost, what the other comes late is won: of each segment the difference is at most one `lag`."""
    due = sum(one.width * one.seconds_open for one in segments)
    slack = lag * sum(one.width for one in segments)
    if abs(leased - due) <= slack:
        return []
    return [f"{leased:.1f} slice-seconds were counted as leased; records stood open for {due:.1f}, ± {slack:.1f}"]
