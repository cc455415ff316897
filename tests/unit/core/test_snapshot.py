"""What is remembered of a node, and for how long."""

from __future__ import annotations

from dataclasses import replace

from gpu_tenancy.core.snapshot import NodeFacts, once_per_node
from tests.unit.core.builders import gpus


def test_a_function_is_asked_once_for_each_version_of_the_facts_and_each_further_argument() -> None:
    asked: list[tuple[int, str]] = []

    @once_per_node
    def describe(facts: NodeFacts, how: str) -> str:
        asked.append((facts.generation, how))
        return f"{how} {facts.name} {facts.generation}"

    first = NodeFacts("a", 1, tuple(gpus("a", 1)), (), ())
    second = replace(first, generation=2)
    for _ in range(2):
        assert describe(first, "long") == "long a 1"
        assert describe(first, "short") == "short a 1"
        assert describe(second, "long") == "long a 2"
    assert asked == [(1, "long"), (1, "short"), (2, "long")]


def test_what_is_remembered_does_not_make_facts_differ() -> None:
    one = NodeFacts("a", 1, tuple(gpus("a", 1)), (), ())
    other = replace(one)
    assert one.mined == {}
    assert one == other
    assert "mined" not in vars(other)
