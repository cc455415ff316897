"""What the closed segments of all leases come to, kept so that a cycle only adds up. Parses; decides nothing.

A closed record is final: what it comes to, reckoned to one fixed instant, is found out once. Nothing is remembered that
the records do not say: an operator that starts anew finds the same sums.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from math import fsum
from typing import Final, NamedTuple

import msgspec

from gpu_tenancy.api.base import format_time
from gpu_tenancy.controller.digests import ClosedSegment
from gpu_tenancy.core.snapshot import PastUsage
from gpu_tenancy.core.tenancy import FORGOTTEN, decayed, holding
from gpu_tenancy.kube.client import Object

_log = logging.getLogger(__name__)

REBASED: Final = 64
"""Half-lives after which the sums are reckoned to a later instant: numbers double with each half-life."""


class _Part(NamedTuple):
    """What one record comes to."""

    body: Object
    """The record. Held so that no other object can be taken for it."""
    namespace: str
    """Namespace of the lease; empty: it comes to nothing."""
    slice_seconds: float


class History:
    """Decayed usage of the closed segments that there are."""

    def __init__(self, half_life: timedelta) -> None:
        self._half_life = half_life
        self._at: datetime | None = None
        """The instant that all sums are reckoned to."""
        self._listed: Sequence[Object] | None = None
        self._parts: dict[int, _Part] = {}
        """By identity of the record's body: what the view has not replaced has not changed."""
        self._by_namespace: dict[str, dict[int, _Part]] = defaultdict(dict)
        self._sums: dict[str, float] = {}

    def usage(self, bodies: Sequence[Object], now: datetime) -> PastUsage:
        """What all UsageRecords that are closed come to."""
        if self._at is None or (now - self._at) / self._half_life > REBASED:
            self._at, self._listed, self._parts, self._by_namespace, self._sums = now, None, {}, defaultdict(dict), {}
        if bodies != self._listed:
            self._listed = bodies
            self._renew(bodies, self._at, now)
        return PastUsage(self._at, self._sums)

    def _renew(self, bodies: Sequence[Object], at: datetime, now: datetime) -> None:
        """Take out what has gone, take in what has come, and add up anew where either was."""
        present = set(map(id, bodies))
        gone = {_uid(part.body): part for part in map(self._forget, self._parts.keys() - present)}
        changed = {part.namespace for part in gone.values()}
        if fresh := present - self._parts.keys():
            changed |= {self._note(body, gone, at, now) for body in bodies if id(body) in fresh}
        sums = {namespace: _sum(self._by_namespace[namespace].values()) for namespace in changed - {""}}
        self._sums = {**self._sums, **sums}

    def _forget(self, identity: int) -> _Part:
        part = self._parts.pop(identity)
        self._by_namespace[part.namespace].pop(identity)
        return part

    def _note(self, body: Object, gone: Mapping[str, _Part], at: datetime, now: datetime) -> str:
        """Take a record in; the namespace that it counts for. `gone`: what was known until now, by UID."""
        former = gone.get(_uid(body))
        if former is not None and _version(former.body) == _version(body):
            part = former._replace(body=body)
        else:
            part = self._read(body, at, now)
        self._parts[id(body)] = self._by_namespace[part.namespace][id(body)] = part
        return part.namespace

    def _read(self, body: Object, at: datetime, now: datetime) -> _Part:
        """One that cannot be read comes to nothing: the order of the queue is no reason to stop."""
        end = (body.get("spec") or {}).get("billableTo")
        # Times of one format: their order is that of the text.
        if end is None or end < format_time(now - FORGOTTEN * self._half_life):
            return _Part(body, "", 0.0)
        try:
            segment = msgspec.convert(body["spec"], ClosedSegment)
        except msgspec.ValidationError as error:
            _log.warning("UsageRecord %s does not count as usage: %s", body["metadata"]["name"], error)
            return _Part(body, "", 0.0)
        slices = holding(segment.profile, len(segment.devices)).memory_slices
        used = decayed(slices, segment.billable_from, segment.billable_to, at, self._half_life)
        return _Part(body, segment.lease_namespace, used)


def _sum(parts: Iterable[_Part]) -> float:
    """A segment counts once, also while its archived copy exists beside it."""
    return fsum({part.body["metadata"]["name"]: part.slice_seconds for part in parts}.values())


def _uid(body: Object) -> str:
    return str(body["metadata"]["uid"])


def _version(body: Object) -> str:
    return str(body["metadata"]["resourceVersion"])
