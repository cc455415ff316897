"""Builds the simulator's driver: libnvidia-ml.so.1, libcuda.so.1 and nvidia-smi, side by side in one folder of the
user's cache, once for each state of their source.

The compiler is `$CC` or `cc`; where there is none it is zig's, from the PyPI wheel `ziglang` (version and hashes in
ziglang.txt). May start a compiler and pip, and may write only below the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.cluster.binaries import BuildError, cache_root, from_wheel, put_in_place

SOURCES: Final = Path(__file__).parent / "src"
NVML: Final = "libnvidia-ml.so.1"
"""nvidia-ml-py finds a library that is loaded already by this name."""
CUDA: Final = "libcuda.so.1"
"""cuda-bindings does so too, by this one."""
SMI: Final = "nvidia-smi"
_OWN: Final = {NVML: ("nvml_", "control"), CUDA: ("cuda_",), SMI: ("smi",)}
"""How the names of the sources begin that only some of the products are made of; the others are in each."""
_FLAGS: Final = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden")
_LIBRARIES: Final = ("-lpthread", "-ldl")


def library(without: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Path:
    """Path of libnvidia-ml.so.1 in `driver(without)`."""
    return driver(without, environ) / NVML


def driver(without: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of libnvidia-ml.so.1, libcuda.so.1 and nvidia-smi, built if need be.

    `without`: functions of either library that it lacks, as an older driver does.
    Raises BuildError with what the compiler said.
    """
    digest = hashlib.sha256(repr((_OWN, _FLAGS, _LIBRARIES, sorted(without))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = cache_root(environ) / f"nvsim-{digest.hexdigest()[:16]}"
    if not (folder / SMI).is_file():
        _build(folder, without, environ)
    return folder


def _build(folder: Path, without: Sequence[str], environ: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".nvsim-") as scratch:
        made = Path(scratch) / "driver"
        made.mkdir()
        hidden = Path(scratch) / "hidden.map"
        hidden.write_text(f"{{ local: {' '.join(f'{name};' for name in without)} }};\n")
        script = (f"-Wl,--version-script={hidden}",) if without else ()
        for product in _OWN:
            form = () if product == SMI else ("-shared", f"-Wl,-soname,{product}", *script)
            _compile([*_FLAGS, *form, "-o", f"{made}/{product}", *_sources(product), *_LIBRARIES], scratch, environ)
        put_in_place(made, folder)


def _sources(product: str) -> list[str]:
    foreign = tuple(prefix for prefixes in _OWN.values() for prefix in prefixes if prefix not in _OWN[product])
    return [str(path) for path in sorted(SOURCES.glob("*.c")) if not path.name.startswith(foreign)]


def _compile(arguments: Sequence[str], scratch: str, environ: Mapping[str, str]) -> None:
    command = [*compiler(environ), *arguments]
    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), f"{scratch}/zig")
    done = subprocess.run(command, capture_output=True, text=True, env={**environ, **caches}, check=False)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} could not build the simulated driver:\n{done.stderr}")


def compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command of a C compiler. Raises BuildError where there is none and none can be installed."""
    for name in (environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name, path=environ.get("PATH"))):
            return [found]
    return _zig(environ)


def _zig(environ: Mapping[str, str]) -> list[str]:
    folder = from_wheel(
        Path(__file__).parent / "ziglang.txt",
        "zig",
        environ,
        why="no C compiler on PATH: installing the ziglang wheel (90 MB, once) …",
        otherwise="there is no C compiler, and zig's cannot be installed; install gcc.",
    )
    return [str(folder / "ziglang" / "zig"), "cc"]
