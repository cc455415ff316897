"""What the agent may count on from any `Gpus`, as laws: in memory, on the simulator, and on the GPUs of a machine.

`LOOKING` changes nothing. `CHANGING` needs GPUs on which nobody is, and leaves them as they were. What only a made-up
GPU can do, to fail or to be used by nobody, is stated beside the backends that can.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from gpu_tenancy.agent.gpus import GpuError, GpuFacts, GpuLost, Gpus, InsufficientResources
from gpu_tenancy.agent.vetting import objection
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.mig.layout import Placement, mask_of, placements
from gpu_tenancy.mig.profiles import of_model

Run = Callable[[Awaitable[Any]], Any]
"""Plays a call to its end."""
Law = Callable[[Gpus, Run], None]


class NoSuchGpu(Exception):  # noqa: N818  (no error: the law cannot be shown here)
    """There is no GPU of the kind that a law needs, with nobody on it."""


def empty(gpus: Gpus, run: Run, mode: GpuMode) -> GpuFacts:
    """A sound GPU in that mode on which nobody is and nothing lies. Raises NoSuchGpu."""
    for gpu in run(gpus.list()):
        if gpu.healthy and gpu.mode is mode and not run(gpus.processes(gpu.uuid)) and not run(gpus.instances(gpu.uuid)):
            return gpu  # type: ignore[no-any-return]
    raise NoSuchGpu(f"no GPU in mode {mode} is empty")


# --- looking ------------------------------------------------------------------------------------------------------


def every_gpu_says_what_it_is(gpus: Gpus, run: Run) -> None:
    listed = run(gpus.list())
    assert listed
    assert len({gpu.uuid for gpu in listed}) == len(listed)
    for gpu in listed:
        assert gpu.healthy, gpu.message
        assert gpu.uuid.startswith("GPU-")
        assert gpu.memory_mib > 0
        assert gpu.multiprocessors > 0


def a_second_look_says_the_same(gpus: Gpus, run: Run) -> None:
    assert run(gpus.boot_id()) == run(gpus.boot_id())
    first = run(gpus.list())
    assert run(gpus.list()) == first
    for gpu in first:
        assert run(gpus.instances(gpu.uuid)) == run(gpus.instances(gpu.uuid))


def instances_lie_where_the_geometry_allows_them_and_never_over_each_other(gpus: Gpus, run: Run) -> None:
    for gpu in run(gpus.list()):
        taken = 0
        for one in run(gpus.instances(gpu.uuid)):
            mask = ((1 << one.size) - 1) << one.start
            assert not taken & mask
            taken |= mask
            known = of_model(gpu.model).get(one.profile)
            assert known is None or (one.start in known.starts and one.size == known.size)


def a_gpu_can_be_examined_and_measured(gpus: Gpus, run: Run) -> None:
    for gpu in run(gpus.list()):
        vitals, telemetry = run(gpus.vitals(gpu.uuid)), run(gpus.telemetry(gpu.uuid))
        assert vitals.driver
        assert telemetry.memory_used
        assert objection(vitals) is None, f"GPU {gpu.index} is not fit to serve"


def a_gpu_that_is_not_there_has_not_no_processes_but_is_lost(gpus: Gpus, run: Run) -> None:
    with pytest.raises(GpuLost):
        run(gpus.processes("GPU-elsewhere"))
    assert list(run(gpus.processes("MIG-elsewhere"))) == []


LOOKING: Final[tuple[Law, ...]] = (
    every_gpu_says_what_it_is,
    a_second_look_says_the_same,
    instances_lie_where_the_geometry_allows_them_and_never_over_each_other,
    a_gpu_can_be_examined_and_measured,
    a_gpu_that_is_not_there_has_not_no_processes_but_is_lost,
)

# --- changing -----------------------------------------------------------------------------------------------------


def settings_go_back_and_stay(gpus: Gpus, run: Run) -> None:
    gpu = empty(gpus, run, GpuMode.WHOLE)
    run(gpus.restore(gpu.uuid))
    assert not run(gpus.restore(gpu.uuid))


def every_placement_is_created_exactly_where_it_was_asked_for_and_is_gone_again(gpus: Gpus, run: Run) -> None:
    gpu = empty(gpus, run, GpuMode.MIG)
    for placement in placements(gpu.model):
        made = run(gpus.create(gpu.uuid, placement.profile, placement.start))
        try:
            assert ((1 << made.size) - 1) << made.start == mask_of(gpu.model, placement)
            assert (made.profile, made.compute_instance is not None) == (placement.profile, True)
            assert made.uuid.startswith("MIG-")
            assert list(run(gpus.instances(gpu.uuid))) == [made]
            assert list(run(gpus.processes(made.uuid))) == []
        finally:
            run(gpus.destroy(made))
        assert list(run(gpus.instances(gpu.uuid))) == []


def what_overlaps_is_refused_and_changes_nothing(gpus: Gpus, run: Run) -> None:
    gpu = empty(gpus, run, GpuMode.MIG)
    first = next(iter(placements(gpu.model)))
    made = run(gpus.create(gpu.uuid, first.profile, first.start))
    try:
        for other in _overlapping(gpu.model, first):
            with pytest.raises(InsufficientResources):
                run(gpus.create(gpu.uuid, other.profile, other.start))
        assert list(run(gpus.instances(gpu.uuid))) == [made]
    finally:
        run(gpus.destroy(made))


def _overlapping(model: str, one: Placement) -> list[Placement]:
    mask = mask_of(model, one)
    return [other for other in placements(model) if mask_of(model, other) & mask]


def a_whole_gpu_holds_no_instance(gpus: Gpus, run: Run) -> None:
    gpu = empty(gpus, run, GpuMode.WHOLE)
    some = next(iter(placements(gpu.model)), Placement("1g.5gb", 0))
    with pytest.raises(GpuError):
        run(gpus.create(gpu.uuid, some.profile, some.start))
    assert list(run(gpus.instances(gpu.uuid))) == []


def destroying_twice_is_destroying(gpus: Gpus, run: Run) -> None:
    gpu = empty(gpus, run, GpuMode.MIG)
    first = next(iter(placements(gpu.model)))
    made = run(gpus.create(gpu.uuid, first.profile, first.start))
    for _ in range(2):
        run(gpus.destroy(made))
    assert list(run(gpus.instances(gpu.uuid))) == []


CHANGING: Final[tuple[Law, ...]] = (
    settings_go_back_and_stay,
    every_placement_is_created_exactly_where_it_was_asked_for_and_is_gone_again,
    what_overlaps_is_refused_and_changes_nothing,
    a_whole_gpu_holds_no_instance,
    destroying_twice_is_destroying,
)
