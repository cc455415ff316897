"""Builds the simulator's libnvidia-ml.so.1, once for each state of its source, into the user's cache.

The compiler is `$CC` or `cc`; where there is none it is zig's, from the PyPI wheel `ziglang` (version and hashes in
ziglang.txt). May start a compiler and pip, and may write only below the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.cluster.binaries import cache_root

SOURCES: Final = Path(__file__).parent / "src"
SONAME: Final = "libnvidia-ml.so.1"
"""nvidia-ml-py finds a library that is loaded already by this name."""
_FLAGS: Final = (
    "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden",
    f"-Wl,-soname,{SONAME}",
)  # fmt: skip
_ZIG: Final = Path(__file__).parent / "ziglang.txt"


class BuildError(RuntimeError):
    """The simulator could not be built; the message says what to do."""


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
        try:
            made.rename(folder)
        except OSError:
            if not (folder / SONAME).is_file():  # somebody else was faster, and made the same
                raise


def compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The command of a C compiler. Raises BuildError where there is none and none can be installed."""
    for name in (environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name, path=environ.get("PATH"))):
            return [found]
    return _zig(environ)


def _zig(environ: Mapping[str, str]) -> list[str]:
    folder = cache_root(environ) / f"zig-{hashlib.sha256(_ZIG.read_bytes()).hexdigest()[:16]}"
    if not (folder / "ziglang").is_dir():
        print("no C compiler on PATH: installing the ziglang wheel (90 MB, once) …", file=sys.stderr, flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".zig-") as scratch:
            target = Path(scratch) / "wheel"
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                    *("--no-deps", "--require-hashes", "--target", str(target), "-r", str(_ZIG)),
                ],
                capture_output=True,
                text=True,
                env=dict(environ),
                check=False,
            )
            if done.returncode != 0:
                tail = "\n".join(done.stderr.splitlines()[-5:])
                raise BuildError(f"there is no C compiler, and zig's cannot be installed; install gcc.\n{tail}")
            if not (folder / "ziglang").is_dir():
                target.rename(folder)
    return [str(folder / "ziglang" / "zig"), "cc"]
