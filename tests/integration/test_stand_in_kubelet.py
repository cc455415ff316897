"""The stand-in for kubelet against a real API server and a scripted DRA plugin on real sockets."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc.aio
import pytest

from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.agent.proto import pluginregistration_v1_pb2 as registration
from gpu_tenancy.agent.proto.dra_v1_pb2_grpc import DRAPluginServicer, add_DRAPluginServicer_to_server
from gpu_tenancy.agent.proto.pluginregistration_v1_pb2_grpc import (
    RegistrationServicer,
    add_RegistrationServicer_to_server,
)
from tests.cluster.api import ApiError, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.eventually import eventually
from tests.cluster.kubelet import StandInKubelet

T = TypeVar("T")
DRIVER = "gpu-tenancy.dev"
RESOURCES = "/apis/resource.k8s.io/v1"


@dataclass
class Plugin(DRAPluginServicer, RegistrationServicer):
    """A DRA plugin that notes its calls and refuses what it is told to refuse."""

    root: Path
    type: str = "DRAPlugin"
    refusal: str | None = None
    unprepare_refusal: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    """("prepare" | "unprepare", name of the claim), in order; refused ones too."""
    outcome: registration.RegistrationStatus | None = None
    _server: grpc.aio.Server | None = None

    @property
    def endpoint(self) -> Path:
        return self.root / "plugins" / DRIVER / "dra.sock"

    async def start(self) -> None:
        self.endpoint.parent.mkdir(exist_ok=True)
        self._server = grpc.aio.server()
        add_DRAPluginServicer_to_server(self, self._server)
        add_RegistrationServicer_to_server(self, self._server)
        for socket in (self.endpoint, self.root / "plugins_registry" / f"{DRIVER}-reg.sock"):
            socket.unlink(missing_ok=True)
            self._server.add_insecure_port(f"unix://{socket}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def is_refused(self) -> bool:
        return self.outcome is not None and not self.outcome.plugin_registered

    async def GetInfo(self, _request: registration.InfoRequest, _context: object) -> registration.PluginInfo:  # noqa: N802
        return registration.PluginInfo(
            type=self.type, name=DRIVER, endpoint=str(self.endpoint), supported_versions=["v1.DRAPlugin"]
        )

    async def NotifyRegistrationStatus(  # noqa: N802
        self, request: registration.RegistrationStatus, _context: object
    ) -> registration.RegistrationStatusResponse:
        self.outcome = request
        return registration.RegistrationStatusResponse()

    async def NodePrepareResources(  # noqa: N802
        self, request: dra.NodePrepareResourcesRequest, _context: object
    ) -> dra.NodePrepareResourcesResponse:
        answer = dra.NodePrepareResourcesResponse()
        for claim in request.claims:
            self.calls.append(("prepare", claim.name))
            device = dra.Device(device_name="gpu0", cdi_device_ids=[f"{DRIVER}/gpu={claim.uid}"])
            one = answer.claims[claim.uid]
            if self.refusal is not None:
                one.error = self.refusal
            else:
                one.devices.append(device)
        return answer

    async def NodeUnprepareResources(  # noqa: N802
        self, request: dra.NodeUnprepareResourcesRequest, _context: object
    ) -> dra.NodeUnprepareResourcesResponse:
        answer = dra.NodeUnprepareResourcesResponse()
        for claim in request.claims:
            self.calls.append(("unprepare", claim.name))
            answer.claims[claim.uid].error = self.unprepare_refusal or ""
        return answer


@dataclass(frozen=True)
class Shared:
    """One control plane that holds pods until they are prepared, and the event loop that it belongs to."""

    plane: ControlPlane
    runner: asyncio.Runner

    def run(self, test: Callable[["World"], Awaitable[None]], name: str) -> None:
        async def body() -> None:
            async with world(self.plane, name) as one:
                await test(one)

        self.runner.run(body())


@dataclass
class World:
    """A namespace with devices of its own, the plugin and the kubelet of one node."""

    plane: ControlPlane
    namespace: str
    node: str
    plugin: Plugin
    kubelet: StandInKubelet

    def path(self, kind: str) -> str:
        group = RESOURCES if kind.startswith("resourceclaim") else "/api/v1"
        return f"{group}/namespaces/{self.namespace}/{kind}"

    async def claim(self, name: str) -> None:
        await self.plane.api.create(self.path("resourceclaims"), claim(name, self.namespace))

    async def pod(self, name: str, claim_name: str, **annotations: str) -> None:
        await self.plane.api.create(self.path("pods"), pod(name, claim_name, annotations))

    async def delete(self, name: str) -> None:
        await self.plane.api.delete(f"{self.path('pods')}/{name}")

    async def phase(self, name: str) -> str | None:
        try:
            found: str = (await self.plane.api.get(f"{self.path('pods')}/{name}"))["status"]["phase"]
        except ApiError as error:
            if error.code != 404:
                raise
            return None
        return found

    async def until_phase(self, name: str, phase: str | None) -> None:
        async def reached() -> bool:
            return await self.phase(name) == phase

        await eventually(f"{name} to be {phase}", reached)

    async def until(self, what: str, true: Callable[[], bool]) -> None:
        async def look() -> bool:
            return true()

        await eventually(what, look)


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        plane = ControlPlane(hold_until_prepared=True)
        runner.run(plane.__aenter__())
        try:
            runner.run(plane.api.create(f"{RESOURCES}/deviceclasses", device_class()))
            yield Shared(plane, runner)
        finally:
            runner.run(plane.stop())


@asynccontextmanager
async def world(plane: ControlPlane, name: str) -> AsyncIterator[World]:
    await plane.create_namespace(name)
    await plane.fake_nodes([f"node-{name}"])
    await plane.api.create(f"{RESOURCES}/resourceslices", resource_slice(f"node-{name}", name, count=2))
    kubelet = StandInKubelet.beside(plane, [f"node-{name}"])
    plugin = Plugin(plane.kubelet_root(f"node-{name}"))
    await plugin.start()
    try:
        async with kubelet:
            yield World(plane, name, f"node-{name}", plugin, kubelet)
    finally:
        await plugin.stop()


def test_a_plugin_is_registered_and_told_so(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.kubelet.until_registered(one.node)
        assert one.plugin.outcome == registration.RegistrationStatus(plugin_registered=True)
        assert one.kubelet.registration_errors == {}

    shared.run(body, "registers")


def test_a_plugin_of_another_type_is_refused_and_told_why(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.plugin.stop()
        one.plugin.type = "CSIPlugin"
        await one.plugin.start()
        await one.until("the refusal", one.plugin.is_refused)
        assert one.plugin.outcome is not None
        assert one.node in one.kubelet.registration_errors
        assert "'CSIPlugin' is not supported" in one.plugin.outcome.error

    shared.run(body, "wrong-type")


def test_a_pod_starts_once_its_claim_is_prepared_and_its_claim_is_unprepared_once_it_is_gone(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.claim("c")
        await one.pod("p", "c")
        await one.until_phase("p", "Running")
        assert one.plugin.calls == [("prepare", "c")]
        [cdi] = one.kubelet.prepared[f"{one.namespace}/p"]
        assert cdi.startswith(f"{DRIVER}/gpu=")
        await one.delete("p")
        await one.until("the unprepare", lambda: one.plugin.calls[1:] == [("unprepare", "c")])
        assert one.kubelet.prepared == {}

    shared.run(body, "whole-life")


def test_the_claim_of_a_pod_that_has_finished_is_unprepared_while_the_pod_is_still_there(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.claim("c")
        await one.pod("p", "c", **{"gpu-tenancy.dev/run-seconds": "0.2"})
        await one.until("the unprepare", lambda: one.plugin.calls == [("prepare", "c"), ("unprepare", "c")])
        assert await one.phase("p") == "Succeeded"

    shared.run(body, "finished")


def test_a_claim_of_a_template_is_found_by_the_name_that_was_generated_for_it(shared: Shared) -> None:
    async def body(one: World) -> None:
        template = {"metadata": {"name": "t"}, "spec": {"spec": claim("", one.namespace)["spec"]}}
        await one.plane.api.create(one.path("resourceclaimtemplates"), template)
        made = pod("p", "", {})
        made["spec"]["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": "t"}]
        await one.plane.api.create(one.path("pods"), made)
        await one.until_phase("p", "Running")
        [(verb, name)] = one.plugin.calls
        assert verb == "prepare"
        assert name.startswith("p-gpu-")

    shared.run(body, "template")


def test_a_refused_pod_stays_pending_says_why_and_starts_once_it_is_no_longer_refused(shared: Shared) -> None:
    async def body(one: World) -> None:
        one.plugin.refusal = "the holder has changed"
        await one.claim("c")
        await one.pod("p", "c")
        await one.until("several attempts", lambda: len(one.plugin.calls) >= 3)
        assert await one.phase("p") == "Pending"
        assert "c: the holder has changed" in one.kubelet.prepare_errors[f"{one.namespace}/p"]

        async def events() -> list[Object]:
            found = await one.plane.api.items(one.path("events"), fieldSelector="involvedObject.name=p")
            return [event for event in found if event["reason"] == "FailedPrepareDynamicResources"]

        told = await eventually("its Event", events)
        assert all("the holder has changed" in event["message"] for event in told)
        one.plugin.refusal = None
        await one.until_phase("p", "Running")
        assert one.kubelet.prepare_errors == {}

    shared.run(body, "refused")


def test_a_refused_pod_that_is_deleted_is_unprepared_because_nobody_knows_how_far_it_came(shared: Shared) -> None:
    async def body(one: World) -> None:
        one.plugin.refusal = "no"
        await one.claim("c")
        await one.pod("p", "c")
        await one.until("an attempt", lambda: one.plugin.calls != [])
        await one.delete("p")
        await one.until("the unprepare", lambda: one.plugin.calls[-1] == ("unprepare", "c"))
        assert one.kubelet.prepare_errors == {}

    shared.run(body, "refused-deleted")


def test_a_pod_waits_for_a_plugin_that_is_away_and_starts_when_it_is_back(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.kubelet.until_registered(one.node)
        await one.plugin.stop()
        await one.claim("c")
        await one.pod("p", "c")
        await one.until("a failure", lambda: f"{one.namespace}/p" in one.kubelet.prepare_errors)
        assert await one.phase("p") == "Pending"
        await one.plugin.start()
        await one.until_phase("p", "Running")

    shared.run(body, "away")


def test_a_claim_shared_by_two_pods_is_prepared_once_and_unprepared_after_the_last(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.claim("c")
        await one.pod("p1", "c")
        await one.until_phase("p1", "Running")
        await one.pod("p2", "c")
        await one.until_phase("p2", "Running")
        await one.delete("p1")
        await one.until_phase("p1", None)
        assert one.plugin.calls == [("prepare", "c")]
        await one.delete("p2")
        await one.until("the unprepare", lambda: one.plugin.calls == [("prepare", "c"), ("unprepare", "c")])

    shared.run(body, "shared-claim")


def test_an_unprepare_that_fails_is_noted_and_repeated_until_it_succeeds(shared: Shared) -> None:
    async def body(one: World) -> None:
        await one.claim("c")
        await one.pod("p", "c")
        await one.until_phase("p", "Running")
        one.plugin.unprepare_refusal = "still in use"
        await one.delete("p")
        await one.until("repeated attempts", lambda: one.plugin.calls.count(("unprepare", "c")) >= 2)
        assert "still in use" in one.kubelet.unprepare_errors[f"{one.namespace}/c"]
        one.plugin.unprepare_refusal = None
        await one.until("its success", lambda: one.kubelet.unprepare_errors == {})

    shared.run(body, "unprepare-fails")


def test_pods_deleted_while_the_api_server_was_away_are_unprepared_afterwards() -> None:
    async def body() -> None:
        async with ControlPlane(hold_until_prepared=True) as plane:
            await plane.api.create(f"{RESOURCES}/deviceclasses", device_class())
            async with world(plane, "outage") as one:
                await one.claim("c")
                await one.pod("p", "c")
                await one.until_phase("p", "Running")
                await plane.restart_apiserver()
                await one.delete("p")
                await one.until("the unprepare", lambda: one.plugin.calls[1:] == [("unprepare", "c")])

    asyncio.run(body())


def test_the_slices_of_a_plugin_that_stays_away_are_deleted_and_those_of_others_are_not(shared: Shared) -> None:
    async def body(one: World) -> None:
        slices = f"{RESOURCES}/resourceslices"
        other = resource_slice(one.node, "other", count=1)
        other["spec"]["driver"] = other["metadata"]["name"] = "other.example.com"
        await one.plane.api.create(slices, other)
        impatient = StandInKubelet([one.node], one.plane.kubeconfig, one.plane.kubelet_root, wipe_after_seconds=0.3)
        async with impatient:
            await impatient.until_registered(one.node)
            await one.plugin.stop()

            async def drivers() -> list[str]:
                found = await one.plane.api.items(slices, fieldSelector=f"spec.nodeName={one.node}")
                return [each["spec"]["driver"] for each in found]

            async def wiped() -> bool:
                return await drivers() == ["other.example.com"]

            await eventually("the plugin's slice to go", wiped)

    shared.run(body, "wiped")


def device_class() -> Object:
    return {"metadata": {"name": DRIVER}, "spec": {"selectors": [{"cel": {"expression": "true"}}]}}


def claim(name: str, holder: str) -> Object:
    expression = f'device.attributes["{DRIVER}"].holder == "{holder}"'
    exactly = {"deviceClassName": DRIVER, "selectors": [{"cel": {"expression": expression}}]}
    return {"metadata": {"name": name}, "spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}}


def pod(name: str, claim_name: str, annotations: dict[str, str]) -> Object:
    return {
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "none", "resources": {"claims": [{"name": "gpu"}]}}],
            "resourceClaims": [{"name": "gpu", "resourceClaimName": claim_name}],
        },
    }


def resource_slice(node: str, holder: str, count: int) -> Object:
    devices = [{"name": f"gpu{index}", "attributes": {"holder": {"string": holder}}} for index in range(count)]
    return {
        "metadata": {"name": f"{node}-{holder}"},
        "spec": {
            "driver": DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    }
