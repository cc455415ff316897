"""A trace lived through: the virtual clock, and the operator's cycle at every instant at which something happens.

Between two instants nothing changes, so nothing is planned. What is left after the end of a lease (its claim template,
its finalizer) is put away with the next plan, whenever that is: nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from heapq import heappop, heappush
from itertools import count
from typing import Final, NamedTuple

from gpu_tenancy.api.base import parse_duration
from gpu_tenancy.core.actions import CloseRecord, OpenRecord, Plan
from gpu_tenancy.core.ledger import segment_end
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.core.tenancy import Tenants, holding
from gpu_tenancy.core.terms import FINAL_REASONS
from gpu_tenancy.simulate.cluster import FOREVER, Cluster
from gpu_tenancy.simulate.description import Description, machines
from gpu_tenancy.simulate.faults import Fault, faults_of
from gpu_tenancy.simulate.room import Room, room_on
from gpu_tenancy.simulate.tally import Tally
from gpu_tenancy.simulate.trace import Request, Trace

MOST_TURNS: Final = 100
"""Plans at one instant after which something must be wrong."""
PROGRESS: Final = 200
"""Instants after which progress is told again."""

Planner = Callable[[Snapshot, datetime], Plan]


class Refused(NamedTuple):
    """A lease that can never be placed as things are."""

    request: Request
    why: str


class UnsettledError(RuntimeError):
    """The planner writes something at one instant again and again."""


class Replay:
    """One simulation."""

    def __init__(self, description: Description, trace: Trace, seed: int = 0, decide: Planner = plan) -> None:
        """`decide`: the planner, or something that looks at it while it works."""
        began = trace.requests[0].submitted if trace.requests else FOREVER
        self.cluster = Cluster(description, self._hand_over)
        self.tally = Tally(began)
        self.plans = 0
        self.refused: list[Refused] = []
        self.requests: dict[str, Request] = {}
        """By UID of their lease, of those that are not over."""
        self.namespaces: set[str] = set()
        """In which leases were asked for."""
        self._decide, self._trace, self._next = decide, trace, 0
        self._now = self.cluster.now = began
        self._queue: list[tuple[datetime, int, Callable[[], bool]]] = []
        self._order = count()
        self._wake: datetime | None = None
        self._down = self._in_hand = 0
        """Things that are out of use, and hand-overs that are not done."""
        self.faults = 0
        self._tenants = Tenants(self.cluster.tenants, description.policies.tenant_defaults)
        self._chances = [
            series for machine in machines(description) for series in faults_of(machine, description.faults, seed)
        ]

    @property
    def share(self) -> float:
        """Part of the trace that was asked for already."""
        return self._next / max(1, len(self._trace.requests))

    def run(self, until: datetime | None = None, tell: Callable[[float], None] = lambda _: None) -> None:
        """Live through the trace, to its end or to an instant."""
        if self._trace.requests:
            self._live(until, tell)
        tell(1.0)

    def _live(self, until: datetime | None, tell: Callable[[float], None]) -> None:
        for series in self._chances:
            self._expect(series)
        self._turns()
        for number in count():
            instant = self._instant()
            if instant is None or (until is not None and instant > until):
                break
            if number % PROGRESS == 0:
                tell(self.share)
            self._pass_to(instant)
            if self._happen(instant):
                self._turns()
        if until is not None:
            self._pass_to(until)
        self._stop()

    # --- the clock ----------------------------------------------------------------------------------------------------

    def _instant(self) -> datetime | None:
        """When something happens next; None: nothing that any lease would notice."""
        asked = self._next < len(self._trace.requests)
        wakes = self._wake is not None and self._wake < FOREVER
        if not (asked or wakes or self._in_hand or self._down):
            return None
        times = [self._queue[0][0]] if self._queue else []
        if asked:
            times.append(self._trace.requests[self._next].submitted)
        if self._wake is not None and wakes:
            times.append(self._wake)
        return min(times, default=None)

    def _pass_to(self, instant: datetime) -> None:
        for place in self.cluster.touched:
            self.tally.has(place, self.cluster.states_of(place))
        self.cluster.touched.clear()
        self.tally.advance(instant, self._room)
        self._now = self.cluster.now = max(instant, self._now)

    def _room(self) -> Room:
        return room_on(node.facts for node in self.cluster.nodes.values())

    def _happen(self, instant: datetime) -> bool:
        """Everything that happens at an instant; whether the operator has to look."""
        looks = self._wake is not None and self._wake <= instant
        while self._queue and self._queue[0][0] <= instant:
            _, _, happens = heappop(self._queue)
            looks |= happens()
        requests = self._trace.requests
        while self._next < len(requests) and requests[self._next].submitted <= instant:
            self._ask(requests[self._next])
            self._next += 1
            looks = True
        return looks

    def _after(self, while_: timedelta, happens: Callable[[], bool]) -> None:
        heappush(self._queue, (self._now + while_, next(self._order), happens))

    def _hand_over(self, while_: timedelta, ends: Callable[[], bool]) -> None:
        """Agents make devices ready: until they are, the simulation goes on."""
        self._in_hand += 1
        self._after(while_, lambda: self._handed_over(ends))

    def _handed_over(self, ends: Callable[[], bool]) -> bool:
        self._in_hand -= 1
        return ends()

    # --- what happens -------------------------------------------------------------------------------------------------

    def _ask(self, request: Request) -> None:
        spec, uid = request.spec, self.cluster.ask(request)
        self.requests[uid] = request
        self.namespaces.add(request.namespace)
        slices = holding(spec.gpus.profile, spec.pods * spec.gpus.count).memory_slices
        seconds = int(parse_duration(spec.term.duration).total_seconds()) if spec.term.duration else 0
        self.tally.asked(spec.tier, self._tenant(request.namespace), slices * seconds)

    def _tenant(self, namespace: str) -> str:
        return self._tenants.of(namespace).title

    def _expect(self, series: Iterator[Fault]) -> None:
        fault = next(series)
        self._after(fault.after, lambda: self._strike(fault, series))

    def _strike(self, fault: Fault, series: Iterator[Fault]) -> bool:
        self._down += 1
        self.faults += 1
        if fault.gpu:
            self.cluster.break_gpu(fault.node, fault.gpu)
        else:
            self.cluster.lose(fault.node)
        self._after(fault.repair, lambda: self._mend(fault, series))
        return True

    def _mend(self, fault: Fault, series: Iterator[Fault]) -> bool:
        self._down -= 1
        if fault.gpu:
            self.cluster.mend_gpu(fault.node, fault.gpu)
        else:
            self.cluster.recover(fault.node)
        self._expect(series)
        return True

    # --- the operator -------------------------------------------------------------------------------------------------

    def _turns(self) -> None:
        """Plan and do, until nothing is left to do at this instant."""
        for _ in range(MOST_TURNS):
            if not self._turn():
                return
        raise UnsettledError(f"the plan for {self._now.isoformat()} does not settle; please report this trace")

    def _turn(self) -> bool:
        """One cycle; whether what it did calls for another one at once."""
        decided = self._decide(self.cluster.snapshot(), self._now)
        self.plans += 1
        self._wake = decided.next_wake
        again = False
        for action in decided.actions:
            if isinstance(action, OpenRecord):
                self._opened(action)
            elif isinstance(action, CloseRecord):
                self._closed(action)
                again = True
        self.cluster.carry_out(decided)
        self._refuse(decided)
        return again

    def _opened(self, action: OpenRecord) -> None:
        request = self.requests[action.lease.uid]
        self.tally.opened(action.spec, self._tenant(request.namespace), self._now - request.submitted)

    def _closed(self, action: CloseRecord) -> None:
        spec, final = action.record.spec, action.reason in FINAL_REASONS
        self.tally.closed(spec, action.seconds, action.reason, self._tenant(spec.lease_namespace))
        if final:
            del self.requests[action.uid]

    def _refuse(self, decided: Plan) -> None:
        """Those that can never be placed leave at once."""
        for uid, refusal in decided.refusals.items():
            lease = self.cluster.leases.get(uid)
            if refusal.final and lease is not None and lease.status.admitted_at is None:
                del self.cluster.leases[uid]
                request = self.requests.pop(uid)
                self.tally.refused(request.spec.tier, self._tenant(request.namespace))
                self.refused.append(Refused(request, refusal.message))

    def _stop(self) -> None:
        """What still runs is counted up to now."""
        for lease in self.cluster.leases.values():
            if (record := lease.open_record) is not None:
                _, seconds = segment_end(record, self._now)
                self.tally.closed(record.spec, seconds, None, self._tenant(record.spec.lease_namespace))
