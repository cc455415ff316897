"""The store of our own kinds ends in the server's state, whatever order events and lists come in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from gpu_tenancy.kube.client import Object, Objects
from gpu_tenancy.kube.errors import Transient
from gpu_tenancy.kube.resources import GPU_LEASES, GPU_NODES, MINING_POOLS, PODS, Resource
from gpu_tenancy.kube.store import ObjectStore


def lease(name: str, version: int | str, *, uid: str | None = None, value: int = 0, namespace: str = "a") -> Object:
    return {
        "apiVersion": "gpu-tenancy.dev/v1alpha1",
        "kind": "GpuLease",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
            "managedFields": [{"manager": f"m{version}"}],
        },
        "spec": {"value": value},
    }


def trimmed(body: Object) -> Object:
    metadata = {key: value for key, value in body["metadata"].items() if key != "managedFields"}
    return {**body, "metadata": metadata}


class Fixed:
    """A lister that gives the same answer each time, and counts."""

    def __init__(self, items: Objects, version: int | str, *, fails: tuple[Resource, ...] = ()) -> None:
        self.items = items
        self.version = str(version)
        self.fails = fails
        self.listed: list[Resource] = []

    async def list(self, res: Resource) -> tuple[Objects, str]:
        self.listed.append(res)
        if res in self.fails:
            raise Transient(503, "ServiceUnavailable", f"no {res.plural} today")
        return ([dict(item) for item in self.items] if res == GPU_LEASES else []), self.version


def counting() -> tuple[ObjectStore, list[None]]:
    changes: list[None] = []
    return ObjectStore(lambda: changes.append(None), list_interval_seconds=0), changes


def resync(store: ObjectStore, client: Fixed, *, everything: bool = False) -> float | None:
    return asyncio.run(store.resync(client, everything=everything))


def names(store: ObjectStore) -> list[str]:
    return [body["metadata"]["name"] for body in store.all(GPU_LEASES)]


def test_objects_are_sorted_found_and_trimmed() -> None:
    store, _ = counting()
    for namespace, name in (("b", "a"), ("a", "z"), ("a", "b")):
        uid = f"{namespace}/{name}"
        store.put(GPU_LEASES, "ADDED", lease(name, 1, uid=uid, namespace=namespace))
    node = {"metadata": {"name": "n", "uid": "node", "resourceVersion": "1"}}
    store.put(GPU_NODES, "ADDED", node)
    assert [body["metadata"]["uid"] for body in store.all(GPU_LEASES)] == ["a/b", "a/z", "b/a"]
    assert store.get(GPU_LEASES, "a", "z") == trimmed(lease("z", 1, uid="a/z"))
    assert store.get(GPU_LEASES, "a", "a") is None
    assert store.get(GPU_NODES, None, "n") == node
    assert store.by_uid("node") == node
    assert store.by_uid("b/a") == store.get(GPU_LEASES, "b", "a")
    assert store.by_uid("nobody") is None


def test_only_a_real_change_is_told() -> None:
    store, changes = counting()
    store.put(GPU_LEASES, "ADDED", lease("a", 1))
    store.put(GPU_LEASES, "MODIFIED", lease("a", 1))
    store.put(GPU_LEASES, "MODIFIED", lease("a", 2))
    assert len(changes) == 1
    assert store.all(GPU_LEASES)[0]["metadata"]["resourceVersion"] == "2"
    store.put(GPU_LEASES, "MODIFIED", lease("a", 3, value=1))
    store.put(GPU_LEASES, "DELETED", lease("a", 4))
    assert len(changes) == 3
    store.put(GPU_LEASES, "DELETED", lease("a", 4))
    store.put(GPU_LEASES, "MODIFIED", lease("a", 3, value=1))
    assert len(changes) == 3
    assert names(store) == []


def test_an_older_version_does_not_overwrite_and_versions_are_numbers() -> None:
    store, changes = counting()
    store.put(GPU_LEASES, "ADDED", lease("a", 10, value=10))
    store.put(GPU_LEASES, "MODIFIED", lease("a", 9, value=9))
    assert store.all(GPU_LEASES)[0]["spec"]["value"] == 10
    assert len(changes) == 1


def test_versions_that_are_no_numbers_are_taken_as_they_come() -> None:
    store, _ = counting()
    store.put(GPU_LEASES, "ADDED", lease("a", "x9", value=1))
    store.put(GPU_LEASES, "MODIFIED", lease("a", "x10", value=2))
    assert store.all(GPU_LEASES)[0]["spec"]["value"] == 2


def test_of_two_objects_of_one_name_the_later_one_lives() -> None:
    for order in ((0, 1), (1, 0)):
        store, _ = counting()
        bodies = [lease("a", 1, uid="first"), lease("a", 5, uid="second")]
        for index in order:
            store.put(GPU_LEASES, "ADDED", bodies[index])
        assert [body["metadata"]["uid"] for body in store.all(GPU_LEASES)] == ["second"]
        store.put(GPU_LEASES, "MODIFIED", lease("a", 3, uid="first"))
        assert [body["metadata"]["uid"] for body in store.all(GPU_LEASES)] == ["second"]
        store.put(GPU_LEASES, "DELETED", lease("a", 6, uid="second"))
        store.put(GPU_LEASES, "MODIFIED", lease("a", 3, uid="first"))
        assert names(store) == []


def test_what_was_written_is_seen_at_once_and_its_echo_changes_nothing() -> None:
    store, changes = counting()
    store.write_through(lease("a", 7, value=7))
    assert store.all(GPU_LEASES) == [trimmed(lease("a", 7, value=7))]
    store.put(GPU_LEASES, "MODIFIED", lease("a", 6, value=6))
    store.put(GPU_LEASES, "MODIFIED", lease("a", 7, value=7))
    assert store.all(GPU_LEASES) == [trimmed(lease("a", 7, value=7))]
    assert len(changes) == 1


def test_a_written_object_of_a_kind_that_is_not_held_is_refused() -> None:
    store, _ = counting()
    with pytest.raises(ValueError, match="holds no 'Pod' of 'v1'"):
        store.write_through({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "uid": "u"}})
    assert ObjectStore(resources=[PODS]).all(PODS) == []


def test_a_relisting_makes_its_kind_suspect_and_the_ghost_goes() -> None:
    store, changes = counting()
    client = Fixed([lease("a", 1), lease("b", 2)], 5)
    before = store.synced
    resync(store, client, everything=True)
    assert (before, store.synced) == (False, True)
    assert names(store) == ["a", "b"]
    client.items, client.version = [lease("a", 1)], "9"
    client.listed.clear()
    changes.clear()
    assert resync(store, client) is None
    assert client.listed == []
    store.put(GPU_LEASES, None, lease("a", 1))
    assert GPU_LEASES in store.suspect
    assert names(store) == ["a", "b"]
    assert resync(store, client) is None
    assert client.listed == [GPU_LEASES]
    assert (names(store), len(changes)) == (["a"], 1)
    assert not store.suspect


def test_a_relisting_of_new_objects_alone_is_suspect_too() -> None:
    store, _ = counting()
    store.put(GPU_LEASES, None, lease("a", 1))
    assert not store.suspect  # the first listing
    store.put(GPU_LEASES, "MODIFIED", lease("a", 2))
    store.put(GPU_LEASES, None, lease("b", 8))
    assert GPU_LEASES in store.suspect
    resync(store, Fixed([lease("b", 8)], 9))
    assert names(store) == ["b"]


def test_a_relisting_after_a_list_of_our_own_is_suspect_whatever_it_reports() -> None:
    store, _ = counting()
    resync(store, Fixed([lease("a", 1)], 5), everything=True)
    store.put(GPU_LEASES, None, lease("b", 8))
    assert GPU_LEASES in store.suspect


def test_a_burst_of_doubts_is_one_list_and_says_when_to_come_back() -> None:
    now = 100.0
    store = ObjectStore(list_interval_seconds=5, clock=lambda: now)
    client = Fixed([lease("a", 1)], 5)
    resync(store, client, everything=True)
    client.listed.clear()
    store.put(GPU_LEASES, None, lease("a", 1))
    now = 102.0
    assert resync(store, client) == 3.0
    assert client.listed == []
    now = 105.0
    assert resync(store, client) is None
    assert client.listed == [GPU_LEASES]
    store.put(GPU_LEASES, None, lease("a", 1))
    assert resync(store, client, everything=True) is None


def test_a_kind_that_cannot_be_listed_stays_suspect_and_the_others_are_done() -> None:
    store, _ = counting()
    client = Fixed([lease("a", 1)], 5, fails=(MINING_POOLS,))
    with pytest.raises(Transient, match="no miningpools today"):
        resync(store, client, everything=True)
    assert names(store) == ["a"]
    before = store.synced
    assert store.suspect == (MINING_POOLS,)
    client.fails = ()
    client.listed.clear()
    resync(store, client)
    assert client.listed == [MINING_POOLS]
    assert (before, store.synced) == (False, True)


def test_a_server_restored_from_a_backup_is_believed() -> None:
    store, changes = counting()
    resync(store, Fixed([lease("a", 40, value=4), lease("b", 50)], 60), everything=True)
    store.put(GPU_LEASES, "DELETED", lease("b", 61))
    changes.clear()
    backup = Fixed([lease("a", 20, value=2), lease("b", 30)], 35)
    resync(store, backup, everything=True)
    assert store.all(GPU_LEASES) == [trimmed(lease("a", 20, value=2)), trimmed(lease("b", 30))]
    assert len(changes) == 1
    store.put(GPU_LEASES, "MODIFIED", lease("a", 36, value=3))
    assert store.all(GPU_LEASES)[0]["spec"]["value"] == 3


def test_memory_of_the_deleted_is_bounded() -> None:
    store = ObjectStore(tombstones=3)
    for number in range(50):
        store.put(GPU_LEASES, "DELETED", lease(f"l{number}", number))
    assert len(store._kinds[GPU_LEASES]._tombstones) == 3
    store.put(GPU_LEASES, "MODIFIED", lease("l49", 1))
    assert names(store) == []


# ------------------------------------------------------------------------------------------------ a server to follow


class Server:
    """What an API server holds, and what it tells its watchers, object by object."""

    def __init__(self, *, numeric: bool) -> None:
        self.numeric = numeric
        self.revision = 0
        self.births = 0
        self.objects: dict[str, Object] = {}
        self.undelivered: dict[str, list[tuple[str | None, Object]]] = {}
        self.delivered: list[tuple[str | None, Object]] = []
        self.list_began = asyncio.Event()
        self.take = asyncio.Event()
        self.give = asyncio.Event()

    def version(self) -> str:
        return str(self.revision) if self.numeric else f"v{self.revision}"

    def write(self, name: str, value: int) -> None:
        """Create or change."""
        self.revision += 1
        old = self.objects.get(name)
        if old is None:
            self.births += 1
        uid = old["metadata"]["uid"] if old else f"{name}#{self.births}"
        body = lease(name, self.version(), uid=uid, value=value)
        self.objects[name] = body
        self._tell("MODIFIED" if old else "ADDED", body)

    def delete(self, name: str) -> None:
        body = self.objects.pop(name, None)
        if body is None:
            return
        self.revision += 1
        self._tell("DELETED", lease(name, self.version(), uid=body["metadata"]["uid"], value=body["spec"]["value"]))

    def _tell(self, kind: str | None, body: Object) -> None:
        self.undelivered.setdefault(body["metadata"]["uid"], []).append((kind, body))

    def break_watch(self) -> None:
        """Undelivered events are lost; the watcher lists and reports what there is."""
        self.undelivered.clear()
        for body in self.objects.values():
            self._tell(None, body)

    def next_event(self, choice: int) -> tuple[str | None, Object] | None:
        """The next event of one of the objects: order holds within an object only."""
        if not self.undelivered:
            return None
        uid = sorted(self.undelivered)[choice % len(self.undelivered)]
        queue = self.undelivered[uid]
        happened = queue.pop(0)
        if not queue:
            del self.undelivered[uid]
        self.delivered.append(happened)
        return happened

    async def list(self, res: Resource) -> tuple[Objects, str]:
        if res != GPU_LEASES:
            return [], self.version()
        self.list_began.set()
        await self.take.wait()
        snapshot = list(self.objects.values()), self.version()
        await self.give.wait()
        return snapshot

    def state(self) -> Objects:
        return [trimmed(self.objects[name]) for name in sorted(self.objects)]


class Play:
    """A store, the server it follows, and what must hold at every moment."""

    def __init__(self, *, numeric: bool, tombstones: int, everything: bool = True) -> None:
        self.server = Server(numeric=numeric)
        self.everything = everything
        self.remembers = tombstones >= 1000
        self.told: Objects = []
        self.store = ObjectStore(self._on_change, list_interval_seconds=0, tombstones=tombstones)
        self.buried: set[str] = set()
        self.newest: dict[str, int] = {}
        self.listing: asyncio.Task[float | None] | None = None

    def _on_change(self) -> None:
        self.told = self._substance()

    def _substance(self) -> Objects:
        """The view without resourceVersions."""
        return [
            {**body, "metadata": {**body["metadata"], "resourceVersion": ""}} for body in self.store.all(GPU_LEASES)
        ]

    async def step(self, op: tuple[str, int, int]) -> None:
        kind, choice, value = op
        name = "abc"[choice % 3]
        match kind:
            case "write":
                self.server.write(name, value)
            case "delete":
                self.server.delete(name)
            case "deliver":
                self.deliver(choice)
            case "replay" if self.server.delivered:
                self.put(*self.server.delivered[choice % len(self.server.delivered)])
            case "write_through" if name in self.server.objects:
                self.store.write_through(self.server.objects[name])
            case "break":
                self.server.break_watch()
            case "list" | "snapshot" | "answer":
                await self.advance_list(kind, everything=self.everything)
            case _:
                pass  # nothing there to do it to
        self.check()

    def deliver(self, choice: int) -> None:
        if (happened := self.server.next_event(choice)) is not None:
            self.put(*happened)

    def put(self, kind: str | None, body: Object) -> None:
        self.store.put(GPU_LEASES, kind, body)
        if kind == "DELETED":
            self.buried.add(body["metadata"]["uid"])

    async def advance_list(self, kind: str, *, everything: bool) -> None:
        """Start a resync, let the server read, or let the answer arrive; other things happen in between."""
        if kind == "list" and self.listing is None:
            self.server.take.clear()
            self.server.give.clear()
            self.listing = asyncio.create_task(self.store.resync(self.server, everything=everything))
        elif kind == "snapshot":
            self.server.take.set()
        elif kind == "answer" and self.server.take.is_set():
            self.server.give.set()
        for _ in range(5):
            await asyncio.sleep(0)
        if self.listing is not None and self.listing.done():
            self.listing.result()
            self.listing = None

    async def finish_list(self) -> None:
        if self.listing is not None:
            self.server.take.set()
            self.server.give.set()
            await self.listing
            self.listing = None
        self.check()

    def check(self) -> None:
        view = self.store.all(GPU_LEASES)
        keys = [body["metadata"]["name"] for body in view]
        assert keys == sorted(set(keys)), "one object per name, in order"
        assert self.told == self._substance(), "no difference goes untold"
        for body in view:
            uid = body["metadata"]["uid"]
            assert self.store.by_uid(uid) is body
            assert self.store.get(GPU_LEASES, "a", body["metadata"]["name"]) is body
            if self.remembers:
                assert uid not in self.buried, "the dead stay dead"
            if self.server.numeric and self.remembers:
                version = int(body["metadata"]["resourceVersion"])
                assert version >= self.newest.get(uid, 0), "nothing gets older"
                self.newest[uid] = version


# ------------------------------------------------------------------------------ while a list is under way


def during_a_list(game: Play, happens: Callable[[], None]) -> None:
    """`happens` after the server has read its objects for a full resync and before the answer arrives."""

    async def run() -> None:
        await game.advance_list("list", everything=True)
        await game.advance_list("snapshot", everything=True)
        happens()
        await game.finish_list()

    asyncio.run(run())


def play(*, numeric: bool, tombstones: int = 10_000, existing: str = "a") -> Play:
    """A store that has seen the objects `existing`."""
    game = Play(numeric=numeric, tombstones=tombstones)
    for name in existing:
        game.server.write(name, 1)
        game.deliver(0)
    return game


@pytest.mark.parametrize("numeric", [True, False])
def test_what_was_created_during_a_list_is_not_taken_for_a_ghost(numeric: bool) -> None:
    game = play(numeric=numeric)

    def happens() -> None:
        game.server.write("b", 2)
        game.deliver(0)

    during_a_list(game, happens)
    assert names(game.store) == ["a", "b"]


@pytest.mark.parametrize("numeric", [True, False])
@pytest.mark.parametrize("tombstones", [0, 10_000])
def test_what_was_deleted_during_a_list_does_not_come_back_with_it(numeric: bool, tombstones: int) -> None:
    game = play(numeric=numeric, tombstones=tombstones)

    def happens() -> None:
        game.server.delete("a")
        game.deliver(0)

    during_a_list(game, happens)
    assert names(game.store) == []


@pytest.mark.parametrize("numeric", [True, False])
def test_what_was_changed_during_a_list_keeps_its_change(numeric: bool) -> None:
    game = play(numeric=numeric)

    def happens() -> None:
        game.server.write("a", 2)
        game.deliver(0)

    during_a_list(game, happens)
    assert game.store.all(GPU_LEASES) == game.server.state()


@pytest.mark.parametrize("numeric", [True, False])
def test_what_took_a_name_over_during_a_list_keeps_it(numeric: bool) -> None:
    game = play(numeric=numeric)

    def happens() -> None:
        game.server.delete("a")
        game.server.break_watch()  # so that the deletion is never reported
        game.server.write("a", 2)
        game.deliver(0)

    during_a_list(game, happens)
    assert game.store.all(GPU_LEASES) == game.server.state()


def test_a_doubt_cast_during_a_list_is_not_settled_by_it() -> None:
    game = play(numeric=True, existing="ab")

    def happens() -> None:
        game.server.delete("a")
        game.server.break_watch()
        game.deliver(0)

    during_a_list(game, happens)
    assert names(game.store) == ["a", "b"]
    assert game.store.suspect == (GPU_LEASES,)


def test_a_list_that_is_cancelled_leaves_the_doubt() -> None:
    game = play(numeric=True)
    game.store.put(GPU_LEASES, None, game.server.objects["a"])

    async def run() -> None:
        task = asyncio.create_task(game.store.resync(game.server))
        await game.server.list_began.wait()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert game.store.suspect == (GPU_LEASES,)


# --------------------------------------------------------------------------------------------- any interleaving


OPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write"] * 4
            + ["deliver"] * 5
            + ["delete", "list", "snapshot", "answer"] * 2
            + ["replay", "write_through", "break"]
        ),
        st.integers(0, 40),
        st.integers(0, 9),
    ),
    min_size=15,
    max_size=50,
)


@given(OPS, st.booleans(), st.sampled_from([0, 1, 10_000]))
def test_whatever_happened_one_full_resync_gives_the_servers_state(
    ops: list[tuple[str, int, int]], numeric: bool, tombstones: int
) -> None:
    async def run() -> None:
        game = Play(numeric=numeric, tombstones=tombstones)
        for op in ops:
            await game.step(op)
        await game.finish_list()
        game.server.take.set()
        game.server.give.set()
        await game.store.resync(game.server, everything=True)
        game.check()
        assert game.store.all(GPU_LEASES) == game.server.state()
        assert game.store.suspect == ()

    asyncio.run(run())


@given(OPS)
def test_without_a_broken_watch_the_events_alone_give_the_servers_state(ops: list[tuple[str, int, int]]) -> None:
    """In whatever order between objects, with repetitions of old events and lists in between."""

    async def run() -> None:
        game = Play(numeric=True, tombstones=10_000)
        for op in ops:
            if op[0] != "break":
                await game.step(op)
        await game.finish_list()
        while game.server.undelivered:
            game.deliver(0)
            game.check()
        assert game.store.all(GPU_LEASES) == game.server.state()

    asyncio.run(run())


@given(OPS)
def test_after_a_broken_watch_the_doubt_it_casts_is_enough(ops: list[tuple[str, int, int]]) -> None:
    """No full resync here, except the one at the start and where a break left nothing to report."""

    async def run() -> None:
        game = Play(numeric=True, tombstones=10_000, everything=False)
        await game.advance_list("list", everything=True)
        await game.finish_list()
        silent = False
        for op in ops:
            await game.step(op)
            if op[0] == "break":
                silent = not game.server.objects
        await game.finish_list()
        while game.server.undelivered:
            game.deliver(0)
        game.server.take.set()
        game.server.give.set()
        event("a break left nothing to report" if silent else "every break was reported")
        await game.store.resync(game.server, everything=silent)
        game.check()
        assert game.store.all(GPU_LEASES) == game.server.state()

    asyncio.run(run())
