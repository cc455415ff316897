"""Whether a claim may have the devices it was allocated: the access control of the agent, as pure functions.

The `holder` attribute only steers the scheduler; anybody who may create claims could ask for any holder. What counts
is decided here, from the claim as the API server has it and the slots as the operator wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gpu_tenancy.agent.situation import Held, PreparedClaim, PreparedDevice, Situation, claims_on, is_wanted
from gpu_tenancy.agent.steps import UNWALKED, fault, is_there, was_walked
from gpu_tenancy.api.claim import ClaimHolder
from gpu_tenancy.api.names import DRIVER
from gpu_tenancy.api.node import SlotState


class Refusal(Exception):  # noqa: N818  (not a failure: the answer)
    """The claim does not get its devices; the message is the sentence that kubelet shows in the pod's events."""


class NotYet(Refusal):
    """It does not get them now, but may in a moment."""


def admitted(situation: Situation, node: str, claim: Mapping[str, Any], uid: str) -> PreparedClaim:
    """The claim with the devices that it gets on this node. Raises Refusal.

    `claim` is the ResourceClaim as just read; `uid` the one that kubelet asks for.
    """
    metadata = claim["metadata"]
    namespace, name = metadata["namespace"], metadata["name"]
    if metadata["uid"] != uid:
        raise Refusal(f"claim {namespace}/{name} has UID {metadata['uid']}, not {uid}: it was deleted and made anew")
    results = [result for result in _results(claim) if (result["driver"], result["pool"]) == (DRIVER, node)]
    if not results:
        raise Refusal(f"claim {namespace}/{name} has no device of {DRIVER} allocated on node {node}")
    for result in results:
        _check(situation, claim, result)
    return PreparedClaim(
        uid=uid,
        namespace=namespace,
        name=name,
        devices=_devices(results),
        users=tuple(pod["name"] for pod in _pods(claim)),
        pods=tuple(pod["uid"] for pod in _pods(claim)),
    )


def _check(situation: Situation, claim: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """The one way to a device: serving, its holder's namespace, its holder's own configuration, nobody else's now."""
    namespace, name, uid = (claim["metadata"][field] for field in ("namespace", "name", "uid"))
    device = result["device"]
    held = _serving(situation, device)
    holder = held.slot.holder
    if namespace != holder.namespace:
        raise Refusal(
            f"device {device} is held by another; claim {namespace}/{name} is of another namespace than its holder"
        )
    asked = _asked_holder(claim, result["request"])
    if asked != holder.uid:
        raise Refusal(
            f"device {device} is held by {holder.kind} {holder.namespace}/{holder.name} ({holder.uid}); claim "
            f"{namespace}/{name} was made for {asked or 'nobody'}: use the ResourceClaimTemplate of the lease as it is"
        )
    if result.get("adminAccess"):
        raise Refusal(f"claim {namespace}/{name} asks for admin access to {device}; {DRIVER} offers none")
    for other in claims_on(situation, device):
        if other.uid != uid:
            raise NotYet(f"device {device} is still prepared for claim {other.namespace}/{other.name}")


def _serving(situation: Situation, device: str) -> Held:
    held = situation.held.get(device)
    if held is None:
        raise Refusal(f"device {device} does not exist on this node any more")
    if held.state is SlotState.DRAINING or not is_wanted(situation, held):
        raise Refusal(f"device {device} is being taken away from {held.slot.holder.namespace}/{held.slot.holder.name}")
    wrong = fault(situation, held)
    if held.state is not SlotState.READY or wrong is not None:
        trouble = wrong or held.message
        refusal = Refusal if wrong is not None else NotYet
        raise refusal(f"device {device} is {held.state}, not Ready" + (f": {trouble}" if trouble else ""))
    if not is_there(situation, held):
        raise NotYet(f"device {device} lost its MIG instance and is being made again")
    if not was_walked(situation, held.slot):
        raise NotYet(f"device {device} {UNWALKED}")
    return held


def _asked_holder(claim: Mapping[str, Any], request: str) -> str | None:
    """UID of the holder that the claim's own configuration names for the request; None where none or several."""
    found = {
        _holder(config["opaque"].get("parameters"))
        for config in claim["spec"].get("devices", {}).get("config", [])
        if config.get("opaque", {}).get("driver") == DRIVER and _covers(config.get("requests", []), request)
    }
    return found.pop() if len(found) == 1 else None


def _covers(requests: Sequence[str], request: str) -> bool:
    """A configuration without requests is for all; one of alternatives (`main/first`) is also named by the whole."""
    return not requests or request in requests or request.partition("/")[0] in requests


def _holder(parameters: object) -> str | None:
    try:
        return ClaimHolder.model_validate(parameters).holder
    except ValidationError:
        return None


def _results(claim: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    allocation = claim.get("status", {}).get("allocation", {})
    return list(allocation.get("devices", {}).get("results", []))


def _devices(results: Sequence[Mapping[str, Any]]) -> tuple[PreparedDevice, ...]:
    names = dict.fromkeys(result["device"] for result in results)
    return tuple(
        PreparedDevice(device=name, requests=tuple(one["request"] for one in results if one["device"] == name))
        for name in names
    )


def _pods(claim: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The pods that the claim is reserved for, each with name and UID."""
    for consumer in claim.get("status", {}).get("reservedFor", []):
        if consumer.get("resource") == "pods":
            yield consumer
