"""The lock of everything that is installed: makes requirements.lock, and checks it without a network.

A lock cannot be compiled again at any later time with the same result: packages get new files, indices are out of
reach. So the lock carries a digest of what it was compiled from and one of its own text, and the check compares both,
then looks that every direct requirement is pinned within its bounds, that every pin has hashes, and that no index
address slipped in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parent.parent
LOCK: Final = ROOT / "requirements.lock"
BOOTSTRAP: Final = ROOT / "requirements-bootstrap.lock"
REMEDY: Final = "run `make lock` and commit requirements.lock"

_COMPILE: Final = (
    "pip", "compile", "pyproject.toml", "--group", "dev", "--universal", "--python-version", "3.11",
    "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-header", "--quiet",
)  # fmt: skip
_TEXT_DIGEST: Final = "# all other lines: sha256:"
_PIN: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^ ;\\]+)")
_ADDRESS: Final = re.compile(
    r"^\s*(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)\b|https?://", re.MULTILINE
)


def project() -> dict[str, Any]:
    """The whole of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, at run time and for development."""
    settings = project()
    groups = settings["dependency-groups"].values()
    return [
        Requirement(line)
        for line in (*settings["project"]["dependencies"], *(line for group in groups for line in group))
    ]


def inputs_digest() -> str:
    """SHA-256 of all that the lock is a function of, but for the state of the index."""
    settings = project()
    inputs = {
        "python": settings["project"]["requires-python"],
        "requirements": sorted(str(requirement) for requirement in direct_requirements()),
        "options": _COMPILE,
        "uv": BOOTSTRAP.read_text(),
    }
    return _digest(json.dumps(inputs, sort_keys=True))


def compile_lock(*, upgrade: bool) -> None:
    """Write requirements.lock. Pins that still fit stay as they are, unless `upgrade` asks for the newest.

    Raises subprocess.CalledProcessError where uv finds no solution; its message goes to the terminal.
    """
    previous = LOCK.read_text() if LOCK.exists() else ""
    command = [sys.executable, "-m", "uv", *_COMPILE, "--output-file", str(LOCK), *(["--upgrade"] if upgrade else [])]
    try:
        subprocess.run(command, cwd=ROOT, check=True)
    except subprocess.CalledProcessError:
        LOCK.write_text(previous)
        raise
    LOCK.write_text(stamped(LOCK.read_text()))


def stamped(pins: str) -> str:
    """The lock with these pins: its header says what they were compiled from, and shows when somebody edits it."""
    header = f"# Made by `make lock` from pyproject.toml; never edited by hand.\n# inputs: sha256:{inputs_digest()}\n"
    return f"{header}{_TEXT_DIGEST}{_digest(header + pins)}\n{pins}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def faults(text: str) -> Iterator[str]:
    """What is wrong with the text of a lock, one sentence each."""
    if f"# inputs: sha256:{inputs_digest()}\n" not in text:
        yield f"requirements.lock was made from another pyproject.toml or another uv; {REMEDY}"
    before, _, rest = text.partition(_TEXT_DIGEST)
    digest, _, after = rest.partition("\n")
    if digest != _digest(before + after):
        yield f"requirements.lock was edited since `make lock` wrote it; take the edit back, or {REMEDY}"
    if address := _ADDRESS.search(text):
        yield f'requirements.lock names an index ("{address.group().strip()}"): each machine has its own; {REMEDY}'
    pins = dict(_pins(text))
    for name, (version, hashed) in pins.items():
        if not hashed:
            yield f"{name}=={version} has no hash in requirements.lock; {REMEDY}"
    for requirement in direct_requirements():
        version, _ = pins.get(canonicalize_name(requirement.name), ("", False))
        if not version or not requirement.specifier.contains(version, prereleases=True):
            yield f'requirements.lock has {version or "no version"} for "{requirement}"; {REMEDY}'


def _pins(text: str) -> Iterator[tuple[str, tuple[str, bool]]]:
    """Every pinned package with its version and whether it has a hash."""
    for entry in re.split(r"\n(?=\S)", text):
        if pin := _PIN.match(entry):
            yield canonicalize_name(pin.group(1)), (pin.group(2), "--hash=sha256:" in entry)


def main() -> int:
    """`python -m tests.lock [--upgrade]`: make the lock anew and check it."""
    parser = argparse.ArgumentParser(description="Make requirements.lock from pyproject.toml.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest version of everything that fits")
    compile_lock(upgrade=parser.parse_args().upgrade)
    found = list(faults(LOCK.read_text()))
    print("\n".join(found) or f"{LOCK.name} is made")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
