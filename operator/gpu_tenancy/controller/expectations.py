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
        self._last: dict[tuple[Resource, str, str], tuple[str, str, float]] = {}
        """The last call on a name: verb, UID, and until when it is expected to show."""
        self._held_back: float | None = None

    def begin(self, verb: str, resource: Resource, namespace: str, name: str, uid: str = "") -> bool:
        """Whether the call should be made now; if so, it is expected from now on. A delete after a create of the same
        name, or the other way round, is another call."""
        now = self._clock()
        if len(self._last) > 1000:
            self._last = {name_: call for name_, call in self._last.items() if call[2] > now}
        known_verb, known_uid, until = self._last.get((resource, namespace, name), ("", "", 0.0))
        if until > now and (known_verb, known_uid) == (verb, uid):
            self._held_back = min(until, self._held_back or until)
            return False
        self._last[resource, namespace, name] = (verb, uid, now + PATIENCE_SECONDS)
        return True

    def held_back(self) -> float | None:
        """Seconds until the first of the calls that were held back since this was last asked may be made again, should
        its effect still not show by then; None where none was."""
        until, self._held_back = self._held_back, None
        return None if until is None else max(0.0, until - self._clock())

    def forget(self, resource: Resource, namespace: str, name: str) -> None:
        """The call failed: it may be made again at once."""
        self._last.pop((resource, namespace, name), None)
