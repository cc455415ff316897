"""A cluster as it was at one moment: objects that answer lists as the API server does, and of which nothing is news.

`Recorder` takes one while somebody lists; `Picture` shows it. Both know no kind by name and write to no cluster.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from gpu_tenancy.kube.client import KubeClient, ListMeta, Object, Objects, Page
from gpu_tenancy.kube.resources import Resource

_VERSION: Final = "1"
"""resourceVersion of a list that never changes."""


class Picture:
    """Objects of any kinds."""

    def __init__(self, objects: Iterable[Object]) -> None:
        self._objects: dict[tuple[str, str], Objects] = defaultdict(list)
        for one in objects:
            self._objects[one["apiVersion"], one["kind"]].append(one)

    async def list(self, res: Resource) -> tuple[Objects, str]:
        """All objects of a kind."""
        return list(self._objects[res.api_version, res.kind]), _VERSION

    async def pages(
        self, res: Resource, namespace: str | None = None, query: Mapping[str, str | None] | None = None
    ) -> AsyncIterator[Page | None]:
        """Those that the selectors let through, on one page."""
        found = (one for one in self._objects[res.api_version, res.kind] if _selected(one, query or {}))
        inside = (one for one in found if namespace is None or one["metadata"].get("namespace") == namespace)
        yield Page(ListMeta(_VERSION), [msgspec.Raw(msgspec.json.encode(one)) for one in inside])

    @asynccontextmanager
    async def watch(self, *_: object, **__: object) -> AsyncIterator[AsyncIterator[bytes]]:
        """Nothing happens, until somebody loses patience."""
        yield _nothing()


class Recorder:
    """Lists for others what an API server has, and keeps it."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._taken: dict[Resource, Objects] = {}

    def objects(self) -> Iterator[Object]:
        """Everything that was listed, as it was when it was last."""
        for found in self._taken.values():
            yield from found

    async def list(self, res: Resource) -> tuple[Objects, str]:
        """All objects of a kind."""
        found, version = await self._client.list(res)
        self._taken[res] = found
        return found, version

    async def pages(
        self, res: Resource, namespace: str | None = None, query: Mapping[str, str | None] | None = None
    ) -> AsyncIterator[Page | None]:
        """Those that the selectors let through, page by page."""
        kind = {"apiVersion": res.api_version, "kind": res.kind}
        taken: Objects = []
        async for page in self._client.pages(res, namespace, query):
            if page is None:
                taken = []
            else:
                taken += [kind | msgspec.json.decode(raw) for raw in page.items or []]
            yield page
        self._taken[res] = taken

    @asynccontextmanager
    async def watch(self, *_: object, **__: object) -> AsyncIterator[AsyncIterator[bytes]]:
        """A picture is of one moment: what happens next is not in it."""
        yield _nothing()


async def _nothing() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def _selected(body: Mapping[str, Any], query: Mapping[str, str | None]) -> bool:
    """Whether selectors let an object through: `label`, `label=value` and `path.of.field=value`, joined by commas."""
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, (query.get("labelSelector") or "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, (query.get("fieldSelector") or "").split(",")):
        path, _, value = term.partition("=")
        if _at(body, path) != value:
            return False
    return True


def _at(body: Mapping[str, Any], path: str) -> object:
    """The value at a path of field names."""
    found: Any = body
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
