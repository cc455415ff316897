"""Admission: the named checks a lease passes before it is placed, and the sentences for those that do not.

"Why is my lease pending?" is answered here: each check returns a Refusal with numbers, or None. The order of ADMISSION
is the order in which a reader is told. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from gpu_tenancy.api.base import format_duration, parse_duration
from gpu_tenancy.api.lease import Reason
from gpu_tenancy.core import room, topology
from gpu_tenancy.core.actions import Refusal
from gpu_tenancy.core.amounts import Amount, counted, cpu_milli, memory_bytes
from gpu_tenancy.core.commitments import Pledges
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds
from gpu_tenancy.core.pricing import Pricing
from gpu_tenancy.core.shares import Shares, asked
from gpu_tenancy.core.snapshot import LeaseFacts, SpotLimits
from gpu_tenancy.core.terms import begins_later, too_long
from gpu_tenancy.mig.profiles import FULL, KNOWN_NAMES, of_model

DEFAULT_NEEDS: Final = PodNeeds(Amount(1000, 2**30, 1))
"""What a pod is planned with where the lease says nothing: 1 CPU, 1Gi (the defaults of podResources)."""


@dataclass(slots=True)
class Context:
    """What the checks look at besides the lease, and what one plan has found out for good."""

    world: World
    pricing: Pricing
    shares: Shares
    spot_limits: SpotLimits
    pledges: Pledges
    now: datetime
    topology_levels: tuple[str, ...] = ()
    """Node labels by which places are told apart, the coarsest first."""
    full: dict[Want, str] = field(default_factory=dict)
    """What found no room, and what there is of it."""
    _wants: dict[Hashable, list[Want]] = field(default_factory=dict)
    """By UID of the lease, and by what all leases like it have in common."""
    _closest: dict[Hashable, list[Want]] = field(default_factory=dict)
    """By what all leases like it have in common: as things are when the first of them asks."""
    _common: dict[tuple[str, int, int, str, PodNeeds], Want] = field(default_factory=dict)
    _impossible: dict[Want, Refusal | None] = field(default_factory=dict)

    def wants(self, lease: LeaseFacts) -> list[Want]:
        """What the lease asks for; of a gang, and where a topology is required, once more for each place where it would
        be together."""
        wants = self.anywhere(lease)
        if lease.spec.pods == 1 and lease.spec.topology is None:
            return wants
        key = _alike(lease), lease.spec.topology
        if key not in self._closest:
            asked = lease.spec.topology
            found = (topology.closest(want, asked, self.world, self.topology_levels) for want in wants)
            self._closest[key] = [one for several in found for one in several]
        return self._closest[key]

    def anywhere(self, lease: LeaseFacts) -> list[Want]:
        """What the lease asks for, wherever its pods may be: once for each model on which it may be placed."""
        wants = self._wants.get(lease.uid)
        if wants is None:
            alike = _alike(lease)
            wants = self._wants.get(alike)
            if wants is None:
                wants = [self.want(lease, model) for model in _models(lease, self)]
            self._wants[alike] = self._wants[lease.uid] = wants
        return wants

    def want(self, lease: LeaseFacts, model: str) -> Want:
        """What the lease asks for on one model."""
        gpus = lease.spec.gpus
        key = (gpus.profile, gpus.count, lease.spec.pods, model, needs_of(lease))
        return self._common.get(key) or self._common.setdefault(key, Want(*key))

    def impossible(self, want: Want) -> Refusal | None:
        """Why no empty cluster could hold it; asked once per plan of what leases have in common."""
        if want not in self._impossible:
            self._impossible[want] = room.impossible(want, self.world)
        return self._impossible[want]


Check = Callable[[LeaseFacts, Context], Refusal | None]


def needs_of(lease: LeaseFacts) -> PodNeeds:
    """What each pod of the lease needs of its node besides GPUs."""
    if lease.template is not None:
        return lease.template.needs
    if lease.spec.pod_resources is None:
        return DEFAULT_NEEDS
    resources = lease.spec.pod_resources
    return PodNeeds(Amount(cpu_milli(resources.cpu), memory_bytes(resources.memory), 1))


def _alike(lease: LeaseFacts) -> Hashable:
    """The same for leases that want the same: whose price is not locked yet, and that ask for the same."""
    if lease.status.admitted_at is not None or lease.records:
        return lease.uid
    gpus = lease.spec.gpus
    return gpus.profile, gpus.count, lease.spec.pods, gpus.model, lease.spec.tier, needs_of(lease)


def _models(lease: LeaseFacts, context: Context) -> list[str]:
    """Models on which the lease may be placed. Its price is one model's: it is held to that once it is locked."""
    gpus, locked = lease.spec.gpus, lease.status.price
    if (committed := context.pledges.of(lease)) is not None:
        return [committed.spec.model]
    if lease.records:
        return [lease.records[-1].spec.model]
    models = [gpus.model] if gpus.model else context.world.models(gpus.profile)
    if lease.status.admitted_at is None:
        return [model for model in models if context.pricing.allows(model, gpus.profile, lease.spec.tier)]
    same = [model for model in models if context.pricing.price(model, gpus.profile, lease.spec.tier) == locked]
    return same or models


def refusal(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The first check that fails, or None for a lease that may be placed now if there is room."""
    for check in ADMISSION:
        if found := check(lease, context):
            return found
    return None


def readable(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The object could be parsed."""
    return Refusal(Reason.INVALID_SPEC, lease.invalid, final=True) if lease.invalid else None


def known_profile(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The profile is one that the model has, or some supported model where none is named."""
    model, profile = lease.spec.gpus.model, lease.spec.gpus.profile
    if model is not None and profile != FULL and (shapes := of_model(model)) and profile not in shapes:
        message = f'gpus.model {model} has no profile "{profile}"; it has {FULL}, {", ".join(shapes)}.'
        return Refusal(Reason.IMPOSSIBLE, message, final=True)
    if profile in KNOWN_NAMES:
        return None
    names = ", ".join(KNOWN_NAMES)
    message = f'gpus.profile "{lease.spec.gpus.profile}" is not known; choose one of {names}.'
    return Refusal(Reason.IMPOSSIBLE, message, final=True)


def max_term(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The tenant may lease for so long. Leases that were admitted before keep their term."""
    tenant = context.shares.tenant(lease)
    if tenant.longest is None or lease.status.admitted_at is not None:
        return None
    duration = lease.spec.term.duration
    if not too_long(duration, tenant):
        return None
    has = f"this one has {duration}" if duration else "this one has no term.duration"
    remedy = "Set a term.duration that is not longer, or ask the platform team."
    message = f"Leases of {tenant.title} may run for {tenant.max_term} at most; {has}. {remedy}"
    return Refusal(Reason.TERM_TOO_LONG, message, final=True)


def allowed_tier(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The tenant may have leases of the tier. Leases that were admitted before stay."""
    tenant = context.shares.tenant(lease)
    if not tenant.tiers or lease.spec.tier in tenant.tiers or lease.status.admitted_at is not None:
        return None
    may = f"Leases of {tenant.title} may be of tier {' or '.join(tenant.tiers)}; this one is {lease.spec.tier}"
    remedy = "Make a new lease of another tier, or ask the platform team."
    return Refusal(Reason.TIER_NOT_ALLOWED, f"{may}. {remedy}", final=True)


def notice_allowed(lease: LeaseFacts, context: Context) -> Refusal | None:
    """No spot lease asks for a longer notice than others can be made to wait for."""
    notice, longest = lease.spec.term.preemption_notice, context.spot_limits.longest_notice
    if notice is None or parse_duration(notice) <= longest or lease.status.admitted_at is not None:
        return None
    message = f"term.preemptionNotice may be {format_duration(longest)} at most; this lease has {notice}."
    return Refusal(Reason.NOTICE_TOO_LONG, f"{message} Set a shorter one.", final=True)


def template_accepted(lease: LeaseFacts, _: Context) -> Refusal | None:
    """The API server would accept the Job made from the template."""
    if lease.template is None or lease.template.verdict == "":
        return None
    if lease.template.verdict is None:
        return Refusal(Reason.CHECKING_TEMPLATE, "The template is being checked by the API server.")
    return Refusal(Reason.INVALID_TEMPLATE, lease.template.verdict, final=True)


def known_model(lease: LeaseFacts, context: Context) -> Refusal | None:
    """Some node has a GPU of the model that the lease names."""
    model, present = lease.spec.gpus.model, context.world.all_models
    if model is None or model in present or not present or context.world.unseen:
        return None
    message = f'No node has a GPU of gpus.model "{model}"; there are {", ".join(present)}.'
    return Refusal(Reason.IMPOSSIBLE, f"{message} {room.REMEDY}", final=True)


def priced(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The book in effect has a rate. Leases that were admitted before keep their price."""
    if lease.status.admitted_at is not None or context.anywhere(lease):
        return None
    gpus = lease.spec.gpus
    models = [gpus.model] if gpus.model else context.world.models(gpus.profile)
    if not models:
        return None
    book = context.pricing.current
    where = f"PriceBook {book.name} has" if book else "None of the PriceBooks is in effect, so there is"
    return Refusal(
        Reason.NO_RATE,
        f"{where} no rate for profile {gpus.profile} of model {' or '.join(models)} at tier {lease.spec.tier}; "
        "finance must add one before it can be leased.",
        final=True,
    )


def committed(lease: LeaseFacts, context: Context) -> Refusal | None:
    """A Reserved lease has a commitment to draw on. One that begins later draws on it when it begins."""
    refusal = context.pledges.refusal(lease)
    waits = refusal is not None and not refusal.final and begins_later(lease, context.now)
    return None if waits else refusal


def possible(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The cluster could hold the lease if it were empty."""
    answers = []
    level = lease.spec.topology.required if lease.spec.topology else None
    for want in context.anywhere(lease) or [context.want(lease, lease.spec.gpus.model or "")]:
        answer = context.impossible(want)
        if answer is None and level is not None:
            answer = topology.impossible(want, context.world, level)
        if answer is None:
            return None
        answers.append(answer)
    return answers[0]


def quota(lease: LeaseFacts, context: Context) -> Refusal | None:
    """The tenant may hold the lease's devices, alone and beside what it holds already."""
    tenant = context.shares.tenant(lease)
    if tenant.limits is None:
        return None
    if begins_later(lease, context.now):
        needs, holds = asked(lease), context.shares.booked(lease)
    else:
        needs, holds = asked(lease), context.shares.standing(tenant.title).claims
    refusal = None
    for most, needed, held, noun in zip(tenant.limits, needs, holds, COUNTED, strict=True):
        if most is None or not needed or held + needed <= most:
            continue
        if needed > most:
            may = f"{tenant.title} may hold {counted(most, noun)} at a time; this lease needs {needed}"
            message = f"{may[0].upper()}{may[1:]}. Make it smaller, or ask the platform team for a larger quota."
            return Refusal(Reason.QUOTA_TOO_SMALL, message, final=True)
        has = f"{tenant.title} holds {held} of {counted(most, noun)}"
        refusal = refusal or Refusal(Reason.OVER_QUOTA, f"{has}; this lease needs {needed}.")
    return refusal


COUNTED: Final = ("GPU", "memory slice", "compute slice")
"""What quotas count."""

ADMISSION: Final[tuple[Check, ...]] = (
    readable,
    known_profile,
    max_term,
    allowed_tier,
    notice_allowed,
    template_accepted,
    known_model,
    committed,
    priced,
    possible,
    quota,
)
