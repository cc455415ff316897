"""A stand-in for the kubelets of simulated nodes: it calls the DRA plugin of a pod's node, as kubelet would.

KWOK plays nodes and pods, but no container ever starts there, so nobody would prepare the devices of a pod's claims.
This does: for every pod bound to one of its nodes it checks the claims as kubelet does, calls NodePrepareResources
until it succeeds, and NodeUnprepareResources once the last pod of a claim on that node is terminal or gone. It may
write nothing but Events and, on a control plane that holds pods until they are prepared, one annotation; it decides
nothing that kubelet would not decide.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import aiohttp
import grpc
import grpc.aio
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.api.names import DRIVER
from tests.cluster.api import Api, ApiError, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.plugins import Plugins, PluginUnavailableError

CALL_SECONDS: Final = 45.0
"""How long kubelet waits for a plugin's answer."""
RETRY_SECONDS: Final = (0.05, 2.0)
"""First and longest pause between attempts. kubelet's are longer; tests need not wait that long."""
PREPARED: Final = "gpu-tenancy.dev/prepared"
"""Annotation by which a pod's claims are known to be prepared; see hold_until_prepared."""


class PrepareError(RuntimeError):
    """The claims of a pod cannot be prepared now; kubelet would say so in an Event and try again."""


class _Camel(msgspec.Struct, frozen=True, rename="camel"):
    """Only the fields that are needed are decoded: a watch of many pods stays cheap."""


class _Metadata(_Camel, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None


class _PodClaim(_Camel, frozen=True):
    name: str
    resource_claim_name: str | None = None


class _PodSpec(_Camel, frozen=True):
    node_name: str = ""
    resource_claims: tuple[_PodClaim, ...] = ()


class _PodStatus(_Camel, frozen=True):
    phase: str = ""
    resource_claim_statuses: tuple[_PodClaim, ...] = ()


class _Pod(_Camel, frozen=True):
    metadata: _Metadata
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()

    @property
    def key(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def terminal(self) -> bool:
        return self.status.phase in ("Succeeded", "Failed")


class _PodList(_Camel, frozen=True):
    metadata: _Metadata
    items: tuple[_Pod, ...]


class _Event(_Camel, frozen=True):
    type: str
    object: msgspec.Raw


class _Status(_Camel, frozen=True):
    code: int = 0
    message: str = ""


@dataclass(slots=True)
class _Claim:
    """A claim in use on one node, as in kubelet's cache of claims."""

    message: dra.Claim
    pods: set[str] = field(default_factory=set)
    """UIDs of the pods that use it there."""
    cdi_ids: tuple[str, ...] | None = None
    """What the plugin answered; None until it has prepared the claim."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Work:
    """What is done for one pod."""

    pod: _Pod
    task: asyncio.Task[None] | None = None
    claims: set[tuple[str, str]] = field(default_factory=set)
    """(node, claim uid) of the claims that were attempted."""


class StandInKubelet:
    """The kubelets of many simulated nodes, in one event loop. An async context manager.

    Observable: `prepared`, `prepare_errors`, `unprepare_errors`, `registration_errors`.
    """

    def __init__(
        self,
        nodes: Iterable[str],
        kubeconfig: Path,
        root_for: Callable[[str], Path],
        *,
        driver: str = DRIVER,
        mark_prepared: bool = False,
        wipe_after_seconds: float = 30.0,
    ) -> None:
        """Nothing is started here.

        nodes: names of the nodes whose pods it serves.
        root_for: kubelet's root folder of a node; the plugin registers in ``plugins_registry`` below it.
        mark_prepared: annotate pods whose claims are prepared (for ControlPlane(hold_until_prepared=True)).
        wipe_after_seconds: kubelet deletes the node's ResourceSlices of a plugin that is away for so long.
        """
        self.prepare_errors: dict[str, str] = {}
        """Why the latest attempt to prepare a pod's claims failed, by ``namespace/name``; gone when one succeeds."""
        self.unprepare_errors: dict[str, str] = {}
        """Why the latest attempt to unprepare a claim failed, by ``namespace/name`` of the claim."""
        self.prepared: dict[str, tuple[str, ...]] = {}
        """CDI ids that the containers of a pod would get, by ``namespace/name``, while the pod lives."""
        self._nodes = frozenset(nodes)
        self._driver = driver
        self._mark_prepared = mark_prepared
        self._api = Api(kubeconfig)
        self._plugins = Plugins(driver, self._nodes, root_for, self._wipe_slices, wipe_after_seconds)
        self._work: dict[str, _Work] = {}
        self._claims: dict[tuple[str, str], _Claim] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashes: list[Exception] = []

    @classmethod
    def beside(cls, control_plane: ControlPlane, nodes: Iterable[str]) -> Self:
        """The kubelets of `nodes` of that control plane, with its kubelet roots and its way of holding pods."""
        return cls(
            nodes,
            control_plane.kubeconfig,
            control_plane.kubelet_root,
            mark_prepared=control_plane.hold_until_prepared,
        )

    @property
    def registration_errors(self) -> dict[str, str]:
        """Why plugins could not be registered, by node."""
        return self._plugins.errors

    async def until_registered(self, node: str, patience_seconds: float = 30.0) -> None:
        """Wait for the plugin of `node`. Raises TimeoutError with the reason."""
        await self._plugins.until_registered(node, patience_seconds)

    async def __aenter__(self) -> Self:
        await self._api.__aenter__()
        await self._plugins.__aenter__()
        self._background(self._follow_pods())
        return self

    async def __aexit__(self, *_: object) -> None:
        # As when kubelet stops: pods and prepared claims stay as they are.
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._plugins.__aexit__()
        await self._api.__aexit__(None, None, None)
        if self._crashes:
            raise ExceptionGroup("the stand-in for kubelet has an error of its own", self._crashes)

    # --- pods ----------------------------------------------------------------------------------------------------

    async def _follow_pods(self) -> None:
        bound = {"fieldSelector": "spec.nodeName!="}
        while True:
            try:
                version = await self._list_pods(bound)
                while True:  # ends by an error: a broken connection, or 410 when the version is too old
                    async for event in self._api.watch("/api/v1/pods", version, _Event, **bound):
                        version = self._take(event)
            except (aiohttp.ClientError, ApiError, TimeoutError):
                await asyncio.sleep(RETRY_SECONDS[0])

    async def _list_pods(self, selector: dict[str, str]) -> str:
        listed = msgspec.convert(await self._api.get("/api/v1/pods", **selector), _PodList)
        for pod in listed.items:
            self._observe(pod)
        for uid in self._work.keys() - {pod.metadata.uid for pod in listed.items}:
            self._release(uid)  # deleted while nobody watched
        return listed.metadata.resource_version

    def _take(self, event: _Event) -> str:
        """Handle one event; returns the resource version to resume from."""
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            raise ApiError(status.code, "Watch", status.message)
        pod = msgspec.json.decode(event.object, type=_Pod)
        match event.type:
            case "ADDED" | "MODIFIED":
                self._observe(pod)
            case "DELETED":
                self._release(pod.metadata.uid)
            case _:  # BOOKMARK: nothing but a newer version
                pass
        return pod.metadata.resource_version

    def _observe(self, pod: _Pod) -> None:
        if pod.spec.node_name not in self._nodes or not pod.spec.resource_claims:
            return
        uid = pod.metadata.uid
        if pod.terminal:
            self._release(uid)
        elif uid in self._work:
            self._update(self._work[uid], pod)
        elif pod.metadata.deletion_timestamp is None:
            work = self._work[uid] = _Work(pod)
            work.task = asyncio.create_task(self._prepare_until_done(work))
            self._track(work.task)

    def _update(self, work: _Work, pod: _Pod) -> None:
        work.pod = pod
        if pod.metadata.deletion_timestamp is not None and work.task is not None:
            work.task.cancel()  # kubelet starts no pod that is to stop

    def _release(self, uid: str) -> None:
        if work := self._work.pop(uid, None):
            self._background(self._unprepare_pod(work))

    # --- prepare -------------------------------------------------------------------------------------------------

    async def _prepare_until_done(self, work: _Work) -> None:
        async for attempt in _retrying(self._note_failure(work)):
            with attempt:
                await self._prepare(work)
        self.prepare_errors.pop(work.pod.key, None)
        claims = [self._claims[key] for key in work.claims]
        self.prepared[work.pod.key] = tuple(cdi for claim in claims for cdi in claim.cdi_ids or ())
        if self._mark_prepared:
            await self._mark(work.pod)

    async def _prepare(self, work: _Work) -> None:
        node, pod_uid = work.pod.spec.node_name, work.pod.metadata.uid
        for name in _claim_names(work.pod):
            found = await self._reserved_claim(work.pod, name)
            if found is None:
                continue
            claim = self._claims.setdefault((node, found.uid), _Claim(found))
            # Entered before the call: a claim whose preparation failed half-way must be unprepared as well.
            claim.pods.add(pod_uid)
            work.claims.add((node, found.uid))
        async with contextlib.AsyncExitStack() as locks:
            claims = [self._claims[key] for key in sorted(work.claims)]
            for claim in claims:
                await locks.enter_async_context(claim.lock)
            await self._call_prepare(node, [claim for claim in claims if claim.cdi_ids is None])

    async def _reserved_claim(self, pod: _Pod, name: str) -> dra.Claim | None:
        """The claim `name` if this driver has to prepare it for `pod`, after the checks that kubelet makes."""
        namespace = pod.metadata.namespace
        claim = await self._api.get(f"/apis/resource.k8s.io/v1/namespaces/{namespace}/resourceclaims/{name}")
        status, uid = claim.get("status", {}), claim["metadata"]["uid"]
        if "allocation" not in status:
            raise PrepareError(f"claim {name} is not allocated")
        if pod.metadata.uid not in {consumer["uid"] for consumer in status.get("reservedFor", [])}:
            raise PrepareError(f"pod {pod.key} is not allowed to use claim {name}: it is not reserved for it")
        drivers = {result["driver"] for result in status["allocation"].get("devices", {}).get("results", [])}
        return dra.Claim(namespace=namespace, uid=uid, name=name) if self._driver in drivers else None

    async def _call_prepare(self, node: str, claims: list[_Claim]) -> None:
        if not claims:
            return
        request = dra.NodePrepareResourcesRequest(claims=[claim.message for claim in claims])
        answer = await self._plugins.stub(node).NodePrepareResources(request, timeout=CALL_SECONDS)
        refusals = []
        for claim in claims:
            result = answer.claims.get(claim.message.uid)
            if result is None or result.error:
                said = result.error if result is not None else "the plugin did not answer for it"
                refusals.append(f"{claim.message.name}: {said}")
            else:
                claim.cdi_ids = tuple(cdi for device in result.devices for cdi in device.cdi_device_ids)
        if refusals:
            raise PrepareError("NodePrepareResources failed for " + "; ".join(refusals))

    def _note_failure(self, work: _Work) -> Callable[[RetryCallState], None]:
        def note(state: RetryCallState) -> None:
            message = _failure(state)
            if self.prepare_errors.get(work.pod.key) != message:
                self.prepare_errors[work.pod.key] = message
                self._background(self._say(work.pod, f"Failed to prepare dynamic resources: {message}"))

        return note

    async def _mark(self, pod: _Pod) -> None:
        body: Object = {"metadata": {"uid": pod.metadata.uid, "annotations": {PREPARED: "true"}}}
        async for attempt in _retrying(lambda _: None):
            with attempt:
                try:
                    await self._api.patch(f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}", body)
                except ApiError as error:
                    if error.code not in (404, 409, 422):  # it is gone, or another of that name is there
                        raise

    # --- unprepare -----------------------------------------------------------------------------------------------

    async def _unprepare_pod(self, work: _Work) -> None:
        if work.task is not None:
            work.task.cancel()
            await asyncio.gather(work.task, return_exceptions=True)
        self.prepare_errors.pop(work.pod.key, None)
        self.prepared.pop(work.pod.key, None)
        for key in sorted(work.claims):
            async for attempt in _retrying(self._note_unprepare_failure(self._claims[key])):
                with attempt:
                    await self._unprepare_claim(key, work.pod.metadata.uid)

    async def _unprepare_claim(self, key: tuple[str, str], pod_uid: str) -> None:
        claim = self._claims.get(key)
        if claim is None:
            return  # another pod used it since the last attempt, and the plugin has let go of it for that one
        async with claim.lock:
            claim.pods.discard(pod_uid)
            if claim.pods:
                return
            claim.cdi_ids = None  # before the call: whether it fails or not, the next pod has to prepare anew
            request = dra.NodeUnprepareResourcesRequest(claims=[claim.message])
            answer = await self._plugins.stub(key[0]).NodeUnprepareResources(request, timeout=CALL_SECONDS)
            result = answer.claims.get(key[1])
            if result is None or result.error:
                said = result.error if result is not None else "the plugin did not answer for it"
                raise PrepareError(f"NodeUnprepareResources failed for {claim.message.name}: {said}")
            self.unprepare_errors.pop(_claim_key(claim), None)
            if not claim.pods:  # nobody came for it during the call
                self._claims.pop(key, None)

    def _note_unprepare_failure(self, claim: _Claim) -> Callable[[RetryCallState], None]:
        def note(state: RetryCallState) -> None:
            self.unprepare_errors[_claim_key(claim)] = _failure(state)

        return note

    # --- the API server ------------------------------------------------------------------------------------------

    async def _wipe_slices(self, node: str) -> None:
        """As kubelet does for a plugin that stays away: its devices may not be allocated any more."""
        selector = f"spec.nodeName={node},spec.driver={self._driver}"
        path = "/apis/resource.k8s.io/v1/resourceslices"
        with contextlib.suppress(aiohttp.ClientError, ApiError):
            for found in await self._api.items(path, fieldSelector=selector):
                await self._api.delete(f"{path}/{found['metadata']['name']}")

    async def _say(self, pod: _Pod, message: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = pod.metadata
        body: Object = {
            "metadata": {"generateName": f"{metadata.name}.", "namespace": metadata.namespace},
            "type": "Warning",
            "reason": "FailedPrepareDynamicResources",
            "message": message,
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": metadata.namespace,
                "name": metadata.name,
                "uid": metadata.uid,
            },
            "source": {"component": "kubelet", "host": pod.spec.node_name},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        with contextlib.suppress(aiohttp.ClientError, ApiError):  # as for kubelet, an Event is a courtesy
            await self._api.create(f"/api/v1/namespaces/{metadata.namespace}/events", body)

    def _background(self, work: Coroutine[object, object, None]) -> None:
        self._track(asyncio.create_task(work))

    def _track(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(crash := task.exception(), Exception):
            self._crashes.append(crash)


def _retrying(note: Callable[[RetryCallState], None]) -> AsyncRetrying:
    first, longest = RETRY_SECONDS
    transient = (
        PrepareError,
        PluginUnavailableError,
        grpc.aio.AioRpcError,
        aiohttp.ClientError,
        ApiError,
        TimeoutError,
    )
    return AsyncRetrying(
        retry=retry_if_exception_type(transient),
        wait=wait_random_exponential(multiplier=first, max=longest),
        before_sleep=note,
    )


def _failure(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def _claim_key(claim: _Claim) -> str:
    return f"{claim.message.namespace}/{claim.message.name}"


def _claim_names(pod: _Pod) -> list[str]:
    """Names of the pod's ResourceClaims: its own, or those that were made from templates for it."""
    made = {one.name: one.resource_claim_name for one in pod.status.resource_claim_statuses}
    names = []
    for claim in pod.spec.resource_claims:
        if claim.resource_claim_name is not None:
            names.append(claim.resource_claim_name)
        elif claim.name not in made:
            raise PrepareError(f"the claim {claim.name} of pod {pod.key} has not been made yet")
        elif (name := made[claim.name]) is not None:  # None: no claim is needed
            names.append(name)
    return names
