"""The demo: one story on a real API server, in which every step counts only once it was observed there.

Leases take GPUs from miners, share one, wait, are extended, expire, complete, are deleted and paid for. It types what a
user would type (kubectl) and looks at what everybody can see; it writes no status and asks the operator for nothing but
its metrics.
"""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final, TypeVar

import aiohttp
from rich.console import Console

from gpu_tenancy.api.base import ConditionStatus, format_duration, parse_duration
from gpu_tenancy.api.lease import ConditionType, LeaseCondition, Reason
from gpu_tenancy.api.node import ObservedSlot
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.kube import resources
from gpu_tenancy.mig.profiles import MEMORY_SLICES
from tests.cluster import bill, conservation
from tests.cluster.api import ApiError, Object
from tests.cluster.binaries import BuildError
from tests.cluster.control_plane import KubectlError
from tests.cluster.observed import NotSeenError, Observed
from tests.cluster.picture import Scene
from tests.cluster.processes import ProgramError
from tests.cluster.sights import KINDS, Roster, Sights, runs
from tests.cluster.telling import Telling
from tests.cluster.up import BOOK, GPUS, NAMESPACES, POOL, SERVERS, furnish
from tests.cluster.world import OPERATOR, ROOT, World, agent_name

T = TypeVar("T")

TENANT: Final = "team-a"
AGENTS: Final = tuple(agent_name(server.name) for server in SERVERS)
MANIFESTS: Final = ROOT / "tests" / "cluster" / "story"
ALL_MINING: Final = Counter({"full": 14, "7g.80gb": 2})
"""Profiles on which miners run when nothing is rented."""
EXTENDED: Final = "20m"
HOLD_SECONDS: Final = 2.0
"""How long the Deployment of an ended lease is watched for not getting its GPU back."""
POOL_NAME: Final = "idle"
"""Of the MiningPool in examples/3-miningpool.yaml."""
STORY_SECONDS: Final = 90.0
"""How long the story may take once the world is up; a newcomer watches it to its end."""
PATIENCE_SECONDS: Final = 30.0
"""How long a step waits for each thing it has to see; the longest term of the story is 20 s."""
LOG_LINES: Final = 20
FAILED: Final = 1
INTERRUPTED: Final = 130


class Story:
    """What happens, step by step. A step returns the sentence of what was seen, or raises NotSeenError."""

    def __init__(self, world: World, observed: Observed, telling: Telling) -> None:
        self._world = world
        self._observed = observed
        self._sights = Sights(observed, TENANT)
        self._telling = telling
        self._bill: list[bill.Line] = []
        self._before_rent: conservation.Reading | None = None

    async def tell(self) -> None:
        """All steps, one after the other."""
        for index, (_, tell) in enumerate(STEPS):
            with self._telling.step(index) as saw:
                saw(await tell(self))

    def scene(self) -> Scene:
        """What the API server shows right now, for the picture."""
        leases = self._observed.ever(resources.GPU_LEASES)
        uids = (lease["metadata"]["uid"] for lease in leases)
        return Scene(
            now=datetime.now(UTC),
            elapsed=self._telling.elapsed,
            nodes=self._observed.all(resources.GPU_NODES),
            leases=leases,
            gone=frozenset(uid for uid in uids if not self._observed.exists(uid)),
            pods=self._observed.all(resources.PODS),
            records=self._observed.all(resources.USAGE_RECORDS),
            steps=self._telling.present(),
        )

    def summary(self, console: Console) -> None:
        """Hand-over time and bill, for the end."""
        seconds = self._sights.seconds_to_ready("train")
        _say(console, f"\nHand-over: train was Ready {seconds:.2f} s after it appeared on the API server.\n")
        console.print(bill.table(self._bill))

    # --- the steps -----------------------------------------------------------------------------------------------

    async def all_mine(self) -> str:
        """Every GPU is mined on before anybody rents."""
        self._telling.say(f"$ kubectl apply -f {BOOK.relative_to(ROOT)} -f {POOL.relative_to(ROOT)}")
        await furnish(self._world)
        await self._until_mining(ALL_MINING)
        self._before_rent = await conservation.read(self._world, POOL_NAME)
        return "all 16 GPUs mine: 14 whole ones, and 2 in MIG mode on their 7g.80gb slice"

    async def preempt(self) -> str:
        """A lease takes four GPUs: exactly the four miners on them go."""
        before, gpus = self._sights.roster(), self._sights.gpus()
        await self._apply("1-train.yaml")
        await self._ready("train")
        taken = {slot.gpu for _, slot in self._sights.devices("train")}

        def exactly_those() -> bool:
            stopped = self._sights.stopped(before)
            freed = {gpus[device] for device in stopped.values()}
            return len(stopped) == 4 and freed == taken and not self._sights.started(before)

        await self._see("exactly the 4 miners on train's 4 GPUs to be gone", exactly_those, self._changes(before))
        return (
            f"train has 4 GPUs of {self._nodes('train')}, {self._sights.seconds_to_ready('train'):.2f} s after it "
            "appeared; exactly the 4 miners on them were stopped, 12 mine on undisturbed"
        )

    async def partition(self) -> str:
        """A slice is cut out of a GPU; what is left of that GPU mines on."""
        before = self._sights.roster()
        await self._apply("2-evaluate.yaml")
        await self._ready("evaluate")
        node, slot = self._device("evaluate")

        def rest_mines() -> bool:
            one_for_one = len(self._sights.stopped(before)) == len(self._sights.started(before)) == 1
            return one_for_one and self._sights.mined(slot.gpu) == Counter({"4g.40gb": 1})

        expected = "one miner less on 7g.80gb, and one more on the 4g.40gb beside evaluate's slice"
        await self._see(expected, rest_mines, self._changes(before))
        seconds = self._sights.seconds_to_ready("evaluate")
        return (
            f"evaluate has a {slot.profile} of a GPU of {node}, {seconds:.2f} s after it appeared; the other half of "
            "that GPU mines on as 4g.40gb"
        )

    async def wait_in_queue(self) -> str:
        """What does not fit waits, and nobody is stopped for it."""
        before = self._sights.roster()
        await self._apply("3-pretrain.yaml")

        def waits() -> LeaseCondition | None:
            ready = self._sights.condition("pretrain", ConditionType.READY)
            first = self._sights.status("pretrain").position == 1
            return ready if ready and first and ready.reason is Reason.QUEUED else None

        ready = await self._see("pretrain at position 1 of the queue", waits, self._state("pretrain"))
        if self._sights.stopped(before) or self._sights.started(before):
            raise NotSeenError("no miner to be stopped for a lease that does not fit", self._changes(before)())
        return f"pretrain waits. {ready.message}"

    async def own_deployment(self) -> str:
        """A tenant's own Deployment runs on its lease."""
        await self._apply("4-notebook.yaml")
        await self._ready("notebook")
        node, slot = self._device("notebook")

        def on_it(pod: Object) -> bool:
            return runs(pod) and self._sights.allocated(pod) == {(node, slot.device)}

        expected = f"a pod of the Deployment to run on device {slot.device} of {node}"
        await self._see(expected, lambda: any(map(on_it, self._sights.pods("notebook"))), self._notebook_pods)
        return f"the Deployment notebook runs on its lease's device, a {slot.profile} of {node}"

    async def extend(self) -> str:
        """Raising the duration moves the end."""
        before = self._sights.status("train")
        assert before.expires_at is not None
        assert before.accepted_duration is not None
        longer = parse_duration(EXTENDED) - parse_duration(before.accepted_duration)
        end = before.expires_at + longer
        patch = json.dumps({"spec": {"term": {"duration": EXTENDED}}})
        await self._kubectl("patch", "gpul", "train", "-n", TENANT, "--type=merge", "-p", patch)

        def moved() -> bool:
            status = self._sights.status("train")
            return status.expires_at == end and status.accepted_duration == EXTENDED

        expected = f"train's status.expiresAt to move by {format_duration(longer)} to {end:%H:%M:%S}"
        await self._see(expected, moved, lambda: f"status.expiresAt {self._sights.status('train').expires_at}")
        return f"train was extended to {EXTENDED}: it ends at {end:%H:%M:%S} instead of {before.expires_at:%H:%M:%S}"

    async def notice(self) -> str:
        """The tenant is told before the end, and keeps the device until then."""

        def told() -> LeaseCondition | None:
            given = ConditionType.EXPIRED, ConditionStatus.FALSE, Reason.NOTICE_GIVEN
            return self._sights.ever("notebook", *given)

        condition = await self._see("notebook's Expired=False, NoticeGiven", told, self._state("notebook"))
        return f"notebook was given notice. {condition.message}"

    async def complete(self) -> str:
        """A Job that finishes ends its lease."""
        message = await self._ended("evaluate", Reason.COMPLETED)
        return f"evaluate is Completed. {message} Billed: {self._seconds('evaluate')} s"

    async def expire(self) -> str:
        """The end comes; the Deployment does not get the GPU back."""
        await self._ended("notebook", Reason.EXPIRED)
        await self._until_mining(Counter({"full": 10, "7g.80gb": 2}))

        def replaced() -> bool:
            return any(_waits(pod) for pod in self._sights.pods("notebook"))

        await self._see("the Deployment's next pod, Pending", replaced, self._notebook_pods)
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until:
            self._stays_out()
            await asyncio.sleep(0.1)
        return (
            f"notebook is Expired, {self._seconds('notebook')} s billed. Its slices mine again; its Deployment's next "
            "pod is Pending and stays so"
        )

    async def delete(self) -> str:
        """Deleting a lease ends it and bills it."""
        await self._kubectl("delete", "-f", str(MANIFESTS / "1-train.yaml"))

        def billed() -> bool:
            reasons = [segment.reason for segment in self._sights.segments("train")]
            return not self._sights.exists("train") and reasons == [Reason.DELETED]

        expected = "lease train gone and its one UsageRecord closed with reason Deleted"
        await self._see(expected, billed, lambda: f"{self._sights.state('train')}; {self._ledger('train')}")
        return f"train is Deleted, {self._seconds('train')} s billed"

    async def get_place(self) -> str:
        """The waiting lease gets the room, and runs to its end."""
        expected = "the 12 devices of pretrain, and its place in the queue given up"

        def placed() -> bool:
            return len(self._sights.devices("pretrain")) == 12 and self._sights.status("pretrain").position is None

        await self._see(expected, placed, self._state("pretrain"))
        await self._ready("pretrain")
        message = await self._ended("pretrain", Reason.COMPLETED)
        return f"pretrain got its place, 3 pods × 4 GPUs at once, and is Completed. {message}"

    async def pay(self) -> str:
        """The ledger, the bill, and what each lease said that it cost."""

        def closed() -> list[Object] | None:
            segments = self._sights.segments()
            whole = len(segments) == 4 and all(map(_is_whole, segments))
            return self._sights.records() if whole else None

        records = await self._see("4 closed UsageRecords", closed, self._ledger)
        self._bill = bill.lines(records, datetime.now(UTC))
        if unpriced := [line.lease for line in self._bill if not line.rate]:
            raise NotSeenError("every lease to have its price from the PriceBook", f"no price of {', '.join(unpriced)}")
        due = bill.by_lease(self._bill)
        expected = f"each lease's status.cost to be what its UsageRecords come to: {_money(due)}"
        await self._see(expected, lambda: self._costs(due) == due, lambda: _money(self._costs(due)))
        for line in self._bill:
            self._telling.say(_bill_line(line))
        total = f"{bill.total(self._bill):f} {self._bill[0].currency}"
        return f"the bill of 4 UsageRecords is {total}, to the hundredth what the leases' status.cost says"

    async def conserve(self) -> str:
        """Every slice of every GPU was in exactly one hand at any time, and what was leased is what is billed."""
        first, last = self._before_rent, await conservation.read(self._world, POOL_NAME)
        assert first is not None
        grown, width = last.total - first.total, GPUS * MEMORY_SLICES
        least, most = width * (last.earliest - first.latest), width * (last.latest - first.earliest)
        if not least <= grown <= most:
            raise NotSeenError(f"{least:.1f} to {most:.1f} slice-seconds in all states together", f"{grown:.1f}")
        segments = conservation.stands(self._observed)
        if breaches := conservation.breaches(first, last, segments):
            raise NotSeenError("no slice to be in two hands, and what was leased to be billed", "; ".join(breaches))
        counted = conservation.gained(first, last)
        shares = ", ".join(f"{state} {seconds:.0f}" for state, seconds in counted.items())
        billed = sum(one.billed for one in segments)
        return (
            f"{GPUS} GPUs × {MEMORY_SLICES} slices × {grown / width:.1f} s = {grown:.0f} slice-seconds ({least:.0f} to "
            f"{most:.0f} were due), each in one state: {shares}; of the leased ones {billed} are billed, none "
            "twice; the others are started seconds"
        )

    async def mine_again(self) -> str:
        """Everything is as it was, and the ended lease's Deployment still waits."""
        await self._until_mining(ALL_MINING)
        self._stays_out()
        return "all 16 GPUs mine again"

    # --- what is typed --------------------------------------------------------------------------------------------

    async def _apply(self, name: str) -> None:
        await self._kubectl("apply", "-f", str(MANIFESTS / name))

    async def _kubectl(self, *arguments: str) -> None:
        """Type a command; it is shown as one types it in the root of the repository."""
        shown = (f"'{one}'" if "{" in one else one.replace(f"{ROOT}/", "") for one in arguments)
        self._telling.say(f"$ kubectl {' '.join(shown)}")
        try:
            said = await asyncio.wait_for(self._world.kubectl(*arguments), PATIENCE_SECONDS)
        except TimeoutError as error:
            raise NotSeenError(f"kubectl {arguments[0]} to return", "it still waits", PATIENCE_SECONDS) from error
        if not self._telling.live:
            self._telling.say(said.strip())

    # --- what is seen ---------------------------------------------------------------------------------------------

    async def _see(self, expected: str, look: Callable[[], T | None], seen: Callable[[], str]) -> T:
        """Wait until `look` finds it. Everything that runs must go on running meanwhile."""
        self._telling.awaits(expected)
        watch = asyncio.create_task(self._observed.until(expected, look, seen, PATIENCE_SECONDS))
        while not (await asyncio.wait({watch}, timeout=1.0))[0]:
            for name in (OPERATOR, *AGENTS):
                if not self._world.control_plane.alive(name):
                    watch.cancel()
                    raise NotSeenError(expected, f"the process {name} has ended; {seen()}")
        return await watch

    async def _ready(self, name: str) -> None:
        def ready() -> bool:
            condition = self._sights.condition(name, ConditionType.READY)
            return condition is not None and condition.status is ConditionStatus.TRUE

        await self._see(f"lease {name} to be Ready", ready, self._state(name))

    def _device(self, name: str) -> tuple[str, ObservedSlot]:
        """The one device of a lease that is Ready, and its node."""
        devices = self._sights.devices(name)
        if len(devices) != 1:
            raise NotSeenError(f"one ready device of lease {name}", f"{len(devices)}; {self._sights.state(name)}")
        return devices[0]

    async def _ended(self, name: str, reason: Reason) -> str:
        """Wait until the lease is over for this reason and settled; returns its last message."""

        def over() -> str | None:
            status, settled = self._sights.status(name), self._sights.condition(name, ConditionType.SETTLED)
            if status.ended is None or settled is None or settled.status is not ConditionStatus.TRUE:
                return None
            return status.ended.message if status.ended.reason is reason else None

        return await self._see(f"lease {name} to be {reason} and settled", over, self._state(name))

    async def _until_mining(self, wanted: Counter[str]) -> None:
        expected = f"{wanted.total()} miners, on " + ", ".join(f"{n} × {profile}" for profile, n in wanted.items())
        await self._see(expected, lambda: self._sights.mined() == wanted, lambda: f"{dict(self._sights.mined())}")

    def _stays_out(self) -> None:
        """The Deployment of the ended lease has had one pod on a node, and has no second."""
        if len(self._sights.ever_bound("notebook")) != 1 or any(map(runs, self._sights.pods("notebook"))):
            raise NotSeenError("no pod of the Deployment on a node after its lease's end", self._notebook_pods())

    def _nodes(self, lease: str) -> str:
        return " and ".join(sorted({node for node, _ in self._sights.devices(lease)}))

    def _seconds(self, lease: str) -> int:
        return sum(segment.seconds or 0 for segment in self._sights.segments(lease))

    def _costs(self, of: Mapping[str, Decimal]) -> dict[str, Decimal]:
        """status.cost of the leases, of a deleted one its last."""
        costs = {name: self._sights.status(name).cost for name in of}
        return {name: Decimal(cost.amount) if cost else Decimal(0) for name, cost in costs.items()}

    # --- what was seen instead -------------------------------------------------------------------------------------

    def _state(self, name: str) -> Callable[[], str]:
        return lambda: self._sights.state(name)

    def _changes(self, since: Roster) -> Callable[[], str]:
        def seen() -> str:
            stopped, started = sorted(self._sights.stopped(since).values()), self._sights.started(since)
            mined = dict(self._sights.mined())
            return f"{len(stopped)} miners stopped ({stopped}), {len(started)} started; now they mine on {mined}"

        return seen

    def _notebook_pods(self) -> str:
        pods = self._sights.pods("notebook")
        return "; ".join(f"pod {_name(pod)} {pod.get('status', {}).get('phase')} on {_node(pod)}" for pod in pods)

    def _ledger(self, lease: str | None = None) -> str:
        segments = self._sights.segments(lease)
        return "; ".join(f"{one.lease_name} {one.seconds} s, {one.reason or 'open'}" for one in segments) or "no record"


STEPS: Final = (
    ("all 16 GPUs mine", Story.all_mine),
    ("train takes 4 GPUs from exactly 4 miners", Story.preempt),
    ("evaluate takes a slice of a GPU, whose rest mines on", Story.partition),
    ("pretrain does not fit and waits", Story.wait_in_queue),
    ("a tenant's own Deployment runs on a lease", Story.own_deployment),
    ("train is extended", Story.extend),
    ("notebook is given notice", Story.notice),
    ("evaluate's Job finishes", Story.complete),
    ("notebook expires, its Deployment gets nothing back", Story.expire),
    ("train is deleted", Story.delete),
    ("pretrain gets its place", Story.get_place),
    ("UsageRecords, the bill and every status.cost agree", Story.pay),
    ("no slice-second is lost or counted twice", Story.conserve),
    ("all 16 GPUs mine again", Story.mine_again),
)
"""The story: titles and what happens."""


# --- a whole demo -----------------------------------------------------------------------------------------------------


def run(console: Console) -> int:
    """Set up the world, tell the story in it, and take everything away; returns the exit code."""
    try:
        return asyncio.run(_run(console))
    except KeyboardInterrupt:
        _say(console, "Interrupted; everything was ended and removed.")
        return INTERRUPTED
    except asyncio.CancelledError:
        _say(console, "Terminated; everything was ended and removed.")
        return 128 + signal.SIGTERM
    except (BuildError, ProgramError, ApiError, KubectlError, aiohttp.ClientError, AssertionError) as error:
        _say(console, f"The world of the demo did not come up: {error}", "bold red")
        return FAILED


async def _run(console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    _say(console, "Starting a Kubernetes control plane, an operator, and two nodes of 8 × A100-SXM4-80GB.")
    began = time.monotonic()
    async with World(SERVERS, namespaces=NAMESPACES, drivers=True) as world, Observed(world.api, KINDS) as observed:
        _say(console, f"They are up after {time.monotonic() - began:.1f} s.")
        return await _tell(world, observed, console)


async def _tell(world: World, observed: Observed, console: Console) -> int:
    telling = Telling([title for title, _ in STEPS], console)
    story = Story(world, observed, telling)
    failure: Exception | None = None
    async with telling.drawn(story.scene):
        try:
            await story.tell()
        except (NotSeenError, KubectlError, ApiError, aiohttp.ClientError) as error:
            failure = error
    telling.summary()
    if failure is not None:
        _explain(failure, telling, world, console)
        return FAILED
    story.summary(console)
    return verdict(telling.elapsed, console)


def verdict(seconds: float, console: Console) -> int:
    """Say how long a story took of which every step was observed; returns the exit code. Too long is a failure."""
    if seconds > STORY_SECONDS:
        told = f"Every step was observed, but it took {seconds:.1f} s; at most {STORY_SECONDS:.0f} s are allowed."
        _say(console, f"\n{told}", "bold red")
        return FAILED
    _say(console, f"\nEvery step was observed, in {seconds:.1f} s.", "bold green")
    return 0


def _explain(failure: Exception, telling: Telling, world: World, console: Console) -> None:
    """Which step failed, what was expected, what was seen, and what the operator said last."""
    step = telling.present_title()
    _say(console, f"\nThe demo ends at the step “{step}”: {failure}", "bold red")
    for name in (OPERATOR, *AGENTS):
        # An agent's log says nothing about the operator's plans, unless the agent is no more.
        if name == OPERATOR or not world.control_plane.alive(name):
            log = world.control_plane.log_tail(name, LOG_LINES)
            _say(console, f"\nThe last lines of the {name}:\n{log or '(it has logged nothing)'}")


def _say(console: Console, text: str, style: str | None = None) -> None:
    """A sentence as it is: nothing in it is markup, and a log keeps it in one line."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _is_whole(segment: UsageRecordSpec) -> bool:
    """Closed, with the seconds that lie between its ends."""
    if segment.billable_to is None or segment.seconds is None:
        return False
    return (segment.billable_to - segment.billable_from).total_seconds() == segment.seconds > 0


def _bill_line(line: bill.Line) -> str:
    what = f"{line.devices} × {line.profile} × {line.seconds} s × {line.rate}/h"
    return f"{line.contract} {line.lease}: {what} = {line.amount} {line.currency}"


def _money(of: Mapping[str, Decimal]) -> str:
    return ", ".join(f"{name} {amount:f}" for name, amount in sorted(of.items()))


def _waits(pod: Object) -> bool:
    """Pending, on no node, and not on its way out."""
    pending = pod.get("status", {}).get("phase") == "Pending" and not pod["spec"].get("nodeName")
    return pending and "deletionTimestamp" not in pod["metadata"]


def _name(pod: Object) -> str:
    name: str = pod["metadata"]["name"]
    return name


def _node(pod: Object) -> str:
    return pod["spec"].get("nodeName") or "no node"
