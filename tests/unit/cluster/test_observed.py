"""What `Observed` keeps of what an API server shows, and what it says when something does not show."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
import pytest

from gpu_tenancy.kube import resources
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.observed import NotSeenError, Observed

T = TypeVar("T")
PODS = resources.PODS


class Scripted(Api):
    """An API server of pods: a test feeds its watch, and changes what it lists."""

    def __init__(self) -> None:
        self.listed: list[Object] = []
        self.events: asyncio.Queue[Object | ApiError] = asyncio.Queue()

    async def get(self, path: str, **params: str) -> Object:
        assert (path, params) == (PODS.path(), {})
        return {"metadata": {"resourceVersion": "1"}, "items": list(self.listed)}

    async def watch(self, path: str, version: str, event_type: type[T], **params: str) -> AsyncIterator[T]:
        assert (path, version, params) == (PODS.path(), "1", {})
        while True:
            event = await self.events.get()
            if isinstance(event, ApiError):
                raise event
            yield msgspec.convert(event, event_type)


def pod(name: str, version: int, phase: str = "Pending") -> Object:
    metadata = {"name": name, "namespace": "team-a", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata, "status": {"phase": phase}}


def run(test: Callable[[Scripted, Observed], Awaitable[None]], *listed: Object) -> None:
    async def body() -> None:
        api = Scripted()
        api.listed = list(listed)
        async with Observed(api, [PODS]) as observed:
            await test(api, observed)

    asyncio.run(body())


def names(of: list[Object]) -> list[str]:
    return [one["metadata"]["name"] for one in of]


def test_what_exists_is_there_on_entry() -> None:
    async def test(_: Scripted, observed: Observed) -> None:
        assert names(observed.all(PODS)) == ["a", "b"]
        assert observed.get(PODS, "a", "team-a") is not None
        assert observed.get(PODS, "a", "team-b") is None

    run(test, pod("b", 1), pod("a", 2))


def test_every_version_is_kept_also_of_what_is_gone() -> None:
    async def test(api: Scripted, observed: Observed) -> None:
        for version, phase in ((2, "Running"), (3, "Succeeded")):
            api.events.put_nowait({"type": "MODIFIED", "object": pod("a", version, phase)})
        api.events.put_nowait({"type": "DELETED", "object": pod("a", 4, "Succeeded")})
        await observed.until("pod a to go", lambda: not observed.exists("uid-a"))
        assert observed.all(PODS) == []
        assert names(observed.ever(PODS)) == ["a"]
        phases = [version.body["status"]["phase"] for version in observed.versions("uid-a")]
        assert phases == ["Pending", "Running", "Succeeded", "Succeeded"]
        times = [version.at for version in observed.versions("uid-a")]
        assert times == sorted(times)

    run(test, pod("a", 1))


def test_what_vanished_while_the_watch_was_cut_is_gone() -> None:
    async def test(api: Scripted, observed: Observed) -> None:
        api.listed = [pod("b", 2)]
        api.events.put_nowait(ApiError(410, "Expired", "too old resource version"))
        await observed.until("pod b", lambda: observed.get(PODS, "b", "team-a"))
        assert names(observed.all(PODS)) == ["b"]
        assert not observed.exists("uid-a")
        assert len(observed.versions("uid-b")) == 1

    run(test, pod("a", 1))


def test_in_order_of_appearance_the_older_come_first() -> None:
    async def test(api: Scripted, observed: Observed) -> None:
        api.events.put_nowait({"type": "ADDED", "object": pod("a", 2)})
        await observed.until("pod a", lambda: observed.get(PODS, "a", "team-a"))
        assert names(observed.ever(PODS)) == ["z", "a"]

    run(test, pod("z", 1))


def test_what_is_waited_for_in_vain_is_said_with_what_was_seen() -> None:
    async def test(_: Scripted, observed: Observed) -> None:
        with pytest.raises(NotSeenError, match=r"^expected within 0 s: a miracle; seen: 1 pod$"):
            await observed.until("a miracle", lambda: None, lambda: "1 pod", patience_seconds=0.01)

    run(test, pod("a", 1))


def test_a_watch_that_cannot_go_on_is_not_hidden() -> None:
    async def test(api: Scripted, observed: Observed) -> None:
        api.events.put_nowait({"type": "ADDED", "object": {"status": {}}})
        with pytest.raises(KeyError, match="metadata"):
            await observed.until("anything", lambda: None)

    run(test)
