"""A cluster in memory for tests of the decisions: it does what a plan says, as the real parts would, in virtual time.

API server (generations, names that are taken, finalizers, a terminating namespace), node agents, kube-scheduler,
kubelet, Job controller and tenants' Deployments, each reduced to what a plan can notice. Everything is deterministic;
tests inject what should go wrong: an operator that dies after its n-th write, conflicts, agents that lag or are silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import count
from typing import Final, assert_never

from gpu_tenancy.api.base import ConditionStatus, Holder
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus, LeaseCondition
from gpu_tenancy.api.node import (
    Gpu,
    HandOver,
    HandOverStep,
    HandOverStepType,
    ObservedSlot,
    Slot,
    SlotState,
    WantedMode,
)
from gpu_tenancy.api.pool import MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookSpec, PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantSpec, GpuTenantStatus
from gpu_tenancy.core import platform_status, podspec, status
from gpu_tenancy.core.actions import (
    Action,
    Admit,
    ArchiveRecord,
    CloseRecord,
    CreateClaimTemplate,
    CreateJob,
    DeleteClaimTemplate,
    DeleteJob,
    DeletePod,
    OpenRecord,
    Plan,
    SetSlots,
    StartMiner,
    StopMiner,
    TouchClaim,
    TouchPod,
    Unbind,
    WarnPod,
    blame,
)
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.devices import job_name, miner_name
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.podspec import Taint
from gpu_tenancy.core.pricing import pricing
from gpu_tenancy.core.slices import SliceState, open_bills, slice_states
from gpu_tenancy.core.snapshot import (
    BookFacts,
    ClaimFacts,
    ConversionRules,
    JobFacts,
    Key,
    LeaseFacts,
    MinerFacts,
    NodeFacts,
    PodRef,
    PoolFacts,
    RecordFacts,
    Snapshot,
    SpotLimits,
    TemplateFacts,
    TenantDefaults,
    TenantFacts,
    as_before,
)
from gpu_tenancy.mig.layout import Placement, mask_of
from gpu_tenancy.mig.profiles import FULL
from tests.unit.core.builders import MODEL, ROOMY, START, TERM, gpus, lease_spec, pool_spec
from tests.unit.core.past import past_usage

HEARTBEAT: Final = timedelta(seconds=40)
TENANT_GRACE: Final = timedelta(seconds=2)
TICK: Final = timedelta(milliseconds=500)
RESET: Final = timedelta(seconds=2)
"""How long a GPU takes to be reset for another mode."""


def forgotten(facts: Snapshot) -> Snapshot:
    """The same facts as a process sees them that has just started: nothing was found out about them yet."""
    return replace(
        facts,
        nodes=tuple(replace(node) for node in facts.nodes),
        leases=tuple(replace(lease) for lease in facts.leases),
    )


class OperatorDiedError(Exception):
    """The operator was killed between two writes."""


class RefusedError(Exception):
    """The API server said no: somebody else was faster."""


@dataclass(slots=True)
class Device:
    """A device as its agent has it in hand."""

    slot: Slot
    state: SlotState = SlotState.PREPARING
    ready_at: datetime | None = None
    published: bool = False
    message: str = ""
    hand_over: HandOver | None = None


@dataclass(slots=True)
class Claim:
    """A ResourceClaim."""

    namespace: str
    name: str
    uid: str
    holder: str
    wants: int
    """Devices asked for."""
    node: str = ""
    """Of a miner: the node whose device it is for."""
    only: str = ""
    """Of a miner: the one device that will do."""
    devices: tuple[tuple[str, str], ...] = ()
    prepared: bool = False


@dataclass(slots=True)
class Pod:
    """A pod with its claim."""

    name: str
    uid: str
    owner: str
    """UID of its Job or Deployment; of its pool for a miner."""
    claim: Claim
    nodes: tuple[str, ...] = ()
    """Nodes that it may run on; none: any."""
    revision: str = ""
    """Of a miner: what it was made from."""
    stops_at: datetime | None = None
    """It was deleted and is gone by then."""
    warned_of: datetime | None = None
    """When, as it was told, it loses its devices."""


@dataclass(slots=True)
class Job:
    """A Job of a placement attempt."""

    facts: JobFacts
    lease: str
    nodes: tuple[str, ...]
    works: timedelta | None
    """How long its pods run; None: for ever."""
    running_since: datetime | None = None


@dataclass(slots=True)
class Deployment:
    """A tenant's own controller: keeps that many pods which refer to the lease's claim template."""

    uid: str
    lease: str
    pods: int


@dataclass(slots=True)
class Node:
    """A node with its GpuNode, its agent and its ResourceSlice."""

    name: str
    gpus: list[Gpu]
    slots: tuple[Slot, ...] = ()
    modes: tuple[WantedMode, ...] = ()
    conversions: tuple[datetime, ...] = ()
    generation: int = 1
    held: dict[str, Device] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    taints: tuple[Taint, ...] = ()
    allocatable: Amount = ROOMY
    foreign: Amount = NOTHING
    ready: bool = True
    cordoned: bool = False
    agent: bool = True
    """Its agent runs."""
    agent_until: datetime = START
    former: dict[str, Holder] = field(default_factory=dict)
    """Who had each GPU last, by UUID."""
    stuck: bool = False
    """What is left of holders cannot be proven gone in time."""
    unreadable: str = ""
    """Part of its GpuNode that the operator cannot read: spec or status."""
    resets: dict[str, datetime] = field(default_factory=dict)
    """When the reset of each GPU that is being converted began, by UUID."""
    converted: list[datetime] = field(default_factory=list)
    """When its GPUs were reset for another mode."""

    def facts(self) -> NodeFacts:
        """As the operator sees it."""
        held = () if self.unreadable == "status" else self.held.values()
        holders = [*(slot.holder for slot in self.slots), *(device.slot.holder for device in self.held.values())]
        return NodeFacts(
            self.name,
            self.generation,
            () if self.unreadable == "status" else tuple(self.gpus),
            () if self.unreadable == "spec" else self.slots,
            tuple(_observed(device) for device in held),
            published=frozenset(name for name, device in self.held.items() if device.published),
            labels=dict(self.labels),
            taints=self.taints,
            allocatable=self.allocatable,
            foreign=self.foreign,
            ready=self.ready,
            cordoned=self.cordoned,
            agent_until=self.agent_until,
            unreadable=f"GpuNode {self.name} cannot be read ({self.unreadable})" if self.unreadable else "",
            mentions=frozenset(holder.uid for holder in holders) if self.unreadable else frozenset(),
            modes=() if self.unreadable == "spec" else self.modes,
            conversions=() if self.unreadable == "spec" else self.conversions,
        )


def _observed(device: Device) -> ObservedSlot:
    slot = device.slot
    return ObservedSlot(
        device=slot.device,
        gpu=slot.gpu,
        profile=slot.profile,
        start=slot.start,
        holder=slot.holder,
        state=device.state,
        ready_at=device.ready_at,
        hand_over=device.hand_over,
        message=device.message,
    )


class Cluster:
    """The simulated cluster. `step` lets everybody act once; `run` does so for a while."""

    def __init__(self) -> None:
        self.now = START
        self.nodes: dict[str, Node] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._lease_facts: dict[str, LeaseFacts] = {}
        self.leases: dict[str, LeaseFacts] = {}
        self.works: dict[str, timedelta | None] = {}
        self.templates: dict[str, str] = {}
        """UIDs of ResourceClaimTemplates by UID of their lease."""
        self.records: dict[str, RecordFacts] = {}
        self.archive: dict[str, RecordFacts] = {}
        self.jobs: dict[str, Job] = {}
        self.pods: dict[str, Pod] = {}
        self.miner_claims: dict[str, Claim] = {}
        self.deployments: list[Deployment] = []
        self.pools: dict[str, PoolFacts] = {}
        self.books: dict[str, BookFacts] = {}
        self.tenants: dict[str, TenantFacts] = {}
        self.tenant_defaults = TenantDefaults()
        self.spot_limits = SpotLimits()
        self.conversion_rules = ConversionRules()
        self.topology_levels: tuple[str, ...] = ()
        self.ending: set[str] = set()
        """Namespaces that are being deleted."""
        self.verdict = ""
        """What the API server says of templates."""
        self.writes = 0
        """Writes that the operator has made."""
        self.reports = 0
        """Statuses of leases that were written, admissions aside."""
        self.dies_after: int | None = None
        """Write after which the operator is killed."""
        self.restarts_at_once = False
        """A killed operator is back within the same step; otherwise with the next."""
        self.conflicts: Callable[[SetSlots], bool] = lambda _: False
        """Whether somebody else is faster at a node."""
        self.lags: Callable[[Node], bool] = lambda _: False
        """Whether an agent does nothing in this step."""
        self.lost_gpus: set[str] = set()
        """UUIDs of GPUs of which nothing can be found out any more."""
        self.unreadable: set[str] = set()
        """UIDs of leases whose status the operator cannot read, and names of records that it cannot."""
        self.kept_jobs: set[str] = set()
        """UIDs of leases whose tenants keep a finalizer on their Jobs."""
        self.evicted: list[str] = []
        """Names of miners that the operator stopped, in order."""
        self.last_plan = Plan()
        self.last_facts = Snapshot()
        """What the last plan was made from."""
        self.finished = False
        """The last cycle was not cut short."""
        self._names = count(1)

    # --- what people and machines do --------------------------------------------------------------------------------

    def add_node(
        self,
        name: str,
        count: int = 8,
        mig: Collection[int] = (),
        model: str = MODEL,
        convertible: Collection[int] = (),
    ) -> Node:
        """A node; the GPUs in `mig` are in MIG mode, those in `convertible` may be converted."""
        known = gpus(name, count, mig, model, convertible)
        self.nodes[name] = Node(name, known, agent_until=self.now + HEARTBEAT)
        return self.nodes[name]

    def add_pool(self, name: str = "pool", **more: object) -> str:
        """A MiningPool; its UID."""
        uid = f"pool-{name}"
        pool = PoolFacts(Key("mining", name), uid, 1, self.now, pool_spec(**more), MiningPoolStatus())
        self.pools[uid] = pool
        return uid

    def add_book(self, name: str, spec: PriceBookSpec) -> None:
        """A PriceBook."""
        self.books[name] = BookFacts(name, f"book-{name}", 1, self.now, spec, PriceBookStatus())

    def add_tenant(self, name: str, *namespaces: str, **more: object) -> None:
        """A GpuTenant; `more` are fields of its spec. One of the same name is replaced."""
        spec = GpuTenantSpec.model_validate({"namespaces": list(namespaces), **more})
        former = self.tenants.get(name)
        self.tenants[name] = TenantFacts(
            name,
            f"tenant-{name}",
            former.generation + 1 if former else 1,
            former.created if former else self.now,
            spec,
            former.status if former else GpuTenantStatus(),
        )

    def create(
        self,
        name: str,
        profile: str = "full",
        count: int = 1,
        pods: int = 1,
        *,
        namespace: str = "team",
        works: float | None = None,
        **more: object,
    ) -> str:
        """A GpuLease; its UID. With `works` it has a template, whose pods finish after so many seconds (inf: never)."""
        if works is not None:
            more["template"] = {"spec": {"containers": [{"name": "main"}]}}
        spec = lease_spec(profile, count, pods, **more)
        uid = f"uid-{name}-{next(self._names)}"
        self.works[uid] = None if works is None or works == float("inf") else timedelta(seconds=works)
        self.leases[uid] = LeaseFacts(Key(namespace, name), uid, 1, self.now, spec, GpuLeaseStatus())
        return uid

    def deploy(self, lease: str, pods: int = 1) -> None:
        """A tenant's Deployment on a lease."""
        self.deployments.append(Deployment(f"deployment-{lease}", lease, pods))

    def edit(self, lease: str, **change: object) -> None:
        """Change fields of a lease's spec; those of the term go where they belong."""
        old = self.leases[lease]
        fields = old.spec.model_dump()
        fields["term"] |= {name: change.pop(name) for name in TERM if name in change}
        spec = GpuLeaseSpec.model_validate({**fields, **change})
        self.leases[lease] = replace(old, spec=spec, generation=old.generation + 1)

    def delete(self, lease: str) -> None:
        """`kubectl delete`: gone at once without a finalizer."""
        found = self.leases[lease]
        if not found.finalized:
            self._vanish(lease)
        elif found.deleted_at is None:
            self.leases[lease] = replace(found, deleted_at=self.now.replace(microsecond=0))

    def end_namespace(self, namespace: str) -> None:
        """Delete a namespace: everything in it is deleted, nothing can be created in it."""
        self.ending.add(namespace)
        for uid in [uid for uid, lease in self.leases.items() if lease.key.namespace == namespace]:
            self.templates.pop(uid, None)
            self.deployments = [one for one in self.deployments if one.lease != uid]
            for job in [job for job in self.jobs.values() if job.lease == uid]:
                del self.jobs[job.facts.name]
            for pod in self.pods.values():
                if pod.claim.holder == uid:
                    self._stop(pod, TENANT_GRACE)
            self.delete(uid)
        for name, record in self.records.items():
            if record.namespace == namespace:
                self.records[name] = replace(record, deleting=True)

    def remove_node(self, name: str) -> None:
        """The Node is deleted, and its pods with it."""
        del self.nodes[name]
        for pod in list(self.pods.values()):
            if name in (pod.claim.node, *(node for node, _ in pod.claim.devices)):
                self._gone(pod)

    def break_gpu(self, node: str, index: int, *, lost: bool = False) -> None:
        """The agent finds a GPU unhealthy. `lost`: it has fallen off the bus, and nothing can be proven of it."""
        known = self.nodes[node].gpus
        known[index] = known[index].model_copy(update={"healthy": False, "message": "Xid 79"})
        if lost:
            self.lost_gpus.add(known[index].uuid)

    # --- looking ------------------------------------------------------------------------------------------------------

    def fence(self, node: str, index: int, *slices: int) -> None:
        """The agent keeps memory slices of a GPU out of use."""
        gpus = self.nodes[node].gpus
        message = "GPU is fenced" if slices else ""
        gpus[index] = gpus[index].model_copy(update={"fenced": list(slices), "message": message})

    def snapshot(self) -> Snapshot:
        """What the operator gathers. Leases that are settled and let go are history."""
        records = {uid: self._records_of(lease) for uid, lease in self.leases.items()}
        known = {record.name for found in records.values() for record in found}
        return Snapshot(
            leases=tuple(
                self._known_lease(self.lease(uid)) for uid, lease in self.leases.items() if not self._is_history(lease)
            ),
            pools=tuple(self.pools.values()),
            nodes=tuple(self._known(node.facts()) for node in self.nodes.values()),
            books=tuple(self.books.values()),
            miners=tuple(self._miners()),
            orphans=tuple(record for name, record in self.records.items() if name not in known | self.unreadable),
            tenants=tuple(self.tenants.values()),
            tenant_defaults=self.tenant_defaults,
            spot_limits=self.spot_limits,
            conversion_rules=self.conversion_rules,
            topology_levels=self.topology_levels,
            past_usage=past_usage(
                (one.spec for one in {**self.archive, **self.records}.values()),
                self.now,
                self.tenant_defaults.half_life,
            ),
        )

    def _known(self, fresh: NodeFacts) -> NodeFacts:
        """As the operator's gather does: facts that did not change are the same object, with what it remembers."""
        known = self._facts[fresh.name] = as_before(fresh, self._facts.get(fresh.name))
        return known

    def _known_lease(self, fresh: LeaseFacts) -> LeaseFacts:
        before = self._lease_facts.get(fresh.uid)
        known = self._lease_facts[fresh.uid] = before if before == fresh else fresh
        return known

    def snapshot_has(self, lease: str) -> bool:
        """Whether the lease is still planned."""
        return not self._is_history(self.leases[lease])

    def lease(self, uid: str) -> LeaseFacts:
        """A lease with all that was made for it."""
        lease = self.leases[uid]
        template = None
        if lease.spec.template is not None:
            template = TemplateFacts(podspec.needs(lease.spec.template["spec"]), self.verdict)
        hidden = [name for name in self.unreadable & self.records.keys() if self._contract(name) == uid]
        return replace(
            lease,
            status=GpuLeaseStatus() if uid in self.unreadable else lease.status,
            unreadable=f"GpuLease {lease.key} cannot be read (status)" if uid in self.unreadable else "",
            unreadable_record=f"UsageRecord {min(hidden)} cannot be read (spec)" if hidden else "",
            namespace_ends=lease.key.namespace in self.ending,
            template=template,
            claim_template=self.templates.get(uid, ""),
            jobs=tuple(job.facts for job in self.jobs.values() if job.lease == uid),
            claims=tuple(
                ClaimFacts(one.namespace, one.name, one.uid, uid, one.devices, (_ref(pod),))
                for pod in self.pods.values()
                if (one := pod.claim).holder == uid and one.devices
            ),
            records=self._records_of(lease),
        )

    def _contract(self, record: str) -> str:
        return self.records[record].spec.contract

    def condition(self, lease: str, kind: ConditionType = ConditionType.READY) -> LeaseCondition:
        """A condition of a lease, as last written."""
        return next(one for one in self.leases[lease].status.conditions if one.type is kind)

    def is_true(self, lease: str, kind: ConditionType = ConditionType.READY) -> bool:
        """Whether a condition of a lease holds."""
        return self.condition(lease, kind).status is ConditionStatus.TRUE

    def slots_of(self, holder: str) -> list[tuple[str, Slot]]:
        """Devices promised to a holder, with the names of their nodes."""
        return [(node.name, slot) for node in self.nodes.values() for slot in node.slots if slot.holder.uid == holder]

    def mining(self) -> Counter[str]:
        """Running miners by profile."""
        promised = {(node.name, slot.device): slot for node in self.nodes.values() for slot in node.slots}
        return Counter(promised[one.node, one.device].profile for one in self._miners() if one.running)

    def ledger(self, lease: str) -> list[tuple[int, str]]:
        """(seconds, reason) of a lease's closed segments, also of one that is gone."""
        records = [record.spec for record in (*self.archive.values(), *self.records.values())]
        return [(one.seconds or 0, str(one.reason)) for one in records if one.contract == lease and one.reason]

    def slice_states(self) -> Counter[SliceState]:
        """Memory slices of all GPUs by state."""
        bills = open_bills(record.spec for record in self.records.values())
        states: Counter[SliceState] = Counter()
        for node in self.nodes.values():
            states.update(slice_states(node.facts(), bills, self.now))
        return states

    # --- time -------------------------------------------------------------------------------------------------------

    def step(self, after: timedelta = TICK) -> None:
        """Time passes, everybody acts once, the operator last."""
        self.now += after
        self.everybody_else()
        self.operator()
        if self.restarts_at_once and not self.finished:
            self.operator()

    def run(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        """Let that much time pass."""
        end = self.now + timedelta(seconds=seconds)
        while self.now < end:
            self.step()
            check()

    def everybody_else(self) -> None:
        """One act of everybody but the operator."""
        for node in self.nodes.values():
            if node.agent:
                node.agent_until = self.now + HEARTBEAT
            if node.agent and not self.lags(node):
                self._agent(node)
                node.gpus[:] = [self._convert(node, gpu) for gpu in node.gpus]
        self._finish_stopping()
        self._controllers()
        self._schedule()

    def operator(self) -> Plan:
        """One cycle: plan, execute, report. Killed in the middle, it starts again with the next call."""
        self.last_facts = self.snapshot()
        self.last_plan, self.finished = plan(self.last_facts, self.now), False
        from_nothing = plan(forgotten(self.last_facts), self.now)
        for name in ("actions", "leases", "next_wake"):
            assert getattr(self.last_plan, name) == getattr(from_nothing, name), f"remembering changes the {name}"
        assert self.last_plan == from_nothing
        try:
            self._execute(self.last_plan)
            self._report(self.last_plan)
            self.finished = True
        except OperatorDiedError:
            self.dies_after = None
        return self.last_plan

    # --- the operator's hands: the rules of controller.execute -------------------------------------------------------

    def _execute(self, decided: Plan) -> None:
        failed: set[str] = set()
        left_alone: set[str] = set()
        for action in decided.actions:
            uid, _ = blame(action)
            done = uid not in failed and not _depends(action, failed, left_alone) and self._do(action, decided)
            if not done and isinstance(action, SetSlots):
                failed |= action.requires
                left_alone.add(action.node)
            elif not done and uid:
                failed.add(uid)

    def _do(self, action: Action, decided: Plan) -> bool:
        assert not self._disturbs(action), f"{action} disturbs what cannot be read"
        try:
            for _ in self._writes(action, decided):
                self._count()
        except RefusedError:
            return False
        return True

    def _disturbs(self, action: Action) -> bool:
        """Whether an action is about something that the operator cannot read, or stops pods whose node it cannot."""
        hidden = {node.name for node in self.nodes.values() if node.unreadable}
        match action:
            case SetSlots():
                return action.node in hidden
            case StartMiner():
                return action.node in hidden
            case StopMiner():
                return action.miner.node in hidden
            case TouchClaim() | TouchPod():
                return False
            case CloseRecord() | ArchiveRecord():
                return action.record.name in self.unreadable
            case DeleteClaimTemplate() | DeleteJob() | DeletePod() | WarnPod() | CreateJob():
                there = {node for node, _ in self.slots_of(action.lease.uid)}
                return action.lease.uid in self.unreadable or not there.isdisjoint(hidden)
            case _:
                return action.lease.uid in self.unreadable

    def _count(self) -> None:
        self.writes += 1
        if self.writes == self.dies_after:
            raise OperatorDiedError

    def _report(self, decided: Plan) -> None:
        for outlook in decided.leases:
            uid = outlook.lease.uid
            if uid not in self.leases:
                continue
            assert uid not in self.unreadable, "a status that cannot be read is written over"
            new = status.lease_status(outlook, None, self.now)
            if status.differs(self.leases[uid].status, new, None, self.now):
                self.leases[uid] = replace(self.leases[uid], status=new)
                self.reports += 1
                self._count()
        for pool in decided.pools:
            if pool.pool.uid in self.pools:
                found = self.pools[pool.pool.uid]
                self.pools[found.uid] = replace(found, status=platform_status.pool_status(pool, None, self.now))
        prices = pricing(list(self.books.values()), self.now)
        for name, book in self.books.items():
            self.books[name] = replace(book, status=platform_status.book_status(book, prices, self.now))
        for one in decided.tenants:
            found_tenant = self.tenants[one.tenant.name]
            self.tenants[found_tenant.name] = replace(found_tenant, status=platform_status.tenant_status(one, self.now))

    def _writes(self, action: Action, decided: Plan) -> Iterator[None]:
        """Do an action; yields after each write."""
        match action:
            case OpenRecord() | CloseRecord() | ArchiveRecord():
                yield from self._write_record(action)
            case Admit():
                yield from self._admit(action, decided)
            case SetSlots():
                self._set_slots(action)
                yield
            case StartMiner() | StopMiner():
                yield from self._write_miner(action)
            case CreateClaimTemplate() | DeleteClaimTemplate() | CreateJob() | DeleteJob() | DeletePod() | WarnPod():
                self._write_workload(action)
                yield
            case TouchClaim() | TouchPod():
                raise AssertionError("nothing stays behind in this cluster")
            case Unbind():
                self._unbind(action)
                yield
            case _:
                assert_never(action)

    def _write_record(self, action: OpenRecord | CloseRecord | ArchiveRecord) -> Iterator[None]:
        match action:
            case OpenRecord():
                namespace = action.spec.lease_namespace
                assert namespace not in self.ending, "nothing can be created in a namespace that is being deleted"
                if action.name in self.records:
                    raise RefusedError
                self.records[action.name] = RecordFacts(namespace, action.name, action.spec)
            case CloseRecord():
                found = self.records[action.record.name]
                if not found.is_open:
                    raise RefusedError
                end = {"billable_to": action.billable_to, "seconds": action.seconds, "reason": action.reason}
                self.records[found.name] = replace(found, spec=found.spec.model_copy(update=end))
            case ArchiveRecord():
                found = self.records[action.record.name]
                assert not found.is_open, "an open record has not reached the ledger"
                self.archive.setdefault(found.name, found)
                yield
                del self.records[found.name]
        yield

    def _admit(self, action: Admit, decided: Plan) -> Iterator[None]:
        found = self.leases.get(action.lease.uid)
        if found is None:
            raise RefusedError
        if not found.finalized:
            self.leases[found.uid] = found = replace(found, finalized=True)
            yield
        outlook = next(one for one in decided.leases if one.lease.uid == found.uid)
        self.leases[found.uid] = replace(found, status=status.lease_status(outlook, None, self.now))
        yield

    def _set_slots(self, action: SetSlots) -> None:
        node = self.nodes.get(action.node)
        if node is None or node.generation != action.generation or self.conflicts(action):
            raise RefusedError
        node.slots, node.modes, node.conversions = action.slots, action.modes, action.conversions
        node.generation += 1

    def _write_miner(self, action: StartMiner | StopMiner) -> Iterator[None]:
        match action:
            case StartMiner():
                name = miner_name(action.node, action.device)
                if not action.claim_uid:
                    uid = self._uid("claim")
                    claim = Claim(action.pool.key.namespace, name, uid, action.pool.uid, 1, action.node, action.device)
                    self.miner_claims[name] = claim
                    yield
                if action.missing_pod:
                    claim = self.miner_claims[name]
                    made_from = revision(action.pool.spec)
                    self.pods[name] = Pod(name, self._uid("pod"), action.pool.uid, claim, (action.node,), made_from)
                    yield
            case StopMiner():
                self.evicted.append(action.miner.name)
                if action.miner.pod_uid:
                    self._stop(self.pods[action.miner.name], timedelta(seconds=action.grace_seconds))
                    yield
                elif action.miner.claim_uid:
                    del self.miner_claims[action.miner.name]
                    yield

    def _write_workload(
        self, action: CreateClaimTemplate | DeleteClaimTemplate | CreateJob | DeleteJob | DeletePod | WarnPod
    ) -> None:
        uid = action.lease.uid
        creates = isinstance(action, CreateClaimTemplate | CreateJob)
        assert not (creates and action.lease.key.namespace in self.ending), "nothing can be created there"
        match action:
            case CreateClaimTemplate():
                self.templates[uid] = self._uid("template")
            case DeleteClaimTemplate():
                self.templates.pop(uid, None)
            case CreateJob():
                name = job_name(action.lease.key.name, action.attempt)
                facts = JobFacts(name, self._uid("job"), action.attempt)
                self.jobs[name] = Job(facts, uid, action.nodes, self.works[uid])
            case DeleteJob():
                self.jobs[action.job].facts = replace(self.jobs[action.job].facts, deleting=True)
            case DeletePod() | WarnPod():
                self._write_pod(action)

    def _write_pod(self, action: DeletePod | WarnPod) -> None:
        pod = self.pods.get(action.pod.name)
        if pod is None:
            return
        if isinstance(action, WarnPod):
            pod.warned_of = action.at
        else:
            self._stop(pod, TENANT_GRACE)

    def _unbind(self, action: Unbind) -> None:
        uid = action.lease.uid
        self.leases[uid] = replace(self.leases[uid], finalized=False)
        if self.leases[uid].deleted_at is not None:
            self._vanish(uid)

    # --- agents -------------------------------------------------------------------------------------------------------

    def _agent(self, node: Node) -> None:
        """One step with each device, in the order of the agent's own specification."""
        wanted = {slot.device: slot for slot in node.slots}
        for name, device in list(node.held.items()):
            broken = self._fault(node, device)
            if device.published and (name not in wanted or broken):
                device.published = False
            elif name not in wanted:
                self._take_away(node, device)
            elif broken:
                device.state, device.message = SlotState.FAILED, broken
            elif device.state is not SlotState.READY:
                self._make(node, device)
            else:
                device.published = True
        for name, slot in wanted.items():
            if name not in node.held:
                node.held[name] = Device(slot)

    def _convert(self, node: Node, gpu: Gpu) -> Gpu:
        """Bring a GPU into the mode that is wanted of it, once nothing is on it; nothing new is planned on it until
        then."""
        asked = {one.gpu: one.mode for one in node.modes}
        wanted = (asked.get(gpu.uuid) if gpu.convertible else None) or gpu.declared
        if wanted is gpu.mode or not gpu.healthy:
            return gpu.model_copy(update={"fenced": []}) if node.resets.pop(gpu.uuid, None) else gpu
        occupied = any(device.slot.gpu == gpu.uuid for device in node.held.values())
        if not occupied and gpu.uuid not in node.resets:
            assert all(slot.gpu != gpu.uuid for slot in node.slots), "something is wanted on a GPU that is converted"
            node.resets[gpu.uuid] = self.now
            node.converted.append(self.now)
        if self.now - node.resets.get(gpu.uuid, self.now) < RESET:
            return gpu.model_copy(update={"fenced": list(range(8))})
        del node.resets[gpu.uuid]
        return gpu.model_copy(update={"mode": wanted, "fenced": []})

    def _take_away(self, node: Node, device: Device) -> None:
        if device.state not in {SlotState.DRAINING, SlotState.QUARANTINED}:
            device.state = SlotState.DRAINING
        elif device.slot.gpu in self.lost_gpus:
            device.message = "cannot be looked at"
        elif node.stuck:
            device.state, device.message = SlotState.QUARANTINED, "waits for process 77 (python) to end"
        elif not self._users(node, device):
            node.former[device.slot.gpu] = device.slot.holder
            del node.held[device.slot.device]
        else:
            device.message = "waits for its pod"

    def _make(self, node: Node, device: Device) -> None:
        mine = mask(device.slot)
        others = (one for one in node.held.values() if one is not device and one.slot.gpu == device.slot.gpu)
        if any(one.ready_at is not None and mask(one.slot) & mine for one in others):
            device.state, device.message = SlotState.PREPARING, "waits for its predecessor"
        else:
            device.state, device.ready_at, device.message = SlotState.READY, self.now, ""
            former = [node.former[device.slot.gpu]] if device.slot.gpu in node.former else []
            scrub = HandOverStep(step=HandOverStepType.SCRUB, milliseconds=300)
            device.hand_over = HandOver(former=former, steps=[scrub], scrubbed_bytes=80 << 30)

    def _fault(self, node: Node, device: Device) -> str:
        gpu = next(gpu for gpu in node.gpus if gpu.uuid == device.slot.gpu)
        return "" if gpu.healthy else gpu.message

    def _users(self, node: Node, device: Device) -> list[Pod]:
        """Pods to which kubelet has handed the device."""
        place = (node.name, device.slot.device)
        return [pod for pod in self.pods.values() if pod.claim.prepared and place in pod.claim.devices]

    # --- Kubernetes ---------------------------------------------------------------------------------------------------

    def _controllers(self) -> None:
        """Job controller, Deployment controller and garbage collector."""
        for job in list(self.jobs.values()):
            self._job(job)
        for deployment in self.deployments:
            if deployment.lease in self.templates:
                self._keep_pods(deployment.uid, deployment.lease, deployment.pods, ())

    def _job(self, job: Job) -> None:
        mine = [pod for pod in self.pods.values() if pod.owner == job.facts.uid]
        if job.facts.deleting:
            self._end_job(job, mine)
        elif not job.facts.finished:
            lease = self.leases[job.lease]
            if job.lease in self.templates:
                self._keep_pods(job.facts.uid, job.lease, lease.spec.pods, job.nodes)
            running = len(mine) == lease.spec.pods and all(pod.claim.prepared and not pod.stops_at for pod in mine)
            job.running_since = (job.running_since or self.now) if running else None
            if job.running_since and job.works is not None and self.now - job.running_since >= job.works:
                ended = self.now.replace(microsecond=0)
                job.facts = replace(job.facts, finished="Complete", finished_at=ended)
                for pod in mine:
                    self._gone(pod)

    def _end_job(self, job: Job, pods: list[Pod]) -> None:
        """Kubernetes deletes a Job's pods once it is gone, and a finalizer keeps it from that."""
        if job.lease in self.kept_jobs:
            return
        for pod in pods:
            self._stop(pod, TENANT_GRACE)
        if not pods:
            del self.jobs[job.facts.name]

    def _keep_pods(self, owner: str, lease: str, wanted: int, nodes: tuple[str, ...]) -> None:
        there = [pod for pod in self.pods.values() if pod.owner == owner and pod.stops_at is None]
        for _ in range(wanted - len(there)):
            name, facts = self._uid("pod"), self.leases[lease]
            claim = Claim(facts.key.namespace, f"{name}-claim", self._uid("claim"), lease, facts.spec.gpus.count)
            self.pods[name] = Pod(name, name, owner, claim, nodes)

    def _schedule(self) -> None:
        """kube-scheduler binds what it can, kubelet prepares what was bound before."""
        for pod in self.pods.values():
            if pod.claim.devices:
                pod.claim.prepared = pod.claim.prepared or self._preparable(pod)
            elif pod.stops_at is None:
                self._bind(pod)

    def _preparable(self, pod: Pod) -> bool:
        nodes = [(self.nodes[node], device) for node, device in pod.claim.devices]
        return pod.stops_at is None and all(
            node.agent and device in node.held and node.held[device].published for node, device in nodes
        )

    def _bind(self, pod: Pod) -> None:
        taken = {place for other in self.pods.values() for place in other.claim.devices}
        for node in self.nodes.values():
            if not node.ready or (pod.nodes and node.name not in pod.nodes):
                continue
            free = [
                (node.name, name)
                for name, device in node.held.items()
                if device.published
                and device.slot.holder.uid == pod.claim.holder
                and pod.claim.only in ("", name)
                and (node.name, name) not in taken
            ]
            if len(free) >= pod.claim.wants:
                pod.claim.devices = tuple(free[: pod.claim.wants])
                return

    def _stop(self, pod: Pod, grace: timedelta) -> None:
        if pod.stops_at is None:
            pod.stops_at = self.now + (grace if pod.claim.prepared else timedelta())

    def _finish_stopping(self) -> None:
        for pod in list(self.pods.values()):
            if pod.stops_at is not None and pod.stops_at <= self.now:
                self._gone(pod)

    def _gone(self, pod: Pod) -> None:
        del self.pods[pod.name]
        self.miner_claims.pop(pod.claim.name, None)

    def _vanish(self, lease: str) -> None:
        """The object is gone and the garbage collector takes what it owned."""
        del self.leases[lease]
        self.templates.pop(lease, None)
        for job in [job for job in self.jobs.values() if job.lease == lease]:
            del self.jobs[job.facts.name]
        self.deployments = [one for one in self.deployments if one.lease != lease]
        for pod in self.pods.values():
            if pod.claim.holder == lease:
                self._stop(pod, TENANT_GRACE)

    # --- views --------------------------------------------------------------------------------------------------------

    def _records_of(self, lease: LeaseFacts) -> tuple[RecordFacts, ...]:
        contract = lease.status.contract or lease.uid
        found = [
            record
            for name, record in self.records.items()
            if record.spec.contract == contract and name not in self.unreadable
        ]
        return () if self._is_history(lease) else tuple(sorted(found, key=lambda record: record.spec.segment))

    def _is_history(self, lease: LeaseFacts) -> bool:
        settled = any(
            one.type is ConditionType.SETTLED and one.status is ConditionStatus.TRUE for one in lease.status.conditions
        )
        return settled and not lease.finalized and lease.deleted_at is None

    def _miners(self) -> Iterator[MinerFacts]:
        for name, claim in self.miner_claims.items():
            pod = self.pods.get(name)
            yield MinerFacts(
                name=name,
                namespace=claim.namespace,
                pool=claim.holder,
                node=claim.node,
                device=claim.only,
                pod_name=pod.name if pod else "",
                pod_uid=pod.uid if pod else "",
                claim_uid=claim.uid,
                revision=pod.revision if pod else "",
                running=claim.prepared and pod is not None and pod.stops_at is None,
                deleting=pod is not None and pod.stops_at is not None,
            )

    def _uid(self, kind: str) -> str:
        return f"{kind}-{next(self._names)}"


def _ref(pod: Pod) -> PodRef:
    return PodRef(pod.claim.namespace, pod.name, pod.uid, warned_of=pod.warned_of)


def _depends(action: Action, failed: set[str], left_alone: set[str]) -> bool:
    match action:
        case SetSlots():
            return not action.requires.isdisjoint(failed)
        case StopMiner():
            return action.miner.node in left_alone
        case StartMiner():
            return action.node in left_alone
        case _:
            return False


def mask(slot: Slot) -> int:
    """Memory slices of a slot on an A100-80GB as bits."""
    return 0xFF if slot.profile == FULL else mask_of(MODEL, Placement(slot.profile, slot.start))
