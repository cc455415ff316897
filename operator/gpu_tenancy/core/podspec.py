"""What a pod template asks of a node: resources, tolerations, node selector and required node affinity.

Follows kube-scheduler's rules, so that a plan never sends pods where the scheduler would not bind them. Pure; reads
plain mappings as they come from the API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_tenancy.api.names import ANY_GPU_TAINT
from gpu_tenancy.core.amounts import NOTHING, Amount, of_list, total


@dataclass(frozen=True, slots=True)
class Taint:
    """A node taint that keeps pods away (effect NoSchedule or NoExecute)."""

    key: str
    value: str
    effect: str

    @property
    def transitory(self) -> bool:
        """Set by Kubernetes itself, for as long as a condition of the node lasts (cordoned, unreachable, pressure)."""
        return self.key.startswith("node.kubernetes.io/")


@dataclass(frozen=True, slots=True)
class Toleration:
    """A pod's toleration; empty key with Exists tolerates everything."""

    key: str
    operator: str
    value: str
    effect: str

    def tolerates(self, taint: Taint) -> bool:
        """Kubernetes `Toleration.ToleratesTaint`."""
        if self.effect and self.effect != taint.effect:
            return False
        if self.key and self.key != taint.key:
            return False
        return self.operator == "Exists" or (bool(self.key) and self.value == taint.value)


@dataclass(frozen=True, slots=True)
class Expression:
    """One requirement of a node selector term on labels (or on metadata.name)."""

    key: str
    operator: str
    values: tuple[str, ...]

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Kubernetes node selector operators In, NotIn, Exists, DoesNotExist, Gt, Lt; unknown ones match nothing."""
        present, value = self.key in labels, labels.get(self.key, "")
        match self.operator:
            case "In":
                return present and value in self.values
            case "NotIn":
                return not present or value not in self.values
            case "Exists":
                return present
            case "DoesNotExist":
                return not present
            case "Gt" | "Lt":
                return present and self._compares(value)
            case _:
                return False

    def _compares(self, value: str) -> bool:
        try:
            number, bound = int(value), int(self.values[0])
        except (ValueError, IndexError):
            return False
        return number > bound if self.operator == "Gt" else number < bound


@dataclass(frozen=True, slots=True)
class PodNeeds:
    """Everything about a pod that decides on which nodes it can run, GPUs aside."""

    amount: Amount
    tolerations: tuple[Toleration, ...] = ()
    node_selector: tuple[tuple[str, str], ...] = ()
    terms: tuple[tuple[Expression, ...], ...] = ()
    """Required node affinity: terms are alternatives, the expressions of a term must all hold; none: anywhere."""

    def objection(self, name: str, labels: Mapping[str, str], taints: Iterable[Taint]) -> str:
        """Why the pod may not run on a node with that name, those labels and taints; empty where it may."""
        for key, value in self.node_selector:
            if labels.get(key) != value:
                return f"node selector {key}={value} does not match"
        if self.terms and not any(_term_holds(term, name, labels) for term in self.terms):
            return "its required node affinity does not match"
        for taint in taints:
            if taint.key != ANY_GPU_TAINT and not any(one.tolerates(taint) for one in self.tolerations):
                return f"taint {taint.key}={taint.value}:{taint.effect} is not tolerated"
        return ""


def _term_holds(term: Sequence[Expression], name: str, labels: Mapping[str, str]) -> bool:
    fields = {"metadata.name": name}
    return bool(term) and all(one.matches(fields if one.key == "metadata.name" else labels) for one in term)


def requests(spec: Mapping[str, Any]) -> Amount:
    """Effective request of a pod: the larger of its containers together and each step of its init containers.

    Source: Kubernetes resource rules for init and sidecar containers (a sidecar is an init container with
    restartPolicy Always and stays) plus pod overhead; a request that is absent equals the limit.
    """
    running = total(_container(one) for one in spec.get("containers") or ())
    sidecars, peak = NOTHING, NOTHING
    for one in spec.get("initContainers") or ():
        if one.get("restartPolicy") == "Always":
            sidecars += _container(one)
            peak = peak.larger(sidecars)
        else:
            peak = peak.larger(sidecars + _container(one))
    whole = _container(spec, (running + sidecars).larger(peak)) + of_list(spec.get("overhead") or {})
    return Amount(whole.cpu_milli, whole.memory, 1)


def _container(owner: Mapping[str, Any], default: Amount = NOTHING) -> Amount:
    """Request of a container, or of a pod with resources of its own, which then count instead of its containers'."""
    resources = owner.get("resources") or {}
    wanted = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    own = of_list(wanted)
    return Amount(
        own.cpu_milli if "cpu" in wanted else default.cpu_milli, own.memory if "memory" in wanted else default.memory
    )


def without_nulls(value: Any) -> Any:  # noqa: ANN401  (a JSON value)
    """A copy without null fields: to Kubernetes they say the same as nothing, but they are no maps and no lists."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def needs(spec: Mapping[str, Any]) -> PodNeeds:
    """PodNeeds of a pod spec. Raises ValueError on a quantity that is not one."""
    affinity = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    return PodNeeds(
        amount=requests(spec),
        tolerations=tuple(_toleration(one) for one in spec.get("tolerations") or ()),
        node_selector=tuple(sorted((spec.get("nodeSelector") or {}).items())),
        terms=tuple(_term(one) for one in affinity.get("nodeSelectorTerms") or ()),
    )


def _toleration(toleration: Mapping[str, Any]) -> Toleration:
    return Toleration(
        toleration.get("key") or "",
        toleration.get("operator") or "Equal",
        toleration.get("value") or "",
        toleration.get("effect") or "",
    )


def _term(term: Mapping[str, Any]) -> tuple[Expression, ...]:
    fields = (*(term.get("matchExpressions") or ()), *(term.get("matchFields") or ()))
    return tuple(Expression(one["key"], one["operator"], tuple(one.get("values") or ())) for one in fields)
