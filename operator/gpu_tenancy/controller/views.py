"""The operator's live view of the cluster: our own kinds (fed by kopf) and Kubernetes' kinds (list + watch).

Also keeps the one sum that must not be recomputed for every cycle: what pods that are not ours ask of each node.
Reads only; decides nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec

from gpu_tenancy.api import names
from gpu_tenancy.controller import digests
from gpu_tenancy.core import podspec
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.snapshot import Key
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.store import ObjectStore
from gpu_tenancy.kube.watch import Reflector

TERMINAL = frozenset({"Succeeded", "Failed"})
NO_TEMPLATE = Key("", "")


def _by_name(item: digests.Node | digests.Slice | digests.Namespace) -> str:
    return item.metadata.name


def _by_key(item: digests.Pod | digests.Job | digests.Claim | digests.ClaimTemplate | digests.Heartbeat) -> str:
    return f"{item.metadata.namespace}/{item.metadata.name}"


class NodeLoads:
    """Requests of the running pods of each node, apart for each claim template that they use.

    Which of these templates belong to leases is decided when a snapshot is taken: a lease's own pods are planned with
    the lease, not counted beside it.
    """

    def __init__(self) -> None:
        self._loads: dict[str, dict[Key, Amount]] = defaultdict(dict)

    def note(self, old: digests.Pod | None, new: digests.Pod | None) -> None:
        """Take one pod's change into account."""
        for pod, sign in ((old, -1), (new, 1)):
            if pod is not None and _loads_node(pod):
                self._add(pod, sign)

    def foreign(self, node: str, leases: frozenset[Key]) -> Amount:
        """What pods of nobody's lease ask of the node."""
        total = NOTHING
        for key, amount in self._loads.get(node, {}).items():
            if key not in leases:
                total += amount
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


def _loads_node(pod: digests.Pod) -> bool:
    """Miners are not counted: they are planned, and yield."""
    ours = names.LABEL_POOL in pod.metadata.labels
    return bool(pod.spec.node_name) and pod.status.phase not in TERMINAL and not ours


class Views:
    """Everything the operator sees."""

    def __init__(self, client: KubeClient, on_change: Callable[[], None]) -> None:
        self.store = ObjectStore(on_change=on_change)
        self.loads = NodeLoads()
        held = names.LABEL_HOLDER
        self.nodes = Reflector(client, resources.NODES, digests.Node, _by_name, on_change=on_change)
        self.pods = Reflector(
            client, resources.PODS, digests.Pod, _by_key, on_change=on_change, on_item=self.loads.note
        )
        self.jobs = Reflector(client, resources.JOBS, digests.Job, _by_key, label_selector=held, on_change=on_change)
        self.claims = Reflector(
            client, resources.RESOURCE_CLAIMS, digests.Claim, _by_key, label_selector=held, on_change=on_change
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
            on_item=lambda old, new: on_change() if _agent_is_back(old, new) else None,
        )
        self.namespaces = Reflector(client, resources.NAMESPACES, digests.Namespace, _by_name, on_change=on_change)

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


def heard_until(beat: digests.Heartbeat) -> datetime | None:
    """Until when an agent's sign of life counts; None where it never gave one."""
    spec = beat.spec
    return spec.renew_time + timedelta(seconds=spec.lease_duration_seconds) if spec.renew_time else None


def _agent_is_back(old: digests.Heartbeat | None, new: digests.Heartbeat | None) -> bool:
    """A heartbeat changes a plan only where there was none for too long; for a missing one the plan wakes by itself."""
    until, beat = (heard_until(old) if old else None), (new.spec.renew_time if new else None)
    return beat is not None and (until is None or until < beat)
