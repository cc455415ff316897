"""The operator's live view of the cluster: our own kinds (fed by kopf) and Kubernetes' kinds (list + watch).

Also keeps the one sum that must not be recomputed for every cycle: what pods that are not ours ask of each node.
Reads only; decides nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from gpu_tenancy.api import names
from gpu_tenancy.controller import digests
from gpu_tenancy.core import podspec
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.snapshot import Key
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.store import ObjectStore
from gpu_tenancy.kube.watch import Reflector, Watched

TERMINAL = frozenset({"Succeeded", "Failed"})
NO_TEMPLATE = Key("", "")


def _by_name(item: digests.Node | digests.Slice | digests.Namespace) -> str:
    return item.metadata.name


def _by_key(item: digests.Pod | digests.Job | digests.Claim | digests.ClaimTemplate | digests.Heartbeat) -> str:
    return f"{item.metadata.namespace}/{item.metadata.name}"


class NodeLoads:
    """Requests of the running pods of each node, apart for each claim template that they use.

    Which of these templates belong to leases is decided when a snapshot is taken: a lease's own pods are planned with
    the lease, and only what they ask beyond that counts beside it.
    """

    def __init__(self) -> None:
        self._loads: dict[str, dict[Key, Amount]] = defaultdict(dict)

    def note(self, old: digests.Pod | None, new: digests.Pod | None) -> None:
        """Take one pod's change into account."""
        for pod, sign in ((old, -1), (new, 1)):
            if pod is not None and _loads_node(pod):
                self._add(pod, sign)

    def foreign(self, node: str, leases: frozenset[Key], planned: Mapping[Key, Amount]) -> Amount:
        """What pods ask of the node that no lease on it is planned with. `planned`: what the pods of its leases are."""
        total = NOTHING
        for key, amount in self._loads.get(node, {}).items():
            if key not in leases:
                total += amount
            elif key in planned:
                total += amount.beyond(planned[key])
        return total

    def _add(self, pod: digests.Pod, sign: int) -> None:
        loads = self._loads[pod.spec.node_name]
        used = [claim.resource_claim_template_name for claim in pod.spec.resource_claims]
        template = next((name for name in used if name), "")
        key = Key(pod.metadata.namespace, template) if template else NO_TEMPLATE
        asked = podspec.requests(msgspec.to_builtins(pod.spec))
        total = loads.get(key, NOTHING)
        total = total + asked if sign > 0 else total - asked
        if total == NOTHING:
            loads.pop(key, None)
        else:
            loads[key] = total


def is_miners(metadata: digests.Meta | digests.PodMeta) -> bool:
    """Made by the operator for a pool. Anybody may set a label: the owner must be the pool that the label names."""
    return names.LABEL_POOL in metadata.labels and is_owned(metadata)


def is_owned(metadata: digests.Meta | digests.PodMeta) -> bool:
    """Its owner is the lease or pool whose UID its label carries."""
    holder = metadata.labels.get(names.LABEL_HOLDER)
    return any(owner.uid == holder for owner in metadata.owner_references)


def _loads_node(pod: digests.Pod) -> bool:
    """Miners are not counted: they are planned, and yield."""
    return bool(pod.spec.node_name) and pod.status.phase not in TERMINAL and not is_miners(pod.metadata)


def _wants_ours(claim: digests.Claim) -> bool:
    """It names our driver or was given a device of it; whoever wrote it, with whatever labels."""
    allocation = claim.status.allocation
    given = allocation.devices.results if allocation else ()
    asked = (config.opaque for config in claim.spec.devices.config if config.opaque)
    drivers = [*(one.driver for one in asked), *(one.driver for one in given)]
    return names.DRIVER in drivers


class Starting:
    """Pods with claims that are bound and have not begun to run, and since when they were seen so, on the operator's
    own clock: the time at which kube-scheduler bound a pod is among its conditions, whose every change would wake us.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._since: dict[str, tuple[digests.Pod, datetime]] = {}

    def note(self, old: digests.Pod | None, new: digests.Pod | None) -> None:
        """Take one pod's change into account."""
        _, since = self._since.pop(old.metadata.uid, (old, None)) if old is not None else (None, None)
        if new is not None and _has_not_begun(new):
            same = old is not None and old.metadata.uid == new.metadata.uid
            self._since[new.metadata.uid] = new, (since if same else None) or self._clock()

    def pods(self) -> Iterable[tuple[digests.Pod, datetime]]:
        """The pods, and since when they are bound."""
        return self._since.values()


def _has_not_begun(pod: digests.Pod) -> bool:
    """It is bound, its claims have to be prepared, and kubelet has not told of a sandbox yet. (A pod of the host's
    network has the host's address at once: it counts as begun.)"""
    status, bound = pod.status, bool(pod.spec.node_name and pod.spec.resource_claims)
    return bound and status.phase == "Pending" and not status.pod_ip and pod.metadata.deletion_timestamp is None


class Pulse:
    """Until when each agent counts as alive, on the operator's own clock.

    A node's clock is not believed: a heartbeat counts from when it was seen to change, as in leader election of
    Kubernetes' own components. One that is seen for the first time counts from when it says it was made.
    """

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._until: dict[str, datetime] = {}

    def until(self, node: str) -> datetime | None:
        """Until when the agent of a node counts as alive; None where none was ever heard."""
        return self._until.get(node)

    def note(self, old: digests.Heartbeat | None, new: digests.Heartbeat | None) -> bool:
        """Take a heartbeat in; whether an agent is back that had been given up."""
        if new is None or new.spec.renew_time is None:
            return False  # a heartbeat that somebody deletes says nothing: what was heard counts until it runs out
        now = self._clock()
        seen = now if old is not None else min(now, new.spec.renew_time)
        former = self._until.get(_node_of(new))
        self._until[_node_of(new)] = seen + timedelta(seconds=min(new.spec.lease_duration_seconds, LONGEST_PATIENCE))
        return former is None or former < now


LONGEST_PATIENCE: Final = 3600
"""Seconds that a heartbeat counts at most, whatever it says."""


def _node_of(beat: digests.Heartbeat) -> str:
    return beat.metadata.labels.get(names.LABEL_NODE, "")


class Views:
    """Everything the operator sees."""

    def __init__(self, client: Watched, system_namespace: str, on_change: Callable[[], None]) -> None:
        self.store = ObjectStore(on_change=on_change)
        self.loads = NodeLoads()
        self.starting = Starting()
        self.pulse = Pulse()
        held = names.LABEL_HOLDER
        self.nodes = Reflector(client, resources.NODES, digests.Node, _by_name, on_change=on_change)
        self.pods = Reflector(client, resources.PODS, digests.Pod, _by_key, on_change=on_change, on_item=self._note_pod)
        self.jobs = Reflector(client, resources.JOBS, digests.Job, _by_key, label_selector=held, on_change=on_change)
        self.claims = Reflector(
            client, resources.RESOURCE_CLAIMS, digests.Claim, _by_key, keep=_wants_ours, on_change=on_change
        )
        self.claim_templates = Reflector(
            client,
            resources.RESOURCE_CLAIM_TEMPLATES,
            digests.ClaimTemplate,
            _by_key,
            label_selector=held,
            on_change=on_change,
        )
        self.slices = Reflector(
            client,
            resources.RESOURCE_SLICES,
            digests.Slice,
            _by_name,
            field_selector=f"spec.driver={names.DRIVER}",
            on_change=on_change,
        )
        self.heartbeats = Reflector(
            client,
            resources.COORDINATION_LEASES,
            digests.Heartbeat,
            _by_key,
            label_selector=f"{names.LABEL_AGENT}=true",
            keep=lambda beat: beat.metadata.namespace == system_namespace,
            on_item=lambda old, new: on_change() if self.pulse.note(old, new) else None,
        )
        self.namespaces = Reflector(client, resources.NAMESPACES, digests.Namespace, _by_name, on_change=on_change)

    def _note_pod(self, old: digests.Pod | None, new: digests.Pod | None) -> None:
        self.loads.note(old, new)
        self.starting.note(old, new)

    async def run(self) -> None:
        """Keep every view in step until cancelled."""
        async with asyncio.TaskGroup() as group:
            for reflector in self._reflectors():
                group.create_task(reflector.run())

    async def synced(self) -> None:
        """Wait until every view is complete once."""
        for reflector in self._reflectors():
            await reflector.synced()

    def trouble(self) -> str:
        """Why some view is not being kept up, or empty."""
        errors = ((one.resource.plural, one.last_error) for one in self._reflectors())
        return next((f"{plural}: {error}" for plural, error in errors if error is not None), "")

    def _reflectors(self) -> tuple[_AnyReflector, ...]:
        return (
            self.nodes, self.pods, self.jobs, self.claims,
            self.claim_templates, self.slices, self.heartbeats, self.namespaces,
        )  # fmt: skip


_AnyReflector = (
    Reflector[digests.Node] | Reflector[digests.Pod] | Reflector[digests.Job] | Reflector[digests.Claim]
    | Reflector[digests.ClaimTemplate] | Reflector[digests.Slice] | Reflector[digests.Heartbeat]
    | Reflector[digests.Namespace]
)  # fmt: skip
