"""Faults: drawn from a seed for each thing that can break, the same whatever else breaks, and as often as was said."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from statistics import fmean

from gpu_tenancy.simulate.description import Faults, Machine, machines
from gpu_tenancy.simulate.faults import Fault, faults_of
from tests.unit.simulate.company import company


def machine(**more: object) -> Machine:
    [found] = machines(company([{"name": "n", "gpus": 2, **more}]))
    return found


def first(faults: Faults, seed: int, number: int = 3) -> list[list[Fault]]:
    return [list(islice(series, number)) for series in faults_of(machine(), faults, seed)]


def test_nothing_breaks_of_which_no_mean_time_is_given() -> None:
    assert first(Faults(), 0) == []


def test_a_node_breaks_as_a_whole_and_each_of_its_gpus_by_itself() -> None:
    node, *gpus = first(Faults(node_mean_days=10, xid_mean_days=10), 0)
    assert {(one.node, one.gpu, one.repair) for one in node} == {("n", "", timedelta(hours=4))}
    assert [{(one.gpu, one.repair) for one in series} for series in gpus] == [
        {("GPU-n-0", timedelta(minutes=30))},
        {("GPU-n-1", timedelta(minutes=30))},
    ]
    assert gpus[0][0].after != gpus[1][0].after


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    faults = Faults(xid_mean_days=10)
    assert first(faults, 1) == first(faults, 1)
    assert first(faults, 1) != first(faults, 2)


def test_whether_nodes_break_changes_nothing_about_gpus() -> None:
    assert first(Faults(node_mean_days=1, xid_mean_days=10), 0)[1:] == first(Faults(xid_mean_days=10), 0)


def test_the_mean_is_the_one_that_was_given() -> None:
    [node] = first(Faults(node_mean_days=20), 0, 4000)
    assert 19 < fmean(one.after / timedelta(days=1) for one in node) < 21
