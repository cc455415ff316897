"""When GPUs are free: the timetable against a search through every instant and every set of GPUs."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.core.timetable import NEVER, Span, Timetable
from gpu_tenancy.mig.layout import ALL_SLICES, device_mask, placements
from gpu_tenancy.mig.profiles import FULL, of_model
from tests.unit.core.builders import MODEL, ROOMY, START, gpus

ENDS = st.sampled_from([*(START + timedelta(minutes=number) for number in range(1, 6)), NEVER])
PROFILES = st.sampled_from(list(of_model(MODEL)))


def world(nodes: int, count: int, *, mig: bool = False, room: Amount = ROOMY) -> World:
    """Nodes of so many GPUs, all in one mode."""
    modes = range(count) if mig else ()
    facts = [
        NodeFacts(name, 1, tuple(gpus(name, count, modes)), (), (), allocatable=room, agent_until=NEVER)
        for name in (f"n{number}" for number in range(nodes))
    ]
    found = World(facts, START, {})
    found.settle()
    return found


def want(profile: str, count: int = 1, pods: int = 1, amount: Amount = NOTHING) -> Want:
    return Want(profile, count, pods, MODEL, PodNeeds(amount + Amount(pods=1)))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), ENDS), max_size=12), st.integers(1, 3), st.integers(1, 3))
def test_whole_gpus_are_free_at_the_earliest_when_no_earlier_instant_will_do(
    held: list[tuple[int, datetime]], count: int, pods: int
) -> None:
    found = world(2, 3)
    timetable, busy = Timetable(found), [START] * 6
    for number, (gpu, ends) in enumerate(held):
        timetable.note(f"GPU-n{gpu // 3}-{gpu % 3}", Span(f"lease-{number}", ALL_SLICES, NOTHING, until=ends))
        busy[gpu] = max(busy[gpu], ends)

    def fits(at: datetime) -> bool:
        free = [sum(1 for ends in busy[node * 3 : node * 3 + 3] if ends <= at) for node in range(2)]
        return sum(one // count for one in free) >= pods

    opening = timetable.earliest(want(FULL, count, pods), START)
    possible = 3 // count * 2 >= pods
    assert (opening is not None) is possible
    if opening is not None:
        assert opening.at == min(at for at in {START, *busy} if fits(at))
        assert len({book.gpu.uuid for seat in opening.seats for book in seat.gpus}) == count * pods
        for seat in opening.seats:
            assert len(seat.gpus) == count
            assert all(busy[int(book.gpu.uuid[5]) * 3 + book.gpu.index] <= opening.at for book in seat.gpus)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(placements(MODEL)), ENDS), max_size=6), PROFILES)
def test_a_slice_is_free_at_the_earliest_when_no_earlier_instant_will_do(
    held: list[tuple[tuple[str, int], datetime]], profile: str
) -> None:
    timetable, taken, spans = Timetable(world(1, 1, mig=True)), 0, []
    for number, ((name, start), ends) in enumerate(held):
        mask = device_mask(MODEL, name, start)
        if not mask & taken:
            taken |= mask
            spans.append((mask, ends))
            timetable.note("GPU-n0-0", Span(f"lease-{number}", mask, NOTHING, until=ends))
    shape = of_model(MODEL)[profile]
    free_at = [max((ends for mask, ends in spans if mask & shape.mask(start)), default=START) for start in shape.starts]
    opening = timetable.earliest(want(profile), START)
    assert opening is not None
    assert opening.at == min(free_at)
    [seat] = opening.seats
    blockers = [ends for mask, ends in spans if mask & shape.mask(seat.start)]
    assert max(blockers, default=START) == opening.at
    assert len(opening.waits_for) == len(blockers)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5)), max_size=8),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_seats_between_two_instants_are_free_all_the_while_and_none_is_left_out(
    held: list[tuple[int, int, int]], begins: int, length: int, pods: int
) -> None:
    timetable = Timetable(world(2, 2))
    first, last = START + timedelta(minutes=begins), START + timedelta(minutes=begins + length)
    busy = set()
    for number, (gpu, start, lasts) in enumerate(held):
        uuid = f"GPU-n{gpu // 2}-{gpu % 2}"
        opens, ends = START + timedelta(minutes=start), START + timedelta(minutes=start + lasts)
        timetable.note(uuid, Span(f"lease-{number}", ALL_SLICES, NOTHING, opens, ends))
        if opens < last and first < ends:
            busy.add(uuid)
    seats = timetable.during(want(FULL, 1, pods), first, last)
    assert len(seats) == min(pods, 4 - len(busy))
    assert not busy & {seat.gpus[0].gpu.uuid for seat in seats}
    assert len({seat.gpus[0].gpu.uuid for seat in seats}) == len(seats)


def test_of_gpus_that_are_free_in_time_those_are_kept_that_are_free_last() -> None:
    """Those behind in the queue can use the others until then."""
    timetable = Timetable(world(1, 4))
    for index in range(2):
        span = Span("lease", ALL_SLICES, NOTHING, until=START + timedelta(hours=1))
        timetable.note(f"GPU-n0-{index}", span)
    opening = timetable.earliest(want(FULL, 3), START)
    assert opening is not None
    indices = [book.gpu.index for seat in opening.seats for book in seat.gpus]
    assert {0, 1} < set(indices)
    assert opening.waits_for == ("lease",)


def test_where_no_end_is_known_the_fewest_are_waited_for() -> None:
    timetable = Timetable(world(1, 6))
    for index, who in enumerate(("one", "two", "three", "three", "three")):
        timetable.note(f"GPU-n0-{index}", Span(who, ALL_SLICES, NOTHING))
    opening = timetable.earliest(want(FULL, 3), START)
    assert opening is not None
    assert (opening.at, opening.waits_for) == (NEVER, ("three",))


def test_cpu_that_a_lease_takes_is_free_when_it_ends() -> None:
    each = Amount(cpu_milli=4000)
    timetable = Timetable(world(1, 4, room=Amount(8000, 2**40, 10)))
    ends = [START + timedelta(minutes=number) for number in (5, 9)]
    for index, at in enumerate(ends):
        timetable.note(f"GPU-n0-{index}", Span(f"lease-{index}", ALL_SLICES, each, until=at))
    openings = [timetable.earliest(want(FULL, 1, pods, each), START) for pods in (1, 2)]
    assert [one.at for one in openings if one] == ends
    assert timetable.during(want(FULL, 1, 1, each), START, ends[0]) == []
    assert len(timetable.during(want(FULL, 1, 2, each), ends[0], NEVER)) == 1


def test_fenced_slices_and_other_modes_are_no_place() -> None:
    found = world(1, 1, mig=True)
    assert Timetable(found).earliest(want(FULL), START) is None
    for pair in combinations(of_model(MODEL), 2):
        assert all(Timetable(found).earliest(want(profile), START) is not None for profile in pair)
