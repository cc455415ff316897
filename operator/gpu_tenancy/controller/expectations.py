"""Read-your-writes for kinds that are only watched: a create or delete that the view does not show yet is not repeated.

Forgets by itself after a few seconds, so that what somebody else undid is done again. In memory only: after a crash
the worst is one call too many, answered by AlreadyExists or by a UID precondition.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from gpu_tenancy.kube.resources import Resource

PATIENCE_SECONDS: Final = 5.0


class Expectations:
    """Calls that were made and whose effect the watch has yet to show."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[tuple[str, Resource, str, str], float] = {}

    def begin(self, verb: str, resource: Resource, namespace: str, name: str) -> float:
        """0 where the call should be made now: it is expected from now on. Else the seconds until it may be made again,
        if its effect has not shown by then."""
        now = self._clock()
        if len(self._until) > 1000:
            self._until = {call: until for call, until in self._until.items() if until > now}
        call = (verb, resource, namespace, name)
        if (left := self._until.get(call, 0.0) - now) > 0:
            return left
        self._until[call] = now + PATIENCE_SECONDS
        if verb == "delete":
            # What is deleted may be created again at once.
            self._until.pop(("create", resource, namespace, name.partition("/")[0]), None)
        return 0.0

    def forget(self, verb: str, resource: Resource, namespace: str, name: str) -> None:
        """The call failed: it may be made again at once."""
        self._until.pop((verb, resource, namespace, name), None)
