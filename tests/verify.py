"""`make verify`: makes everything generated anew, in place, and fails where that changed a file.

Compares with the files as they were before, not with git: it works in an unpacked archive too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gpu_tenancy.agent.proto import generate as protos
from gpu_tenancy.api import crd, reference
from tests import lock

ROOT: Final = Path(__file__).parent.parent


class Generated(NamedTuple):
    """Files that one generator makes, and nobody else."""

    folder: Path
    """Where they are."""
    pattern: str
    """Which files there are the generator's."""
    texts: Callable[[], Mapping[str, str]]
    """What each should hold, by file name."""


GENERATED: Final = (
    Generated(ROOT / "crds", "*", crd.crd_texts),
    Generated(ROOT / "docs", "reference.md", reference.reference_texts),
    Generated(protos.HERE, "*_pb2*.py*", protos.generate),
)


def differing(generated: Generated) -> Iterator[Path]:
    """Files that are missing, hold something else, or that the generator would not make."""
    texts = generated.texts()
    for path in sorted(generated.folder.glob(generated.pattern)):
        if path.name not in texts:
            yield path
    for name, text in texts.items():
        path = generated.folder / name
        if not path.exists() or path.read_text() != text:
            yield path


def renew(generated: Generated) -> list[Path]:
    """Bring the files to what the generator makes; the paths that this changed."""
    paths = list(differing(generated))
    texts = generated.texts() if paths else {}
    for path in paths:
        if path.name in texts:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path.name])
        else:
            path.unlink()
    return paths


def main() -> int:
    """Exit status: 0 where all was up to date."""
    changed = [path.relative_to(ROOT) for generated in GENERATED for path in renew(generated)]
    faults = list(lock.faults(lock.LOCK.read_text()))
    for path in changed:
        print(f"{path} was not what its source gives; `make verify` has made it anew: commit it")
    for fault in faults:
        print(fault)
    if not changed and not faults:
        print("Generated files and the lock are up to date")
    return 1 if changed or faults else 0


if __name__ == "__main__":
    sys.exit(main())
