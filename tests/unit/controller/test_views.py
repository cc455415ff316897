"""The operator's view: what counts against a node, and which changes are worth a look at everything."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api import names
from gpu_tenancy.controller import digests
from gpu_tenancy.controller.views import LONGEST_PATIENCE, NodeLoads, Pulse
from gpu_tenancy.core.amounts import NOTHING, Amount
from gpu_tenancy.core.snapshot import Key
from gpu_tenancy.kube.resources import COORDINATION_LEASES
from tests.unit.controller.facts import Object
from tests.unit.controller.seen import Seen

NODES = ("n1", "n2")
TEMPLATES = ("", "train", "other")
PHASES = ("Pending", "Running", "Succeeded", "Failed")


def _pod(node: str, template: str, phase: str, cpu: int, *, miner: bool = False) -> digests.Pod:
    return digests.Pod(
        metadata=digests.PodMeta(
            "p",
            namespace="team-a",
            labels={names.LABEL_POOL: "idle", names.LABEL_HOLDER: "uid-idle"} if miner else {},
            owner_references=(digests.Owner("MiningPool", "idle", "uid-idle"),) if miner else (),
        ),
        spec=digests.PodSpec(
            node_name=node,
            containers=(digests.Container(digests.ResourceLists(requests={"cpu": f"{cpu}m", "memory": f"{cpu}Mi"})),),
            resource_claims=(digests.PodClaim(resource_claim_template_name=template),) if template else (),
        ),
        status=digests.PodStatus(phase),
    )


PODS = st.none() | st.builds(
    _pod,
    st.sampled_from(("", *NODES)),
    st.sampled_from(TEMPLATES),
    st.sampled_from(PHASES),
    st.integers(0, 5000),
    miner=st.booleans(),
)


def _expected(pods: list[digests.Pod], node: str, leases: frozenset[Key]) -> Amount:
    total = NOTHING
    for pod in pods:
        template = pod.spec.resource_claims[0].resource_claim_template_name if pod.spec.resource_claims else ""
        ours = names.LABEL_POOL in pod.metadata.labels or Key("team-a", template) in leases
        if pod.spec.node_name == node and pod.status.phase in ("Pending", "Running") and not ours:
            milli = int(str(pod.spec.containers[0].resources.requests["cpu"])[:-1])
            total += Amount(milli, milli * 2**20, 1)
    return total


@given(changes=st.lists(st.tuples(st.integers(0, 4), PODS), max_size=30))
def test_the_load_of_a_node_is_the_sum_of_its_running_pods_whatever_happened_before(
    changes: list[tuple[int, digests.Pod | None]],
) -> None:
    """Pods come, change and go in any order; those of leases and of pools are planned and not counted beside it."""
    loads, there = NodeLoads(), dict[int, digests.Pod]()
    for number, new in changes:
        loads.note(there.pop(number, None), new)
        if new is not None:
            there[number] = new
    for node in NODES:
        for leases in (frozenset[Key](), frozenset({Key("team-a", "train")})):
            assert loads.foreign(node, leases, {}) == _expected(list(there.values()), node, leases)


def test_a_node_that_nobody_uses_any_more_is_remembered_by_nothing() -> None:
    loads, pod = NodeLoads(), _pod("n1", "train", "Running", 100)
    loads.note(None, pod)
    loads.note(pod, None)
    assert not loads._loads["n1"]


def _beat(renewed: str | None, seconds: int = 40) -> Object:
    spec = {"leaseDurationSeconds": seconds, **({"renewTime": renewed} if renewed else {})}
    metadata = {"name": "agent-n1", "namespace": "gpu-tenancy-system", "labels": {names.LABEL_NODE: "n1"}}
    return {"metadata": metadata, "spec": spec}


def _at(second: float) -> datetime:
    return datetime(2026, 3, 1, 12, tzinfo=UTC) + timedelta(seconds=second)


def _heartbeat(renewed: float | None, seconds: int = 40) -> digests.Heartbeat:
    metadata = digests.Meta("agent-n1", namespace="gpu-tenancy-system", labels={names.LABEL_NODE: "n1"})
    spec = digests.HeartbeatSpec(None if renewed is None else _at(renewed), seconds)
    return digests.Heartbeat(metadata, spec)


def test_an_agent_counts_as_alive_from_when_its_heartbeat_is_seen_to_change_whatever_its_clock_says() -> None:
    now = [_at(0)]
    pulse = Pulse(lambda: now[0])
    slow, slower = _heartbeat(-3600), _heartbeat(-3590)
    assert pulse.note(None, slow)
    assert pulse.until("n1") == _at(-3560)
    now[0] = _at(10)
    assert pulse.note(slow, slower)
    assert pulse.until("n1") == _at(50)
    now[0] = _at(20)
    assert not pulse.note(slower, _heartbeat(7200))
    assert pulse.until("n1") == _at(60)


def test_a_heartbeat_from_the_future_counts_no_longer_than_any_other() -> None:
    pulse = Pulse(lambda: _at(0))
    pulse.note(None, _heartbeat(7200, seconds=10**9))
    assert pulse.until("n1") == _at(LONGEST_PATIENCE)


def test_a_heartbeat_that_somebody_deletes_counts_until_it_runs_out() -> None:
    pulse = Pulse(lambda: _at(0))
    pulse.note(None, _heartbeat(0))
    assert not pulse.note(_heartbeat(0), None)
    assert pulse.until("n1") == _at(40)
    assert not pulse.note(None, _heartbeat(0))


def test_an_agent_that_is_seen_for_the_first_time_calls_for_a_cycle_and_one_that_goes_does_not() -> None:
    seen, beat = Seen(), _beat("2026-03-01T12:00:00.000000Z")
    assert seen.show(COORDINATION_LEASES, beat) == 1
    assert seen.show(COORDINATION_LEASES, beat, event="DELETED") == 0
