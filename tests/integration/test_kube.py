"""The adapter against a real API server: what it relies on is what the server really says."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml

from gpu_tenancy.kube.client import KubeClient, Object, RequestInfo
from gpu_tenancy.kube.errors import AlreadyExists, Conflict, NotFound, Rejected, Transient
from gpu_tenancy.kube.resources import (
    COORDINATION_LEASES,
    JOBS,
    NAMESPACES,
    NODES,
    RESOURCE_CLAIMS,
    RESOURCE_SLICES,
    SECRETS,
)
from gpu_tenancy.kube.watch import Reflector
from tests.cluster.components import API_ONLY
from tests.cluster.control_plane import ControlPlane

T = TypeVar("T")
NAMESPACE = "adapter"


class World:
    """One control plane for this module, on one event loop."""

    def __init__(self, runner: asyncio.Runner, plane: ControlPlane) -> None:
        self.plane = plane
        self._runner = runner

    def run(self, test: Callable[[KubeClient], Coroutine[Any, Any, T]], user: str | None = None) -> T:
        kubeconfig = self.plane.kubeconfig if user is None else self.plane.kubeconfig_for(user)

        async def with_client() -> T:
            async with KubeClient.connect(str(kubeconfig)) as client:
                return await asyncio.wait_for(test(client), 120)

        return self._runner.run(with_client())


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with asyncio.Runner() as runner:
        plane = runner.run(ControlPlane(components=API_ONLY).__aenter__())
        try:
            runner.run(plane.api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}}))
            yield World(runner, plane)
        finally:
            runner.run(plane.stop())


def job(name: str, **container: object) -> Object:
    template = {
        "spec": {
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "example.com/train:1", **container}],
        }
    }
    return {
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"template": template},
    }


def lease(name: str, holder: str = "a") -> Object:
    return {"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {"holderIdentity": holder}}


def node_slice(name: str, device_count: int = 1, padding: int = 0) -> Object:
    """A ResourceSlice; `padding` is the length of one label-free string that makes it large."""
    devices = [
        {"name": f"gpu{index}", "attributes": {f"a{part}": {"string": "x" * 60} for part in range(30)}}
        for index in range(device_count)
    ]
    metadata: Object = {"name": name}
    if padding:
        metadata["annotations"] = {"padding": "x" * padding}
    return {
        "metadata": metadata,
        "spec": {
            "driver": "gpu-tenancy.dev",
            "pool": {"name": name, "generation": 1, "resourceSliceCount": 1},
            "nodeName": name,
            "devices": devices,
        },
    }


def test_a_json_patch_whose_generation_test_fails_is_a_conflict_and_changes_nothing(world: World) -> None:
    async def test(client: KubeClient) -> None:
        made = await client.create(JOBS, job("compared"))
        generation = made["metadata"]["generation"]

        def patch(parallelism: int) -> Awaitable[Object]:
            operations = [
                {"op": "test", "path": "/metadata/generation", "value": generation},
                {"op": "replace", "path": "/spec/parallelism", "value": parallelism},
            ]
            return client.json_patch(JOBS, "compared", operations, NAMESPACE)

        await client.merge_patch(JOBS, "compared", {"metadata": {"labels": {"a": "b"}}}, NAMESPACE)
        assert (await patch(2))["spec"]["parallelism"] == 2
        with pytest.raises(Conflict, match="/metadata/generation") as caught:
            await patch(3)
        assert caught.value.status == 422
        assert not isinstance(caught.value, AlreadyExists)
        assert (await client.get(JOBS, "compared", NAMESPACE))["spec"]["parallelism"] == 2

    world.run(test)


def test_a_json_patch_with_an_invalid_result_is_rejected_and_no_conflict(world: World) -> None:
    async def test(client: KubeClient) -> None:
        made = await client.create(JOBS, job("invalid-patch"))
        operations = [
            {"op": "test", "path": "/metadata/generation", "value": made["metadata"]["generation"]},
            {"op": "replace", "path": "/spec/parallelism", "value": -1},
        ]
        with pytest.raises(Rejected, match=r"spec\.parallelism.*must be greater than or equal to 0"):
            await client.json_patch(JOBS, "invalid-patch", operations, NAMESPACE)

    world.run(test)


def test_a_claim_with_parameters_can_be_annotated_if_it_was_sent_in_the_api_servers_own_form(world: World) -> None:
    """And only then, which is why `canonical` exists."""

    def claim(name: str) -> Object:
        opaque = {"driver": "gpu-tenancy.dev", "parameters": {"kind": "ClaimHolder", "holder": "uid"}}
        request = {"name": "gpu", "exactly": {"deviceClassName": "gpu-tenancy.dev"}}
        devices = {"requests": [request], "config": [{"requests": ["gpu"], "opaque": opaque}]}
        return {"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {"devices": devices}}

    async def test(client: KubeClient) -> None:
        note = {"metadata": {"annotations": {"a": "b"}}}
        await client.create(RESOURCE_CLAIMS, claim("plain"))
        with pytest.raises(Rejected, match="field is immutable"):
            await client.merge_patch(RESOURCE_CLAIMS, "plain", note, NAMESPACE)
        made = await client.create(RESOURCE_CLAIMS, claim("canonical"), canonical=True)
        assert made["spec"]["devices"]["config"][0]["opaque"]["parameters"] == {"kind": "ClaimHolder", "holder": "uid"}
        patched = await client.merge_patch(RESOURCE_CLAIMS, "canonical", note, NAMESPACE)
        assert patched["metadata"]["annotations"] == {"a": "b"}

    world.run(test)


def test_a_test_of_a_missing_path_is_a_conflict(world: World) -> None:
    async def test(client: KubeClient) -> None:
        await client.create(COORDINATION_LEASES, lease("no-path"))
        for path in ("/spec/leaseTransitions", "/metadata/labels/a"):
            operations = [{"op": "test", "path": path, "value": 1}]
            with pytest.raises(Conflict):
                await client.json_patch(COORDINATION_LEASES, "no-path", operations, NAMESPACE)

    world.run(test)


def test_delete_spares_an_object_of_another_uid_and_says_so(world: World) -> None:
    async def test(client: KubeClient) -> None:
        made = await client.create(COORDINATION_LEASES, lease("mine"))
        uid = made["metadata"]["uid"]
        stranger = "00000000-0000-0000-0000-000000000000"
        assert await client.delete(COORDINATION_LEASES, "mine", NAMESPACE, uid=stranger) is False
        assert (await client.get(COORDINATION_LEASES, "mine", NAMESPACE))["metadata"]["uid"] == uid
        assert await client.delete(COORDINATION_LEASES, "mine", NAMESPACE, uid=uid, grace_seconds=0) is True
        assert await client.delete(COORDINATION_LEASES, "mine", NAMESPACE, uid=uid) is False
        with pytest.raises(NotFound):
            await client.get(COORDINATION_LEASES, "mine", NAMESPACE)

    world.run(test)


def test_a_deletion_that_a_finalizer_holds_up_is_asked_for_once_and_again(world: World) -> None:
    async def test(client: KubeClient) -> None:
        body = lease("held")
        body["metadata"]["finalizers"] = ["example.com/hold"]
        uid = (await client.create(COORDINATION_LEASES, body))["metadata"]["uid"]
        assert await client.delete(COORDINATION_LEASES, "held", NAMESPACE, uid=uid) is True
        assert await client.delete(COORDINATION_LEASES, "held", NAMESPACE, uid=uid) is True
        assert "deletionTimestamp" in (await client.get(COORDINATION_LEASES, "held", NAMESPACE))["metadata"]
        with pytest.raises(AlreadyExists):
            await client.create(COORDINATION_LEASES, lease("held"))
        await client.merge_patch(COORDINATION_LEASES, "held", {"metadata": {"finalizers": None}}, NAMESPACE)
        assert await client.delete(COORDINATION_LEASES, "held", NAMESPACE, uid=uid) is False

    world.run(test)


def test_a_dry_run_of_a_bad_job_gives_the_servers_sentence_and_stores_nothing(world: World) -> None:
    async def test(client: KubeClient) -> None:
        bad = job("dry", resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1"}})
        with pytest.raises(Rejected, match=r'Job\.batch "dry" is invalid: .*must be less than or equal to cpu limit'):
            await client.create(JOBS, bad, dry_run=True)
        with pytest.raises(Rejected, match=r'unknown field "spec\.template\.spec\.containers\[0\]\.comand"'):
            await client.create(JOBS, job("dry", comand=["true"]), dry_run=True)
        good = await client.create(JOBS, job("dry"), dry_run=True)
        assert good["spec"]["backoffLimit"] == 6
        with pytest.raises(NotFound):
            await client.get(JOBS, "dry", NAMESPACE)

    world.run(test)


def test_creating_a_name_twice_is_already_exists(world: World) -> None:
    async def test(client: KubeClient) -> None:
        await client.create(COORDINATION_LEASES, lease("twice"))
        with pytest.raises(AlreadyExists, match='"twice" already exists'):
            await client.create(COORDINATION_LEASES, lease("twice"))

    world.run(test)


def test_creating_in_a_namespace_that_does_not_exist_is_not_found(world: World) -> None:
    async def test(client: KubeClient) -> None:
        body = lease("nowhere")
        body["metadata"]["namespace"] = "absent"
        with pytest.raises(NotFound, match='"absent" not found'):
            await client.create(COORDINATION_LEASES, body)

    world.run(test)


def test_server_side_apply_creates_updates_and_gives_up_what_is_left_out(world: World) -> None:
    async def test(client: KubeClient) -> None:
        body = lease("applied")
        body["metadata"]["labels"] = {"a": "1", "b": "2"}
        made = await client.apply(COORDINATION_LEASES, body, field_manager="first")
        assert made["metadata"]["managedFields"][0]["manager"] == "first"
        body["metadata"]["labels"] = {"a": "1"}
        again = await client.apply(COORDINATION_LEASES, body, field_manager="first")
        assert again["metadata"]["labels"] == {"a": "1"}
        assert (await client.apply(COORDINATION_LEASES, body, field_manager="first"))["metadata"][
            "resourceVersion"
        ] == again["metadata"]["resourceVersion"]
        with pytest.raises(Conflict, match='conflict with "first"'):
            await client.apply(COORDINATION_LEASES, lease("applied", "b"), field_manager="second", force=False)
        taken = await client.apply(COORDINATION_LEASES, lease("applied", "b"), field_manager="second")
        assert taken["spec"]["holderIdentity"] == "b"

    world.run(test)


def test_apply_and_merge_patch_reach_the_status_and_leave_the_spec(world: World) -> None:
    async def test(client: KubeClient) -> None:
        await client.create(NODES, {"metadata": {"name": "status-node"}, "spec": {"podCIDR": "10.1.0.0/24"}})
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "is well"}
        body = {"metadata": {"name": "status-node"}, "status": {"conditions": [ready]}}
        applied = await client.apply(NODES, body, field_manager="agent", subresource="status")
        assert applied["status"]["conditions"][0]["message"] == "is well"
        patch = {"spec": {"unschedulable": True}, "status": {"capacity": {"cpu": "4"}}}
        patched = await client.merge_patch(NODES, "status-node", patch, subresource="status")
        assert patched["status"]["capacity"] == {"cpu": "4"}
        assert "unschedulable" not in patched["spec"]

    world.run(test)


def test_replace_of_an_object_that_moved_on_is_a_conflict(world: World) -> None:
    async def test(client: KubeClient) -> None:
        first = await client.create(COORDINATION_LEASES, lease("replaced"))
        first["spec"]["holderIdentity"] = "b"
        second = await client.replace(COORDINATION_LEASES, first)
        assert second["spec"]["holderIdentity"] == "b"
        with pytest.raises(Conflict, match="the object has been modified") as caught:
            await client.replace(COORDINATION_LEASES, first)
        assert caught.value.status == 409

    world.run(test)


def test_lists_are_paged_selected_and_typed(world: World) -> None:
    async def test(client: KubeClient) -> None:
        requests: list[RequestInfo] = []
        client.on_request = requests.append
        for body in (lease(f"paged-{number:04}") for number in range(501)):
            body["metadata"]["labels"] = {
                "paged": "yes",
                "half": "left" if body["metadata"]["name"] < "paged-0250" else "right",
            }
            await client.create(COORDINATION_LEASES, body)
        requests.clear()
        items, version = await client.list(COORDINATION_LEASES, NAMESPACE, "paged=yes")
        assert [item["metadata"]["name"] for item in items] == [f"paged-{number:04}" for number in range(501)]
        assert {(item["apiVersion"], item["kind"]) for item in items} == {("coordination.k8s.io/v1", "Lease")}
        assert int(version) >= max(int(item["metadata"]["resourceVersion"]) for item in items)
        assert [(request.verb, request.status) for request in requests] == [("list", 200)] * 2
        left, _ = await client.list(COORDINATION_LEASES, label_selector="paged, half in (left, neither)")
        assert len(left) == 250
        one, _ = await client.list(COORDINATION_LEASES, NAMESPACE, field_selector="metadata.name=paged-0007")
        assert [item["metadata"]["name"] for item in one] == ["paged-0007"]

    world.run(test)


def test_one_without_permission_is_rejected_with_the_servers_sentence(world: World) -> None:
    async def test(client: KubeClient) -> None:
        with pytest.raises(Rejected, match='User "mallory" cannot list resource "secrets"') as caught:
            await client.list(SECRETS)
        assert (caught.value.status, caught.value.reason) == (403, "Forbidden")

    world.run(test, user="mallory")


class Slice(msgspec.Struct):
    """The part of a ResourceSlice, or of a Node, that these tests look at."""

    class Metadata(msgspec.Struct):
        name: str
        labels: dict[str, str] = {}

    metadata: Metadata


def by_name(item: Slice) -> str:
    return item.metadata.name


@asynccontextmanager
async def running(reflector: Reflector[Slice]) -> AsyncIterator[None]:
    task = asyncio.create_task(reflector.run())
    try:
        await reflector.synced()
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_view_follows_large_objects_and_ignores_what_it_does_not_decode(world: World) -> None:
    async def test(client: KubeClient) -> None:
        woken: list[None] = []
        view = Reflector(client, RESOURCE_SLICES, Slice, by_name, on_change=lambda: woken.append(None))
        await client.create(RESOURCE_SLICES, node_slice("before", 100, padding=200_000))
        async with running(view):
            assert set(view.items) == {"before"}
            await client.create(RESOURCE_SLICES, node_slice("after", 100, padding=200_000))
            await until(lambda: "after" in view.items)
            woken.clear()
            patch = {"metadata": {"annotations": {"padding": "y" * 100_000}}}
            await client.merge_patch(RESOURCE_SLICES, "after", patch)
            await client.merge_patch(RESOURCE_SLICES, "after", {"metadata": {"labels": {"seen": "yes"}}})
            await until(lambda: view.items["after"].metadata.labels == {"seen": "yes"})
            assert len(woken) == 1
            await client.delete(RESOURCE_SLICES, "after")
            await until(lambda: "after" not in view.items)
            assert view.relists == 1

    world.run(test)


def test_a_selector_lets_objects_come_and_go(world: World) -> None:
    async def test(client: KubeClient) -> None:
        view = Reflector(client, NODES, Slice, by_name, label_selector="gpu=yes")
        async with running(view):
            assert not view.items
            await client.create(NODES, {"metadata": {"name": "selected", "labels": {"gpu": "yes"}}})
            await until(lambda: set(view.items) == {"selected"})
            await client.merge_patch(NODES, "selected", {"metadata": {"labels": {"gpu": "no"}}})
            await until(lambda: not view.items)

    world.run(test)


def test_a_view_survives_a_restart_of_the_api_server_without_ghosts(world: World) -> None:
    async def test(client: KubeClient) -> None:
        await client.create(NAMESPACES, {"metadata": {"name": "restart"}})

        def body(name: str) -> Object:
            return {"metadata": {"name": name, "namespace": "restart"}, "stringData": {"a": "b"}}

        for name in ("stays", "goes"):
            await client.create(SECRETS, body(name))
        view = Reflector(client, SECRETS, Slice, by_name, field_selector="metadata.namespace=restart")
        async with running(view):
            assert set(view.items) == {"stays", "goes"}
            restart = asyncio.create_task(world.plane.restart_apiserver(pause_seconds=0.5))
            await until(lambda: view.last_error is not None)
            assert isinstance(view.last_error, Transient)
            await restart
            # The view may or may not be back by now: either way it must end up right.
            await client.delete(SECRETS, "goes", "restart")
            await client.create(SECRETS, body("comes"))
            await until(lambda: set(view.items) == {"stays", "comes"})
            assert view.last_error is None

    world.run(test)


def test_a_view_whose_place_the_server_has_forgotten_lists_again_and_holds_no_ghost(world: World) -> None:
    async def test(client: KubeClient) -> None:
        for name in ("slept-stays", "slept-goes"):
            await client.create(NODES, {"metadata": {"name": name, "labels": {"slept": "yes"}}})
        view = Reflector(client, NODES, Slice, by_name, label_selector="slept=yes")
        async with running(view):
            assert set(view.items) == {"slept-stays", "slept-goes"}
        await client.delete(NODES, "slept-goes")
        await world.plane.restart_apiserver(pause_seconds=0.1)  # it remembers nothing from before its start
        view._version = "1"
        async with running(view):
            await until(lambda: view.relists == 2)
            assert set(view.items) == {"slept-stays"}

    world.run(test)


def test_requests_in_flight_while_the_api_server_restarts_fail_as_transient_or_succeed(world: World) -> None:
    async def test(client: KubeClient) -> None:
        stop = asyncio.Event()
        surprises: list[Rejected] = []
        done = 0

        async def write(worker: int) -> None:
            nonlocal done
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    await client.create(COORDINATION_LEASES, lease(f"storm-{worker}-{number}"))
                except Transient:
                    await asyncio.sleep(0.05)
                except Rejected as error:
                    surprises.append(error)
                else:
                    done += 1

        async with asyncio.TaskGroup() as workers:
            for worker in range(8):
                workers.create_task(write(worker))
            await world.plane.restart_apiserver(pause_seconds=0.2)
            before = done
            await until(lambda: done > before + 8 or bool(surprises))
            stop.set()
        # The restarted server may say 403 for a moment, until its authorization rules are loaded.
        assert [error for error in surprises if error.status != 403] == []

    world.run(test)


def test_no_key_of_an_inline_kubeconfig_is_left_on_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    config = yaml.safe_load(world.plane.kubeconfig.read_text())
    for entry in (config["clusters"][0]["cluster"], config["users"][0]["user"]):
        for key in [key for key in entry if key in {"certificate-authority", "client-certificate", "client-key"}]:
            entry[f"{key}-data"] = b64encode(Path(entry.pop(key)).read_bytes()).decode()
    inline = tmp_path / "kubeconfig"
    inline.write_text(yaml.safe_dump(config))
    assert "client-key-data" in inline.read_text()

    async def test(client: KubeClient) -> None:
        for _ in range(2):  # a second client finds nothing left by the first either
            async with KubeClient.connect(str(inline)) as other:
                await other.get(NAMESPACES, NAMESPACE)
                assert list(temporary.iterdir()) == []
        await client.get(NAMESPACES, NAMESPACE)

    world.run(test)


def test_in_a_pod_the_service_account_signs_in_and_its_renewed_token_is_read(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = urlsplit(world.plane.url)
    token_file = tmp_path / "token"
    authority = yaml.safe_load(world.plane.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority"]
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(address.hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(address.port))
    monkeypatch.setattr("gpu_tenancy.kube.transport._SERVICE_ACCOUNT_TOKEN", token_file)
    monkeypatch.setattr("kubernetes.aio.config.incluster_config.SERVICE_TOKEN_FILENAME", str(token_file))
    monkeypatch.setattr("kubernetes.aio.config.incluster_config.SERVICE_CERT_FILENAME", authority)

    async def test(_: KubeClient) -> None:
        accounts = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
        await world.plane.api.create(accounts, {"metadata": {"name": "agent"}})
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = (await world.plane.api.create(f"{accounts}/agent/token", request))["status"]["token"]
        token_file.write_text("not-a-token")
        async with KubeClient.connect() as client:
            with pytest.raises(Transient) as caught:
                await client.list(SECRETS)
            assert caught.value.status == 401
            token_file.write_text(token)
            client._loaded_at -= 60
            with pytest.raises(Rejected, match=f'"system:serviceaccount:{NAMESPACE}:agent" cannot list'):
                await client.list(SECRETS)

    world.run(test)
