"""What stands in device memory: the next holder reads what the former one left, unless somebody wrote over it."""

from __future__ import annotations

import itertools
import random
import time
from contextlib import ExitStack
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nvsim.node import DRIVER, NOBODY, Node, Residue, SimulatorError
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.client import Client

SECRET, CLEAN = 0x5EC12E7D, 0x00000000
INVALID_VALUE, OUT_OF_MEMORY, UNKNOWN = 1, 2, 999
GIB = 1 << 30
ONE_G, THREE_G = 19, 9


def slice_of(profile: int, start: int, size: int, slices: int, gpu: int = 0) -> tuple[Any, Any, str]:
    """GPU instance, compute instance and UUID."""
    instance = calls.create(calls.gpu(gpu), profile, Placement(start, size))
    compute = calls.full_width(instance, slices)
    return instance, compute, pynvml.nvmlDeviceGetUUID(pynvml.nvmlComputeInstanceGetInfo(compute).device)


def patterns(rows: list[Residue]) -> set[int]:
    return {row.pattern for row in rows}


def fill(node: Node, device: str, pattern: int) -> int:
    """Write over everything that a process on the device can allocate, and end; its pid."""
    with Client(node, CUDA_VISIBLE_DEVICES=device) as client:
        pointer, size = client.begin().everything()
        client.ok("cuMemsetD32", pointer, pattern, size // 4)
        return client.pid


def gpu_uuid(index: int = 0) -> str:
    uuid: str = pynvml.nvmlDeviceGetUUID(calls.gpu(index))
    return uuid


# --- who can read what ----------------------------------------------------------------------------------------------


def test_the_next_holder_of_a_gpu_reads_what_the_former_one_left(node: Node) -> None:
    pid = fill(node, gpu_uuid(), SECRET)
    assert {(row.pattern, row.writer) for row in node.readable(gpu_uuid())} == {(SECRET, pid), (CLEAN, DRIVER)}
    node.reset(0)
    with Client(node) as client:
        pointer, size = client.begin().everything()
        for at in (0, size // 2, size - 4):
            assert client.read(pointer + at) == SECRET.to_bytes(4, "little")
    assert patterns(node.readable(gpu_uuid(1))).isdisjoint({SECRET})
    node.reboot()
    assert SECRET not in patterns(node.residue(0))


def test_the_next_holder_of_a_slice_reads_what_the_former_one_left(node: Node) -> None:
    calls.in_mig_mode()
    instance, compute, uuid = slice_of(THREE_G, 4, 4, 3)
    fill(node, uuid, SECRET)
    pynvml.nvmlComputeInstanceDestroy(compute)
    pynvml.nvmlGpuInstanceDestroy(instance)
    assert {row.slice for row in node.residue(0) if row.pattern == SECRET} == {4, 5, 6, 7}
    *_, left = slice_of(ONE_G, 3, 1, 1)
    *_, taken = slice_of(ONE_G, 5, 1, 1)
    with Client(node, CUDA_VISIBLE_DEVICES=taken) as client:
        assert client.read(client.begin().everything()[0]) == SECRET.to_bytes(4, "little")
    assert SECRET in patterns(node.readable(taken))
    assert SECRET not in patterns(node.readable(left))


@pytest.mark.parametrize("mode", ["whole", "slice"])
def test_who_writes_over_all_that_is_free_leaves_nothing_for_the_next_to_read(node: Node, mode: str) -> None:
    node.plant(0, SECRET)
    device = gpu_uuid()
    if mode == "slice":
        calls.in_mig_mode()
        *_, device = slice_of(THREE_G, 0, 4, 3)
    assert patterns(node.readable(device)) == {SECRET}
    fill(node, device, CLEAN)
    assert patterns(node.readable(device)) == {CLEAN}
    # What the driver keeps for itself was not written over, and nobody is given it.
    assert SECRET in patterns(node.residue(0))


def test_writing_over_one_slice_leaves_its_neighbours_alone(node: Node) -> None:
    calls.in_mig_mode()
    node.plant(0, SECRET)
    *_, one = slice_of(ONE_G, 2, 1, 1)
    *_, other = slice_of(ONE_G, 3, 1, 1)
    fill(node, one, CLEAN)
    assert patterns(node.readable(one)) == {CLEAN}
    assert patterns(node.readable(other)) == {SECRET}
    assert {row.slice for row in node.residue(0) if row.pattern != SECRET} == {2}


def test_what_a_killed_writer_had_not_written_stands_as_it_was(node: Node) -> None:
    node.plant(0, SECRET)
    with Client(node) as client, node.fault("cuMemsetD32_v2", delay_ms=600_000, after=1) as fault:
        pointer, size = client.begin().everything()
        client.ok("cuMemsetD32", pointer, CLEAN, GIB // 4)
        client.send("cuMemsetD32", pointer + GIB, CLEAN, (size - GIB) // 4)
        while fault.seen < 2:
            time.sleep(0.001)
    rows = [row for row in node.readable(gpu_uuid()) if row.writer not in {NOBODY, DRIVER}]
    assert sum(row.size for row in rows) == GIB
    assert sum(row.size for row in node.readable(gpu_uuid()) if row.pattern == SECRET) > 60 * GIB


def test_planting_is_by_slice_and_who_wrote_is_known(node: Node) -> None:
    node.plant(3, SECRET, slice_=2, writer=77)
    assert [(row.slice, row.writer) for row in node.residue(3) if row.pattern == SECRET] == [(2, 77)]
    assert sum(row.size for row in node.residue(3)) == 80 * GIB
    for wrong in ((8, None), (0, 8)):
        with pytest.raises(SimulatorError, match="no such GPU"):
            node.plant(wrong[0], SECRET, wrong[1])
    with pytest.raises(SimulatorError, match="no such GPU"):
        node.readable("GPU-nonsense")


# --- allocation -----------------------------------------------------------------------------------------------------


def test_memory_is_a_devices_total_less_what_driver_context_and_others_hold(node: Node) -> None:
    with Client(node) as one, Client(node) as other:
        free, total = one.begin().ok("cuMemGetInfo")
        whole = pynvml.nvmlDeviceGetMemoryInfo(calls.gpu(), version=0x02000028)
        assert total == whole.total
        assert free == whole.free < total - whole.reserved
        one.ok("cuMemAlloc", GIB)
        left, _ = other.begin().ok("cuMemGetInfo")
        assert left == free - GIB - whole.used
        assert other.code("cuMemAlloc", left + 1) == OUT_OF_MEMORY
        other.ok("cuMemAlloc", left)
        one.kill()
        assert other.ok("cuMemGetInfo")[0] == GIB + whole.used


def test_memory_of_a_slice_is_its_own(node: Node) -> None:
    calls.in_mig_mode()
    _, compute, uuid = slice_of(THREE_G, 0, 4, 3)
    *_, other = slice_of(ONE_G, 6, 1, 1)
    device = pynvml.nvmlComputeInstanceGetInfo(compute).device
    with Client(node, CUDA_VISIBLE_DEVICES=uuid) as client, Client(node, CUDA_VISIBLE_DEVICES=other) as neighbour:
        free, total = client.begin().ok("cuMemGetInfo")
        neighbour.begin().everything()
        assert total == pynvml.nvmlDeviceGetMemoryInfo(device).total == 40192 << 20
        assert client.ok("cuMemGetInfo")[0] == free == pynvml.nvmlDeviceGetMemoryInfo(device).free
        client.ok("cuMemAlloc", free)
        assert pynvml.nvmlDeviceGetMemoryInfo(device).free == 0
        assert pynvml.nvmlDeviceGetMemoryInfo(calls.gpu()).free > 0


def test_only_what_one_has_allocated_can_be_read_written_or_freed(node: Node) -> None:
    with Client(node) as one, Client(node) as other:
        pointer = one.begin().ok("cuMemAlloc", 4 << 20)
        other.begin()
        for client, name, *arguments in (
            (other, "cuMemcpyDtoH", pointer, 4),
            (one, "cuMemcpyDtoH", pointer + (4 << 20) - 3, 4),
            (one, "cuMemcpyDtoH", pointer - 1, 4),
            (one, "cuMemsetD8", pointer, 0, 2**64 - 1),
            (one, "cuMemsetD32", pointer + 1, 0, 1),
            (one, "cuMemsetD32", pointer, 0, 2**62),
            (one, "cuMemFree", pointer + 1),
            (one, "cuMemAlloc", 0),
            (other, "cuMemFree", pointer),
        ):
            assert client.code(name, *arguments) == INVALID_VALUE, (name, arguments)
        one.ok("cuMemFree", 0)
        one.ok("cuMemFree", pointer)
        assert one.code("cuMemcpyDtoH", pointer, 4) == INVALID_VALUE


def test_the_first_place_that_fits_is_given(node: Node) -> None:
    with Client(node) as client:
        client.begin()
        first, second, third = (client.ok("cuMemAlloc", size << 20) for size in (8, 4, 2))
        assert (second - first, third - second) == (8 << 20, 4 << 20)
        client.ok("cuMemFree", first)
        assert client.ok("cuMemAlloc", 9 << 20) == third + (2 << 20)
        assert client.ok("cuMemAlloc", 3 << 20) == first
        assert client.ok("cuMemAlloc", 1) == first + (4 << 20)


def test_what_several_processes_are_given_at_once_never_overlaps(node: Node) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(node)).begin() for _ in range(3)]
        held: list[tuple[Client, int, int]] = []
        for number in range(12):
            for client in clients:
                client.send("cuMemAlloc", (number % 3 + 1) * GIB)
            for client in clients:
                code, pointer = client.answer()
                assert code == 0
                held.append((client, pointer, len(held)))
        for client, pointer, mark in held:
            client.ok("cuMemsetD32", pointer, mark, GIB // 4)
        for client, pointer, mark in held:
            assert client.read(pointer + GIB - 4) == mark.to_bytes(4, "little")


# --- to the byte ----------------------------------------------------------------------------------------------------

WINDOW = 64
byte = st.integers(0, 255)
writes = st.one_of(
    st.tuples(st.just("cuMemsetD8"), st.integers(0, WINDOW), byte, st.integers(0, WINDOW)),
    st.tuples(st.just("cuMemsetD32"), st.integers(0, WINDOW // 4).map(lambda at: at * 4),
              st.integers(0, 2**32 - 1), st.integers(0, WINDOW // 4)),
    st.tuples(st.just("cuMemcpyHtoD"), st.integers(0, WINDOW), st.binary(max_size=WINDOW)),
)  # fmt: skip


def in_effect(write: tuple[Any, ...], memory: bytearray) -> bool:
    """Do a write to what stands for the device's memory. False: it does not fit."""
    name, at, value, *count = write
    if name == "cuMemcpyHtoD":
        content = (value[:4] * WINDOW)[: len(value)]
    else:
        content = (bytes([value]) if name == "cuMemsetD8" else value.to_bytes(4, "little")) * count[0]
    if at + len(content) > WINDOW:
        return False
    memory[at : at + len(content)] = content
    return True


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    """A client on a node of its own, the node, and a pointer to a window of its memory."""
    node = Node.create(tmp_path_factory.mktemp("writer") / "node", gpus=1)
    with Client(node) as client:
        yield node, client, client.begin().ok("cuMemAlloc", WINDOW)


@given(st.lists(writes, max_size=12))
def test_memory_is_what_was_written_last_to_the_byte(writer: Any, script: list[tuple[Any, ...]]) -> None:  # noqa: ANN401
    node, client, pointer = writer
    memory = bytearray(WINDOW)
    client.ok("cuMemsetD8", pointer, 0, WINDOW)
    for write in script:
        name, at, value, *count = write
        if in_effect(write, memory):
            client.ok(name, pointer + at, value.hex() if name == "cuMemcpyHtoD" else value, *count)
    assert client.read(pointer, WINDOW) == memory
    assert client.read(pointer + 3, WINDOW - 7) == memory[3:-4]
    rows = node.residue(0)
    assert sum(row.size for row in rows) == 80 * GIB
    assert all(row[:3] != after[:3] for row, after in itertools.pairwise(rows))


def test_memory_that_is_cut_up_too_finely_is_refused_and_stays_as_it_was(node: Node) -> None:
    with Client(node) as client:
        pointer, size = client.begin().everything()
        codes = [client.code("cuMemsetD8", pointer + 2 * at, at % 2 + 1, 1) for at in range(300)]
        assert set(codes[:200]) == {0}
        assert codes[-1] == UNKNOWN
        assert client.read(pointer + 2 * 299, 1) != b"\x02"
        client.ok("cuMemsetD8", pointer, 0, size)
        assert client.ok("cuMemsetD8", pointer + 2 * 299, 2, 1) is None


@pytest.mark.parametrize("rounds", [8, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_a_client_killed_at_any_instruction_leaves_memory_whole(node: Node, seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        with Client(node) as client:
            client.begin().send("forever")
            time.sleep(chance.uniform(0.0, 0.03))
        assert sum(row.size for row in node.residue(0)) == 80 * GIB
        with Client(node) as after:
            pointer, size = after.begin().everything()
            after.ok("cuMemsetD8", pointer, 0, size)
        assert patterns(node.readable(gpu_uuid())) == {0}
