"""The one adapter to the Kubernetes API: requests on plain JSON objects, errors in four classes, bounded concurrency.

It holds no objects, decides nothing and knows no kind by name; watching with a cache is `watch`, our own kinds'
cache is `store`. It sends exactly what it is given, so that a caller can count its writes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Self, TypeAlias, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, stop_after_delay
from tenacity.wait import wait_random_exponential

from gpu_tenancy.kube import transport
from gpu_tenancy.kube.errors import Conflict, Gone, KubeError, NotFound, Transient, from_response
from gpu_tenancy.kube.resources import Resource
from gpu_tenancy.kube.transport import Call, Transport

Object: TypeAlias = dict[str, Any]
"""A Kubernetes object, or another JSON object, as it is on the wire."""
Objects: TypeAlias = list[Object]

PAGE_SIZE: Final = 500
"""Objects per page of a list: what client-go asks for."""
_TRIES: Final = 4
_LONGEST_WAIT: Final = 10.0
"""Seconds; a server that asks for more is left to the caller's own loop."""
_RELOAD_INTERVAL: Final = 10.0
"""Seconds between two readings of the credentials because of a 401."""
_OTHER_UID: Final = re.compile(r"UID in (the )?precondition")
"""What only the refusal of a UID precondition says; its status and reason are those of every conflict."""


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One HTTP request that was made, each repetition counted on its own.

    `verb` is the API server's (get, list, watch, create, update, patch, apply, delete), `resource` the plural,
    `status` the HTTP status or 0 without an answer, `seconds` the time to the whole answer (watch: to its start).
    """

    verb: str
    method: str
    resource: str
    subresource: str | None
    status: int
    seconds: float
    dry_run: bool


class ListMeta(msgspec.Struct):
    """What a list says about itself."""

    resourceVersion: str = ""  # noqa: N815  (the wire's name)
    continue_: str = msgspec.field(default="", name="continue")


class Page(msgspec.Struct):
    """One page of a list; its items are left as bytes, for whoever knows their type."""

    metadata: ListMeta
    items: list[msgspec.Raw] | None = None


@dataclass(frozen=True, slots=True)
class _Request:
    """A call and what is known about it besides its bytes."""

    verb: str
    resource: Resource
    call: Call
    subresource: str | None = None
    dry_run: bool = False
    repeatable: bool = False
    """Sending it twice has the effect of sending it once, or fails the second time without effect."""


class KubeClient:
    """Connection to one API server.

    `async with KubeClient.connect() as client: ...`, or `client = KubeClient.connect()` with `await client.open()`
    and `await client.close()`. All methods raise errors of `kube.errors` only (and ValueError for arguments that
    make no request at all, such as an empty name).

    **Retries.** Transient failures are repeated here up to three times within 30 s, with exponential back-off and
    jitter, honouring Retry-After up to 10 s; but only where repeating is safe: get, list, delete with `uid`, JSON
    Patch with a `test`, server-side apply, replace (its resourceVersion makes a second try a Conflict), and
    anything the server has certainly not executed (429, no connection). Everything else is the caller's loop's.

    **Credentials.** On 401 they are read anew once (rotated token or certificate, exec plugin) and the request
    is repeated.
    """

    def __init__(
        self,
        kubeconfig: str | None,
        user_agent: str,
        max_in_flight: int,
        on_request: Callable[[RequestInfo], None] | None,
    ) -> None:
        self.on_request = on_request
        self._kubeconfig = kubeconfig
        self._user_agent = user_agent
        self._slots = asyncio.Semaphore(max_in_flight)
        self._transport: Transport | None = None
        self._loading = asyncio.Lock()
        self._loaded_at = 0.0
        self._closed = False
        self._timeouts = aiohttp.ClientTimeout(total=30.0, sock_connect=10.0)

    @classmethod
    def connect(
        cls,
        kubeconfig: str | None = None,
        user_agent: str = "gpu-tenancy",
        max_in_flight: int = 64,
        on_request: Callable[[RequestInfo], None] | None = None,
    ) -> Self:
        """Prepare a client; credentials are read on entering it, or by `open`.

        `kubeconfig` is a path, or several joined by colons; without it $KUBECONFIG, the pod's service account,
        ~/.kube/config are tried in this order. `max_in_flight` bounds concurrent requests, watches not counted.
        `on_request` is told of every HTTP request and must not raise.
        """
        return cls(kubeconfig, user_agent, max_in_flight, on_request)

    async def open(self) -> None:
        """Read the credentials. Raises Rejected, naming the source, where they cannot be used."""
        await self._current_transport()

    async def close(self) -> None:
        """Close all connections; the client cannot be used again."""
        self._closed = True
        if self._transport is not None:
            await self._transport.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------------------------------ reading

    async def get(self, res: Resource, name: str, namespace: str | None = None) -> Object:
        """Read one object. Raises NotFound where there is none."""
        path = res.path(namespace, name)
        return await self._object(_Request("get", res, Call("GET", path), repeatable=True))

    async def list(
        self,
        res: Resource,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> tuple[Objects, str]:
        """Read all objects of one namespace, or of all, as of one instant; with the resourceVersion of that instant.

        Items get the `apiVersion` and `kind` that the API server leaves out inside lists of built-in kinds.
        """
        kind = {"apiVersion": res.api_version, "kind": res.kind}
        items: Objects = []
        version = ""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        async for page in self.pages(res, namespace, query):
            if page is None:
                items = []
                continue
            decoded: Objects = [_decode(_OBJECT, raw, res.plural) for raw in page.items or []]
            items += [kind | item for item in decoded]
            version = page.metadata.resourceVersion
        return items, version

    async def pages(
        self, res: Resource, namespace: str | None = None, query: Mapping[str, str | None] | None = None
    ) -> AsyncIterator[Page | None]:
        """Read a list page by page. None means: what came so far is void, the list begins again.

        That happens once at most, when the API server has forgotten the state of the first page; the second
        attempt is a single page.
        """
        try:
            async for page in self._pages(res, namespace, {**(query or {}), "limit": str(PAGE_SIZE)}):
                yield page
        except Gone:
            yield None
            async for page in self._pages(res, namespace, query or {}):
                yield page

    async def _pages(
        self, res: Resource, namespace: str | None, query: Mapping[str, str | None]
    ) -> AsyncIterator[Page]:
        token = ""
        while True:
            path = _with_query(res.path(namespace), {**query, "continue": token or None})
            body = await self._send(_Request("list", res, Call("GET", path), repeatable=True))
            page = _decode(_PAGE, body, path)
            yield page
            token = page.metadata.continue_
            if not token:
                return

    @asynccontextmanager
    async def watch(
        self,
        res: Resource,
        version: str,
        query: Mapping[str, str | None],
        *,
        seconds: int,
        inactivity_seconds: float,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Stream the changes after resourceVersion `version`: the chunks as they come, cut anywhere.

        The server ends the stream after `seconds`; no byte for `inactivity_seconds` raises Transient. Bookmarks are
        asked for. Watches are not counted against `max_in_flight` and are not retried.
        """
        path = _with_query(
            res.path(),
            {
                **query,
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(seconds),
            },
        )
        request = _Request("watch", res, Call("GET", path))
        timeouts = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=inactivity_seconds)
        began = time.monotonic()
        status = 0
        current = await self._current_transport()
        try:
            async with current.send(request.call, timeouts) as response:
                status = response.status
                if status != HTTPStatus.OK:
                    raise await self._watch_refused(current, response)
                self._report(request, status, began)
                yield response.content.iter_any()
        finally:
            if status != HTTPStatus.OK:
                self._report(request, status, began)

    async def _watch_refused(self, used: Transport, response: aiohttp.ClientResponse) -> KubeError:
        if response.status == HTTPStatus.UNAUTHORIZED:
            await self._renew(used)
        body = await response.read()
        return from_response(response.status, body, retry_after=transport.retry_after(response.headers))

    # ------------------------------------------------------------------------------------------------ writing

    async def create(
        self, res: Resource, body: Mapping[str, Any], *, dry_run: bool = False, canonical: bool = False
    ) -> Object:
        """Create the object; its name and namespace are in its metadata. Raises AlreadyExists.

        With `dry_run` the API server checks and defaults the object, admission included, and stores nothing; fields
        it does not know are then an error too, so that a misspelt field is not silently dropped later.

        `canonical` is for kinds with opaque parameters in an immutable field. The API server keeps these as the bytes
        that it was sent, writes them anew when it patches the object, and compares: sent in any other form than its
        own, the object could never be annotated or labelled by anybody ("field is immutable"). What is sent as YAML,
        which JSON is, it brings into its own form first.
        """
        query = {"dryRun": "All", "fieldValidation": "Strict"} if dry_run else {}
        path = _with_query(res.path(_metadata(body).get("namespace")), query)
        if canonical:
            call = Call("POST", path, "application/yaml", msgspec.json.encode(_typed(res, body)))
        else:
            call = Call("POST", path, body=_typed(res, body))
        return await self._object(_Request("create", res, call, dry_run=dry_run))

    async def replace(self, res: Resource, body: Mapping[str, Any], *, subresource: str | None = None) -> Object:
        """Replace the object whose resourceVersion is the one in `body`. Raises Conflict where it has moved on."""
        if not _metadata(body).get("resourceVersion"):
            raise ValueError(f"{res.kind}: replace needs metadata.resourceVersion, or it overwrites others' changes.")
        call = Call("PUT", _own_path(res, body, subresource), body=_typed(res, body))
        return await self._object(_Request("update", res, call, subresource, repeatable=True))

    async def apply(
        self,
        res: Resource,
        body: Mapping[str, Any],
        *,
        field_manager: str,
        force: bool = True,
        subresource: str | None = None,
    ) -> Object:
        """Server-side apply: `body` says all that `field_manager` wants to own. Creates the object if need be.

        Without `force` a field that another manager owns is a Conflict whose message names both.
        """
        query = {"fieldManager": field_manager, "force": "true" if force else "false"}
        path = _with_query(_own_path(res, body, subresource), query)
        call = Call("PATCH", path, "application/apply-patch+yaml", _typed(res, body))
        return await self._object(_Request("apply", res, call, subresource, repeatable=True))

    async def json_patch(
        self,
        res: Resource,
        name: str,
        operations: Sequence[Mapping[str, Any]],
        namespace: str | None = None,
        subresource: str | None = None,
    ) -> Object:
        """Apply a JSON Patch (RFC 6902): all of it or nothing.

        Raises Conflict where a `test` does not hold or a path does not exist; the API server says neither which, so
        the message adds what was tested.
        """
        path = res.path(namespace, name, subresource)
        call = Call("PATCH", path, "application/json-patch+json", [dict(operation) for operation in operations])
        tests = [f"{test['path']} = {test.get('value')!r}" for test in operations if test["op"] == "test"]
        try:
            return await self._object(_Request("patch", res, call, subresource, repeatable=bool(tests)))
        except Conflict as error:
            if error.status == HTTPStatus.UNPROCESSABLE_ENTITY:
                error.message += f": the JSON Patch does not fit {res.kind} {name!r} (tested: {', '.join(tests)})"
            raise

    async def merge_patch(
        self,
        res: Resource,
        name: str,
        patch: Mapping[str, Any],
        namespace: str | None = None,
        subresource: str | None = None,
    ) -> Object:
        """Apply a JSON Merge Patch (RFC 7386): a list is replaced whole, a None removes the field."""
        path = res.path(namespace, name, subresource)
        call = Call("PATCH", path, "application/merge-patch+json", dict(patch))
        return await self._object(_Request("patch", res, call, subresource))

    async def delete(
        self,
        res: Resource,
        name: str,
        namespace: str | None = None,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
        propagation: str = "Background",
    ) -> bool:
        """Ask for the deletion of one object; finalizers and grace may keep it for a while yet.

        False where there is nothing to do: it is gone, or another object bears the name (its UID is not `uid`).
        Both may also be the trace of this call's own first try when its answer was lost.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        call = Call("DELETE", res.path(namespace, name), body=options)
        try:
            await self._send(_Request("delete", res, call, repeatable=uid is not None))
        except NotFound:
            return False
        except Conflict as error:
            if uid is not None and _OTHER_UID.search(error.message):
                return False
            raise
        return True

    # ------------------------------------------------------------------------------------------------ machinery

    async def _object(self, request: _Request) -> Object:
        return _decode(_OBJECT, await self._send(request), request.call.path)

    async def _send(self, request: _Request) -> bytes:
        """The answer's body; repeats by the policy in the class docstring."""
        try:
            return await self._attempt(request)
        except Transient as error:
            if not _may_repeat(request, error):
                raise
            return await self._repeat(request, error)

    async def _repeat(self, request: _Request, first: Transient) -> bytes:
        """Go on after a first try that failed. A policy costs a fifth of a request, so the usual one does without."""
        failed = [first]

        async def attempt() -> bytes:
            if failed:
                raise failed.pop()
            return await self._attempt(request)

        policy = AsyncRetrying(
            stop=stop_after_attempt(_TRIES) | stop_after_delay(30),
            wait=_wait,
            retry=retry_if_exception(lambda error: _may_repeat(request, error)),
            reraise=True,
        )
        return await policy(attempt)

    async def _attempt(self, request: _Request) -> bytes:
        async with self._slots:
            current = await self._current_transport()
            try:
                return await self._exchange(current, request)
            except Transient as error:
                if error.status != HTTPStatus.UNAUTHORIZED or not await self._renew(current):
                    raise
            return await self._exchange(await self._current_transport(), request)

    async def _exchange(self, current: Transport, request: _Request) -> bytes:
        began = time.monotonic()
        status = 0
        try:
            async with current.send(request.call, self._timeouts) as response:
                body = await response.read()
                status = response.status
        finally:
            self._report(request, status, began)
        if status >= HTTPStatus.MULTIPLE_CHOICES:
            raise from_response(status, body, retry_after=transport.retry_after(response.headers))
        return body

    def _report(self, request: _Request, status: int, began: float) -> None:
        if self.on_request is None:
            return
        seconds = time.monotonic() - began
        self.on_request(
            RequestInfo(
                request.verb,
                request.call.method,
                request.resource.plural,
                request.subresource,
                status,
                seconds,
                request.dry_run,
            )
        )

    async def _current_transport(self) -> Transport:
        if self._closed:
            raise Transient(0, "Closed", "The connection to the API server was closed by this program.")
        if self._transport is None:
            async with self._loading:
                if self._transport is None:
                    self._transport = await transport.load(self._kubeconfig, self._user_agent)
                    self._loaded_at = time.monotonic()
        return self._transport

    async def _renew(self, used: Transport) -> bool:
        """Read the credentials anew because `used` was refused; True where there is something new to try."""
        async with self._loading:
            if self._transport is not used:
                return True
            if time.monotonic() - self._loaded_at < _RELOAD_INTERVAL:
                return False
            self._loaded_at = time.monotonic()
            try:
                self._transport = await transport.load(self._kubeconfig, self._user_agent)
            except KubeError:
                return False  # the 401 that led here is the sentence the caller should see
            await used.retire()
        return True


_OBJECT: Final = msgspec.json.Decoder(dict[str, Any])
_PAGE: Final = msgspec.json.Decoder(Page)
_T = TypeVar("_T")
_back_off: Final = wait_random_exponential(multiplier=0.2, max=2.0, min=0.02)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return _back_off(state) + (asked or 0.0)


def _may_repeat(request: _Request, error: BaseException) -> bool:
    if not isinstance(error, Transient) or isinstance(error, Gone):
        return False
    if error.reason in {"Closed", "Credentials"} or (error.retry_after or 0.0) > _LONGEST_WAIT:
        return False
    return request.repeatable or error.not_executed


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes | msgspec.Raw, what: str) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Transient(0, "Garbled", f"{what}: the answer is not what the API promises: {error}") from error


def _metadata(body: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata: Mapping[str, Any] = body.get("metadata") or {}
    return metadata


def _own_path(res: Resource, body: Mapping[str, Any], subresource: str | None) -> str:
    metadata = _metadata(body)
    return res.path(metadata.get("namespace"), metadata.get("name", ""), subresource)


def _typed(res: Resource, body: Mapping[str, Any]) -> Object:
    return {"apiVersion": res.api_version, "kind": res.kind, **body}


def _with_query(path: str, query: Mapping[str, str | None]) -> str:
    present = {key: value for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(present, quote_via=quote)}" if present else path
