"""The DRA kubelet plugin: what kubelet asks of the agent, on two unix sockets served by one gRPC server.

It hands prepared claims to the situation and waits for nothing but the API server's word on the claim and the disk;
it makes and takes away no device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc.aio

from gpu_tenancy.agent import cdi
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.cdi import ClaimFiles
from gpu_tenancy.agent.claims import NotYet, Refusal, admitted
from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.dra_health import Health
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.agent.proto import pluginregistration_v1_pb2 as registration
from gpu_tenancy.agent.proto.dra_health_v1alpha1_pb2_grpc import add_DRAResourceHealthServicer_to_server
from gpu_tenancy.agent.proto.dra_v1_pb2_grpc import DRAPluginServicer, add_DRAPluginServicer_to_server
from gpu_tenancy.agent.proto.pluginregistration_v1_pb2_grpc import (
    RegistrationServicer,
    add_RegistrationServicer_to_server,
)
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import PreparedClaim
from gpu_tenancy.api.names import DRIVER
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import KubeError, NotFound
from gpu_tenancy.kube.resources import RESOURCE_CLAIMS

_log = logging.getLogger(__name__)

_TURN: Final = 0.05
_GRACE_SECONDS: Final = 2.0
"""Time for calls that are under way when the agent stops."""
PLUGIN_TYPE: Final = "DRAPlugin"
SUPPORTED: Final = "v1.DRAPlugin"
"""Name of the service version, as kubelet spells it in its list of supported ones."""


class Plugin(DRAPluginServicer):
    """Prepares and unprepares claims on one node."""

    def __init__(
        self, node: str, client: KubeClient, memory: Memory, files: ClaimFiles, clock: Clock, patience: float
    ) -> None:
        """`patience`: how long a claim may wait for a device that is being made, in seconds."""
        self._node = node
        self._patience = patience
        self._client = client
        self._memory = memory
        self._files = files
        self._clock = clock

    async def NodePrepareResources(  # noqa: N802  (the wire's name)
        self, request: dra.NodePrepareResourcesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> dra.NodePrepareResourcesResponse:
        """Answer each claim by itself: its devices, or the sentence that says why not."""
        del context
        answers = await asyncio.gather(*(self._prepare(claim) for claim in request.claims))
        claims = {claim.uid: answer for claim, answer in zip(request.claims, answers, strict=True)}
        return dra.NodePrepareResourcesResponse(claims=claims)

    async def NodeUnprepareResources(  # noqa: N802  (the wire's name)
        self, request: dra.NodeUnprepareResourcesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> dra.NodeUnprepareResourcesResponse:
        """Take each claim back; one that is not known was taken back before."""
        del context
        answers = await asyncio.gather(*(self._unprepare(claim) for claim in request.claims))
        claims = {claim.uid: answer for claim, answer in zip(request.claims, answers, strict=True)}
        return dra.NodeUnprepareResourcesResponse(claims=claims)

    async def _prepare(self, asked: dra.Claim) -> dra.NodePrepareResourceResponse:
        try:
            claim = await self._admit(asked)
            await self._memory.saved()
            self._write_file(claim)
        except (Refusal, KubeError, OSError) as error:
            _log.warning("Claim %s/%s is not prepared: %s", asked.namespace, asked.name, error)
            return dra.NodePrepareResourceResponse(error=str(error))
        return dra.NodePrepareResourceResponse(devices=[self._device(claim, one) for one in claim.devices])

    async def _admit(self, asked: dra.Claim) -> PreparedClaim:
        """Read the claim, check it and record it: between check and record nothing is awaited.

        A device that is being made again, after a reboot or a restart, is waited for: kubelet asks for what was refused
        only at its next full look at the pod, a minute or more later.
        """
        try:
            body = await self._client.get(RESOURCE_CLAIMS, asked.name, asked.namespace)
        except NotFound:
            raise Refusal(f"claim {asked.namespace}/{asked.name} does not exist (any more)") from None
        patience = self._patience
        while patience > 0:
            try:
                return self._record(body, asked)
            except NotYet:
                await self._clock.sleep(_TURN)
                patience -= _TURN
        return self._record(body, asked)

    def _write_file(self, claim: PreparedClaim) -> None:
        if not {one.device for one in claim.devices} <= self._memory.situation.held.keys():
            raise Refusal(f"a device of claim {claim.namespace}/{claim.name} was taken away in this moment")
        self._files.write(self._memory.situation, claim)

    def _record(self, body: Object, asked: dra.Claim) -> PreparedClaim:
        claim = admitted(self._memory.situation, self._node, body, asked.uid)
        self._memory.update(lambda now: known.claimed(now, claim))
        return claim

    def _device(self, claim: PreparedClaim, prepared: known.PreparedDevice) -> dra.Device:
        return dra.Device(
            request_names=prepared.requests,
            pool_name=self._node,
            device_name=prepared.device,
            cdi_device_ids=[cdi.device_id(claim, prepared.device)],
        )

    async def _unprepare(self, asked: dra.Claim) -> dra.NodeUnprepareResourceResponse:
        try:
            self._files.remove(asked.uid)
        except OSError as error:
            return dra.NodeUnprepareResourceResponse(error=f"the CDI file of the claim cannot be removed: {error}")
        if asked.uid in self._memory.situation.prepared:
            now = self._clock.now()
            self._memory.update(lambda here: known.unclaimed(here, asked.uid, now))
            await self._memory.saved()
        return dra.NodeUnprepareResourceResponse()


class Registration(RegistrationServicer):
    """Makes the plugin known to kubelet."""

    def __init__(self, endpoint: Path, on_registered: Callable[[], None]) -> None:
        self._endpoint = endpoint
        self._on_registered = on_registered

    async def GetInfo(  # noqa: N802  (the wire's name)
        self, request: registration.InfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration.PluginInfo:
        """Who we are, and where we serve."""
        del request, context
        return registration.PluginInfo(
            type=PLUGIN_TYPE, name=DRIVER, endpoint=str(self._endpoint), supported_versions=[SUPPORTED]
        )

    async def NotifyRegistrationStatus(  # noqa: N802  (the wire's name)
        self, request: registration.RegistrationStatus, context: grpc.aio.ServicerContext[Any, Any]
    ) -> registration.RegistrationStatusResponse:
        """Registered anew, kubelet may have removed the node's ResourceSlice meanwhile."""
        del context
        if request.plugin_registered:
            self._on_registered()
        else:
            _log.error("kubelet does not register %s: %s", DRIVER, request.error)
        return registration.RegistrationStatusResponse()


@asynccontextmanager
async def serving(
    plugin: Plugin, registrar: Registration, health: Health, settings: AgentSettings
) -> AsyncIterator[None]:
    """Serve all services on both sockets. Sockets that a killed agent left behind are replaced.

    None is left behind here: the file in kubelet's registry is what kubelet takes for a living plugin.
    """
    sockets = (settings.dra_socket, settings.registration_socket)
    server = grpc.aio.server()
    add_DRAPluginServicer_to_server(plugin, server)
    add_RegistrationServicer_to_server(registrar, server)
    add_DRAResourceHealthServicer_to_server(health, server)
    for socket in sockets:
        socket.parent.mkdir(parents=True, exist_ok=True)
        socket.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        settings.registration_socket.unlink(missing_ok=True)
        await server.stop(grace=_GRACE_SECONDS)
        settings.dra_socket.unlink(missing_ok=True)
