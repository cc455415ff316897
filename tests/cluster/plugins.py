"""How a kubelet finds a node's DRA plugin and keeps in touch with it: plugin registration, as kubelet does it.

One `Plugins` serves many simulated nodes. It looks for the driver's socket in each node's `plugins_registry`, asks who
is there, tells it the outcome, holds the connection, and notices when the plugin goes away or comes back. It may not
know pods or claims; what a connection is used for is kubelet.py's matter.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import grpc
import grpc.aio

from gpu_tenancy.agent.proto.dra_v1_pb2_grpc import DRAPluginStub
from gpu_tenancy.agent.proto.pluginregistration_v1_pb2 import InfoRequest, PluginInfo, RegistrationStatus
from gpu_tenancy.agent.proto.pluginregistration_v1_pb2_grpc import RegistrationStub

LOOK_SECONDS: Final = 0.1
"""How often the sockets are looked at; kubelet is told by the file system instead, which is as quick."""
CALL_SECONDS: Final = 10.0
SERVICE: Final = "v1.DRAPlugin"

# A plugin that restarts is to be found at once; gRPC's own pause between attempts grows to two minutes.
CHANNEL_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class PluginUnavailableError(RuntimeError):
    """No plugin is registered at a node, or it does not answer; worth another attempt."""


@dataclass(slots=True)
class _Seat:
    """What is known of the plugin of one node."""

    socket: Path
    seen: tuple[int, int] | None = None
    """Identity (inode, change time) of the registration socket that was last dealt with."""
    channel: grpc.aio.Channel | None = None
    stub: DRAPluginStub | None = None
    error: str | None = None
    """Why the plugin could not be registered, or None."""
    registering: asyncio.Task[None] | None = None
    gone_since: float | None = None
    """When the plugin was lost (monotonic seconds); None while it is connected or was never there."""


class Plugins:
    """The connections of many kubelets to the plugin `driver` of their nodes. An async context manager."""

    def __init__(
        self,
        driver: str,
        nodes: Iterable[str],
        root_for: Callable[[str], Path],
        on_lost: Callable[[str], Awaitable[None]],
        lost_after_seconds: float,
    ) -> None:
        """root_for: kubelet's root folder of a node; on_lost: awaited once a plugin was away `lost_after_seconds`."""
        self._driver = driver
        self._seats = {node: _Seat(socket=root_for(node) / "plugins_registry" / f"{driver}-reg.sock") for node in nodes}
        self._on_lost = on_lost
        self._lost_after_seconds = lost_after_seconds
        self._registered = asyncio.Condition()
        self._looking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._looking = asyncio.create_task(self._look_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        for seat in self._seats.values():
            if seat.registering is not None:
                seat.registering.cancel()
                await asyncio.gather(seat.registering, return_exceptions=True)
            await _disconnect(seat)

    @property
    def errors(self) -> dict[str, str]:
        """Why plugins could not be registered, by node."""
        return {node: seat.error for node, seat in self._seats.items() if seat.error is not None}

    def stub(self, node: str) -> DRAPluginStub:
        """The plugin of `node`. Raises PluginUnavailableError while none is registered."""
        seat = self._seats[node]
        if seat.stub is None:
            raise PluginUnavailableError(f"DRA driver {self._driver} is not registered on node {node}")
        return seat.stub

    async def until_registered(self, node: str, patience_seconds: float) -> None:
        """Wait for the plugin of `node`. Raises TimeoutError with the last registration error."""
        try:
            async with asyncio.timeout(patience_seconds), self._registered:
                await self._registered.wait_for(lambda: self._seats[node].stub is not None)
        except TimeoutError:
            seat = self._seats[node]
            reason = seat.error or f"{seat.socket} does not exist"
            raise TimeoutError(f"no DRA plugin registered on {node} in {patience_seconds} s: {reason}") from None

    async def _look_for_ever(self) -> None:
        while True:
            for node, seat in self._seats.items():
                await self._look(node, seat)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, node: str, seat: _Seat) -> None:
        if seat.registering is not None and not seat.registering.done():
            return
        identity = _identity(seat.socket)
        if identity is not None and identity != seat.seen:
            # In a task of its own: a plugin that hangs may not keep the other nodes' plugins waiting.
            seat.registering = asyncio.create_task(self._register(seat, identity))
        elif identity is None and seat.stub is not None:
            await self._unregister(seat)
        self._note_connection(seat)
        if seat.gone_since is not None and time.monotonic() - seat.gone_since >= self._lost_after_seconds:
            seat.gone_since = None
            await self._on_lost(node)

    async def _register(self, seat: _Seat, identity: tuple[int, int]) -> None:
        async with _channel(seat.socket) as channel:
            registration = RegistrationStub(channel)
            try:
                info = await registration.GetInfo(InfoRequest(), timeout=CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                # Not marked as seen: the socket may exist a moment before its server answers.
                seat.error = f"GetInfo on {seat.socket} failed: {error.code().name} {error.details()}"
                return
            seat.seen, seat.error = identity, self._objection(info)
            if seat.error is None:
                await _disconnect(seat)
                seat.gone_since = None
                seat.channel = _channel(Path(info.endpoint))
                seat.stub = DRAPluginStub(seat.channel)
            outcome = RegistrationStatus(plugin_registered=seat.error is None, error=seat.error or "")
            with contextlib.suppress(grpc.aio.AioRpcError):  # it went away again: the next look sees that
                await registration.NotifyRegistrationStatus(outcome, timeout=CALL_SECONDS)
        async with self._registered:
            self._registered.notify_all()

    def _objection(self, info: PluginInfo) -> str | None:
        if info.type != "DRAPlugin":
            return f"plugin type {info.type!r} is not supported here; it must be 'DRAPlugin'."
        if info.name != self._driver:
            return f"plugin name {info.name!r} does not match its socket; it must be {self._driver!r}."
        if SERVICE not in info.supported_versions:
            return f"plugin versions {list(info.supported_versions)} do not include {SERVICE!r}."
        if not Path(info.endpoint).is_absolute():
            return f"plugin endpoint {info.endpoint!r} is not an absolute path."
        return None

    async def _unregister(self, seat: _Seat) -> None:
        await _disconnect(seat)
        seat.seen = None
        seat.gone_since = seat.gone_since or time.monotonic()

    def _note_connection(self, seat: _Seat) -> None:
        """A plugin that was killed leaves its sockets behind: only the broken connection shows that it is gone."""
        if seat.channel is None:
            return
        if seat.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            seat.gone_since = seat.gone_since or time.monotonic()
        elif seat.channel.get_state() is grpc.ChannelConnectivity.READY:
            seat.gone_since = None


async def _disconnect(seat: _Seat) -> None:
    channel, seat.channel, seat.stub = seat.channel, None, None
    if channel is not None:
        await channel.close(None)


def _channel(socket: Path) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"unix://{socket}", options=CHANNEL_OPTIONS)


def _identity(socket: Path) -> tuple[int, int] | None:
    try:
        found = socket.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns
