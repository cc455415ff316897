"""Prometheus metrics of the operator. For watching, never for billing: bills come from UsageRecords.

No metric carries a lease's name: their number would grow without end.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gpu_tenancy.api.lease import Reason, Tier
from gpu_tenancy.core.actions import Action, Plan, TenantOutlook
from gpu_tenancy.core.ledger import SECONDS_PER_HOUR
from gpu_tenancy.core.slices import SliceState, open_bills, segments_of, slice_states
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.kube.client import RequestInfo
from gpu_tenancy.kube.events import Note
from gpu_tenancy.kube.resources import GPU_LEASES, GPU_NODES, USAGE_RECORDS

CYCLE_BUCKETS: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
PREEMPTIONS: Final = frozenset({Reason.PREEMPTION_NOTICE, Reason.NOTICE_WITHDRAWN, Reason.PREEMPTED})
NEVER_REPLACED: Final = (GPU_NODES.kind, GPU_LEASES.kind, USAGE_RECORDS.kind)
"""Kinds in which state lives that can be derived from nothing else."""


class Metrics:
    """All metrics of one operator, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gpu_tenancy_api_requests",
            "Requests to the API server.",
            ("verb", "resource", "code"),
            registry=self.registry,
        )
        self.cycles = Histogram(
            "gpu_tenancy_cycle_seconds",
            "Duration of one cycle: gather, plan, execute, report.",
            buckets=CYCLE_BUCKETS,
            registry=self.registry,
        )
        self.planning = Histogram(
            "gpu_tenancy_plan_seconds", "Duration of planning alone.", buckets=CYCLE_BUCKETS, registry=self.registry
        )
        self.failures = Counter("gpu_tenancy_cycle_failures", "Cycles that ended in an error.", registry=self.registry)
        self.actions = Counter("gpu_tenancy_actions", "Actions planned, by kind.", ("action",), registry=self.registry)
        self.transitions = Counter(
            "gpu_tenancy_lease_transitions", "Transitions of leases, by reason.", ("reason",), registry=self.registry
        )
        self.preemptions = Counter(
            "gpu_tenancy_preemptions",
            "Spot leases that were told to go, went, or could stay after all, by tier of the lease for which; Gone: "
            "it is no more.",
            ("tier", "reason"),
            registry=self.registry,
        )
        self.leases = Gauge(
            "gpu_tenancy_leases", "Leases that are not settled, by state.", ("state",), registry=self.registry
        )
        self.unreadable = Gauge(
            "gpu_tenancy_unreadable",
            "Objects that cannot be read, and of which therefore nothing is decided, by kind.",
            ("kind",),
            registry=self.registry,
        )
        self.slices = Gauge(
            "gpu_tenancy_slices", "Memory slices (8 per GPU) by state, now.", ("state",), registry=self.registry
        )
        self.slice_seconds = Counter(
            "gpu_tenancy_slice_seconds",
            "Slice-seconds by state; all states together grow by 8 per GPU and second.",
            ("state",),
            registry=self.registry,
        )
        self.tenant_slices = Gauge(
            "gpu_tenancy_tenant_slices",
            "Slices that the leases of a GpuTenant hold, by resource: memory (8 per GPU) or compute (7).",
            ("tenant", "resource"),
            registry=self.registry,
        )
        self.tenant_share = Gauge(
            "gpu_tenancy_tenant_share",
            "Slice-hours that a GpuTenant has used, the past fading, divided by its weight.",
            ("tenant",),
            registry=self.registry,
        )
        self.conversions = Counter(
            "gpu_tenancy_conversions",
            "Conversions of GPUs between whole and MIG that were decided by demand, there and back.",
            registry=self.registry,
        )
        self.largest_fit = Gauge(
            "gpu_tenancy_largest_fit",
            "Devices of a profile that GPUs have room for beside leases, miners gone; of full, on one node at most.",
            ("model", "profile"),
            registry=self.registry,
        )
        self._converted_at: datetime | None = None
        self._slices: Tally[SliceState] = Tally()
        self._slices_at: datetime | None = None

    def count_request(self, info: RequestInfo) -> None:
        """Note one request; dry runs store nothing and are counted under a verb of their own."""
        verb = f"{info.verb}-dry-run" if info.dry_run else info.verb
        resource = f"{info.resource}/{info.subresource}" if info.subresource else info.resource
        self.requests.labels(verb, resource, str(info.status)).inc()

    def count_plan(self, plan: Plan) -> None:
        """Note what was planned."""
        for action in plan.actions:
            self.actions.labels(_kind(action)).inc()
        self.largest_fit.clear()
        for (model, profile), count in plan.fits.items():
            self.largest_fit.labels(model, profile).set(count)

    def count_transition(self, note: Note) -> None:
        """Note a lease's transition."""
        self.transitions.labels(note.reason).inc()

    def count_preemption(self, note: Note, tier: Tier | None) -> None:
        """Note what became of a spot lease. `tier`: of the lease for which; None: it is no more."""
        if note.reason in PREEMPTIONS:
            self.preemptions.labels(tier or "Gone", note.reason).inc()

    def show_leases(self, states: Tally[str]) -> None:
        """Show how many leases are in which state."""
        self.leases.clear()
        for state, count in states.items():
            self.leases.labels(state).set(count)

    def show_unreadable(self, kinds: Tally[str]) -> None:
        """Show how many objects of each kind that is never replaced cannot be read."""
        for kind in NEVER_REPLACED:
            self.unreadable.labels(kind).set(kinds[kind])

    def show_tenants(self, tenants: Iterable[TenantOutlook]) -> None:
        """Show what each GpuTenant holds, and what decides its place in the queue."""
        self.tenant_slices.clear()
        self.tenant_share.clear()
        for one in tenants:
            name, spec = one.tenant.name, one.tenant.spec
            self.tenant_slices.labels(name, "memory").set(one.holds.memory_slices)
            self.tenant_slices.labels(name, "compute").set(one.holds.compute_slices)
            if spec is not None:
                self.tenant_share.labels(name).set(one.used / SECONDS_PER_HOUR / spec.weight)

    def account(self, snapshot: Snapshot, now: datetime) -> None:
        """Credit the time since the last snapshot to the states the slices were in, and look at them anew."""
        if self._slices_at is not None:
            elapsed = max(0.0, (now - self._slices_at).total_seconds())
            for state in SliceState:
                self.slice_seconds.labels(str(state)).inc(self._slices[state] * elapsed)
        self._count_conversions(snapshot, now)
        bills = open_bills(segments_of(snapshot))
        self._slices, self._slices_at = Tally(), now
        for node in snapshot.nodes:
            self._slices.update(slice_states(node, bills, now))
        for state in SliceState:
            self.slices.labels(str(state)).set(self._slices[state])

    def _count_conversions(self, snapshot: Snapshot, now: datetime) -> None:
        """Note the conversions that GpuNodes tell of and did not before; those before the first look do not count."""
        known = [at for node in snapshot.nodes for at in node.conversions]
        if self._converted_at is not None:
            self.conversions.inc(sum(at > self._converted_at for at in known))
        self._converted_at = max((*known, self._converted_at or now))


def _kind(action: Action) -> str:
    return type(action).__name__
