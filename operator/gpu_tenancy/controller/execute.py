"""execute: a plan's actions, turned into API calls in the order of the plan's promises.

Each action is harmless when repeated: creates have deterministic names, deletes a UID precondition, GpuNode.spec is a
compare-and-swap on its generation. A Conflict drops what depends on it, and the next cycle plans anew; a refusal by
the API server becomes a Failure of that one lease or pool; nothing here decides anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, assert_never

from gpu_tenancy.api import names
from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.lease import GpuLeaseStatus, Reason
from gpu_tenancy.controller import manifests
from gpu_tenancy.controller.expectations import Expectations
from gpu_tenancy.controller.outcome import Outcome, depends_on_undone, identity, undone
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.core.actions import (
    Action,
    Admit,
    ArchiveRecord,
    CloseRecord,
    CreateClaimTemplate,
    CreateJob,
    DeleteClaimTemplate,
    DeleteJob,
    DeletePod,
    OpenRecord,
    SetSlots,
    StartMiner,
    StopMiner,
    TouchClaim,
    TouchPod,
    Unbind,
    WarnPod,
    blame,
)
from gpu_tenancy.core.snapshot import Failure, LeaseFacts, LeftClaim, PodRef, StartingPod
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import AlreadyExists, Conflict, KubeError, NotFound, Rejected
from gpu_tenancy.kube.resources import Resource
from gpu_tenancy.kube.store import ObjectStore

_log = logging.getLogger(__name__)

STAGES: Final[tuple[tuple[type[Action], ...], ...]] = (
    (OpenRecord, CloseRecord, ArchiveRecord),
    (Admit, CreateClaimTemplate),
    (SetSlots,),
    (StopMiner, DeleteClaimTemplate, DeleteJob, DeletePod),
    (CreateJob, StartMiner, TouchClaim, TouchPod, WarnPod),
)
"""What must be done before what; the actions of one stage run together.

A claim template comes before the promise: it is harmless without devices, and where its name is taken nothing is
promised and nobody is stopped."""
LAST: Final = (Unbind,)
"""Done after the statuses are written: what is let go cannot be written to."""

WITH_PARAMETERS: Final = frozenset({resources.RESOURCE_CLAIMS, resources.RESOURCE_CLAIM_TEMPLATES})
"""Kinds that carry opaque parameters in an immutable field."""
STOPPING: Final = (DeleteClaimTemplate, DeleteJob, DeletePod)

CLOSING: Final = ("billableTo", "seconds", "reason")
"""Fields of a UsageRecord that are written when its segment ends."""
MOST_UNTOUCHABLE: Final = 10_000
"""Claims and pods that are remembered as such; after that each is tried once more."""
FIRST_RETRY: Final = timedelta(seconds=2)
LONGEST_RETRY: Final = timedelta(minutes=5)

Notify = Callable[[Resource, Object, str, str, str], None]
"""Records an Event on an object: resource, object, type, reason, message."""


class Execute:
    """The operator's hands."""

    def __init__(
        self,
        client: KubeClient,
        store: ObjectStore,
        settings: Settings,
        notify: Notify,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`notify` records Events; `alive` is called between stages: a slow API server is no dead operator."""
        self._client = client
        self._store = store
        self._settings = settings
        self._notify = notify
        self._alive = alive
        self._expected = Expectations()
        self._refusals: dict[str, tuple[int, datetime]] = {}
        self._untouchable: set[str] = set()
        """UIDs of claims and pods that the API server does not let the operator annotate."""
        self._held: dict[Hashable, datetime] = {}
        """Actions that were refused, and when each is tried again."""

    async def run(self, actions: Iterable[Action], statuses: Mapping[str, GpuLeaseStatus], now: datetime) -> Outcome:
        """Do the actions, stage by stage. `statuses`: what to write where a lease is admitted, by UID."""
        outcome = Outcome()
        waiting = list(actions)
        self._held = {one: until for one, until in self._held.items() if until > now}
        for stage in STAGES:
            due = [action for action in waiting if isinstance(action, stage)]
            await asyncio.gather(*(self._attempt(action, statuses, outcome, now) for action in due))
            self._alive()
        outcome.again = self._expected.held_back()
        return outcome

    async def finish(self, actions: Iterable[Action], outcome: Outcome, now: datetime) -> None:
        """Let go of what is settled, after its last status was written."""
        due = [action for action in actions if isinstance(action, LAST)]
        await asyncio.gather(*(self._attempt(action, {}, outcome, now) for action in due))

    async def _attempt(
        self, action: Action, statuses: Mapping[str, GpuLeaseStatus], outcome: Outcome, now: datetime
    ) -> None:
        uid, _ = blame(action)
        if depends_on_undone(action, uid, outcome):
            return
        if identity(action) in self._held:
            if not isinstance(action, STOPPING):  # nothing waits for those, and the status says that they are refused
                undone(action, uid, outcome)
            return
        try:
            await self._do(action, statuses, outcome)
        except Conflict as error:
            _log.info("%s: %s; planning anew.", type(action).__name__, error)
            outcome.conflict = True
            undone(action, uid, outcome)
        except Rejected as error:
            _log.warning("%s was refused: %s", type(action).__name__, error)
            undone(action, uid, outcome)
            self._refused(action, uid, error, outcome, now)
        except KubeError as error:
            _log.warning("%s: %s; it is tried again.", type(action).__name__, error)
            outcome.trouble = True
            undone(action, uid, outcome)
        except Exception as error:  # noqa: BLE001  (whatever one object holds, the others go on: logged, blamed, tried again)
            _log.exception("%s failed.", type(action).__name__)
            undone(action, uid, outcome)
            sentence = f"{type(action).__name__} failed in the operator itself: {error!r}; see its log."
            self._refused(action, uid, Rejected(0, "Failed", sentence), outcome, now)

    def _refused(self, action: Action, uid: str, error: Rejected, outcome: Outcome, now: datetime) -> None:
        """Blame whom the action was for; of several refusals in one cycle the first counts. The action itself is held
        until it is due again: a plan names it in every cycle."""
        blamed = action.requires if isinstance(action, SetSlots) else {uid} - {""}
        outcome.trouble |= not blamed
        for one in blamed - outcome.refused.keys():
            outcome.refused[one] = self._failure(one, error, now)
        due = (outcome.refused[one].retry_at for one in blamed)
        self._held[identity(action)] = min(due, default=now + FIRST_RETRY)

    def _failure(self, uid: str, error: Rejected, now: datetime) -> Failure:
        """Refused for good as things are: tried again ever more rarely."""
        self._refusals = {one: kept for one, kept in self._refusals.items() if now - kept[1] < 2 * LONGEST_RETRY}
        times, _ = self._refusals.get(uid, (0, now))
        self._refusals[uid] = (times + 1, now)
        pause = min(LONGEST_RETRY, FIRST_RETRY * 2 ** min(times, 10))
        reason = Reason.NAME_TAKEN if isinstance(error, NameTakenError) else Reason.API_REJECTED
        return Failure(str(reason), error.message, now + pause)

    async def _do(self, action: Action, statuses: Mapping[str, GpuLeaseStatus], outcome: Outcome) -> None:  # noqa: C901, PLR0912, PLR0915  (one case per action, nothing more)
        match action:
            case OpenRecord():
                await self._open_record(action)
            case CloseRecord():
                await self._close_record(action)
            case ArchiveRecord():
                await self._archive_record(action)
            case Admit():
                await self._admit(action, statuses)
            case SetSlots():
                await self._set_slots(action, outcome)
            case StopMiner():
                await self._stop_miner(action)
            case DeleteClaimTemplate():
                key, uid = action.lease.key, action.lease.claim_template
                await self._delete(resources.RESOURCE_CLAIM_TEMPLATES, key.namespace, key.name, uid)
            case DeleteJob():
                await self._delete(resources.JOBS, action.lease.key.namespace, action.job, action.uid)
            case DeletePod():
                await self._delete_pod(action)
            case WarnPod():
                await self._warn_pod(action)
            case CreateClaimTemplate():
                await self._create_claim_template(action.lease)
            case CreateJob():
                await self._create_job(action)
            case StartMiner():
                await self._start_miner(action)
            case TouchClaim():
                await self._touch_claim(action)
            case TouchPod():
                await self._touch_pod(action)
            case Unbind():
                await self._unbind(action.lease)
            case _:
                assert_never(action)

    # --- the ledger

    async def _open_record(self, action: OpenRecord) -> None:
        body = manifests.usage_record(action.lease.key, action.name, action.spec)
        try:
            self._store.write_through(await self._client.create(resources.USAGE_RECORDS, body))
        except AlreadyExists:
            # Written before a crash, or by a former leader: what is on record counts.
            found = await self._client.get(resources.USAGE_RECORDS, action.name, action.lease.key.namespace)
            self._store.write_through(found)
            raise

    async def _close_record(self, action: CloseRecord) -> None:
        record = action.record
        closed = record.spec.model_copy(
            update={"billable_to": action.billable_to, "seconds": action.seconds, "reason": action.reason}
        ).to_wire()
        held = self._store.get(resources.USAGE_RECORDS, record.namespace, record.name)
        if held is None:
            raise Conflict(409, "Gone", f"UsageRecord {record.name} is not known any more.")
        operations: list[Mapping[str, Any]] = [
            {"op": "test", "path": "/metadata/generation", "value": held["metadata"]["generation"]},
            *({"op": "add", "path": f"/spec/{name}", "value": closed[name]} for name in CLOSING),
        ]
        try:
            answer = await self._client.json_patch(resources.USAGE_RECORDS, record.name, operations, record.namespace)
        except Conflict:
            # Closed already, by a write whose answer was lost: what is on record counts.
            found = await self._client.get(resources.USAGE_RECORDS, record.name, record.namespace)
            self._store.write_through(found)
            raise
        self._store.write_through(answer)

    async def _archive_record(self, action: ArchiveRecord) -> None:
        record = action.record
        if record.namespace != self._settings.system_namespace:
            body = manifests.archived_record(record, self._settings.system_namespace)
            try:
                copy = await self._client.create(resources.USAGE_RECORDS, body)
            except AlreadyExists:
                copy = await self._client.get(resources.USAGE_RECORDS, record.name, self._settings.system_namespace)
            if copy["spec"] != body["spec"]:
                raise Rejected(
                    409,
                    "ArchiveDiffers",
                    f"The archived copy {self._settings.system_namespace}/{record.name} differs from UsageRecord "
                    f"{record.namespace}/{record.name}; the record is kept. Compare both and remove the wrong copy.",
                )
            self._store.write_through(copy)
        held = self._store.get(resources.USAGE_RECORDS, record.namespace, record.name)
        await self._drop_finalizer(resources.USAGE_RECORDS, held, names.FINALIZER_LEDGER)

    # --- promises

    async def _admit(self, action: Admit, statuses: Mapping[str, GpuLeaseStatus]) -> None:
        """Finalizer first: from here on nothing of the lease can vanish unbilled."""
        body = self._lease_body(action.lease)
        if not action.lease.finalized:
            finalizers = [*body["metadata"].get("finalizers", ()), names.FINALIZER_SETTLE]
            patch = {"metadata": {"finalizers": finalizers, "resourceVersion": body["metadata"]["resourceVersion"]}}
            key = action.lease.key
            body = await self._client.merge_patch(resources.GPU_LEASES, key.name, patch, key.namespace)
            self._store.write_through(body)
        await self.write_status(resources.GPU_LEASES, body, statuses[action.lease.uid].to_wire())

    async def write_status(self, resource: Resource, body: Object, status: Object) -> None:
        """Replace an object's status, if nobody changed the object since it was read. Raises Conflict otherwise."""
        answer = await self._client.replace(resource, {**body, "status": status}, subresource="status")
        self._store.write_through(answer)

    async def _set_slots(self, action: SetSlots, outcome: Outcome) -> None:
        operations: list[Mapping[str, Any]] = [
            {"op": "test", "path": "/metadata/generation", "value": action.generation},
            {"op": "replace", "path": "/spec", "value": manifests.gpu_node_spec(action)},
        ]
        try:
            answer = await self._client.json_patch(resources.GPU_NODES, action.node, operations)
        except NotFound as error:
            raise Conflict(error.status, error.reason, error.message) from error
        self._store.write_through(answer)
        outcome.promised[action.node] = action.requires

    # --- stopping

    async def _stop_miner(self, action: StopMiner) -> None:
        miner, grace = action.miner, action.grace_seconds
        if miner.pod_uid:
            await self._delete(resources.PODS, miner.namespace, miner.pod_name, miner.pod_uid, grace)
        if miner.claim_uid:
            await self._delete(resources.RESOURCE_CLAIMS, miner.namespace, miner.name, miner.claim_uid)

    async def _delete_pod(self, action: DeletePod) -> None:
        pod, longest = action.pod, self._settings.drain_grace_seconds
        grace = longest if pod.grace_seconds is None else min(pod.grace_seconds, longest)
        body = self._lease_body(action.lease)
        if await self._delete(resources.PODS, pod.namespace, pod.name, pod.uid, grace):
            self._notify(resources.GPU_LEASES, body, "Normal", "PodStopped", action.message)

    async def _delete(self, resource: Resource, namespace: str, name: str, uid: str, grace: int | None = None) -> bool:
        """Delete once; the view will show it. True where this call was the one that did it."""
        if not self._expected.begin("delete", resource, namespace, name, uid):
            return False
        try:
            return await self._client.delete(resource, name, namespace, uid=uid, grace_seconds=grace)
        except KubeError:
            self._expected.forget(resource, namespace, name)
            raise

    # --- starting

    async def _create_claim_template(self, lease: LeaseFacts) -> None:
        """With it the Service of a gang: where either name is taken, nothing has been promised yet."""
        if lease.template is not None and lease.spec.pods > 1:
            await self._create(resources.SERVICES, manifests.service(lease), lease.uid)
        await self._create(resources.RESOURCE_CLAIM_TEMPLATES, manifests.claim_template(lease), lease.uid)

    async def _create_job(self, action: CreateJob) -> None:
        lease = action.lease
        await self._create(resources.JOBS, manifests.job(lease, action.attempt, action.nodes), lease.uid)

    async def _start_miner(self, action: StartMiner) -> None:
        """The pod bears the claim's UID in its name; where the claim was made by a call whose answer is not known, its
        turn comes when the view shows the claim."""
        pool, node, claim_uid = action.pool, action.node, action.claim_uid
        if not claim_uid:
            body = manifests.miner_claim(pool, node, action.slot)
            claim_uid = await self._create(resources.RESOURCE_CLAIMS, body, pool.uid)
        if claim_uid and action.missing_pod:
            pod = manifests.miner_pod(pool, node, action.device, claim_uid)
            await self._create(resources.PODS, pod, pool.uid)

    async def _touch_claim(self, action: TouchClaim) -> None:
        """An update makes kube-controller-manager look at the claim, whatever it says."""
        claim = action.claim
        if not self._may_touch(resources.RESOURCE_CLAIMS, claim):
            return
        _log.warning(
            "Claim %s/%s was deleted at %s, no pod uses it, and it is still there: kube-controller-manager is made to "
            "look at it again.", claim.namespace, claim.name, format_time(claim.deleted_at),
        )  # fmt: skip
        await self._touch(resources.RESOURCE_CLAIMS, claim, action.at)

    async def _touch_pod(self, action: TouchPod) -> None:
        """An update makes kubelet look at the pod, whatever it says."""
        pod = action.pod
        if not self._may_touch(resources.PODS, pod):
            return
        _log.info(
            "Pod %s/%s has been bound to %s since %s and has not begun: kubelet is made to look at it again.",
            pod.namespace, pod.name, pod.node, format_time(pod.bound_at),
        )  # fmt: skip
        await self._touch(resources.PODS, pod, action.at)

    async def _warn_pod(self, action: WarnPod) -> None:
        """The pod finds the annotation in a file, if its template asks for it (downward API)."""
        pod, when = action.pod, format_time(action.at) if action.at else None
        expected = self._expected.begin(f"warn {when}", resources.PODS, pod.namespace, pod.name, pod.uid)
        if expected and pod.uid not in self._untouchable:
            await self._annotate(resources.PODS, pod, {names.ANNOTATION_PREEMPTED: when})

    def _may_touch(self, resource: Resource, one: LeftClaim | StartingPod) -> bool:
        known = one.uid in self._untouchable
        return not known and self._expected.begin("touch", resource, one.namespace, one.name, one.uid)

    async def _touch(self, resource: Resource, one: LeftClaim | StartingPod, at: datetime) -> None:
        await self._annotate(resource, one, {names.ANNOTATION_TOUCHED: format_time(at)})

    async def _annotate(
        self, resource: Resource, one: LeftClaim | StartingPod | PodRef, annotations: Mapping[str, str | None]
    ) -> None:
        """The UID is a precondition. Not to be let touch something is nobody's fault and hinders nothing."""
        metadata = {"uid": one.uid, "annotations": annotations}
        try:
            await self._client.merge_patch(resource, one.name, {"metadata": metadata}, one.namespace)
        except NotFound:
            return
        except Rejected as error:
            if len(self._untouchable) >= MOST_UNTOUCHABLE:
                self._untouchable.clear()
            self._untouchable.add(one.uid)
            _log.warning(
                "%s %s/%s cannot be touched and is left alone: %s", resource.kind, one.namespace, one.name, error
            )

    async def _create(self, resource: Resource, body: Object, holder: str) -> str:
        """Create once; its UID where this call made it. An object of that name that is ours is success; somebody else's
        is a refusal."""
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        if not self._expected.begin("create", resource, namespace, name):
            return ""
        try:
            made = await self._client.create(resource, body, canonical=resource in WITH_PARAMETERS)
            return str(made["metadata"]["uid"])
        except AlreadyExists:
            if not await self._is_ours(resource, namespace, name, holder):
                self._expected.forget(resource, namespace, name)
                raise NameTakenError(resource, namespace, name) from None
        except KubeError:
            self._expected.forget(resource, namespace, name)
            raise
        return ""

    async def _is_ours(self, resource: Resource, namespace: str, name: str, holder: str) -> bool:
        """Whether the object that has the name was made for the holder. Raises Conflict where it just went, or is about
        to: it belongs to a lease or pool that is no more."""
        try:
            found = await self._client.get(resource, name, namespace)
        except NotFound as error:
            self._expected.forget(resource, namespace, name)
            raise Conflict(error.status, error.reason, error.message) from error
        if _made_for(found, holder):
            return True
        if self._is_left_over(found):
            self._expected.forget(resource, namespace, name)
            message = f"{resource.kind} {namespace}/{name} of a former lease is still being deleted."
            raise Conflict(409, "Leaving", message)
        return False

    def _is_left_over(self, found: Object) -> bool:
        """It was made for a lease or pool that is no more: Kubernetes' garbage collector takes it away."""
        metadata = found["metadata"]
        holder = (metadata.get("labels") or {}).get(names.LABEL_HOLDER, "")
        owned = any(one.get("uid") == holder for one in metadata.get("ownerReferences") or ())
        return owned and self._store.by_uid(holder) is None

    # --- letting go

    async def _unbind(self, lease: LeaseFacts) -> None:
        await self._drop_finalizer(resources.GPU_LEASES, self._lease_body(lease), names.FINALIZER_SETTLE)

    async def _drop_finalizer(self, resource: Resource, body: Object | None, finalizer: str) -> None:
        if body is None or finalizer not in body["metadata"].get("finalizers", ()):
            return
        metadata = body["metadata"]
        left = [one for one in metadata["finalizers"] if one != finalizer]
        patch = {"metadata": {"finalizers": left, "resourceVersion": metadata["resourceVersion"]}}
        try:
            answer = await self._client.merge_patch(resource, metadata["name"], patch, metadata["namespace"])
        except NotFound:
            return
        if answer["metadata"].get("deletionTimestamp") and not left:
            self._store.put(resource, "DELETED", answer)
        else:
            self._store.write_through(answer)

    def _lease_body(self, lease: LeaseFacts) -> Object:
        body = self._store.get(resources.GPU_LEASES, lease.key.namespace, lease.key.name)
        if body is None or body["metadata"]["uid"] != lease.uid:
            raise Conflict(409, "Gone", f"GpuLease {lease.key} was deleted meanwhile.")
        return body


class NameTakenError(Rejected):
    """An object of the name that a lease needs exists and was not made for it."""

    def __init__(self, resource: Resource, namespace: str, name: str) -> None:
        super().__init__(
            409,
            "NameTaken",
            f"A {resource.kind} named {namespace}/{name} exists and was not made for this lease; "
            "delete it or give the lease another name.",
        )


def _made_for(body: Object, holder: str) -> bool:
    return bool((body["metadata"].get("labels") or {}).get(names.LABEL_HOLDER) == holder)
