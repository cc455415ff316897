"""What the API server has shown of some kinds, kept up to date by watches; nothing that it showed is forgotten.

For whoever has to say what happened and when: the demo's story and its picture. It reads and never writes.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp

from gpu_tenancy.kube.resources import Resource
from tests.cluster.api import Api, ApiError, Object

T = TypeVar("T")
PAUSE_SECONDS: Final = 0.2
"""Before a broken watch is begun anew; and how often `until` looks when nothing changes, because time passes too."""


class NotSeenError(AssertionError):
    """Something did not show on the API server in time; `expected` and `seen` say what."""

    def __init__(self, expected: str, seen: str, patience_seconds: float | None = None) -> None:
        within = "" if patience_seconds is None else f" within {patience_seconds:.0f} s"
        super().__init__(f"expected{within}: {expected}; seen: {seen}")
        self.expected = expected
        self.seen = seen


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object and when it was shown (seconds of `time.monotonic`)."""

    at: float
    body: Object


class Observed:
    """Objects of some kinds, all versions of them. An async context manager; complete once it is entered."""

    def __init__(self, api: Api, kinds: Iterable[Resource]) -> None:
        """Nothing is read here. `api` must stay open for as long as this is used."""
        self._api = api
        self._kinds = tuple(kinds)
        self._objects: dict[Resource, dict[str, Object]] = {kind: {} for kind in self._kinds}
        self._versions: dict[str, list[Version]] = {}
        self._gone: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        complete = {kind: asyncio.Event() for kind in self._kinds}
        self._tasks = [asyncio.create_task(self._follow(kind, event)) for kind, event in complete.items()]
        try:
            await self.until("a first listing of every kind", lambda: all(one.is_set() for one in complete.values()))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def all(self, kind: Resource) -> list[Object]:
        """The objects of a kind that exist, by namespace and name."""
        return sorted(self._objects[kind].values(), key=_place)

    def get(self, kind: Resource, name: str, namespace: str | None = None) -> Object | None:
        """An object that exists, or None."""
        return next((one for one in self._objects[kind].values() if _place(one) == (namespace or "", name)), None)

    def ever(self, kind: Resource) -> list[Object]:
        """Every object of a kind that was ever there in its last version, in the order in which they appeared."""
        last = (versions[-1].body for versions in self._versions.values())
        return [one for one in last if one["kind"] == kind.kind]

    def exists(self, uid: str) -> bool:
        """Whether an object that was seen still exists."""
        return uid not in self._gone

    def versions(self, uid: str) -> list[Version]:
        """All versions of an object, oldest first; empty for one that was never seen."""
        return list(self._versions.get(uid, ()))

    async def until(
        self,
        expected: str,
        look: Callable[[], T | None],
        seen: Callable[[], str] = lambda: "nothing of it",
        patience_seconds: float = 30.0,
    ) -> T:
        """Call `look` after every change until it returns something true, and return that.

        Raises NotSeenError with `expected` and what `seen` then says; whatever a watch could not cope with.
        """
        deadline = time.monotonic() + patience_seconds
        while not (found := look()):
            self._check()
            if time.monotonic() > deadline:
                raise NotSeenError(expected, seen(), patience_seconds)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), PAUSE_SECONDS)
        return found

    def _check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _follow(self, kind: Resource, complete: asyncio.Event) -> None:
        """List and watch for ever; whatever breaks off, all is listed anew."""
        while True:
            try:
                version = await self._list(kind)
                complete.set()
                self._changed.set()
                while True:
                    version = await self._watch(kind, version)
            except (ApiError, aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(PAUSE_SECONDS)

    async def _list(self, kind: Resource) -> str:
        answer = await self._api.get(kind.path())
        present = {one["metadata"]["uid"]: one for one in answer["items"]}
        for uid in self._objects[kind].keys() - present.keys():
            self._lose(kind, uid)
        for one in present.values():
            self._note(kind, one)
        version: str = answer["metadata"]["resourceVersion"]
        return version

    async def _watch(self, kind: Resource, version: str) -> str:
        async for event in self._api.watch(kind.path(), version, dict[str, Any]):
            body = event["object"]
            match event["type"]:
                case "ADDED" | "MODIFIED":
                    self._note(kind, body)
                case "DELETED":
                    self._note(kind, body)
                    self._lose(kind, body["metadata"]["uid"])
                case "BOOKMARK":
                    pass
                case _:
                    raise ApiError(body.get("code", 0), body.get("reason", ""), body.get("message", ""))
            version = body["metadata"]["resourceVersion"]
            self._changed.set()
        return version

    def _note(self, kind: Resource, body: Object) -> None:
        body.setdefault("kind", kind.kind)  # lists leave it out
        uid = body["metadata"]["uid"]
        known = self._versions.setdefault(uid, [])
        if not known or known[-1].body["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            known.append(Version(time.monotonic(), body))
        self._objects[kind][uid] = body

    def _lose(self, kind: Resource, uid: str) -> None:
        del self._objects[kind][uid]
        self._gone[uid] = time.monotonic()


def _place(body: Object) -> tuple[str, str]:
    metadata = body["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
