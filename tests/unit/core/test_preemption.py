"""A lease displaces the smallest set of miners that makes it fit, and never another lease."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import reduce
from itertools import combinations, product
from operator import or_

from hypothesis import assume, given
from hypothesis import strategies as st

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import Gpu, GpuMode, Slot
from gpu_tenancy.core.actions import Plan, SetSlots
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.desirability import NOBODY, span
from gpu_tenancy.core.placement import Placed, Want, World
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import Placement, device_mask, filling, layouts, mask_of, occupied_by, placements
from gpu_tenancy.mig.profiles import FULL, of_model
from tests.unit.core.builders import MODEL, ROOMY, START, gpus
from tests.unit.core.simulation import Cluster, mask

OTHER = "A100-PCIE-40GB"
PROFILES = ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")

Seat = tuple[tuple[str, int], ...]
"""What one pod takes: (GPU, mask) pairs."""


def devices(slots: Iterable[Slot], kind: HolderKind) -> set[str]:
    return {f"{slot.gpu}/{slot.device}" for slot in slots if slot.holder.kind is kind}


def leased(slots: Iterable[Slot]) -> list[Slot]:
    """Those of leases."""
    return [slot for slot in slots if slot.holder.kind is HolderKind.GPU_LEASE]


def taken_by(slots: Iterable[Slot]) -> dict[str, int]:
    """Memory slices that they take, as bits, by GPU."""
    taken: dict[str, int] = {}
    for slot in slots:
        taken[slot.gpu] = taken.get(slot.gpu, 0) | mask(slot)
    return taken


def slots_after(nodes: Iterable[NodeFacts], decided: Plan) -> list[Slot]:
    """The slots of all nodes once the plan is carried out."""
    after = {node.name: node.slots for node in nodes}
    after |= {action.node: action.slots for action in decided.actions if isinstance(action, SetSlots)}
    return [slot for slots in after.values() for slot in slots]


def seats(nodes: Iterable[NodeFacts], profile: str, count: int, taken: dict[str, int]) -> Iterator[Seat]:
    """Every way to seat one pod beside what is taken."""
    for node in nodes:
        if profile == FULL:
            free = [gpu.uuid for gpu in node.gpus if gpu.mode is GpuMode.WHOLE and not taken.get(gpu.uuid)]
            yield from (tuple((gpu, 0xFF) for gpu in chosen) for chosen in combinations(free, count))
            continue
        for gpu in node.gpus:
            for placement in placements(MODEL):
                bits = mask_of(MODEL, placement)
                if gpu.mode is GpuMode.MIG and placement.profile == profile and not bits & taken.get(gpu.uuid, 0):
                    yield ((gpu.uuid, bits),)


def displaced(nodes: Iterable[NodeFacts], taken: dict[str, int]) -> int:
    """Miners that cannot stay where leases hold `taken`."""
    gpus: dict[str, Gpu] = {gpu.uuid: gpu for node in nodes for gpu in node.gpus}
    miners = [slot for node in nodes for slot in node.slots if slot.holder.kind is HolderKind.MINING_POOL]
    return sum(1 for slot in miners if not _stays(slot, gpus[slot.gpu], taken.get(slot.gpu, 0)))


def _stays(slot: Slot, gpu: Gpu, hard: int) -> bool:
    return Placement(slot.profile, slot.start) in filling(MODEL, hard) if gpu.mode is GpuMode.MIG else not hard


def fewest(nodes: tuple[NodeFacts, ...], profile: str, count: int, pods: int, taken: dict[str, int]) -> int | None:
    """The fewest miners that any way to seat all pods displaces; None where there is no way."""
    if pods == 0:
        return displaced(nodes, taken)
    answers = []
    for seat in set(seats(nodes, profile, count, taken)):
        after = dict(taken)
        for gpu, bits in seat:
            after[gpu] = after.get(gpu, 0) | bits
        answers.append(fewest(nodes, profile, count, pods - 1, after))
    return min((answer for answer in answers if answer is not None), default=None)


def settled(leases: Iterable[str], idle: int, cpus: Iterable[int] = ()) -> Cluster:
    """A small cluster with these leases of one CPU, everything else mining on one CPU each but the first `idle` devices
    of the first node. `cpus`: of its nodes, where that is little; the third has another model."""
    cluster = Cluster()
    cluster.add_node("a", 3, mig={2})
    cluster.add_node("b", 4, mig={2, 3})
    for name, cpu in zip("abc", cpus, strict=False):
        node = cluster.nodes.get(name) or cluster.add_node(name, 2, model=OTHER)
        node.allocatable = Amount(cpu * 1000, ROOMY.memory, 110)
    for number, profile in enumerate(leases):
        cluster.create(f"l{number}", profile)
    cluster.add_pool(resources={"cpu": "1", "memory": "1Gi"})
    cluster.run(8)
    node = cluster.nodes["a"]
    kept = [slot for slot in node.slots if slot.holder.kind is HolderKind.GPU_LEASE]
    node.slots = (*kept, *[slot for slot in node.slots if slot not in kept][idle:])
    return cluster


@given(
    leases=st.lists(st.sampled_from((FULL, *PROFILES)), max_size=6),
    idle=st.integers(0, 2),
    profile=st.sampled_from((FULL, *PROFILES)),
    count=st.integers(1, 3),
    pods=st.integers(1, 3),
)
def test_no_other_choice_displaces_fewer_miners(
    leases: list[str], idle: int, profile: str, count: int, pods: int
) -> None:
    count = count if profile == FULL else 1
    cluster = settled(leases, idle)
    nodes = tuple(node.facts() for node in cluster.nodes.values())
    held = leased(slot for node in nodes for slot in node.slots)
    best = fewest(nodes, profile, count, pods, taken_by(held))
    assume(best is not None)

    uid = cluster.create("new", profile, count, pods)
    decided = plan(cluster.snapshot(), cluster.now)
    before, after = [slot for node in nodes for slot in node.slots], slots_after(nodes, decided)
    assert uid not in decided.refusals
    assert len(devices(before, HolderKind.MINING_POOL) - devices(after, HolderKind.MINING_POOL)) == best
    assert devices(held, HolderKind.GPU_LEASE) <= devices(after, HolderKind.GPU_LEASE)


# --- several models, and little CPU ---------------------------------------------------------------------------------


def test_of_several_models_the_one_is_taken_on_which_fewer_miners_stop() -> None:
    cluster = Cluster()
    cluster.add_node("busy", 4, model=OTHER)
    cluster.add_node("idle", 4).cordoned = True  # nobody mines on it
    cluster.add_pool()
    cluster.run(5)
    cluster.nodes["idle"].cordoned = False
    gang = cluster.create("gang", "full", 2, pods=2)
    decided = plan(cluster.snapshot(), cluster.now)
    assert [one.nodes for one in decided.leases if one.lease.uid == gang] == [("idle",)]
    named = cluster.create("named", "full", 2, model=OTHER)
    decided = plan(cluster.snapshot(), cluster.now)
    assert [one.nodes for one in decided.leases if one.lease.uid == named] == [("busy",)]


def test_between_models_on_which_as_many_miners_stop_the_first_by_name_is_taken() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2)
    cluster.add_node("b", 2, model=OTHER)
    cluster.add_pool()
    cluster.run(5)
    lease = cluster.create("lease", "full", 2)
    decided = plan(cluster.snapshot(), cluster.now)
    assert [one.nodes for one in decided.leases if one.lease.uid == lease] == [("b",)]


def test_a_lease_that_needs_much_cpu_goes_where_it_leaves_miners_theirs() -> None:
    cluster = Cluster()
    cluster.add_node("small", 8).allocatable = Amount(16_000, ROOMY.memory, 110)
    cluster.add_node("spacious", 8)
    cluster.add_pool(resources={"cpu": "1", "memory": "1Gi"})
    cluster.run(5)
    lease = cluster.create("lease", "full", 1, cpu="12", memory="1Gi")
    cluster.run(5)
    assert cluster.is_true(lease)
    assert {node for node, _ in cluster.slots_of(lease)} == {"spacious"}
    assert sum(cluster.mining().values()) == 15


@given(
    cpus=st.tuples(st.integers(3, 9), st.integers(3, 9), st.integers(3, 9)),
    leases=st.lists(st.sampled_from((FULL, *PROFILES)), max_size=3),
    idle=st.integers(0, 2),
    profile=st.sampled_from((FULL, *PROFILES)),
    count=st.integers(1, 3),
    cpu=st.integers(1, 7),
)
def test_no_other_choice_displaces_fewer_miners_where_cpu_is_short(
    cpus: tuple[int, int, int], leases: list[str], idle: int, profile: str, count: int, cpu: int
) -> None:
    count = count if profile == FULL else 1
    cluster = settled(leases, idle, cpus)
    nodes = tuple(node.facts() for node in cluster.nodes.values())
    best = min(displaced_by_any_seat(nodes, profile, count, cpu), default=None)
    assume(best is not None)

    uid = cluster.create("new", profile, count, cpu=str(cpu), memory="1Gi")
    decided = plan(cluster.snapshot(), cluster.now)
    before, after = [slot for node in nodes for slot in node.slots], slots_after(nodes, decided)
    assert uid not in decided.refusals
    assert len(devices(before, HolderKind.MINING_POOL) - devices(after, HolderKind.MINING_POOL)) == best


@given(
    cpus=st.tuples(st.integers(3, 20), st.integers(3, 20), st.integers(3, 20)),
    wanted=st.lists(
        st.tuples(st.sampled_from((FULL, *PROFILES)), st.integers(1, 2), st.integers(1, 3), st.integers(1, 6)),
        min_size=2,
        max_size=8,
    ),
)
def test_what_is_remembered_of_a_node_within_a_plan_changes_no_choice(
    cpus: tuple[int, int, int], wanted: list[tuple[str, int, int, int]]
) -> None:
    facts = [node.facts() for node in settled((), 1, cpus).nodes.values()]
    takes = {slot.holder.uid: Amount(1000, 2**30, 1) for node in facts for slot in node.slots}
    remembering, forgetful = World(facts, START, takes), World(facts, START, takes)
    for world in (remembering, forgetful):
        world.settle()
    for profile, count, pods, cpu in wanted:
        needs = PodNeeds(Amount(cpu * 1000, 2**30, 1))
        models = (OTHER, MODEL) if profile == FULL else (MODEL,)
        for node in forgetful.nodes.values():
            node.answers.clear()
        chosen = [
            world.place([Want(profile, count if profile == FULL else 1, pods, model, needs) for model in models])
            for world in (remembering, forgetful)
        ]
        assert len({_choice(one) for one in chosen}) == 1


def _choice(placed: Placed | None) -> object:
    """Model, cost and seats, to compare those of two worlds."""
    if placed is None:
        return None
    seats = [(seat.node.facts.name, [book.gpu.uuid for book in seat.gpus], seat.start) for seat in placed.seats]
    return placed.want.model, placed.cost, repr(seats)


def displaced_by_any_seat(nodes: tuple[NodeFacts, ...], profile: str, count: int, cpu: int) -> Iterator[int]:
    """For each way to seat one pod with that much CPU: the miners that lose their GPU or their CPU."""
    for node in nodes:
        held = leased(node.slots)
        taken = taken_by(held)
        left = node.allocatable.cpu_milli // 1000 - len(held) - cpu  # each lease before is of one pod with 1 CPU
        if left < 0:
            continue
        mined = [slot for slot in node.slots if slot.holder.kind is HolderKind.MINING_POOL]
        for seat in set(seats([node], profile, count, taken)):
            after = taken | {gpu: taken.get(gpu, 0) | bits for gpu, bits in seat}
            staying = sum(1 for slot in mined if _stays(slot, node.gpu_of[slot.gpu], after.get(slot.gpu, 0)))
            yield len(mined) - min(staying, left)


# --- large gangs of slices ------------------------------------------------------------------------------------------

MiningGpu = tuple[int, frozenset[Placement]]
"""Memory slices that leases hold, as bits, and what mines beside them."""

HELD = sorted({occupied_by(MODEL, layout) for layout in layouts(MODEL)})


@st.composite
def mining_gpus(draw: st.DrawFn) -> MiningGpu:
    """A GPU in MIG mode as it may be found: the rest is mined as it is filled, or a part of it has not begun yet."""
    held = draw(st.sampled_from(HELD))
    rest = filling(MODEL, held)
    begun = draw(st.lists(st.booleans(), min_size=len(rest), max_size=len(rest)) | st.just([True] * len(rest)))
    return held, frozenset(place for place, mines in zip(rest, begun, strict=True) if mines)


def stopped(gpu: MiningGpu, profile: str, pods: int) -> int | None:
    """The fewest miners that stop where that many pods come onto one GPU; None where they do not fit."""
    held, miners = gpu
    starts = [start for start in of_model(MODEL)[profile].starts if not held & device_mask(MODEL, profile, start)]
    answers = []
    for chosen in combinations(starts, pods):
        masks = [device_mask(MODEL, profile, start) for start in chosen]
        union = reduce(or_, masks, 0)
        if union.bit_count() == sum(mask.bit_count() for mask in masks):
            answers.append(len(miners - set(filling(MODEL, held | union))))
    return min(answers, default=None)


def fewest_stopped(found: Iterable[MiningGpu], profile: str, pods: int) -> int | None:
    """The fewest miners that stop for a gang: over all ways to share its pods out among the GPUs."""
    best: dict[int, int] = {0: 0}
    for gpu in found:
        alone = {number: cost for number in range(8) if (cost := stopped(gpu, profile, number)) is not None}
        former, best = best, {}
        for (seated, before), (number, cost) in product(former.items(), alone.items()):
            best[seated + number] = min(before + cost, best.get(seated + number, before + cost))
    return best.get(pods)


@given(
    found=st.lists(mining_gpus(), min_size=1, max_size=6),
    profile=st.sampled_from(PROFILES),
    pods=st.integers(1, 12),
    left=st.none() | st.timedeltas(timedelta(0), timedelta(days=40)),
    lasting=st.lists(st.timedeltas(timedelta(0), timedelta(days=40)), min_size=6, max_size=6),
)
def test_no_way_to_seat_a_large_gang_of_slices_stops_fewer_miners_however_long_leases_last(
    found: list[MiningGpu], profile: str, pods: int, left: timedelta | None, lasting: list[timedelta]
) -> None:
    best = fewest_stopped(found, profile, pods)
    world = World([_mining_node(found)], START, {})
    for gpu, (held, _), ends in zip(world.nodes["a"].gpus.values(), found, lasting, strict=False):
        gpu.hard, gpu.lasts = held, span(ends) if held else NOBODY
        world.nodes["a"].slots.append(_slot(gpu.gpu.uuid, "held", 0, HolderKind.GPU_LEASE))
    world.settle()
    placed = world.place([Want(profile, 1, pods, MODEL, PodNeeds(Amount(1, 1, 1)))], left)
    assert (placed is None) == (best is None)
    if placed is not None:
        after = [book.hard for book in world.nodes["a"].gpus.values()]
        stops = (len(miners - set(filling(MODEL, hard))) for (_, miners), hard in zip(found, after, strict=True))
        already = (len(miners - set(filling(MODEL, held))) for held, miners in found)
        assert sum(stops) - sum(already) == best


def _mining_node(found: list[MiningGpu]) -> NodeFacts:
    known = gpus("a", len(found), mig=range(len(found)))
    slots = [
        _slot(gpu.uuid, place.profile, place.start, HolderKind.MINING_POOL)
        for gpu, (_, miners) in zip(known, found, strict=True)
        for place in sorted(miners)
    ]
    until = START + timedelta(hours=1)
    return NodeFacts("a", 1, tuple(known), tuple(slots), (), allocatable=ROOMY, agent_until=until)


def _slot(gpu: str, profile: str, start: int, kind: HolderKind) -> Slot:
    holder = Holder(kind=kind, namespace="n", name="x", uid="uid")
    device = f"{gpu.lower()}-{profile.replace('.', '')}-{start}"
    return Slot.model_construct(device=device, gpu=gpu, profile=profile, start=start, holder=holder, since=START)
