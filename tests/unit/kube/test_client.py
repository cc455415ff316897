"""Requests: paths, bodies, retries and errors of the adapter, against a small server on the loopback."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp import web

from gpu_tenancy.kube import transport
from gpu_tenancy.kube.client import PAGE_SIZE, KubeClient
from gpu_tenancy.kube.errors import AlreadyExists, Conflict, Gone, KubeError, NotFound, Rejected, Transient
from gpu_tenancy.kube.resources import NODES, PODS
from tests.unit.kube.fake_server import Answer, FakeServer, Object, pod, recorded, refused, run, said

UID = "11111111-2222-3333-4444-555555555555"


def in_turn(*answers: web.Response) -> Answer:
    """Give each answer once, the last one for ever."""
    left = list(answers)

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        due = left.pop(0) if len(left) > 1 else left[0]
        return web.Response(status=due.status, body=due.body, headers=due.headers)  # each can be sent but once

    return answer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the pauses between them."""
    monkeypatch.setattr("gpu_tenancy.kube.client._back_off", lambda _: 0.0)


async def vanish(request: web.BaseRequest) -> web.StreamResponse:
    """Read the request and break the connection: the client cannot know what became of it."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.usefixtures("impatient")
def test_a_read_survives_a_server_that_stumbles(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        infos = recorded(client)
        server.answer = in_turn(refused(500, "InternalError"), refused(503, "ServiceUnavailable"), said(pod("a", 1)))
        assert await client.get(PODS, "a", "a") == pod("a", 1)
        assert [info.status for info in infos] == [500, 503, 200]

    run(tmp_path, test)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_keeps_failing_is_given_up_with_its_own_sentence(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(503, "ServiceUnavailable", "etcd is having lunch"))
        with pytest.raises(Transient, match="etcd is having lunch"):
            await client.get(PODS, "a", "a")
        assert len(server.requests) == 4

    run(tmp_path, test)


@pytest.mark.usefixtures("impatient")
def test_writes_are_repeated_only_where_that_is_safe(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(500, "InternalError"))
        generation = {"op": "test", "path": "/metadata/generation", "value": 1}
        change = {"op": "replace", "path": "/spec", "value": {}}
        body = pod("a", 1)
        for attempt, tries in (
            (client.create(PODS, body), 1),
            (client.merge_patch(PODS, "a", {}, "a"), 1),
            (client.json_patch(PODS, "a", [change], "a"), 1),
            (client.json_patch(PODS, "a", [generation, change], "a"), 4),
            (client.delete(PODS, "a", "a"), 1),
            (client.delete(PODS, "a", "a", uid=UID), 4),
            (client.apply(PODS, body, field_manager="m"), 4),
            (client.replace(PODS, body), 4),
        ):
            server.requests.clear()
            with pytest.raises(Transient):
                await attempt
            assert len(server.requests) == tries

    run(tmp_path, test)


def test_what_the_server_turned_away_unread_is_repeated_whatever_it_is(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        too_many = refused(429, "TooManyRequests", retry_after="0")
        server.answer = in_turn(too_many, said(pod("a", 1), 201))
        assert await client.create(PODS, pod("a", 1)) == pod("a", 1)
        assert len(server.requests) == 2

    run(tmp_path, test)


def test_retry_after_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await real_sleep(0)

    async def test(server: FakeServer, client: KubeClient) -> None:
        monkeypatch.setattr("asyncio.sleep", note)
        server.answer = in_turn(refused(429, "TooManyRequests", retry_after="7"), said(pod("a", 1)))
        await client.get(PODS, "a", "a")
        assert [wait for wait in waits if wait > 0] == [pytest.approx(7, abs=0.5)]
        assert waits[-1] >= 7

    run(tmp_path, test)


def test_a_server_that_asks_for_a_long_pause_is_left_to_the_caller(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(429, "TooManyRequests", retry_after="60"))
        with pytest.raises(Transient) as caught:
            await client.get(PODS, "a", "a")
        assert caught.value.retry_after == 60
        assert len(server.requests) == 1

    run(tmp_path, test)


def test_a_lost_answer_is_transient_and_not_known_to_be_unexecuted(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = vanish
        infos = recorded(client)
        with pytest.raises(Transient, match="POST /api/v1/namespaces/a/pods: the connection broke") as caught:
            await client.create(PODS, pod("a", 1))
        assert caught.value.not_executed is False
        assert [info.status for info in infos] == [0]

    run(tmp_path, test)


@pytest.mark.usefixtures("impatient")
def test_nobody_listening_is_transient_and_surely_not_executed(tmp_path: Path) -> None:
    async def test(server: FakeServer, _: KubeClient) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            server.port = unused.getsockname()[1]
        server.write_kubeconfig("first")
        async with KubeClient.connect(str(server.kubeconfig)) as stranded:
            with pytest.raises(Transient, match="cannot connect to the API server") as caught:
                await stranded.create(PODS, pod("a", 1))
            assert caught.value.not_executed is True
            assert caught.value.reason == "Unreachable"

    run(tmp_path, test)


@pytest.mark.parametrize("garbage", ["{", "[]", "null", '"\\ud800"', "<html>"])
def test_a_success_that_is_no_object_is_transient(tmp_path: Path, garbage: str) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(web.Response(text=garbage))
        with pytest.raises(Transient, match="not what the API promises"):
            await client.merge_patch(PODS, "a", {}, "a")
        with pytest.raises(Transient, match="not what the API promises"):
            await client.list(PODS)

    run(tmp_path, test)


def test_new_credentials_are_read_after_a_401_and_the_request_repeated(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            if request.headers["Authorization"] != "Bearer second":
                return refused(401, "Unauthorized")
            return said(pod("a", 1), 201)

        server.answer = answer
        client._loaded_at -= 60  # the credentials have been in use for a minute
        server.write_kubeconfig("second")
        made = await asyncio.gather(*(client.create(PODS, pod("a", 1)) for _ in range(10)))
        assert made == [pod("a", 1)] * 10

    run(tmp_path, test)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """How often credentials were read."""
    noted: list[None] = []
    real = transport.load

    async def load(kubeconfig: str | None, user_agent: str) -> transport.Transport:
        noted.append(None)
        await asyncio.sleep(0)  # as an exec plugin would, it lets others run meanwhile
        return await real(kubeconfig, user_agent)

    monkeypatch.setattr(transport, "load", load)
    return noted


def test_a_lasting_401_is_transient_and_does_not_reread_the_credentials_each_time(
    tmp_path: Path, loads: list[None]
) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(401, "Unauthorized", "who are you"))
        for age, read in ((0, 0), (60, 1), (0, 1)):
            client._loaded_at -= age
            with pytest.raises(Transient, match="who are you"):
                await client.create(PODS, pod("a", 1))
            assert len(loads) == 1 + read

    run(tmp_path, test)


def test_where_new_credentials_cannot_be_read_the_refusal_is_the_error(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(401, "Unauthorized", "who are you"))
        server.kubeconfig.unlink()
        client._loaded_at -= 60
        with pytest.raises(Transient, match="who are you"):
            await client.create(PODS, pod("a", 1))

    run(tmp_path, test)


def test_a_client_that_many_use_at_once_reads_its_credentials_once(tmp_path: Path, loads: list[None]) -> None:
    async def test(server: FakeServer, _: KubeClient) -> None:
        server.answer = in_turn(said(pod("a", 1)))
        loads.clear()
        client = KubeClient.connect(str(server.kubeconfig))
        await asyncio.gather(*(client.get(PODS, "a", "a") for _ in range(10)))
        await client.close()
        assert len(loads) == 1

    run(tmp_path, test)


def test_a_watch_that_is_refused_or_finds_nobody_is_reported_too(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        infos = recorded(client)

        async def watch(watcher: KubeClient) -> None:
            async with watcher.watch(PODS, "5", {}, seconds=60, inactivity_seconds=60):
                pass

        server.watch_answers = [refused(410, "Expired", "too old")]
        with pytest.raises(Gone, match="too old"):
            await watch(client)
        await server.turn_deaf()
        async with KubeClient.connect(str(server.kubeconfig), on_request=infos.append) as newcomer:
            with pytest.raises(Transient, match="cannot connect"):
                await watch(newcomer)
        assert [(info.verb, info.status) for info in infos] == [("watch", 410), ("watch", 0)]

    run(tmp_path, test)


def test_a_watch_that_is_open_while_credentials_change_lives_on(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            fresh = request.headers["Authorization"] == "Bearer second"
            return said(pod("a", 1)) if fresh else refused(401, "Unauthorized")

        server.answer = answer
        async with client.watch(PODS, "5", {}, seconds=60, inactivity_seconds=60) as chunks:
            stream = await server.next_watch()
            client._loaded_at -= 60
            server.write_kubeconfig("second")
            await client.get(PODS, "a", "a")
            await stream.send_bytes(b"still here")
            assert await anext(chunks) == b"still here"

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (said({}), True),
        (said({}, 202), True),
        (refused(404, "NotFound"), False),
        (refused(409, "Conflict", f"Precondition failed: UID in precondition: {UID}, UID in object meta: x"), False),
        (
            refused(409, "Conflict", f'Operation cannot be fulfilled on pods "a": the UID in the precondition ({UID})'),
            False,
        ),
    ],
)
def test_delete_says_whether_there_was_anything_of_ours_to_delete(
    tmp_path: Path, answer: web.Response, outcome: bool
) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(answer)
        assert await client.delete(PODS, "a", "a", uid=UID, grace_seconds=0, propagation="Foreground") is outcome
        assert server.bodies == [
            {
                "apiVersion": "v1",
                "kind": "DeleteOptions",
                "propagationPolicy": "Foreground",
                "preconditions": {"uid": UID},
                "gracePeriodSeconds": 0,
            }
        ]

    run(tmp_path, test)


def test_a_delete_that_lost_a_race_about_something_else_is_a_conflict(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(409, "Conflict", "the object has been modified"))
        with pytest.raises(Conflict):
            await client.delete(PODS, "a", "a", uid=UID)

    run(tmp_path, test)


def test_a_list_whose_continuation_expired_begins_again_in_one_page(tmp_path: Path) -> None:
    def page(names: list[str], version: int, token: str = "") -> web.Response:
        return said(
            {"metadata": {"resourceVersion": str(version), "continue": token}, "items": [pod(n, 1) for n in names]}
        )

    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(page(["old"], 10, "t/+="), refused(410, "Expired"), page(["new", "newer"], 20))
        items, version = await client.list(PODS, label_selector="a in (b,c)")
        assert [item["metadata"]["name"] for item in items] == ["new", "newer"]
        assert version == "20"
        assert [dict(request.query) for request in server.requests] == [
            {"labelSelector": "a in (b,c)", "limit": str(PAGE_SIZE)},
            {"labelSelector": "a in (b,c)", "limit": str(PAGE_SIZE), "continue": "t/+="},
            {"labelSelector": "a in (b,c)"},
        ]

    run(tmp_path, test)


def test_a_list_of_nothing_is_empty(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(said({"metadata": {"resourceVersion": "7"}, "items": None}))
        assert await client.list(PODS) == ([], "7")

    run(tmp_path, test)


def test_every_request_is_reported_as_what_it_was(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        infos = recorded(client)
        server.answer = in_turn(said(pod("a", 1) | {"items": []}))
        body = pod("a", 1)
        await client.get(PODS, "a", "a")
        await client.list(PODS)
        await client.create(PODS, body, dry_run=True)
        await client.create(PODS, body)
        await client.replace(PODS, body, subresource="status")
        await client.json_patch(PODS, "a", [], "a")
        await client.merge_patch(NODES, "n", {}, subresource="status")
        await client.apply(PODS, body, field_manager="m", subresource="status")
        await client.delete(PODS, "a", "a")
        async with client.watch(PODS, "5", {}, seconds=60, inactivity_seconds=60):
            pass
        assert [(i.verb, i.method, i.resource, i.subresource, i.status, i.dry_run) for i in infos] == [
            ("get", "GET", "pods", None, 200, False),
            ("list", "GET", "pods", None, 200, False),
            ("create", "POST", "pods", None, 200, True),
            ("create", "POST", "pods", None, 200, False),
            ("update", "PUT", "pods", "status", 200, False),
            ("patch", "PATCH", "pods", None, 200, False),
            ("patch", "PATCH", "nodes", "status", 200, False),
            ("apply", "PATCH", "pods", "status", 200, False),
            ("delete", "DELETE", "pods", None, 200, False),
            ("watch", "GET", "pods", None, 200, False),
        ]
        assert all(info.seconds > 0 for info in infos)

    run(tmp_path, test)


def test_bodies_go_out_as_the_kind_they_are_under_the_right_content_type(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(said(pod("a", 1)))
        bare: Object = {"metadata": {"name": "n"}, "spec": {"ü": None}}
        await client.create(NODES, bare)
        await client.apply(NODES, bare, field_manager="me", force=False)
        await client.merge_patch(NODES, "n", {"metadata": {"labels": {"a": None}}})
        await client.json_patch(NODES, "n", [{"op": "remove", "path": "/a"}])
        typed = {"apiVersion": "v1", "kind": "Node", **bare}
        assert server.bodies == [typed, typed, {"metadata": {"labels": {"a": None}}}, [{"op": "remove", "path": "/a"}]]
        assert [request.headers["Content-Type"] for request in server.requests] == [
            "application/json",
            "application/apply-patch+yaml",
            "application/merge-patch+json",
            "application/json-patch+json",
        ]
        assert dict(server.requests[1].query) == {"fieldManager": "me", "force": "false"}
        assert {request.headers["User-Agent"] for request in server.requests} == {"gpu-tenancy"}

    run(tmp_path, test)


def test_no_more_requests_are_in_flight_than_allowed(tmp_path: Path) -> None:
    async def test(server: FakeServer, _: KubeClient) -> None:
        now = most = 0

        async def answer(_: web.BaseRequest) -> web.StreamResponse:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            return said(pod("a", 1))

        server.answer = answer
        async with KubeClient.connect(str(server.kubeconfig), max_in_flight=3) as client:
            await asyncio.gather(*(client.get(PODS, "a", "a") for _ in range(30)))
        assert most == 3

    run(tmp_path, test)


def test_arguments_that_would_do_something_else_never_leave(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        with pytest.raises(ValueError, match="not empty"):
            await client.delete(PODS, "", "a")
        with pytest.raises(ValueError, match="not empty"):
            await client.apply(NODES, {"metadata": {}}, field_manager="m")
        with pytest.raises(ValueError, match="resourceVersion"):
            await client.replace(NODES, {"metadata": {"name": "n"}})
        assert server.requests == []

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [(404, "NotFound", NotFound), (409, "AlreadyExists", AlreadyExists), (422, "Invalid", Rejected)],
)
def test_permanent_errors_are_not_repeated(tmp_path: Path, status: int, reason: str, expected: type[KubeError]) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(refused(status, reason))
        with pytest.raises(expected):
            await client.apply(PODS, pod("a", 1), field_manager="m")
        assert len(server.requests) == 1

    run(tmp_path, test)


def test_a_json_patch_conflict_names_what_was_tested(tmp_path: Path) -> None:
    async def test(server: FakeServer, client: KubeClient) -> None:
        server.answer = in_turn(
            refused(422, "Invalid", "the server rejected our request due to an error in our request")
        )
        with pytest.raises(Conflict, match=r"Node 'n' \(tested: /metadata/generation = 3\)"):
            await client.json_patch(NODES, "n", [{"op": "test", "path": "/metadata/generation", "value": 3}])

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no kubeconfig at"),
        ("a: [", "cannot be used"),
        ("kind: Config", "current-context"),
        ("", "cannot be used"),
    ],
)
def test_an_unusable_kubeconfig_is_rejected_by_name(tmp_path: Path, content: str | None, sentence: str) -> None:
    path = tmp_path / "broken"
    if content is not None:
        path.write_text(content)

    async def test() -> None:
        with pytest.raises(Rejected, match=sentence) as caught:
            await KubeClient.connect(str(path)).open()
        assert str(path) in caught.value.message

    asyncio.run(test())


def test_the_environment_names_the_kubeconfig_where_the_caller_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: FakeServer, _: KubeClient) -> None:
        server.answer = in_turn(said(pod("a", 1)))
        monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{server.kubeconfig}")
        async with KubeClient.connect() as client:
            assert await client.get(PODS, "a", "a") == pod("a", 1)

    run(tmp_path, test)


def test_a_closed_client_fails_as_transient(tmp_path: Path) -> None:
    async def test(_: FakeServer, client: KubeClient) -> None:
        await client.close()
        with pytest.raises(Transient, match="closed by this program"):
            await client.get(PODS, "a", "a")

    run(tmp_path, test)
