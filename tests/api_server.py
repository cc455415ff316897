"""One Kubernetes API server for all the tests of a process, called from plain functions.

For what needs no controller: the schemas, their rules, what kubectl prints of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import pytest

from gpu_tenancy.kube.resources import OWN_KINDS, Resource
from tests.cluster.api import APPLY, ApiError, apply_documents, object_path
from tests.cluster.components import API_ONLY
from tests.cluster.control_plane import ControlPlane

CRDS: Final = Path(__file__).parent.parent / "crds"

Body = dict[str, Any]
T = TypeVar("T")


class ApiServer:
    """etcd and kube-apiserver with the project's kinds. A context manager; its calls wait for their results."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self.control_plane = ControlPlane(components=API_ONLY)

    def __enter__(self) -> Self:
        try:
            self.run(self.control_plane.__aenter__())
            self.run(self.control_plane.apply_manifests([CRDS]))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.control_plane.stop())
        self._runner.close()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for a call of the control plane; all of them belong to one event loop."""
        return self._runner.run(call)

    def kubectl(self, *args: str) -> str:
        """What kubectl prints. Raises KubectlError with what it complains of."""
        return self.run(self.control_plane.kubectl(*args))

    def create(self, body: Body) -> Body:
        """Create an object of the project's kinds. Unknown fields are refused, not dropped."""
        path = _resource(body).path(body["metadata"].get("namespace"))
        return self.run(self.control_plane.api.create(path, body, fieldValidation="Strict"))

    def replace_status(self, body: Body) -> Body:
        """Replace the status of an object of the project's kinds."""
        return self.run(self.control_plane.api.replace(_path(body, "status"), body, fieldValidation="Strict"))

    def try_create(self, body: Body) -> Body:
        """What the server would make of a new object; nothing is stored."""
        path = _resource(body).path(body["metadata"].get("namespace"))
        return self.run(self.control_plane.api.create(path, body, fieldValidation="Strict", dryRun="All"))

    def try_replace(self, body: Body) -> Body:
        """What the server would make of a stored object; nothing is changed."""
        return self.run(self.control_plane.api.replace(_path(body), body, fieldValidation="Strict", dryRun="All"))

    def apply(self, body: Body) -> None:
        """Server-side apply of an object of any kind; a definition's kind is served on return."""
        self.run(apply_documents(self.control_plane.api, [body], "tests"))

    def try_apply(self, body: Body) -> Body:
        """What a server-side apply of an object of any kind would store; nothing is changed."""
        return self.run(self._try_apply(body))

    async def _try_apply(self, body: Body) -> Body:
        api = self.control_plane.api
        params = {"fieldManager": "tests", "fieldValidation": "Strict", "dryRun": "All"}
        return await api.patch(await object_path(api, body), body, APPLY, **params)


def refusal(attempt: Callable[[Body], Body], body: Body) -> str:
    """The sentence with which the server refuses an attempt. Fails where it does not."""
    with pytest.raises(ApiError) as refused:
        attempt(body)
    return refused.value.message


def _resource(body: Body) -> Resource:
    return next(resource for resource in OWN_KINDS if resource.kind == body["kind"])


def _path(body: Body, subresource: str | None = None) -> str:
    return _resource(body).path(body["metadata"].get("namespace"), body["metadata"]["name"], subresource)
