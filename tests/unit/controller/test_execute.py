"""A plan's actions become calls in the order of its promises; what depends on a call that failed is not done.

The client here is a double that keeps a list: what is under test is the order and what follows from an error. That the
calls do what they should is tested against a real API server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api import names
from gpu_tenancy.api.base import format_time
from gpu_tenancy.api.lease import GpuLeaseStatus, Reason
from gpu_tenancy.controller.execute import FIRST_RETRY, LONGEST_RETRY, Execute
from gpu_tenancy.controller.outcome import Outcome
from gpu_tenancy.controller.settings import Settings
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
    SetSlots,
    StartMiner,
    StopMiner,
    TouchClaim,
    TouchPod,
    Unbind,
)
from gpu_tenancy.core.snapshot import LeaseFacts, LeftClaim, MinerFacts, PodRef, StartingPod
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.errors import AlreadyExists, Conflict, KubeError, NotFound, Rejected, Transient
from gpu_tenancy.kube.resources import Resource
from gpu_tenancy.kube.store import ObjectStore
from tests.unit.controller.facts import CONTAINERS, NOW, Object, admitted, body, lease, pool, record, record_spec, slot

TAKEN: Final = AlreadyExists(409, "AlreadyExists", "exists")
STALE: Final = Conflict(409, "Conflict", "changed")
FORBIDDEN: Final = Rejected(403, "Forbidden", "exceeded quota: jobs")
AWAY: Final = Transient(0, "Unreachable", "no answer")
CLOSED: Final[dict[str, Any]] = {"billableTo": "2026-03-01T11:00:05Z", "seconds": 5, "reason": "Expired"}


class Server:
    """Says yes to everything, except where it was told otherwise; notes every call as (verb, plural, name)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.details: list[dict[str, Any]] = []
        self.held: dict[tuple[str, str], Object] = {}
        """What `get` finds, by plural and name."""
        self._errors: dict[tuple[str, str, str], KubeError] = {}

    def refuse(self, verb: str, plural: str, name: str, error: KubeError) -> None:
        """Answer this call with an error from now on."""
        self._errors[verb, plural, name] = error

    def allow(self, verb: str, plural: str, name: str) -> None:
        """Answer this call with yes again."""
        del self._errors[verb, plural, name]

    def made(self, *verbs: str) -> list[str]:
        """The calls with these verbs, as "verb plural/name"."""
        return [f"{verb} {plural}/{name}" for verb, plural, name in self.calls if verb in verbs or not verbs]

    async def create(self, res: Resource, body: Object, *, canonical: bool = False) -> Object:
        assert canonical is res.plural.startswith("resourceclaim")
        await self._answer("create", res, body["metadata"]["name"], body=body)
        return _stored(res, body)

    async def get(self, res: Resource, name: str, namespace: str | None = None) -> Object:
        await self._answer("get", res, name)
        if (res.plural, name) not in self.held:
            raise NotFound(404, "NotFound", f"{res.plural} {name} not found in {namespace}")
        return self.held[res.plural, name]

    async def delete(
        self, res: Resource, name: str, namespace: str, *, uid: str | None, grace_seconds: int | None = None
    ) -> bool:
        await self._answer("delete", res, name, uid=uid, grace=grace_seconds, namespace=namespace)
        return True

    async def json_patch(
        self, res: Resource, name: str, operations: Sequence[Mapping[str, Any]], namespace: str | None = None
    ) -> Object:
        await self._answer("patch", res, name, operations=operations)
        return _stored(res, body(res.kind, name, namespace))

    async def merge_patch(self, res: Resource, name: str, patch: Object, namespace: str) -> Object:
        await self._answer("patch", res, name, patch=patch)
        answer = body(res.kind, name, namespace, version=2)
        answer["metadata"] |= patch["metadata"] | {"resourceVersion": "2"}
        return _stored(res, answer)

    async def replace(self, res: Resource, body: Object, *, subresource: str) -> Object:
        await self._answer(f"write {subresource}", res, body["metadata"]["name"], body=body)
        return _stored(res, body)

    async def _answer(self, verb: str, res: Resource, name: str, **details: Any) -> None:  # noqa: ANN401  (kept as given)
        await asyncio.sleep(0)  # others of the same stage get their turn
        self.calls.append((verb, res.plural, name))
        self.details.append(details)
        if error := self._errors.get((verb, res.plural, name)):
            raise error


def _stored(res: Resource, sent: Object) -> Object:
    uid = f"uid-{sent['metadata'].get('namespace')}-{sent['metadata']['name']}"
    metadata = {"uid": uid, "resourceVersion": "9", "generation": 1, **sent["metadata"]}
    return {**sent, "apiVersion": res.api_version, "kind": res.kind, "metadata": metadata}


class Bench:
    """An Execute with a server and a store that knows the leases of a test."""

    def __init__(self, *leases: LeaseFacts) -> None:
        self.server = Server()
        self.store = ObjectStore()
        self.notes: list[str] = []
        for one in leases:
            finalizers = ["other/one", *([names.FINALIZER_SETTLE] if one.finalized else [])]
            self.store.put(resources.GPU_LEASES, "ADDED", body("GpuLease", one.key.name, finalizers=finalizers))
        self.execute = Execute(self.server, self.store, Settings(), self._note)  # type: ignore[arg-type]
        self._statuses = {one.uid: GpuLeaseStatus(attempt=7) for one in leases}

    def run(self, *actions: Action, after: timedelta = timedelta(0)) -> Outcome:
        """Do the actions as one cycle would."""
        return asyncio.run(self.execute.run(actions, self._statuses, NOW + after))

    def finish(self, *actions: Action) -> Outcome:
        """Let go as a cycle does after its report."""
        outcome = Outcome()
        asyncio.run(self.execute.finish(actions, outcome, NOW))
        return outcome

    def _note(self, _resource: Resource, _body: Object, _kind: str, reason: str, message: str) -> None:
        self.notes.append(f"{reason}: {message}")


def _miner(name: str = "miner", node: str = "n1") -> MinerFacts:
    return MinerFacts(name, "mining", "uid-idle", node, "gpu3-9f2c41", name, "pod", "claim", running=True)


def _slots(node: str = "n1", *requires: LeaseFacts) -> SetSlots:
    return SetSlots(node, 4, (slot(),), frozenset(one.uid for one in requires))


def _close(**more: Any) -> CloseRecord:  # noqa: ANN401  (handed on)
    return CloseRecord(record(**more), "uid-train", NOW, 3600, Reason.EXPIRED)


def _everything(one: LeaseFacts) -> list[Action]:
    """One action of every kind but those that take records."""
    return [
        OpenRecord(one, "uid-train-1", record_spec()),
        Admit(one, 1, None),
        CreateClaimTemplate(one),
        _slots("n1", one),
        StopMiner(_miner(), 1),
        DeleteJob(one, "train-0", "uid-job"),
        DeletePod(one, PodRef("team-a", "notebook", "uid-pod"), "Stopped pod notebook: its lease is over."),
        CreateJob(one, 1, ("n1",)),
        StartMiner(pool(), "n2", slot(device="gpu1-aaaaaa")),
    ]


ORDER: Final = (
    {"create usagerecords"},
    {"patch gpuleases", "write status gpuleases", "create resourceclaimtemplates"},
    {"patch gpunodes"},
    {"delete pods", "delete resourceclaims", "delete jobs"},
    {"create jobs", "create resourceclaims", "create pods"},
)


@given(seed=st.integers(0, 10_000))
def test_whatever_the_order_of_a_plan_promises_come_before_anybody_is_stopped_and_stopping_before_starting(
    seed: int,
) -> None:
    one = lease(template=CONTAINERS)
    actions = _everything(one)
    random.Random(seed).shuffle(actions)
    bench = Bench(one)
    outcome = bench.run(*actions)
    assert outcome == Outcome(promised={"n1": frozenset({one.uid})})
    stages = [
        next(i for i, stage in enumerate(ORDER) if f"{verb} {plural}" in stage)
        for verb, plural, _ in bench.server.calls
    ]
    assert stages == sorted(stages)
    assert set(stages) == set(range(len(ORDER)))


# --- what depends on what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [STALE, FORBIDDEN, AWAY], ids=["stale", "forbidden", "away"])
@pytest.mark.parametrize(
    "call",
    [("patch", "gpuleases"), ("write status", "gpuleases"), ("create", "resourceclaimtemplates")],
    ids=["finalizer", "price", "claim-template"],
)
def test_nothing_is_promised_nobody_stopped_and_nothing_started_for_a_lease_that_could_not_be_admitted(
    call: tuple[str, str], error: KubeError
) -> None:
    one, other = lease(template=CONTAINERS), lease("other", template=CONTAINERS)
    bench = Bench(one, other)
    bench.server.refuse(*call, "train", error)
    stop = StopMiner(_miner(), 1)
    outcome = bench.run(
        *(Admit(each, 1, None) for each in (one, other)),
        *(CreateClaimTemplate(each) for each in (one, other)),
        _slots("n1", one),
        _slots("n2", other),
        stop,
        CreateJob(one, 1, ("n1",)),
        CreateJob(other, 1, ("n2",)),
    )
    assert one.uid in outcome.failed
    made = bench.server.made()
    assert "patch gpunodes/n1" not in made
    assert not [call for call in made if call.startswith("delete")]
    assert "create jobs/train-1" not in made
    assert {"patch gpunodes/n2", "create jobs/other-1"} <= set(made)


@pytest.mark.parametrize("error", [STALE, FORBIDDEN, AWAY], ids=["stale", "forbidden", "away"])
def test_nobody_is_stopped_and_nothing_started_on_a_node_whose_promise_was_not_written(error: KubeError) -> None:
    one, other = admitted(template=CONTAINERS), admitted("other", template=CONTAINERS)
    bench = Bench(one, other)
    bench.server.refuse("patch", "gpunodes", "n1", error)
    outcome = bench.run(
        _slots("n1", one),
        _slots("n2", other),
        StopMiner(_miner("here", "n1"), 1),
        StopMiner(_miner("there", "n2"), 1),
        CreateJob(one, 1, ("n1",)),
        CreateJob(other, 1, ("n2",)),
        StartMiner(pool(), "n1", slot(device="gpu1-aaaaaa")),
    )
    assert (outcome.nodes, outcome.failed) == ({"n1"}, {one.uid})
    assert bench.server.made("delete", "create") == [
        "delete pods/there", "delete resourceclaims/there", "create jobs/other-1",
    ]  # fmt: skip


def test_a_gang_of_which_one_node_was_not_promised_is_not_started_on_the_other() -> None:
    gang = admitted(pods=2, template=CONTAINERS)
    bench = Bench(gang)
    bench.server.refuse("patch", "gpunodes", "n1", STALE)
    outcome = bench.run(_slots("n1", gang), _slots("n2", gang), CreateJob(gang, 1, ("n1", "n2")))
    assert outcome.conflict
    assert bench.server.made("create") == []


def test_what_belongs_to_no_lease_waits_for_no_lease() -> None:
    one = lease()
    bench = Bench(one)
    bench.server.refuse("patch", "gpuleases", "train", STALE)
    bench.run(Admit(one, 1, None), _slots("n2"), StopMiner(_miner(node="n2"), 1))
    assert "patch gpunodes/n2" in bench.server.made()
    assert "delete pods/miner" in bench.server.made()


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_conflict_asks_for_a_new_plan_and_blames_nobody() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("patch", "gpunodes", "n1", STALE)
    outcome = bench.run(_slots("n1", one))
    assert (outcome.conflict, outcome.trouble, outcome.refused) == (True, False, {})


def test_a_node_that_is_gone_is_a_conflict_and_not_a_refusal() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("patch", "gpunodes", "n1", NotFound(404, "NotFound", "gpunodes n1 not found"))
    outcome = bench.run(_slots("n1", one))
    assert (outcome.conflict, outcome.refused) == (True, {})


def test_an_api_server_that_is_away_asks_for_a_pause_and_blames_nobody() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("create", "resourceclaimtemplates", "train", AWAY)
    outcome = bench.run(CreateClaimTemplate(one))
    assert (outcome.trouble, outcome.conflict, outcome.refused) == (True, False, {})


def test_a_refusal_is_its_leases_own_in_the_words_of_the_api_server() -> None:
    one, other = admitted(template=CONTAINERS), admitted("other", template=CONTAINERS)
    bench = Bench(one, other)
    bench.server.refuse("create", "jobs", "train-1", FORBIDDEN)
    outcome = bench.run(CreateJob(one, 1, ("n1",)), CreateJob(other, 1, ("n1",)))
    failure = outcome.refused[one.uid]
    assert (failure.reason, failure.message) == ("ApiRejected", "exceeded quota: jobs")
    assert outcome.refused.keys() == {one.uid}
    assert "create jobs/other-1" in bench.server.made()
    assert not outcome.trouble


def test_the_leases_of_a_promise_that_was_refused_are_told_so() -> None:
    one, other = admitted(), admitted("other")
    bench = Bench(one, other)
    bench.server.refuse("patch", "gpunodes", "n1", FORBIDDEN)
    outcome = bench.run(_slots("n1", one, other))
    assert outcome.refused.keys() == {one.uid, other.uid}
    assert not outcome.trouble


def test_a_refusal_that_concerns_no_lease_is_tried_again_after_a_pause() -> None:
    bench = Bench()
    bench.server.refuse("create", "usagerecords", "uid-train-1", FORBIDDEN)
    outcome = bench.run(ArchiveRecord(record(**CLOSED)))
    assert (outcome.trouble, outcome.refused) == (True, {})


def test_refusals_are_tried_again_ever_more_rarely_and_never_given_up() -> None:
    one = admitted(template=CONTAINERS)
    bench = Bench(one)
    bench.server.refuse("create", "jobs", "train-1", FORBIDDEN)
    at, pauses = timedelta(0), []
    for _ in range(12):
        due = bench.run(CreateJob(one, 1, ("n1",)), after=at).refused[one.uid].retry_at
        pauses.append(due - NOW - at)
        at += pauses[-1]
    assert pauses[:3] == [FIRST_RETRY, FIRST_RETRY * 2, FIRST_RETRY * 4]
    assert pauses[-1] == LONGEST_RETRY
    assert pauses == sorted(pauses)


def test_many_miners_refused_in_one_cycle_are_one_refusal_of_their_pool() -> None:
    bench, mining = Bench(), pool()
    starts = [StartMiner(mining, "n1", slot(device=f"gpu{i}-aaaaaa"), claim_uid="uid-claim") for i in range(5)]
    for verb, plural, name in _calls_of(starts):
        bench.server.refuse(verb, plural, name, FORBIDDEN)
    outcome = bench.run(*starts)
    assert outcome.refused[mining.uid].retry_at == NOW + FIRST_RETRY


def _calls_of(actions: Iterable[Action]) -> list[tuple[str, str, str]]:
    bench = Bench()
    bench.run(*actions)
    return bench.server.calls


# --- creating ----------------------------------------------------------------------------------------------------


def _labelled(holder: str) -> Object:
    return {"metadata": {"name": "train", "labels": {names.LABEL_HOLDER: holder}}}


def test_an_object_that_is_there_already_and_ours_is_success() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("create", "resourceclaimtemplates", "train", TAKEN)
    bench.server.held["resourceclaimtemplates", "train"] = _labelled(one.uid)
    assert bench.run(CreateClaimTemplate(one)) == Outcome()


@pytest.mark.parametrize("found", [_labelled("uid-other"), {"metadata": {"name": "train"}}], ids=["another", "nobody"])
def test_a_name_that_somebody_else_has_is_refused_with_the_remedy_and_tried_again(found: Object) -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("create", "resourceclaimtemplates", "train", TAKEN)
    bench.server.held["resourceclaimtemplates", "train"] = found
    for hour in range(2):  # no success in between: the first try is not taken for one that worked
        outcome = bench.run(CreateClaimTemplate(one), after=timedelta(hours=hour))
        failure = outcome.refused[one.uid]
        assert failure.reason == "NameTaken"
        assert failure.message == (
            "A ResourceClaimTemplate named team-a/train exists and was not made for this lease; "
            "delete it or give the lease another name."
        )
    bench.server.allow("create", "resourceclaimtemplates", "train")
    assert bench.run(CreateClaimTemplate(one), after=timedelta(hours=2)).refused == {}


def test_what_was_refused_is_left_alone_until_it_is_due_however_often_it_is_planned() -> None:
    one = admitted()
    bench = Bench(one)
    stopped = DeletePod(one, PodRef("team-a", "notebook", "uid-pod"), "Stopped pod notebook: its lease is over.")
    bench.server.refuse("delete", "pods", "notebook", FORBIDDEN)
    failure = bench.run(stopped).refused[one.uid]
    for second in range(int((failure.retry_at - NOW).total_seconds())):
        # The status says what was refused: it is not kept from being written.
        assert bench.run(stopped, after=timedelta(seconds=second)) == Outcome()
    assert len(bench.server.made("delete")) == 1
    assert bench.run(stopped, after=failure.retry_at - NOW).refused


def test_a_bug_that_one_object_brings_out_stops_nobody_else() -> None:
    odd, fine = admitted(template={"spec": {"containers": ["main"]}}), admitted("fine", template=CONTAINERS)
    bench = Bench(odd, fine)
    outcome = bench.run(CreateJob(odd, 1, ("n1",)), CreateJob(fine, 1, ("n1",)))
    assert outcome.refused.keys() == {odd.uid}
    assert outcome.refused[odd.uid].message.startswith("CreateJob failed in the operator itself: ")
    assert [name for _, plural, name in bench.server.calls if plural == "jobs"] == ["fine-1"]


def test_nobody_is_stopped_for_a_gang_of_which_one_node_could_not_be_written() -> None:
    gang, single = admitted(), admitted("single")
    bench = Bench(gang, single)
    bench.server.refuse("patch", "gpunodes", "n2", Conflict(409, "Conflict", "the generation is another"))
    slots = (_slots("n1", gang), _slots("n2", gang), _slots("n3", single))
    stops = (StopMiner(_miner(f"miner-{node}", node), 1) for node in ("n1", "n2", "n3"))
    assert bench.run(*slots, *stops).conflict
    assert {name for verb, _, name in bench.server.calls if verb == "delete"} == {"miner-n3"}


def test_what_a_former_lease_of_the_name_left_is_waited_for() -> None:
    one = admitted()
    bench = Bench(one)
    left = _labelled("uid-former")
    left["metadata"]["ownerReferences"] = [{"uid": "uid-former"}]
    bench.server.refuse("create", "resourceclaimtemplates", "train", TAKEN)
    bench.server.held["resourceclaimtemplates", "train"] = left
    outcome = bench.run(CreateClaimTemplate(one))
    assert (outcome.conflict, outcome.refused) == (True, {})


def test_a_name_that_became_free_meanwhile_is_a_conflict() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("create", "resourceclaimtemplates", "train", TAKEN)
    outcome = bench.run(CreateClaimTemplate(one))
    assert (outcome.conflict, outcome.refused) == (True, {})
    bench.server.allow("create", "resourceclaimtemplates", "train")
    assert bench.run(CreateClaimTemplate(one)) == Outcome()
    assert len(bench.server.made("create")) == 2


def test_what_was_created_a_moment_ago_is_not_created_again_and_the_cycle_is_told_when_to_look() -> None:
    one = admitted()
    bench = Bench(one)
    assert bench.run(CreateClaimTemplate(one)).again is None
    outcome = bench.run(CreateClaimTemplate(one))
    assert outcome.again is not None
    assert 0 < outcome.again <= 5
    assert len(bench.server.made("create")) == 1


def test_only_the_missing_half_of_a_miner_is_made() -> None:
    bench = Bench()
    bench.run(StartMiner(pool(), "n1", slot(), claim_uid="uid-claim"))
    [(verb, plural, _)] = bench.server.calls
    assert (verb, plural) == ("create", "pods")


def test_a_claim_that_stayed_behind_is_written_to_once_and_never_a_namesake() -> None:
    bench = Bench()
    touch = TouchClaim(LeftClaim("mining", "miner", "uid-claim", NOW - timedelta(minutes=1)), NOW)
    assert bench.run(touch) == Outcome()
    assert bench.server.calls == [("patch", "resourceclaims", "miner")]
    assert bench.server.details[-1]["patch"] == {
        "metadata": {"uid": "uid-claim", "annotations": {names.ANNOTATION_TOUCHED: format_time(NOW)}}
    }
    bench.run(touch)
    assert len(bench.server.calls) == 1, "the view has yet to show the first one"


def test_a_claim_that_is_gone_meanwhile_is_fine() -> None:
    bench = Bench()
    bench.server.refuse("patch", "resourceclaims", "miner", NotFound(404, "NotFound", "not found"))
    assert bench.run(TouchClaim(LeftClaim("mining", "miner", "uid-claim", NOW), NOW)) == Outcome()


def test_a_claim_that_nobody_can_annotate_is_left_alone_and_blames_nobody() -> None:
    bench = Bench()
    bench.server.refuse("patch", "resourceclaims", "miner", FORBIDDEN)
    touch = TouchClaim(LeftClaim("mining", "miner", "uid-claim", NOW), NOW)
    for _ in range(3):
        assert bench.run(touch) == Outcome()
    assert len(bench.server.calls) == 1


def test_a_pod_that_does_not_begin_is_written_to_once_for_each_time_it_is_due_and_never_a_namesake() -> None:
    bench = Bench()
    pod = StartingPod("team-a", "notebook", "uid-pod", "n1", NOW - timedelta(seconds=2))
    assert bench.run(TouchPod(pod, NOW)) == Outcome()
    assert bench.server.calls == [("patch", "pods", "notebook")]
    assert bench.server.details[-1]["patch"] == {
        "metadata": {"uid": "uid-pod", "annotations": {names.ANNOTATION_TOUCHED: format_time(NOW)}}
    }
    bench.server.refuse("patch", "pods", "other", FORBIDDEN)
    for _ in range(3):
        assert bench.run(TouchPod(replace(pod, name="other", uid="uid-other"), NOW)) == Outcome()
    assert len(bench.server.calls) == 2


def test_a_gang_gets_its_service_before_its_job_and_a_single_pod_gets_none() -> None:
    gang, single = admitted(pods=2, template=CONTAINERS), admitted("single", template=CONTAINERS)
    bench = Bench(gang, single)
    bench.run(CreateClaimTemplate(gang), CreateJob(gang, 1, ("n1",)))
    bench.run(CreateClaimTemplate(single), CreateJob(single, 1, ("n1",)))
    assert [call for call in bench.server.made() if "claimtemplates" not in call] == [
        "create services/train",
        "create jobs/train-1",
        "create jobs/single-1",
    ]


# --- admitting and promising -------------------------------------------------------------------------------------


def test_a_lease_gets_its_finalizer_before_its_price_and_keeps_other_peoples() -> None:
    one = lease()
    bench = Bench(one)
    bench.run(Admit(one, 1, None))
    assert bench.server.made() == ["patch gpuleases/train", "write status gpuleases/train"]
    patch, written = bench.server.details
    assert patch["patch"]["metadata"] == {"finalizers": ["other/one", names.FINALIZER_SETTLE], "resourceVersion": "1"}
    empty: dict[str, Any] = {"conditions": [], "handOvers": [], "nodes": [], "preemptedFor": []}
    assert written["body"]["status"] == {"attempt": 7, "renewals": 0, "segment": 0, **empty}
    assert written["body"]["metadata"]["resourceVersion"] == "2"


def test_a_lease_that_has_its_finalizer_gets_only_its_status() -> None:
    one = admitted()
    bench = Bench(one)
    bench.run(Admit(one, 2, None))
    assert bench.server.made() == ["write status gpuleases/train"]


def test_a_lease_that_was_replaced_by_a_namesake_is_not_touched() -> None:
    one = lease()
    bench = Bench(one)
    outcome = bench.run(Admit(replace(one, uid="uid-former"), 1, None), Unbind(replace(one, uid="uid-former")))
    assert outcome.conflict
    assert bench.finish(Unbind(replace(one, uid="uid-former"))).conflict
    assert bench.server.calls == []


def test_a_promise_is_a_compare_and_swap_on_the_generation_that_was_planned_on() -> None:
    bench = Bench()
    bench.run(_slots("n1"))
    [details] = bench.server.details
    test, write = details["operations"]
    assert test == {"op": "test", "path": "/metadata/generation", "value": 4}
    assert (write["op"], write["path"], write["value"]) == ("replace", "/spec", {"slots": [slot().to_wire()]})


# --- stopping ----------------------------------------------------------------------------------------------------


def test_whatever_is_stopped_is_stopped_by_its_uid_with_its_own_grace() -> None:
    one = replace(admitted(), claim_template="uid-template")
    bench = Bench(one)
    bench.run(
        StopMiner(_miner(), 3),
        DeleteClaimTemplate(one),
        DeleteJob(one, "train-1", "uid-job"),
        DeletePod(one, PodRef("b", "unhurried", "uid-p", grace_seconds=600), "m"),
        DeletePod(one, PodRef("b", "quick", "uid-q", grace_seconds=5), "m"),
    )
    deleted = {
        call[1:]: (details["namespace"], details["uid"], details["grace"])
        for call, details in zip(bench.server.calls, bench.server.details, strict=True)
    }
    assert deleted == {
        ("pods", "miner"): ("mining", "pod", 3),
        ("resourceclaims", "miner"): ("mining", "claim", None),
        ("resourceclaimtemplates", "train"): ("team-a", "uid-template", None),
        ("jobs", "train-1"): ("team-a", "uid-job", None),
        ("pods", "unhurried"): ("b", "uid-p", Settings().drain_grace_seconds),
        ("pods", "quick"): ("b", "uid-q", 5),
    }
    assert len(bench.server.calls) == len(deleted)


def test_a_tenant_is_told_once_that_its_pod_was_stopped() -> None:
    one = admitted()
    bench = Bench(one)
    stop = DeletePod(one, PodRef("team-a", "notebook", "uid-pod"), "Stopped pod notebook: its lease is over.")
    for _ in range(3):
        bench.run(stop)
    assert bench.notes == ["PodStopped: Stopped pod notebook: its lease is over."]


def test_a_stop_that_failed_is_tried_again_by_the_next_plan() -> None:
    bench = Bench()
    bench.server.refuse("delete", "pods", "miner", AWAY)
    assert bench.run(StopMiner(_miner(), 1)).trouble
    bench.server.allow("delete", "pods", "miner")
    assert bench.run(StopMiner(_miner(), 1)) == Outcome()
    assert bench.server.made() == ["delete pods/miner", "delete pods/miner", "delete resourceclaims/miner"]


# --- the ledger --------------------------------------------------------------------------------------------------


def test_a_segment_that_is_on_record_already_stays_as_it_was_written() -> None:
    one = admitted()
    bench = Bench(one)
    found = body("UsageRecord", "uid-train-1", spec=record_spec(billableFrom="2026-03-01T10:00:00Z").to_wire())
    bench.server.refuse("create", "usagerecords", "uid-train-1", TAKEN)
    bench.server.held["usagerecords", "uid-train-1"] = found
    assert bench.run(OpenRecord(one, "uid-train-1", record_spec())).conflict
    seen = bench.store.get(resources.USAGE_RECORDS, "team-a", "uid-train-1")
    assert seen is not None
    assert seen["spec"]["billableFrom"] == "2026-03-01T10:00:00Z"


def _on_record(bench: Bench, **more: object) -> None:
    one = body("UsageRecord", "uid-train-1", spec=record_spec().to_wire(), finalizers=["a/b", names.FINALIZER_LEDGER])
    one["metadata"] |= more
    bench.store.put(resources.USAGE_RECORDS, "ADDED", one)


def test_a_segment_is_closed_by_one_write_and_only_as_it_was_seen() -> None:
    bench = Bench(admitted())
    _on_record(bench, generation=3)
    assert bench.run(_close()) == Outcome()
    [details] = bench.server.details
    test, *adds = details["operations"]
    assert test == {"op": "test", "path": "/metadata/generation", "value": 3}
    assert {one["path"]: one["value"] for one in adds} == {
        "/spec/billableTo": "2026-03-01T12:00:00Z", "/spec/seconds": 3600, "/spec/reason": "Expired",
    }  # fmt: skip


def test_a_segment_that_is_closed_already_is_taken_over_as_it_is() -> None:
    bench = Bench(admitted())
    _on_record(bench)
    closed = record_spec(billableTo="2026-03-01T11:00:05Z", seconds=5, reason="Expired").to_wire()
    bench.server.refuse("patch", "usagerecords", "uid-train-1", STALE)
    bench.server.held["usagerecords", "uid-train-1"] = body("UsageRecord", "uid-train-1", version=5, spec=closed)
    assert bench.run(_close()).conflict
    seen = bench.store.get(resources.USAGE_RECORDS, "team-a", "uid-train-1")
    assert seen is not None
    assert seen["spec"]["seconds"] == 5


def test_a_record_is_let_go_only_once_its_copy_exists() -> None:
    bench = Bench()
    _on_record(bench)
    assert bench.run(ArchiveRecord(record(**CLOSED))) == Outcome()
    assert bench.server.made() == ["create usagerecords/uid-train-1", "patch usagerecords/uid-train-1"]
    create, patch = bench.server.details
    assert create["body"]["metadata"]["namespace"] == "gpu-tenancy-system"
    assert patch["patch"]["metadata"]["finalizers"] == ["a/b"]


@pytest.mark.parametrize(("seconds", "let_go"), [(5, True), (4, False)], ids=["the-same", "another"])
def test_a_copy_that_exists_already_counts_if_it_says_the_same(seconds: int, let_go: bool) -> None:
    bench = Bench()
    _on_record(bench)
    end = f"2026-03-01T11:00:0{seconds}Z"
    spec = record_spec(**{**CLOSED, "billableTo": end, "seconds": seconds}).to_wire()
    bench.server.refuse("create", "usagerecords", "uid-train-1", TAKEN)
    copy = body("UsageRecord", "uid-train-1", "gpu-tenancy-system", spec=spec)
    copy["metadata"]["uid"] = "uid-copy"
    bench.server.held["usagerecords", "uid-train-1"] = copy
    outcome = bench.run(ArchiveRecord(record(**CLOSED)))
    assert outcome.trouble is not let_go
    assert (bench.server.made("patch") == ["patch usagerecords/uid-train-1"]) is let_go


def test_a_record_in_the_archive_itself_is_only_let_go() -> None:
    bench = Bench()
    bench.store.put(
        resources.USAGE_RECORDS,
        "ADDED",
        body("UsageRecord", "uid-train-1", "gpu-tenancy-system", finalizers=[names.FINALIZER_LEDGER]),
    )
    bench.run(ArchiveRecord(record("gpu-tenancy-system", **CLOSED)))
    assert bench.server.made() == ["patch usagerecords/uid-train-1"]


# --- letting go --------------------------------------------------------------------------------------------------


def test_nothing_is_let_go_before_the_last_status_is_written() -> None:
    one = admitted()
    bench = Bench(one)
    bench.run(Unbind(one))
    assert bench.server.calls == []
    bench.finish(Unbind(one))
    [details] = bench.server.details
    assert details["patch"]["metadata"] == {"finalizers": ["other/one"], "resourceVersion": "1"}


@pytest.mark.parametrize("error", [STALE, AWAY], ids=["stale", "away"])
def test_a_finalizer_that_could_not_be_taken_off_is_tried_again(error: KubeError) -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("patch", "gpuleases", "train", error)
    outcome = bench.finish(Unbind(one))
    assert outcome.conflict or outcome.trouble


def test_a_lease_that_is_gone_already_needs_no_letting_go() -> None:
    one = admitted()
    bench = Bench(one)
    bench.server.refuse("patch", "gpuleases", "train", NotFound(404, "NotFound", "gone"))
    assert bench.finish(Unbind(one)) == Outcome()


def test_nothing_is_let_go_of_which_something_failed() -> None:
    one = admitted()
    bench = Bench(one)
    outcome = Outcome(failed={one.uid})
    asyncio.run(bench.execute.finish([Unbind(one)], outcome, NOW))
    assert bench.server.calls == []


def test_a_claim_template_is_deleted_once() -> None:
    one = admitted()
    bench = Bench(one)
    for _ in range(2):
        bench.run(DeleteClaimTemplate(one))
    assert bench.server.made() == ["delete resourceclaimtemplates/train"]
