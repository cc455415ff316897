"""GPUs change between whole and MIG because leases wait for the other mode: few of them, rarely, and back again."""

from __future__ import annotations

from datetime import timedelta

import pytest

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.snapshot import ConversionRules
from tests.unit.core.builders import MODEL
from tests.unit.core.laws import Laws
from tests.unit.core.simulation import Cluster

ALL = range(8)
DWELL = 60
"""Seconds."""


def cluster_of(*nodes: tuple[str, int, set[int]], dwell: float = DWELL, budget: int = 4) -> Cluster:
    """Nodes with their name, their number of GPUs and those in MIG mode, all convertible."""
    cluster = Cluster()
    cluster.conversion_rules = ConversionRules(dwell=timedelta(seconds=dwell), per_node_and_hour=budget)
    for name, count, mig in nodes:
        cluster.add_node(name, count, mig, convertible=ALL)
    cluster.run(1)
    return cluster


def in_mig(cluster: Cluster) -> list[str]:
    """Names of node and GPU of those in MIG mode."""
    gpus = ((node, gpu) for node in cluster.nodes.values() for gpu in node.gpus)
    return [f"{node.name}{gpu.index}" for node, gpu in gpus if gpu.mode is GpuMode.MIG]


def wanted(cluster: Cluster, node: str = "a") -> list[GpuMode]:
    """Modes that the operator wants of GPUs of a node."""
    return [one.mode for one in cluster.nodes[node].modes]


def conversions(cluster: Cluster) -> int:
    return sum(len(node.converted) for node in cluster.nodes.values())


# --- there


def test_a_lease_of_slices_that_finds_whole_gpus_only_has_one_converted() -> None:
    cluster = cluster_of(("a", 2, set()))
    lease = cluster.create("slice", "3g.40gb")
    cluster.step()
    condition = cluster.condition(lease)
    assert condition.reason is Reason.QUEUED
    assert condition.message == (
        "Position 1 in the queue: 1 GPU of a is being converted to MIG for it, which takes about 20 s."
    )
    assert cluster.leases[lease].status.expected_start == cluster.now + timedelta(seconds=20)
    assert wanted(cluster) == [GpuMode.MIG]
    cluster.run(8)
    assert cluster.is_true(lease)
    assert in_mig(cluster) == ["a1"]


def test_a_lease_of_whole_gpus_has_those_converted_that_its_node_lacks() -> None:
    cluster = cluster_of(("a", 4, {0, 1, 2}), ("b", 4, {0, 1}))
    lease = cluster.create("wide", "full", 3)
    cluster.run(8)
    assert cluster.is_true(lease)
    assert in_mig(cluster) == ["a0", "a1", "a2", "b0"]


def test_nothing_is_converted_that_the_node_does_not_name_or_the_operator_does_not_want() -> None:
    cluster = Cluster()
    cluster.add_node("a", 2, convertible={})
    lease = cluster.create("slice", "3g.40gb")
    cluster.run(5)
    assert cluster.condition(lease).reason is Reason.IMPOSSIBLE
    never = cluster_of(("a", 2, set()))
    never.conversion_rules = ConversionRules(on_demand=False)
    other = never.create("slice", "3g.40gb")
    never.run(5)
    assert never.condition(other).reason is Reason.IMPOSSIBLE
    assert conversions(cluster) == conversions(never) == 0


def test_a_lease_that_fits_has_nothing_converted() -> None:
    cluster = cluster_of(("a", 2, {0}), ("b", 2, set()))
    cluster.add_pool()
    cluster.run(3)
    leases = [cluster.create(f"slice-{number}", "3g.40gb") for number in range(2)]
    leases += [cluster.create(f"whole-{number}") for number in range(3)]
    cluster.run(10)
    assert all(cluster.is_true(lease) for lease in leases)
    assert conversions(cluster) == 0
    assert all(not node.modes for node in cluster.nodes.values())


def test_the_gpu_of_a_miner_is_converted_once_the_miner_has_gone() -> None:
    cluster = cluster_of(("a", 1, set()))
    cluster.add_pool()
    cluster.run(4)
    assert cluster.mining() == {"full": 1}
    lease = cluster.create("slice", "3g.40gb")
    cluster.run(12)
    assert cluster.is_true(lease)
    assert cluster.mining() == {"4g.40gb": 1}


@pytest.mark.parametrize("taken", ["leased", "promised", "draining"])
def test_a_gpu_of_which_a_lease_has_anything_is_never_converted(taken: str) -> None:
    cluster = cluster_of(("a", 1, {0}))
    begins = (cluster.now + timedelta(hours=1)).isoformat() if taken == "promised" else None
    slices = cluster.create("slice", "1g.10gb", duration="2h", start=begins)
    cluster.deploy(slices)
    cluster.run(4)
    if taken == "draining":
        cluster.nodes["a"].stuck = True
        cluster.delete(slices)
        cluster.run(10)
    lease = cluster.create("whole")
    cluster.run(10)
    assert not cluster.is_true(lease)
    assert conversions(cluster) == 0
    assert cluster.nodes["a"].modes == ()


def test_the_gpu_is_taken_where_fewest_whole_ones_are_free_together() -> None:
    cluster = cluster_of(("a", 8, set()), ("b", 8, set()))
    cluster.create("some", count=5)
    cluster.run(3)
    cluster.create("slice", "1g.10gb")
    cluster.run(8)
    assert in_mig(cluster) == ["a2"]


def test_leases_that_fit_on_one_gpu_together_have_one_converted() -> None:
    cluster = cluster_of(("a", 4, set()))
    leases = [cluster.create(f"slice-{number}", "2g.20gb") for number in range(3)]
    cluster.step()
    assert len(wanted(cluster)) == 1
    leases.append(cluster.create("more", "1g.10gb"))
    cluster.run(10)
    assert all(cluster.is_true(lease) for lease in leases)
    assert conversions(cluster) == 1


def test_a_gang_uses_what_is_free_and_has_only_the_rest_converted_and_nobody_takes_it_meanwhile() -> None:
    cluster = cluster_of(("a", 3, {0}))
    gang = cluster.create("gang", "3g.40gb", pods=4)
    cluster.step()
    assert len(wanted(cluster)) == 1
    late = cluster.create("late", "3g.40gb", duration="10s", notice="1s")
    cluster.run(8)
    assert cluster.is_true(gang)
    assert cluster.is_true(late)
    assert conversions(cluster) == 2


def test_a_gang_that_would_not_fit_for_all_conversions_has_none() -> None:
    cluster = cluster_of(("a", 4, set()), budget=1)
    lease = cluster.create("gang", "7g.80gb", pods=2)
    cluster.run(5)
    assert cluster.condition(lease).reason is Reason.QUEUED
    assert conversions(cluster) == 0
    assert cluster.nodes["a"].modes == ()


def test_cpu_that_is_short_is_no_reason_to_convert() -> None:
    cluster = cluster_of(("a", 2, set()))
    cluster.nodes["a"].foreign = Amount(127_000, 0, 0)
    cluster.create("slice", "3g.40gb", cpu="4", memory="1Gi")
    cluster.run(5)
    assert conversions(cluster) == 0
    assert cluster.nodes["a"].modes == ()


def test_spot_leases_stay_where_a_conversion_makes_room() -> None:
    cluster = cluster_of(("a", 2, {0}))
    spot = cluster.create("spot", "7g.80gb", tier="Spot")
    cluster.deploy(spot)
    cluster.run(4)
    firm = cluster.create("firm", "7g.80gb")
    cluster.run(8)
    assert cluster.is_true(spot)
    assert cluster.is_true(firm)
    assert cluster.leases[spot].status.preemption is None


# --- and back


def test_it_goes_back_once_it_is_empty_and_the_dwell_is_over() -> None:
    cluster = cluster_of(("a", 2, set()))
    cluster.add_pool()
    laws = Laws(cluster)
    lease = cluster.create("slice", "3g.40gb", duration="20s", notice="1s")
    cluster.run(DWELL, laws.check)
    assert cluster.ledger(lease) == [(20, "Expired")]
    assert in_mig(cluster) == ["a1"]
    cluster.run(12, laws.check)
    assert in_mig(cluster) == []
    assert wanted(cluster) == [GpuMode.WHOLE]
    cluster.run(DWELL, laws.check)
    assert cluster.nodes["a"].modes == ()
    assert cluster.mining() == {"full": 2}


def test_it_stays_while_anybody_has_a_slice_of_it() -> None:
    cluster = cluster_of(("a", 1, set()))
    lease = cluster.create("slice", "1g.10gb")
    cluster.run(3 * DWELL)
    assert in_mig(cluster) == ["a0"]
    cluster.delete(lease)
    cluster.run(10)
    assert in_mig(cluster) == []


def test_another_demand_does_not_undo_it_before_the_dwell_is_over() -> None:
    cluster = cluster_of(("a", 1, set()))
    first = cluster.create("slice", "3g.40gb", duration="5s", notice="1s")
    cluster.run(20)
    assert cluster.ledger(first) == [(5, "Expired")]
    other = cluster.create("whole")
    cluster.run(DWELL - 30)
    assert in_mig(cluster) == ["a0"]
    assert cluster.condition(other).reason is Reason.QUEUED
    cluster.run(25)
    assert cluster.is_true(other)
    assert conversions(cluster) == 2


def test_the_budget_is_not_passed_and_conversions_go_on_an_hour_later() -> None:
    cluster = cluster_of(("a", 3, set()), budget=2)
    leases = [cluster.create(f"slice-{number}", "7g.80gb") for number in range(3)]
    cluster.run(20)
    assert len(in_mig(cluster)) == 2
    [waiting] = [lease for lease in leases if not cluster.is_true(lease)]
    cluster.now += timedelta(minutes=59)
    cluster.run(5)
    assert len(in_mig(cluster)) == 2
    cluster.run(60)
    assert cluster.is_true(waiting)
    assert len(cluster.nodes["a"].conversions) == 1


def test_who_may_convert_no_more_goes_back_to_what_the_node_declares() -> None:
    cluster = cluster_of(("a", 1, set()))
    lease = cluster.create("slice", "3g.40gb")
    cluster.run(8)
    node = cluster.nodes["a"]
    node.gpus[0] = node.gpus[0].model_copy(update={"convertible": False})
    cluster.run(2)
    assert node.modes == ()
    assert cluster.is_true(lease)
    cluster.delete(lease)
    cluster.run(10)
    assert in_mig(cluster) == []


# --- what goes wrong


def test_a_conversion_that_fails_or_hangs_is_not_waited_for() -> None:
    cluster = cluster_of(("a", 1, set()), ("b", 1, set()))
    lease = cluster.create("slice", "3g.40gb")
    cluster.step()
    cluster.break_gpu("a", 0)
    cluster.run(8)
    assert cluster.is_true(lease)
    assert in_mig(cluster) == ["b0"]

    hanging = cluster_of(("a", 1, set()), ("b", 1, set()))
    hanging.lags = lambda node: node.name == "a"
    other = hanging.create("slice", "3g.40gb")
    hanging.run(30)
    assert hanging.condition(other).reason is Reason.QUEUED
    assert hanging.nodes["b"].modes == ()
    hanging.run(290)
    assert hanging.is_true(other)
    assert in_mig(hanging) == ["b0"]


@pytest.mark.parametrize("dies_after", range(1, 12))
def test_an_operator_that_dies_forgets_nothing_of_it(dies_after: int) -> None:
    cluster = cluster_of(("a", 2, set()), budget=1)
    laws = Laws(cluster)
    cluster.add_pool()
    cluster.run(4)
    cluster.dies_after = cluster.writes + dies_after
    lease = cluster.create("slice", "3g.40gb")
    cluster.run(15, laws.check)
    assert cluster.is_true(lease)
    assert conversions(cluster) == 1


def test_a_plan_that_was_carried_out_is_not_written_again() -> None:
    cluster = cluster_of(("a", 2, set()))
    cluster.create("slice", "3g.40gb")
    for _ in range(30):
        cluster.step()
        assert cluster.operator().actions == ()


# --- what would fit


def test_the_plan_says_how_many_devices_of_each_profile_there_is_room_for() -> None:
    cluster = cluster_of(("a", 4, {0, 1}), ("b", 3, set()))
    cluster.add_pool()
    cluster.create("slice", "3g.40gb")
    cluster.create("whole", count=2)
    cluster.run(5)
    fits = {profile: count for (model, profile), count in cluster.last_plan.fits.items() if model == MODEL}
    assert fits == {"full": 3, "1g.10gb": 11, "2g.20gb": 5, "3g.40gb": 3, "4g.40gb": 2, "7g.80gb": 1}
