"""What leases to come lose by a placement: never less than nothing, and least where they would have had least."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.desirability import LASTING, MOST_DOUBLINGS, NOBODY, loss, outlasts, span
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.preemption import MOST_DEVICES, GpuState, offer, union
from gpu_tenancy.core.snapshot import NodeFacts
from gpu_tenancy.mig.layout import ALL_SLICES, Placement, device_mask, filling, layouts, occupied_by, placements
from gpu_tenancy.mig.profiles import of_model
from tests.unit.core.builders import MODEL, ROOMY, START, gpus

SMALL_MODEL = "A100-PCIE-40GB"
PROFILES = tuple(of_model(MODEL))
MASKS = sorted({occupied_by(MODEL, layout) for layout in layouts(MODEL)})
NEEDS = PodNeeds(Amount(1, 1, 1))

LEFT = st.none() | st.timedeltas(timedelta(0), timedelta(days=400))


# --- spans --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "doublings"),
    [
        (timedelta(days=-1), 1),
        (timedelta(0), 1),
        (timedelta(seconds=59), 1),
        (timedelta(minutes=1), 2),
        (timedelta(minutes=3), 3),
        (timedelta(hours=1), 7),
        (timedelta(hours=24), 12),
        (timedelta.max, 42),
        (None, LASTING),
    ],
)
def test_a_span_counts_doublings_of_a_minute(left: timedelta | None, doublings: int) -> None:
    assert span(left) == doublings


@given(one=LEFT, other=LEFT)
def test_what_lasts_longer_has_no_shorter_span(one: timedelta | None, other: timedelta | None) -> None:
    if other is None or (one is not None and one <= other):
        assert NOBODY < span(one) <= span(other)


@given(lasts=LEFT, there=LEFT)
def test_only_what_lasts_longer_than_others_outlasts_them(lasts: timedelta | None, there: timedelta | None) -> None:
    doublings = outlasts(span(lasts), span(there))
    assert 0 <= doublings <= MOST_DOUBLINGS
    assert (doublings > 0) == (span(lasts) > span(there))
    assert (outlasts(span(lasts), NOBODY) > 0) == (lasts is not None)


# --- losses, over every legal state ---------------------------------------------------------------------------------


def seats(mask: int) -> list[int]:
    """What one more device can take beside a mask, as bits."""
    masks = (device_mask(MODEL, place.profile, place.start) for place in placements(MODEL))
    return [bits for bits in masks if not bits & mask]


@pytest.mark.parametrize("doublings", [0, 1, 3, MOST_DOUBLINGS])
def test_nothing_is_gained_by_a_placement(doublings: int) -> None:
    assert [(mask, bits) for mask in MASKS for bits in seats(mask) if loss(MODEL, mask, bits, doublings) < 0] == []


def test_two_devices_lose_together_what_they_lose_one_after_the_other() -> None:
    for mask in MASKS:
        for one in seats(mask):
            for other in seats(mask | one):
                both = loss(MODEL, mask, one, 0) + loss(MODEL, mask | one, other, 0)
                assert both == loss(MODEL, mask, one | other, 0)


def test_what_outlasts_everything_is_judged_as_if_it_were_alone() -> None:
    for mask in MASKS:
        for bits in seats(mask):
            alone, beside = loss(MODEL, 0, bits, MOST_DOUBLINGS), loss(MODEL, mask, bits, 0)
            little = max(alone, beside) >> (MOST_DOUBLINGS - 1)
            assert abs(loss(MODEL, mask, bits, MOST_DOUBLINGS) - alone) <= little
            assert alone < loss(MODEL, 0, bits, 0)
            losses = [loss(MODEL, mask, bits, doublings) for doublings in range(MOST_DOUBLINGS + 1)]
            assert losses in (sorted(losses), sorted(losses, reverse=True))


def test_boards_of_both_sizes_are_judged_alike() -> None:
    for mask in MASKS:
        for bits in seats(mask):
            assert loss(MODEL, mask, bits, 2) == loss(SMALL_MODEL, mask, bits, 2)


@pytest.mark.parametrize(("profile", "start"), [("1g.10gb", 6), ("2g.20gb", 4), ("3g.40gb", 4)])
def test_on_an_empty_gpu_the_highest_start_loses_least(profile: str, start: int) -> None:
    """So that the low slices, where the widest begin, stay free."""
    losses = {one: loss(MODEL, 0, device_mask(MODEL, profile, one), 0) for one in of_model(MODEL)[profile].starts}
    assert min(losses, key=lambda one: (losses[one], -one)) == start


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "7g.80gb"])
def test_a_gpu_that_is_used_already_loses_less_than_an_empty_one(profile: str) -> None:
    beside = Placement("4g.40gb", 0) if profile != "4g.40gb" else Placement("3g.40gb", 4)
    held = device_mask(MODEL, *beside)
    used = min(loss(MODEL, held, bits, 0) for bits in fitting(held, profile))
    assert used < min(loss(MODEL, 0, bits, 0) for bits in fitting(0, profile))


def fitting(mask: int, profile: str) -> list[int]:
    """What the profile can take beside a mask, as bits."""
    masks = (device_mask(MODEL, profile, start) for start in of_model(MODEL)[profile].starts)
    return [bits for bits in masks if not bits & mask]


# --- offers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("most", [1, 2, MOST_DEVICES])
def test_an_offer_takes_free_places_only_and_no_others_cost_less_or_lose_less(profile: str, most: int) -> None:
    for mask in MASKS:
        state = GpuState(MODEL, mask, 0, frozenset(filling(MODEL, mask)))
        starts = [start for start in of_model(MODEL)[profile].starts if not device_mask(MODEL, profile, start) & mask]
        for doublings in (0, 2):
            found = offer(state, profile, most, doublings)
            if found is None:
                assert not starts
                continue
            taken = [device_mask(MODEL, profile, -start) for start in found.minus_starts]
            assert sum(taken) == union(MODEL, profile, found.minus_starts) <= ALL_SLICES & ~mask
            pods = len(taken)
            others = [sum(device_mask(MODEL, profile, one) for one in chosen) for chosen in combinations(starts, pods)]
            best = min((stopped(mask, bits), loss(MODEL, mask, bits, doublings)) for bits in others)
            assert (stopped(mask, sum(taken)), loss(MODEL, mask, sum(taken), doublings)) == best


@cache
def stopped(mask: int, bits: int) -> int:
    """Miners that stop where all that is not leased mines."""
    return len(set(filling(MODEL, mask)) - set(filling(MODEL, mask | bits)))


# --- the working copy -----------------------------------------------------------------------------------------------


def world(held: dict[int, list[tuple[str, int, timedelta | None]]], count: int = 2) -> World:
    """One node whose GPUs are in MIG mode; by index of the GPU, what leases hold there and how long they last."""
    known = gpus("a", count, mig=range(count))
    facts = NodeFacts("a", 1, tuple(known), (), (), allocatable=ROOMY, agent_until=START + timedelta(hours=1))
    made = World([facts], START, {})
    for index, leases in held.items():
        for profile, start, left in leases:
            made.nodes["a"].hold(device(known[index].uuid, profile, start), NOTHING, span(left))
    made.settle()
    return made


def device(gpu: str, profile: str, start: int) -> Slot:
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace="n", name="x", uid="uid")
    name = f"{gpu.lower()}-{profile.replace('.', '')}-{start}"
    return Slot.model_construct(device=name, gpu=gpu, profile=profile, start=start, holder=holder, since=START)


def want(profile: str, pods: int = 1) -> Want:
    return Want(profile, 1, pods, MODEL, NEEDS)


def test_a_long_lease_goes_beside_a_long_one_and_leaves_the_gpu_that_is_free_sooner() -> None:
    day, minutes = timedelta(days=1), timedelta(minutes=10)
    for soon, late in ((0, 1), (1, 0)):
        placed = world({soon: [("4g.40gb", 0, minutes)], late: [("4g.40gb", 0, day)]}).place([want("3g.40gb")], day)
        assert placed is not None
        assert [gpu.gpu.index for seat in placed.seats for gpu in seat.gpus] == [late]


def test_a_fence_has_no_end() -> None:
    made = world({})
    book = made.nodes["a"].gpus["GPU-a-0"]
    fenced = book.gpu.model_copy(update={"fenced": [0]})
    assert type(book)(fenced).lasts == LASTING
    assert book.lasts == NOBODY


wants = st.tuples(st.sampled_from(PROFILES), st.integers(1, 4), LEFT)


@given(first=st.lists(wants, max_size=8), second=st.lists(wants, min_size=1, max_size=4))
def test_no_two_devices_overlap_and_what_is_given_back_leaves_no_trace(
    first: list[tuple[str, int, timedelta | None]], second: list[tuple[str, int, timedelta | None]]
) -> None:
    made = world({}, 4)
    taken: dict[str, int] = {}
    for profile, pods, left in first:
        if (placed := made.place([want(profile, pods)], left)) is not None:
            for seat in placed.seats:
                bits = device_mask(MODEL, profile, seat.start)
                assert not taken.get(seat.gpus[0].gpu.uuid, 0) & bits
                taken[seat.gpus[0].gpu.uuid] = taken.get(seat.gpus[0].gpu.uuid, 0) | bits
    before = {uuid: (book.hard, book.lasts) for uuid, book in made.nodes["a"].gpus.items()}
    tried = [made.place([want(profile, pods)], left) for profile, pods, left in second]
    for placed in reversed(tried):
        if placed is not None:
            made.undo(placed)
    assert {uuid: (book.hard, book.lasts) for uuid, book in made.nodes["a"].gpus.items()} == before
