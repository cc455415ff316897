"""What the benches on a live control plane share: a fleet of simulated nodes, posting in bulk, and seeing by watch.

It measures nothing and decides nothing; every instant it notes is one at which a watch of the bench itself was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar

import msgspec
import psutil

from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import Resource
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.components import Component
from tests.cluster.world import GpuServer, World

NODES: Final = 128
GPUS: Final = 8
IN_FLIGHT: Final = 32
"""Requests that a bench has under way at a time."""


class _Wire(msgspec.Struct, frozen=True, rename="camel", gc=False):
    """Only what is looked at is decoded: the bench shares its cores with what it measures."""


class Meta(_Wire, frozen=True):
    """metadata."""

    name: str = ""
    namespace: str = ""
    finalizers: tuple[str, ...] = ()
    resource_version: str = ""


class Condition(_Wire, frozen=True):
    """A condition."""

    type: str = ""
    status: str = ""
    reason: str = ""


class LeaseStatus(_Wire, frozen=True):
    """status of a GpuLease."""

    conditions: tuple[Condition, ...] = ()
    nodes: tuple[str, ...] = ()


class View(_Wire, frozen=True):
    """An object."""

    metadata: Meta = Meta()


class Lease(View, frozen=True):
    """A GpuLease."""

    status: LeaseStatus = LeaseStatus()

    def is_true(self, condition: str) -> bool:
        """Whether a condition holds."""
        return any(one.type == condition and one.status == "True" for one in self.status.conditions)


class PodStatus(_Wire, frozen=True):
    """status of a Pod."""

    phase: str = ""


class Pod(View, frozen=True):
    """A Pod."""

    status: PodStatus = PodStatus()


V = TypeVar("V", bound=View)


class Event(_Wire, Generic[V], frozen=True):
    """An event of a watch."""

    type: str
    object: V


def servers(count: int = NODES) -> list[GpuServer]:
    """Equal nodes of eight GPUs, none of them in MIG mode."""
    return [GpuServer(f"n{index:03d}", gpus=GPUS) for index in range(count)]


async def states(api: Api, resource: Resource, view: type[V]) -> AsyncGenerator[V, None]:
    """Every state of every object of a kind that comes after this call has returned."""
    answer = await api.get(resource.path(), limit="1")
    return _states(api, resource, view, answer["metadata"]["resourceVersion"])


async def _states(api: Api, resource: Resource, view: type[V], version: str) -> AsyncGenerator[V, None]:
    """Every state after `version`, for ever.

    A watch that the API server cuts (it does so to readers that lag behind) is resumed where it stood. Raises ApiError
    where that place is gone.
    """
    events: type[Event[V]] = Event[view]  # type: ignore[valid-type]
    while True:
        async for event in api.watch(resource.path(), version, events):
            if event.type == "ERROR":
                raise ApiError(410, "Expired", f"the watch of {resource.plural} lost its place")
            version = event.object.metadata.resource_version
            if event.type in ("ADDED", "MODIFIED"):
                yield event.object


async def first(
    states: AsyncGenerator[V, None], name_of: Callable[[V], str], count: int
) -> AsyncGenerator[tuple[str, V], None]:
    """Each of `count` names, with its object, when it counts for the first time.

    `name_of` says under which name an object counts, and nothing for one that does not count yet.
    """
    seen: set[str] = set()
    async with contextlib.aclosing(states):
        async for one in states:
            name = name_of(one)
            if name and name not in seen:
                seen.add(name)
                yield name, one
                if len(seen) == count:
                    return


async def last_seen(
    states: AsyncGenerator[V, None], name_of: Callable[[V], str], count: int, told: Callable[[], None] = lambda: None
) -> float:
    """When (time.monotonic) the last of `count` names was told. `told` is called for each of them."""
    instant = 0.0
    async for _ in first(states, name_of, count):
        instant = time.monotonic()
        told()
    return instant


async def at_once(work: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Do everything, in order, IN_FLIGHT at a time."""
    pending = iter(work)

    async def worker() -> None:
        for one in pending:
            await one

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))


async def post(api: Api, bodies: Iterable[tuple[Resource, Object]]) -> None:
    """Create objects one after the other."""
    for resource, body in bodies:
        await api.create(resource.path(body["metadata"].get("namespace")), body)


async def gpu_nodes(world: World) -> list[Object]:
    """GpuNodes, once the agent of every node has reported its GPUs."""
    while True:
        with contextlib.suppress(ApiError):  # 429 while the API server still sets up the storage of a new kind
            nodes = await world.items(resources.GPU_NODES)
            if len(nodes) == len(world.servers) and all(node.get("status", {}).get("gpus") for node in nodes):
                return nodes
        await asyncio.sleep(0.2)


async def empty(api: Api, resource: Resource, namespace: str, *, force: bool = False) -> None:
    """Delete every object of a kind in a namespace, and wait until none is left. force: take finalizers off."""
    path = resource.path(namespace)
    await _delete_all(api, path)
    while left := await api.items(path):
        if force:
            await at_once(_release(api, resource, namespace, one["metadata"]["name"]) for one in left)
        await asyncio.sleep(0.2)


async def _delete_all(api: Api, path: str) -> None:
    """Delete a collection; a thousand objects may take longer than one request is given."""
    while True:
        try:
            await api.delete(path, {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})
        except ApiError as error:
            if error.code != HTTPStatus.GATEWAY_TIMEOUT:
                raise
        else:
            return


async def _release(api: Api, resource: Resource, namespace: str, name: str) -> None:
    with contextlib.suppress(ApiError):  # it is gone by now
        await api.patch(resource.path(namespace, name), {"metadata": {"finalizers": None}})


def say(text: str) -> None:
    """A line about what is going on, with the machine's load: figures of a busy machine are not to be believed."""
    print(f"  {text} (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)", file=sys.stderr, flush=True)


class Spent:
    """Processor time of each program of a world, and of the bench itself, since this was made.

    On a machine that is shared it says more than the clock does.
    """

    def __init__(self, world: World, programs: Iterable[str]) -> None:
        names = [*Component, *programs]
        self._processes = {str(name): psutil.Process(world.control_plane.pid_of(name)) for name in names}
        self._processes["bench"] = psutil.Process()
        self._before = self._now()

    def each(self, count: int) -> str:
        """Milliseconds per thing, by program, as text."""
        now = self._now()
        spent = {name: (now[name] - self._before[name]) * 1000 / count for name in now}
        parts = ", ".join(f"{name} {value:.1f}" for name, value in spent.items())
        return f"{sum(spent.values()):.1f} ms of processor time each: {parts}"

    def _now(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: one.user + one.system for name, one in times.items()}
