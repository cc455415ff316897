"""The API server's own opinion on a lease's template: a dry run of its Job, once per lease.

The schema does not inline PodSpec; the one who knows what a valid pod is says so. Holds verdicts in memory: a restart
asks again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from gpu_tenancy.controller import manifests
from gpu_tenancy.core.snapshot import LeaseFacts
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import KubeError, Rejected

_log = logging.getLogger(__name__)

FORBIDDEN: Final = {
    "nodeName": "the operator chooses the node",
    "schedulerName": "kube-scheduler binds the pods of a lease",
    "resourceClaims": "the lease's own claim is added to the pods",
    "priorityClassName": "leases are ordered by tier and age",
}
"""Fields of a template's pod spec that a lease decides itself."""
ASKED_AT_ONCE: Final = 16


class Vetting:
    """Verdicts on templates by lease UID: empty for accepted, else the sentence of the refusal."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._verdicts: dict[str, str] = {}
        self._asked = asyncio.Semaphore(ASKED_AT_ONCE)

    @property
    def verdicts(self) -> Mapping[str, str]:
        """What is known."""
        return self._verdicts

    async def check(self, leases: tuple[LeaseFacts, ...]) -> bool:
        """Ask about every template that was not asked about yet; True if a new verdict came."""
        known = {lease.uid for lease in leases}
        for uid in self._verdicts.keys() - known:
            del self._verdicts[uid]
        due = [lease for lease in leases if _undecided(lease)]
        answers = await asyncio.gather(*(self._ask(lease) for lease in due))
        return any(answers)

    async def _ask(self, lease: LeaseFacts) -> bool:
        verdict = forbidden(lease.spec.template or {})
        if not verdict:
            try:
                async with self._asked:
                    await self._client.create(resources.JOBS, manifests.job(lease, 0, ()), dry_run=True)
            except Rejected as error:
                verdict = f"The API server refuses the Job of this template: {error.message}"
            except KubeError as error:
                _log.warning("Template of %s could not be checked: %s; it is tried again.", lease.key, error)
                return False
        self._verdicts[lease.uid] = verdict
        return True


def forbidden(template: Mapping[str, Any]) -> str:
    """Why a template may not be run, as a sentence, where it sets what the lease decides; else empty."""
    spec = template.get("spec") or {}
    for field, why in FORBIDDEN.items():
        if spec.get(field):
            return f"spec.template.spec.{field} may not be set: {why}. Remove it."
    return ""


def _undecided(lease: LeaseFacts) -> bool:
    """Admitted leases were checked before; the rest wait for the API server's word."""
    unknown = lease.template is not None and lease.template.verdict is None
    return unknown and not (lease.invalid or lease.namespace_ends or lease.deleted_at)
