"""Killed after any write and started again, the operator ends in the same state, every second billed once."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest

from tests.unit.core.builders import book_spec
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster

SAMPLE = 20


class Outcome(NamedTuple):
    """What a story leaves behind."""

    writes: int
    billed: dict[str, list[tuple[int, str]]]
    """(seconds, reason) of each segment by lease."""
    slots: dict[str, list[str]]
    """Devices by node."""
    mining: dict[str, int]
    left: list[str]
    """Leases that are still there."""


def spot_story(dies_after: int | None) -> Outcome:
    """Spot leases go for a gang, one that has notice may stay, and what is left of their terms runs on."""
    cluster = Cluster()
    cluster.dies_after, cluster.restarts_at_once = dies_after, True
    laws = Laws(cluster)
    cluster.add_node("a", 3)
    cluster.add_node("b", 2)
    cluster.add_pool()
    cluster.add_book("book", book_spec())
    cluster.run(2, laws.check)
    spot: dict[str, Any] = {"tier": "Spot", "preemption_notice": "4s"}
    leases = {f"spot-{number}": cluster.create(f"spot-{number}", duration="25s", **spot) for number in range(5)}
    for lease in leases.values():
        cluster.deploy(lease)
    cluster.run(4, laws.check)
    leases["gang"] = cluster.create("gang", count=2, pods=2, works=3.0)
    cluster.run(2, laws.check)
    leases["fickle"] = cluster.create("fickle", works=3.0)
    cluster.run(1, laws.check)
    cluster.delete(leases["fickle"])
    cluster.run(60, laws.check)
    return Outcome(
        cluster.writes,
        {name: cluster.ledger(uid) for name, uid in leases.items()},
        {name: [slot.device for slot in node.slots] for name, node in cluster.nodes.items()},
        dict(cluster.mining()),
        sorted(name for name, uid in leases.items() if uid in cluster.leases),
    )


def story(dies_after: int | None) -> Outcome:
    """A day in short: a gang that waits for a Job to finish, a slice that is extended and expires, one that is
    suspended, resumed and deleted, a node that goes, and miners on everything that is left."""
    cluster = Cluster()
    cluster.dies_after, cluster.restarts_at_once = dies_after, True
    laws = Laws(cluster)
    cluster.add_node("a", 4, mig={3})
    cluster.add_node("b", 3)
    cluster.add_pool()
    cluster.add_book("book", book_spec({"full": "36.00", "3g.40gb": "18.00", "1g.10gb": "9.00"}))
    cluster.run(2, laws.check)
    train = cluster.create("train", count=2, works=4.0, duration="60s")
    gang = cluster.create("gang", count=2, pods=2, works=float("inf"), duration="12s")
    notebook = cluster.create("notebook", "3g.40gb", duration="6s", notice="2s")
    paused = cluster.create("paused", "1g.10gb", duration="30s")
    for lease in (notebook, paused):
        cluster.deploy(lease)
    cluster.run(5, laws.check)
    cluster.edit(notebook, duration="9s")
    cluster.edit(paused, suspend=True)
    cluster.run(3, laws.check)
    cluster.edit(paused, suspend=False)
    cluster.run(10, laws.check)
    cluster.delete(paused)
    cluster.run(8, laws.check)
    lost = cluster.create("lost", count=2, pods=2, works=3.0, duration="20s")
    cluster.run(5, laws.check)
    laws.losses = True
    cluster.remove_node("b")
    cluster.add_node("c", 3)
    cluster.run(20, laws.check)
    leases = {"train": train, "gang": gang, "notebook": notebook, "paused": paused, "lost": lost}
    return Outcome(
        cluster.writes,
        {name: cluster.ledger(uid) for name, uid in leases.items()},
        {name: [slot.device for slot in node.slots] for name, node in cluster.nodes.items()},
        dict(cluster.mining()),
        sorted(name for name, uid in leases.items() if uid in cluster.leases),
    )


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return story(None)


def test_the_story_takes_every_turn(undisturbed: Outcome) -> None:
    billed = undisturbed.billed
    assert [reason for _, reason in billed["train"]] == ["Completed"]
    assert billed["gang"] == [(12, "Expired")]
    assert billed["notebook"] == [(9, "Expired")]
    assert [reason for _, reason in billed["paused"]] == ["Suspended", "Deleted"]
    assert [reason for _, reason in billed["lost"]] == ["NodeLost", "Completed"]
    assert undisturbed.mining == {"full": 6, "7g.80gb": 1}
    assert undisturbed.left == ["gang", "lost", "notebook", "train"]


def test_killed_after_a_sampled_write_nothing_is_lost_or_doubled(undisturbed: Outcome, seed: int) -> None:
    for write in random.Random(seed).sample(range(1, undisturbed.writes), SAMPLE):
        _same(story(write), undisturbed, write)


def ends(billed: dict[str, list[tuple[int, str]]]) -> dict[str, list[str]]:
    """How the segments of each lease ended."""
    return {name: [reason for _, reason in segments] for name, segments in billed.items()}


@pytest.fixture(scope="module")
def undisturbed_spot() -> Outcome:
    return spot_story(None)


def test_the_story_of_spot_leases_takes_every_turn(undisturbed_spot: Outcome) -> None:
    billed = undisturbed_spot.billed
    assert sorted(ends(billed)[f"spot-{number}"] for number in range(5)) == [
        ["Expired"],
        *[["Preempted", "Expired"]] * 4,
    ]
    assert [sum(seconds for seconds, _ in billed[f"spot-{number}"]) for number in range(5)] == [25] * 5
    assert (ends(billed)["gang"], billed["fickle"]) == (["Completed"], [])


def test_killed_after_a_sampled_write_the_same_spot_leases_go(undisturbed_spot: Outcome, seed: int) -> None:
    for write in random.Random(seed).sample(range(1, undisturbed_spot.writes), SAMPLE // 2):
        assert ends(spot_story(write).billed) == ends(undisturbed_spot.billed), f"killed after write {write}"


@pytest.mark.exhaustive
def test_killed_after_any_write_the_same_spot_leases_go(undisturbed_spot: Outcome) -> None:
    for write in range(1, undisturbed_spot.writes + 1):
        assert ends(spot_story(write).billed) == ends(undisturbed_spot.billed), f"killed after write {write}"


@pytest.mark.exhaustive
def test_killed_after_any_write_nothing_is_lost_or_doubled(undisturbed: Outcome) -> None:
    for write in range(1, undisturbed.writes + 1):
        _same(story(write), undisturbed, write)


def _same(disturbed: Outcome, undisturbed: Outcome, write: int) -> None:
    assert disturbed[1:] == undisturbed[1:], f"killed after write {write}"
