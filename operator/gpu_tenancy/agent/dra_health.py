"""Tells kubelet how each device is, so that `kubectl get pod -o yaml` shows it beside the container that has it.

Kubernetes 1.36 asks for this by default, earlier ones with the feature gate ResourceHealthStatus; who does not ask
costs nothing. Says what the situation says; decides nothing. Source: KEP-4680.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc.aio

from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.proto import dra_health_v1alpha1_pb2 as health
from gpu_tenancy.agent.proto.dra_health_v1alpha1_pb2_grpc import DRAResourceHealthServicer
from gpu_tenancy.agent.situation import Held, Situation
from gpu_tenancy.agent.steps import fault
from gpu_tenancy.api.node import SlotState

REPEAT_SECONDS: Final = 10.0
"""After how long all is said again: kubelet takes what it has not heard of for 30 s for unknown."""
LOOK_SECONDS: Final = 0.5
"""How long a change may go unsaid."""
Told: TypeAlias = tuple[str, health.HealthStatus, str]
"""Name of a device, how it is, and why."""
MESSAGE_LIMIT: Final = 1024
"""Characters of a message that kubelet takes."""


class Health(DRAResourceHealthServicer):
    """Streams the health of one node's devices."""

    def __init__(self, node: str, memory: Memory, clock: Clock) -> None:
        self._node = node
        self._memory = memory
        self._clock = clock

    async def NodeWatchResources(  # noqa: N802  (the wire's name)
        self, request: health.NodeWatchResourcesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health.NodeWatchResourcesResponse]:
        """Everything at once, whenever it changes, and now and then."""
        del request, context
        said: list[Told] = []
        said_at = float("-inf")
        while True:
            now = told(self._memory.situation)
            if now != said or self._clock.monotonic() - said_at >= REPEAT_SECONDS:
                said, said_at = now, self._clock.monotonic()
                yield self._response(now)
            await self._clock.sleep(LOOK_SECONDS)

    def _response(self, devices: list[Told]) -> health.NodeWatchResourcesResponse:
        at = int(self._clock.now().timestamp())
        return health.NodeWatchResourcesResponse(
            devices=[
                health.DeviceHealth(
                    device=health.DeviceIdentifier(pool_name=self._node, device_name=device),
                    health=status,
                    last_updated_time=at,
                    message=message[:MESSAGE_LIMIT],
                )
                for device, status, message in devices
            ]
        )


def told(situation: Situation) -> list[Told]:
    """(name, health, message) of every device that a pod may have."""
    devices = (held for held in situation.held.values() if held.ready_at is not None)
    return [(held.slot.device, *_health(situation, held)) for held in sorted(devices, key=lambda one: one.slot.device)]


def _health(situation: Situation, held: Held) -> tuple[health.HealthStatus, str]:
    wrong = fault(situation, held)
    if wrong is not None:
        return health.UNHEALTHY, wrong
    if held.state is SlotState.FAILED:
        return health.UNHEALTHY, held.message
    return health.HEALTHY, ""
