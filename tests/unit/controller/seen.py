"""Views without an API server: what a test says was delivered, as watches deliver it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from gpu_tenancy.controller.gather import Gather
from gpu_tenancy.controller.views import Views
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.resources import Resource
from gpu_tenancy.kube.watch import Reflector
from tests.unit.controller.facts import NOW, Object

OWN: Final = {resource.kind: resource for resource in resources.OWN_KINDS}


class Seen:
    """What the operator has seen so far."""

    def __init__(self) -> None:
        self.wakes = 0
        """Cycles called for."""
        self.views = Views(KubeClient.connect("/nowhere"), "gpu-tenancy-system", self._wake)
        self.gather = Gather(self.views, drain_grace_seconds=30)

    def _wake(self) -> None:
        self.wakes += 1

    def own(self, *bodies: Object, event: str = "ADDED") -> None:
        """Objects of the project's own kinds."""
        for body in bodies:
            self.views.store.put(OWN[body["kind"]], event, body)

    def show(self, resource: Resource, *bodies: Object, event: str = "ADDED") -> int:
        """Objects of Kubernetes' kinds; the cycles they call for."""
        before = self.wakes
        reflector = self._reflector(resource)
        reflector._absorb([json.dumps({"type": event, "object": body}).encode() for body in bodies])
        assert reflector.undecodable == 0
        return self.wakes - before

    def snapshot(self, verdicts: Mapping[str, str] | None = None) -> Snapshot:
        """What the planner would be given; `verdicts` by lease UID."""
        return self.gather.snapshot(NOW, verdicts or {}, {})

    def _reflector(self, resource: Resource) -> Reflector[Any]:
        return next(one for one in self.views._reflectors() if one.resource is resource)
