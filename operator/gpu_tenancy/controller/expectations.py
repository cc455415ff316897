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
        self._held_back: float | None = None

    def begin(self, verb: str, resource: Resource, namespace: str, name: str) -> bool:
        """Whether the call should be made now; if so, it is expected from now on."""
        now = self._clock()
        if len(self._until) > 1000:
            self._until = {call: until for call, until in self._until.items() if until > now}
        call = (verb, resource, namespace, name)
        if (until := self._until.get(call, 0.0)) > now:
            self._held_back = min(until, self._held_back or until)
            return False
        self._until[call] = now + PATIENCE_SECONDS
        # What is deleted may be created again at once, and the other way round.
        opposite = "create" if verb == "delete" else "delete"
        self._until.pop((opposite, resource, namespace, name.partition("/")[0]), None)
        return True

    def held_back(self) -> float | None:
        """Seconds until the first of the calls that were held back since this was last asked may be made again, should
        its effect still not show by then; None where none was."""
        until, self._held_back = self._held_back, None
        return None if until is None else max(0.0, until - self._clock())

    def forget(self, verb: str, resource: Resource, namespace: str, name: str) -> None:
        """The call failed: it may be made again at once."""
        self._until.pop((verb, resource, namespace, name), None)
