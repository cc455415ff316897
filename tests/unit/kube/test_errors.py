"""Every answer of the API server becomes the error that says what to do next."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.kube.errors import (
    AlreadyExists,
    Conflict,
    Gone,
    KubeError,
    NotFound,
    Rejected,
    Transient,
    from_response,
)


def status(code: int, reason: str = "", message: str = "a sentence", **details: object) -> KubeError:
    body = {"kind": "Status", "reason": reason, "message": message, "details": details, "code": code}
    error = from_response(code, json.dumps(body).encode())
    assert type(error) is type(from_response(code, body))
    return error


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (400, "BadRequest", Rejected),
        (401, "Unauthorized", Transient),
        (403, "Forbidden", Rejected),
        (404, "NotFound", NotFound),
        (405, "MethodNotAllowed", Rejected),
        (408, "Timeout", Transient),
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (410, "Expired", Gone),
        (410, "Gone", Gone),
        (413, "RequestEntityTooLarge", Rejected),
        (422, "Invalid", Rejected),
        (429, "TooManyRequests", Transient),
        (500, "InternalError", Transient),
        (503, "ServiceUnavailable", Transient),
        (504, "Timeout", Transient),
    ],
)
def test_the_class_says_what_to_do(code: int, reason: str, expected: type[KubeError]) -> None:
    error = status(code, reason)
    assert type(error) is expected
    assert (error.status, error.reason, error.message) == (code, reason, "a sentence")
    assert str(error) == f"a sentence (HTTP {code})"


def test_a_json_patch_that_does_not_fit_is_a_conflict_but_an_invalid_object_is_rejected() -> None:
    unfit = "the server rejected our request due to an error in our request"
    assert type(status(422, "Invalid", unfit)) is Conflict
    assert type(status(422, "Invalid", f'Pod "a" is invalid: metadata.name: {unfit}')) is Rejected


def test_only_a_request_that_was_turned_away_unread_counts_as_not_executed() -> None:
    def not_executed(code: int) -> bool:
        error = status(code)
        assert isinstance(error, Transient)
        return error.not_executed

    assert not_executed(429)
    assert not any(not_executed(code) for code in (401, 408, 410, 500, 502, 503, 504))


def test_the_header_wins_over_the_status_about_when_to_come_back() -> None:
    body = json.dumps({"details": {"retryAfterSeconds": 3}}).encode()
    for header, expected in ((None, 3), (7.0, 7.0), (0.0, 0.0)):
        error = from_response(429, body, retry_after=header)
        assert isinstance(error, Transient)
        assert error.retry_after == expected


def test_a_proxys_page_is_the_message_in_short() -> None:
    error = from_response(502, b"<html>\n  <h1>502   Bad Gateway</h1>" + b"x" * 5000)
    assert isinstance(error, Transient)
    assert error.reason == "BadGateway"
    assert error.message.startswith("<html> <h1>502 Bad Gateway</h1>xxx")
    assert len(error.message) <= 300


def test_an_empty_answer_still_makes_a_sentence() -> None:
    assert from_response(503, b"").message == "The API server answered 503 ServiceUnavailable without a message."
    assert from_response(403, b"{}").message == "The API server answered 403 Forbidden without a message."


@given(
    st.integers(300, 999), st.binary(max_size=200) | st.sampled_from([b"null", b"[]", b'{"details": []}', b'"\xff"'])
)
def test_no_answer_is_too_odd_to_classify(code: int, body: bytes) -> None:
    error = from_response(code, body)
    assert error.status == code
    assert error.message
    assert error.reason
