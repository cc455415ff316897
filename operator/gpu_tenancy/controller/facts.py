"""Kubernetes objects as the facts of them that decisions need: claims with their users, Jobs, miners. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from gpu_tenancy.api import names
from gpu_tenancy.controller import digests
from gpu_tenancy.controller.views import TERMINAL
from gpu_tenancy.core.devices import miner_pod_name
from gpu_tenancy.core.snapshot import ClaimFacts, JobFacts, LeftClaim, MinerFacts, PodRef, StartingPod


def claim_facts(claim: digests.Claim, pods: Mapping[str, digests.Pod], longest_grace: int) -> ClaimFacts:
    """A claim, with the pods that use it and have to be stopped at the end.

    `longest_grace`: seconds that such a pod may take to go.
    """
    allocation = claim.status.allocation
    results = allocation.devices.results if allocation else ()
    holder = next(
        (
            str(config.opaque.parameters.get("holder", ""))
            for config in claim.spec.devices.config
            if config.opaque and config.opaque.driver == names.DRIVER
        ),
        "",
    )
    namespace = claim.metadata.namespace
    reserved = (user for user in claim.status.reserved_for if user.resource == "pods")
    users = (_user(namespace, user, pods, longest_grace) for user in reserved)
    return ClaimFacts(
        namespace,
        claim.metadata.name,
        claim.metadata.uid,
        holder,
        devices=tuple((one.pool, one.device) for one in results if one.driver == names.DRIVER),
        users=tuple(user for user in users if user is not None),
    )


def left_claim(claim: digests.Claim, pods: Mapping[str, digests.Pod]) -> LeftClaim | None:
    """A claim that is being deleted and that no pod uses; None for any other."""
    metadata = claim.metadata
    if metadata.deletion_timestamp is None:
        return None
    for user in claim.status.reserved_for:
        pod = pods.get(f"{metadata.namespace}/{user.name}")
        if user.resource != "pods" or (pod is not None and pod.metadata.uid == user.uid):
            return None
    touched_at = _instant(metadata.annotations.get(names.ANNOTATION_TOUCHED, ""))
    return LeftClaim(metadata.namespace, metadata.name, metadata.uid, metadata.deletion_timestamp, touched_at)


def starting_pod(pod: digests.Pod, bound_at: datetime) -> StartingPod:
    """A pod that is bound and has not begun."""
    metadata = pod.metadata
    touched_at = _instant(metadata.annotations.touched_at)
    return StartingPod(metadata.namespace, metadata.name, metadata.uid, pod.spec.node_name, bound_at, touched_at)


def _instant(text: str) -> datetime | None:
    """An instant with its zone; None for what is none: anybody may write an annotation."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _user(namespace: str, user: digests.Consumer, pods: Mapping[str, digests.Pod], longest_grace: int) -> PodRef | None:
    """A pod that uses a claim and is not going already, or not soon enough: a tenant may have deleted it himself, with
    a grace as long as he likes."""
    pod = pods.get(f"{namespace}/{user.name}")
    if pod is None or pod.metadata.uid != user.uid:
        return PodRef(namespace, user.name, user.uid)
    own = pod.spec.termination_grace_period_seconds
    if pod.metadata.deletion_timestamp is not None:
        left = pod.metadata.deletion_grace_period_seconds or 0
        if left <= min(own, longest_grace):
            return None
    return PodRef(namespace, user.name, user.uid, own, _instant(pod.metadata.annotations.preempted_at))


def job_facts(job: digests.Job) -> JobFacts:
    """The Job of a placement attempt."""
    ended = next(
        (one for one in job.status.conditions if one.status == "True" and one.type in ("Complete", "Failed")), None
    )
    return JobFacts(
        name=job.metadata.name,
        uid=job.metadata.uid,
        attempt=int(job.metadata.labels[names.LABEL_ATTEMPT]),
        finished=ended.type if ended else "",
        finished_at=ended.last_transition_time if ended else None,
        message=ended.message if ended and ended.type == "Failed" else "",
        deleting=job.metadata.deletion_timestamp is not None,
    )


def miner_facts(pod: digests.Pod | None, claim: digests.Claim | None) -> MinerFacts:
    """A miner, of which the pod or the claim may be missing."""
    known = pod or claim
    if known is None:
        raise ValueError("a miner has a pod, a claim, or both")
    metadata = known.metadata
    phase = pod.status.phase if pod else ""
    going = [one.metadata.deletion_timestamp is not None for one in (pod, claim) if one is not None]
    return MinerFacts(
        name=claim.metadata.name if claim else claim_of(pod) if pod else "",
        namespace=metadata.namespace,
        pool=metadata.labels.get(names.LABEL_HOLDER, ""),
        node=claim.metadata.annotations.get(names.LABEL_NODE, "") if claim else pod.spec.node_name if pod else "",
        device=metadata.labels.get(names.LABEL_DEVICE, ""),
        pod_name=pod.metadata.name if pod else "",
        pod_uid=pod.metadata.uid if pod else "",
        claim_uid=claim.metadata.uid if claim else "",
        revision=metadata.labels.get(names.LABEL_REVISION, ""),
        running=phase == "Running" and not any(going),
        finished=phase in TERMINAL or _misallocated(claim),
        deleting=any(going),
        bereft=_belong_together(pod, claim) and len(set(going)) > 1,
    )


def _belong_together(pod: digests.Pod | None, claim: digests.Claim | None) -> bool:
    """The pod was made for this claim, and not for one of the same name before or after it: views may lag."""
    if pod is None or claim is None:
        return False
    return pod.metadata.name == miner_pod_name(claim.metadata.name, claim.metadata.uid)


def claim_of(pod: digests.Pod) -> str:
    """Name of the claim of a miner's pod."""
    return next((one.resource_claim_name for one in pod.spec.resource_claims if one.resource_claim_name), "")


def _misallocated(claim: digests.Claim | None) -> bool:
    """The claim was given a device in the moment of its withdrawal: kubelet would be refused for ever."""
    if claim is None or claim.status.allocation is None:
        return False
    own = claim.metadata.labels.get(names.LABEL_DEVICE)
    return any(one.device != own for one in claim.status.allocation.devices.results if one.driver == names.DRIVER)
