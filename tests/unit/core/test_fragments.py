"""Fragmented is said where position alone is the reason; what is named then makes room, and nothing smaller does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.api.base import Holder, HolderKind
from gpu_tenancy.api.lease import GpuLeaseStatus, Reason
from gpu_tenancy.api.node import Slot
from gpu_tenancy.core.actions import CloseRecord, Outlook
from gpu_tenancy.core.amounts import Amount
from gpu_tenancy.core.desirability import LASTING
from gpu_tenancy.core.fragments import Fragmentation, Survey
from gpu_tenancy.core.placement import Want, World
from gpu_tenancy.core.podspec import PodNeeds, Taint
from gpu_tenancy.core.snapshot import Key, LeaseFacts, NodeFacts, RecordFacts
from gpu_tenancy.mig.layout import device_mask, highest_start, layouts
from tests.unit.core.builders import MODEL, ROOMY, START, gpus, lease_spec

PROFILES = ("1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
ONE_CPU = Amount(1000, 2**30, 1)
NEEDS = PodNeeds(ONE_CPU)
HOUR = timedelta(hours=1)


class Held(NamedTuple):
    """A device that a lease holds; the lease ends after so many hours, or never."""

    profile: str
    start: int
    hours: int | None = None
    namespace: str = "theirs"
    name: str = "train"


def small(*starts: int) -> list[Held]:
    """1g devices of others without an end."""
    return [Held("1g.10gb", start) for start in starts]


class Site:
    """Nodes of GPUs in MIG mode on which leases hold devices and nothing else is."""

    def __init__(self) -> None:
        self.nodes: list[NodeFacts] = []
        self.held: list[tuple[str, Slot]] = []
        self.outlooks: list[Outlook] = []

    def add(self, name: str, *on_gpus: Sequence[Held], fenced: Sequence[int] = (), **more: object) -> Site:
        """A node; `fenced`: slices of its first GPU."""
        known = gpus(name, len(on_gpus), mig=range(len(on_gpus)))
        known[0] = known[0].model_copy(update={"fenced": list(fenced)})
        facts = {"allocatable": ROOMY, "agent_until": START + HOUR, **more}
        self.nodes.append(NodeFacts(name, 1, tuple(known), (), (), **facts))  # type: ignore[arg-type]
        for gpu, devices in zip(known, on_gpus, strict=True):
            for one in devices:
                self._hold(name, gpu.uuid, one)
        return self

    def _hold(self, node: str, gpu: str, one: Held) -> None:
        uid = f"uid-{len(self.held)}"
        holder = Holder(kind=HolderKind.GPU_LEASE, namespace=one.namespace, name=one.name, uid=uid)
        device = f"{one.profile.replace('.', '')}-{one.start}-{uid}"
        slot = Slot(device=device, gpu=gpu, profile=one.profile, start=one.start, holder=holder, since=START)
        self.held.append((node, slot))
        lease = LeaseFacts(
            Key(one.namespace, one.name), uid, 1, START, lease_spec(one.profile, pods=1), GpuLeaseStatus()
        )
        until = None if one.hours is None else START + one.hours * HOUR
        self.outlooks.append(Outlook(lease, None if until is None else f"{one.hours}h", expires_at=until))

    def world(self) -> World:
        """The working copy."""
        world = World(self.nodes, START, {})
        for node, slot in self.held:
            world.nodes[node].hold(slot, ONE_CPU, LASTING)
        world.settle()
        return world

    def ask(self, profile: str, pods: int = 1) -> Fragmentation | None:
        """What is said of a want that finds no room."""
        world, want = self.world(), Want(profile, 1, pods, MODEL, NEEDS)
        assert world.place([want]) is None, "it has room"
        return Survey(world, self.outlooks).nearest([want])

    def sentence(self, profile: str, pods: int = 1, namespace: str = "ours") -> str:
        """The same in words."""
        found = self.ask(profile, pods)
        assert found is not None
        return Survey(self.world(), self.outlooks).sentence(found, namespace)


def named(found: Fragmentation | None) -> list[tuple[str, int, str, int]]:
    """Node, GPU, profile and start of the devices of a plan."""
    assert found is not None
    return [(one.node, one.gpu, one.slot.profile, one.slot.start) for one in found.devices]


# --- one pod


def test_two_small_devices_keep_a_wide_one_from_both_its_starts() -> None:
    own, others = Held("1g.10gb", 0, 1, "ours", "notebook"), Held("1g.10gb", 4)
    site = Site().add("n1", [own, others])
    found = site.ask("3g.40gb")
    assert found is not None
    assert (found.node, found.gpu, found.free, len(found.in_the_way)) == ("n1", 0, 6, 2)
    assert [clearing.starts for clearing in found.plan] == [(0,)]
    assert site.sentence("3g.40gb") == (
        "GPU 0 on n1 has 6 free slices, but 3g.40gb can only begin at slice 0 or 4; in the way: "
        "1g.10gb at slice 0 (lease ours/notebook), 1g.10gb at slice 4 (another tenant's lease). "
        "Leases are not moved: there is room at slices 0-3 of GPU 0 on n1 once 1g.10gb at slice 0 ends "
        "(at 2026-03-01T13:00:00Z at the latest)."
    )


def test_who_is_in_the_way_is_named_to_readers_of_its_own_namespace_only() -> None:
    site = Site().add("n1", [Held("1g.10gb", 0, 3, "bank", "secret"), Held("1g.10gb", 4, None, "bank", "secret")])
    assert "lease bank/secret" in site.sentence("3g.40gb", namespace="bank")
    for namespace in ("ours", "ban", "banks"):
        said = site.sentence("3g.40gb", namespace=namespace)
        assert "bank" not in said
        assert "secret" not in said


def test_what_is_asked_for_by_two_namespaces_is_told_to_each_in_its_own_words() -> None:
    site = Site().add("n1", [Held("1g.10gb", 0, None, "bank"), Held("1g.10gb", 4, None, "bank")])
    survey, want = Survey(site.world(), site.outlooks), Want("3g.40gb", 1, 1, MODEL, NEEDS)
    found = survey.nearest([want])
    assert found is not None
    own, other = survey.sentence(found, "bank"), survey.sentence(found, "ours")
    assert "bank/train" in own
    assert "bank" not in other


def test_the_fewest_devices_count_more_than_an_early_end() -> None:
    site = Site().add("n1", [Held("1g.10gb", start, 1) for start in (0, 1, 4, 5)]).add("n2", small(0, 4))
    assert named(site.ask("3g.40gb")) == [("n2", 0, "1g.10gb", 0)]


def test_of_as_few_devices_those_that_end_first_are_named() -> None:
    site = Site().add("n1", small(0, 4)).add("n2", [Held("1g.10gb", 0, 9), Held("1g.10gb", 4, 2)])
    assert named(site.ask("3g.40gb")) == [("n2", 0, "1g.10gb", 4)]


def test_between_equals_the_first_by_name_and_index_is_named() -> None:
    site = Site().add("n2", small(0, 4)).add("n1", small(0, 4), small(0, 4))
    assert named(site.ask("3g.40gb")) == [("n1", 0, "1g.10gb", 0)]


def test_where_fewer_devices_are_in_the_way_on_a_gpu_that_is_full_these_are_named() -> None:
    """One GPU has slices enough, but two devices in the way at each start; elsewhere one wide device would do."""
    wide = [Held("3g.40gb", 0), Held("3g.40gb", 4)]
    site = Site().add("n1", small(0, 1, 4, 5)).add("n2", wide)
    found = site.ask("3g.40gb")
    assert found is not None
    assert (found.node, found.free) == ("n1", 4)
    assert named(found) == [("n2", 0, "3g.40gb", 0)]
    assert "room at slices 0-3 of GPU 0 on n2 once 3g.40gb at slice 0 ends (it has no end)" in site.sentence("3g.40gb")


def test_between_equals_the_gpu_is_named_on_which_slices_enough_are_free() -> None:
    site = Site().add("n1", [Held("3g.40gb", 0), Held("3g.40gb", 4)]).add("n2", small(0, 4))
    assert named(site.ask("3g.40gb")) == [("n2", 0, "1g.10gb", 0)]


def test_several_devices_of_a_plan_are_each_named_with_their_end() -> None:
    site = Site().add("n1", [Held("1g.10gb", start, 1 + start) for start in (0, 1, 4, 5)])
    assert site.sentence("3g.40gb").endswith(
        "there is room at slices 0-3 of GPU 0 on n1 once these 2 end: "
        "1g.10gb at slice 0 (at 2026-03-01T13:00:00Z at the latest), "
        "1g.10gb at slice 1 (at 2026-03-01T14:00:00Z at the latest)."
    )


def test_many_devices_in_the_way_are_counted() -> None:
    said = Site().add("n1", small(0, 2, 3, 5)).sentence("2g.20gb")
    assert "1g.10gb at slice 3 (another tenant's lease), and 1 more." in said


@pytest.mark.parametrize("layout", sorted(map(sorted, layouts(MODEL) - {frozenset()})))
def test_a_whole_gpus_slice_is_never_fragmented(layout: list[tuple[str, int]]) -> None:
    """7g needs every slice of a GPU: with anything on it there are not enough, however it lies."""
    assert Site().add("n1", [Held(*position) for position in layout]).ask("7g.80gb") is None


NOT_ENOUGH = [
    pytest.param("3g.40gb", [Held("4g.40gb", 0), Held("1g.10gb", 4)], id="too few slices are free"),
    pytest.param("4g.40gb", [Held("4g.40gb", 0)], id="two such never lie beside each other"),
    pytest.param("1g.10gb", small(*range(7)), id="the slice that is left is nobody's start"),
]


@pytest.mark.parametrize(("profile", "held"), NOT_ENOUGH)
def test_where_no_other_position_would_help_nothing_is_called_fragmented(profile: str, held: list[Held]) -> None:
    assert Site().add("n1", held).ask(profile) is None


def test_a_wide_device_in_the_wrong_half_is_in_the_way_of_one_that_must_begin_at_0() -> None:
    site = Site().add("n1", [Held("3g.40gb", 0)])
    assert named(site.ask("4g.40gb")) == [("n1", 0, "3g.40gb", 0)]
    assert "4g.40gb can only begin at slice 0; in the way: 3g.40gb at slice 0" in site.sentence("4g.40gb")


def test_fenced_slices_are_in_the_way_and_no_end_of_a_lease_removes_them() -> None:
    site = Site().add("n1", small(4), fenced=[1])
    assert named(site.ask("3g.40gb")) == [("n1", 0, "1g.10gb", 4)]
    said = site.sentence("3g.40gb")
    assert "GPU 0 on n1 has 6 free slices" in said
    assert "in the way: 1g.10gb at slice 4 (another tenant's lease), fenced slice 1." in said
    assert Site().add("n1", [], fenced=[1, 4]).ask("3g.40gb") is None


UNUSABLE = [
    pytest.param({"allocatable": Amount(2999, 2**40, 110)}, id="CPU is short"),
    pytest.param({"cordoned": True}, id="it is cordoned"),
    pytest.param({"taints": (Taint("team", "b", "NoSchedule"),)}, id="the pods do not tolerate it"),
]


@pytest.mark.parametrize("trait", UNUSABLE)
def test_gpus_of_a_node_that_takes_no_pod_do_not_count(trait: dict[str, Any]) -> None:
    assert Site().add("n1", small(0, 4), **trait).ask("3g.40gb") is None
    assert named(Site().add("n1", small(0, 4), **trait).add("n2", small(0, 4)).ask("3g.40gb"))[0][0] == "n2"


# --- ends


def test_an_end_is_told_as_far_as_it_is_known() -> None:
    site = Site().add("n1", [Held("1g.10gb", 0, 5, "bank"), Held("1g.10gb", 4, None, "bank")])
    _, without = site.outlooks
    lease, record = without.lease, RecordFacts("bank", "r", None)  # type: ignore[arg-type]
    ending = CloseRecord(record, lease.uid, START, 1, Reason.DELETED)
    for outlook, words in (
        (without._replace(expires_at=START + HOUR), "at 2026-03-01T13:00:00Z at the latest"),
        (without._replace(closed=ending), "it is ending"),
    ):
        site.outlooks[1] = outlook
        assert f"once 1g.10gb at slice 4 ends ({words})" in site.sentence("3g.40gb")
    site.outlooks[0] = site.outlooks[0]._replace(expires_at=None)
    site.outlooks[1] = without
    assert "once 1g.10gb at slice 0 ends (its term has not begun)" in site.sentence("3g.40gb")
    site.outlooks.clear()
    assert "once 1g.10gb at slice 0 ends (its end is not known)" in site.sentence("3g.40gb")


# --- several pods


def test_a_gang_lacks_those_seats_that_there_are_not_yet() -> None:
    site = Site().add("n1", small(0, 4), small(0)).add("n2", small(0, 4))
    found = site.ask("3g.40gb", 3)
    assert named(found) == [("n1", 0, "1g.10gb", 0), ("n1", 0, "1g.10gb", 4)]
    assert site.sentence("3g.40gb", 3).endswith(
        "there is room for all 3 once these 2 end: 1g.10gb at slice 0 of GPU 0 on n1 (it has no end), "
        "1g.10gb at slice 4 of GPU 0 on n1 (it has no end)."
    )


def test_a_gang_of_one_seat_too_many_names_one_device() -> None:
    site = Site().add("n1", small(0, 4), [])
    assert "there is room for all 3 once 1g.10gb at slice 0 of GPU 0 on n1 ends (it has no end)." in site.sentence(
        "3g.40gb", 3
    )


def test_a_gang_is_short_of_slices_where_the_gpus_together_hold_too_few_however_they_lie() -> None:
    assert Site().add("n1", small(0, 4)).ask("3g.40gb", 2) is None


def test_a_node_with_little_cpu_takes_no_more_of_a_gang_than_it_has_cpu_for() -> None:
    tight = Amount(3000, 2**40, 110)  # what is held takes two thirds
    site = Site().add("n1", small(0), small(1), allocatable=tight).add("n2", small(0, 4))
    assert named(site.ask("3g.40gb", 2)) == [("n2", 0, "1g.10gb", 0)]


def test_of_a_node_with_cpu_for_one_more_pod_no_two_places_are_cleared() -> None:
    """Two places there would cost a device each; the second one has to be where it costs two."""
    tight = Amount(5000, 2**40, 110)
    site = Site().add("n1", small(0, 4), small(0, 4), allocatable=tight).add("n2", small(0, 1, 4, 5))
    assert [node for node, *_ in named(site.ask("3g.40gb", 2))] == ["n1", "n2", "n2"]


def test_for_a_gang_that_lacks_very_many_seats_no_list_is_made() -> None:
    site = Site().add("n1", *[small(0, 4)] * 9)
    assert named(site.ask("3g.40gb", 8))
    assert named(site.ask("3g.40gb", 9)) == []
    assert site.sentence("3g.40gb", 9).endswith(
        "Leases are not moved: room comes as they end, or for fewer than 9 pods."
    )


# --- of all there may be

LAYOUTS = sorted(map(sorted, layouts(MODEL)))
PARTITIONED = st.sampled_from(LAYOUTS)
NODES = st.lists(st.tuples(st.lists(PARTITIONED, min_size=1, max_size=2), st.integers(0, 3)), min_size=1, max_size=2)
"""For each node the layouts of its GPUs, and for how many more pods it has CPU."""


@st.composite
def sites(draw: st.DrawFn) -> Site:
    site = Site()
    for number, (on_gpus, room) in enumerate(draw(NODES)):
        hours = st.none() | st.integers(1, 3)
        held = [[Held(*position, draw(hours)) for position in layout] for layout in on_gpus]
        cpu = 1000 * (room + sum(map(len, held)))
        site.add(f"n{number}", *held, allocatable=Amount(cpu, ROOMY.memory, 110))
    return site


Device = tuple[str, str, str, int]
"""Node, GPU, profile and start."""


def devices_of(site: Site) -> list[Device]:
    return [(node, slot.gpu, slot.profile, slot.start) for node, slot in site.held]


def seats(site: Site, profile: str, devices: Sequence[Device], *, rooms: dict[str, int]) -> int:
    """Pods that fit beside these devices."""
    total = 0
    for node in site.nodes:
        on_node = 0
        for gpu in node.gpus:
            taken = sum(device_mask(MODEL, *device[2:]) for device in devices if device[1] == gpu.uuid)
            while (start := highest_start(MODEL, profile, taken)) is not None:
                taken |= device_mask(MODEL, profile, start)
                on_node += 1
        total += min(on_node, rooms[node.name])
    return total


def seats_otherwise(site: Site, profile: str, *, rooms: dict[str, int]) -> int:
    """Pods that would fit if the devices of each GPU lay as suits best."""
    mixes = {frozenset(Counter(name for name, _ in layout).items()) for layout in LAYOUTS}
    total = 0
    for node in site.nodes:
        on_node = 0
        for gpu in node.gpus:
            there = [name for _, uuid, name, _ in devices_of(site) if uuid == gpu.uuid]
            fits = (n for n in range(8) if frozenset(Counter([*there, *[profile] * n]).items()) in mixes)
            on_node += max(fits)
        total += min(on_node, rooms[node.name])
    return total


def rooms_of(site: Site) -> dict[str, int]:
    taken = Counter(node for node, _ in site.held)
    return {node.name: node.allocatable.cpu_milli // 1000 - taken[node.name] for node in site.nodes}


@given(site=sites(), profile=st.sampled_from(PROFILES), pods=st.integers(1, 4))
def test_fragmented_is_said_exactly_where_position_is_the_reason_and_the_plan_is_the_smallest(
    site: Site, profile: str, pods: int
) -> None:
    rooms, there = rooms_of(site), devices_of(site)
    want, world = Want(profile, 1, pods, MODEL, NEEDS), site.world()
    found = Survey(world, site.outlooks).nearest([want])
    now, otherwise = seats(site, profile, there, rooms=rooms), seats_otherwise(site, profile, rooms=rooms)
    assert (found is not None) == (now < pods <= otherwise)
    if found is None:
        return
    assert world.place([want]) is None
    ended = [(one.node, one.slot.gpu, one.slot.profile, one.slot.start) for one in found.devices]
    assert len(set(ended)) == len(ended)
    assert seats(site, profile, [one for one in there if one not in ended], rooms=rooms) >= pods
    for fewer in smaller(there, len(ended)):
        left = [one for one in there if one not in fewer]
        assert seats(site, profile, left, rooms=rooms) < pods, f"{fewer} would do"


@given(site=sites(), profile=st.sampled_from(PROFILES))
def test_of_the_smallest_sets_for_one_pod_none_ends_before_the_one_that_is_named(site: Site, profile: str) -> None:
    rooms, there = rooms_of(site), devices_of(site)
    found = Survey(site.world(), site.outlooks).nearest([Want(profile, 1, 1, MODEL, NEEDS)])
    if found is None:
        return
    never = datetime.max.replace(tzinfo=START.tzinfo)
    ends = {place: one.expires_at or never for place, one in zip(there, site.outlooks, strict=True)}
    named_end = max(ends[one.node, one.slot.gpu, one.slot.profile, one.slot.start] for one in found.devices)
    for chosen in combinations(there, len(found.devices)):
        if seats(site, profile, [one for one in there if one not in chosen], rooms=rooms):
            assert max(ends[one] for one in chosen) >= named_end


def smaller(devices: Sequence[Device], size: int) -> Iterator[tuple[Device, ...]]:
    """Every set of fewer devices."""
    for count in range(size):
        yield from combinations(devices, count)
