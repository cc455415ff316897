"""What the agent may count on from any `Gpus`, in memory and on the simulator: the contract, and what only they do."""

from __future__ import annotations

import asyncio
import ctypes
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_tenancy.agent.gpus import GpuError, GpuEvent, GpuLost, Gpus, InsufficientResources, InUse
from gpu_tenancy.agent.nvml import NvmlGpus
from gpu_tenancy.agent.vetting import objection
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.mig.layout import Placement, layouts
from tests.contract import CHANGING, LOOKING, Law
from tests.fakes.clock import FakeClock
from tests.fakes.gpus import FakeGpus, Faults
from tests.nvsim.library import driver, library
from tests.nvsim.node import Node

MODELS = ("A100-SXM4-80GB", "A100-SXM4-40GB")
MIG_INDEX = 1
T = TypeVar("T")


@dataclass
class Backend:
    """A node with one whole GPU and one in MIG mode, and the means to make it fail."""

    gpus: Gpus
    run: Callable[[Awaitable[T]], T]
    lose: Callable[[], None]
    occupy: Callable[[str], None]
    reboot: Callable[[], None]
    tune: Callable[[int], None]
    """Sets the power limit of the whole GPU, in mW."""
    wait_for_resets: Callable[[], None]
    """From now on the whole GPU takes a mode at a reset only."""
    refuse_resets: Callable[[], None]
    """From now on it cannot be reset alone."""
    xid: Callable[[int, int], None]
    """Lets the GPU of that index tell of that Xid."""

    def uuid(self, index: int) -> str:
        """UUID of a GPU."""
        return next(gpu.uuid for gpu in self.run(self.gpus.list()) if gpu.index == index)

    def layout(self) -> set[Placement]:
        """Placements that exist on the MIG GPU."""
        return {Placement(one.profile, one.start) for one in self.run(self.gpus.instances(self.uuid(MIG_INDEX)))}


def fake(model: str) -> Backend:
    clock = FakeClock()
    gpus = FakeGpus("n1", count=2, model=model, mig=[MIG_INDEX], clock=clock)

    def run(call: Awaitable[T]) -> T:
        async def play() -> T:
            future = asyncio.ensure_future(call)
            await clock.until(future.done)
            return await future

        return asyncio.run(play())

    def lose() -> None:
        gpus.fail(MIG_INDEX, Faults(lost=True))
        gpus.tell(GpuEvent(gpus.uuids[MIG_INDEX], lost=True))

    return Backend(
        gpus,
        run,
        lose,
        gpus.occupy,
        gpus.reboot,
        tune=lambda limit: gpus.tune(0, limit),
        wait_for_resets=lambda: None,
        refuse_resets=lambda: gpus.fail(0, Faults(reset_refused=True)),
        xid=lambda index, code: gpus.tell(GpuEvent(gpus.uuids[index], code)),
    )


_open = ExitStack()
"""What the simulated node in use needs to be let go; one process has one driver."""


@pytest.fixture(autouse=True)
def let_go() -> Iterator[None]:
    """After each test no node is left."""
    yield
    _open.close()


def simulated(model: str) -> Backend:
    """NVML's own calls on a simulated node; the one before is let go."""
    _open.close()
    folder = Path(_open.enter_context(tempfile.TemporaryDirectory()))
    node = Node.create(folder / "node", board=f"NVIDIA {model}", gpus=2)
    boot_id = folder / "boot_id"
    boot_id.write_text(node.boot_id)
    ctypes.CDLL(str(library()))  # nvidia-ml-py finds by its SONAME what is loaded already
    patch = _open.enter_context(pytest.MonkeyPatch.context())
    for name, value in node.environment.items():
        patch.setenv(name, value)
    gpus = NvmlGpus.open(boot_id, nvidia_smi=str(driver() / "nvidia-smi"))
    _open.callback(gpus.close)
    pynvml.nvmlDeviceSetMigMode(pynvml.nvmlDeviceGetHandleByIndex(MIG_INDEX), 1)

    def occupy(uuid: str) -> None:
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        gi, ci = pynvml.nvmlDeviceGetGpuInstanceId(device), pynvml.nvmlDeviceGetComputeInstanceId(device)
        node.add_process(MIG_INDEX, 4711, gi=gi, ci=ci)

    def reboot() -> None:
        node.reboot()
        boot_id.write_text(node.boot_id)

    def run(call: Awaitable[T]) -> T:
        async def play() -> T:
            return await call

        return asyncio.run(play())

    def tune(limit: int) -> None:
        pynvml.nvmlDeviceSetPowerManagementLimit(pynvml.nvmlDeviceGetHandleByIndex(0), limit)

    return Backend(
        gpus,
        run,
        lambda: node.lose(MIG_INDEX),
        occupy,
        reboot,
        tune=tune,
        wait_for_resets=lambda: node.set("mig_reset_required", 1, gpu=0),
        refuse_resets=lambda: node.set("reset_refused", 1, gpu=0),
        xid=node.xid,
    )


BACKENDS = {"in memory": fake, "nvml on the simulator": simulated}
each_backend = pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
each_model = pytest.mark.parametrize("model", MODELS)


@each_backend
@each_model
@pytest.mark.parametrize("law", [*LOOKING, *CHANGING], ids=lambda law: law.__name__)
def test_the_contract_holds(make: Callable[[str], Backend], model: str, law: Law) -> None:
    backend = make(model)
    law(backend.gpus, backend.run)


@each_backend
@each_model
def test_gpus_are_listed_with_their_modes(make: Callable[[str], Backend], model: str) -> None:
    listed = make(model).run(make(model).gpus.list())
    assert [(gpu.index, gpu.model, gpu.mode, gpu.healthy) for gpu in listed] == [
        (0, model, GpuMode.WHOLE, True),
        (1, model, GpuMode.MIG, True),
    ]
    assert len({gpu.uuid for gpu in listed}) == 2


@each_backend
@given(layout=st.sampled_from(sorted(map(sorted, layouts(MODELS[0])), key=repr)), seed=st.randoms())
def test_every_layout_can_be_made_in_any_order(
    make: Callable[[str], Backend], layout: list[Placement], seed: object
) -> None:
    backend = make(MODELS[0])
    order = list(layout)
    seed.shuffle(order)  # type: ignore[attr-defined]
    for placement in order:
        backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), placement.profile, placement.start))
    assert backend.layout() == set(layout)


@each_backend
def test_what_overlaps_is_refused_and_changes_nothing(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), "3g.40gb", 4))
    for profile, start in (("7g.80gb", 0), ("1g.10gb", 6), ("3g.40gb", 4), ("2g.20gb", 4)):
        with pytest.raises(InsufficientResources):
            backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), profile, start))
    assert backend.layout() == {Placement("3g.40gb", 4)}


@each_backend
@pytest.mark.parametrize(
    ("index", "profile", "start"), [(0, "3g.40gb", 4), (1, "3g.40gb", 2), (1, "3g.20gb", 4), (1, "1g.10gb", 7)]
)
def test_what_cannot_be_is_refused(make: Callable[[str], Backend], index: int, profile: str, start: int) -> None:
    backend = make(MODELS[0])
    with pytest.raises(GpuError):
        backend.run(backend.gpus.create(backend.uuid(index), profile, start))
    assert backend.layout() == set()


@each_backend
def test_a_used_instance_is_not_destroyed(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    made = backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), "3g.40gb", 4))
    assert list(backend.run(backend.gpus.processes(made.uuid))) == []
    backend.occupy(made.uuid)
    assert len(backend.run(backend.gpus.processes(made.uuid))) == 1
    with pytest.raises(InUse):
        backend.run(backend.gpus.destroy(made))
    assert backend.layout() == {Placement("3g.40gb", 4)}


@each_backend
def test_a_lost_gpu_is_listed_as_not_healthy_and_says_so_to_every_call(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    uuid = backend.uuid(MIG_INDEX)
    made = backend.run(backend.gpus.create(uuid, "3g.40gb", 4))
    backend.lose()
    assert [gpu.healthy for gpu in backend.run(backend.gpus.list())] == [True, False]
    calls: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: backend.gpus.instances(uuid),
        lambda: backend.gpus.create(uuid, "1g.10gb", 0),
        lambda: backend.gpus.destroy(made),
        lambda: backend.gpus.processes(uuid),
    )
    for call in calls:
        with pytest.raises(GpuLost):
            backend.run(call())
    assert list(backend.run(backend.gpus.processes(backend.uuid(0)))) == []


@each_backend
def test_a_reboot_leaves_no_instance_and_is_known_by_its_id(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), "3g.40gb", 4))
    before = backend.run(backend.gpus.boot_id())
    assert backend.run(backend.gpus.boot_id()) == before
    backend.reboot()
    assert backend.run(backend.gpus.boot_id()) != before
    assert backend.layout() == set()


# ----------------------------------------------------------------------------------------------- settings and health


@each_backend
def test_settings_that_somebody_was_given_go_back_and_are_told(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    gpu = backend.uuid(0)
    backend.run(backend.gpus.restore(gpu))
    assert list(backend.run(backend.gpus.restore(gpu))) == []
    backend.tune(250_000)
    before = backend.run(backend.gpus.vitals(gpu))
    assert (before.power_limit_mw, before.default_power_limit_mw) == (250_000, 400_000)
    assert list(backend.run(backend.gpus.restore(gpu))) == ["power limit from 250 to 400 W"]
    assert backend.run(backend.gpus.vitals(gpu)).power_limit_mw == 400_000


@each_backend
def test_a_sound_gpu_has_nothing_against_it(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    for index in (0, MIG_INDEX):
        vitals = backend.run(backend.gpus.vitals(backend.uuid(index)))
        assert objection(vitals) is None
        assert (vitals.driver, vitals.ecc_uncorrected, vitals.pcie_width) == ("570.148.08", 0, 16)


@each_backend
def test_rows_are_not_told_of_while_there_are_instances(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    assert backend.run(backend.gpus.vitals(backend.uuid(0))).remap_pending is False
    backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), "1g.10gb", 6))
    assert backend.run(backend.gpus.vitals(backend.uuid(MIG_INDEX))).remap_pending is None


@each_backend
def test_a_mode_comes_with_a_reset_of_that_gpu_alone(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    backend.wait_for_resets()
    backend.run(backend.gpus.create(backend.uuid(MIG_INDEX), "1g.10gb", 6))
    gpu = backend.uuid(0)
    assert backend.run(backend.gpus.set_mode(gpu, GpuMode.MIG)) is False
    assert backend.run(backend.gpus.list())[0].mode is GpuMode.WHOLE
    backend.run(backend.gpus.reset(gpu))
    assert backend.run(backend.gpus.list())[0].mode is GpuMode.MIG
    assert backend.layout() == {Placement("1g.10gb", 6)}
    made = backend.run(backend.gpus.create(gpu, "3g.40gb", 4))
    assert backend.run(backend.gpus.processes(made.uuid)) == []


@each_backend
def test_a_reset_that_the_board_refuses_is_a_sentence(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    backend.refuse_resets()
    with pytest.raises(GpuError, match=r"(?i)was not reset: .*not supported"):
        backend.run(backend.gpus.reset(backend.uuid(0)))
    assert backend.run(backend.gpus.list())[0].healthy


@each_backend
def test_what_a_gpu_tells_of_is_heard_and_a_lost_one_makes_no_other_mute(make: Callable[[str], Backend]) -> None:
    backend = make(MODELS[0])
    whole, mig = backend.uuid(0), backend.uuid(MIG_INDEX)

    async def hear() -> list[GpuEvent]:
        heard = []
        events = backend.gpus.events()
        first = asyncio.ensure_future(anext(events))
        while not first.done():  # Until it listens, nothing is heard.
            backend.xid(0, 43)
            await asyncio.sleep(0.02)
        backend.lose()
        backend.xid(0, 94)
        heard.append(await first)
        while GpuEvent(whole, 94) not in heard or not any(one.gpu == mig for one in heard):
            heard.append(await anext(events))
        return heard

    heard = asyncio.run(hear())
    assert heard[0] == GpuEvent(whole, 43)
    assert {one.xid for one in heard if one.gpu == mig} <= {0, 79}
