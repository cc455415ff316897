"""What is remembered of a node, and for how long."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from gpu_tenancy.core.snapshot import NodeFacts, as_before, once_per_node
from tests.unit.core.builders import START, gpus


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


def test_facts_found_anew_are_the_former_ones_and_a_heartbeat_forgets_nothing() -> None:
    known = NodeFacts("a", 1, tuple(gpus("a", 1)), (), (), agent_until=START)
    known.answers["asked"] = "answered"
    assert as_before(replace(known), known) is known
    heard = as_before(replace(known, agent_until=START + timedelta(seconds=40)), known)
    assert heard.agent_until == START + timedelta(seconds=40)
    assert heard.answers is known.answers
    assert heard == replace(known, agent_until=heard.agent_until)
    changed = replace(heard, generation=2)
    assert as_before(changed, heard) is changed
    assert not changed.answers
    assert as_before(known, None) is known
