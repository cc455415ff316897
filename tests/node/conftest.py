"""Two real nodes for the tests, without anything else or with all of gpu-tenancy; skipped where none can be."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from tests.cluster.components import ALL, Component
from tests.cluster.control_plane import ControlPlane
from tests.cluster.node.possible import missing
from tests.cluster.node.realnode import RealNode
from tests.node.site import Bare, Site

T = TypeVar("T")


class Living:
    """What a story lives in, and the event loop that it belongs to."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.site: Any = None

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Play a story to its end."""
        return self.runner.run(story)


Story = Callable[..., Coroutine[Any, Any, None]]


def story(test: Story) -> Callable[..., None]:
    """Make a coroutine with the argument `here` a test that lives in the fixture of that name."""

    @functools.wraps(test)
    def play(here: Living, **fixtures: object) -> None:
        here.run(_whole(test, here.site, fixtures))

    return play


async def _whole(test: Story, site: Site | Bare, fixtures: dict[str, object]) -> None:
    try:
        await test(site, **fixtures)
    finally:
        await site.clear()


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where there can be no real node."""
    if sentence := missing():
        pytest.skip(sentence)


@pytest.fixture(scope="session")
def whole_site(possible: None) -> Iterator[Living]:  # noqa: ARG001
    """Operator, agents, two real nodes and a simulated one."""
    yield from living(Site())


@pytest.fixture(scope="session")
def bare_node(possible: None) -> Iterator[Living]:  # noqa: ARG001
    """A real node and nothing of gpu-tenancy."""
    control_plane = ControlPlane(components=ALL - {Component.KWOK})
    yield from living(Bare(control_plane, RealNode(control_plane, "bare", number=10)))


def living(site: Site | Bare) -> Iterator[Living]:
    living = Living()
    living.site = site
    try:
        living.run(site.start())
        yield living
    finally:
        try:
            living.run(site.stop())
        finally:
            living.runner.close()
