"""An API server on loopback that says exactly what a test tells it to, also what a real one says only on bad days.

It stores nothing and checks nothing; tests of what a real API server does run against a real one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml
from aiohttp import web

from gpu_tenancy.kube.client import KubeClient, RequestInfo

Object: TypeAlias = dict[str, Any]
Answer: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def said(body: object, status: int = 200, **headers: str) -> web.Response:
    """An answer with a JSON body; `retry_after="1"` becomes the header Retry-After."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return web.Response(text=json.dumps(body), status=status, content_type="application/json", headers=named)


def refused(status: int, reason: str, message: str = "no", **headers: str) -> web.Response:
    """An error as an API server words it."""
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": status}
    return said(body, status, **headers)


def pod(name: str, version: int, *, uid: str | None = None, phase: str = "Running", padding: str = "") -> Object:
    metadata = {"name": name, "namespace": "a", "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {"padding": padding}, "status": {"phase": phase}}


class Stream:
    """One watch that a client has open, as the server sees it."""

    def __init__(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        self.query = dict(request.query)
        self._request = request
        self._response = response
        self._over = asyncio.Event()

    async def send(self, kind: str, body: Object) -> None:
        await self.send_bytes(json.dumps({"type": kind, "object": body}).encode() + b"\n")

    async def bookmark(self, version: int) -> None:
        await self.send("BOOKMARK", {"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": str(version)}})

    async def send_bytes(self, data: bytes) -> None:
        await self._response.write(data)

    def end(self) -> None:
        """End the stream as a server does when its time is over."""
        self._over.set()

    def cut(self) -> None:
        """Break the connection."""
        assert self._request.transport is not None
        self._request.transport.abort()
        self._over.set()

    async def hold(self) -> None:
        await self._over.wait()


class FakeServer:
    """`answer` decides about every request that is no watch; watches are handed to the test by `next_watch`."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.requests: list[web.BaseRequest] = []
        self.bodies: list[Any] = []
        self.pods: list[Object] = []
        self.version = 0
        self.answer: Answer = self.list_pods
        self.watch_answers: list[web.Response] = []
        """Refusals of the next watches, before any is accepted."""
        self._watches: asyncio.Queue[Stream] = asyncio.Queue()
        self._open: list[Stream] = []
        self._runner = web.ServerRunner(web.Server(self._serve), shutdown_timeout=0.1)
        self.port = 0

    async def start(self) -> Self:
        await self._runner.setup()
        await self.listen()
        self.write_kubeconfig("first")
        return self

    async def listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await self._site.start()
        self.port = self._runner.addresses[0][1]

    async def turn_deaf(self) -> None:
        """Refuse new connections until `listen`."""
        await self._site.stop()

    def write_kubeconfig(self, token: str) -> None:
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "u", "user": {"token": token}}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config))

    async def stop(self) -> None:
        for stream in self._open:
            stream.end()
        await self._runner.cleanup()

    async def next_watch(self) -> Stream:
        return await self._watches.get()

    def list_pods_now(self) -> Object:
        return {"metadata": {"resourceVersion": str(self.version)}, "items": self.pods}

    async def list_pods(self, _: web.BaseRequest) -> web.StreamResponse:
        return said(self.list_pods_now())

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        text = await request.text()
        self.bodies.append(json.loads(text) if text else None)
        if request.query.get("watch") == "true":
            return await self._watch(request)
        return await self.answer(request)

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.watch_answers:
            return self.watch_answers.pop(0)
        response = web.StreamResponse()
        await response.prepare(request)
        stream = Stream(request, response)
        self._open.append(stream)
        self._watches.put_nowait(stream)
        await stream.hold()
        return response


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[FakeServer, KubeClient]]:
    server = await FakeServer(folder).start()
    try:
        async with KubeClient.connect(str(server.kubeconfig)) as client:
            yield server, client
    finally:
        await server.stop()


def run(folder: Path, test: Callable[[FakeServer, KubeClient], Coroutine[Any, Any, None]]) -> None:
    """Run `test` with a server and a client on a loop of its own; a hang becomes an error."""

    async def with_server() -> None:
        async with serving(folder) as (server, client):
            await asyncio.wait_for(test(server, client), 60)

    asyncio.run(with_server())


def recorded(client: KubeClient) -> list[RequestInfo]:
    """What the client reports from now on."""
    infos: list[RequestInfo] = []
    client.on_request = infos.append
    return infos
