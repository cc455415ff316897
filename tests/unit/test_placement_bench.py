"""What the benches of placement stand on: the bounds are bounds, the rules do what their names say, nobody overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as combinations_of

import pytest

from gpu_tenancy.mig.layout import device_mask
from gpu_tenancy.mig.profiles import FULL
from tests.bench import admission, bounds, fill, loss
from tests.bench.fill import Pod
from tests.bench.loss import MODEL, Asked, Fleet

NARROW, WIDE = "1g.10gb", "7g.80gb"


def best_of_all(asked: Sequence[Asked]) -> int:
    """The most leases that one GPU can hold, whoever is refused, as long as nobody is moved."""
    ways = [[None, *loss.starts(0, one.profile)] for one in asked]
    return max(
        (sum(start is not None for start in way) for way in combinations_of(*ways) if fits(asked, way)), default=0
    )


def fits(asked: Sequence[Asked], way: Sequence[int | None]) -> bool:
    """No two that are there at the same time overlap."""
    placed = [(one, device_mask(MODEL, one.profile, at)) for one, at in zip(asked, way, strict=True) if at is not None]
    return not any(
        mask & other_mask and one.at < other.ends and other.at < one.ends
        for number, (one, mask) in enumerate(placed)
        for other, other_mask in placed[:number]
    )


@pytest.mark.parametrize("mix", loss.MIXES)
def test_nobody_betters_the_bound(mix: str) -> None:
    for seed in range(6):
        asked = loss.arrivals(mix, 1.2, seed, 6, 1)
        bound = bounds.admission(asked, 1, [1.0] * len(asked))
        assert best_of_all(asked) <= bound + 1e-6 <= len(asked) + 1e-6


@pytest.mark.parametrize("mix", loss.MIXES)
def test_no_rule_betters_the_bound_and_none_places_two_on_one_slice(mix: str) -> None:
    asked = loss.arrivals(mix, 1.2, 0, 120, 4)
    admitted = 100 * bounds.admission(asked, 4, [1.0] * len(asked)) / len(asked)
    total = sum(one.worth for one in asked)
    earned = 100 * bounds.admission(asked, 4, [one.worth for one in asked]) / total
    rules = [rule(0) for rule in loss.BASELINES.values()]
    for rule in (*rules, admission.product(0), admission.product(0, terms=False)):
        served = loss.run(asked, 4, rule)  # raises where devices overlap
        assert served.admitted <= admitted + 1e-6
        assert served.worth <= earned + 1e-6


def test_a_gpu_holds_these_mixes_at_the_most() -> None:
    """1g, 2g, 3g, 4g, 7g, made out by hand from NVIDIA's table of placements."""
    assert set(bounds.best_mixes()) == {
        (0, 0, 0, 0, 1), (0, 0, 1, 1, 0), (1, 1, 0, 1, 0), (3, 0, 0, 1, 0), (0, 0, 2, 0, 0), (0, 2, 1, 0, 0),
        (2, 1, 1, 0, 0), (4, 0, 1, 0, 0), (1, 3, 0, 0, 0), (3, 2, 0, 0, 0), (5, 1, 0, 0, 0), (7, 0, 0, 0, 0),
    }  # fmt: skip


def test_the_bound_of_full_load_is_what_fits_at_once() -> None:
    always = [Asked(number / 100, 10.0, NARROW) for number in range(20)]
    assert bounds.admission(always, 2, [1.0] * 20) == pytest.approx(14)
    assert bounds.admission([*always, Asked(1.0, 1.0, WIDE)], 2, [1.0] * 20 + [100.0]) == pytest.approx(107)


def test_crowds_are_those_who_would_be_there_at_the_same_time() -> None:
    asked = [Asked(0.0, 5.0, NARROW), Asked(1.0, 1.0, NARROW), Asked(3.0, 1.0, NARROW), Asked(3.5, 9.0, NARROW)]
    assert list(loss.crowds(asked)) == [[0, 1], [0, 2, 3]]


@pytest.mark.parametrize(
    ("name", "gpu", "start"),
    [("first fit", 0, 0), ("worst fit", 0, 0), ("best fit", 1, 2), ("best fit, high index", 1, 6)],
)
def test_a_rule_does_what_its_name_says(name: str, gpu: int, start: int) -> None:
    fleet = Fleet(3)
    fleet.take(Asked(0.0, 1.0, "2g.20gb"), 1, 0)
    assert loss.BASELINES[name](0)(fleet, Asked(0.0, 1.0, NARROW)) == (gpu, start)


def test_whoever_has_left_is_not_in_the_way() -> None:
    fleet, rule = Fleet(1), loss.BASELINES["best fit"](0)
    fleet.take(Asked(0.0, 1.0, WIDE), 0, 0)
    assert rule(fleet, Asked(0.5, 1.0, NARROW)) is None
    fleet.leave(1.0)
    assert rule(fleet, Asked(1.0, 1.0, WIDE)) == (0, 0)


def test_the_same_seed_brings_the_same_leases() -> None:
    assert loss.arrivals("big", 1.0, 3, 50, 10) == loss.arrivals("big", 1.0, 3, 50, 10)
    assert loss.arrivals("big", 1.0, 3, 50, 10) != loss.arrivals("big", 1.0, 4, 50, 10)


def test_as_much_is_asked_for_as_the_load_says() -> None:
    asked = loss.arrivals("uniform", 1.0, 0, 20_000, 100)
    assert sum(one.worth for one in asked) / asked[-1].at == pytest.approx(700, rel=0.05)


@pytest.mark.parametrize(
    ("gpus", "milli", "given"),
    [
        (1, 50, Pod(NARROW, 1)),
        (1, 142, Pod(NARROW, 1)),
        (1, 143, Pod("2g.20gb", 1)),
        (1, 470, Pod("4g.40gb", 1)),
        (1, 572, Pod(WIDE, 1)),
        (1, 1000, Pod(WIDE, 1)),
        (4, 1000, Pod(FULL, 4)),
    ],
)
def test_a_pod_of_the_trace_gets_the_narrowest_profile_with_its_share(gpus: int, milli: int, given: Pod) -> None:
    assert fill.pod(gpus, milli) == given


def test_the_trace_has_as_many_pods_as_its_readme_says_and_they_ask_for_no_more_than_the_fleet_has() -> None:
    assert sum(fill.requests().values()) == 7064
    slices = sum(one.slices for one in fill.drawn(0))
    full = fill.NODES * fill.GPUS * 8
    assert full - 8 * 8 < slices <= full


def test_a_gain_is_sure_where_every_seed_says_the_same() -> None:
    assert admission.gain([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1.0, 0.0)
    mean, within = admission.gain([2.0, 3.0], [1.0, 4.0])
    assert mean == 0.0
    assert within == pytest.approx(12.706, rel=1e-3)
