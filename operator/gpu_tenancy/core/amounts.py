"""CPU, memory and pod slots: what a pod asks of a node and what a node has. Pure integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING
from functools import lru_cache
from typing import NamedTuple

from gpu_tenancy.api.base import parse_quantity


class Amount(NamedTuple):
    """An amount of node resources."""

    cpu_milli: int = 0
    """CPU in thousandths of a core."""
    memory: int = 0
    """Memory in bytes."""
    pods: int = 0
    """Pod slots."""

    def __add__(self, other: Amount) -> Amount:  # type: ignore[override]  # amounts add up, they are not appended
        (cpu, memory, pods), (more_cpu, more_memory, more_pods) = self, other
        return Amount(cpu + more_cpu, memory + more_memory, pods + more_pods)

    def __sub__(self, other: Amount) -> Amount:
        (cpu, memory, pods), (less_cpu, less_memory, less_pods) = self, other
        return Amount(cpu - less_cpu, memory - less_memory, pods - less_pods)

    def at_most(self, other: Amount) -> bool:
        """Whether it fits into `other` in every dimension."""
        (cpu, memory, pods), (most_cpu, most_memory, most_pods) = self, other
        return cpu <= most_cpu and memory <= most_memory and pods <= most_pods

    def of(self, count: int) -> Amount:
        """So many times as much."""
        return Amount(self.cpu_milli * count, self.memory * count, self.pods * count)

    def times(self, each: Amount) -> int:
        """How many times `each` fits into this; 1 where it is nothing at all."""
        pairs = ((self.cpu_milli, each.cpu_milli), (self.memory, each.memory), (self.pods, each.pods))
        return max(0, min((have // one for have, one in pairs if one), default=1))

    def larger(self, other: Amount) -> Amount:
        """The larger of both in each dimension."""
        return Amount(max(self.cpu_milli, other.cpu_milli), max(self.memory, other.memory), max(self.pods, other.pods))

    def beyond(self, other: Amount) -> Amount:
        """By how much it is more than `other` in each dimension."""
        return (self - other).larger(NOTHING)

    def shortage(self, available: Amount) -> str:
        """What is missing in plain English, e.g. "500 CPU (64 free)"; empty where it fits."""
        missing = []
        if self.cpu_milli > available.cpu_milli:
            missing.append(f"{cores(self.cpu_milli)} CPU ({cores(available.cpu_milli)} there)")
        if self.memory > available.memory:
            missing.append(f"{gibibytes(self.memory)} memory ({gibibytes(available.memory)} there)")
        if self.pods > available.pods:
            missing.append(f"a pod slot ({max(available.pods, 0)} there)")
        return " and ".join(missing)


NOTHING = Amount()


def counted(count: int, noun: str) -> str:
    """A number of things for people: "1 pod", "2 pods"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def cores(cpu_milli: int) -> str:
    """CPU for people: "16", "0.5"."""
    return f"{max(cpu_milli, 0) / 1000:g}"


def gibibytes(memory: int) -> str:
    """Memory for people: "128Gi", "0.5Gi"."""
    return f"{round(max(memory, 0) / 2**30, 2):g}Gi"


@lru_cache(maxsize=4096)
def cpu_milli(quantity: str) -> int:
    """CPU quantity in millicores, rounded up as kube-scheduler does."""
    return int((parse_quantity(quantity) * 1000).to_integral_value(ROUND_CEILING))


@lru_cache(maxsize=4096)
def memory_bytes(quantity: str) -> int:
    """Memory quantity in bytes, rounded up."""
    return int(parse_quantity(quantity).to_integral_value(ROUND_CEILING))


def of_list(resources: Mapping[str, str | int | float]) -> Amount:
    """Amount of a Kubernetes ResourceList; other resources than cpu, memory and pods are not planned."""
    return Amount(
        cpu_milli(str(resources.get("cpu", "0"))),
        memory_bytes(str(resources.get("memory", "0"))),
        int(parse_quantity(resources.get("pods", 0))),
    )


def total(amounts: Iterable[Amount]) -> Amount:
    """Sum of amounts."""
    cpu = memory = pods = 0
    for amount in amounts:
        cpu += amount.cpu_milli
        memory += amount.memory
        pods += amount.pods
    return Amount(cpu, memory, pods)
