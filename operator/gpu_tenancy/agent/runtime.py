"""What the container runtime of the node says: which runtime containers get that ask for none, and whose pods it has.

Asked through CRI, the runtime's own configuration being what counts, not a file that may not be in force. A runtime
that does not answer is no error of anybody's here: nothing is known then.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio

from gpu_tenancy.agent.proto.cri_v1_pb2 import ListPodSandboxRequest, StatusRequest
from gpu_tenancy.agent.proto.cri_v1_pb2_grpc import RuntimeServiceStub

ANSWER_SECONDS: Final = 5.0
"""How long the runtime may take to answer."""


@dataclass(frozen=True, slots=True)
class DefaultRuntime:
    """The runtime of containers whose pod names no RuntimeClass."""

    name: str = ""
    """Its name in the runtime's configuration."""
    binary: str = ""
    """The program that it starts, where it names one."""


async def default_runtime(socket: Path) -> DefaultRuntime | None:
    """The default runtime; None where nobody answers on the socket, or it does not say."""
    async with _service(socket) as service:
        try:
            answer = await service.Status(StatusRequest(verbose=True), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return None
    return parsed(answer.info.get("config", ""))


async def pod_names(socket: Path) -> Mapping[str, str]:
    """namespace/name of every pod that the runtime still has, by UID; nothing where nobody answers."""
    async with _service(socket) as service:
        try:
            answer = await service.ListPodSandbox(ListPodSandboxRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return {}
    pods = (sandbox.metadata for sandbox in answer.items)
    return {pod.uid: f"{pod.namespace}/{pod.name}" for pod in pods}


@asynccontextmanager
async def _service(socket: Path) -> AsyncIterator[RuntimeServiceStub]:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        yield RuntimeServiceStub(channel)


def parsed(config: str) -> DefaultRuntime | None:
    """What containerd's configuration, as it tells it by CRI, says of the default runtime; None where nothing."""
    try:
        containerd = json.loads(config)["containerd"]
        name = str(containerd["defaultRuntimeName"])
    except (ValueError, KeyError, TypeError):
        return None
    runtime: dict[str, Any] = (containerd.get("runtimes") or {}).get(name) or {}
    options = runtime.get("options") or {}
    return DefaultRuntime(name, str(options.get("BinaryName") or runtime.get("runtimePath") or ""))
