"""Kubernetes Events, written beside everything else: a lost one is logged and changes nothing."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, NamedTuple

from gpu_tenancy.api import names
from gpu_tenancy.api.base import format_time
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import AlreadyExists, KubeError
from gpu_tenancy.kube.resources import Resource

_log = logging.getLogger(__name__)

WAITING: Final = 1000
"""Events that may wait to be written; more are dropped, with a line in the log."""


class Note(NamedTuple):
    """An Event to be."""

    type: str
    reason: str
    message: str


class Events:
    """Writes Events one after the other, beside everything else."""

    def __init__(self, client: KubeClient, component: str, *, enabled: bool = True) -> None:
        """`component`: who says it."""
        self._client = client
        self._component = component
        self._enabled = enabled
        self._queue: asyncio.Queue[Object] = asyncio.Queue(WAITING)

    def post(self, resource: Resource, body: Object, kind: str, reason: str, message: str) -> None:
        """Have an Event written about an object."""
        if not self._enabled:
            return
        try:
            self._queue.put_nowait(_event(self._component, resource, body, Note(kind, reason, message)))
        except asyncio.QueueFull:
            _log.warning("Event dropped, %s are waiting: %s %s", WAITING, reason, message)

    async def run(self) -> None:
        """Write for ever."""
        while True:
            event = await self._queue.get()
            try:
                await self._client.create(resources.EVENTS, event)
            except AlreadyExists:
                continue
            except KubeError as error:
                _log.info("Event not written: %s: %s", event["reason"], error)


def _event(component: str, resource: Resource, body: Object, note: Note) -> Object:
    metadata, now = body["metadata"], datetime.now(UTC)
    tag = sha256(f"{metadata['uid']}{note}{now.timestamp():.0f}".encode()).hexdigest()[:16]
    namespace = metadata.get("namespace", "default")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": namespace, "name": f"{metadata['name'][:200]}.{tag}"},
        "involvedObject": {
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "namespace": metadata.get("namespace", ""),
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message[:1024],
        "source": {"component": component},
        "reportingComponent": names.GROUP,
        "reportingInstance": component,
        "firstTimestamp": format_time(now),
        "lastTimestamp": format_time(now),
        "count": 1,
    }
