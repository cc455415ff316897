"""A call whose effect the watch does not show yet is not made twice, and is not forgotten for good either."""

from __future__ import annotations

from gpu_tenancy.controller.expectations import PATIENCE_SECONDS, Expectations
from gpu_tenancy.kube.resources import PODS, RESOURCE_CLAIMS


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_the_same_call_is_made_once() -> None:
    expected = Expectations(Clock())
    assert expected.begin("create", PODS, "mining", "miner")
    assert not expected.begin("create", PODS, "mining", "miner")


def test_other_calls_are_other_calls() -> None:
    expected = Expectations(Clock())
    assert expected.begin("create", PODS, "mining", "miner")
    assert expected.begin("create", RESOURCE_CLAIMS, "mining", "miner")
    assert expected.begin("create", PODS, "other", "miner")
    assert expected.begin("delete", PODS, "mining", "miner", "uid-1")
    assert expected.begin("delete", PODS, "mining", "miner", "uid-2")


def test_a_call_that_failed_is_made_again_at_once() -> None:
    expected = Expectations(Clock())
    expected.begin("create", PODS, "mining", "miner")
    expected.forget(PODS, "mining", "miner")
    assert expected.begin("create", PODS, "mining", "miner")


def test_a_call_that_somebody_else_undid_is_made_again_after_a_while() -> None:
    clock = Clock()
    expected = Expectations(clock)
    expected.begin("create", PODS, "mining", "miner")
    clock.seconds += PATIENCE_SECONDS - 0.1
    assert not expected.begin("create", PODS, "mining", "miner")
    clock.seconds += 0.1
    assert expected.begin("create", PODS, "mining", "miner")


def test_what_is_deleted_may_be_created_again_at_once() -> None:
    expected = Expectations(Clock())
    expected.begin("create", PODS, "mining", "miner")
    expected.begin("delete", PODS, "mining", "miner", "uid-1")
    assert expected.begin("create", PODS, "mining", "miner")
    assert expected.begin("delete", PODS, "mining", "miner", "uid-2")


def test_it_says_when_the_first_call_that_was_held_back_is_due_and_says_so_once() -> None:
    clock = Clock()
    expected = Expectations(clock)
    assert expected.held_back() is None
    expected.begin("create", PODS, "mining", "one")
    clock.seconds += 1
    expected.begin("create", PODS, "mining", "two")
    assert expected.held_back() is None
    for name in ("two", "one"):
        expected.begin("create", PODS, "mining", name)
    clock.seconds += 1
    assert expected.held_back() == PATIENCE_SECONDS - 2
    assert expected.held_back() is None


def test_a_long_life_does_not_fill_the_memory() -> None:
    clock = Clock()
    expected = Expectations(clock)
    for number in range(5000):
        clock.seconds += 1
        assert expected.begin("delete", PODS, "mining", f"miner-{number}", "uid")
    assert len(expected._last) <= 1001
