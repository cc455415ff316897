"""What kopf is used for: it delivers events of our own kinds, starts and stops. It decides nothing.

Only `on.event` and the life-cycle hooks are registered: no finalizers, no annotations, no PATCH of kopf's own, no
peering. See docs/adr for why.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import kopf

from gpu_tenancy.api.names import GROUP, VERSION
from gpu_tenancy.controller.cycle import Cycle
from gpu_tenancy.kube.resources import OWN_KINDS, Resource


def register(registry: kopf.OperatorRegistry, cycle: Cycle) -> None:
    """Feed the cycle's store from kopf's watches."""
    for resource in OWN_KINDS:
        _feed(registry, resource, cycle)

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:  # noqa: ANN401  (kopf's calling convention)
        _configure(settings)

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:  # noqa: ANN401
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _feed(registry: kopf.OperatorRegistry, resource: Resource, cycle: Cycle) -> None:
    @kopf.on.event(GROUP, VERSION, resource.plural, id=f"feed-{resource.plural}", registry=registry)
    async def feed(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002, ANN401  (kopf's own names)
        cycle.views.store.put(resource, type, dict(body))
        if cycle.views.store.suspect:
            cycle.dirty.set()  # what a new listing left out is gone, and no event will say so


def _configure(settings: kopf.OperatorSettings) -> None:
    settings.persistence.finalizer = f"{GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    settings.persistence.diffbase_storage = _NoEssence()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.process.ultimate_exiting_timeout = 20


class _NoEssence(kopf.DiffBaseStorage):
    """Nothing is compared: kopf would copy every object at every event to find out what differs from the last time,
    which only handlers other than `on.event` are told. That copy was a quarter of the operator's processor time."""

    def build(
        self,
        *,
        body: kopf.Body,  # noqa: ARG002  (kopf's interface)
        extra_fields: Iterable[str | tuple[str, ...] | list[str] | None] | None = None,  # noqa: ARG002
    ) -> kopf.BodyEssence:
        """Nothing of the object."""
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        """Nothing was kept."""
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Keep nothing."""
