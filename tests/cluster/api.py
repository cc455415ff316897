"""A thin client of the API server for the control plane, the stand-in for kubelet and their tests.

Plain requests and watches over aiohttp with the client certificate of a kubeconfig; objects are the API's own JSON.
It is independent of the product's client on purpose: a test may not prove the product's client with itself.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec
import yaml

APPLY: Final = "application/apply-patch+yaml"
MERGE: Final = "application/merge-patch+json"
STRATEGIC: Final = "application/strategic-merge-patch+json"
JSON_PATCH: Final = "application/json-patch+json"

Object = dict[str, Any]
T = TypeVar("T")


class ApiError(RuntimeError):
    """The API server refused a request; the message is its own sentence."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code = code
        """HTTP status, e.g. 404."""
        self.reason = reason
        """Kubernetes' reason, e.g. ``NotFound``; empty where the answer was no Status."""
        self.message = message


class Api:
    """One connection pool to the API server of a kubeconfig. An async context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.url: str = cluster["server"]
        self._tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._tls.load_cert_chain(user["client-certificate"], user["client-key"])
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No limit on connections: each watch holds one, and a limit would make requests wait for watches.
        connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
        self._session = aiohttp.ClientSession(self.url, connector=connector, trust_env=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, **params: str) -> Object:
        """GET `path` (e.g. ``/api/v1/nodes/n1``). Raises ApiError, aiohttp.ClientError."""
        return await self._request("GET", path, params)

    async def items(self, path: str, **params: str) -> list[Object]:
        """The items at the collection `path`."""
        found: list[Object] = (await self.get(path, **params))["items"]
        return found

    async def create(self, path: str, body: Object, **params: str) -> Object:
        """POST `body` to the collection `path`."""
        return await self._request("POST", path, params, body)

    async def replace(self, path: str, body: Object, **params: str) -> Object:
        """PUT `body` at `path`."""
        return await self._request("PUT", path, params, body)

    async def patch(self, path: str, body: Object | list[Object], kind: str = MERGE, **params: str) -> Object:
        """PATCH `path`; `kind` is the content type, one of MERGE, STRATEGIC, JSON_PATCH, APPLY."""
        return await self._request("PATCH", path, params, body, kind)

    async def delete(self, path: str, body: Object | None = None) -> Object:
        """DELETE `path`; `body` are DeleteOptions."""
        return await self._request("DELETE", path, {}, body)

    async def watch(self, path: str, version: str, event_type: type[T], **params: str) -> AsyncIterator[T]:
        """Events at the collection `path` after resource version `version`, decoded as `event_type` by msgspec.

        Ends when the server closes the watch; the caller resumes. Raises ApiError (code 410 when `version` is too
        old), aiohttp.ClientError when the connection breaks.
        """
        query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true", **params}
        decoder = msgspec.json.Decoder(event_type)
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._open().get(path, params=query, timeout=timeout) as response:
            await _raise_for_status(response)
            async for line in _lines(response.content):
                yield decoder.decode(line)

    async def ready(self, path: str = "/readyz") -> bool:
        """Whether the server answers 200 at `path`; False also where nothing listens."""
        try:
            async with self._open().get(path, timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: Object | list[Object] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": content_type}
        async with self._open().request(method, path, params=params, data=data, headers=headers) as response:
            await _raise_for_status(response)
            answer: Object = msgspec.json.decode(await response.read())
            return answer

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("this Api is not open; use it in `async with`.")
        return self._session


async def _raise_for_status(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    text = await response.text()
    try:
        status = msgspec.json.decode(text)
        raise ApiError(response.status, status.get("reason", ""), status.get("message", text))
    except msgspec.DecodeError:
        raise ApiError(response.status, "", text[:500]) from None


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length (aiohttp's own readline refuses long ones, and an object may have a megabyte)."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


async def apply_documents(api: Api, documents: Iterable[Object], manager: str) -> list[Object]:
    """Server-side apply of `documents` in their order, definitions first; waits until a definition is established."""
    ordered = sorted(documents, key=lambda document: document["kind"] != "CustomResourceDefinition")
    return [await _apply(api, document, manager) for document in ordered]


async def _apply(api: Api, document: Object, manager: str) -> Object:
    path = await object_path(api, document)
    applied = await api.patch(path, document, APPLY, fieldManager=manager, force="true")
    if document["kind"] == "CustomResourceDefinition":
        while not await _served(api, applied):
            await asyncio.sleep(0.02)
            applied = await api.get(path)
    return applied


async def _served(api: Api, definition: Object) -> bool:
    """Whether objects of `definition` can be written: it is established, and discovery has caught up with that."""
    conditions = definition.get("status", {}).get("conditions") or []  # null right after creation
    if not any(one["type"] == "Established" and one["status"] == "True" for one in conditions):
        return False
    spec = definition["spec"]
    for version in (one["name"] for one in spec["versions"] if one["served"]):
        try:
            kinds = {one["kind"] for one in (await api.get(f"/apis/{spec['group']}/{version}"))["resources"]}
        except ApiError as error:
            if error.code != 404:
                raise
            return False
        if spec["names"]["kind"] not in kinds:
            return False
    return True


async def object_path(api: Api, document: Object) -> str:
    """Where the API server serves `document`, by its discovery. Raises ValueError for a kind it does not serve."""
    version, kind = document["apiVersion"], document["kind"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    for resource in (await api.get(root))["resources"]:
        if resource["kind"] == kind and "/" not in resource["name"]:
            metadata = document["metadata"]
            scope = f"/namespaces/{metadata.get('namespace', 'default')}" if resource["namespaced"] else ""
            return f"{root}{scope}/{resource['name']}/{metadata['name']}"
    raise ValueError(f"the API server serves no kind {kind} in {version}; apply its definition first.")
