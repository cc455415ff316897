"""The images of real nodes, assembled here: one small program of ours and the C library that it needs. No registry.

It may start a C compiler and the program itself (to learn which libraries it loads), and may write only below the
user's cache folder and where it is told to.
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from tests.cluster.binaries import BuildError, cache_root, put_in_place
from tests.nvsim.library import compiler

SOURCE: Final = Path(__file__).parent / "probe" / "gpu_probe.c"
PROBE: Final = "gpu-tenancy.test/gpu-probe:1"
"""Its entry point is gpu-probe; the words for it are a container's `args`, see probe/gpu_probe.c."""
PAUSE: Final = "gpu-tenancy.test/pause:1"
"""What holds a pod's namespaces together."""
# All parts of the C library that a library mounted into a container may want; newer ones are empty shells.
_FLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wl,--no-as-needed")
_LIBRARIES: Final = ("-ldl", "-lpthread", "-lm", "-lrt")
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


def architecture() -> str:
    """This machine's, in the container world's word."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def probe(environ: Mapping[str, str] = os.environ) -> Path:
    """The program gpu-probe, built if need be. Raises BuildError with what the compiler said."""
    digest = hashlib.sha256(repr((_FLAGS, _LIBRARIES)).encode() + SOURCE.read_bytes()).hexdigest()
    folder = cache_root(environ) / f"gpu-probe-{digest[:16]}"
    if folder.is_dir():
        return folder / "gpu-probe"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gpu-probe-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        command = [*compiler(environ), *_FLAGS, "-o", str(made / "gpu-probe"), str(SOURCE), *_LIBRARIES]
        caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), f"{scratch}/zig")
        done = subprocess.run(command, capture_output=True, text=True, env={**environ, **caches}, check=False)
        if done.returncode != 0:
            raise BuildError(f"{command[0]} could not build gpu-probe:\n{done.stderr}")
        put_in_place(made, folder)
    return folder / "gpu-probe"


def write_archive(path: Path) -> None:
    """Write both images into an archive that `ctr images import` reads."""
    program = probe()
    layer = _layer({"/gpu-probe": program, **{str(one): one for one in _loaded(program)}})
    images = {PROBE: ["/gpu-probe"], PAUSE: ["/gpu-probe", "pause"]}
    with tarfile.open(path, "w") as archive:
        _add(archive, "layer.tar", layer)
        manifest = []
        for number, (name, entrypoint) in enumerate(images.items()):
            _add(archive, f"{number}.json", json.dumps(_configuration(entrypoint, layer)).encode())
            manifest.append({"Config": f"{number}.json", "RepoTags": [name], "Layers": ["layer.tar"]})
        _add(archive, "manifest.json", json.dumps(manifest).encode())


def _loaded(program: Path) -> list[Path]:
    """The libraries that the program loads here, by the paths under which it will look for them there too."""
    shown = subprocess.run([program, "libraries"], capture_output=True, text=True, timeout=30, check=True)
    return [Path(line.removeprefix("library ")) for line in shown.stdout.splitlines()]


def _configuration(entrypoint: list[str], layer: bytes) -> dict[str, object]:
    return {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Entrypoint": entrypoint},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }


def _layer(files: Mapping[str, Path]) -> bytes:
    """A layer with these files, by their paths in it; the same bytes each time."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as layer:
        for folder in sorted(_folders(files)):
            entry = tarfile.TarInfo(folder.lstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            layer.addfile(entry)
        for name, file in sorted(files.items()):
            _add(layer, name.lstrip("/"), file.read_bytes(), mode=0o755)
    return written.getvalue()


def _folders(names: Iterable[str]) -> set[str]:
    return {str(folder) for name in (*names, "/tmp/x") for folder in Path(name).parents} - {"/"}  # noqa: S108


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
