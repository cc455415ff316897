"""The agent's sign of life: a coordination Lease that it renews, so that nobody plans on a node without an agent.

It says that this process runs and reaches the API server, no more; GpuNode.status says the rest.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from typing import Any

from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.home import Owner
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.api.base import format_micro_time
from gpu_tenancy.api.names import LABEL_AGENT, LABEL_NODE
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import AlreadyExists, KubeError, NotFound
from gpu_tenancy.kube.resources import COORDINATION_LEASES

_log = logging.getLogger(__name__)


def lease_name(node: str) -> str:
    """Name of the heartbeat Lease of a node's agent."""
    return f"agent-{node}"


async def beat(client: KubeClient, owner: Callable[[], Owner], clock: Clock, settings: AgentSettings) -> None:
    """Renew the Lease for ever. What fails is tried again at the next beat: the Lease outlasts several.

    `owner` is asked each time: a Node may be made anew under the agent.
    """
    pause = offset(owner().name, settings.heartbeat_seconds)
    while True:
        try:
            await renew(client, owner(), clock, settings)
        except KubeError as error:
            _log.warning("The heartbeat of node %s could not be renewed: %s", owner().name, error)
        await clock.sleep(pause)
        pause = settings.heartbeat_seconds


def offset(node: str, period: float) -> float:
    """Seconds between an agent's first beat and its second: agents that start together do not beat together."""
    return period * (zlib.crc32(node.encode()) % 1000) / 1000


async def renew(client: KubeClient, owner: Owner, clock: Clock, settings: AgentSettings) -> None:
    """Renew the Lease once; create it where it is absent. Raises KubeError."""
    spec: dict[str, Any] = {
        "holderIdentity": owner.name,
        "leaseDurationSeconds": settings.heartbeat_lease_seconds,
        "renewTime": format_micro_time(clock.now()),
    }
    name = lease_name(owner.name)
    try:
        await client.merge_patch(COORDINATION_LEASES, name, {"spec": spec}, settings.namespace)
    except NotFound:
        metadata = {
            "name": name,
            "namespace": settings.namespace,
            "labels": {LABEL_AGENT: "true", LABEL_NODE: owner.name},
            "ownerReferences": [owner.reference()],
        }
        try:
            await client.create(COORDINATION_LEASES, {"metadata": metadata, "spec": spec})
        except AlreadyExists:
            return  # somebody was faster: it lives
