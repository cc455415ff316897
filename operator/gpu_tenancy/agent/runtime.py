"""What the container runtime of the node says about itself: which runtime containers get that ask for none.

Asked through CRI, the runtime's own configuration being what counts, not a file that may not be in force.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio

from gpu_tenancy.agent.proto.cri_v1_pb2 import StatusRequest
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
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        try:
            answer = await RuntimeServiceStub(channel).Status(StatusRequest(verbose=True), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError:
            return None
    return parsed(answer.info.get("config", ""))


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
