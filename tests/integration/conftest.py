"""Worlds for the integration tests: a whole cluster with operator and agents, one per module or one per test."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from tests.cluster.world import GpuServer, World, pool, price_book

T = TypeVar("T")

TWO_SERVERS = (GpuServer("n1", mig=(7,)), GpuServer("n2", mig=(7,)))
"""Fourteen whole GPUs and two in MIG mode."""


class Living:
    """A World that plain tests can call: it keeps the event loop that the world lives in."""

    def __init__(self, servers: Sequence[GpuServer] = TWO_SERVERS, **options: Any) -> None:  # noqa: ANN401  (handed through to World)
        self._runner = asyncio.Runner()
        self.world = World(servers, **options)
        self._entered = False

    def run(self, story: Coroutine[Any, Any, T]) -> T:
        """Play a story to its end."""
        return self._runner.run(story)

    def start(self) -> None:
        """Bring everything up."""
        self.run(self.world.__aenter__())
        self._entered = True

    def stop(self) -> None:
        """End everything."""
        try:
            if self._entered:
                self.run(self.world.__aexit__(None, None, None))
        finally:
            self._runner.close()


Story = Callable[..., Coroutine[Any, Any, None]]


def story(test: Story) -> Callable[..., None]:
    """Make a coroutine with the argument `world` a test that lives in the fixture of that name."""

    @functools.wraps(test)
    def play(world: Living, **fixtures: object) -> None:
        world.run(test(world.world, **fixtures))

    return play


@pytest.fixture
def new_world() -> Iterator[Callable[..., Living]]:
    """Makes worlds that end with the test."""
    made: list[Living] = []

    def make(servers: Sequence[GpuServer] = TWO_SERVERS, **options: object) -> Living:
        living = Living(servers, **options)
        made.append(living)
        living.start()
        return living

    try:
        yield make
    finally:
        for living in reversed(made):
            living.stop()


def settled_world(
    settle: Callable[[World], Coroutine[Any, Any, object]],
    servers: Sequence[GpuServer] = TWO_SERVERS,
    **options: Any,  # noqa: ANN401  (handed through to World)
) -> Iterator[Living]:
    """A world of servers, once it is as `settle` leaves it."""
    living = Living(servers, **options)
    try:
        living.start()
        living.run(settle(living.world))
        yield living
    finally:
        living.stop()


def mining_world() -> Iterator[Living]:
    """Two servers on which everything mines, and a PriceBook."""
    yield from settled_world(_populate)


async def _populate(world: World) -> None:
    await world.create(price_book())
    await world.create(pool(resources={"cpu": "1", "memory": "1Gi"}))
    await world.mining(16)
