"""The house itself: what linters do not check of the layout, the lock, the package and the scripts."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from gpu_tenancy.api.names import GROUP
from tests import lock, verify

ROOT: Final = Path(__file__).parents[2]
PRODUCT: Final = ROOT / "operator" / "gpu_tenancy"
TARGETS: Final = {"demo", "test", "test-all", "lint", "verify", "bench", "up", "down", "clean", "help"}


def modules(folder: Path) -> list[Path]:
    """The modules below a folder that people write."""
    return [path for path in sorted(folder.rglob("*.py")) if not re.search(r"_pb2(_grpc)?\.py$", path.name)]


def strings(tree: ast.AST) -> Iterator[str]:
    """String constants of a module, without those that only document."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_folder_operator_is_no_package_for_it_would_hide_the_standard_librarys() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_every_module_says_what_it_is_for() -> None:
    written = [path for path in (*modules(PRODUCT), *modules(ROOT / "tests")) if path.stat().st_size]
    assert [relative(path) for path in written if not ast.get_docstring(parsed(path))] == []


def test_the_group_is_spelled_out_in_names_only() -> None:
    spelled = {relative(path) for path in modules(PRODUCT) if any(GROUP in text for text in strings(parsed(path)))}
    assert spelled == {"operator/gpu_tenancy/api/names.py"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_kopf_is_used_without_indices_timers_and_daemons() -> None:
    used = {
        f"{relative(path)}: kopf.{node.attr}"
        for path in modules(PRODUCT)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kopf"
        if node.attr in {"index", "timer", "daemon"}
    }
    assert used == set()


def test_the_lock_is_that_of_the_project() -> None:
    assert list(lock.faults(lock.LOCK.read_text())) == []


EDITED: Final = "requirements.lock was edited since `make lock` wrote it; take the edit back, or"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("# inputs: sha256:", "# inputs: sha256:0"), "requirements.lock was made from another pyproject.toml"),
        (("aiohttp==", "--index-url https://example.com\naiohttp=="), "names an index"),
        (("aiohttp==", "--extra-index-url=//example.com\naiohttp=="), "names an index"),
        (("aiohttp==", "--find-links wheels\naiohttp=="), "names an index"),
        (("--hash=sha256:", "--hash=md5:"), "has no hash in requirements.lock"),
        (("kopf==1.45", "kopf==1.46"), 'for "kopf<1.46,>=1.45.2"'),
        (("kopf==", "other=="), 'has no version for "kopf<1.46,>=1.45.2"'),
        (("idna==.* ", "idna==0.0.1 "), EDITED),
        (("--hash=sha256:[0-9a-f]+", f"--hash=sha256:{'0' * 64}"), EDITED),
        (("^", "stowaway==1.0 --hash=sha256:0\n"), EDITED),
        (("\n# all other lines: .*", ""), EDITED),
    ],
)
def test_a_lock_of_other_inputs_or_with_other_pins_is_noticed(change: tuple[str, str], fault: str) -> None:
    text = lock.LOCK.read_text()
    edited = re.sub(*change, text)
    assert text != edited
    assert any(fault in found for found in lock.faults(edited))


def test_verify_renews_what_differs_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text("same")
    (tmp_path / "old.yaml").write_text("old")
    (tmp_path / "stray.yaml").write_text("left over")
    (tmp_path / "own.md").write_text("not generated")
    texts = {"same.yaml": "same", "old.yaml": "new", "missing.yaml": "new"}
    generated = verify.Generated(tmp_path, "*.yaml", lambda: texts)
    assert {path.name for path in verify.renew(generated)} == {"old.yaml", "missing.yaml", "stray.yaml"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {**texts, "own.md": "not generated"}
    assert verify.renew(generated) == []


def test_the_wheel_holds_the_package_and_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"gpu-tenancy = gpu_tenancy.__main__:main" in archive.read(entry_points)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"gpu_tenancy"}
    assert "gpu_tenancy/py.typed" in names


def test_make_alone_lists_every_target() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^  make (\S+) +\S", printed, re.MULTILINE)) >= TARGETS


def test_make_without_a_new_enough_python_says_what_to_do(tmp_path: Path) -> None:
    project = tmp_path / "a project"
    project.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (project / name).write_text((ROOT / name).read_text())
    tools = path_with(tmp_path / "tools", python3="#!/bin/sh\nexit 1\n")
    for name in ("sh", "make"):
        (tools / name).symlink_to(program(name))
    ran = subprocess.run(
        ["make", "lint"], cwd=project, env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3" in ran.stderr


CLOSING: Final = "============ {} in 61.02s (0:01:01) ============"


@pytest.mark.parametrize(
    ("make", "status", "said"),
    [
        (f"echo '{CLOSING.format('120 passed, 2 deselected')}'", 0, ""),
        (f"echo '{CLOSING.format('120 passed, 1 skipped')}'", 1, "Tests were skipped"),
        (f"echo '{CLOSING.format('3 skipped')}'", 5, "No test ran"),
        (f"echo '{CLOSING.format('7 deselected')}'", 5, "No test ran"),
        (f"echo '{CLOSING.format('1 failed, 119 passed')}'; exit 2", 2, ""),
        ("echo 'ruff found something'; exit 2", 2, ""),
        ("true", 5, "No test ran"),
    ],
)
def test_ci_passes_only_where_tests_ran_and_none_was_skipped(tmp_path: Path, make: str, status: int, said: str) -> None:
    tools = path_with(tmp_path, make=f'#!/bin/sh\n[ "$1" = test ] || exit 99\n{make}\n')
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        [ROOT / ".ci" / "run"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == status
    assert said in ran.stdout
    closing = re.search(r"=+ .* =+", make)
    last = closing.group() if closing else "pytest did not get as far as its closing line."
    assert ran.stdout.splitlines()[-1] == last


def path_with(folder: Path, **scripts: str) -> Path:
    """A folder for PATH with these programs."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def program(name: str) -> Path:
    """Where a program of this machine is."""
    found = [Path(folder) / name for folder in os.environ["PATH"].split(os.pathsep)]
    return next(path for path in found if path.exists())
