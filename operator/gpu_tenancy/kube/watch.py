"""A live view of one high-volume kind: list, then watch, for ever, decoding only the fields somebody asked for.

For Pods, Nodes, ResourceClaims and the like, of which there are too many for a framework that handles each object
by itself. The view is what the API server says; this module adds nothing to it and writes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from gpu_tenancy.kube.client import ListMeta, Page
from gpu_tenancy.kube.errors import Gone, KubeError, Transient, from_response
from gpu_tenancy.kube.resources import Resource

T = TypeVar("T", bound=msgspec.Struct)

_log = logging.getLogger(__name__)

_SERVER_SECONDS: Final = 300
"""How long the server keeps one watch; varied by a tenth, so that many clients do not reconnect together."""
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 10.0
_PATIENCE: Final = 5
_HEALTHY_SECONDS: Final = 5.0
"""A watch that lived as long, or delivered anything, was none of the failures that the back-off counts."""
_LONGEST_LINE: Final = 64 * 1024 * 1024
"""Bytes; etcd stores no object of a twentieth of it, so a longer line is not a watch."""


def _always(_: object) -> bool:
    return True


def _nobody() -> None:
    """Nobody is to be told of changes."""


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: ListMeta


_EVENT: Final = msgspec.json.Decoder(_Event)
_VERSIONED: Final = msgspec.json.Decoder(_Versioned)
_STATUS: Final = msgspec.json.Decoder(dict[str, Any])


class _Entry(NamedTuple, Generic[T]):
    key: str
    item: T
    kept: bool


class Watched(Protocol):
    """The part of KubeClient that a view needs."""

    def pages(
        self, res: Resource, namespace: str | None = None, query: Mapping[str, str | None] | None = None
    ) -> AsyncIterator[Page | None]:
        """A list, page by page; None: what came so far is void."""

    def watch(
        self,
        res: Resource,
        version: str,
        query: Mapping[str, str | None],
        *,
        seconds: int,
        inactivity_seconds: float,
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """What changes after a resourceVersion, in chunks that are cut anywhere."""


class Reflector(Generic[T]):
    """Keeps `items`, the objects of one kind decoded as the partial struct `decode`, in step with the API server.

    `run` never ends except by cancellation: it lists page by page and replaces the view at one stroke (so that what
    vanished while nobody watched vanishes here too), watches from there, resumes a broken watch where it stopped and
    lists again only when the server no longer knows that place. Failures back off up to 10 s, with jitter.

    `key` names an object within the view (its UID, or namespace/name). `keep` leaves objects out that no selector of
    the API server can. `on_change` is called once per batch, and only when a digest really differs: a heartbeat in a
    field that `decode` does not name wakes nobody. `on_item(old, new)` is called for each difference, None meaning
    absent. Callbacks run between two reads of the stream and must be quick; an exception of theirs is logged.

    An object that does not fit `decode` is logged, counted in `undecodable` and left out (or as it was).
    """

    def __init__(  # noqa: PLR0913  (a view is defined by all of them, and most have a default)
        self,
        client: Watched,
        resource: Resource,
        decode: type[T],
        key: Callable[[T], str],
        *,
        label_selector: str | None = None,
        field_selector: str | None = None,
        on_change: Callable[[], None] = _nobody,
        on_item: Callable[[T | None, T | None], None] | None = None,
        keep: Callable[[T], bool] = _always,
        inactivity_seconds: float = 90.0,
    ) -> None:
        self.resource = resource
        self.last_contact = 0.0
        """`time.monotonic()` of the last byte from the server; 0 before the first. A quiet watch is still heard from
        about once a minute (bookmarks)."""
        self.last_error: KubeError | None = None
        """Why the view is not being kept up at the moment; None while it is."""
        self.relists = 0
        """Times the whole view was listed."""
        self.undecodable = 0
        """Objects that did not fit `decode`, each time one was received."""
        self._client = client
        self._decoder = msgspec.json.Decoder(decode)
        self._key = key
        self._keep = keep
        self._on_change = on_change
        self._on_item = on_item
        self._query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        self._inactivity_seconds = inactivity_seconds
        self._items: dict[str, T] = {}
        self._synced = asyncio.Event()
        self._version: str | None = None
        self._last_seen: msgspec.Raw | None = None
        self._changed = False

    @property
    def items(self) -> Mapping[str, T]:
        """The view as it is now, by key; empty before the first list. It changes only while the caller awaits."""
        return MappingProxyType(self._items)

    async def synced(self) -> None:
        """Wait until the first list is complete."""
        await self._synced.wait()

    async def run(self) -> None:
        """Keep the view in step until cancelled."""
        failures = 0
        while True:
            error, healthy = await self._turn()
            failures = 0 if healthy else failures + 1
            if error is None and healthy:
                continue
            if failures >= _PATIENCE and error is not None and error.status != 0:
                self._version = None  # a server that answers, but not to this: perhaps it cannot serve that place
            await asyncio.sleep(_pause(failures, error))

    async def _turn(self) -> tuple[KubeError | None, bool]:
        """List if need be and watch once; what ended it, and whether it did any good before."""
        began = time.monotonic()
        delivered = False
        error: KubeError | None = None
        try:
            if self._version is None:
                self._version = await self._list()
                began = time.monotonic()  # a long list makes no healthy watch
            async with aclosing(self._watch(self._version)) as batches:
                async for lines in batches:
                    self._absorb(lines)
                    delivered = True
        except KubeError as caught:
            error = caught
        self._note_position()
        if isinstance(error, Gone) or not isinstance(error, Transient | None):
            self._version = None
        self._note_error(error)
        return error, delivered or time.monotonic() - began >= _HEALTHY_SECONDS

    # -------------------------------------------------------------------------------------------------- list

    async def _list(self) -> str:
        """Replace the view by what the server has; its resourceVersion."""
        fresh: dict[str, T] = {}
        version = ""
        async for page in self._client.pages(self.resource, None, self._query):
            self.last_contact = time.monotonic()
            if page is None:
                fresh = {}
                continue
            for raw in page.items or []:
                if (entry := self._digest(raw)) is not None and entry.kept:
                    fresh[entry.key] = entry.item
            version = page.metadata.resourceVersion
        self._replace(fresh)
        self.relists += 1
        self._synced.set()
        return version

    def _replace(self, fresh: dict[str, T]) -> None:
        stale = self._items
        self._items = fresh
        for key in stale.keys() - fresh.keys():
            self._tell(stale[key], None)
        for key, item in fresh.items():
            if stale.get(key) != item:
                self._tell(stale.get(key), item)
        self._wake()

    # ------------------------------------------------------------------------------------------------- watch

    async def _watch(self, version: str) -> AsyncGenerator[list[bytes]]:
        """The lines of one watch, as many at a time as have arrived."""
        watch = self._client.watch(
            self.resource,
            version,
            self._query,
            seconds=round(_SERVER_SECONDS * random.uniform(0.9, 1.1)),  # noqa: S311  (no secret)
            inactivity_seconds=self._inactivity_seconds,
        )
        async with watch as chunks:
            self._heard()
            async for lines in _lines(chunks):
                self._heard()
                if lines:
                    yield lines

    def _heard(self) -> None:
        self.last_contact = time.monotonic()
        self.last_error = None

    def _absorb(self, lines: list[bytes]) -> None:
        try:
            for line in lines:
                self._handle(line)
        finally:
            self._wake()

    def _handle(self, line: bytes) -> None:
        try:
            event = _EVENT.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Gone(0, "Garbled", f"A watch of {self.resource.plural} said no event: {error}") from error
        if event.type == "ERROR":
            raise _ended(event.object)
        # Only the last object of a watch is asked for its resourceVersion, when the watch has to be resumed.
        self._last_seen = event.object
        if event.type == "BOOKMARK":
            return
        if (entry := self._digest(event.object)) is not None:
            self._put(entry, present=entry.kept and event.type != "DELETED")

    def _put(self, entry: _Entry[T], *, present: bool) -> None:
        old = self._items.get(entry.key)
        if present and old != entry.item:
            self._items[entry.key] = entry.item
            self._tell(old, entry.item)
        elif not present and old is not None:
            del self._items[entry.key]
            self._tell(old, None)

    def _note_position(self) -> None:
        """Take the place to resume at from the last object seen."""
        if self._last_seen is None:
            return
        try:
            self._version = _VERSIONED.decode(self._last_seen).metadata.resourceVersion or None
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._version = None  # nowhere to resume from: list
        self._last_seen = None

    # ----------------------------------------------------------------------------------------------- telling

    def _digest(self, raw: msgspec.Raw) -> _Entry[T] | None:
        try:
            item = self._decoder.decode(raw)
            return _Entry(self._key(item), item, self._keep(item))
        except Exception as error:  # noqa: BLE001  (one odd object must not end the view of all the others)
            self.undecodable += 1
            _log.warning("A %s does not look as expected and is left out of the view: %r", self.resource.kind, error)
            return None

    def _tell(self, old: T | None, new: T | None) -> None:
        self._changed = True
        if self._on_item is not None:
            _call(self._on_item, old, new)

    def _wake(self) -> None:
        if self._changed:
            self._changed = False
            _call(self._on_change)

    def _note_error(self, error: KubeError | None) -> None:
        known = self.last_error
        self.last_error = error
        if error is not None and (known is None or known.message != error.message):
            _log.warning("The view of %s is not kept up, trying again: %s", self.resource.plural, error)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Cut a stream of chunks into lines of any length; a last line without its end is dropped: it was cut off.

    Yields once per chunk, also when it completes no line.
    """
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        if complete:
            complete[0] = b"".join([*parts, complete[0]])
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > _LONGEST_LINE:
            raise Gone(0, "Garbled", f"A watch sent a line of more than {_LONGEST_LINE} bytes.")
        yield [line for line in complete if line]


def _ended(status: msgspec.Raw) -> KubeError:
    """The error of an ERROR event. Whatever it is, where the watch stood is of no use any more."""
    try:
        body = _STATUS.decode(status)
        error = from_response(int(body.get("code") or 0), body)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, TypeError):
        error = KubeError(0, "Garbled", "the API server ended a watch without saying why")
    gone = Gone(error.status, error.reason, error.message)
    gone.retry_after = error.retry_after if isinstance(error, Transient) else None
    return gone


def _pause(failures: int, error: KubeError | None) -> float:
    """Seconds to wait: nothing to speak of after a healthy watch, then doubling; never less than was asked for."""
    longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(failures, 10))
    asked = error.retry_after if isinstance(error, Transient) else None
    return max(longest * random.uniform(0.5, 1.0), asked or 0.0)  # noqa: S311  (no secret)


def _call(callback: Callable[..., None], *arguments: object) -> None:
    """A consumer's mistake must not end the view that all consumers share."""
    try:
        callback(*arguments)
    except Exception:  # noqa: BLE001  (said with its traceback, below)
        _log.exception("A callback of a Reflector failed; the view itself is not affected.")
