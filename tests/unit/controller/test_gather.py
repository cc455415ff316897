"""A snapshot says what was seen. What cannot be read says so itself and never stops the others."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from gpu_tenancy.api import names
from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.devices import miner_pod_name
from gpu_tenancy.core.snapshot import LeaseFacts, NodeFacts
from gpu_tenancy.kube import resources
from tests.unit.controller.facts import CONTAINERS, CREATED, NOW, Object, body, record_spec, slot
from tests.unit.controller.seen import Seen

WHOLE: Final[Object] = {"gpus": {"profile": "full"}}
RATES: Final = [{"model": "A100-SXM4-80GB", "profile": "full", "perHour": "145.00"}]
BEYOND: Final = "9999-12-31T23:59:59-12:00"
"""What the API server takes for a time, and Python cannot hold in UTC."""
ADMITTED: Final[Object] = {"admittedAt": "2026-03-01T11:00:00.000000Z", "attempt": 1, "contract": "uid-train"}
CLOSED: Final[dict[str, Any]] = {"billableTo": "2026-03-01T11:00:05Z", "seconds": 5, "reason": "Suspended"}


def _lease(name: str = "train", **parts: Any) -> Object:  # noqa: ANN401  (handed on)
    return body("GpuLease", name, **{"spec": WHOLE, **parts})


def _record(name: str, namespace: str = "team-a", **spec: Any) -> Object:  # noqa: ANN401  (handed on)
    wire = record_spec(**spec).to_wire()
    one = body("UsageRecord", name, namespace, spec=wire, finalizers=[names.FINALIZER_LEDGER])
    one["metadata"]["uid"] = f"{namespace}/{name}"
    return one


def _job(name: str, namespace: str = "team-a", *, holder: str = "uid-train", attempt: str = "1") -> Object:
    labels = {names.LABEL_HOLDER: holder, names.LABEL_ATTEMPT: attempt}
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": labels}
    return {"metadata": {**metadata, "ownerReferences": [{"kind": "GpuLease", "name": "train", "uid": holder}]}}


def _node(name: str = "n1", cpu: str = "128") -> Object:
    allocatable = {"cpu": cpu, "memory": "2Ti", "pods": "110"}
    return {
        "metadata": {"name": name},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def _gpu_node(name: str = "n1") -> Object:
    return body("GpuNode", name, None, spec={"slots": [slot().to_wire()]})


def _namespace(name: str, **parts: object) -> Object:
    return {"metadata": {"name": name, **parts}, "status": {"phase": "Active"}}


def _the_lease(seen: Seen, verdicts: Mapping[str, str] | None = None) -> LeaseFacts:
    [one] = seen.snapshot(verdicts).leases
    return one


def _the_node(seen: Seen) -> NodeFacts:
    [one] = seen.snapshot().nodes
    return one


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({}, "spec.gpus: Field required"),
        ({"gpus": {"profile": "full", "count": 0}}, "spec.gpus.count: Input should be greater than or equal to 1"),
        ({**WHOLE, "tier": "Auction"}, "spec.tier: Input should be 'Reserved', 'OnDemand' or 'Spot'"),
        ({**WHOLE, "term": {"duration": "4 hours"}}, 'spec.term.duration: Value error, duration "4 hours" is not'),
    ],
)
def test_a_lease_that_cannot_be_read_says_why_and_the_next_one_is_read(spec: Object, sentence: str) -> None:
    seen = Seen()
    seen.own(_lease("odd", spec=spec), _lease("train"))
    odd, train = seen.snapshot().leases
    assert sentence in odd.invalid
    assert (train.key.name, train.invalid) == ("train", "")


@pytest.mark.parametrize(
    "container",
    [
        {"name": "main", "resources": {"requests": {"cpu": "many"}}},
        {"name": "main", "resources": {"requests": ["cpu"]}},
        {"name": "main", "resources": "all"},
        "main",
    ],
    ids=["no-quantity", "a-list", "a-word", "no-container"],
)
def test_a_template_that_cannot_be_read_makes_its_lease_unreadable_and_nothing_else(container: object) -> None:
    seen = Seen()
    seen.own(_lease("odd", spec={**WHOLE, "template": {"spec": {"containers": [container]}}}), _lease("train"))
    odd, train = seen.snapshot().leases
    assert odd.invalid.startswith("spec.template cannot be read: ")
    assert train.invalid == ""


def test_pools_and_books_that_cannot_be_read_say_why_and_the_next_ones_are_read() -> None:
    seen = Seen()
    seen.own(
        body("MiningPool", "odd", "mining", spec={"image": "x", "priority": "high"}),
        body("MiningPool", "idle", "mining", spec={"image": "x"}),
        body("PriceBook", "bad", None, spec={"currency": "RUB", "rates": RATES}),
        body("PriceBook", "never", None, spec={"currency": "RUB", "rates": RATES, "effectiveFrom": BEYOND}),
        body("PriceBook", "list", None, spec={"currency": "RUB", "rates": RATES, "effectiveFrom": CREATED}),
    )
    snapshot = seen.snapshot()
    pools = {one.key.name: one for one in snapshot.pools}
    assert pools["odd"].invalid.startswith("spec.priority: ")
    assert not pools["odd"].active
    assert pools["idle"].active
    books = {one.name: one for one in snapshot.books}
    assert books["bad"].spec is None
    assert books["bad"].invalid == "spec.effectiveFrom: Field required"
    assert books["never"].invalid.endswith("within the years 1 to 9999 of UTC; write it as UTC with a trailing Z")
    assert books["list"].spec is not None


def test_tenants_that_cannot_be_read_say_why_and_the_next_ones_are_read() -> None:
    seen = Seen()
    seen.own(
        body("GpuTenant", "odd", None, spec={"namespaces": ["a"], "weight": 0}),
        body("GpuTenant", "acme", None, spec={"namespaces": ["a"]}, status={"holds": "everything"}),
    )
    acme, odd = seen.snapshot().tenants
    assert (odd.spec, odd.invalid) == (None, "spec.weight: Input should be greater than or equal to 1")
    assert acme.spec is not None
    assert (acme.spec.weight, acme.invalid, acme.status.holds) == (1, "", None)


def test_fields_of_a_newer_version_are_left_alone() -> None:
    seen = Seen()
    seen.own(_lease(spec={**WHOLE, "limits": {"maxCost": "5.00"}}, status={"phase": "New"}))
    assert _the_lease(seen).invalid == ""


def test_a_lease_whose_status_cannot_be_read_says_so() -> None:
    seen = Seen()
    seen.own(_lease("odd", status={"attempt": "first"}), _lease("train", status=ADMITTED))
    odd, train = seen.snapshot().leases
    assert odd.unreadable.startswith("GpuLease team-a/odd cannot be read (status.attempt: Input should be a valid int")
    assert (odd.invalid, train.unreadable) == ("", "")


@pytest.mark.parametrize("status", [{"attempt": "first"}, {"attempt": "first", "contract": "uid-former"}])
def test_records_of_a_lease_whose_status_cannot_be_read_are_no_orphans(status: Object) -> None:
    seen = Seen()
    seen.own(_lease(status=status), _record("uid-former-1", contract="uid-former"), _record("uid-train-1"))
    gone = _record("uid-gone-1", contract="uid-gone", leaseName="gone")
    seen.own(gone)
    snapshot = seen.snapshot()
    assert [one.name for one in snapshot.leases[0].records] == ["uid-former-1", "uid-train-1"]
    assert [one.name for one in snapshot.orphans] == ["uid-gone-1"]


def test_a_settled_lease_is_history_until_it_is_deleted() -> None:
    settled = {"observedGeneration": 1, "conditions": [{"type": "Settled", "status": "True"}]}
    edited = {**settled, "observedGeneration": 0}
    seen = Seen()
    seen.own(
        _lease("old", status=settled),
        _lease("bound", status=settled, finalizers=[names.FINALIZER_SETTLE]),
        _lease("edited", status=edited),
    )
    assert [one.key.name for one in seen.snapshot().leases] == ["bound", "edited"]


# --- records ----------------------------------------------------------------------------------------------------


def test_records_belong_to_their_lease_by_contract_and_come_by_segment() -> None:
    seen = Seen()
    seen.own(
        _lease(status=ADMITTED),
        *(_record(f"uid-train-{number}", segment=number, **CLOSED) for number in (10, 2, 1)),
        _record("uid-gone-1", contract="uid-gone"),
        _record("uid-past-1", contract="uid-past", **CLOSED),
    )
    snapshot = seen.snapshot()
    assert [one.spec.segment for one in snapshot.leases[0].records] == [1, 2, 10]
    assert [one.name for one in snapshot.orphans] == ["uid-gone-1"]


@pytest.mark.parametrize("first", ["gpu-tenancy-system", "team-a"])
def test_a_segment_counts_once_while_its_archived_copy_exists_beside_it(first: str) -> None:
    seen = Seen()
    seen.own(_lease(status=ADMITTED))
    for namespace in sorted(("gpu-tenancy-system", "team-a"), key=lambda one: one != first):
        seen.own(_record("uid-train-1", namespace, **CLOSED))
    [one] = _the_lease(seen).records
    assert one.namespace == "team-a"


def test_a_segment_counts_also_where_only_its_archived_copy_is_left() -> None:
    seen = Seen()
    seen.own(_lease(status=ADMITTED), _record("uid-train-1", "gpu-tenancy-system", **CLOSED))
    assert [one.namespace for one in _the_lease(seen).records] == ["gpu-tenancy-system"]


def _odd(record: Object) -> Object:
    """As a newer version might have written it."""
    return record | {"spec": {**record["spec"], "tier": "Auction"}}


def test_a_record_that_cannot_be_read_does_not_hide_the_others_and_its_lease_knows_of_it() -> None:
    seen = Seen()
    seen.own(_lease(status=ADMITTED), _lease("other"))
    seen.own(_odd(_record("uid-train-1", **CLOSED)), _record("uid-train-2", segment=2))
    other, train = seen.snapshot().leases
    assert [one.name for one in train.records] == ["uid-train-2"]
    why = "spec.tier: Input should be 'Reserved', 'OnDemand' or 'Spot'"
    assert train.unreadable_record == f"UsageRecord team-a/uid-train-1 cannot be read ({why})"
    assert other.unreadable_record == ""


def test_a_record_that_cannot_be_read_is_known_by_its_name_whatever_it_says_itself() -> None:
    seen = Seen()
    odd = _record("uid-train-1")
    del odd["spec"]["contract"]
    seen.own(_lease(status=ADMITTED), odd)
    assert "spec.contract: Field required" in _the_lease(seen).unreadable_record


def test_a_segment_that_can_be_read_counts_though_its_copy_cannot() -> None:
    seen = Seen()
    seen.own(_lease(status=ADMITTED), _record("uid-train-1", **CLOSED))
    seen.own(_odd(_record("uid-train-1", "gpu-tenancy-system", **CLOSED)))
    one = _the_lease(seen)
    assert (one.unreadable_record, [record.name for record in one.records]) == ("", ["uid-train-1"])


def test_a_record_of_no_lease_that_cannot_be_read_is_no_orphan_to_be_closed() -> None:
    seen = Seen()
    seen.own(_odd(_record("uid-gone-1", contract="uid-gone")))
    assert seen.snapshot().orphans == ()
    [unread] = seen.gather.unread
    assert unread.why.startswith("UsageRecord team-a/uid-gone-1 cannot be read (spec.tier: ")


# --- what was made for a lease -----------------------------------------------------------------------------------


def test_a_jobs_end_is_read_with_its_time_and_its_words() -> None:
    failed = {"type": "Failed", "status": "True", "message": "It broke.", "lastTransitionTime": CREATED}
    seen = Seen()
    seen.own(_lease())
    seen.show(resources.JOBS, _job("train-1") | {"status": {"conditions": [failed]}})
    [job] = _the_lease(seen).jobs
    assert (job.attempt, job.finished, job.message) == (1, "Failed", "It broke.")
    assert job.finished_at == datetime(2026, 3, 1, 11, tzinfo=UTC)


@pytest.mark.parametrize("attempt", ["", "first", "-1", "1.5", "²"])
def test_a_job_that_somebody_labelled_oddly_is_not_the_operators(attempt: str) -> None:
    seen = Seen()
    seen.own(_lease())
    seen.show(resources.JOBS, _job("fake", attempt=attempt), _job("train-1"))
    assert [job.name for job in _the_lease(seen).jobs] == ["train-1"]


def test_a_job_of_another_namespace_cannot_end_a_lease() -> None:
    seen = Seen()
    seen.own(_lease())
    seen.show(resources.JOBS, _job("train-1", "team-b"))
    assert _the_lease(seen).jobs == ()


def test_a_claim_template_counts_only_where_it_was_made_for_the_lease() -> None:
    seen = Seen()
    seen.own(_lease())
    metadata = {"name": "train", "namespace": "team-a", "labels": {names.LABEL_HOLDER: "uid-former"}}
    seen.show(resources.RESOURCE_CLAIM_TEMPLATES, {"metadata": metadata})
    assert not _the_lease(seen).claim_template
    mine = {**metadata, "uid": "uid-template", "labels": {names.LABEL_HOLDER: "uid-train"}}
    seen.show(resources.RESOURCE_CLAIM_TEMPLATES, {"metadata": mine}, event="MODIFIED")
    assert _the_lease(seen).claim_template


def test_a_template_is_to_be_vetted_before_admission_and_never_after() -> None:
    seen = Seen()
    seen.own(_lease(spec={**WHOLE, "template": CONTAINERS}))
    assert _verdict(_the_lease(seen)) is None
    assert _verdict(_the_lease(seen, {"uid-train": "no"})) == "no"
    seen.own(_lease(spec={**WHOLE, "template": CONTAINERS}, status=ADMITTED, version=2), event="MODIFIED")
    assert _verdict(_the_lease(seen, {"uid-train": "exceeded quota by its own Job"})) == ""


def _verdict(one: LeaseFacts) -> str | None:
    assert one.template is not None
    return one.template.verdict


@pytest.mark.parametrize(
    ("namespace", "ends"),
    [
        (_namespace("team-a"), False),
        (_namespace("team-a", deletionTimestamp=CREATED), True),
        (_namespace("team-a") | {"status": {"phase": "Terminating"}}, True),
    ],
)
def test_a_lease_learns_that_its_namespace_is_going(namespace: Object, ends: bool) -> None:
    seen = Seen()
    seen.own(_lease())
    seen.show(resources.NAMESPACES, namespace)
    assert _the_lease(seen).namespace_ends is ends


# --- nodes and miners --------------------------------------------------------------------------------------------


def test_a_gpu_node_without_its_node_is_no_node_any_more() -> None:
    seen = Seen()
    seen.own(_gpu_node())
    assert seen.snapshot().nodes == ()
    seen.show(resources.NODES, _node())
    assert _the_node(seen).slots == (slot(),)
    seen.show(resources.NODES, _node(), event="DELETED")
    assert seen.snapshot().nodes == ()


def test_a_node_whose_amounts_cannot_be_read_has_nothing_to_give_and_keeps_what_it_has() -> None:
    seen = Seen()
    seen.own(_gpu_node(), _gpu_node("n2"))
    seen.show(resources.NODES, _node(cpu="lots"), _node("n2"))
    odd, fine = seen.snapshot().nodes
    assert (odd.allocatable.cpu_milli, odd.slots) == (0, (slot(),))
    assert fine.allocatable.cpu_milli == 128_000


def _of_a_newer_version() -> Object:
    """A GpuNode whose one slot belongs to a holder of a kind that is not known here."""
    wire = slot("uid-train").to_wire()
    wire["holder"]["kind"] = "Reservation"
    return body("GpuNode", "n1", None, spec={"slots": [wire]})


def test_a_gpu_node_whose_spec_cannot_be_read_says_so_and_whom_it_mentions() -> None:
    seen = Seen()
    seen.own(_of_a_newer_version(), _gpu_node("n2"))
    seen.show(resources.NODES, _node(), _node("n2"))
    odd, fine = seen.snapshot().nodes
    why = "spec.slots.0.holder.kind: Input should be 'GpuLease' or 'MiningPool'"
    assert odd.unreadable == f"GpuNode n1 cannot be read ({why})"
    assert odd.objection(NOW) == odd.unreadable
    assert "uid-train" in odd.mentions
    assert (fine.unreadable, fine.mentions, fine.slots) == ("", frozenset(), (slot(),))


def test_a_gpu_node_whose_status_cannot_be_read_says_so_and_keeps_its_slots() -> None:
    seen = Seen()
    draining = {**slot("uid-former").to_wire(), "state": "Parked"}
    seen.own(_gpu_node() | {"status": {"slots": [draining]}})
    seen.show(resources.NODES, _node())
    node = _the_node(seen)
    assert node.unreadable.startswith("GpuNode n1 cannot be read (status.slots.0.state: ")
    assert node.slots == (slot(),)
    assert node.mentions >= {"uid-former", "uid-idle"}


def test_a_sentence_names_some_of_the_errors_and_their_number() -> None:
    seen = Seen()
    seen.own(body("GpuNode", "n1", None, spec={"slots": [{}]}))
    seen.show(resources.NODES, _node())
    assert _the_node(seen).unreadable == (
        "GpuNode n1 cannot be read (spec.slots.0.device: Field required; spec.slots.0.gpu: Field required; "
        "spec.slots.0.profile: Field required; and 2 more)"
    )


def test_what_could_not_be_read_is_listed_for_as_long_as_it_cannot() -> None:
    seen = Seen()
    seen.own(_of_a_newer_version(), _lease(status={"attempt": "first"}), _odd(_record("uid-train-1")))
    seen.show(resources.NODES, _node())
    for _ in range(2):
        seen.snapshot()
        assert sorted(one.body["kind"] for one in seen.gather.unread) == ["GpuLease", "GpuNode", "UsageRecord"]
    seen.own(_gpu_node() | {"metadata": {**_gpu_node()["metadata"], "resourceVersion": "2"}}, event="MODIFIED")
    seen.snapshot()
    assert sorted(one.body["kind"] for one in seen.gather.unread) == ["GpuLease", "UsageRecord"]


def test_a_silent_agent_is_known_by_when_it_was_last_heard() -> None:
    seen = Seen()
    seen.own(_gpu_node())
    seen.show(resources.NODES, _node())
    assert _the_node(seen).agent_until is None
    metadata = {"name": "agent-n1", "namespace": "gpu-tenancy-system", "labels": {names.LABEL_NODE: "n1"}}
    spec = {"renewTime": "2026-03-01T12:00:00.000000Z", "leaseDurationSeconds": 40}
    seen.show(resources.COORDINATION_LEASES, {"metadata": metadata, "spec": spec})
    assert _the_node(seen).agent_until == datetime(2026, 3, 1, 12, 0, 40, tzinfo=UTC)


def test_pods_of_a_lease_are_planned_with_it_and_all_others_count_beside_it() -> None:
    seen = Seen()
    seen.own(_gpu_node())
    seen.show(resources.NODES, _node())
    containers = [{"resources": {"requests": {"cpu": "2"}}}]
    for name, template in (("own", "train"), ("other", "")):
        claims = [{"resourceClaimTemplateName": template}] if template else []
        spec = {"nodeName": "n1", "containers": containers, "resourceClaims": claims}
        seen.show(resources.PODS, {"metadata": {"name": name, "namespace": "team-a"}, "spec": spec})
    assert _the_node(seen).foreign.cpu_milli == 4000
    seen.own(_lease())
    assert _the_node(seen).foreign.cpu_milli == 2000


def test_what_a_tenants_own_pods_ask_beyond_their_lease_counts_beside_it() -> None:
    """The lease is planned with 1 CPU and 1Gi, as podResources has it where nothing is said."""
    seen = Seen()
    holder = Holder(kind=HolderKind.GPU_LEASE, namespace="team-a", name="train", uid="uid-train")
    held = slot().model_copy(update={"holder": holder})
    seen.own(body("GpuNode", "n1", None, spec={"slots": [held.to_wire()]}), _lease())
    seen.show(resources.NODES, _node())
    greedy = [{"resources": {"requests": {"cpu": "60", "memory": "512Mi"}}}]
    spec = {"nodeName": "n1", "containers": greedy, "resourceClaims": [{"resourceClaimTemplateName": "train"}]}
    seen.show(resources.PODS, {"metadata": {"name": "own", "namespace": "team-a"}, "spec": spec})
    assert _the_node(seen).foreign == Amount(59_000, 0, 0)


def test_a_miner_is_its_pod_and_its_claim_and_a_namesake_elsewhere_is_another() -> None:
    labels = {names.LABEL_POOL: "idle", names.LABEL_HOLDER: "uid-idle", names.LABEL_DEVICE: "gpu3-9f2c41"}
    metadata = {
        "name": "miner",
        "namespace": "mining",
        "labels": labels,
        "annotations": {names.LABEL_NODE: "n1"},
        "ownerReferences": [{"kind": "MiningPool", "name": "idle", "uid": "uid-idle"}],
    }
    seen = Seen()
    pod = {**metadata, "name": miner_pod_name("miner", "claim")}
    spec = {"resourceClaims": [{"resourceClaimName": "miner"}]}
    seen.show(resources.PODS, {"metadata": {**pod, "uid": "pod"}, "spec": spec, "status": {"phase": "Running"}})
    config = [{"opaque": {"driver": names.DRIVER, "parameters": {"holder": "uid-idle"}}}]
    seen.show(
        resources.RESOURCE_CLAIMS,
        {"metadata": {**metadata, "uid": "claim"}, "spec": {"devices": {"config": config}}},
    )
    seen.show(resources.PODS, {"metadata": {**pod, "namespace": "team-a", "uid": "fake"}, "spec": spec})
    real, fake = seen.snapshot().miners
    assert (real.namespace, real.name, real.pod_name, real.pod_uid, real.claim_uid, real.node, real.running) == (
        "mining",
        "miner",
        miner_pod_name("miner", "claim"),
        "pod",
        "claim",
        "n1",
        True,
    )
    assert (fake.namespace, fake.pod_uid, fake.claim_uid) == ("team-a", "fake", "")
    assert not real.bereft
    going = {**metadata, "uid": "claim", "deletionTimestamp": "2026-03-01T12:00:00Z"}
    going_spec = {"devices": {"config": config}}
    seen.show(resources.RESOURCE_CLAIMS, {"metadata": going, "spec": going_spec})
    real, _ = seen.snapshot().miners
    assert (real.bereft, real.deleting, real.running) == (True, True, False)
    leaving = {**pod, "uid": "pod", "deletionTimestamp": "2026-03-01T12:00:00Z"}
    seen.show(resources.PODS, {"metadata": leaving, "spec": spec, "status": {"phase": "Running"}})
    real, _ = seen.snapshot().miners
    assert (real.bereft, real.deleting) == (False, True), "both go"
    seen.show(resources.RESOURCE_CLAIMS, {"metadata": {**metadata, "uid": "claim"}, "spec": going_spec})
    assert seen.snapshot().miners[0].bereft, "only the pod goes"
    seen.show(resources.RESOURCE_CLAIMS, {"metadata": {**metadata, "uid": "another"}, "spec": going_spec})
    assert not seen.snapshot().miners[0].bereft, "the claim is not this pod's"
    before = seen.snapshot().miners
    assert [one is other for one, other in zip(seen.snapshot().miners, before, strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("deleted", "user", "stays"),
    [
        (True, "gone", True),
        (True, "replaced", True),
        (True, "there", False),
        (False, "gone", False),
    ],
)
def test_a_claim_that_is_deleted_and_used_by_no_pod_has_stayed_behind(deleted: bool, user: str, stays: bool) -> None:
    """Whoever made it; and whatever somebody wrote where the operator notes that it has looked."""
    seen = Seen()
    if user != "gone":
        uid = "uid-pod" if user == "there" else "another"
        seen.show(resources.PODS, {"metadata": {"name": "notebook", "namespace": "team-a", "uid": uid}})
    metadata = {"name": "gpu", "namespace": "team-a", "uid": "claim"}
    metadata |= {"deletionTimestamp": "2026-03-01T12:00:00Z"} if deleted else {}
    config = [{"opaque": {"driver": names.DRIVER, "parameters": {"holder": "uid-idle"}}}]
    status = {"reservedFor": [{"resource": "pods", "name": "notebook", "uid": "uid-pod"}]}
    for text, touched in (("", None), ("yesterday", None), ("2026-03-01T12:01:00Z", 1)):
        body = {
            "metadata": {**metadata, "annotations": {names.ANNOTATION_TOUCHED: text}},
            "spec": {"devices": {"config": config}},
            "status": status,
        }
        seen.show(resources.RESOURCE_CLAIMS, body)
        found = seen.snapshot().left_claims
        assert [one.uid for one in found] == (["claim"] if stays else [])
        for one in found:
            minutes = None if one.touched_at is None else (one.touched_at - one.deleted_at) / timedelta(minutes=1)
            assert minutes == touched


def test_a_pod_of_ours_that_is_bound_and_has_not_begun_is_told_with_the_time_it_was_seen() -> None:
    seen = Seen()
    template = {"metadata": {"name": "train", "namespace": "team-a", "uid": "template", "labels": {}}}
    seen.show(resources.RESOURCE_CLAIM_TEMPLATES, template)

    def show(name: str, node: str = "n1", uses: str = "train", touched: str = "", **status: str) -> None:
        marks = {"example.com/other": "x", names.ANNOTATION_TOUCHED: touched}
        metadata = {"name": name, "namespace": "team-a", "uid": f"uid-{name}", "annotations": marks}
        spec = {"nodeName": node, "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": uses}]}
        body = {"metadata": metadata, "spec": spec, "status": {"phase": "Pending", **status}}
        seen.show(resources.PODS, body)

    show("late")
    show("touched", touched="2026-03-01T12:01:00Z")
    show("unbound", node="")
    show("begun", podIP="10.0.0.1")
    show("running", phase="Running")
    show("of-another-driver", uses="other")
    first = {one.name: one for one in seen.snapshot().starting}
    assert set(first) == {"late", "touched"}
    assert first["touched"].touched_at == datetime(2026, 3, 1, 12, 1, tzinfo=UTC)
    show("late", touched="2026-03-01T12:02:00Z")
    show("touched", podIP="10.0.0.2")
    [again] = seen.snapshot().starting
    assert (again.name, again.bound_at) == ("late", first["late"].bound_at)


# --- what it costs -----------------------------------------------------------------------------------------------


def test_an_object_is_parsed_again_only_when_it_has_changed() -> None:
    seen = Seen()
    seen.own(_lease(), _record("uid-train-1"))
    first = _the_lease(seen)
    again = _the_lease(seen)
    assert again.spec is first.spec
    assert again.records[0].spec is first.records[0].spec
    seen.own(_lease(version=2, spec={**WHOLE, "suspend": True}), event="MODIFIED")
    changed = _the_lease(seen)
    assert changed.spec.suspend
    assert changed.records[0].spec is first.records[0].spec
    seen.own(_lease(version=3, spec={**WHOLE, "suspend": True}, status={"attempt": 1}), event="MODIFIED")
    reported = _the_lease(seen)
    assert reported.status.attempt == 1
    assert reported.spec is changed.spec


def test_the_facts_of_a_node_are_the_same_object_until_one_of_them_changes() -> None:
    seen = Seen()
    seen.own(_gpu_node())
    seen.show(resources.NODES, _node())
    first = _the_node(seen)
    assert _the_node(seen) is first
    seen.show(resources.NODES, _node() | {"spec": {"unschedulable": True}})
    assert _the_node(seen).cordoned
    assert not first.cordoned


def test_the_facts_of_a_lease_are_the_same_object_until_one_of_them_changes() -> None:
    seen = Seen()
    seen.own(_lease(), _record("uid-train-1"))
    first = _the_lease(seen)
    assert _the_lease(seen) is first
    seen.show(resources.JOBS, _job("train-1"))
    changed = _the_lease(seen)
    assert changed is not first
    assert len(changed.jobs) == 1
    assert _the_lease(seen) is changed


def test_what_a_plan_found_out_goes_with_the_facts_that_it_was_found_out_about() -> None:
    seen = Seen()
    seen.own(_lease(), _lease("other"), _gpu_node())
    seen.show(resources.NODES, _node())
    snapshot = seen.snapshot()
    for lease in snapshot.leases:
        lease.remember("rests")
    (node,) = snapshot.nodes
    node.answers["asked"] = "answered"
    seen.own(_lease(version=2, spec={**WHOLE, "suspend": True}), event="MODIFIED")
    seen.own(_lease("other"), event="DELETED")
    seen.show(resources.NODES, _node() | {"spec": {"unschedulable": True}})
    seen.snapshot()
    assert [lease.rest for lease in snapshot.leases] == [None, None]
    assert not node.answers


def test_what_is_gone_is_not_remembered() -> None:
    seen = Seen()
    seen.own(_lease())
    seen.snapshot()
    seen.own(_lease(), event="DELETED")
    seen.snapshot()
    assert not seen.gather._memo._kept


def test_a_heartbeat_that_somebody_else_wrote_is_not_believed() -> None:
    seen = Seen()
    seen.own(_gpu_node())
    seen.show(resources.NODES, _node())
    metadata = {"name": "agent-n1", "namespace": "team-a", "labels": {names.LABEL_NODE: "n1"}}
    spec = {"renewTime": "9999-12-31T23:59:59.000000Z", "leaseDurationSeconds": 40}
    seen.show(resources.COORDINATION_LEASES, {"metadata": metadata, "spec": spec})
    assert _the_node(seen).agent_until is None


def test_a_claim_for_a_leases_devices_counts_whoever_wrote_it_and_without_any_label() -> None:
    seen = Seen()
    seen.own(_lease())
    config = [{"opaque": {"driver": names.DRIVER, "parameters": {"holder": "uid-train"}}}]
    claim = {"metadata": {"name": "own", "namespace": "team-a", "uid": "c"}, "spec": {"devices": {"config": config}}}
    foreign = {"metadata": {"name": "other", "namespace": "team-a", "uid": "d"}}
    seen.show(resources.RESOURCE_CLAIMS, claim, foreign)
    assert [one.name for one in _the_lease(seen).claims] == ["own"]


@pytest.mark.parametrize(
    ("own", "left", "stopped"),
    [(60, None, True), (10, 10, False), (86_400, 86_400, True), (86_400, 30, False), (10, 20, True)],
    ids=["running", "going", "going in a day", "going in time", "going later than it need"],
)
def test_a_pod_that_is_going_is_left_alone_only_if_it_goes_soon_enough(
    own: int, left: int | None, stopped: bool
) -> None:
    seen = Seen()
    seen.own(_lease())
    config = [{"opaque": {"driver": names.DRIVER, "parameters": {"holder": "uid-train"}}}]
    metadata = {"name": "own", "namespace": "team-a", "uid": "c"}
    reserved = [{"resource": "pods", "name": "own", "uid": "p"}]
    claim = {"metadata": metadata, "spec": {"devices": {"config": config}}, "status": {"reservedFor": reserved}}
    seen.show(resources.RESOURCE_CLAIMS, claim)
    pod: Object = {"name": "own", "namespace": "team-a", "uid": "p"}
    if left is not None:
        pod |= {"deletionTimestamp": "2026-03-01T12:00:00Z", "deletionGracePeriodSeconds": left}
    seen.show(resources.PODS, {"metadata": pod, "spec": {"nodeName": "n1", "terminationGracePeriodSeconds": own}})
    [claim_facts] = _the_lease(seen).claims
    assert bool(claim_facts.users) is stopped


def test_a_pod_that_only_says_that_it_is_a_miner_is_left_alone() -> None:
    labels = {names.LABEL_POOL: "idle", names.LABEL_HOLDER: "uid-idle", names.LABEL_DEVICE: "gpu3-9f2c41"}
    seen = Seen()
    seen.show(resources.PODS, {"metadata": {"name": "fake", "namespace": "team-a", "uid": "p", "labels": labels}})
    assert seen.snapshot().miners == ()
