"""Reflectors: bookmarks, 410, cut lines, huge lines, and no ghosts after a cut watch."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import Gone, KubeError, Rejected, Transient
from gpu_tenancy.kube.resources import PODS
from gpu_tenancy.kube.watch import Reflector, _lines
from tests.unit.kube.fake_server import FakeServer, Object, pod, refused, run, said


class Metadata(msgspec.Struct):
    name: str
    uid: str


class Status(msgspec.Struct):
    phase: str


class Pod(msgspec.Struct):
    """A digest without resourceVersion and spec: changes of those are nobody's business here."""

    metadata: Metadata
    status: Status


def name(item: Pod) -> str:
    return item.metadata.name


def view_of(client: KubeClient, **options: object) -> Reflector[Pod]:
    return Reflector(client, PODS, Pod, name, **options)  # type: ignore[arg-type]


@asynccontextmanager
async def running(view: Reflector[Pod]) -> AsyncIterator[None]:
    task = asyncio.create_task(view.run())
    try:
        yield
        assert not task.done(), "a Reflector never ends by itself"
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def until_listed(view: Reflector[Pod], times: int) -> None:
    await until(lambda: view.relists >= times)


def phases(view: Reflector[Pod]) -> dict[str, str]:
    return {key: item.status.phase for key, item in view.items.items()}


def test_the_view_is_the_list_and_then_what_the_watch_says(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods, server.version = [pod("a", 1), pod("b", 2)], 7
        view = view_of(client, label_selector="x=y", field_selector="spec.nodeName=n")
        assert view.last_contact == 0
        async with running(view):
            await view.synced()
            assert phases(view) == {"a": "Running", "b": "Running"}
            stream = await server.next_watch()
            seconds = stream.query.pop("timeoutSeconds")
            assert 270 <= int(seconds) <= 330
            assert stream.query == {
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": "7",
                "labelSelector": "x=y",
                "fieldSelector": "spec.nodeName=n",
            }
            await stream.send("ADDED", pod("c", 8, phase="Pending"))
            await stream.send("MODIFIED", pod("a", 9, phase="Failed"))
            await stream.send("DELETED", pod("b", 10))
            await until(lambda: phases(view) == {"a": "Failed", "c": "Pending"})
            contact = view.last_contact
            await stream.bookmark(11)
            await until(lambda: view.last_contact > contact)
            assert view.last_error is None

    run(tmp_path, test)


def test_only_what_the_digest_holds_wakes_anybody(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods, server.version = [pod("a", 1)], 1
        wakes: list[None] = []
        edges: list[tuple[str | None, str | None]] = []

        def on_item(old: Pod | None, new: Pod | None) -> None:
            edges.append((old.status.phase if old else None, new.status.phase if new else None))

        view = view_of(client, on_change=lambda: wakes.append(None), on_item=on_item)
        async with running(view):
            await view.synced()
            assert (len(wakes), edges) == (1, [(None, "Running")])
            stream = await server.next_watch()
            for version in range(2, 50):
                await stream.send("MODIFIED", pod("a", version, padding=str(version)))
            await stream.bookmark(50)
            await stream.send("DELETED", pod("never-seen", 51))
            batch = [pod("a", 52, phase="Failed"), pod("b", 53)]
            lines = [json.dumps({"type": "MODIFIED", "object": body}) for body in batch]
            await stream.send_bytes("\n".join([*lines, ""]).encode())
            await until(lambda: "b" in view.items)
            assert len(wakes) == 2
            assert edges[1:] == [("Running", "Failed"), (None, "Running")]

    run(tmp_path, test)


def test_a_watch_that_is_cut_resumes_at_the_last_thing_it_saw(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.version = 5
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            await stream.send("ADDED", pod("a", 17))
            await until(lambda: "a" in view.items)
            stream.cut()
            stream = await server.next_watch()
            assert stream.query["resourceVersion"] == "17"
            await stream.bookmark(23)
            stream.end()
            stream = await server.next_watch()
            assert stream.query["resourceVersion"] == "23"
            stream.end()  # nothing was said: the place stays
            assert (await server.next_watch()).query["resourceVersion"] == "23"
            assert view.relists == 1
            assert phases(view) == {"a": "Running"}

    run(tmp_path, test)


def test_a_line_that_is_cut_in_the_middle_counts_for_nothing(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            await stream.send("ADDED", pod("a", 17))
            half = json.dumps({"type": "MODIFIED", "object": pod("a", 18, phase="Failed")}).encode()
            await stream.send_bytes(half[:60])
            await until(lambda: "a" in view.items)
            stream.cut()
            stream = await server.next_watch()
            assert stream.query["resourceVersion"] == "17"
            await stream.send_bytes(half[:60])
            await asyncio.sleep(0.01)
            await stream.send_bytes(half[60:] + b"\n")
            await until(lambda: phases(view) == {"a": "Failed"})

    run(tmp_path, test)


def test_a_line_of_many_buffers_is_one_object(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            await stream.send("ADDED", pod("a", 2, padding="x" * 300_000))
            await stream.send("ADDED", pod("b", 3, padding="y" * 5_000_000))
            await stream.send("ADDED", pod("c", 4))
            await until(lambda: set(view.items) == {"a", "b", "c"})

    run(tmp_path, test)


@pytest.mark.parametrize("how", ["refused", "event"])
def test_a_forgotten_place_is_listed_anew_and_leaves_no_ghost(tmp_path: Path, how: str) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods, server.version = [pod("stays", 1), pod("goes", 2), pod("reborn", 3, uid="first")], 3
        edges: list[tuple[Pod | None, Pod | None]] = []
        view = view_of(client, on_item=lambda old, new: edges.append((old, new)))
        async with running(view):
            stream = await server.next_watch()
            before = view.items["stays"]
            edges.clear()
            server.pods, server.version = [pod("stays", 1), pod("comes", 9), pod("reborn", 8, uid="second")], 9
            if how == "refused":
                server.watch_answers = [refused(410, "Expired", "too old resource version")]
                stream.cut()
            else:
                body = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                await stream.send("ERROR", body)
            assert (await server.next_watch()).query["resourceVersion"] == "9"
            assert set(view.items) == {"stays", "comes", "reborn"}
            assert view.items["reborn"].metadata.uid == "second"
            assert view.items["stays"] == before
            told = {(old.metadata.uid if old else None, new.metadata.uid if new else None) for old, new in edges}
            assert told == {("uid-goes", None), (None, "uid-comes"), ("first", "second")}

    run(tmp_path, test)


@pytest.mark.parametrize(
    "line", ['{"type":"ERROR","object":{"code":500}}', '{"type":"ERROR","object":[]}', "}", '{"type":3}', "null"]
)
def test_a_watch_that_ends_in_nonsense_is_listed_anew(tmp_path: Path, line: str) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            server.pods, server.version = [pod("a", 1)], 2
            await stream.send_bytes(line.encode() + b"\n")
            await server.next_watch()
            assert set(view.items) == {"a"}
            assert view.relists == 2

    run(tmp_path, test)


def test_no_view_is_better_than_half_a_list(tmp_path: Path) -> None:
    """A list that fails on its second page must not show the first page alone."""

    async def test(server: FakeServer, client: KubeClient) -> None:
        fail = True

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if "continue" not in request.query:
                return said({"metadata": {"resourceVersion": "5", "continue": "t"}, "items": [pod("a", 1)]})
            if fail:
                return refused(403, "Forbidden", "no second page for you")
            return said({"metadata": {"resourceVersion": "5"}, "items": [pod("b", 2)]})

        server.answer = answer
        view = view_of(client)
        async with running(view):
            await until(lambda: isinstance(view.last_error, Rejected))
            assert not view.items
            fail = False
            await view.synced()
            assert set(view.items) == {"a", "b"}
            await until(lambda: view.last_error is None)

    run(tmp_path, test)


def test_a_list_that_begins_again_forgets_its_first_page(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if "continue" in request.query:
                return refused(410, "Expired")
            if "limit" in request.query:
                return said({"metadata": {"resourceVersion": "5", "continue": "t"}, "items": [pod("gone", 1)]})
            return said({"metadata": {"resourceVersion": "9"}, "items": [pod("a", 2)]})

        server.answer = answer
        view = view_of(client)
        async with running(view):
            assert (await server.next_watch()).query["resourceVersion"] == "9"
            assert set(view.items) == {"a"}

    run(tmp_path, test)


def test_where_nobody_listens_the_place_is_kept_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_tenancy.kube.watch._FIRST_PAUSE", 0.0001)

    async def test(server: FakeServer, client: KubeClient) -> None:
        server.version = 5
        view = view_of(client)
        failures: list[object] = []
        async with running(view):
            stream = await server.next_watch()
            note_error = view._note_error

            def count(error: KubeError | None) -> None:
                failures.append(error)
                note_error(error)

            monkeypatch.setattr(view, "_note_error", count)
            await server.turn_deaf()
            stream.cut()
            await until(lambda: len(failures) > 8)
            assert isinstance(view.last_error, Transient)
            assert view.last_error.reason == "Unreachable"
            await server.listen()
            assert (await server.next_watch()).query["resourceVersion"] == "5"
            assert view.relists == 1

    run(tmp_path, test)


def test_an_object_without_a_version_is_no_place_to_resume_at(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            bodies: list[Object] = [{}, {"metadata": {}}, {"metadata": {"resourceVersion": ""}}]
            for body in bodies:
                stream = await server.next_watch()
                server.version += 1
                relists = view.relists
                await stream.send("BOOKMARK", body)
                stream.end()
                await until_listed(view, relists + 1)

    run(tmp_path, test)


def test_while_the_server_is_away_the_view_stays_and_says_why_it_is_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_tenancy.kube.watch._FIRST_PAUSE", 0.01)

    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods, server.version = [pod("a", 1)], 5
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            server.watch_answers = [refused(503, "ServiceUnavailable", "gone fishing") for _ in range(3)]
            with caplog.at_level(logging.WARNING):
                stream.cut()
                await until(lambda: "gone fishing" in str(view.last_error))
                assert set(view.items) == {"a"}
                stream = await server.next_watch()
            assert stream.query["resourceVersion"] == "5"
            await until(lambda: view.last_error is None)
            assert view.relists == 1
            assert caplog.text.count("gone fishing") == 1

    run(tmp_path, test)


def test_a_server_that_answers_but_never_accepts_the_place_is_listed_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_tenancy.kube.watch._FIRST_PAUSE", 0.001)

    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            server.pods, server.version = [pod("a", 1)], 5
            server.watch_answers = [refused(500, "InternalError") for _ in range(6)]
            stream.cut()
            assert (await server.next_watch()).query["resourceVersion"] == "5"
            assert set(view.items) == {"a"}

    run(tmp_path, test)


def test_a_connection_on_which_nothing_comes_is_given_up(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.version = 5
        view = view_of(client, inactivity_seconds=0.05)
        async with running(view):
            await server.next_watch()
            again = await server.next_watch()
            assert again.query["resourceVersion"] == "5"

    run(tmp_path, test)


def test_keep_leaves_objects_out_and_notices_when_that_changes(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods = [pod("a", 1), pod("b", 2, phase="Failed")]
        view = view_of(client, keep=lambda item: item.status.phase != "Failed")
        async with running(view):
            stream = await server.next_watch()
            assert set(view.items) == {"a"}
            await stream.send("MODIFIED", pod("a", 3, phase="Failed"))
            await stream.send("MODIFIED", pod("b", 4))
            await until(lambda: set(view.items) == {"b"})

    run(tmp_path, test)


def test_an_object_that_does_not_fit_is_left_out_and_counted(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        odd = pod("odd", 2)
        odd["status"]["phase"] = 7
        server.pods = [pod("a", 1), odd]
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            assert set(view.items) == {"a"}
            await stream.send("MODIFIED", odd)
            await stream.send("ADDED", pod("b", 3))
            await until(lambda: "b" in view.items)
            assert view.undecodable == 2
            assert view.relists == 1

    run(tmp_path, test)


def test_a_callback_that_fails_is_logged_and_the_view_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the consumer's own mistake")

    async def test(server: FakeServer, client: KubeClient) -> None:
        server.pods = [pod("a", 1)]
        view = view_of(client, on_change=fail, on_item=fail)
        async with running(view):
            stream = await server.next_watch()
            await stream.send("ADDED", pod("b", 2))
            await until(lambda: "b" in view.items)

    run(tmp_path, test)
    assert "the consumer's own mistake" in caplog.text


def test_a_view_that_is_handed_out_cannot_be_written(tmp_path: Path) -> None:
    async def test(_: FakeServer, client: KubeClient) -> None:
        items = view_of(client).items
        with pytest.raises(TypeError):
            items["a"] = Pod(Metadata("a", "u"), Status("Running"))  # type: ignore[index]

    run(tmp_path, test)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that a view makes, which take no time here."""
    noted: list[float] = []
    real_sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds > 0.01:
            noted.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr("gpu_tenancy.kube.watch.asyncio.sleep", note)
    return noted


def test_a_failing_server_is_asked_less_and_less_often(tmp_path: Path, pauses: list[float]) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.watch_answers = [refused(503, "ServiceUnavailable") for _ in range(12)]
        server.watch_answers[5] = refused(429, "TooManyRequests", retry_after="30")
        async with running(view_of(client)):
            await server.next_watch()
        assert len(pauses) == 12
        for number, pause in enumerate(pauses):
            longest = min(10, 0.1 * 2 ** (number + 1))
            assert pause == 30 if number == 5 else longest / 2 <= pause <= longest

    run(tmp_path, test)


def test_a_watch_that_did_some_good_ends_the_back_off(tmp_path: Path, pauses: list[float]) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.watch_answers = [refused(503, "ServiceUnavailable") for _ in range(6)]
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            assert pauses.pop() > 1
            await stream.send("ADDED", pod("a", 7))
            await until(lambda: "a" in view.items)
            stream.cut()
            await server.next_watch()
            assert pauses.pop() <= 0.1

    run(tmp_path, test)


def test_a_long_list_is_no_sign_that_the_watch_is_well(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("gpu_tenancy.kube.watch.time", SimpleNamespace(monotonic=lambda: now))

    async def test(server: FakeServer, client: KubeClient) -> None:
        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            nonlocal now
            now += 1000
            return said(server.list_pods_now())

        server.answer = answer
        server.watch_answers = [refused(410, "Expired") for _ in range(6)]
        async with running(view_of(client)):
            await server.next_watch()
        assert pauses == sorted(pauses)
        assert len(pauses) == 6

    run(tmp_path, test)


@given(st.lists(st.binary(max_size=8).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_are_the_same_however_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines) + b"a last line without its end"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    bounds = [0, *cuts, len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(bounds)]

    async def chunks() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def collect() -> list[bytes]:
        return [line async for batch in _lines(chunks()) for line in batch]

    assert asyncio.run(collect()) == [line for line in lines if line]


def test_the_longest_line_is_one_lines_length_not_the_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_tenancy.kube.watch._LONGEST_LINE", 10)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"12345"
            yield b"678\n"

    async def collect() -> list[bytes]:
        return [line async for batch in _lines(chunks()) for line in batch]

    assert asyncio.run(collect()) == [b"12345678"] * 100


def test_a_line_without_end_is_no_watch() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        piece = b"x" * (8 * 1024 * 1024)
        while True:
            yield piece

    async def collect() -> None:
        async for _ in _lines(chunks()):
            pass

    with pytest.raises(Gone, match="a line of more than"):
        asyncio.run(collect())


def test_a_refusal_in_the_midst_of_a_watch_is_listed_anew(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        view = view_of(client)
        async with running(view):
            stream = await server.next_watch()
            await stream.send("ERROR", {"code": 403, "reason": "Forbidden", "message": "no more"})
            await server.next_watch()
            assert view.relists == 2

    run(tmp_path, test)


def test_a_watch_that_breaks_is_transient(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        async def watch() -> None:
            async with client.watch(PODS, "5", {}, seconds=60, inactivity_seconds=60) as chunks:
                (await server.next_watch()).cut()
                await anext(chunks)

        with pytest.raises(Transient, match="the connection broke"):
            await watch()

    run(tmp_path, test)
