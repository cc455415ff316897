"""What a simulation comes to: numbers only, the same for the same input and seed; written as JSON, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from math import fsum
from pathlib import Path
from typing import Final, Self

from pydantic import Field, ValidationError

from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.lease import Tier
from gpu_tenancy.core.ledger import CENT, SECONDS_PER_HOUR
from gpu_tenancy.core.ordering import TIERS
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.tenancy import Tenants
from gpu_tenancy.mig.profiles import MEMORY_SLICES
from gpu_tenancy.simulate.description import Description, Part, in_words
from gpu_tenancy.simulate.replay import Replay
from gpu_tenancy.simulate.tally import MICROSECOND, Point, Side, Tally
from gpu_tenancy.simulate.trace import Trace, by_line

MICROSECONDS: Final = 1_000_000
STATES: Final = (
    SliceState.LEASED, SliceState.MINING, SliceState.HAND_OVER, SliceState.IDLE, SliceState.FAULTY, SliceState.CONTESTED
)  # fmt: skip


class Waits(Part):
    """Seconds from being asked for until all devices were ready, of leases that started."""

    mean: float = 0.0
    """Mean."""
    p50: float = 0.0
    """Half of them waited no longer."""
    p95: float = 0.0
    """95 of 100."""
    p99: float = 0.0
    """99 of 100."""
    max: float = 0.0
    """The longest."""


class Group(Part):
    """Leases of a tier, of a tenant, or all."""

    asked: int
    """Leases that were asked for."""
    started: int
    """That got their devices."""
    ended: int
    """That ran to their end."""
    refused: int
    """That were refused for good at once."""
    waiting: int
    """That had not started when the simulation ended."""
    preempted: int
    """Times that one gave way to a firmer lease."""
    lost: int
    """Times that one lost its devices to a fault."""
    waits: Waits
    """How long they waited."""
    gpu_hours: float
    """Billed; a slice counts by its part of the GPU's memory."""
    money: dict[str, str]
    """What they were billed, by currency."""


class Stretch(Part):
    """A part of the simulated time; all of one length."""

    gpus: dict[str, float]
    """Mean GPUs in each state."""
    waiting: float
    """Mean number of leases that waited."""
    fits: dict[str, int]
    """Devices of each profile that would have found room at its beginning, if only it were asked for."""
    widest: int
    """Largest pod, in whole GPUs on one node, that would have found room at its beginning."""


class Conservation(Part):
    """The law that every slice is in exactly one hand at any time."""

    slice_microseconds: int
    """Slices × time."""
    by_state: dict[str, int]
    """The same, by the hand that they were in."""
    leased_by_records: int
    """Between the opening and the closing of billing segments."""

    @property
    def holds(self) -> bool:
        """Nothing is missing, nothing is there twice, and what is leased is what is billed."""
        contested, leased = (self.by_state.get(state, 0) for state in (SliceState.CONTESTED, SliceState.LEASED))
        complete = sum(self.by_state.values()) == self.slice_microseconds
        return complete and not contested and leased == self.leased_by_records


class Result(Part):
    """What a simulation comes to."""

    title: str
    """What was simulated."""
    seed: int
    """What chance was drawn from."""
    began: str
    """When the first lease was asked for."""
    seconds: float
    """How long it went on."""
    gpus: int
    """GPUs of the company."""
    all: Group
    """All leases."""
    tiers: dict[str, Group]
    """By tier."""
    tenants: dict[str, Group]
    """By tenant."""
    shares: dict[str, float]
    """Percent of all slice-seconds, by the hand that they were in."""
    idle_mined_pct: float | None
    """Percent of the slice-seconds that no lease and no fault had in which a miner mined."""
    mined: dict[str, str]
    """What mining brought in, by currency."""
    jain: float
    """Jain's index of what the tenants got for their weight: 1 where all got the same."""
    jain_of_demand: float
    """The same of the part of what they asked for that they got."""
    faults: int
    """Nodes lost and GPUs broken."""
    plans: int
    """Times that the planner was asked."""
    stretch_seconds: float
    """Length of each stretch of `series`."""
    series: list[Stretch]
    """Over time."""
    conservation: Conservation
    """Slices are in one hand each."""
    unread: list[str]
    """Rows of the trace that are no request, as sentences that name the line."""
    refused: list[str]
    """Leases that were refused for good, as sentences that name the line."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Policies that were in force."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """A result from a file. Raises ValueError with a sentence that names it."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is no result of a simulation: {in_words(error)}") from error


def result_of(replay: Replay, description: Description, trace: Trace, title: str, seed: int) -> Result:
    """What a simulation that was run comes to."""
    tally = replay.tally
    gpus = sum(len(node.gpus) for node in replay.cluster.nodes.values())
    seconds = (tally.now - tally.began).total_seconds() if trace.requests else 0.0
    weights = _weights(replay, description)
    return Result(
        title=title,
        seed=seed,
        began=format_time(tally.began),
        seconds=seconds,
        gpus=gpus,
        all=_group(tally.sides.values()),
        tiers={tier: _group(found) for tier in TIERS if (found := _of_tier(tally, tier))},
        tenants={one: _group(_of_tenant(tally, one)) for one in sorted({tenant for _, tenant in tally.sides})},
        shares=_shares(tally),
        idle_mined_pct=_idle_mined(tally),
        mined=_mined(tally, description),
        jain=jain([_got(tally, one) / weight for one, weight in weights.items()]),
        jain_of_demand=jain([_got(tally, one) / asked for one in weights if (asked := _wanted(tally, one))]),
        faults=replay.faults,
        plans=replay.plans,
        stretch_seconds=tally.width.total_seconds(),
        series=_series(tally),
        conservation=Conservation(
            slice_microseconds=gpus * MEMORY_SLICES * ((tally.now - tally.began) // MICROSECOND),
            by_state={state: tally.states[state] for state in STATES},
            leased_by_records=tally.leased,
        ),
        unread=list(by_line(trace.complaints)),
        refused=[f"line {one.request.line}: {one.why}" for one in replay.refused],
        settings={name: str(value) for name, value in description.policies.model_dump(exclude_none=True).items()},
    )


def _weights(replay: Replay, description: Description) -> dict[str, int]:
    """Of every tenant that asked for anything, by title."""
    tenants = Tenants(replay.cluster.tenants, description.policies.tenant_defaults)
    of_named = {tenants.of(namespace).title: tenants.of(namespace).weight for namespace in replay.namespaces}
    return dict(sorted(of_named.items()))


def _of_tier(tally: Tally, tier: Tier) -> list[Side]:
    return [side for (one, _), side in tally.sides.items() if one is tier]


def _of_tenant(tally: Tally, tenant: str) -> list[Side]:
    return [side for (_, one), side in tally.sides.items() if one == tenant]


def _got(tally: Tally, tenant: str) -> int:
    return sum(side.slice_seconds for side in _of_tenant(tally, tenant))


def _wanted(tally: Tally, tenant: str) -> int:
    return sum(side.asked_slice_seconds for side in _of_tenant(tally, tenant))


def _group(sides: Iterable[Side]) -> Group:
    found = list(sides)
    started, asked, refused = (sum(getattr(one, name) for one in found) for name in ("started", "asked", "refused"))
    money: dict[str, Decimal] = {}
    for side in found:
        for currency, amount in side.money.items():
            money[currency] = money.get(currency, Decimal(0)) + amount
    return Group(
        asked=asked,
        started=started,
        ended=sum(one.ended for one in found),
        refused=refused,
        waiting=asked - started - refused,
        preempted=sum(one.preempted for one in found),
        lost=sum(one.lost for one in found),
        waits=_waits([wait for one in found for wait in one.waits]),
        gpu_hours=round(sum(one.slice_seconds for one in found) / MEMORY_SLICES / SECONDS_PER_HOUR, 3),
        money={currency: _rounded(amount) for currency, amount in sorted(money.items())},
    )


def _rounded(per_hour_seconds: Decimal) -> str:
    """Price per hour × seconds as money, divided and rounded once."""
    return f"{(per_hour_seconds / SECONDS_PER_HOUR).quantize(CENT, ROUND_HALF_EVEN):f}"


def _waits(waits: list[float]) -> Waits:
    if not waits:
        return Waits()
    waits.sort()
    p50, p95, p99 = (percentile(waits, share) for share in (50, 95, 99))
    return Waits(mean=round(fsum(waits) / len(waits), 3), p50=p50, p95=p95, p99=p99, max=waits[-1])


def percentile(ordered: Sequence[float], share: int) -> float:
    """The least value that so many of a hundred do not exceed."""
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: from 1/n, where one has everything, to 1, where all have the same."""
    total, squares = fsum(values), fsum(value * value for value in values)
    return round(total * total / (len(values) * squares), 6) if squares else 1.0


def _shares(tally: Tally) -> dict[str, float]:
    total = sum(tally.states.values())
    return {state: round(100 * tally.states[state] / total, 4) if total else 0.0 for state in STATES}


def _idle_mined(tally: Tally) -> float | None:
    """Everything counts as idle that is neither leased nor out of use: every hand-over, whoever it is for, is time lost
    to mining."""
    mining = tally.states[SliceState.MINING]
    idle = mining + tally.states[SliceState.IDLE] + tally.states[SliceState.HAND_OVER]
    return round(100 * mining / idle, 4) if idle else None


def _mined(tally: Tally, description: Description) -> dict[str, str]:
    mining = tally.states[SliceState.MINING]
    per_hour = Decimal(description.mining.per_gpu_hour)
    if not (mining and per_hour):
        return {}
    return {description.mining.currency: _rounded(per_hour * mining / MEMORY_SLICES / MICROSECONDS)}


def _series(tally: Tally) -> list[Stretch]:
    stretches, whole = [], tally.width // MICROSECOND
    for number, point in enumerate(tally.points):
        length = min(whole, (tally.now - tally.began) // MICROSECOND - number * whole) or 1
        stretches.append(_stretch(point, length))
    return stretches


def _stretch(point: Point, microseconds: int) -> Stretch:
    """The last one may be shorter than the others."""
    means: Mapping[str, float] = {
        state: round(point.states[state] / MEMORY_SLICES / microseconds, 3) for state in STATES
    }
    return Stretch(
        gpus=dict(means),
        waiting=round(point.waiting / microseconds, 3),
        fits=point.room.fits,
        widest=point.room.widest,
    )
