"""The API server's own opinion on a lease's template: a dry run of its Job, once per lease.

The schema does not inline PodSpec; the one who knows what a valid pod is says so. A refusal may be a policy's, a
quota's or a webhook's, and be taken back: it is asked for again, ever more rarely. What was accepted a moment ago is
accepted for the next lease of the namespace that asks for the same: the Job itself is checked when it is made. Asking
goes on beside the cycle: a webhook that hangs delays the lease it hangs on and nobody else. Holds verdicts in memory:
a restart asks again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from gpu_tenancy.api.lease import OPERATORS_FIELDS
from gpu_tenancy.controller import manifests
from gpu_tenancy.core.snapshot import LeaseFacts
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import KubeError, Rejected

_log = logging.getLogger(__name__)

ASKED_AT_ONCE: Final = 16
FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 300.0
"""Seconds before the API server is asked again about what it forbade: doubled from the first to the longest."""
ALIKE_SECONDS: Final = 10.0
"""For how long an acceptance holds for leases that are alike."""

SOME_NODE: Final = "some-node"
"""Stands for the node of the placement: the Job that is tried is held to one, as the real one will be."""

_Likeness = tuple[str, int, str]
"""Namespace, pods and template of a lease: all that its Job is made from, but for names."""


class _Verdict(NamedTuple):
    """What the API server said about a template."""

    sentence: str | None
    """Empty for accepted; None where it could not be asked."""
    due: float = math.inf
    """Time of the clock at which it is asked again."""
    pause: float = 0.0
    """Seconds that `due` was away."""


class Vetting:
    """Verdicts on templates by lease UID: empty for accepted, else the sentence of the refusal."""

    def __init__(self, client: KubeClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._verdicts: dict[str, _Verdict] = {}
        self._asking: set[str] = set()
        self._accepted: dict[_Likeness, float] = {}
        """When the template of such a lease was accepted last."""
        self._asked = asyncio.Semaphore(ASKED_AT_ONCE)

    @property
    def verdicts(self) -> Mapping[str, str]:
        """What is known."""
        return {uid: one.sentence for uid, one in self._verdicts.items() if one.sentence is not None}

    @property
    def again(self) -> float | None:
        """Seconds until some template is to be asked about again; None where none is."""
        due = min((one.due for uid, one in self._verdicts.items() if uid not in self._asking), default=math.inf)
        return None if math.isinf(due) else max(0.0, due - self._clock())

    def due(self, leases: Iterable[LeaseFacts]) -> list[LeaseFacts]:
        """Leases whose template is to be asked about now; forgets the leases that are not among `leases` any more."""
        waiting = {lease.uid: lease for lease in leases if _unadmitted(lease)}
        for uid in self._verdicts.keys() - waiting.keys():
            del self._verdicts[uid]
        now = self._clock()
        return [
            lease
            for uid, lease in waiting.items()
            if uid not in self._asking and (uid not in self._verdicts or self._verdicts[uid].due <= now)
        ]

    async def ask(self, lease: LeaseFacts) -> bool:
        """Ask about one template; True if the verdict is not what it was."""
        former = self._verdicts.get(lease.uid)
        self._asking.add(lease.uid)
        try:
            new = self._verdicts[lease.uid] = await self._verdict(lease, former.pause if former else 0.0)
        finally:
            self._asking.discard(lease.uid)
        return new.sentence != (former.sentence if former else None)

    async def _verdict(self, lease: LeaseFacts, pause: float) -> _Verdict:
        try:
            if sentence := forbidden(lease.spec.template or {}):
                return _Verdict(sentence)
            job = manifests.job(lease, 0, (SOME_NODE,))
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            return _Verdict(f"spec.template is not a pod template: {error}.")
        pause = min(LONGEST_PAUSE, pause * 2 or FIRST_PAUSE)
        try:
            async with self._asked:
                await self._dry_run(lease, job)
        except Rejected as error:
            sentence = f"The API server refuses the Job of this template: {error.message}"
            return _Verdict(sentence, self._clock() + pause, pause)
        except KubeError as error:
            _log.warning("Template of %s could not be checked: %s; it is tried again.", lease.key, error)
            return _Verdict(None, self._clock() + pause, pause)
        return _Verdict("")

    async def _dry_run(self, lease: LeaseFacts, job: manifests.Manifest) -> None:
        """Returns if the Job is accepted, or one like it just was; raises KubeError otherwise."""
        alike, now = _likeness(lease), self._clock()
        self._accepted = {one: at for one, at in self._accepted.items() if now - at < ALIKE_SECONDS}
        if alike not in self._accepted:
            await self._client.create(resources.JOBS, job, dry_run=True)
            self._accepted[alike] = self._clock()


def _likeness(lease: LeaseFacts) -> _Likeness:
    return lease.key.namespace, lease.spec.pods, json.dumps(lease.spec.template, sort_keys=True)


def forbidden(template: Mapping[str, Any]) -> str:
    """Why a template may not be run, as a sentence, where it sets what the lease decides; else empty."""
    spec = template.get("spec") or {}
    for field, why in OPERATORS_FIELDS:
        if spec.get(field):
            return f"spec.template.spec.{field} may not be set: {why}."
    return ""


def _unadmitted(lease: LeaseFacts) -> bool:
    """It waits for the API server's word; the template of an admitted lease was accepted then."""
    waits = lease.template is not None and lease.status.admitted_at is None
    return waits and not (lease.invalid or lease.unreadable or lease.namespace_ends or lease.deleted_at)
