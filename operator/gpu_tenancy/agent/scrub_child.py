"""The scrub of one device, in a process of its own that `scrub_server` forks.

The only module that loads CUDA, and it imports nothing of the project, so that the server starts fast. It makes a GPU
or MIG device the only one that it can see, allocates all of its memory, marks places all over it with a pattern drawn
for this run, writes zeros over everything, reads the marked places back, and says what it did as one line of JSON on
standard output. What it cannot allocate is what a context takes for itself, the next holder's as well as this one's.
No CUDA call is made before `run`: a fork would not survive it. Source: CUDA Driver API (memory management, device
management).
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from cuda.bindings import driver as cuda

SMALLEST: Final = 2 << 20
"""Bytes of the smallest block that is asked for: what the driver hands out memory in."""
TOLERATED: Final = 64 << 20
"""Bytes that may stay free when nothing more can be had: more than that would be reachable and not written."""
RESERVED: Final = 640 << 20
"""Bytes that a context may take for itself; on large devices a fiftieth of the memory, where that is more."""
EVERY: Final = 512 << 20
"""Bytes from one sample to the next: a copy to the host costs 0.1 ms, whatever its size."""
SAMPLE: Final = 4096
"""Bytes of a sample."""
_ZEROS: Final = bytes(SAMPLE)
_PR_SET_PDEATHSIG: Final = 1


class ScrubError(Exception):
    """The device was not scrubbed; the message is a sentence."""


def run(device: str) -> NoReturn:
    """Scrub the device with this UUID, report, and end this process."""
    report: dict[str, object]
    try:
        report = {"scrub": scrub(device)}
    except ScrubError as error:
        report = {"error": str(error)}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    # Whoever waits for the device waits for this process to be gone: nothing is left to tidy up.
    os._exit(0)


def scrub(device: str) -> dict[str, int]:
    """Overwrite all memory of the device with this UUID and read samples back; bytes and samples. Raises ScrubError."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    _check("cuInit", *cuda.cuInit(0))
    handle = _check("cuDeviceGet", *cuda.cuDeviceGet(0))
    _check_identity(handle, device)
    context = _check("cuDevicePrimaryCtxRetain", *cuda.cuDevicePrimaryCtxRetain(handle))
    _check("cuCtxSetCurrent", *cuda.cuCtxSetCurrent(context))
    blocks = list(_everything())
    pattern = secrets.randbits(32) | 1  # Not zero.
    samples = [address + place for address, size in blocks for place in _places(size)]
    for sample in samples:
        _check("cuMemsetD32", *cuda.cuMemsetD32(sample, pattern, SAMPLE // 4))
    for address, size in blocks:
        _check("cuMemsetD32", *cuda.cuMemsetD32(address, 0, size // 4))
    _check("cuCtxSynchronize", *cuda.cuCtxSynchronize())
    for sample in samples:
        _read_back(sample)
    return {"bytes": sum(size for _, size in blocks), "samples": len(samples)}


def _check_identity(handle: Any, device: str) -> None:  # noqa: ANN401  (the bindings are untyped)
    """The environment decides what is visible; the driver says what it is."""
    found = _check("cuDeviceGetUuid", *cuda.cuDeviceGetUuid(handle)).bytes.hex()
    if found != device.partition("-")[2].replace("-", ""):
        raise ScrubError(f"CUDA shows a device with UUID {found} in its place; look whether it was partitioned anew")


def _everything() -> Iterator[tuple[int, int]]:
    """All memory that can be had, as blocks of (address, bytes), the largest first."""
    free, total = _both("cuMemGetInfo", *cuda.cuMemGetInfo())
    size, had = free // SMALLEST * SMALLEST, 0
    while size >= SMALLEST:
        error, address = cuda.cuMemAlloc(size)
        if error == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            size = size // 2 // SMALLEST * SMALLEST
            continue
        _check("cuMemAlloc", error)
        yield int(address), size
        had += size
        size = min(size, _free() // SMALLEST * SMALLEST)
    if (left := _free()) > TOLERATED:
        raise ScrubError(f"{left >> 20} MiB of memory are free and cannot be allocated; reset the GPU")
    missing = total - had
    if missing > max(RESERVED, total // 50):
        raise ScrubError(f"{missing >> 20} of {total >> 20} MiB of memory are taken; somebody else is on the device")


def _free() -> int:
    free, _ = _both("cuMemGetInfo", *cuda.cuMemGetInfo())
    return free


def _places(size: int) -> Iterator[int]:
    """Where a block is sampled: from its first byte to its last."""
    yield from range(0, size - SAMPLE, EVERY)
    yield size - SAMPLE


def _read_back(address: int) -> None:
    """Read a sample, which was marked before it was overwritten. Raises ScrubError where it is not as written."""
    found = bytearray(SAMPLE)
    _check("cuMemcpyDtoH", *cuda.cuMemcpyDtoH(found, address, SAMPLE))
    if found != _ZEROS:
        raise ScrubError(f"what is read at {address:#x} is not what was written; retire the GPU")


def _check(call: str, error: Any, value: Any = None) -> Any:  # noqa: ANN401
    """The value of a call. Raises ScrubError where it failed."""
    if error != cuda.CUresult.CUDA_SUCCESS:
        _, name = cuda.cuGetErrorName(error)
        raise ScrubError(f"{call}: {name.decode() if name else error}")
    return value


def _both(call: str, error: Any, first: int, second: int) -> tuple[int, int]:  # noqa: ANN401
    _check(call, error)
    return first, second


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies: it would hold a device that nobody waits for."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("whoever started this process is gone")
