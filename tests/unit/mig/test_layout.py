"""The geometry of an A100, held against published figures and brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import PROFILES
from gpu_tenancy.mig.layout import Placement, filling, highest_start, layouts, mask_of, occupied_by, placements
from gpu_tenancy.mig.profiles import FULL, KNOWN_NAMES, MEMORY_SLICES, of_model, slices

MODELS = ("A100-SXM4-80GB", "A100-PCIE-40GB")
MODEL = MODELS[0]
EMPTY, ALL = 0, 0xFF


def disjoint(model: str, layout: frozenset[Placement]) -> bool:
    masks = [mask_of(model, placement) for placement in layout]
    return not any(one & other for one, other in combinations(masks, 2))


def maximal(model: str) -> list[frozenset[Placement]]:
    known = layouts(model)
    return [layout for layout in known if not any(layout < other for other in known)]


@pytest.mark.parametrize("model", MODELS)
def test_an_a100_has_14_placements_298_layouts_and_19_maximal_ones(model: str) -> None:
    assert len(placements(model)) == 14
    assert len(layouts(model)) == 298
    assert len(maximal(model)) == 19


def test_the_maximal_layouts_are_the_14_combinations_of_left_and_right_half() -> None:
    """Left half 4g, 3g, 2g+2g, 2g+1g+1g, 1g×4; right half 3g, 2g+1g, 1g×3; and 7g alone."""
    left = ("4", "3", "22", "211", "1111")
    right = ("3", "21", "111")
    expected = {"".join(sorted(one + other)) for one in left for other in right} | {"7"}
    found = {"".join(sorted(placement.profile[0] for placement in layout)) for layout in maximal(MODEL)}
    assert found == expected
    assert len(found) == 14


@pytest.mark.parametrize("model", MODELS)
def test_placements_coexist_exactly_when_their_memory_slices_are_disjoint(model: str) -> None:
    every = placements(model)
    sets = (frozenset(chosen) for size in range(8) for chosen in combinations(every, size))
    assert {layout for layout in sets if disjoint(model, layout)} == layouts(model)
    assert not any(disjoint(model, frozenset(chosen)) for chosen in combinations(every, 8))


@pytest.mark.parametrize("model", MODELS)
def test_the_seven_compute_slices_are_never_exceeded_where_memory_slices_are_disjoint(model: str) -> None:
    profiles = of_model(model)
    assert max(sum(profiles[one.profile].compute for one in layout) for layout in layouts(model)) == 7


def test_names_say_the_memory_of_the_board() -> None:
    assert of_model("A100-80GB-PCIe") == of_model("A100-SXM4-80GB")
    assert list(of_model("A100-PCIE-40GB")) == ["1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"]
    assert list(of_model("A100-SXM4-80GB")) == ["1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]
    assert set(KNOWN_NAMES) == set(PROFILES)


@pytest.mark.parametrize("model", ["H100-SXM5-80GB", "Tesla-V100-32GB", "A100", "A100X", "A100-SXM4-80GB-custom", ""])
def test_a_model_of_unknown_geometry_can_only_be_rented_whole(model: str) -> None:
    assert not of_model(model)
    assert placements(model) == ()
    assert filling(model, EMPTY) == ()
    assert slices(model, FULL) == MEMORY_SLICES


def test_slices_of_a_profile_are_its_memory_slices() -> None:
    assert [slices(MODEL, name) for name in of_model(MODEL)] == [1, 2, 4, 4, 8]
    with pytest.raises(KeyError):
        slices(MODEL, "3g.20gb")


@given(model=st.sampled_from(MODELS), occupied=st.integers(EMPTY, ALL))
def test_the_filling_overlaps_nothing_and_leaves_no_room(model: str, occupied: int) -> None:
    filled = frozenset(filling(model, occupied))
    assert filled in layouts(model)
    assert not occupied & occupied_by(model, filled)
    taken = occupied | occupied_by(model, filled)
    assert all(mask_of(model, placement) & taken for placement in placements(model))


@pytest.mark.parametrize("model", MODELS)
def test_no_other_filling_computes_more_or_as_much_with_fewer_devices(model: str) -> None:
    profiles = of_model(model)

    def worth(layout: frozenset[Placement]) -> tuple[int, int]:
        return sum(profiles[one.profile].compute for one in layout), -len(layout)

    masks = {layout: occupied_by(model, layout) for layout in layouts(model)}
    for occupied in range(ALL + 1):
        best = max(worth(layout) for layout, mask in masks.items() if not mask & occupied)
        assert worth(frozenset(filling(model, occupied))) == best


@pytest.mark.parametrize(
    ("leased", "filled"),
    [
        pytest.param([], ["7g.80gb@0"], id="empty"),
        pytest.param(["3g.40gb@4"], ["4g.40gb@0"], id="3g on the right"),
        pytest.param(["3g.40gb@0"], ["3g.40gb@4"], id="3g on the left"),
        pytest.param(["1g.10gb@6"], ["4g.40gb@0", "2g.20gb@4"], id="1g at the end"),
        pytest.param(["2g.20gb@4"], ["4g.40gb@0", "1g.10gb@6"], id="2g on the right"),
        pytest.param(["1g.10gb@0"], ["3g.40gb@4", "2g.20gb@2", "1g.10gb@1"], id="1g at the start"),
        pytest.param(["7g.80gb@0"], [], id="full"),
    ],
)
def test_what_leases_leave_is_filled_widest_first(leased: list[str], filled: list[str]) -> None:
    taken = frozenset(Placement(name, int(start)) for name, _, start in (one.partition("@") for one in leased))
    assert [f"{one.profile}@{one.start}" for one in filling(MODEL, occupied_by(MODEL, taken))] == filled


@given(profile=st.sampled_from(list(of_model(MODEL))), occupied=st.integers(EMPTY, ALL))
def test_the_highest_start_is_the_last_legal_one_that_is_free(profile: str, occupied: int) -> None:
    free = [
        start for start in of_model(MODEL)[profile].starts if not mask_of(MODEL, Placement(profile, start)) & occupied
    ]
    assert highest_start(MODEL, profile, occupied) == max(free, default=None)


def test_no_start_is_known_for_a_profile_that_the_model_does_not_have() -> None:
    assert highest_start(MODEL, "3g.20gb", EMPTY) is None
    with pytest.raises(KeyError):
        mask_of(MODEL, Placement("3g.20gb", 0))
