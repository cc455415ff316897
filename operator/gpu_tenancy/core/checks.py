"""Admission: the named checks a lease passes before it is placed, and the sentences for those that do not.

"Why is my lease pending?" is answered here: each check returns a Refusal with numbers, or None. The order of ADMISSION
is the order in which a reader is told. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.amounts import Amount, cpu_milli, memory_bytes
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.pricing import Pricing
from gpu_tenancy.core.snapshot import LeaseFacts
from gpu_tenancy.core.world import GpuBook, NodeBook, Want, World
from gpu_tenancy.mig.layout import highest_start
from gpu_tenancy.mig.profiles import FULL, KNOWN_NAMES, of_model

DEFAULT_NEEDS: Final = PodNeeds(Amount(1000, 2**30, 1))
"""What a pod is planned with where the lease says nothing: 1 CPU, 1Gi (the defaults of podResources)."""


@dataclass(slots=True)
class Context:
    """What the checks look at besides the lease."""

    world: World
    pricing: Pricing
    answers: dict[Want, Refusal | None] = field(default_factory=dict)
    """Leases that want the same are answered once per plan."""


Check = Callable[[LeaseFacts, Context], Refusal | None]


def needs_of(lease: LeaseFacts) -> PodNeeds:
    """What each pod of the lease needs of its node besides GPUs."""
    if lease.template is not None:
        return lease.template.needs
    if lease.spec.pod_resources is None:
        return DEFAULT_NEEDS
    resources = lease.spec.pod_resources
    return PodNeeds(Amount(cpu_milli(resources.cpu), memory_bytes(resources.memory), 1))


def want_of(lease: LeaseFacts, model: str) -> Want:
    """The lease as a want for one model."""
    gpus = lease.spec.gpus
    return Want(gpus.profile, gpus.count, lease.spec.pods, model, needs_of(lease))


def models_for(lease: LeaseFacts, context: Context) -> list[str]:
    """Models on which the lease may be placed and priced."""
    return [
        model
        for model in context.world.models(lease.spec.gpus.profile)
        if lease.spec.gpus.model in (None, model) and context.pricing.allows(model, lease.spec.gpus.profile)
    ]


def refusal(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The first check that fails, or None for a lease that may be placed now if there is room."""
    return next((found for check in ADMISSION if (found := check(lease, context))), None)


def readable(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The object could be parsed."""
    return Refusal(Reason.INVALID_SPEC, lease.invalid, final=True) if lease.invalid else None


def known_profile(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The profile is one that some supported model has."""
    if lease.spec.gpus.profile in KNOWN_NAMES:
        return None
    names = ", ".join(KNOWN_NAMES)
    message = f'gpus.profile "{lease.spec.gpus.profile}" is not known; choose one of {names}.'
    return Refusal(Reason.IMPOSSIBLE, message, final=True)


def template_accepted(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The API server would accept the Job made from the template."""
    if lease.template is None or lease.template.verdict == "":
        return None
    if lease.template.verdict is None:
        return Refusal(Reason.CHECKING_TEMPLATE, "The template is being checked by the API server.")
    return Refusal(Reason.INVALID_TEMPLATE, lease.template.verdict, final=True)


def priced(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The book in effect has a rate. Leases that were admitted before keep their price."""
    if not context.pricing.exists or lease.status.admitted_at is not None:
        return None
    profile = lease.spec.gpus.profile
    models = [lease.spec.gpus.model] if lease.spec.gpus.model else context.world.models(profile)
    if not models or any(context.pricing.allows(model, profile) for model in models):
        return None
    book = context.pricing.current
    where = (
        f"PriceBook {book.name} has no rate"
        if book
        else "There are PriceBooks, but none is in effect, so there is no rate"
    )
    return Refusal(
        Reason.NO_RATE,
        f"{where} for profile {profile} of model {' or '.join(models)}; finance must add one before it can be leased.",
        final=True,
    )


def possible(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The cluster could hold the lease if it were empty."""
    world, gpus = context.world, lease.spec.gpus
    models = [gpus.model] if gpus.model else (world.models(gpus.profile) or [""])
    answers = []
    for model in models:
        want = want_of(lease, model)
        if want not in context.answers:
            context.answers[want] = _impossible(want, world)
        if context.answers[want] is None:
            return None
        answers.append(context.answers[want])
    return answers[0]


ADMISSION: Final[tuple[Check, ...]] = (readable, known_profile, template_accepted, priced, possible)


def no_room(want: Want, world: World) -> str:
    """Why a possible lease finds no place now: what it needs and how much of that is there."""
    free = [_free_seats(node, want, world) for node in world.nodes.values() if not node.objection]
    pods, seats = _pods(want.pods), sum(free)
    if want.profile != FULL:
        return f"needs {want.pods} free {want.profile} on {want.model}; there is room for {seats} beside the leases that run"
    best = max((_free_wholes(node, want) for node in world.nodes.values() if not node.objection), default=0)
    if best < want.count:
        return f"needs {want.count} free GPUs ({want.model}) on one node; the best node has {best}"
    return (
        f"needs room for {pods} with {want.count} free GPUs ({want.model}), {_amount(want)} each; "
        f"there is room for {seats}"
    )


def _impossible(want: Want, world: World) -> Refusal | None:
    """Refusal of a want that no empty cluster of these nodes could hold, naming the first thing that is too small."""
    nodes = list(world.nodes.values())
    if not any(node.gpus for node in nodes):
        return Refusal(Reason.QUEUED, "No agent has reported a GPU yet.")
    seats = {node.facts.name: _seats(node, want) for node in nodes}
    if sum(seats.values()) < want.pods:
        return _too_few_gpus(want, nodes, sum(seats.values()))
    fitting = 0
    objections: list[str] = []
    shortages: list[tuple[Amount, str]] = []
    for node in nodes:
        if not seats[node.facts.name]:
            continue
        if objection := want.needs.objection(node.facts.name, node.facts.labels, node.facts.taints):
            objections.append(f"{node.facts.name}: {objection}")
            continue
        room = _times(node.facts.allocatable, want.needs.amount)
        if not room:
            shortages.append((node.facts.allocatable, want.needs.amount.shortage(node.facts.allocatable)))
        fitting += min(seats[node.facts.name], room)
    if fitting >= want.pods:
        return None
    if shortages:
        _, shortage = max(shortages, key=lambda pair: (pair[0].cpu_milli, pair[0].memory))
        return _never(f"each pod needs {shortage} on the largest GPU node")
    if objections:
        return _never(f"the pods may not run on the nodes that have the GPUs: {'; '.join(objections[:3])}")
    return _never(f"needs room for {_pods(want.pods)} of {_amount(want)}; all nodes together have room for {fitting}")


def _too_few_gpus(want: Want, nodes: list[NodeBook], seats: int) -> Refusal:
    model = f" ({want.model})" if want.model else ""
    if want.profile != FULL:
        mig = sum(1 for node in nodes for book in node.gpus.values() if _serves(book, want))
        return _never(
            f"needs {want.pods} × {want.profile}{model}; the {mig} GPUs in MIG mode that have the profile hold {seats} at most"
        )
    largest = max(sum(_serves(book, want) for book in node.gpus.values()) for node in nodes)
    if largest < want.count:
        return _never(f"needs {want.count} whole GPUs{model} on one node; the largest node has {largest}")
    return _never(
        f"needs {want.count} whole GPUs{model} on one node for each of {_pods(want.pods)}; "
        f"all nodes together hold {seats} such pods"
    )


def _never(message: str) -> Refusal:
    sentence = message[0].upper() + message[1:]
    return Refusal(Reason.IMPOSSIBLE, f"{sentence}. Change the lease or add nodes.", final=True)


def _serves(book: GpuBook, want: Want) -> bool:
    if want.model != book.gpu.model:
        return False
    return book.mig and want.profile in of_model(book.gpu.model) if want.profile != FULL else not book.mig


def _seats(node: NodeBook, want: Want) -> int:
    """Pods that the node's GPUs could serve if nothing else were on them."""
    serving = [book for book in node.gpus.values() if _serves(book, want)]
    if want.profile == FULL:
        return len(serving) // want.count
    return sum(_slices_free(book, want, 0) for book in serving)


def _free_wholes(node: NodeBook, want: Want) -> int:
    return sum(1 for book in node.gpus.values() if _serves(book, want) and not book.hard and book.gpu.healthy)


def _free_seats(node: NodeBook, want: Want, world: World) -> int:
    """Pods that the node could take beside its leases, its miners gone."""
    if not world.allows(node, want.needs):
        return 0
    if want.profile == FULL:
        seats = _free_wholes(node, want) // want.count
    else:
        serving = [book for book in node.gpus.values() if _serves(book, want) and book.gpu.healthy]
        seats = sum(_slices_free(book, want, book.hard) for book in serving)
    return min(seats, _times(node.free, want.needs.amount))


def _slices_free(book: GpuBook, want: Want, occupied: int) -> int:
    count, shape = 0, of_model(book.gpu.model)[want.profile]
    while (start := highest_start(book.gpu.model, want.profile, occupied)) is not None:
        occupied |= shape.mask(start)
        count += 1
    return count


def _times(free: Amount, each: Amount) -> int:
    """How many times `each` fits into `free`."""
    pairs = ((free.cpu_milli, each.cpu_milli), (free.memory, each.memory), (free.pods, each.pods))
    return max(0, min((have // one for have, one in pairs if one), default=1))


def _pods(count: int) -> str:
    return f"{count} pod{'s' if count > 1 else ''}"


def _amount(want: Want) -> str:
    amount = want.needs.amount
    return f"{amount.cpu_milli / 1000:g} CPU and {amount.memory / 2**30:g}Gi memory"
