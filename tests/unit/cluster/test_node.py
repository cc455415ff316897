"""Real nodes without one: images, configuration files, what a container's log says, and why there can be none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.node import possible
from tests.cluster.node.images import PAUSE, PROBE, probe, write_archive
from tests.cluster.node.layout import NodeLayout, containerd, kubelet, write_files
from tests.cluster.node.realnode import texts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gpu-probe and its image are for Linux.")


@pytest.fixture
def layout(tmp_path: Path) -> NodeLayout:
    programs = {name: Path(f"/programs/{name}") for name in ("kubelet", "containerd", "runc-unconfined", "ptp")}
    programs["containerd-shim-runc-v2"] = Path("/programs/containerd-shim-runc-v2")
    return NodeLayout(
        name="n1",
        directory=tmp_path / "n",
        number=3,
        programs=programs,
        kubeconfig=Path("/kubeconfig"),
        authority=Path("/ca.crt"),
        labels={"b": "2", "a": "1"},
    )


@pytest.fixture
def not_remembered() -> Iterator[None]:
    possible.missing.cache_clear()
    yield
    possible.missing.cache_clear()


def test_an_archive_has_both_images_with_the_program_and_the_libraries_that_it_loads(tmp_path: Path) -> None:
    write_archive(tmp_path / "images.tar")
    with tarfile.open(tmp_path / "images.tar") as archive:
        files = {one.name: archive.extractfile(one) for one in archive}
        contents = {name: file.read() for name, file in files.items() if file}
    manifest = json.loads(contents["manifest.json"])
    assert {tag: one["Config"] for one in manifest for tag in one["RepoTags"]}.keys() == {PROBE, PAUSE}
    digest = hashlib.sha256(contents["layer.tar"]).hexdigest()
    for one in manifest:
        assert json.loads(contents[one["Config"]])["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
    with tarfile.open(fileobj=io.BytesIO(contents["layer.tar"])) as layer:
        names = layer.getnames()
    assert names == sorted(set(names), key=names.index)
    loaded = subprocess.run([probe(), "libraries"], capture_output=True, text=True, check=True).stdout
    assert {line.removeprefix("library /") for line in loaded.splitlines()} < set(names)


def test_an_archive_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_archive(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["environment", "exit=3"], "GPU_TENANCY_DEVICE=gpu0\nNVIDIA_VISIBLE_DEVICES=void\n", 3),
        (["devices", "context", "read"], "devices none: ", 0),
        (["write=5a"], "write none: CUDA error 201\n", 0),
        (["sleep=0", "environment"], "sleeping\nGPU_TENANCY_DEVICE=gpu0\nNVIDIA_VISIBLE_DEVICES=void\n", 0),
        (["gamble"], "", 2),
    ],
)
def test_the_program_does_word_for_word_what_it_is_told(words: list[str], said: str, status: int) -> None:
    environ = {"PATH": os.environ["PATH"], "GPU_TENANCY_DEVICE": "gpu0", "NVIDIA_VISIBLE_DEVICES": "void"}
    done = subprocess.run([probe(), *words], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == status
    assert done.stdout.startswith(said)


@pytest.mark.parametrize(("words", "status"), [(["sleep"], 0), (["ignore-term", "sleep"], None)])
def test_the_program_ends_well_on_sigterm_unless_it_is_told_to_ignore_it(words: list[str], status: int | None) -> None:
    with subprocess.Popen([probe(), *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sleeping\n"
        process.terminate()
        if status is None:
            said = Path(f"/proc/{process.pid}/status").read_text()
            process.kill()
            [ignored] = [int(line.split()[1], 16) for line in said.splitlines() if line.startswith("SigIgn:")]
            assert ignored >> (signal.SIGTERM - 1) & 1
        process.wait()
    assert process.returncode == (-9 if status is None else status)


def test_configuration_files_name_only_files_of_the_node(layout: NodeLayout) -> None:
    write_files(layout)
    runtime = tomllib.loads(layout.file("containerd.toml").read_text())
    assert runtime["plugins"]["io.containerd.cri.v1.runtime"]["cdi_spec_dirs"] == [str(layout.cdi_root)]
    assert runtime["plugins"]["io.containerd.cri.v1.images"]["pinned_images"]["sandbox"] == PAUSE
    [name] = layout.cni.iterdir()
    [plugin] = json.loads(name.read_text())["plugins"]
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.80.3.0/24"}]]
    config = yaml.safe_load(layout.file("kubelet.yaml").read_text())
    folders = {config[key] for key in ("podLogsDir", "volumePluginDir")}
    assert all(Path(folder).is_relative_to(layout.directory) for folder in folders)
    assert config["cgroupRoot"] == f"/{layout.directory.name}"


def test_another_default_runtime_stands_beside_runc(layout: NodeLayout) -> None:
    values = {name: getattr(layout, name) for name in layout.__slots__}
    write_files(NodeLayout(**values | {"default_runtime": ("nvidia", Path("/programs/hook"))}))
    runtime = tomllib.loads(layout.file("containerd.toml").read_text())["plugins"]["io.containerd.cri.v1.runtime"]
    programs = {name: one["options"]["BinaryName"] for name, one in runtime["containerd"]["runtimes"].items()}
    assert programs == {"nvidia": "/programs/hook", "runc": "/programs/runc-unconfined"}
    assert runtime["containerd"]["default_runtime_name"] == "nvidia"


def test_programs_are_told_where_their_files_are(layout: NodeLayout) -> None:
    assert "--node-labels=a=1,b=2" in kubelet(layout)
    assert f"--root-dir={layout.kubelet_root}" in kubelet(layout)
    assert containerd(layout) == ["/programs/containerd", "--config", str(layout.file("containerd.toml"))]


def test_nodes_with_different_numbers_have_different_addresses(layout: NodeLayout) -> None:
    values = {name: getattr(layout, name) for name in layout.__slots__}
    nodes = [NodeLayout(**{**values, "number": number}) for number in range(5000)]
    assert len({node.address for node in nodes}) == len({node.pod_range for node in nodes}) == 5000


def test_the_text_of_a_containers_log_is_what_the_container_wrote() -> None:
    log = "2026-01-01T00:00:00Z stdout F a b  c\n2026-01-01T00:00:00Z stderr F \nhalf a li"
    assert texts(log) == ["a b  c", ""]


@pytest.mark.usefixtures("not_remembered")
def test_elsewhere_than_on_linux_the_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert possible.missing() == "A real kubelet needs Linux; this is darwin."


@pytest.mark.usefixtures("not_remembered")
def test_without_root_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (possible.missing() or "").startswith("A real kubelet needs root: run the tests as root")


@pytest.mark.usefixtures("not_remembered")
def test_root_that_may_not_make_namespaces_is_told_so() -> None:
    if os.geteuid() != 0:
        pytest.skip("Only root can take a capability from itself.")
    code = (
        "import ctypes; from tests.cluster.node.possible import missing\n"
        "assert not ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)\n"  # PR_CAPBSET_DROP, CAP_SYS_ADMIN: for what is executed
        "print(missing())"
    )
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), str(root / "operator")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    assert done.stdout.startswith("A real kubelet needs namespaces, mounts and control groups of its own; here ")
    assert "cannot make a namespace of processes" in done.stdout
