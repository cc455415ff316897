"""What must hold at every instant of every history of a simulated cluster."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from gpu_tenancy.api.base import HolderKind, parse_duration
from gpu_tenancy.api.lease import QUEUED, ConditionType, Reason, Tier
from gpu_tenancy.api.node import Slot
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.actions import SetSlots
from gpu_tenancy.core.checks import needs_of
from gpu_tenancy.core.ledger import double_billings
from gpu_tenancy.core.ordering import rank
from gpu_tenancy.core.rest import Stocks
from gpu_tenancy.core.shares import Shares
from gpu_tenancy.core.slices import SliceState
from gpu_tenancy.core.snapshot import LeaseFacts
from gpu_tenancy.core.stock import take_stock
from gpu_tenancy.core.tenancy import Tenants
from gpu_tenancy.mig.profiles import FULL, MEMORY_SLICES
from tests.unit.core.simulation import Cluster, Node, mask


class Notice(NamedTuple):
    """What a spot lease was told."""

    at: datetime
    """When it loses its devices."""
    told: datetime
    runs: bool
    """It was billed then."""


class Laws:
    """Watches one cluster; `check` after every step."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.losses = False
        """A node was removed or a GPU broke: the only excuse for taking devices from a firm lease."""
        self._ready: dict[tuple[str, str], datetime] = {}
        self._gone: dict[tuple[str, str], datetime] = {}
        self._spec: dict[tuple[str, str], Slot] = {}
        self._notices: dict[str, Notice] = {}
        self._taken: dict[str, str] = {}
        """Leases for which others went, by the segments that ended for them."""

    def check(self) -> None:
        """Everything that holds at any instant, also while an operator lies dead between two writes."""
        self._remember()
        for node in self.cluster.nodes.values():
            self._no_two_hands(node)
        self._slices_are_conserved()
        self._firm_leases_stay()
        self._quotas_are_kept()
        self._nobody_is_passed_over()
        self._spot_leases_are_told()
        self._every_second_once()

    def check_reports(self) -> None:
        """What holds after a cycle that was not cut short."""
        for uid in self.cluster.leases:
            if self.cluster.snapshot_has(uid) and uid not in self.cluster.unreadable:
                self._explains_itself(uid)

    def _remember(self) -> None:
        there = {(node.name, slot.device): slot for node in self.cluster.nodes.values() for slot in node.slots}
        for place in self._spec.keys() - there.keys():
            self._gone[place] = self.cluster.now
        for place in there.keys() - self._spec.keys():
            self._gone.pop(place, None)  # an attempt that nobody could know of gave it a name that is given again
        self._spec = there
        for node in self.cluster.nodes.values():
            for name, device in node.held.items():
                if device.ready_at is not None:
                    self._ready.setdefault((node.name, name), device.ready_at)

    def _no_two_hands(self, node: Node) -> None:
        """Neither promised, nor offered to the scheduler, nor handed to pods are two devices on the same slices."""
        in_use = {place for pod in self.cluster.pods.values() if pod.claim.prepared for place in pod.claim.devices}
        offered = [device.slot for device in node.held.values() if device.published]
        handed = [device.slot for name, device in node.held.items() if device.published or (node.name, name) in in_use]
        for slots in (node.slots, offered, handed):
            _assert_disjoint(slots)

    def _slices_are_conserved(self) -> None:
        states = self.cluster.slice_states()
        known = [node for node in self.cluster.nodes.values() if node.unreadable != "status"]
        slices = MEMORY_SLICES * sum(len(node.gpus) for node in known)
        assert states.total() == slices, f"{states} do not add up to {slices}"
        assert states[SliceState.CONTESTED] == 0, f"{states[SliceState.CONTESTED]} slices are in more than one hand"
        billed = [record.spec for record in self.cluster.records.values() if record.is_open]
        if not billed:
            assert states[SliceState.LEASED] == 0

    def _firm_leases_stay(self) -> None:
        """What is billed is promised, on every node that there is."""
        for record in self.cluster.records.values():
            if record.is_open and not self.losses:
                places = {(device.node, device.device) for device in record.spec.devices}
                assert places <= self._spec.keys(), f"{record.name} is billed for devices that were taken away"
            if record.spec.reason is Reason.NODE_LOST:
                assert self.losses, f"{record.name} was closed as lost, but nothing was lost"

    def _quotas_are_kept(self) -> None:
        """A plan that gives a tenant anything leaves it within its quota."""
        facts, decided = self.cluster.last_facts, self.cluster.last_plan
        tenants = Tenants(facts.tenants, facts.tenant_defaults)
        promised = {action.node: action.slots for action in decided.actions if isinstance(action, SetSlots)}
        holds: dict[str, Counter[str]] = defaultdict(Counter)
        for node in facts.nodes:
            for slot in promised.get(node.name, node.slots):
                if slot.holder.kind is HolderKind.GPU_LEASE:
                    count = holds[tenants.of(slot.holder.namespace).title]
                    whole = slot.profile == FULL
                    count.update(
                        gpus=whole, memory=mask(slot).bit_count(), compute=7 if whole else int(slot.profile[0])
                    )
        for one in decided.leases:
            tenant = tenants.of(one.lease.key.namespace)
            if one.admitted_now:
                held, whole = holds[tenant.title], one.lease.spec.gpus.profile == FULL
                for most, name in zip(tenant.limits or (), ("gpus", "memory", "compute"), strict=False):
                    if most is not None and (whole or name != "gpus"):
                        assert held[name] <= most, f"{tenant.title} holds {held[name]} of {most} {name}"

    def _nobody_is_passed_over(self) -> None:
        """Of two leases that ask for the same the one whose tenant has had less for its weight is not left waiting for
        room while the other is placed; unless its tenant was given something else in the same plan, or others have
        made room for the one that is placed."""
        facts, decided = self.cluster.last_facts, self.cluster.last_plan
        placed = [one.lease for one in decided.leases if one.admitted_now]
        waits = (Reason.QUEUED, Reason.FRAGMENTED)
        waiting = [one.lease for one in decided.leases if one.refusal is not None and one.refusal.reason in waits]
        if not placed or not waiting:
            return
        tenants = Tenants(facts.tenants, facts.tenant_defaults)
        stocks = Stocks(take_stock(facts, facts.leases, tenants, self.cluster.now), [], {})
        before = Shares(tenants, facts, stocks, self.cluster.now)
        ahead = {one.status.preemption.cause for one in facts.leases if one.status.preemption}
        given = {before.tenant(lease) for lease in placed}
        for lease in waiting:
            if before.tenant(lease) not in given:
                least = before.share(before.tenant(lease)), rank(lease)
                others = [other for other in placed if _asks(other) == _asks(lease) and other.uid not in ahead]
                assert all((before.share(before.tenant(other)), rank(other)) < least for other in others)

    def _spot_leases_are_told(self) -> None:
        """Only spot leases go for others, only for one that waits for that, not before all of their notice has run
        out, and for nobody twice."""
        for uid, lease in self.cluster.leases.items():
            notice = lease.status.preemption
            if notice is None:
                self._notices.pop(uid, None)
            elif uid not in self._notices or self._notices[uid].at != notice.at:
                self._notices[uid] = Notice(notice.at, self.cluster.now, self._is_billed(uid))
        for one in self.cluster.last_plan.leases:
            if one.preemption is not None and one.preemption != one.lease.status.preemption:
                [cause] = [other for other in self.cluster.last_plan.leases if other.lease.uid == one.preemption.cause]
                assert cause.refusal is not None
                assert cause.refusal.reason is Reason.PREEMPTING
        for name, record in self.cluster.records.items():
            if record.spec.reason is Reason.PREEMPTED and name not in self._taken:
                self._was_told(name, record.spec)

    def _was_told(self, name: str, spec: UsageRecordSpec) -> None:
        assert spec.tier is Tier.SPOT
        lease = self.cluster.leases.get(spec.contract)
        if lease is None:
            return
        notice, said = self._notices[lease.uid], lease.status.preemption
        asked = parse_duration(lease.spec.term.preemption_notice or "30s")
        assert not notice.runs or notice.at - notice.told >= asked
        assert spec.billable_to == max(notice.at, spec.billable_from)
        pairs = {(one.rpartition("-")[0], cause) for one, cause in self._taken.items()}
        assert said is not None
        assert (spec.contract, said.cause) not in pairs, "a lease goes twice for the same one"
        self._taken[name] = said.cause

    def _is_billed(self, contract: str) -> bool:
        return any(record.is_open and record.spec.contract == contract for record in self.cluster.records.values())

    def _every_second_once(self) -> None:
        by_contract: dict[str, dict[int, UsageRecordSpec]] = defaultdict(dict)
        for record in (*self.cluster.archive.values(), *self.cluster.records.values()):
            by_contract[record.spec.contract][record.spec.segment] = record.spec
        for contract, segments in by_contract.items():
            specs = [segments[number] for number in sorted(segments)]
            assert sorted(segments) == list(range(1, len(specs) + 1)), f"{contract} has a gap in its segments"
            for spec in specs:
                self._within_its_hold(spec)
            for former, later in pairwise(specs):
                assert former.billable_to is not None, f"{contract} has two open segments"
                assert former.billable_to <= later.billable_from, f"{contract} bills a second twice"

        double = list(double_billings(spec for segments in by_contract.values() for spec in segments.values()))
        assert double == []

    def _within_its_hold(self, spec: UsageRecordSpec) -> None:
        """Billed time lies between the moment the last device was ready and the moment the first was taken away."""
        places = [(device.node, device.device) for device in spec.devices]
        assert all(self._ready[place] <= spec.billable_from for place in places)
        if spec.billable_to is None:
            return
        assert spec.seconds == (spec.billable_to - spec.billable_from).total_seconds() >= 0
        gone = [self._gone[place] for place in places if place in self._gone]
        if not self.losses:
            assert all(spec.billable_to <= instant for instant in gone)

    def _explains_itself(self, uid: str) -> None:
        ready = self.cluster.condition(uid)
        assert ready.reason
        assert ready.message, f"{uid} says nothing"
        if self.cluster.lease(uid).unreadable_record:
            assert self.cluster.is_true(uid, ConditionType.STALLED)
            return
        assert self.cluster.is_true(uid) == self._is_billed(uid)
        waits_for_room = ready.reason in QUEUED
        assert waits_for_room == (self.cluster.leases[uid].status.position is not None)
        assert not (self.cluster.is_true(uid) and self.cluster.is_true(uid, ConditionType.SETTLED))
        own = self.cluster.leases[uid].key.namespace
        others = [one.key for one in self.cluster.leases.values() if one.key.namespace != own]
        assert not [key for key in others if str(key) in ready.message], "another tenant's lease is named"


def _asks(lease: LeaseFacts) -> object:
    return lease.spec.tier, lease.spec.gpus, lease.spec.pods, lease.spec.term.duration, needs_of(lease)


def _assert_disjoint(slots: Iterable[Slot]) -> None:
    taken: dict[str, int] = defaultdict(int)
    for slot in slots:
        assert not taken[slot.gpu] & mask(slot), f"{slot.device} overlaps another device on {slot.gpu}"
        taken[slot.gpu] |= mask(slot)
