"""What the container runtime is asked, and what is known while it does not answer: against a runtime of our own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import pytest

from gpu_tenancy.agent import report
from gpu_tenancy.agent.gpus import Process
from gpu_tenancy.agent.home import Home, Reader
from gpu_tenancy.agent.host import LinuxHost
from gpu_tenancy.agent.proto import cri_v1_pb2 as pb
from gpu_tenancy.agent.proto.cri_v1_pb2_grpc import RuntimeServiceServicer, add_RuntimeServiceServicer_to_server
from gpu_tenancy.agent.runtime import DefaultRuntime, default_runtime, pod_names
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import Situation
from gpu_tenancy.api.base import ConditionStatus
from gpu_tenancy.api.node import NodeConditionType, NodeReason
from tests.unit.agent.world import EPOCH

T = TypeVar("T")
POD = "0d1e4b5c-1111-2222-3333-444455556666"
STATIC = "0d1e4b5c111122223333444455556666"


@dataclass
class Runtime(RuntimeServiceServicer):
    """A container runtime that says this of itself."""

    default: str = "runc"
    pods: Mapping[str, str] = field(default_factory=dict)
    """namespace/name by UID."""

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:  # noqa: ANN401, ARG002, N802
        """Its configuration, where it is asked for."""
        runtimes = {"runc": {}, "nvidia": {"options": {"BinaryName": "/usr/bin/nvidia-container-runtime"}}}
        config = json.dumps({"containerd": {"defaultRuntimeName": self.default, "runtimes": runtimes}})
        return pb.StatusResponse(info={"config": config} if request.verbose else {})

    async def ListPodSandbox(  # noqa: N802
        self,
        request: pb.ListPodSandboxRequest,  # noqa: ARG002
        context: Any,  # noqa: ANN401, ARG002
    ) -> pb.ListPodSandboxResponse:
        """Its pods."""
        named = ((uid, *pod.split("/")) for uid, pod in self.pods.items())
        items = [
            pb.PodSandbox(metadata=pb.PodSandboxMetadata(uid=uid, namespace=namespace, name=name))
            for uid, namespace, name in named
        ]
        return pb.ListPodSandboxResponse(items=items)


@asynccontextmanager
async def serving(socket: Path, runtime: Runtime) -> AsyncIterator[None]:
    """The runtime at its socket."""
    server = grpc.aio.server()
    add_RuntimeServiceServicer_to_server(runtime, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


class NodeClient:
    """An API server with one Node."""

    async def get(self, *_: object) -> dict[str, Any]:
        """The Node."""
        return {"metadata": {"name": "n1", "uid": "node-uid"}, "status": {}}


def reader(socket: Path | None) -> Reader:
    settings = AgentSettings(runtime_socket=socket, kubelet_root=Path("/nowhere"))
    return Reader(NodeClient(), "n1", settings)  # type: ignore[arg-type]


def verdict(here: Home) -> tuple[ConditionStatus, NodeReason, str]:
    status = report.status(Situation(), "boot", here, None, EPOCH)
    (found,) = [one for one in status.conditions if one.type is NodeConditionType.CONFLICT]
    return found.status, found.reason, found.message


def test_the_runtime_says_what_its_default_is(tmp_path: Path) -> None:
    async def story() -> DefaultRuntime | None:
        async with serving(tmp_path / "cri.sock", Runtime("nvidia")):
            return await default_runtime(tmp_path / "cri.sock")

    assert run(story()) == DefaultRuntime("nvidia", "/usr/bin/nvidia-container-runtime")


def test_a_runtime_that_never_answered_is_unknown_and_that_is_said(tmp_path: Path) -> None:
    status, reason, message = verdict(run(reader(tmp_path / "cri.sock").read()))
    assert (status, reason) == (ConditionStatus.UNKNOWN, NodeReason.RUNTIME_UNKNOWN)
    assert message.startswith(f"the container runtime on {tmp_path}/cri.sock does not say what its default runtime is")


def test_where_there_is_none_to_ask_nobody_is_unsure() -> None:
    assert verdict(run(reader(None).read()))[:2] == (ConditionStatus.FALSE, NodeReason.SOLE_OWNER)


@pytest.mark.parametrize(("default", "reason"), [("runc", NodeReason.SOLE_OWNER), ("nvidia", NodeReason.OTHER_OWNER)])
def test_what_a_runtime_said_last_counts_while_it_is_restarted(
    tmp_path: Path, default: str, reason: NodeReason
) -> None:
    async def story() -> list[Home]:
        one = reader(tmp_path / "cri.sock")
        async with serving(tmp_path / "cri.sock", Runtime(default)):
            first = await one.read()
        return [first, await one.read()]

    assert [verdict(here)[1] for here in run(story())] == [reason, reason]


def test_a_process_is_named_with_the_pod_whose_cgroup_it_is_in(tmp_path: Path) -> None:
    cgroups = {
        1: "0::/init.scope\n",
        2: f"0::/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-containerd-abc.scope\n",
        3: f"4:devices:/kubepods/besteffort/pod{STATIC}/abc\n",
    }
    for pid, text in cgroups.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(text)

    async def story() -> list[str]:
        async with serving(tmp_path / "cri.sock", Runtime(pods={POD: "team-a/train-0"})):
            host = LinuxHost(tmp_path, tmp_path / "cri.sock")
            return [one.pod for one in await host.placed([Process(pid, "python3") for pid in cgroups])]

    assert run(story()) == ["", "team-a/train-0", STATIC], "one that the runtime does not know goes by its UID"


def test_without_a_runtime_a_pod_goes_by_its_uid(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text(f"0::/kubepods/pod{POD}/abc\n")
    assert run(pod_names(tmp_path / "cri.sock")) == {}
    for socket in (tmp_path / "cri.sock", None):
        (one,) = run(LinuxHost(tmp_path, socket).placed([Process(7, "python3")]))
        assert one.pod == POD
