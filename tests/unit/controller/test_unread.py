"""What cannot be read is counted, and told once by an Event on it: its status is left as it is."""

from __future__ import annotations

from datetime import UTC, datetime

from gpu_tenancy.controller.cycle import Cycle
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient
from tests.unit.controller.facts import Object, body

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def odd(version: int = 1, attempt: str = "first") -> Object:
    """A lease with a status that another version wrote."""
    return body("GpuLease", "train", version=version, spec={"gpus": {"profile": "full"}}, status={"attempt": attempt})


def looks(cycle: Cycle) -> list[Object]:
    """What is told after one more look at everything."""
    cycle._snapshot(NOW)
    cycle._tell_unread()
    queue = cycle.events._queue
    return [queue.get_nowait() for _ in range(queue.qsize())]


def shown(metrics: Metrics, kind: str) -> float | None:
    return metrics.registry.get_sample_value("gpu_tenancy_unreadable", {"kind": kind})


def test_what_cannot_be_read_is_told_once_and_counted_for_as_long() -> None:
    metrics = Metrics()
    cycle = Cycle(KubeClient.connect("/nowhere"), Settings(), metrics)
    store = cycle.views.store
    assert looks(cycle) == []
    assert shown(metrics, "GpuLease") == 0
    store.put(resources.GPU_LEASES, "ADDED", odd())
    (event,) = looks(cycle)
    assert (event["type"], event["reason"]) == ("Warning", "Unreadable")
    assert event["involvedObject"]["name"] == "train"
    assert event["message"].startswith("GpuLease team-a/train cannot be read (status.attempt: ")
    assert event["message"].endswith("It is left as it is, and so is what depends on it, until it can be read.")
    store.put(resources.GPU_LEASES, "MODIFIED", odd(version=2, attempt="second"))
    assert looks(cycle) == [], "the same was said already"
    assert (shown(metrics, "GpuLease"), shown(metrics, "GpuNode")) == (1, 0)
    store.put(resources.GPU_LEASES, "DELETED", odd(version=3))
    assert looks(cycle) == []
    assert shown(metrics, "GpuLease") == 0
