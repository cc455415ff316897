"""The cluster of a simulation: what a plan says is done here, at once, as API server, agents and kubelet would do it.

Facts that did not change stay the same objects from one snapshot to the next, as the operator's own do, and a snapshot
costs what changed. Pods are instants: a holder has let go as soon as it is told to; making a device ready takes as long
as the description says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final

from gpu_tenancy.api.base import HolderKind
from gpu_tenancy.api.lease import GpuLeaseStatus
from gpu_tenancy.api.node import Gpu, ObservedSlot, Slot, SlotState, WantedMode
from gpu_tenancy.api.pool import MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantStatus
from gpu_tenancy.core import status
from gpu_tenancy.core.actions import (
    Action,
    Admit,
    CloseRecord,
    CreateClaimTemplate,
    DeleteClaimTemplate,
    OpenRecord,
    Outlook,
    Plan,
    SetSlots,
    StartMiner,
    StopMiner,
    Unbind,
)
from gpu_tenancy.core.devices import miner_name
from gpu_tenancy.core.mining import revision
from gpu_tenancy.core.platform_status import tenant_status
from gpu_tenancy.core.slices import Bill, SliceState, billed_mask, slice_states
from gpu_tenancy.core.snapshot import (
    BookFacts,
    Key,
    LeaseFacts,
    MinerFacts,
    NodeFacts,
    PoolFacts,
    RecordFacts,
    Snapshot,
    TenantFacts,
)
from gpu_tenancy.mig.profiles import FULL, MEMORY_SLICES
from gpu_tenancy.simulate.description import Description, HandOver, Machine, machines
from gpu_tenancy.simulate.past import Past
from gpu_tenancy.simulate.trace import Request

FOREVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""Until when a healthy agent counts as heard: heartbeats are not simulated one by one."""
HEARTBEAT: Final = timedelta(seconds=40)
"""How long the last heartbeat of a node counts after it is lost."""
LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""When all that is described was created."""

Place = tuple[str, str]
"""Name of a node, and UUID of one of its GPUs."""
Later = Callable[[timedelta, Callable[[], bool]], None]
"""Does something after a while; it says whether the operator has to look."""


class Node:
    """A node: its devices as promised and as its agent has them."""

    def __init__(self, machine: Machine, changed: set[str]) -> None:
        """`changed`: where it puts its name whenever something about it changes."""
        self.name = machine.name
        self._changed = changed
        self.gpus: dict[str, Gpu] = {gpu.uuid: gpu for gpu in machine.gpus}
        self.slots: tuple[Slot, ...] = ()
        self.modes: tuple[WantedMode, ...] = ()
        self.observed: dict[str, ObservedSlot] = {}
        self.resets: set[str] = set()
        """UUIDs of the GPUs that are being brought into another mode."""
        self.lost = False
        self._conversions: tuple[datetime, ...] = ()
        self._generation = 1
        self._agent_until = FOREVER
        self._machine = machine
        self._facts: NodeFacts | None = None

    @property
    def facts(self) -> NodeFacts:
        """As the operator sees it: the same object until something changes."""
        if self._facts is None:
            ready = (one.device for one in self.observed.values() if one.state is SlotState.READY)
            self._facts = NodeFacts(
                self.name,
                self._generation,
                tuple(self.gpus.values()),
                self.slots,
                tuple(self.observed.values()),
                published=frozenset(ready),
                labels=self._machine.labels,
                allocatable=self._machine.amount,
                ready=not self.lost,
                agent_until=self._agent_until,
                modes=self.modes,
                conversions=self._conversions,
            )
        return self._facts

    def of_gpu(self, uuid: str) -> NodeFacts:
        """The node as if it had this one GPU: in whose hands its slices are does not depend on the others."""
        return NodeFacts(
            self.name,
            self._generation,
            (self.gpus[uuid],),
            tuple([slot for slot in self.slots if slot.gpu == uuid]),
            tuple([report for report in self.observed.values() if report.gpu == uuid]),
            ready=not self.lost,
            agent_until=self._agent_until,
            modes=self.modes,
        )

    def look(self, uuid: str, bills: Iterable[Bill]) -> Hashable:
        """All of a GPU that the states of its slices depend on, but for what it and its devices are called: which of
        them are the same matters, so each is a number."""
        gpu, numbers = self.gpus[uuid], count()
        known: dict[str, int] = defaultdict(lambda: next(numbers))
        wanted = [(known[one.device], one.profile, one.start, one.holder.kind) for one in self.slots if one.gpu == uuid]
        reports = [
            (known[one.device], one.profile, one.start, one.holder.kind, one.state)
            for one in self.observed.values()
            if one.gpu == uuid
        ]
        billed = [(known[one.device], one.mask) for one in bills]
        modes = [one.mode for one in self.modes if one.gpu == uuid]
        own = (gpu.model, gpu.mode, gpu.convertible, gpu.healthy, gpu.fenced_mask, self.lost)
        return own, tuple(wanted), tuple(reports), tuple(billed), tuple(modes)

    def changed(self) -> None:
        """Something about it is no longer as it was."""
        self._facts = None
        self._changed.add(self.name)

    def promise(self, action: SetSlots) -> set[str]:
        """Other devices should exist, and GPUs be in other modes; the UUIDs of the GPUs of which that is true."""
        former, wanted = ({slot.device: slot.gpu for slot in slots} for slots in (self.slots, action.slots))
        others = {gpu for _, gpu in former.items() ^ wanted.items()}
        others |= {one.gpu for one in {*self.modes} ^ {*action.modes}}
        self.slots, self.modes, self._conversions = action.slots, action.modes, action.conversions
        self._generation += 1
        self.changed()
        return others

    def update(self, uuid: str, **fields: object) -> None:
        """A GPU is not what it was."""
        self.gpus[uuid] = self.gpus[uuid].model_copy(update=fields)
        self.changed()

    def to_convert(self) -> list[str]:
        """UUIDs of the GPUs that should be in another mode, and have nobody's device any more."""
        asked = {one.gpu: one.mode for one in self.modes}
        used = {report.gpu for report in self.observed.values()}
        return [
            gpu.uuid
            for gpu in self.gpus.values()
            if gpu.convertible
            and gpu.healthy
            and gpu.mode is not asked.get(gpu.uuid, gpu.declared)
            and not (gpu.uuid in used or gpu.uuid in self.resets)
        ]

    def lose(self, now: datetime) -> None:
        """The machine is gone."""
        self.lost, self._agent_until = True, now + HEARTBEAT
        self.changed()

    def recover(self) -> None:
        """The machine is back, and has none of its devices yet."""
        self.lost, self._agent_until = False, FOREVER
        self.observed.clear()
        self.changed()


class Cluster:
    """Everything that a plan is made from and acts upon."""

    def __init__(self, description: Description, later: Later) -> None:
        self.now = LONG_AGO
        self.leases: dict[str, LeaseFacts] = {}
        self._changed: set[str] = set()
        """Names of the nodes whose facts are not those of the last snapshot."""
        self.nodes = {machine.name: Node(machine, self._changed) for machine in machines(description)}
        self._nodes_facts = {name: node.facts for name, node in self.nodes.items()}
        self._bills: dict[str, list[Bill]] = defaultdict(list)
        """By UUID of the GPU."""
        self._states: dict[Hashable, Mapping[SliceState, int]] = {}
        self.touched: set[Place] = {(name, gpu) for name, node in self.nodes.items() for gpu in node.gpus}
        """GPUs whose slices may be in other hands than when somebody looked last."""
        self.tenants = tuple(
            TenantFacts(one.name, f"tenant-{one.name}", 1, LONG_AGO, one.spec, GpuTenantStatus())
            for one in description.tenants
        )
        self._pools = tuple(_pools(description))
        self._books = tuple(
            BookFacts(one.name, f"book-{one.name}", 1, LONG_AGO, one.spec, PriceBookStatus())
            for one in description.price_books
        )
        self._revisions = {pool.uid: revision(pool.spec) for pool in self._pools}
        self._miners: dict[tuple[str, str], MinerFacts] = {}
        self._policies = description.policies
        self._defaults, self._spot_limits = self._policies.tenant_defaults, self._policies.spot_limits
        self._conversion_rules = self._policies.conversion_rules
        self._past = Past(self._defaults.half_life)
        self._hand_over, self._later = description.hand_over, later

    def snapshot(self) -> Snapshot:
        """What the operator gathers."""
        for name in self._changed:
            self._nodes_facts[name] = self.nodes[name].facts
        self._changed.clear()
        return Snapshot(
            leases=tuple(self.leases.values()),
            pools=self._pools,
            nodes=tuple(self._nodes_facts.values()),
            books=self._books,
            miners=tuple(self._miners.values()),
            tenants=self.tenants,
            tenant_defaults=self._defaults,
            spot_limits=self._spot_limits,
            conversion_rules=self._conversion_rules,
            past_usage=self._past.usage(),
        )

    def ask(self, request: Request) -> str:
        """A lease is created; its UID."""
        uid = f"lease-{request.line}"
        key = Key(request.namespace, request.name)
        self.leases[uid] = LeaseFacts(key, uid, 1, self.now, request.spec, GpuLeaseStatus())
        return uid

    def states_of(self, place: Place) -> Mapping[SliceState, int]:
        """In whose hands the slices of a GPU are: found out once for all GPUs that look the same."""
        name, uuid = place
        node, bills = self.nodes[name], self._bills.get(uuid, ())
        look = node.look(uuid, bills)
        if look not in self._states:
            self._states[look] = slice_states(node.of_gpu(uuid), {name: bills}, self.now)
        return self._states[look]

    # --- what a plan says ---------------------------------------------------------------------------------------------

    def carry_out(self, plan: Plan) -> None:
        """Do all of it."""
        outlooks = {one.lease.uid: one for one in plan.moving if one.admitted_now}
        for action in plan.actions:
            self._do(action, outlooks)
        for one in plan.moving:
            if _tells(one) and one.lease.uid in self.leases:
                self._tell(one)
        if any([*one.commitments] != one.tenant.status.commitments for one in plan.tenants):
            self.tenants = tuple([replace(one.tenant, status=tenant_status(one, self.now)) for one in plan.tenants])

    def _do(self, action: Action, outlooks: Mapping[str, Outlook]) -> None:
        match action:
            case Admit():
                self._change(action.lease.uid, finalized=True)
                self._tell(outlooks[action.lease.uid])
            case SetSlots():
                self._set_slots(self.nodes[action.node], action)
            case StopMiner():
                self._miners.pop((action.miner.node, action.miner.device), None)
            case StartMiner():
                self._start_miner(action)
            case _:
                self._write(action)

    def _write(self, action: Action) -> None:
        """Objects of a lease."""
        match action:
            case OpenRecord():
                self._open(action)
            case CloseRecord():
                self._close(action)
            case CreateClaimTemplate():
                self._change(action.lease.uid, claim_template=f"template-{action.lease.uid}")
            case DeleteClaimTemplate():
                self._change(action.lease.uid, claim_template="")
            case Unbind():
                del self.leases[action.lease.uid]
            case _:
                raise AssertionError(f"no lease of a simulation has pods, Jobs or claims, and yet: {action}")

    def _change(self, uid: str, **fields: object) -> None:
        self.leases[uid] = replace(self.leases[uid], **fields)  # type: ignore[arg-type]  # its own fields

    def _tell(self, outlook: Outlook) -> None:
        self._change(outlook.lease.uid, status=status.lease_status(outlook, None, self.now))

    def _open(self, action: OpenRecord) -> None:
        lease = self.leases[action.lease.uid]
        record = RecordFacts(lease.key.namespace, action.name, action.spec)
        self._change(lease.uid, records=(*lease.records, record))
        for device in action.spec.devices:
            self._bills[device.gpu].append(Bill(device.device, device.gpu, billed_mask(action.spec, device)))
            self.touched.add((device.node, device.gpu))

    def _close(self, action: CloseRecord) -> None:
        end = {"billable_to": action.billable_to, "seconds": action.seconds, "reason": action.reason}
        closed = action.record.spec.model_copy(update=end)
        lease = self.leases[action.uid]
        self._change(lease.uid, records=(*lease.records[:-1], replace(action.record, spec=closed)))
        self._past.note(closed)
        for device in closed.devices:
            self._bills[device.gpu] = [bill for bill in self._bills[device.gpu] if bill.device != device.device]
            self.touched.add((device.node, device.gpu))

    def _start_miner(self, action: StartMiner) -> None:
        name = miner_name(action.node, action.device)
        self._miners[action.node, action.device] = MinerFacts(
            name=name,
            namespace=action.pool.key.namespace,
            pool=action.pool.uid,
            node=action.node,
            device=action.device,
            pod_name=name,
            pod_uid=name,
            claim_uid=name,
            revision=self._revisions[action.pool.uid],
            running=True,
        )

    # --- the agents' side ---------------------------------------------------------------------------------------------

    def _set_slots(self, node: Node, action: SetSlots) -> None:
        self._touch(node, node.promise(action))
        if not node.lost:
            self._follow(node)

    def _follow(self, node: Node) -> None:
        """The agent lets go of what is no longer wanted, and begins to make what is."""
        wanted = {slot.device: slot for slot in node.slots}
        for device in node.observed.keys() - wanted.keys():
            del node.observed[device]
        waits: dict[float, list[str]] = defaultdict(list)
        for slot in node.slots:
            if slot.device not in node.observed:
                node.observed[slot.device] = _observed(slot, SlotState.PREPARING)
                waits[_seconds(self._hand_over, slot)].append(slot.device)
        node.changed()
        for uuid in node.to_convert():
            self._convert(node, uuid)
        for seconds, devices in waits.items():
            self._later(timedelta(seconds=seconds), lambda devices=devices: self._made(node, devices))  # type: ignore[misc]

    def _convert(self, node: Node, uuid: str) -> None:
        """The agent resets a GPU for another mode; nothing is planned on it meanwhile."""
        node.resets.add(uuid)
        node.update(uuid, fenced=list(range(MEMORY_SLICES)))
        self._touch(node, (uuid,))

        def converted() -> bool:
            node.resets.discard(uuid)
            gpu = node.gpus[uuid]
            asked = next((one.mode for one in node.modes if one.gpu == uuid), gpu.declared)
            node.update(uuid, fenced=[], mode=gpu.mode if node.lost or asked is None else asked)
            self._touch(node, (uuid,))
            return True

        self._later(timedelta(seconds=self._hand_over.convert), converted)

    def _made(self, node: Node, devices: Iterable[str]) -> bool:
        """Devices are ready, unless they are no longer wanted or cannot be made; whether a lease has all of its own."""
        complete = False
        for device in devices:
            report = node.observed.get(device)
            if node.lost or report is None or report.state is not SlotState.PREPARING:
                continue
            if not node.gpus[report.gpu].healthy:
                node.observed[device] = report.model_copy(update={"state": SlotState.FAILED})
                self._touch(node, (report.gpu,))
                continue
            node.observed[device] = report.model_copy(update={"state": SlotState.READY, "ready_at": self.now})
            complete = complete or report.holder.kind is HolderKind.GPU_LEASE
            self._touch(node, (report.gpu,))
        node.changed()
        return complete

    def lose(self, name: str) -> None:
        """A node is lost."""
        node = self.nodes[name]
        node.lose(self.now)
        self._touch(node, node.gpus)

    def recover(self, name: str) -> None:
        """A node that was lost is back."""
        node = self.nodes[name]
        node.recover()
        self._follow(node)
        self._touch(node, node.gpus)

    def break_gpu(self, name: str, uuid: str) -> None:
        """A GPU has a fault: what is on it has failed."""
        self._set_health(self.nodes[name], uuid, healthy=False, message="Xid 79: the GPU has fallen off the bus")
        for device, report in self.nodes[name].observed.items():
            if report.gpu == uuid:
                self.nodes[name].observed[device] = report.model_copy(update={"state": SlotState.FAILED})

    def mend_gpu(self, name: str, uuid: str) -> None:
        """A GPU that had a fault is well again; what is wanted on it is made anew."""
        node = self.nodes[name]
        self._set_health(node, uuid, healthy=True, message="")
        for device in [device for device, report in node.observed.items() if report.gpu == uuid]:
            del node.observed[device]
        if not node.lost:
            self._follow(node)

    def _set_health(self, node: Node, uuid: str, *, healthy: bool, message: str) -> None:
        node.update(uuid, healthy=healthy, message=message)
        self._touch(node, (uuid,))

    def _touch(self, node: Node, gpus: Iterable[str]) -> None:
        self.touched.update((node.name, gpu) for gpu in gpus)


def _pools(description: Description) -> Iterable[PoolFacts]:
    for one in description.pools if description.policies.mining else ():
        key = Key(one.namespace, one.name)
        yield PoolFacts(key, f"pool-{one.namespace}-{one.name}", 1, LONG_AGO, one.spec, MiningPoolStatus())


def _observed(slot: Slot, state: SlotState) -> ObservedSlot:
    return ObservedSlot(
        device=slot.device, gpu=slot.gpu, profile=slot.profile, start=slot.start, holder=slot.holder, state=state
    )


def _seconds(times: HandOver, slot: Slot) -> float:
    return times.whole if slot.profile == FULL else times.recut


def _tells(outlook: Outlook) -> bool:
    """Whether the status says something new that a later plan asks it about; what it says of queue and cost only
    people ask, and there are none here."""
    known = outlook.lease.status
    if outlook.admitted_now:
        return False  # told already
    return (
        (outlook.over and known.ended is None)
        or outlook.preemption != known.preemption
        or outlook.reservation != known.reservation
        or outlook.renewals != known.renewals
        or outlook.commitment != known.commitment
    )
