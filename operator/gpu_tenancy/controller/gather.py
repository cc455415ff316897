"""gather: the views, frozen into a Snapshot. Parses, joins and drops; decides nothing and writes nothing.

An object that cannot be read becomes a fact with the reason; it never stops the others, and it never counts as empty.
What people wrote is `invalid`: they can correct it. What the operator and the agents wrote is `unreadable`: a newer
version of them did, and everything that may depend on it stays as it is. The statuses of pools, books and tenants are
derived anew each time and remember nothing: one that cannot be read is replaced.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from math import ceil
from typing import Any, Final, NamedTuple, TypeVar, cast

from pydantic import ValidationError

from gpu_tenancy.api import names
from gpu_tenancy.api.base import ApiModel, ConditionStatus, HolderKind
from gpu_tenancy.api.lease import ConditionType, GpuLeaseSpec, GpuLeaseStatus
from gpu_tenancy.api.lease import GpusSpec as _Gpus
from gpu_tenancy.api.node import GpuNodeSpec, GpuNodeStatus, Slot
from gpu_tenancy.api.pool import MiningPoolSpec, MiningPoolStatus
from gpu_tenancy.api.pricebook import PriceBookSpec, PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantSpec, GpuTenantStatus
from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.controller import digests
from gpu_tenancy.controller.facts import claim_facts, claim_of, job_facts, left_claim, miner_facts, starting_pod
from gpu_tenancy.controller.history import History
from gpu_tenancy.controller.views import Views, is_miners, is_owned
from gpu_tenancy.core import amounts, podspec
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.checks import needs_of
from gpu_tenancy.core.podspec import Taint
from gpu_tenancy.core.snapshot import (
    BookFacts,
    ClaimFacts,
    ConversionRules,
    Failure,
    JobFacts,
    Key,
    LeaseFacts,
    LeftClaim,
    MinerFacts,
    NodeFacts,
    PoolFacts,
    RecordFacts,
    Snapshot,
    SpotLimits,
    TemplateFacts,
    TenantDefaults,
    TenantFacts,
    as_before,
)
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import Object

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=ApiModel)
T = TypeVar("T")

UNREADABLE = GpuLeaseSpec(gpus=_Gpus(profile="full"))
"""Stands in for the spec of a lease that cannot be read; never planned with."""
KEEPS_AWAY = frozenset({"NoSchedule", "NoExecute"})
DEFAULTS: Final = TenantDefaults()
SPOT_LIMITS: Final = SpotLimits()
CONVERSION_RULES: Final = ConversionRules()
NAMED: Final = 3
"""Errors of an object that its sentence names; of more it gives the number."""


class Unread(NamedTuple):
    """An object that cannot be read, and whose status cannot say so."""

    body: Object
    why: str
    """A clause that names it."""


class _Parsed(NamedTuple):
    """A part of an object, as it was and as it was understood."""

    version: str
    """resourceVersion of the object."""
    raw: object
    parsed: Any


class Memo:
    """Remembers what was parsed from which part of an object, so that a cycle parses only what changed."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, _Parsed]] = {}
        """By UID, then by what was parsed."""
        self._used: set[str] = set()

    def get(self, body: Mapping[str, Any], part: str, what: str, parse: Callable[[], T]) -> T:
        """What `parse` makes of a part (spec, status) of the object; the same as before if only others have changed."""
        metadata = body["metadata"]
        uid, version = metadata["uid"], metadata["resourceVersion"]
        self._used.add(uid)
        parts = self._kept.setdefault(uid, {})
        held = parts.get(what)
        if held is None or held.version != version:
            raw = body.get(part)
            parsed = held.parsed if held is not None and held.raw == raw else parse()
            held = parts[what] = _Parsed(version, raw, parsed)
        return cast("T", held.parsed)

    def use(self, uid: str) -> None:
        """Of that object nothing was asked, and it is still there."""
        self._used.add(uid)

    def sweep(self) -> None:
        """Forget what the last snapshot did not use."""
        for key in self._kept.keys() - self._used:
            del self._kept[key]
        self._used.clear()


class _Source(NamedTuple):
    """What the facts of a lease are made from, its body apart."""

    records: tuple[RecordFacts, ...]
    unreadable_record: str
    claims: tuple[ClaimFacts, ...]
    jobs: tuple[JobFacts, ...]
    claim_template: str
    ends: bool
    verdict: str | None


class _Made(NamedTuple):
    """Facts, and what they were made from. It holds the body, so that no other object can be taken for it."""

    body: Object
    source: _Source
    facts: LeaseFacts


class Gather:
    """Takes snapshots of the views."""

    def __init__(
        self,
        views: Views,
        drain_grace_seconds: int,
        defaults: TenantDefaults = DEFAULTS,
        spot_limits: SpotLimits = SPOT_LIMITS,
        conversion_rules: ConversionRules = CONVERSION_RULES,
        topology_levels: tuple[str, ...] = (),
    ) -> None:
        """`drain_grace_seconds`: longest grace of a tenant's pods after the end of their lease."""
        self._topology_levels = topology_levels
        self._views = views
        self._spot_limits = spot_limits
        self._conversion_rules = conversion_rules
        self._defaults = defaults
        self._history = History(defaults.half_life)
        self._longest_grace = drain_grace_seconds
        self._memo = Memo()
        self._nodes_before: dict[str, NodeFacts] = {}
        self._leases_before: dict[str, _Made] = {}
        """By UID. What follows from facts that have not changed need not be found out again: they stay the same
        objects."""
        self._miners_before: dict[str, MinerFacts] = {}
        """By namespace and name of the claim."""
        self._records_before: dict[int, tuple[Object, RecordFacts]] = {}
        """By identity of the body."""
        self.unread: list[Unread] = []
        """What the last snapshot could not read."""

    def snapshot(self, now: datetime, verdicts: Mapping[str, str], failures: Mapping[str, Failure]) -> Snapshot:
        """Everything the plan may depend on. `verdicts`: of the API server on templates, by lease UID."""
        store = self._views.store
        self.unread = []
        claims, miner_claims = self._claims()
        jobs = self._jobs()
        lease_bodies = [body for body in store.all(resources.GPU_LEASES) if not _done(body)]
        records, unreadable = self._records(frozenset(_contract(body) for body in lease_bodies))
        keys = frozenset(_key(body) for body in store.all(resources.GPU_LEASES))
        leases = self._leases(lease_bodies, records, unreadable, claims, jobs, verdicts)
        snapshot = Snapshot(
            leases=leases,
            pools=tuple(self._pool(body) for body in store.all(resources.MINING_POOLS)),
            nodes=self._nodes(keys, {lease.key: lease for lease in leases}),
            books=tuple(self._book(body) for body in store.all(resources.PRICE_BOOKS)),
            miners=self._miners(miner_claims),
            orphans=tuple(record for left in records.values() for record in left),
            left_claims=self._left_claims(),
            starting=tuple(starting_pod(pod, since) for pod, since in self._views.starting.pods() if self._ours(pod)),
            failures={uid: failure for uid, failure in failures.items() if failure.retry_at > now},
            tenants=tuple(self._tenant(body) for body in store.all(resources.GPU_TENANTS)),
            tenant_defaults=self._defaults,
            spot_limits=self._spot_limits,
            conversion_rules=self._conversion_rules,
            topology_levels=self._topology_levels,
            past_usage=self._history.usage(store.all(resources.USAGE_RECORDS), now),
        )
        self._memo.sweep()
        return snapshot

    # --- leases

    def _records(self, contracts: frozenset[str]) -> tuple[dict[str, list[RecordFacts]], dict[str, str]]:
        """Records by contract, and why one of a contract cannot be read. Records of leases are taken out as leases are
        read; the rest are orphans.

        A segment counts once, also while its archived copy exists beside it. `contracts`: of the leases that are not
        settled; closed records of all others are history and are not even parsed.
        """
        found: dict[str, dict[str, RecordFacts]] = defaultdict(dict)
        unreadable: dict[str, str] = {}
        known: dict[int, tuple[Object, RecordFacts]] = {}
        for body in self._views.store.all(resources.USAGE_RECORDS):
            if _is_history(body, contracts):
                continue
            record, why = self._record(body)
            if record is None:
                unreadable[body["metadata"]["name"]] = self._unreadable(body, why)
                continue
            known[id(body)] = body, record
            of_contract = found[record.spec.contract]
            if record.name not in of_contract or record.namespace == record.spec.lease_namespace:
                of_contract[record.name] = record
        self._records_before = known
        readable = {
            contract: sorted(records.values(), key=lambda record: record.spec.segment)
            for contract, records in found.items()
        }
        # The API server sees to it that a record's name begins with its contract.
        by_contract = ((name.rpartition("-")[0], name, why) for name, why in unreadable.items())
        return readable, {contract: why for contract, name, why in by_contract if name not in found.get(contract, ())}

    def _record(self, body: Object) -> tuple[RecordFacts | None, str]:
        """A record, or why it cannot be read."""
        if (former := self._records_before.get(id(body))) is not None:
            self._memo.use(body["metadata"]["uid"])
            return former[1], ""
        spec, why = self._parse(UsageRecordSpec, body, "spec")
        if spec is None:
            return None, why
        finalized = names.FINALIZER_LEDGER in body["metadata"].get("finalizers", ())
        return RecordFacts(*_key(body), spec, "deletionTimestamp" in body["metadata"], finalized), ""

    def _claims(self) -> tuple[dict[str, list[ClaimFacts]], dict[str, digests.Claim]]:
        """Claims of leases by holder UID, and claims of miners by namespace/name."""
        leases: dict[str, list[ClaimFacts]] = defaultdict(list)
        miners: dict[str, digests.Claim] = {}
        for key, claim in self._views.claims.items.items():
            if is_miners(claim.metadata):
                miners[key] = claim
            else:
                facts = claim_facts(claim, self._views.pods.items, self._longest_grace)
                leases[facts.holder].append(facts)
        return leases, miners

    def _left_claims(self) -> tuple[LeftClaim, ...]:
        """Claims, whoever made them, that should be gone."""
        pods = self._views.pods.items
        found = (left_claim(claim, pods) for claim in self._views.claims.items.values())
        return tuple(one for one in found if one is not None)

    def _ours(self, pod: digests.Pod) -> bool:
        """It uses a claim on devices of ours: a miner's, a lease's, or one that somebody wrote by hand."""
        views, namespace = self._views, pod.metadata.namespace
        return any(
            f"{namespace}/{used.resource_claim_template_name}" in views.claim_templates.items
            or f"{namespace}/{used.resource_claim_name}" in views.claims.items
            for used in pod.spec.resource_claims
        )

    def _jobs(self) -> dict[tuple[str, str], list[JobFacts]]:
        """Jobs by UID of their lease. Anybody may label a Job: what the operator did not write is not read either."""
        found: dict[tuple[str, str], list[JobFacts]] = defaultdict(list)
        for job in self._views.jobs.items.values():
            labels = job.metadata.labels
            if labels.get(names.LABEL_ATTEMPT, "").isdecimal() and is_owned(job.metadata):
                found[job.metadata.namespace, labels.get(names.LABEL_HOLDER, "")].append(job_facts(job))
        return found

    def _leases(
        self,
        bodies: Iterable[Object],
        records: dict[str, list[RecordFacts]],
        unreadable: Mapping[str, str],
        claims: Mapping[str, list[ClaimFacts]],
        jobs: Mapping[tuple[str, str], list[JobFacts]],
        verdicts: Mapping[str, str],
    ) -> tuple[LeaseFacts, ...]:
        before, made = self._leases_before, {}
        for body in bodies:
            key = _key(body)
            uid, contract = body["metadata"]["uid"], _contract(body)
            source = _Source(
                tuple(records.pop(contract, ())),
                unreadable.get(contract, ""),
                tuple(claims.get(uid, ())),
                tuple(jobs.get((key.namespace, uid), ())),
                self._claim_template(key, uid),
                self._ends(key.namespace),
                verdicts.get(uid),
            )
            former = before.get(uid)
            if former is not None and former.body is body and former.source == source and not former.facts.unreadable:
                self._memo.use(uid)
                made[uid] = former
            else:
                made[uid] = self._lease(body, source, records)
        for uid, former in before.items():
            if uid not in made or made[uid].facts is not former.facts:
                former.facts.remember(None)  # it refers to them: garbage of the kind that is collected late
        self._leases_before = made
        return tuple(one.facts for one in made.values())

    def _lease(self, body: Object, source: _Source, records: dict[str, list[RecordFacts]]) -> _Made:
        metadata = body["metadata"]
        spec, invalid = self._parse(GpuLeaseSpec, body, "spec")
        status, unread = self._parse(GpuLeaseStatus, body, "status")
        status = status or GpuLeaseStatus()
        template, broken = self._template(body, spec, "" if status.admitted_at else source.verdict)
        own = source.records
        if unread:  # its contract is not known for certain
            if own:
                records[_contract(body)] = [*own]
            found = _named(_key(body), records)
            own = tuple(sorted(found, key=lambda one: (one.spec.contract, one.spec.segment)))
        facts = LeaseFacts(
            key=_key(body),
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            created=_time(metadata["creationTimestamp"]),
            spec=spec or UNREADABLE,
            status=status,
            invalid=invalid or broken,
            unreadable=self._unreadable(body, unread),
            unreadable_record=source.unreadable_record,
            deleted_at=_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
            finalized=names.FINALIZER_SETTLE in metadata.get("finalizers", ()),
            namespace_ends=source.ends,
            template=template,
            claim_template=source.claim_template,
            jobs=source.jobs,
            claims=source.claims,
            records=own,
        )
        former = self._leases_before.get(facts.uid)
        return _Made(body, source, former.facts if former is not None and former.facts == facts else facts)

    def _template(
        self, body: Object, spec: GpuLeaseSpec | None, verdict: str | None
    ) -> tuple[TemplateFacts | None, str]:
        if spec is None or spec.template is None:
            return None, ""
        pod_spec = podspec.without_nulls(spec.template.get("spec") or {})

        def read() -> podspec.PodNeeds | str:
            try:
                return podspec.needs(pod_spec)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                return f"spec.template cannot be read: {error}"

        needs = self._memo.get(body, "spec", "needs", read)
        if isinstance(needs, str):
            return None, needs
        return TemplateFacts(needs, verdict), ""

    def _ends(self, namespace: str) -> bool:
        found = self._views.namespaces.items.get(namespace)
        return found is not None and (
            found.metadata.deletion_timestamp is not None or found.status.phase == "Terminating"
        )

    def _claim_template(self, key: Key, uid: str) -> str:
        found = self._views.claim_templates.items.get(str(key))
        ours = found is not None and found.metadata.labels.get(names.LABEL_HOLDER) == uid
        return found.metadata.uid if found is not None and ours else ""

    # --- pools, books, tenants, miners

    def _pool(self, body: Object) -> PoolFacts:
        metadata = body["metadata"]
        spec, invalid = self._parse(MiningPoolSpec, body, "spec")
        status, _ = self._parse(MiningPoolStatus, body, "status")
        return PoolFacts(
            key=_key(body),
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            created=_time(metadata["creationTimestamp"]),
            spec=spec or MiningPoolSpec(image="unreadable"),
            status=status or MiningPoolStatus(),
            invalid=invalid,
            deleting="deletionTimestamp" in metadata or self._ends(metadata["namespace"]),
        )

    def _book(self, body: Object) -> BookFacts:
        return self._cluster_wide(BookFacts, body, PriceBookSpec, PriceBookStatus)

    def _tenant(self, body: Object) -> TenantFacts:
        return self._cluster_wide(TenantFacts, body, GpuTenantSpec, GpuTenantStatus)

    def _cluster_wide(self, facts: Callable[..., T], body: Object, spec: type[M], status: type[ApiModel]) -> T:
        """An object that has a name and no namespace, and of which nothing is known where its spec cannot be read."""
        metadata = body["metadata"]
        said, invalid = self._parse(spec, body, "spec")
        known, _ = self._parse(status, body, "status")
        return facts(
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 1),
            created=_time(metadata["creationTimestamp"]),
            spec=said,
            status=known or status(),
            invalid=invalid,
        )

    def _miners(self, claims: dict[str, digests.Claim]) -> tuple[MinerFacts, ...]:
        there = (pod for pod in self._views.pods.items.values() if is_miners(pod.metadata))
        pods = {f"{pod.metadata.namespace}/{claim_of(pod)}": pod for pod in there}
        before, made = self._miners_before, {}
        for key in sorted(pods.keys() | claims.keys()):
            found = miner_facts(pods.get(key), claims.get(key))
            made[key] = former if (former := before.get(key)) == found else found
        self._miners_before = made
        return tuple(made.values())

    # --- nodes

    def _nodes(self, keys: frozenset[Key], leases: Mapping[Key, LeaseFacts]) -> tuple[NodeFacts, ...]:
        """`keys`: of all leases there are, the settled ones too."""
        published = {
            found.spec.node_name: frozenset(device.name for device in found.spec.devices)
            for found in self._views.slices.items.values()
        }
        facts: list[NodeFacts] = []
        for body in self._views.store.all(resources.GPU_NODES):
            node = self._views.nodes.items.get(body["metadata"]["name"])
            if node is None:
                continue  # the Node was deleted: whatever was on it is lost
            name = node.metadata.name
            spec, why = self._parse(GpuNodeSpec, body, "spec")
            wanted = spec or GpuNodeSpec()
            foreign = self._views.loads.foreign(name, keys, _planned(wanted.slots, leases))
            found = self._node(body, node, wanted, why, published.get(name, frozenset()), foreign)
            facts.append(as_before(found, self._nodes_before.get(name)))
        self._nodes_before = {one.name: one for one in facts}
        return tuple(facts)

    def _node(
        self,
        body: Object,
        node: digests.Node,
        spec: GpuNodeSpec,
        unread: str,
        published: frozenset[str],
        foreign: Amount,
    ) -> NodeFacts:
        """`unread`: why `spec` could not be read."""
        status, unread_status = self._parse(GpuNodeStatus, body, "status")
        observed = status or GpuNodeStatus()
        unreadable = self._unreadable(body, unread or unread_status)
        return NodeFacts(
            name=node.metadata.name,
            generation=body["metadata"].get("generation", 1),
            gpus=tuple(sorted(observed.gpus, key=lambda gpu: gpu.index)),
            slots=tuple(spec.slots),
            observed=tuple(observed.slots),
            published=published,
            labels=node.metadata.labels,
            taints=tuple(
                Taint(taint.key, taint.value, taint.effect) for taint in node.spec.taints if taint.effect in KEEPS_AWAY
            ),
            allocatable=self._allocatable(node),
            foreign=foreign,
            ready=any(state.type == "Ready" and state.status == "True" for state in node.status.conditions),
            cordoned=node.spec.unschedulable,
            conditions=tuple(observed.conditions),
            agent_until=self._views.pulse.until(node.metadata.name),
            unreadable=unreadable,
            mentions=frozenset(_words([body.get("spec"), body.get("status")])) if unreadable else frozenset(),
            modes=tuple(spec.modes),
            conversions=tuple(spec.conversions),
        )

    def _allocatable(self, node: digests.Node) -> Amount:
        """What the node has; one that nobody can read has nothing to give, and keeps what is on it."""
        try:
            return amounts.of_list(node.status.allocatable)
        except ValueError as error:
            _log.warning("Node %s: status.allocatable cannot be read: %s", node.metadata.name, error)
            return amounts.NOTHING

    def _parse(self, model: type[M], body: Object, part: str) -> tuple[M | None, str]:
        """A part of the object as its model, or why it cannot be read. Unknown fields are left for newer operators."""

        def read() -> tuple[M | None, str]:
            if part not in body:
                return (None, "") if part == "status" else (None, f"{part} is missing")
            try:
                return model.model_validate(body[part], extra="ignore"), ""
            except ValidationError as error:
                errors = [f"{part}.{_path(one['loc'])}: {one['msg']}" for one in error.errors()]
                more = len(errors) - NAMED
                sentences = "; ".join(errors[:NAMED]) + (f"; and {more} more" if more > 0 else "")
                _log.warning("%s %s cannot be read: %s", body["kind"], _key(body), sentences)
                return None, sentences

        return self._memo.get(body, part, part, read)

    def _unreadable(self, body: Object, why: str) -> str:
        """The clause for an object of which nothing is decided because it cannot be read; empty without a reason."""
        if not why:
            return ""
        clause = f"{body['kind']} {str(_key(body)).lstrip('/')} cannot be read ({why})"
        self.unread.append(Unread(body, clause))
        return clause


def _named(key: Key, records: dict[str, list[RecordFacts]]) -> list[RecordFacts]:
    """Takes out the records that name a lease, for where its contract is not known."""
    contracts = [contract for contract, found in records.items() if _names_lease(found[0], key)]
    return [record for contract in contracts for record in records.pop(contract)]


def _names_lease(record: RecordFacts, key: Key) -> bool:
    return (record.spec.lease_namespace, record.spec.lease_name) == key


def _words(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _words(one)
    elif isinstance(value, list):
        for one in value:
            yield from _words(one)


def _planned(slots: Iterable[Slot], leases: Mapping[Key, LeaseFacts]) -> dict[Key, Amount]:
    """What the pods of each lease on a node are planned with there."""
    holders = (slot.holder for slot in slots if slot.holder.kind is HolderKind.GPU_LEASE)
    devices = Counter(Key(holder.namespace, holder.name) for holder in holders)
    return {
        key: amounts.total([needs_of(lease).amount] * ceil(count / lease.spec.gpus.count))
        for key, count in devices.items()
        if (lease := leases.get(key)) is not None
    }


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))


def _done(body: Object) -> bool:
    """A settled lease that nobody deletes or edits is history: it is not planned any more."""
    metadata = body["metadata"]
    if "deletionTimestamp" in metadata or names.FINALIZER_SETTLE in metadata.get("finalizers", ()):
        return False
    if (body.get("status") or {}).get("observedGeneration") != metadata.get("generation"):
        return False
    conditions = (body.get("status") or {}).get("conditions") or ()
    return any(one["type"] == ConditionType.SETTLED and one["status"] == ConditionStatus.TRUE for one in conditions)


def _contract(body: Object) -> str:
    return str((body.get("status") or {}).get("contract") or body["metadata"]["uid"])


def _is_history(body: Object, contracts: frozenset[str]) -> bool:
    """A closed record of a settled or vanished lease that nobody deletes."""
    spec = body.get("spec") or {}
    return (
        "billableTo" in spec and "deletionTimestamp" not in body["metadata"] and spec.get("contract") not in contracts
    )


def _key(body: Object) -> Key:
    return Key(body["metadata"].get("namespace", ""), body["metadata"]["name"])


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
