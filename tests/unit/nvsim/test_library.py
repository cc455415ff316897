"""How the simulator's library comes to be."""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path

import pytest

from tests.cluster.binaries import BuildError
from tests.nvsim import library as module
from tests.nvsim.library import compiler, driver, library


def test_the_compiler_is_the_users_own_if_there_is_one(tmp_path: Path) -> None:
    for name in ("cc", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert compiler({"PATH": str(tmp_path), "CC": "mine"}) == [str(tmp_path / "mine")]
    assert compiler({"PATH": str(tmp_path)}) == [str(tmp_path / "cc")]


def test_without_a_compiler_it_is_the_one_of_the_wheel(tmp_path: Path) -> None:
    pins = Path(module.__file__).parent / "ziglang.txt"
    installed = tmp_path / "gpu-tenancy" / f"zig-{hashlib.sha256(pins.read_bytes()).hexdigest()[:16]}" / "ziglang"
    installed.mkdir(parents=True)
    assert compiler({"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}) == [str(installed / "zig"), "cc"]


def test_a_build_that_fails_says_what_the_compiler_said(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no space left on device' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(BuildError, match="no space left on device"):
        library(environ={"PATH": f"{tmp_path}:/bin:/usr/bin", "CC": str(broken), "XDG_CACHE_HOME": str(tmp_path)})
    assert not list((tmp_path / "gpu-tenancy").glob("*"))


def test_it_is_built_once_for_each_state_of_its_source(tmp_path: Path) -> None:
    first = library(environ={"PATH": "/bin:/usr/bin:/usr/local/bin", "XDG_CACHE_HOME": str(tmp_path)})
    assert library(environ={"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}) == first
    assert library(without=("nvmlDeviceGetName",)) != library()


def test_both_libraries_and_nvidia_smi_lie_side_by_side_and_offer_nothing_of_their_own() -> None:
    folder = driver()
    assert {path.name for path in folder.iterdir()} == {"libnvidia-ml.so.1", "libcuda.so.1", "nvidia-smi"}
    assert library() == folder / "libnvidia-ml.so.1"
    nvml, cuda = ctypes.CDLL(str(library())), ctypes.CDLL(str(folder / "libcuda.so.1"))
    for name, offered_by in {"nvmlInit_v2": [nvml], "nvsim_create": [nvml], "cuInit": [cuda], "state_look": []}.items():
        assert [one for one in (nvml, cuda) if hasattr(one, name)] == offered_by
    for soname in ("libnvidia-ml.so.1", "libcuda.so.1"):
        ctypes.CDLL(soname, mode=os.RTLD_NOLOAD)  # Fails where nothing of that SONAME is loaded.
