"""The loop: gather → plan → execute → report, once for the whole cluster, whenever something changed.

Events only set a flag; the flag is coalesced for some milliseconds, on a large cluster for as long as a cycle is work;
time wakes the loop through the plan's next_wake.
Nothing is remembered between cycles that a restarted process would miss.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.api.lease import GpuLeaseStatus, Reason
from gpu_tenancy.api.pool import MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantStatus, Quota
from gpu_tenancy.controller.events import platform_transitions, transitions
from gpu_tenancy.controller.execute import Execute
from gpu_tenancy.controller.gather import Gather
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.outcome import Outcome
from gpu_tenancy.controller.settings import Conversion, Settings
from gpu_tenancy.controller.statuses import Statuses
from gpu_tenancy.controller.vetting import Vetting
from gpu_tenancy.controller.views import Views
from gpu_tenancy.core import planner, platform_status
from gpu_tenancy.core.actions import Admit, Plan
from gpu_tenancy.core.pricing import pricing
from gpu_tenancy.core.snapshot import (
    ConversionRules,
    Failure,
    Key,
    LeaseFacts,
    NodeFacts,
    Snapshot,
    SpotLimits,
    TenantDefaults,
)
from gpu_tenancy.core.spot import beneficiary_of
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import Conflict, KubeError, NotFound
from gpu_tenancy.kube.events import Events, Note
from gpu_tenancy.kube.resources import Resource

COMPONENT: Final = "gpu-tenancy-operator"
"""Who says what Events say."""
_log = logging.getLogger(__name__)

SHORTEST_PAUSE: Final = 0.2
LONGEST_PAUSE: Final = 10.0
"""Seconds before a cycle is tried again after an error: doubled from the shortest to the longest."""
CONFLICTS_AT_ONCE: Final = 3
"""Cycles in a row that a conflict repeats at once; after that the view is given time to catch up."""
LONGEST_COALESCING: Final = 0.5
"""Seconds that a cycle waits at most because the last one was much work."""
STUCK_SECONDS: Final = 60.0
"""A cycle that takes longer is reported as dead."""
BROKEN_CYCLES: Final = 3
"""So many cycles in a row that came to no end make the operator unready."""
LONGEST_UNLISTED: Final = 180.0
"""Seconds without a listing of everything, or three of its periods, after which what is known may be long out of
date."""
PlatformStatus = MiningPoolStatus | PriceBookStatus | GpuTenantStatus
LEFT_ALONE: Final = "It is left as it is, and so is what depends on it, until it can be read."


class Cycle:
    """The operator's one loop."""

    def __init__(
        self,
        client: KubeClient,
        settings: Settings,
        metrics: Metrics,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.dirty = asyncio.Event()
        self.views = Views(client, settings.system_namespace, self.dirty.set)
        self.events = Events(client, COMPONENT, enabled=settings.events)
        self.cycles = 0
        """Completed cycles."""
        self._client = client
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._gather = gather_of(self.views, settings)
        self._vetting = Vetting(client)
        self._asking: set[asyncio.Task[None]] = set()
        self._execute = Execute(client, self.views.store, settings, self.events.post, self._live)
        self._failures: dict[str, tuple[int, Failure]] = {}
        self._statuses = Statuses()
        self._beat = time.monotonic()
        self._errors = 0
        """Cycles in a row that left something undone."""
        self._broken = 0
        """Cycles in a row that came to no end."""
        self._listed = time.monotonic()
        """When everything was listed anew last."""
        self._told: set[tuple[str, str]] = set()
        """UIDs of objects that cannot be read, and what was said of them."""

    async def run(self) -> None:
        """Keep the cluster as planned until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.views.run())
            group.create_task(self.events.run())
            group.create_task(self._resync())
            group.create_task(self._turn_forever())

    def unready(self) -> str:
        """Why the operator must not be relied on, as a sentence; empty while it can."""
        if self.cycles == 0:
            return "no cycle has been through yet"
        if self._broken >= BROKEN_CYCLES:
            return f"the last {self._broken} cycles came to no end; see the log"
        unlisted = time.monotonic() - self._listed
        if unlisted > max(LONGEST_UNLISTED, 3 * self._settings.resync_seconds):
            return f"the API server has not let everything be listed for {unlisted:.0f} s; see the log"
        return self.trouble() or self.views.trouble()

    def trouble(self) -> str:
        """Why the loop must be called dead, as a sentence; empty while it lives."""
        silent = time.monotonic() - self._beat
        return f"no cycle has begun or ended for {silent:.0f} s" if silent > STUCK_SECONDS else ""

    async def _turn_forever(self) -> None:
        await self._first_sight()
        wake: datetime | None = None
        work = 0.0
        while True:
            await self._wait(wake)
            # As long as the last cycle was work for the processor: events that pour in keep half a core busy at most.
            await asyncio.sleep(max(self._settings.coalesce_ms / 1000, min(work, LONGEST_COALESCING)))
            self.dirty.clear()
            began = time.process_time()
            try:
                wake = await self._turn()
                self._broken = 0
            except KubeError as error:
                self._broken += 1
                await self._pause(f"Cycle ended by the API server: {error}")
            except Exception:  # noqa: BLE001  (one bad cycle must not end the loop: logged, counted, tried again)
                self._broken += 1
                _log.exception("Cycle failed.")
                await self._pause("")
            work = time.process_time() - began
            self._beat = time.monotonic()

    async def _first_sight(self) -> None:
        """Until everything was seen once nothing is decided."""
        while True:
            try:
                await self.views.store.resync(self._client, everything=True)
                break
            except KubeError as error:
                await self._pause(f"The first listing failed: {error}")
        synced = asyncio.create_task(self.views.synced())
        while not (await asyncio.wait({synced}, timeout=1.0))[0]:
            self._beat = time.monotonic()
        self.dirty.set()

    async def _pause(self, message: str) -> None:
        if message:
            _log.warning(message)
        self._metrics.failures.inc()
        self._errors += 1
        await asyncio.sleep(self._back_off())
        self._beat = time.monotonic()
        self.dirty.set()

    def _back_off(self) -> float:
        return min(LONGEST_PAUSE, SHORTEST_PAUSE * 2.0 ** min(self._errors, 10))

    async def _wait(self, wake: datetime | None) -> None:
        """Until something changed, or `wake`; the loop shows that it lives at least twice before it counts as dead."""
        while not self.dirty.is_set():
            seconds = STUCK_SECONDS / 3
            if wake is not None:
                seconds = min(seconds, max(0.0, (wake - self._now()).total_seconds()))
            try:
                await asyncio.wait_for(self.dirty.wait(), seconds)
            except TimeoutError:
                self._beat = time.monotonic()
                if wake is not None and self._now() >= wake:
                    return

    async def _turn(self) -> datetime | None:
        """One cycle; when to run the next one though nothing happens."""
        began = time.monotonic()
        self._beat = began
        doubtful_for = await self.views.store.resync(self._client)
        now = self._now()
        snapshot = self._snapshot(now)
        self._tell_unread()
        for lease in self._vetting.due(snapshot.leases):
            task = asyncio.create_task(self._vet(lease))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        self._metrics.account(snapshot, now)
        snapshot, plan = await self._decide(snapshot, now)
        self._metrics.count_plan(plan)
        statuses = self._statuses.changing(plan, snapshot.failures, now)
        outcome = await self._execute.run(plan.actions, statuses, now)
        self._remember(outcome, snapshot)
        await self._report(snapshot, plan, statuses, outcome, now)
        await self._execute.finish(plan.actions, outcome, now)
        self.cycles += 1
        seconds = time.monotonic() - began
        self._metrics.cycles.observe(seconds)
        self._statuses.paced(timedelta(seconds=seconds))
        pauses = (doubtful_for, outcome.again, self._vetting.again, self._undone_for(outcome))
        wakes = [
            plan.next_wake,
            self._statuses.wake,
            *(now + timedelta(seconds=pause) for pause in pauses if pause is not None),
        ]
        return min((wake for wake in wakes if wake is not None), default=None)

    async def _decide(self, snapshot: Snapshot, now: datetime) -> tuple[Snapshot, Plan]:
        """The plan, and the snapshot it was made from.

        Nothing is leased free of charge because a watch has not told yet of a PriceBook: the API server is asked first.
        """
        plan = self._plan(snapshot, now)
        if any(isinstance(action, Admit) and action.price is None for action in plan.actions):
            await self.views.store.refresh(self._client, resources.PRICE_BOOKS)
            snapshot = self._snapshot(now)
            plan = self._plan(snapshot, now)
        return snapshot, plan

    def _plan(self, snapshot: Snapshot, now: datetime) -> Plan:
        with self._metrics.planning.time():
            return planner.plan(snapshot, now)

    def _undone_for(self, outcome: Outcome) -> float | None:
        """Seconds until what was left undone is tried again; None where nothing was, or a lease or pool is to blame."""
        if not (outcome.conflict or outcome.trouble):
            self._errors = 0
            return None
        self._errors += 1
        if outcome.trouble:
            self._metrics.failures.inc()
        elif self._errors <= CONFLICTS_AT_ONCE:
            return 0.0
        return self._back_off()

    def _live(self) -> None:
        self._beat = time.monotonic()

    async def _vet(self, lease: LeaseFacts) -> None:
        """Ask the API server about a template beside the cycle."""
        if await self._vetting.ask(lease):
            self.dirty.set()

    def _snapshot(self, now: datetime) -> Snapshot:
        failures = {uid: failure for uid, (_, failure) in self._failures.items()}
        return self._gather.snapshot(now, self._vetting.verdicts, failures)

    def _tell_unread(self) -> None:
        """What cannot be read is counted, and told once by an Event on it: its status is left as it is."""
        unread = self._gather.unread
        self._metrics.show_unreadable(Counter(one.body["kind"] for one in unread))
        for one in unread:
            if (one.body["metadata"]["uid"], one.why) not in self._told:
                resource = next(kind for kind in resources.OWN_KINDS if kind.kind == one.body["kind"])
                self.events.post(resource, one.body, "Warning", str(Reason.UNREADABLE), f"{one.why}. {LEFT_ALONE}")
        self._told = {(one.body["metadata"]["uid"], one.why) for one in unread}

    def _remember(self, outcome: Outcome, snapshot: Snapshot) -> None:
        """Keep refusals until they are due again or their object changed."""
        generations = {lease.uid: lease.generation for lease in snapshot.leases}
        generations |= {pool.uid: pool.generation for pool in snapshot.pools}
        self._failures = {
            uid: (generation, failure)
            for uid, (generation, failure) in self._failures.items()
            if generations.get(uid) == generation and failure.retry_at > self._now()
        }
        for uid, failure in outcome.refused.items():
            if uid in generations:
                self._failures[uid] = (generations[uid], failure)
                self.dirty.set()

    # --- report

    async def _report(
        self,
        snapshot: Snapshot,
        plan: Plan,
        statuses: Mapping[str, GpuLeaseStatus],
        outcome: Outcome,
        now: datetime,
    ) -> None:
        leases = {lease.uid: lease for lease in snapshot.leases if not lease.unreadable}
        writes = [
            self._report_lease(leases[uid], status, outcome, leases, now)
            for uid, status in statuses.items()
            if uid not in outcome.failed and not self._statuses.is_said(uid)
        ]
        for one in plan.pools:
            new = platform_status.pool_status(one, snapshot.failures.get(one.pool.uid), now)
            writes.append(self._report_plain(resources.MINING_POOLS, one.pool.key, one.pool.status, new, outcome))
        prices = pricing(snapshot.books, now)
        for book in snapshot.books:
            new_book = platform_status.book_status(book, prices, now)
            writes.append(self._report_plain(resources.PRICE_BOOKS, Key("", book.name), book.status, new_book, outcome))
        for tenant in plan.tenants:
            status, name = platform_status.tenant_status(tenant, now), Key("", tenant.tenant.name)
            writes.append(self._report_plain(resources.GPU_TENANTS, name, tenant.tenant.status, status, outcome))
        writes += [self._mark(node, outcome, now) for node in snapshot.nodes]
        await asyncio.gather(*writes)
        self._statuses.keep(leases.keys())
        self._metrics.show_tenants(plan.tenants)
        self._metrics.show_leases(self._statuses.states())

    async def _report_lease(
        self, lease: LeaseFacts, new: GpuLeaseStatus, outcome: Outcome, leases: Mapping[str, LeaseFacts], now: datetime
    ) -> None:
        """`leases`: all there are, by UID."""
        body = self.views.store.get(resources.GPU_LEASES, lease.key.namespace, lease.key.name)
        if body is None or body["metadata"]["uid"] != lease.uid:
            return
        wire = new.to_wire()
        if body.get("status") != wire and not (
            self._statuses.is_due(lease, new, now) and await self._write(resources.GPU_LEASES, body, wire, outcome)
        ):
            return
        self._statuses.stored(lease.uid, now)
        notes = tuple(transitions(lease.status, new))
        self._tell(resources.GPU_LEASES, body, notes)
        for note in notes:
            self._metrics.count_transition(note)
            notice = new.preemption or lease.status.preemption
            cause = leases.get(beneficiary_of(notice.cause)) if notice else None
            self._metrics.count_preemption(note, cause.spec.tier if cause else None)

    async def _report_plain(
        self, resource: Resource, key: Key, old: PlatformStatus, new: PlatformStatus, outcome: Outcome
    ) -> None:
        body = self.views.store.get(resource, key.namespace or None, key.name)
        if body is None or old == new:
            return
        if await self._write(resource, body, new.to_wire(), outcome):
            self._tell(resource, body, platform_transitions(old.conditions, new.conditions))

    async def _mark(self, node: NodeFacts, outcome: Outcome, now: datetime) -> None:
        """Say on a GpuNode that its agent is silent, and take that back once it is heard."""
        conditions = platform_status.node_conditions(node, now)
        body = self.views.store.get(resources.GPU_NODES, None, node.name)
        if conditions == node.conditions or body is None:
            return
        wire = {**(body.get("status") or {}), "conditions": [one.to_wire() for one in conditions]}
        if await self._write(resources.GPU_NODES, body, wire, outcome):
            self._tell(resources.GPU_NODES, body, platform_transitions(node.conditions, conditions))

    def _tell(self, resource: Resource, body: Object, notes: Iterable[Note]) -> None:
        for note in notes:
            self.events.post(resource, body, *note)

    async def _write(self, resource: Resource, body: Object, wire: Object, outcome: Outcome) -> bool:
        """Write a status; whether it was. One that is refused is tried again like everything else, without haste."""
        try:
            await self._execute.write_status(resource, body, wire)
        except (Conflict, NotFound):
            outcome.conflict = True
        except KubeError as error:
            _log.warning("Status of %s %s not written: %s", resource.kind, body["metadata"]["name"], error)
            outcome.trouble = True
        else:
            return True
        return False

    async def _resync(self) -> None:
        """Now and then believe nobody and list everything: a watch may lose what vanished while it was cut."""
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            try:
                await self.views.store.resync(self._client, everything=True)
                self._listed = time.monotonic()
                self.dirty.set()  # running costs are due now and then though nothing happens
            except KubeError as error:
                _log.warning("Listing anew failed: %s; it is tried again.", error)


def gather_of(views: Views, settings: Settings) -> Gather:
    """Takes snapshots of the views, with what the settings say."""
    spot_limits = SpotLimits(parse_duration(settings.spot_notice_max))
    limits = _defaults(settings), spot_limits, _conversion_rules(settings)
    return Gather(views, settings.drain_grace_seconds, *limits, settings.levels)


def _defaults(settings: Settings) -> TenantDefaults:
    quota = Quota(
        gpus=settings.default_quota_gpus,
        memory_slices=settings.default_quota_memory_slices,
        compute_slices=settings.default_quota_compute_slices,
    )
    return TenantDefaults(quota, settings.default_max_term, timedelta(hours=settings.usage_half_life_hours))


def _conversion_rules(settings: Settings) -> ConversionRules:
    return ConversionRules(
        on_demand=settings.conversion is Conversion.ON_DEMAND,
        dwell=parse_duration(settings.conversion_dwell),
        per_node_and_hour=settings.conversions_per_node_hour,
    )
