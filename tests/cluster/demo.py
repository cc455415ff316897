"""The demo: one story on a real API server, in which every step counts only once it was observed there.

Leases take GPUs from miners, share one, wait, are extended, expire, complete, are deleted and paid for. It types what a
user would type (kubectl) and looks at what everybody can see; it neither writes a status nor asks the operator.
"""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from gpu_tenancy.api import names
from gpu_tenancy.api.base import ConditionStatus, HolderKind, format_duration, parse_duration
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus, LeaseCondition, Reason
from gpu_tenancy.api.node import GpuNodeStatus, ObservedSlot, SlotState
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.kube import resources
from gpu_tenancy.mig.profiles import MEMORY_SLICES, slices
from tests.cluster import bill
from tests.cluster.api import ApiError, Object
from tests.cluster.binaries import BuildError
from tests.cluster.control_plane import KubectlError
from tests.cluster.observed import NotSeenError, Observed
from tests.cluster.picture import Scene
from tests.cluster.processes import ProgramError
from tests.cluster.telling import Telling
from tests.cluster.up import BOOK, GPUS, NAMESPACES, POOL, SERVERS, furnish
from tests.cluster.world import OPERATOR, ROOT, World

TENANT: Final = "team-a"
MANIFESTS: Final = ROOT / "tests" / "cluster" / "story"
KINDS: Final = (
    resources.GPU_NODES,
    resources.GPU_LEASES,
    resources.USAGE_RECORDS,
    resources.PODS,
    resources.RESOURCE_CLAIMS,
)
ALL_MINING: Final = Counter({"full": 14, "7g.80gb": 2})
"""Profiles on which miners run when nothing is rented."""
EXTENDED: Final = "20m"
HOLD_SECONDS: Final = 2.0
"""How long the Deployment of an ended lease is watched for not getting its GPU back."""
ROUNDING_SECONDS: Final = 3
"""A segment is billed in whole seconds, and the operator notes its ends when it sees them."""
LOG_LINES: Final = 20
INTERRUPTED, TERMINATED, FAILED = 130, 143, 1


@dataclass(frozen=True, slots=True)
class Reading:
    """Slice-seconds by state, as the operator exports them, and between which instants they were counted up."""

    states: Mapping[str, float]
    earliest: float
    latest: float
    """Seconds of `time.monotonic`."""

    @property
    def total(self) -> float:
        """Slice-seconds of all states together."""
        return sum(self.states.values())


class Story:
    """What happens, step by step. Each step returns the sentence of what was seen, or raises NotSeenError."""

    def __init__(self, world: World, observed: Observed, telling: Telling) -> None:
        self._world = world
        self._observed = observed
        self._telling = telling
        self._bill: list[bill.Line] = []
        self._hand_over = 0.0
        self._first_reading: Reading | None = None

    @staticmethod
    def titles() -> list[str]:
        """The steps' titles, in order."""
        return [title for title, _ in _STEPS]

    async def tell(self) -> None:
        """All steps, one after the other."""
        for index, (_, tell) in enumerate(_STEPS):
            with self._telling.step(index) as saw:
                saw(await tell(self))

    def scene(self) -> Scene:
        """What the API server shows right now, for the picture."""
        leases = self._observed.ever(resources.GPU_LEASES)
        return Scene(
            now=datetime.now(UTC),
            elapsed=self._telling.elapsed,
            nodes=self._observed.all(resources.GPU_NODES),
            leases=leases,
            gone=frozenset(_uid(one) for one in leases if not self._observed.exists(_uid(one))),
            pods=self._observed.all(resources.PODS),
            records=self._observed.all(resources.USAGE_RECORDS),
            steps=self._telling.present(),
        )

    def summary(self, console: Console) -> None:
        """Hand-over time and bill, for the end."""
        console.print(
            f"\nHand-over: train was Ready {self._hand_over:.2f} s after it appeared on the API server "
            "(four miners stopped, 0 s of MIG time).\n",
            highlight=False,
        )
        console.print(bill.table(self._bill))

    # --- the steps -----------------------------------------------------------------------------------------------

    async def all_mine(self) -> str:
        """Every GPU is mined on before anybody rents."""
        self._telling.say(f"$ kubectl apply -f {_typed(BOOK)} -f {_typed(POOL)}")
        await furnish(self._world)
        await self._until_mining(ALL_MINING)
        self._first_reading = await self._read()
        return "all 16 GPUs mine: 14 whole ones, and 2 in MIG mode on their 7g.80gb slice"

    async def preempt(self) -> str:
        """A lease takes four GPUs: exactly the four miners on them go."""
        before, places = self._miners(), self._gpus_by_device()
        await self._apply("1-train.yaml")
        await self._ready("train")
        gpus = {slot.gpu for _, slot in self._devices("train")}

        def exactly_those() -> bool:
            now = self._miners()
            stopped = {places[_device(before[uid])] for uid in before.keys() - now.keys()}
            return len(before.keys() - now.keys()) == 4 and stopped == gpus and not self._newcomers(before)

        await self._see("exactly the four miners on train's GPUs to be gone and all others untouched", exactly_those,
                        lambda: self._changes(before))  # fmt: skip
        self._hand_over = self._ready_after("train")
        return f"train has 4 GPUs {self._where('train')} {self._hand_over:.2f} s after it appeared; exactly 4 of 16 " \
               "miners were stopped, those on its GPUs"  # fmt: skip

    async def partition(self) -> str:
        """A slice is cut out of a GPU; what is left of that GPU mines on."""
        before = self._miners()
        await self._apply("2-evaluate.yaml")
        await self._ready("evaluate")
        [(node, slot)] = self._devices("evaluate")

        def rest_mines() -> bool:
            beside = self._mined_on(slot.gpu)
            gone = before.keys() - self._miners().keys()
            return beside == Counter({"4g.40gb": 1}) and len(gone) == 1 and len(self._newcomers(before)) == 1

        await self._see("one miner less on 7g.80gb and one more on the 4g.40gb beside evaluate's slice", rest_mines,
                        lambda: f"{dict(self._mined_on(slot.gpu))} beside it; {self._changes(before)}")  # fmt: skip
        return f"evaluate has {slot.profile} of a GPU of {node}, {self._ready_after('evaluate'):.2f} s after it " \
               "appeared; the other half mines on as 4g.40gb"  # fmt: skip

    async def wait_in_queue(self) -> str:
        """What does not fit waits, and nobody is stopped for it."""
        before = self._miners()
        await self._apply("3-pretrain.yaml")

        def waits() -> LeaseCondition | None:
            ready = self._condition("pretrain", ConditionType.READY)
            queued = ready is not None and ready.reason is Reason.QUEUED and self._status("pretrain").position == 1
            return ready if queued else None

        ready = await self._see("pretrain at position 1 of the queue", waits, lambda: self._state("pretrain"))
        if before.keys() != self._miners().keys():
            raise NotSeenError("no miner stopped for a lease that does not fit", self._changes(before), 0)
        return f"pretrain waits: {ready.message}"

    async def own_deployment(self) -> str:
        """A tenant's own Deployment runs on its lease."""
        await self._apply("4-notebook.yaml")
        await self._ready("notebook")
        [(node, slot)] = self._devices("notebook")

        def runs() -> bool:
            return any(_phase(pod) == "Running" and slot.device in self._allocated(pod) for pod in self._notebooks())

        await self._see(f"the Deployment's pod to run on {slot.device}", runs, self._notebook_pods)
        return f"the Deployment notebook runs on its lease: {slot.profile} of the same GPU of {node}"

    async def extend(self) -> str:
        """Raising the duration moves the end."""
        before = self._status("train").expires_at
        assert before is not None, "a lease that is Ready and has a duration has an end"
        spec = GpuLeaseSpec.model_validate(self._lease("train")["spec"])
        longer = parse_duration(EXTENDED) - parse_duration(spec.term.duration or "0s")
        patch = f'{{"spec":{{"term":{{"duration":"{EXTENDED}"}}}}}}'
        await self._kubectl("patch", "gpul", "train", "-n", TENANT, "--type=merge", "-p", patch)

        def moved() -> bool:
            status = self._status("train")
            return status.expires_at == before + longer and status.accepted_duration == EXTENDED

        await self._see(f"train's status.expiresAt to move by {format_duration(longer)}", moved,
                        lambda: f"{self._status('train').expires_at} after {before}")  # fmt: skip
        return f"train was extended: it ends at {before + longer:%H:%M:%S}, not at {before:%H:%M:%S}"

    async def notice(self) -> str:
        """The tenant is told before the end, and keeps the device until then."""

        def told() -> LeaseCondition | None:
            return self._was("notebook", ConditionType.EXPIRED, ConditionStatus.FALSE, Reason.NOTICE_GIVEN)

        condition = await self._see("Expired=False, NoticeGiven of notebook", told, lambda: self._state("notebook"))
        return f"notebook was given notice: {condition.message}"

    async def complete(self) -> str:
        """A Job that finishes ends its lease."""
        status = await self._ended("evaluate", Reason.COMPLETED)
        return f"evaluate ended with its Job, {self._seconds('evaluate')} s billed: {status.message}"

    async def expire(self) -> str:
        """The end comes; the Deployment does not get the GPU back."""
        await self._ended("notebook", Reason.EXPIRED)
        await self._until_mining(Counter({"full": 10, "7g.80gb": 2}))
        await self._see("a new pod of the Deployment, Pending", self._replaced, self._notebook_pods)
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until:
            self._stays_out()
            await asyncio.sleep(0.1)
        return f"notebook expired after {self._seconds('notebook')} s; both MIG GPUs mine on 7g.80gb again, and its " \
               "Deployment's next pod stays Pending"  # fmt: skip

    async def delete(self) -> str:
        """Deleting a lease ends it and bills it."""
        uid = _uid(self._lease("train"))
        await self._kubectl("delete", "-f", str(MANIFESTS / "1-train.yaml"))

        def billed() -> bool:
            record = self._record("train")
            return not self._observed.exists(uid) and record.reason is Reason.DELETED

        await self._see("train gone, and its UsageRecord closed with reason Deleted", billed,
                        lambda: f"UsageRecord {self._record('train').reason}")  # fmt: skip
        return f"train was deleted, {self._seconds('train')} s billed"

    async def get_place(self) -> str:
        """The waiting lease gets the room."""
        await self._ready("pretrain")
        devices = self._devices("pretrain")
        if len(devices) != 12 or self._status("pretrain").position is not None:
            raise NotSeenError("12 devices for pretrain and no position any more", self._state("pretrain"), 0)
        await self._ended("pretrain", Reason.COMPLETED)
        return f"pretrain got its place: 3 pods × 4 GPUs {self._where('pretrain')}; its Job has finished"

    async def pay(self) -> str:
        """The ledger, the bill, and what each lease said that it cost."""
        records = await self._see("four closed UsageRecords", self._closed, lambda: f"{self._closed()}")
        self._bill = bill.lines(records, datetime.now(UTC))
        costs = bill.by_lease(self._bill)

        def said() -> Mapping[str, Decimal]:
            return {name: Decimal(self._last_cost(name)) for name in costs}

        await self._see(f"each lease's status.cost to be its UsageRecords' ({_money(costs)})",
                        lambda: said() == costs, lambda: _money(said()))  # fmt: skip
        for line in self._bill:
            self._telling.say(f"{line.contract} {line.lease}: {line.devices} × {line.profile} × {line.seconds} s "
                              f"at {line.rate}/h = {line.amount} {line.currency}")  # fmt: skip
        total = f"{bill.total(self._bill):f} {self._bill[0].currency}"
        return f"4 UsageRecords are closed; the bill is {total}, the same as the leases' status.cost"

    async def conserve(self) -> str:
        """Every slice of every GPU was in exactly one hand at any time."""
        first, last = self._first_reading, await self._read()
        assert first is not None, "the first step reads it"
        grown, width = last.total - first.total, GPUS * MEMORY_SLICES
        least, most = width * (last.earliest - first.latest), width * (last.latest - first.earliest)
        if not least <= grown <= most:
            raise NotSeenError(f"{least:.0f} to {most:.0f} slice-seconds in all states", f"{grown:.0f}", 0)
        leased = last.states["leased"] - first.states["leased"]
        self._agrees_with_bill(leased)
        shares = ", ".join(f"{state} {last.states[state] - first.states[state]:.0f}" for state in sorted(last.states))
        return f"{grown:.0f} slice-seconds = {GPUS} GPUs × {MEMORY_SLICES} slices × {grown / width:.1f} s, each in one " \
               f"state: {shares}"  # fmt: skip

    async def mine_again(self) -> str:
        """Everything is as it was, and the ended lease's Deployment still waits."""
        await self._until_mining(ALL_MINING)
        self._stays_out()
        return "all 16 GPUs mine again"

    # --- what is typed --------------------------------------------------------------------------------------------

    async def _apply(self, name: str) -> None:
        await self._kubectl("apply", "-f", str(MANIFESTS / name))

    async def _kubectl(self, *arguments: str) -> None:
        """Type a command: shown as it would be typed in the root of the repository."""
        shown = (f"'{one}'" if "{" in one else one.replace(f"{ROOT}/", "") for one in arguments)
        self._telling.say(f"$ kubectl {' '.join(shown)}")
        said = await self._world.kubectl(*arguments)
        if not self._telling.live:
            self._telling.say(said.strip())

    # --- what is seen ---------------------------------------------------------------------------------------------

    async def _see[T](self, expected: str, look: Callable[[], T | None], seen: Callable[[], str]) -> T:
        return await self._observed.until(expected, look, seen)
