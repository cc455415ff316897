"""The embedded control plane itself: it comes up, behaves like Kubernetes where the tests rely on it, and goes away.

What the other integration tests stand on is proved here, on the real programs; nothing of gpu-tenancy takes part.
"""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.cluster import detached
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.components import ALL, API_ONLY, Component
from tests.cluster.control_plane import ControlPlane, KubectlError
from tests.cluster.eventually import eventually
from tests.cluster.processes import ProgramError

T = TypeVar("T")
PODS = "/api/v1/namespaces/default/pods"
DRIVER = "gpu-tenancy.dev"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shared:
    """One control plane with two simulated nodes, and the event loop that it belongs to."""

    plane: ControlPlane
    runner: asyncio.Runner

    def run(self, test: Callable[[ControlPlane], Awaitable[T]]) -> T:
        async def body() -> T:
            return await test(self.plane)

        return self.runner.run(body())


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        plane = ControlPlane()
        runner.run(plane.__aenter__())
        try:
            runner.run(plane.fake_nodes(["n1", "n2"]))
            yield Shared(plane, runner)
        finally:
            runner.run(plane.stop())


# --- it comes up and goes away ---------------------------------------------------------------------------------------


def test_every_component_runs_and_the_server_tells_its_version(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        assert all(cp.alive(component) for component in ALL)
        assert await cp.api.ready()
        assert (await cp.api.get("/version"))["gitVersion"].startswith("v1.")
        assert "Server Version: v1." in await cp.kubectl("version")

    shared.run(body)


def test_every_port_is_on_the_loopback_address(shared: Shared) -> None:
    listening = {
        connection.laddr.ip
        for component in ALL
        for connection in psutil.Process(shared.plane.pid_of(component)).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_two_control_planes_live_side_by_side_and_do_not_know_each_other() -> None:
    async def body() -> None:
        async with ControlPlane(components=API_ONLY) as one, ControlPlane(components=API_ONLY) as other:
            await one.api.create("/api/v1/namespaces", {"metadata": {"name": "only-here"}})
            assert one.url != other.url
            with pytest.raises(ApiError, match="not found"):
                await other.api.get("/api/v1/namespaces/only-here")
            assert not other.alive(Component.SCHEDULER)

    asyncio.run(body())


def test_nothing_is_left_after_success() -> None:
    async def body() -> tuple[Path, list[psutil.Process]]:
        async with ControlPlane() as cp:
            return cp.directory, family(cp)

    directory, processes = asyncio.run(body())
    assert len(processes) == len(ALL) + 1
    assert not directory.exists()
    assert not [process for process in processes if process.is_running()]


def test_nothing_is_left_after_an_error_in_the_block() -> None:
    seen: list[Any] = []

    async def body() -> None:
        async with ControlPlane(components=API_ONLY) as cp:
            seen.extend([cp.directory, *family(cp)])
            raise LookupError("the test's own")

    with pytest.raises(LookupError, match="the test's own"):
        asyncio.run(body())
    directory, *processes = seen
    assert not directory.exists()
    assert not [process for process in processes if process.is_running()]


def test_a_kubelet_root_too_long_for_sockets_is_refused_with_the_remedy(shared: Shared) -> None:
    assert (shared.plane.kubelet_root("n1") / "plugins_registry").is_dir()
    with pytest.raises(ValueError, match="too long for unix sockets; shorten the node's name"):
        shared.plane.kubelet_root("n" * 63)


def test_a_component_that_ends_at_start_is_named_with_its_last_lines() -> None:
    children = {child.pid for child in psutil.Process().children()}

    async def body() -> None:
        wrong = {Component.APISERVER: ["--no-such-flag=1"]}
        async with ControlPlane(components=API_ONLY, extra_args=wrong):
            raise AssertionError("it may not come up")

    with pytest.raises(ProgramError, match=r"kube-apiserver ended with 1(.|\n)*unknown flag: --no-such-flag"):
        asyncio.run(body())
    assert {child.pid for child in psutil.Process().children()} <= children


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_everything_ends_with_the_process_that_started_it(end: signal.Signals) -> None:
    with starter("await asyncio.sleep(600)") as (process, directory, processes):
        process.send_signal(end)
        process.wait(60)
        _, left = psutil.wait_procs(processes, timeout=60)
        assert not left
        assert not directory.exists()


def test_the_programs_die_with_a_supervisor_that_is_killed_and_the_starter_still_cleans_up() -> None:
    async def body() -> tuple[Path, list[psutil.Process]]:
        async with ControlPlane(components=API_ONLY) as cp:
            processes = family(cp)
            psutil.Process(cp.supervisor_pid).kill()
            await asyncio.to_thread(psutil.wait_procs, processes[1:], timeout=60)
            return cp.directory, processes

    directory, processes = asyncio.run(body())
    assert not [process for process in processes if process.is_running()]
    assert not directory.exists()


def test_a_detached_control_plane_outlives_its_starter_is_found_again_and_ended(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with starter(f"await detach(cp, Path({str(state)!r}), lifetime_seconds=300)") as (process, directory, processes):
        process.wait(60)
        found = detached.find(state)
        assert found is not None
        assert found.directory == directory
        assert asyncio.run(answers(found.kubeconfig))
        assert detached.end(state)
    assert not directory.exists()
    assert not [process for process in processes if process.is_running()]
    assert not state.exists()
    assert not detached.end(state)


def test_a_detached_control_plane_ends_by_itself_after_its_lifetime(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    with starter(f"await detach(cp, Path({str(state)!r}), lifetime_seconds=0.5)") as (process, directory, processes):
        process.wait(60)
        _, left = psutil.wait_procs(processes, timeout=60)
        assert not left
        assert not directory.exists()
    assert detached.find(state) is None
    assert not state.exists()


def test_a_spawned_program_can_be_killed_and_started_again_under_its_name(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
        first = await cp.spawn("sleeper", command, {})
        await eventually("its output", lambda: value(cp.log_tail("sleeper") == "here"))
        with pytest.raises(ProgramError, match="sleeper runs already"):
            await cp.spawn("sleeper", command, {})
        await cp.kill("sleeper")
        assert not cp.alive("sleeper")
        assert await cp.spawn("sleeper", command, {}) != first
        await eventually("both outputs in one log", lambda: value(cp.log_tail("sleeper") == "here\nhere"))
        await cp.kill("sleeper")
        with pytest.raises(ProgramError, match="cannot be started"):
            await cp.spawn("nothing", ["/no/such/program"], {})

    shared.run(body)


# --- it is Kubernetes ------------------------------------------------------------------------------------------------


def test_objects_survive_a_restart_of_the_api_server_and_old_watches_are_told_to_list_again() -> None:
    async def body() -> None:
        async with ControlPlane(components=API_ONLY) as cp:
            made = await cp.api.create("/api/v1/namespaces", {"metadata": {"name": "before"}})
            await cp.api.create("/api/v1/namespaces", {"metadata": {"name": "after"}})
            url, former = cp.url, cp.pid_of(Component.APISERVER)
            await cp.restart_apiserver()
            assert (cp.url, cp.pid_of(Component.APISERVER) != former) == (url, True)
            found = await cp.api.get("/api/v1/namespaces/before")
            assert found["metadata"]["uid"] == made["metadata"]["uid"]
            version = made["metadata"]["resourceVersion"]
            events = [one async for one in cp.api.watch("/api/v1/namespaces", version, dict, timeoutSeconds="1")]
            assert [(one["type"], one["object"].get("code")) for one in events] == [("ERROR", 410)]

    asyncio.run(body())


def test_a_definition_and_its_objects_can_be_applied_at_once_in_any_order(shared: Shared, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "{apiVersion: tests.gpu-tenancy.dev/v1, kind: Probe, metadata: {name: p, namespace: default}, spec: {n: 1}}"
    )
    (tmp_path / "b.yaml").write_text(
        textwrap.dedent("""
        apiVersion: apiextensions.k8s.io/v1
        kind: CustomResourceDefinition
        metadata: {name: probes.tests.gpu-tenancy.dev}
        spec:
          group: tests.gpu-tenancy.dev
          scope: Namespaced
          names: {kind: Probe, plural: probes, singular: probe}
          versions:
            - name: v1
              served: true
              storage: true
              schema:
                openAPIV3Schema:
                  type: object
                  properties: {spec: {type: object, properties: {n: {type: integer, maximum: 3}}}}
        """)
    )

    async def body(cp: ControlPlane) -> None:
        assert len(await cp.apply_manifests([tmp_path])) == 2
        assert (await cp.kubectl("get", "probe", "p", "-o", "jsonpath={.spec.n}")) == "1"
        with pytest.raises(KubectlError, match="should be less than or equal to 3"):
            await cp.kubectl("patch", "probe", "p", "--type=merge", '--patch={"spec":{"n":4}}')

    shared.run(body)


def test_a_kubeconfig_for_somebody_else_has_no_rights_but_theirs(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        async with Api(cp.kubeconfig_for("alice", ["team-a"])) as alice:
            with pytest.raises(ApiError, match='User "alice" cannot list resource "secrets"') as refused:
                await alice.items("/api/v1/secrets")
            assert refused.value.reason == "Forbidden"

    shared.run(body)


def test_a_job_is_bound_once_a_slice_with_the_device_its_claims_select_is_published(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        await cp.create_namespace("tenant")
        await cp.api.create("/apis/resource.k8s.io/v1/deviceclasses", device_class())
        await cp.api.create(
            "/apis/resource.k8s.io/v1/namespaces/tenant/resourceclaimtemplates", claim_template("train", "lease-1")
        )
        await cp.api.create("/apis/batch/v1/namespaces/tenant/jobs", indexed_job("train", pods=2))
        for node in ("n1", "n2"):
            await cp.api.create("/apis/resource.k8s.io/v1/resourceslices", resource_slice(node, "someone-else"))

        async def unschedulable() -> bool:
            pods = await cp.api.items("/api/v1/namespaces/tenant/pods")
            reasons = [one.get("reason") for pod in pods for one in pod["status"].get("conditions", [])]
            return len(pods) == 2 and reasons == ["Unschedulable"] * 2

        await eventually("two pods that no device fits", unschedulable)
        for node in ("n1", "n2"):
            await cp.api.create("/apis/resource.k8s.io/v1/resourceslices", resource_slice(node, "lease-1"))

        async def running() -> dict[str, str] | None:
            pods = await cp.api.items("/api/v1/namespaces/tenant/pods")
            up = [pod for pod in pods if pod["status"]["phase"] == "Running"]
            return {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in up} if len(up) == 2 else None

        nodes = await eventually("two running pods", running)
        assert sorted(nodes.values()) == ["n1", "n2"]
        claims = await cp.api.items("/apis/resource.k8s.io/v1/namespaces/tenant/resourceclaims")
        results = [claim["status"]["allocation"]["devices"]["results"] for claim in claims]
        assert sorted(result["device"] for [result] in results) == ["gpu0-lease-1", "gpu0-lease-1"]

    shared.run(body)


# --- how simulated nodes and pods behave -----------------------------------------------------------------------------


def test_a_pod_runs_for_its_seconds_and_then_succeeds(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        begun = time.monotonic()
        await cp.api.create(PODS, pod("runs", {"gpu-tenancy.dev/run-seconds": "1.5"}))
        await eventually("its start", lambda: in_phase(cp, "runs", "Running"))
        done = await eventually("its success", lambda: in_phase(cp, "runs", "Succeeded"))
        assert time.monotonic() - begun >= 1.5
        [container] = done["status"]["containerStatuses"]
        assert container["state"]["terminated"]["exitCode"] == 0
        assert not container["ready"]

    shared.run(body)


def test_a_pod_whose_exit_code_is_not_zero_fails_with_it(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        annotations = {"gpu-tenancy.dev/run-seconds": "0.1", "gpu-tenancy.dev/exit-code": "3"}
        await cp.api.create(PODS, pod("fails", annotations))
        failed = await eventually("its failure", lambda: in_phase(cp, "fails", "Failed"))
        [container] = failed["status"]["containerStatuses"]
        assert container["state"]["terminated"]["exitCode"] == 3

    shared.run(body)


def test_a_change_of_a_running_pod_does_not_start_its_seconds_anew(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        await cp.api.create(PODS, pod("touched", {"gpu-tenancy.dev/run-seconds": "1.5"}))
        started = await eventually("its start", lambda: in_phase(cp, "touched", "Running"))
        due = started["metadata"]["annotations"]["gpu-tenancy.dev/finish-at"]
        await asyncio.sleep(0.5)
        touched = await cp.api.patch(f"{PODS}/touched", {"metadata": {"labels": {"touched": "yes"}}})
        assert touched["metadata"]["annotations"]["gpu-tenancy.dev/finish-at"] == due
        await eventually("its success", lambda: in_phase(cp, "touched", "Succeeded"))

    shared.run(body)


def test_a_pod_without_annotations_runs_until_it_is_deleted_and_then_stops_at_once(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        await cp.api.create(PODS, pod("plain", {}, grace_seconds=3600))
        await eventually("its start", lambda: in_phase(cp, "plain", "Running"))
        await cp.api.delete(f"{PODS}/plain")
        await eventually("its end", lambda: gone(cp, "plain"))

    shared.run(body)


@pytest.mark.parametrize(("name", "wanted", "grace", "at_least"), [("slow", "1.2", 600, 1.2), ("stuck", "600", 1, 1)])
def test_a_pod_takes_its_time_to_stop_but_no_longer_than_its_grace(
    shared: Shared, name: str, wanted: str, grace: int, at_least: float
) -> None:
    async def body(cp: ControlPlane) -> None:
        await cp.api.create(PODS, pod(name, {"gpu-tenancy.dev/stop-seconds": wanted}, grace_seconds=grace))
        await eventually("its start", lambda: in_phase(cp, name, "Running"))
        begun = time.monotonic()
        await cp.api.delete(f"{PODS}/{name}")
        await eventually("its end", lambda: gone(cp, name))
        assert time.monotonic() - begun >= at_least

    shared.run(body)


def test_a_second_delete_with_a_shorter_grace_is_honoured(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        await cp.api.create(PODS, pod("hurried", {"gpu-tenancy.dev/stop-seconds": "600"}, grace_seconds=600))
        await eventually("its start", lambda: in_phase(cp, "hurried", "Running"))
        await cp.api.delete(f"{PODS}/hurried")
        await eventually("its stopping", lambda: annotated(cp, "hurried", "gpu-tenancy.dev/stop-at"))
        await cp.api.delete(f"{PODS}/hurried", {"gracePeriodSeconds": 1})
        await eventually("its end", lambda: gone(cp, "hurried"))

    shared.run(body)


def test_a_deleted_pod_is_seen_as_failed_before_its_object_goes(shared: Shared) -> None:
    async def body(cp: ControlPlane) -> None:
        made = pod("held", {})
        made["metadata"]["finalizers"] = ["tests.gpu-tenancy.dev/hold"]
        await cp.api.create(PODS, made)
        await eventually("its start", lambda: in_phase(cp, "held", "Running"))
        await cp.api.delete(f"{PODS}/held")
        failed = await eventually("its failure", lambda: in_phase(cp, "held", "Failed"))
        assert failed["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143
        await cp.api.patch(f"{PODS}/held", {"metadata": {"finalizers": None}})
        await eventually("its end", lambda: gone(cp, "held"))

    shared.run(body)


def test_a_node_is_broken_and_healed_by_an_annotation() -> None:
    async def body() -> None:
        async with ControlPlane() as cp:
            await cp.fake_nodes(["frail"], labels={"rack": "r1"}, annotations={"note": "kept"})
            node = "/api/v1/nodes/frail"

            async def ready() -> str | None:
                conditions = (await cp.api.get(node))["status"]["conditions"]
                return next((one["status"] for one in conditions if one["type"] == "Ready"), None)

            async def is_ready(status: str) -> bool:
                return await ready() == status

            made = await cp.api.get(node)
            assert made["metadata"]["labels"]["rack"] == "r1"
            assert made["metadata"]["annotations"]["note"] == "kept"
            await cp.api.patch(node, {"metadata": {"annotations": {"gpu-tenancy.dev/broken": "yes"}}})
            await eventually("the node to break", lambda: is_ready("False"))
            await cp.api.patch(node, {"metadata": {"annotations": {"gpu-tenancy.dev/broken": None}}})
            await eventually("the node to heal", lambda: is_ready("True"))

    asyncio.run(body())


# --- objects and helpers ---------------------------------------------------------------------------------------------


def family(cp: ControlPlane) -> list[psutil.Process]:
    """The supervisor and everything below it."""
    supervisor = psutil.Process(cp.supervisor_pid)
    return [supervisor, *supervisor.children(recursive=True)]


@contextmanager
def starter(then: str) -> Iterator[tuple[subprocess.Popen[str], Path, list[psutil.Process]]]:
    """A process of its own that starts a small control plane and does `then`; with the folder and its processes."""
    script = f"""
        import asyncio, signal
        from pathlib import Path
        from tests.cluster.components import API_ONLY
        from tests.cluster.control_plane import ControlPlane
        from tests.cluster.detached import detach

        # A shell that runs the tests in the background has its jobs ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def main():
            async with ControlPlane(components=API_ONLY) as cp:
                print(cp.directory, cp.supervisor_pid, flush=True)
                {then}

        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["operator", "."])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            directory, pid = process.stdout.readline().split()
            supervisor = psutil.Process(int(pid))
            yield process, Path(directory), [supervisor, *supervisor.children(recursive=True)]
        finally:
            process.kill()


async def answers(kubeconfig: Path) -> bool:
    async with Api(kubeconfig) as api:
        return await api.ready()


async def value(of: T) -> T:
    return of


async def found_pod(cp: ControlPlane, name: str) -> Object | None:
    try:
        return await cp.api.get(f"{PODS}/{name}")
    except ApiError as error:
        if error.code != 404:
            raise
        return None


async def in_phase(cp: ControlPlane, name: str, phase: str) -> Object | None:
    found = await found_pod(cp, name)
    return found if found is not None and found["status"]["phase"] == phase else None


async def annotated(cp: ControlPlane, name: str, annotation: str) -> bool:
    found = await found_pod(cp, name)
    return found is not None and annotation in found["metadata"].get("annotations", {})


async def gone(cp: ControlPlane, name: str) -> bool:
    return await found_pod(cp, name) is None


def pod(name: str, annotations: dict[str, str], grace_seconds: int = 30) -> Object:
    return {
        "metadata": {"name": name, "annotations": annotations},
        "spec": {
            "terminationGracePeriodSeconds": grace_seconds,
            "restartPolicy": "Never",
            "containers": [{"name": "main", "image": "none"}],
        },
    }


def device_class() -> Object:
    selector = {"cel": {"expression": f'device.driver == "{DRIVER}"'}}
    return {"metadata": {"name": DRIVER}, "spec": {"selectors": [selector]}}


def claim_template(name: str, holder: str) -> Object:
    expression = f'"holder" in device.attributes["{DRIVER}"] && device.attributes["{DRIVER}"].holder == "{holder}"'
    exactly = {"deviceClassName": DRIVER, "selectors": [{"cel": {"expression": expression}}]}
    return {
        "metadata": {"name": name},
        "spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}},
    }


def resource_slice(node: str, holder: str) -> Object:
    device = {"name": f"gpu0-{holder}", "attributes": {"holder": {"string": holder}}}
    return {
        "metadata": {"name": f"{node}-{holder}"},
        "spec": {
            "driver": DRIVER,
            "nodeName": node,
            "pool": {"name": f"{node}-{holder}", "generation": 1, "resourceSliceCount": 1},
            "devices": [device],
        },
    }


def indexed_job(name: str, pods: int) -> Object:
    spec = {
        "restartPolicy": "Never",
        "containers": [{"name": "main", "image": "none", "resources": {"claims": [{"name": "gpu"}]}}],
        "resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": name}],
    }
    return {
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "template": {"spec": spec},
        },
    }
