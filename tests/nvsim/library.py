"""Builds the simulator's libnvidia-ml.so.1, once for each state of its source, into the user's cache.

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
SONAME: Final = "libnvidia-ml.so.1"
"""nvidia-ml-py finds a library that is loaded already by this name."""
_FLAGS: Final = (
    "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden",
    f"-Wl,-soname,{SONAME}",
)  # fmt: skip


def library(without: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Path:
    """Path of the library, built if need be. `without`: functions that it lacks, as an older driver does.

    Raises BuildError with what the compiler said.
    """
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256(repr((_FLAGS, sorted(without))).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = cache_root(environ) / f"nvsim-{digest.hexdigest()[:16]}"
    if not (folder / SONAME).is_file():
        _build(folder, sources, without, environ)
    return folder / SONAME


def _build(folder: Path, sources: Sequence[Path], without: Sequence[str], environ: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".nvsim-") as scratch:
        made = Path(scratch) / "lib"
        made.mkdir()
        hidden = Path(scratch) / "hidden.map"
        hidden.write_text(f"{{ local: {' '.join(f'{name};' for name in without)} }};\n")
        script = (f"-Wl,--version-script={hidden}",) if without else ()
        command = [*compiler(environ), *_FLAGS, *script, "-o", str(made / SONAME), *map(str, sources), "-lpthread"]
        caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), f"{scratch}/zig")
        done = subprocess.run(command, capture_output=True, text=True, env={**environ, **caches}, check=False)
        if done.returncode != 0:
            raise BuildError(f"{command[0]} could not build the NVML simulator:\n{done.stderr}")
        put_in_place(made, folder)


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
