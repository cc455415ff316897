"""Slices enough, but none where the profile may begin: the lease says what is in the way, waits, and is then placed."""

from __future__ import annotations

from datetime import timedelta

from gpu_tenancy.api.lease import ConditionType, Reason
from gpu_tenancy.core.actions import SetSlots
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.status import differs
from tests.unit.core.builders import MODEL
from tests.unit.core.simulation import Cluster

SMALL = "1g.10gb"
WIDE = "3g.40gb"


def fragmented(*, mines: bool = False, duration: str | None = None) -> tuple[Cluster, dict[int, str]]:
    """A GPU of which small leases of another team hold slices 0 and 4, and nobody the others; the leases by slice."""
    cluster = Cluster()
    cluster.add_node("n1", 1, mig={0})
    if mines:
        cluster.add_pool()
    cluster.run(2)
    leases = [cluster.create(f"small-{number}", SMALL, namespace="other", duration=duration) for number in range(7)]
    cluster.run(5)
    by_slice = {cluster.slots_of(lease)[0][1].start: lease for lease in leases}
    for start in by_slice.keys() - {0, 4}:
        cluster.delete(by_slice[start])
    cluster.run(6)
    return cluster, {start: by_slice[start] for start in (0, 4)}


def said(cluster: Cluster, lease: str, kind: ConditionType = ConditionType.READY) -> tuple[str, str]:
    found = cluster.condition(lease, kind)
    return str(found.reason), found.message


def test_the_condition_says_what_is_in_the_way_and_whose_end_makes_room() -> None:
    cluster, _ = fragmented(duration="1h")
    wide = cluster.create("wide", WIDE)
    cluster.step()
    assert said(cluster, wide) == (
        "Fragmented",
        (
            f"Position 1 in the queue: needs 1 free {WIDE} ({MODEL}), 1 CPU and 1Gi memory each; "
            "there is room for 0 beside the leases that run. "
            f"GPU 0 on n1 has 6 free slices, but {WIDE} can only begin at slice 0 or 4; in the way: "
            f"{SMALL} at slice 0 (another tenant's lease), {SMALL} at slice 4 (another tenant's lease). "
            f"Leases are not moved: there is room at slices 0-3 of GPU 0 on n1 once {SMALL} at slice 0 ends "
            "(at 2026-03-01T13:00:04Z at the latest)."
        ),
    )
    assert cluster.leases[wide].status.position == 1
    assert said(cluster, wide, ConditionType.ALLOCATED) == ("Fragmented", "It holds no GPUs.")
    assert cluster.is_true(wide, ConditionType.RECONCILING)
    assert not cluster.is_true(wide, ConditionType.STALLED)


def test_nothing_is_tried_for_it_and_nobody_is_disturbed() -> None:
    cluster, _ = fragmented(mines=True)
    mining = cluster.mining()
    evicted, wide = len(cluster.evicted), cluster.create("wide", WIDE)
    decided = plan(cluster.snapshot(), cluster.now)
    assert not decided.actions
    cluster.run(5)
    assert said(cluster, wide)[0] == "Fragmented"
    assert not cluster.slots_of(wide)
    assert (cluster.mining(), len(cluster.evicted)) == (mining, evicted)


def test_it_is_placed_by_itself_once_the_device_that_was_named_ends() -> None:
    cluster, small = fragmented()
    wide = cluster.create("wide", WIDE)
    cluster.run(2)
    cluster.delete(small[0])
    cluster.run(6)
    assert cluster.is_true(wide)
    assert [(slot.profile, slot.start) for _, slot in cluster.slots_of(wide)] == [(WIDE, 0)]
    assert cluster.is_true(small[4])


def test_at_the_end_that_was_told_it_gets_its_place() -> None:
    cluster, _ = fragmented(duration="1m")
    wide = cluster.create("wide", WIDE)
    cluster.step()
    told = said(cluster, wide)[1]
    assert "at 2026-03-01T12:01:04Z at the latest" in told
    cluster.run(60)
    assert cluster.is_true(wide)


def test_a_smaller_one_that_came_later_is_placed_and_what_is_told_is_of_the_time_after() -> None:
    cluster, _ = fragmented()
    wide, small = cluster.create("wide", WIDE), cluster.create("small", "1g.10gb", namespace="other")
    decided = plan(cluster.snapshot(), cluster.now)
    assert any(isinstance(action, SetSlots) for action in decided.actions)
    message = decided.refusals[wide].message
    assert "GPU 0 on n1 has 5 free slices" in message
    assert "in the way: 1g.10gb at slice 0" in message
    cluster.run(4)
    assert cluster.is_true(small)
    assert said(cluster, wide)[0] == "Fragmented"


def test_who_lacks_slices_and_not_only_their_position_is_queued() -> None:
    cluster, _ = fragmented()
    gang, whole = cluster.create("gang", WIDE, pods=2), cluster.create("whole", "7g.80gb")
    cluster.step()
    assert [said(cluster, one)[0] for one in (gang, whole)] == ["Queued", "Queued"]


def test_the_position_of_all_who_wait_is_counted_together() -> None:
    cluster, _ = fragmented()
    wide, whole = cluster.create("wide", WIDE), cluster.create("xwhole", "7g.80gb")
    cluster.step()
    assert [cluster.leases[one].status.position for one in (wide, whole)] == [1, 2]


def test_what_moves_in_the_message_is_not_written_at_once_and_a_new_reason_is() -> None:
    cluster, _ = fragmented()
    wide = cluster.create("wide", WIDE)
    cluster.step()
    old = cluster.leases[wide].status
    for change, is_written in (({"message": "Position 2 in the queue."}, False), ({"reason": Reason.QUEUED}, True)):
        conditions = [
            one.model_copy(update=change) if one.reason is Reason.FRAGMENTED else one for one in old.conditions
        ]
        new = old.model_copy(update={"conditions": conditions})
        assert differs(old, new, cluster.now, cluster.now + timedelta(seconds=1)) == is_written
