"""The operator's view of the project's own kinds, fed by a stream of events that may lie by omission.

The framework that delivers the events re-lists after a broken watch, reports what exists then and never what vanished
meanwhile, and delivers each object's events in a queue of its own. The store is right all the same: what it holds is
never older than what it has seen, what was deleted stays deleted, and a doubtful kind is listed here. It decides
nothing about the objects and reads the API server only in `resync`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from gpu_tenancy.kube.client import Object, Objects
from gpu_tenancy.kube.errors import KubeError
from gpu_tenancy.kube.resources import OWN_KINDS, Resource

_TOMBSTONES: Final = 10_000
"""Deleted UIDs remembered per kind (about 1 MB): far more than events can be under way for."""


class Lister(Protocol):
    """The part of KubeClient that a store needs."""

    async def list(self, res: Resource) -> tuple[Objects, str]:
        """All objects of a kind in all namespaces, and the resourceVersion at which that was so."""


def _nobody() -> None:
    """Nobody is to be told of changes."""


class ObjectStore:
    """Objects by kind, as plain dicts without `metadata.managedFields`. Read them; do not change them.

    Await `resync(client, everything=True)` once before the first decision: only then is the view complete. After
    that, `put` every event, and await `resync(client)` once per cycle: it costs nothing while no kind is `suspect`.
    An `everything=True` on a slow tick closes the last gap: when *all* objects of a kind vanished while a watch was
    broken, no event says so. It also follows an API server whose data was restored from a backup.

    `on_change` is called when an object appears, vanishes or differs in more than its resourceVersion and
    managedFields. `list_interval_seconds` is the least time between two lists of a kind that events made suspect: a
    re-listing trickles in, object by object, and each of them casts the doubt anew. Not for several threads.
    """

    def __init__(
        self,
        on_change: Callable[[], None] = _nobody,
        resources: Iterable[Resource] = OWN_KINDS,
        *,
        list_interval_seconds: float = 5.0,
        tombstones: int = _TOMBSTONES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_change = on_change
        self._list_interval = list_interval_seconds
        self._clock = clock
        self._kinds = {resource: _Kind(tombstones) for resource in resources}

    @property
    def synced(self) -> bool:
        """Every kind was listed at least once."""
        return all(kind.listed_at is not None for kind in self._kinds.values())

    @property
    def suspect(self) -> tuple[Resource, ...]:
        """The kinds that may hold ghosts and are listed by the next `resync`."""
        return tuple(resource for resource, kind in self._kinds.items() if kind.suspect)

    # ----------------------------------------------------------------------------------------------- reading

    def all(self, resource: Resource) -> Objects:
        """The objects of one kind, sorted by namespace and name."""
        return list(self._kinds[resource].sorted())

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """The object of that name, if any; `namespace` is None for a cluster-scoped kind."""
        return self._kinds[resource].named(namespace or "", name)

    def by_uid(self, uid: str) -> Object | None:
        """The object of that UID, whatever its kind."""
        for kind in self._kinds.values():
            if (body := kind.objects.get(uid)) is not None:
                return body
        return None

    # ----------------------------------------------------------------------------------------------- feeding

    def put(self, resource: Resource, event_type: str | None, body: Mapping[str, Any]) -> None:
        """Take in one event: ADDED, MODIFIED, DELETED, or None for an object reported by a (re-)listing."""
        kind = self._kinds[resource]
        if event_type is None and kind.doubts(body):
            kind.suspect = True
        changed = kind.remove(_uid(body)) if event_type == "DELETED" else kind.put(_trimmed(body))
        kind.streamed = kind.streamed or event_type is not None
        if changed:
            self._on_change()

    def write_through(self, body: Mapping[str, Any]) -> None:
        """Take in the API server's answer to a write of our own, so that the next cycle sees it.

        Raises ValueError for a kind that this store does not hold.
        """
        for resource, kind in self._kinds.items():
            if (body.get("apiVersion"), body.get("kind")) == (resource.api_version, resource.kind):
                if kind.put(_trimmed(body)):
                    self._on_change()
                return
        raise ValueError(f"This store holds no {body.get('kind')!r} of {body.get('apiVersion')!r}.")

    async def resync(self, client: Lister, *, everything: bool = False) -> float | None:
        """List the suspect kinds, or all, drop what does not exist and take over what is newer.

        Returns the seconds after which to call again for a kind that is suspect but was listed a moment ago; None if
        there is none. A kind whose list fails stays suspect; the others are done all the same, then the first error
        (of `kube.errors`) is raised.
        """
        due = [resource for resource, kind in self._kinds.items() if everything or self._remaining(kind) == 0]
        outcomes = await asyncio.gather(*(self._resync(client, resource) for resource in due))
        for error in outcomes:
            if error is not None:
                raise error
        waits = [self._remaining(kind) for kind in self._kinds.values()]
        return min((wait for wait in waits if wait is not None), default=None)

    async def refresh(self, client: Lister, resource: Resource) -> None:
        """List one kind now, whatever its watch has told. Raises an error of `kube.errors` where that fails."""
        if (error := await self._resync(client, resource)) is not None:
            raise error

    def _remaining(self, kind: _Kind) -> float | None:
        """Seconds until a suspect kind may be listed; None for one that is not suspect."""
        if not kind.suspect:
            return None
        if kind.listed_at is None:
            return 0.0
        return max(0.0, kind.listed_at + self._list_interval - self._clock())

    async def _resync(self, client: Lister, resource: Resource) -> KubeError | None:
        kind = self._kinds[resource]
        kind.suspect = False  # anything doubtful that comes while the list is under way makes it so again
        kind.lists_under_way += 1
        began = kind.clock
        try:
            items, version = await client.list(resource)
        except KubeError as error:
            kind.suspect = True
            return error
        except BaseException:
            kind.suspect = True
            raise
        finally:
            kind.lists_under_way -= 1
        kind.listed_at = self._clock()
        if kind.reconcile([_trimmed(item) for item in items], version, began):
            self._on_change()
        return None


class _Kind:
    """The objects of one kind and what is needed to tell new from old.

    Invariants: no UID is both held and entombed; no two held objects share namespace and name.
    """

    def __init__(self, tombstones: int) -> None:
        self.objects: dict[str, Object] = {}
        self.suspect = False
        self.listed_at: float | None = None
        self.streamed = False
        self.lists_under_way = 0
        self.clock = 0
        self._touched: dict[str, int] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._tombstones: dict[str, None] = {}
        self._most_tombstones = tombstones
        self._sorted: Objects | None = None

    def named(self, namespace: str, name: str) -> Object | None:
        uid = self._names.get((namespace, name))
        return None if uid is None else self.objects[uid]

    def sorted(self) -> Objects:
        if self._sorted is None:
            self._sorted = [self.objects[self._names[key]] for key in sorted(self._names)]
        return self._sorted

    def doubts(self, body: Mapping[str, Any]) -> bool:
        """Whether the listing that reports `body` is not the first one: it may have left deleted objects out."""
        return self.streamed or self.listed_at is not None or _uid(body) in self.objects

    def put(self, body: Object) -> bool:
        """Hold `body` unless something newer is known; whether that made a difference anybody could care for."""
        uid = _uid(body)
        if uid in self._tombstones:
            return False
        held = self.objects.get(uid)
        if held is not None and _older(body, held):
            return False
        rival = self._names.get(_name(body))
        if rival is not None and rival != uid:
            # Two objects of one name never live together: the one last seen alive outlived the other.
            if _older(body, self.objects[rival]):
                self._entomb(uid)
                return False
            if _older(self.objects[rival], body):
                self._entomb(rival)
            self._forget(rival)  # without numbers it is a guess who lives, which the next list may correct
        self.clock += 1
        self._touched[uid] = self.clock
        self.objects[uid] = body
        self._names[_name(body)] = uid
        self._sorted = None
        return held is None or _substance(held) != _substance(body)

    def remove(self, uid: str) -> bool:
        """Forget the object for good: a UID never comes back."""
        self._entomb(uid)
        return self._forget(uid)

    def _forget(self, uid: str) -> bool:
        body = self.objects.pop(uid, None)
        if body is None:
            return False
        del self._touched[uid]
        del self._names[_name(body)]
        self._sorted = None
        return True

    def reconcile(self, items: Objects, version: str, began: int) -> bool:
        """Make the view what a list said, except for what is known to be newer; whether anything changed.

        `began` is `clock` as it was when the list was asked for.
        """
        limit = int(version) if version.isdecimal() else None
        if self._rewound(limit, began):
            return self._restart(items)
        present = {_uid(item) for item in items}
        ghosts = [uid for uid in self.objects if uid not in present and not self._newer(uid, limit, began)]
        changed = [self.remove(uid) for uid in ghosts]
        changed += [self.put(item) for item in items if not self._contested(item, began)]
        return any(changed)

    def _rewound(self, limit: int | None, began: int) -> bool:
        """Whether the server's history was put back: a list is never older than what was seen before it began."""
        if limit is None:
            return False
        known = (_number(body) for uid, body in self.objects.items() if self._touched[uid] <= began)
        return any(number is not None and number > limit for number in known)

    def _restart(self, items: Objects) -> bool:
        """Believe the list alone; what was deleted after the backup was made is alive again, under its old UID."""
        before = self.objects
        self.objects, self._touched, self._names, self._tombstones = {}, {}, {}, {}
        self._sorted = None
        for item in items:
            self.put(item)
        return {uid: _substance(body) for uid, body in before.items()} != {
            uid: _substance(body) for uid, body in self.objects.items()
        }

    def _newer(self, uid: str, limit: int | None, began: int) -> bool:
        """Whether the object held was created after the list: only then is its absence no death certificate."""
        held = _number(self.objects[uid])
        if held is not None and limit is not None:
            return held > limit
        return self._touched[uid] > began

    def _contested(self, item: Object, began: int) -> bool:
        """Whether an event that came during the list says otherwise, and no number tells which is newer."""
        uid = _uid(item) if _uid(item) in self.objects else self._names.get(_name(item))
        if uid is None or (_number(item) is not None and _number(self.objects[uid]) is not None):
            return False
        return self._touched[uid] > began

    def _entomb(self, uid: str) -> None:
        self._tombstones.pop(uid, None)
        self._tombstones[uid] = None
        # A list under way may still name what was deleted since it was asked for: forget nobody until it is in.
        while len(self._tombstones) > self._most_tombstones and self.lists_under_way == 0:
            del self._tombstones[next(iter(self._tombstones))]


def _trimmed(body: Mapping[str, Any]) -> Object:
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    return {**body, "metadata": metadata}


def _substance(body: Object) -> Object:
    metadata = {key: value for key, value in body["metadata"].items() if key != "resourceVersion"}
    return {**body, "metadata": metadata}


def _uid(body: Mapping[str, Any]) -> str:
    return str(body["metadata"]["uid"])


def _name(body: Mapping[str, Any]) -> tuple[str, str]:
    metadata = body["metadata"]
    return metadata.get("namespace") or "", metadata["name"]


def _number(body: Mapping[str, Any]) -> int | None:
    """The resourceVersion as a number, which Kubernetes 1.35 and later promise that it is."""
    version = body["metadata"].get("resourceVersion") or ""
    return int(version) if version.isdecimal() else None


def _older(body: Object, held: Object) -> bool:
    """Whether `body` is certainly older than `held`; where versions are no numbers, the last to come is the newer."""
    ours, theirs = _number(body), _number(held)
    return ours is not None and theirs is not None and ours < theirs
