"""The loop's own word on whether it can be relied on, when it turns, and what it counts of what it did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

import pytest

from gpu_tenancy.api.tenant import Quota
from gpu_tenancy.controller import cycle as module
from gpu_tenancy.controller.cycle import BROKEN_CYCLES, LONGEST_COALESCING, LONGEST_UNLISTED, STUCK_SECONDS, Cycle
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.outcome import Outcome
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.core.actions import Admit, Plan
from gpu_tenancy.core.snapshot import Failure, Snapshot, TenantDefaults
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import Transient
from gpu_tenancy.kube.resources import Resource
from tests.unit.controller.facts import NOW, Object, body, lease


class Clock:
    """Time as the loop sees it: it stands still unless a test lets it pass."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.work = 0.0
        """Seconds of processor time that were used."""

    def monotonic(self) -> float:
        return self.seconds

    def process_time(self) -> float:
        return self.work

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(module, "time", one)
    return one


class Loop(Cycle):
    """A loop whose cycles do nothing, or fail."""

    def __init__(self, clock: Clock | None = None, **settings: int) -> None:
        now = (clock or Clock()).now
        super().__init__(KubeClient.connect("/nowhere"), Settings.model_validate(settings), Metrics(), now)
        self.fails = False
        self.turns = 0

    async def _first_sight(self) -> None:
        self.dirty.set()

    async def _turn(self) -> datetime | None:
        self.turns += 1
        self.dirty.set()
        if self.fails:
            raise RuntimeError("one object is odd")
        self.cycles += 1
        return None

    async def turn(self, times: int) -> None:
        """Run until so many cycles have begun and the last one has ended."""
        until = self.turns + times
        loop = asyncio.create_task(self._turn_forever())
        while self.turns <= until:
            await asyncio.sleep(0)
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


def test_an_operator_whose_cycles_all_fail_is_not_ready_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.0)

    async def story() -> None:
        loop = Loop()
        assert loop.unready() == "no cycle has been through yet"
        await loop.turn(1)
        assert "came to no end" not in loop.unready()
        loop.fails = True
        await loop.turn(BROKEN_CYCLES)
        assert loop.unready().endswith("cycles came to no end; see the log")
        loop.fails = False
        await loop.turn(1)
        assert "came to no end" not in loop.unready()

    asyncio.run(story())


@pytest.fixture
def loop(clock: Clock) -> Loop:
    """A loop that has been through a cycle a moment ago."""
    one = Loop(clock)
    one.cycles = 1
    return one


def test_a_loop_is_called_dead_once_no_cycle_has_begun_or_ended_for_long(clock: Clock, loop: Loop) -> None:
    clock.seconds += STUCK_SECONDS
    assert (loop.trouble(), loop.unready()) == ("", "")
    clock.seconds += 1
    why = "no cycle has begun or ended for 61 s"
    assert (loop.trouble(), loop.unready()) == (why, why)
    loop._live()
    assert (loop.trouble(), loop.unready()) == ("", "")


def test_a_loop_that_has_nothing_to_do_until_later_is_not_called_dead_and_wakes_on_time(
    clock: Clock, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, said, quiet = clock.now(), set[str](), timedelta(seconds=5 * STUCK_SECONDS + 7)

    async def nothing_happens(event: Coroutine[Any, Any, bool], seconds: float) -> None:
        event.close()
        clock.seconds += seconds
        said.add(loop.trouble())
        raise TimeoutError

    monkeypatch.setattr(module, "asyncio", Seen(wait_for=nothing_happens))
    asyncio.run(loop._wait(began + quiet))
    assert said == {""}
    assert clock.now() - began == quiet


@pytest.mark.parametrize(("resync", "longest"), [(5, LONGEST_UNLISTED), (60, LONGEST_UNLISTED), (100, 300)])
def test_an_operator_that_may_not_list_its_own_kinds_is_not_ready_and_yet_alive(
    clock: Clock, resync: int, longest: int
) -> None:
    loop = Loop(clock, resync_seconds=resync)
    loop.cycles = 1
    clock.seconds += longest
    loop._live()
    assert loop.unready() == ""
    clock.seconds += 1
    why = f"the API server has not let everything be listed for {longest + 1:.0f} s; see the log"
    assert (loop.unready(), loop.trouble()) == (why, "")


def test_an_operator_one_of_whose_views_is_not_kept_up_is_not_ready_and_yet_alive(loop: Loop) -> None:
    loop.views.pods.last_error = Transient(0, "Unreachable", "no answer")
    assert (loop.unready(), loop.trouble()) == (f"pods: {loop.views.pods.last_error}", "")
    assert "no answer" in loop.unready()


# --- when it turns -----------------------------------------------------------------------------------------------


class Seen:
    """asyncio as the loop sees it, but for what a test puts in its place."""

    def __init__(self, **replaced: Callable[..., object]) -> None:
        self._replaced = replaced

    def __getattr__(self, name: str) -> object:
        return self._replaced.get(name) or getattr(asyncio, name)


class Quiet(Loop):
    """A loop that nothing wakes but events from outside."""

    async def _turn(self) -> datetime | None:
        self.turns += 1
        return None


def test_events_that_pour_in_during_the_pause_are_one_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        loop, over = Quiet(), asyncio.Event()

        async def pause(seconds: float) -> None:
            await (over.wait() if seconds >= loop._settings.coalesce_ms / 1000 else asyncio.sleep(0))

        monkeypatch.setattr(module, "asyncio", Seen(sleep=pause))
        turning = asyncio.create_task(loop._turn_forever())
        for _ in range(100):
            loop.dirty.set()
            await asyncio.sleep(0)
        over.set()
        for _ in range(100):
            await asyncio.sleep(0)
        turning.cancel()
        assert loop.turns == 1

    asyncio.run(story())


@pytest.mark.parametrize(
    ("coalesce_ms", "pauses"),
    [
        (20, [0.02, 0.02, 0.1, 0.3, LONGEST_COALESCING]),
        (200, [0.2, 0.2, 0.2, 0.3, LONGEST_COALESCING]),
        (1000, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_pause_is_as_long_as_the_last_cycle_was_work_within_its_bounds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, coalesce_ms: int, pauses: list[float]
) -> None:
    work, taken = [0.0, 0.1, 0.3, 7.0, 0.0], list[float]()

    class Busy(Loop):
        async def _turn(self) -> datetime | None:
            clock.work += work[self.turns]
            return await super()._turn()

    async def pause(seconds: float) -> None:
        taken.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "asyncio", Seen(sleep=pause))
    asyncio.run(Busy(clock, coalesce_ms=coalesce_ms).turn(len(work) - 1))
    assert taken[: len(work)] == pytest.approx(pauses)


# --- what it does ------------------------------------------------------------------------------------------------


class Shop(Cycle):
    """A loop that would lease without a price for as long as it knows of no PriceBook."""

    def __init__(self) -> None:
        super().__init__(KubeClient.connect("/nowhere"), Settings(), Metrics())
        self._client = self  # type: ignore[assignment]  # answers the one question that is asked

    async def list(self, res: Resource) -> tuple[list[Object], str]:
        """The API server has a book of which no watch has told."""
        spec = {"currency": "RUB", "effectiveFrom": "2026-01-01T00:00:00Z", "rates": []}
        return [body(res.kind, "list", None, spec=spec)], "7"

    def _plan(self, snapshot: Snapshot, now: datetime) -> Plan:  # noqa: ARG002  (as in Cycle)
        return Plan() if snapshot.books else Plan(actions=(Admit(lease(), 1, None),))


def test_nothing_is_leased_unpriced_before_the_api_server_was_asked_for_price_books() -> None:
    async def story() -> None:
        shop = Shop()
        snapshot, plan = await shop._decide(Snapshot(), NOW)
        assert [book.name for book in snapshot.books] == ["list"]
        assert plan == Plan()

    asyncio.run(story())


class Says(Cycle):
    """A loop whose API server takes every status and knows nothing else."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(self, Settings(), metrics, lambda: NOW)  # type: ignore[arg-type]  # answers what is asked

    async def replace(self, _: Resource, body: Object, *, subresource: str) -> Object:
        """What is stored is what was sent."""
        assert subresource == "status"
        version = str(int(body["metadata"]["resourceVersion"]) + 1)
        return {**body, "metadata": {**body["metadata"], "resourceVersion": version}}


def test_a_transition_of_a_lease_is_counted_once_by_its_reason() -> None:
    metrics = Metrics()

    def counted() -> float | None:
        return metrics.registry.get_sample_value("gpu_tenancy_lease_transitions_total", {"reason": "ApiRejected"})

    async def story() -> list[float | None]:
        loop = Says(metrics)
        wanted = body("GpuLease", "train", spec={"gpus": {"profile": "full"}})
        loop.views.store.put(resources.GPU_LEASES, "ADDED", wanted)
        refused = Failure("ApiRejected", "exceeded quota: jobs", NOW + timedelta(hours=1))
        counts = []
        for outcome in (Outcome(), Outcome(refused={"uid-train": refused}), Outcome()):
            loop._remember(outcome, loop._snapshot(NOW))
            await loop._turn()
            counts.append(counted())
        return counts

    assert asyncio.run(story()) == [None, 1.0, 1.0]


def test_a_tenant_is_told_what_became_of_it_and_that_is_not_written_again() -> None:
    metrics = Metrics()

    async def story() -> list[Object]:
        loop = Says(metrics)
        loop.views.store.put(
            resources.GPU_TENANTS, "ADDED", body("GpuTenant", "acme", None, spec={"namespaces": ["a"]})
        )
        statuses = []
        for _ in range(2):
            await loop._turn()
            stored = loop.views.store.get(resources.GPU_TENANTS, None, "acme")
            assert stored is not None
            statuses.append({"version": stored["metadata"]["resourceVersion"], **stored["status"]})
        return statuses

    first, second = asyncio.run(story())
    assert first["conditions"][0]["reason"] == "Serving"
    assert first["holds"] == {"gpus": 0, "memorySlices": 0, "computeSlices": 0}
    assert first["share"]["sliceHours"] == "0.00"
    assert second == first
    assert metrics.registry.get_sample_value("gpu_tenancy_tenant_share", {"tenant": "acme"}) == 0


def test_what_the_settings_say_of_tenants_is_in_the_snapshot(clock: Clock) -> None:
    given = {"default_quota_gpus": 4, "default_quota_memory_slices": 40, "default_quota_compute_slices": 30}
    loop = Loop(clock, usage_half_life_hours=48, **given)
    found = loop._snapshot(NOW).tenant_defaults
    quota = Quota(gpus=4, memory_slices=40, compute_slices=30)
    assert found == TenantDefaults(quota, None, timedelta(hours=48))
    assert Loop(clock)._snapshot(NOW).tenant_defaults == TenantDefaults()
