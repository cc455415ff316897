"""Golden tables: what NVIDIA's boards offer, as the MIG User Guide and `nvidia-smi mig -lgip`, `-lgipp` print it."""

from __future__ import annotations

from ctypes import byref, c_uint, sizeof
from pathlib import Path

import pynvml
import pytest

from tests.nvsim.node import Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement
from tests.unit.nvsim.conftest import driver_of

SEVEN = (0, 1, 2, 3, 4, 5, 6)

# number: id, compute slices, memory slices, MiB, SM, CE, DEC, JPG, OFA, most, name, starts
A100_40 = {
    0: (19, 1, 1, 4864, 14, 1, 0, 0, 0, 7, "1g.5gb", SEVEN),
    7: (20, 1, 1, 4864, 14, 1, 1, 1, 1, 1, "1g.5gb+me", SEVEN),
    9: (15, 1, 2, 9856, 14, 1, 1, 0, 0, 4, "1g.10gb", (0, 2, 4, 6)),
    1: (14, 2, 2, 9856, 28, 2, 1, 0, 0, 3, "2g.10gb", (0, 2, 4)),
    2: (9, 3, 4, 19968, 42, 3, 2, 0, 0, 2, "3g.20gb", (0, 4)),
    3: (5, 4, 4, 19968, 56, 4, 2, 0, 0, 1, "4g.20gb", (0,)),
    4: (0, 7, 8, 40192, 98, 7, 5, 1, 1, 1, "7g.40gb", (0,)),
}
A100_80 = {
    0: (19, 1, 1, 9728, 14, 1, 0, 0, 0, 7, "1g.10gb", SEVEN),
    7: (20, 1, 1, 9728, 14, 1, 1, 1, 1, 1, "1g.10gb+me", SEVEN),
    9: (15, 1, 2, 19968, 14, 1, 1, 0, 0, 4, "1g.20gb", (0, 2, 4, 6)),
    1: (14, 2, 2, 19968, 28, 2, 1, 0, 0, 3, "2g.20gb", (0, 2, 4)),
    2: (9, 3, 4, 40192, 42, 3, 2, 0, 0, 2, "3g.40gb", (0, 4)),
    3: (5, 4, 4, 40192, 56, 4, 2, 0, 0, 1, "4g.40gb", (0,)),
    4: (0, 7, 8, 80640, 98, 7, 5, 1, 1, 1, "7g.80gb", (0,)),
}
A30 = {
    0: (14, 1, 1, 5952, 14, 1, 1, 0, 0, 4, "1g.6gb", (0, 1, 2, 3)),
    7: (21, 1, 1, 5952, 14, 1, 1, 1, 1, 1, "1g.6gb+me", (0, 1, 2, 3)),
    1: (5, 2, 2, 11968, 28, 2, 2, 0, 0, 2, "2g.12gb", (0, 2)),
    8: (6, 2, 2, 11968, 28, 2, 2, 1, 1, 1, "2g.12gb+me", (0, 2)),
    3: (0, 4, 4, 24000, 56, 4, 4, 1, 1, 1, "4g.24gb", (0,)),
}
H100 = {
    0: (19, 1, 1, 9984, 16, 1, 1, 1, 0, 7, "1g.10gb", SEVEN),
    7: (20, 1, 1, 9984, 16, 1, 1, 1, 1, 1, "1g.10gb+me", SEVEN),
    9: (15, 1, 2, 20096, 26, 1, 1, 1, 0, 4, "1g.20gb", (0, 2, 4, 6)),
    1: (14, 2, 2, 20096, 32, 2, 2, 2, 0, 3, "2g.20gb", (0, 2, 4)),
    2: (9, 3, 4, 40448, 60, 3, 3, 3, 0, 2, "3g.40gb", (0, 4)),
    3: (5, 4, 4, 40448, 64, 4, 4, 4, 0, 1, "4g.40gb", (0,)),
    4: (0, 7, 8, 81152, 132, 8, 7, 7, 1, 1, "7g.80gb", (0,)),
}
H200 = {
    0: (19, 1, 1, 16384, 16, 1, 1, 1, 0, 7, "1g.18gb", SEVEN),
    7: (20, 1, 1, 16384, 16, 1, 1, 1, 1, 1, "1g.18gb+me", SEVEN),
    9: (15, 1, 2, 33024, 26, 1, 1, 1, 0, 4, "1g.35gb", (0, 2, 4, 6)),
    1: (14, 2, 2, 33024, 32, 2, 2, 2, 0, 3, "2g.35gb", (0, 2, 4)),
    2: (9, 3, 4, 71168, 60, 3, 3, 3, 0, 2, "3g.71gb", (0, 4)),
    3: (5, 4, 4, 71168, 64, 4, 4, 4, 0, 1, "4g.71gb", (0,)),
    4: (0, 7, 8, 143104, 132, 8, 7, 7, 1, 1, "7g.141gb", (0,)),
}
BOARDS = {
    "NVIDIA A100-SXM4-40GB": A100_40,
    "NVIDIA A100-PCIE-40GB": A100_40,
    "NVIDIA A100-SXM4-80GB": A100_80,
    "NVIDIA A100 80GB PCIe": A100_80,
    "NVIDIA A30": A30,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H200,
}


@pytest.mark.parametrize("board", BOARDS)
def test_gpu_instance_profiles(board: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node.create(tmp_path / "node", board=board, gpus=1)
    with driver_of(node, monkeypatch):
        device = calls.in_mig_mode()
        assert pynvml.nvmlDeviceGetName(device) == board
        found = {}
        for number, info in calls.profiles(device).items():
            places = calls.placements(device, info.id)
            found[number] = (
                info.id, info.sliceCount, places[0].size, info.memorySizeMB, info.multiprocessorCount,
                info.copyEngineCount, info.decoderCount, info.jpegCount, info.ofaCount, info.instanceCount,
                info.name.removeprefix("MIG "), tuple(place.start for place in places),
            )  # fmt: skip
            assert {place.size for place in places} == {places[0].size}
            assert info.encoderCount == info.isP2pSupported == 0
            old = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, number, version=1)
            assert (old.id, old.memorySizeMB) == (info.id, info.memorySizeMB)
        assert found == BOARDS[board]


# GPU instance's compute slices: compute instance's number: (slices, most)
COMPUTE = {
    1: {0: (1, 1)},
    2: {0: (1, 2), 1: (2, 1)},
    3: {0: (1, 3), 1: (2, 1), 2: (3, 1)},
    4: {0: (1, 4), 1: (2, 2), 3: (4, 1)},
    7: {0: (1, 7), 1: (2, 3), 2: (3, 2), 3: (4, 1), 4: (7, 1)},
}


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_compute_instance_profiles(node: Node, number: int) -> None:
    del node
    device = calls.in_mig_mode()
    profile = calls.profiles(device)[number]
    instance = calls.create(device, profile.id, calls.placements(device, profile.id)[0])
    found = {}
    for asked in range(pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT):
        try:
            info = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, asked, 0)
        except pynvml.NVMLError_NotSupported:
            continue
        assert info.id == asked
        assert info.multiprocessorCount == 14 * info.sliceCount
        assert info.sharedCopyEngineCount == profile.copyEngineCount
        whole = info.sliceCount == profile.sliceCount
        name = profile.name.removeprefix("MIG ")
        assert info.name == (f"MIG {name}" if whole else f"MIG {info.sliceCount}c.{name}")
        found[asked] = (info.sliceCount, info.instanceCount)
    assert found == COMPUTE[profile.sliceCount]


# Which number a GPU instance gets at {start}:size, on the two kinds of board seen.
IDS = {
    0: {(0, 8): 0, (0, 4): 1, (4, 4): 2, **{(start, 1): 7 + start for start in range(7)}},
    1: {
        (0, 8): 0, (0, 4): 2, (4, 4): 1, (4, 2): 3,
        (4, 1): 7, (5, 1): 8, (6, 1): 9, (0, 1): 11, (1, 1): 12, (2, 1): 13, (3, 1): 14,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", [0, 1])
def test_two_boards_number_the_same_placement_differently(node: Node, layout: int) -> None:
    node.set("layout", layout, gpu=0)
    device = calls.in_mig_mode()
    ids = {8: 0, 4: 9, 2: 14, 1: 19}
    for (start, size), expected in IDS[layout].items():
        instance = calls.create(device, ids[size], Placement(start, size))
        info = pynvml.nvmlGpuInstanceGetInfo(instance)
        assert (info.id, info.profileId, info.placement.start, info.placement.size) == (
            expected,
            ids[size],
            start,
            size,
        )
        pynvml.nvmlGpuInstanceDestroy(instance)


@pytest.mark.parametrize(
    ("profile", "order"),
    [(19, [6, 4, 5, 0, 1, 2, 3]), (14, [4, 0, 2]), (9, [4, 0]), (5, [0]), (0, [0])],
    ids=["1g", "2g", "3g", "4g", "7g"],
)
def test_where_the_driver_itself_begins(node: Node, profile: int, order: list[int]) -> None:
    del node
    device = calls.in_mig_mode()
    made = [pynvml.nvmlDeviceCreateGpuInstance(device, profile) for _ in order]
    assert [pynvml.nvmlGpuInstanceGetInfo(one).placement.start for one in made] == order
    with pytest.raises(pynvml.NVMLError_InsufficientResources):
        pynvml.nvmlDeviceCreateGpuInstance(device, profile)


def test_numbers_beyond_the_last_profile_end_the_enumeration(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT)


def test_structures_of_another_version_are_refused(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    info = pynvml.c_nvmlGpuInstanceProfileInfo_v2_t()
    info.version = 0x03000098
    asked = pynvml.nvmlLib.nvmlDeviceGetGpuInstanceProfileInfoV
    assert asked(device, c_uint(0), byref(info)) == pynvml.NVML_ERROR_INVALID_ARGUMENT


def test_structures_are_as_large_as_in_nvidia_ml_py() -> None:
    """Those that src/nvml_abi.h asserts; a new nvidia-ml-py may not move them."""
    sizes = {
        pynvml.c_nvmlGpuInstancePlacement_t: 8,
        pynvml.c_nvmlGpuInstanceProfileInfo_t: 48,
        pynvml.c_nvmlGpuInstanceProfileInfo_v2_t: 152,
        pynvml.c_nvmlGpuInstanceInfo_t: 24,
        pynvml.c_nvmlComputeInstanceProfileInfo_t: 36,
        pynvml.c_nvmlComputeInstanceProfileInfo_v2_t: 136,
        pynvml.c_nvmlComputeInstanceInfo_t: 32,
        pynvml.c_nvmlDeviceAttributes: 40,
        pynvml.c_nvmlMemory_t: 24,
        pynvml.c_nvmlMemory_v2_t: 40,
        pynvml.nvmlPciInfo_t: 68,
        pynvml.c_nvmlEventData_t: 32,
        pynvml.c_nvmlFieldValue_t: 40,
        pynvml.c_nvmlRowRemapperHistogramValues: 20,
        pynvml.c_nvmlEccSramErrorStatus_v1_t: 104,
    }
    assert {one.__name__: sizeof(one) for one in sizes} == {one.__name__: size for one, size in sizes.items()}
