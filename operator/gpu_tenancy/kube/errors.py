"""What can go wrong with a request, in the four ways a caller can react.

Every method of the adapter raises these and nothing else. The class says what to do next, the message is the
API server's own sentence. This module does no I/O and knows nothing of aiohttp or of the Kubernetes client.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec


class KubeError(Exception):
    """A request that did not succeed.

    `status` is the HTTP status, 0 where no answer came. `reason` is the machine-readable word of the API server
    (`AlreadyExists`, `Invalid`, ...) or of this package (`Unreachable`, `Timeout`, ...). `message` is a sentence.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, reason, message)
        self.status = status
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} ({self.reason})" if self.status == 0 else f"{self.message} (HTTP {self.status})"


class Transient(KubeError):  # noqa: N818  (the name is what to do about it)
    """Network, time-out, 401, 429 or 5xx: the same request may succeed later; retry with back-off.

    401 is here and not in Rejected because it says nothing about the object: credentials expire and are renewed.
    """

    retry_after: float | None = None
    """Seconds the API server asked to wait; None where it did not say."""
    not_executed: bool = False
    """The API server certainly did not act on the request, so that repeating it is safe whatever it does."""


class Gone(Transient):
    """The resourceVersion or continue token is of no use (any more): list again."""


class Conflict(KubeError):  # noqa: N818  (the name is what to do about it)
    """The object is not what the request assumed (409, or a `test` of a JSON Patch failed): plan anew, now."""


class AlreadyExists(Conflict):
    """An object of that name exists."""


class Rejected(KubeError):  # noqa: N818  (the name is what to do about it)
    """400, 403, 422 and the like: the same request fails until the object, or a permission, changes."""


class NotFound(Rejected):
    """The object, its namespace or its kind does not exist."""


class _Details(msgspec.Struct):
    retryAfterSeconds: float | None = None  # noqa: N815  (the wire's name)


class _Status(msgspec.Struct):
    """The parts of a meta/v1 Status that decide."""

    reason: str | None = None
    message: str | None = None
    details: _Details | None = None

    def retry_after(self) -> float | None:
        return self.details.retryAfterSeconds if self.details else None


_TEXT_LIMIT: Final = 300
_PATCH_DOES_NOT_FIT: Final = "the server rejected our request due to an error in our request"
"""All that the API server says, with status 422, when a JSON Patch cannot be applied: a `test` does not hold, or a
path is missing. A patch that applies but makes the object invalid gets a sentence that names the field."""


def from_response(status: int, body: bytes | Mapping[str, Any], *, retry_after: float | None = None) -> KubeError:
    """Turn an unsuccessful answer into the error to raise.

    `body` is the answer's payload, normally a meta/v1 Status; a proxy's text is taken as it is.
    `retry_after` is the header of that name in seconds; the Status's own figure serves where it is absent.
    """
    answer = _decode(body)
    message = answer.message or f"The API server answered {status} {_phrase(status)} without a message."
    reason = answer.reason or _phrase(status)
    error = _classify(status, answer, message)(status, reason, message)
    if isinstance(error, Transient):
        error.retry_after = retry_after if retry_after is not None else answer.retry_after()
        error.not_executed = status == HTTPStatus.TOO_MANY_REQUESTS
    return error


def _classify(status: int, answer: _Status, message: str) -> type[KubeError]:
    match status:
        case 404:
            return NotFound
        case 409:
            return AlreadyExists if answer.reason == "AlreadyExists" else Conflict
        case 410:
            return Gone
        case 422 if message == _PATCH_DOES_NOT_FIT:
            return Conflict
        case 0 | 401 | 408 | 429:
            return Transient
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return Transient
        case _:
            return Rejected


def _decode(body: bytes | Mapping[str, Any]) -> _Status:
    try:
        if isinstance(body, bytes):
            return msgspec.json.decode(body, type=_Status)
        return msgspec.convert(body, type=_Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body.decode(errors="replace") if isinstance(body, bytes) else repr(body)
        return _Status(message=" ".join(text.split())[:_TEXT_LIMIT])


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        return "Unknown"
