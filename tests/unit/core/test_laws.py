"""Any history, however unlucky, keeps the laws, and comes to rest in a state that needs no further write."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import ConversionRules
from tests.unit.core.builders import book_spec
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster

SLICES = ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
LONG_ENOUGH = 400
"""Steps in which everything that was begun is over: the longest term and hand-over take far fewer."""


class Wish(NamedTuple):
    """A lease that somebody wants."""

    profile: str
    shape: tuple[int, int]
    """GPUs per pod (of a whole-GPU lease), pods."""
    duration: str | None
    works: float | None
    """Seconds that its Job runs; None: a Deployment of the tenant's own."""
    namespace: str
    tier: dict[str, str]
    """With the notice that a spot lease asks for."""


WISHES = st.builds(
    Wish,
    profile=st.sampled_from(("full", "full", *SLICES)),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]),
    duration=st.sampled_from([None, "3s", "9s", "30s"]),
    works=st.sampled_from([None, None, 3.0, float("inf")]),
    namespace=st.sampled_from(["team", "team", "other"]),
    tier=st.sampled_from([{}, {}, {"tier": "Spot", "preemption_notice": "3s"}, {"tier": "Spot"}]),
)


class History(RuleBasedStateMachine):
    """What tenants, operators, machines and bad luck do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.laws = Laws(self.cluster)
        self.created = 0
        self.lagging: set[str] = set()
        self.beaten: list[str] = []
        self.cluster.lags = lambda node: node.name in self.lagging
        self.cluster.conflicts = lambda action: self._is_beaten(action.node)

    def _is_beaten(self, node: str) -> bool:
        if node in self.beaten:
            self.beaten.remove(node)
            return True
        return False

    @initialize(
        priced=st.booleans(),
        pools=st.sampled_from([(), ("Any",), ("Whole",), ("Any", "Whole")]),
        wishes=st.lists(WISHES, min_size=1, max_size=4),
    )
    def begin(self, priced: bool, pools: tuple[str, ...], wishes: list[Wish]) -> None:
        self.cluster.conversion_rules = ConversionRules(dwell=timedelta(seconds=20))
        self.cluster.add_node("a", 3, mig={2}, convertible={1})
        self.cluster.add_node("b", 2, mig={0, 1}, convertible={0})
        for number, devices in enumerate(pools):
            self.cluster.add_pool(f"p{number}", devices=devices, priority=number)
        if priced:
            self.cluster.add_book("book", book_spec(dict.fromkeys(("full", *SLICES), "36.00")))
        self.cluster.run(2, self.laws.check)
        for wish in wishes:
            self.lease(wish)

    @property
    def leases(self) -> list[str]:
        return sorted(uid for uid, lease in self.cluster.leases.items() if lease.deleted_at is None)

    # --- tenants

    @rule(wish=WISHES)
    def lease(self, wish: Wish) -> None:
        if wish.namespace in self.cluster.ending:
            return
        self.created += 1
        count, pods = wish.shape
        uid = self.cluster.create(
            f"l{self.created}",
            wish.profile,
            count if wish.profile == "full" else 1,
            pods,
            works=wish.works,
            namespace=wish.namespace,
            duration=wish.duration,
            notice="1s",
            **wish.tier,
        )
        if wish.works is None:
            self.cluster.deploy(uid, pods)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 7))
    def delete(self, which: int) -> None:
        self.cluster.delete(self.leases[which % len(self.leases)])

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 7), suspend=st.booleans())
    def suspend_or_resume(self, which: int, suspend: bool) -> None:
        self.cluster.edit(self.leases[which % len(self.leases)], suspend=suspend)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 7), duration=st.sampled_from([None, "2s", "15s"]))
    def change_term(self, which: int, duration: str | None) -> None:
        self.cluster.edit(self.leases[which % len(self.leases)], duration=duration)

    @precondition(lambda self: "other" not in self.cluster.ending)
    @rule()
    def end_namespace(self) -> None:
        self.cluster.end_namespace("other")

    # --- owners

    @precondition(lambda self: self.cluster.pools)
    @rule(suspend=st.booleans())
    def suspend_pool(self, suspend: bool) -> None:
        uid, pool = next(iter(self.cluster.pools.items()))
        self.cluster.pools[uid] = replace(pool, spec=pool.spec.model_copy(update={"suspend": suspend}))

    @precondition(lambda self: self.cluster.pools)
    @rule()
    def delete_pool(self) -> None:
        self.cluster.pools.popitem()

    @rule(
        name=st.sampled_from(["acme", "zenith"]),
        namespaces=st.sampled_from([("team",), ("other",), ("team", "other")]),
        weight=st.sampled_from([1, 3]),
        quota=st.sampled_from([{}, {"gpus": 1}, {"memory_slices": 10}, {"gpus": 2, "compute_slices": 17}]),
        max_term=st.sampled_from([None, "9s"]),
    )
    def declare_tenant(
        self, name: str, namespaces: tuple[str, ...], weight: int, quota: dict[str, int], max_term: str | None
    ) -> None:
        self.cluster.add_tenant(name, *namespaces, weight=weight, quota=quota, max_term=max_term)

    @precondition(lambda self: self.cluster.tenants)
    @rule()
    def delete_tenant(self) -> None:
        self.cluster.tenants.popitem()

    @rule(cordon=st.booleans())
    def cordon(self, cordon: bool) -> None:
        self.cluster.nodes["a"].cordoned = cordon

    # --- bad luck

    @rule(node=st.sampled_from(["a", "b"]))
    def agent_stops(self, node: str) -> None:
        if node in self.cluster.nodes:
            self.cluster.nodes[node].agent = False

    @precondition(lambda self: not self.laws.losses)
    @rule(node=st.sampled_from(["a", "b"]))
    def machine_dies(self, node: str) -> None:
        self.laws.losses = True
        self.cluster.nodes[node].agent = self.cluster.nodes[node].ready = False

    @precondition(lambda self: not all(node.agent for node in self.cluster.nodes.values()))
    @rule()
    def all_come_back(self) -> None:
        for node in self.cluster.nodes.values():
            node.agent = node.ready = True

    @rule(lagging=st.sampled_from([set(), {"a"}, {"b"}]))
    def agents_lag(self, lagging: set[str]) -> None:
        self.lagging = lagging

    @rule(node=st.sampled_from(["a", "b"]))
    def somebody_else_writes(self, node: str) -> None:
        self.beaten.append(node)

    @rule(writes=st.integers(1, 12))
    def operator_will_die(self, writes: int) -> None:
        self.cluster.dies_after = self.cluster.writes + writes

    @precondition(lambda self: not self.laws.losses)
    @rule(index=st.integers(0, 2))
    def gpu_breaks(self, index: int) -> None:
        self.laws.losses = True
        self.cluster.break_gpu("a", index)

    @precondition(lambda self: "b" in self.cluster.nodes)
    @rule()
    def node_goes(self) -> None:
        self.laws.losses = True
        self.cluster.remove_node("b")

    # --- another version of the operator, or a hand

    @rule(node=st.sampled_from(["a", "b"]), part=st.sampled_from(["spec", "status"]))
    def node_cannot_be_read(self, node: str, part: str) -> None:
        if node in self.cluster.nodes:
            self.cluster.nodes[node].unreadable = part

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 7))
    def lease_cannot_be_read(self, which: int) -> None:
        self.cluster.unreadable.add(self.leases[which % len(self.leases)])

    @precondition(lambda self: self.cluster.records)
    @rule(which=st.integers(0, 7))
    def record_cannot_be_read(self, which: int) -> None:
        self.cluster.unreadable.add(sorted(self.cluster.records)[which % len(self.cluster.records)])

    @rule()
    def all_can_be_read(self) -> None:
        self.cluster.unreadable.clear()
        for node in self.cluster.nodes.values():
            node.unreadable = ""

    # --- time

    @rule(seconds=st.sampled_from([2, 5, 10]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.run(seconds, self._check)

    @precondition(lambda self: not all(node.agent for node in self.cluster.nodes.values()))
    @rule()
    def silence_is_noticed(self) -> None:
        self.cluster.run(45, self._check)

    def _check(self) -> None:
        self.laws.check()
        if self.cluster.finished:
            self.laws.check_reports()

    @invariant()
    def laws_hold(self) -> None:
        self.cluster.step()
        self._check()
        self._nothing_stale_is_remembered()

    def _nothing_stale_is_remembered(self) -> None:
        """The same plan comes from nodes that nothing is remembered of."""
        facts = self.cluster.snapshot()
        unknown = replace(facts, nodes=tuple(replace(node) for node in facts.nodes))
        assert plan(unknown, self.cluster.now) == plan(facts, self.cluster.now)

    # --- the end

    def teardown(self) -> None:
        self.all_can_be_read()
        self.lagging, self.beaten, self.cluster.dies_after = set(), [], None
        for node in self.cluster.nodes.values():
            node.agent, node.ready, node.cordoned = True, True, False
        self._comes_to_rest()
        for uid in self.leases:
            self.cluster.delete(uid)
        self._comes_to_rest()
        assert not self.cluster.leases, "a deleted lease is still there"
        assert all(not record.is_open for record in self.cluster.records.values())
        assert {pod.owner for pod in self.cluster.pods.values()} <= self.cluster.pools.keys(), "a tenant's pod is left"

    def _comes_to_rest(self) -> None:
        calm = 0
        for _ in range(LONG_ENOUGH):
            reports = self.cluster.reports
            self.cluster.step()
            self._check()
            running_out = any(lease.status.expires_at for lease in self.cluster.leases.values())
            wrote = self.cluster.last_plan.actions or self.cluster.reports > reports
            calm = 0 if wrote or running_out else calm + 1
            if calm > 6:
                self._same_answer_always()
                return
        raise AssertionError(f"no rest: {self.cluster.last_plan.actions}")

    def _same_answer_always(self) -> None:
        """The decision is a function of the facts, not of the order in which they are listed."""
        facts = self.cluster.snapshot()
        turned = replace(
            facts,
            leases=facts.leases[::-1],
            nodes=facts.nodes[::-1],
            pools=facts.pools[::-1],
            miners=facts.miners[::-1],
            tenants=facts.tenants[::-1],
        )
        assert plan(facts, self.cluster.now) == plan(facts, self.cluster.now)
        assert not plan(turned, self.cluster.now).actions


TestHistory = History.TestCase
# A history is some hundred cycles: fewer of them than of other examples say as much.
TestHistory.settings = settings(stateful_step_count=25, max_examples=settings().max_examples * 2 // 5)


def test_the_order_of_the_facts_does_not_matter() -> None:
    cluster = Cluster()
    for name in ("a", "b", "c"):
        cluster.add_node(name, 4, mig={0, 1})
    cluster.add_pool("p", devices="Any")
    cluster.run(3)
    for number, profile in enumerate(("full", "3g.40gb", "1g.10gb", "full", "2g.20gb")):
        cluster.create(f"l{number}", profile)
    facts = cluster.snapshot()
    turned = replace(facts, leases=facts.leases[::-1], nodes=facts.nodes[::-1], miners=facts.miners[::-1])
    one, other = plan(facts, cluster.now), plan(turned, cluster.now)
    assert Counter(map(repr, one.actions)) == Counter(map(repr, other.actions))
    assert one.leases == other.leases
