"""A stand-in for NVIDIA's legacy container runtime: it gives all GPUs to any container that sets a variable.

``python legacy_runtime.py CONFIG RUNC-WORD…``. It stands where runc would, under the real one's name, and does to a
container's config.json what NVIDIA's hook does to a container: `NVIDIA_VISIBLE_DEVICES=all` brings every GPU's device
node and the driver. This makes the danger real, so that a test can see it, and see the agent refuse the node.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

NAME: Final = "nvidia-container-runtime"


def install(folder: Path, runc: Path) -> Path:
    """The program, in a folder; until `arm` it does what runc does."""
    program = folder / NAME
    (folder / "config.json").write_text(json.dumps({"runc": str(runc)}))
    words = " ".join(
        f'"{one}"' for one in (sys.executable, "-I", "-S", Path(__file__).resolve(), folder / "config.json")
    )
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return program


def arm(folder: Path, edits: Mapping[str, Any], dev: Path, nodes: Sequence[str]) -> None:
    """From now on a container that asks for all GPUs gets these device nodes, and these edits of the driver."""
    there = folder / "config.json"
    values = json.loads(there.read_text()) | {**edits, "dev": str(dev), "nodes": list(nodes)}
    there.write_text(json.dumps(values))


def main() -> None:
    """Edit the bundle that is being created, and go on as runc."""
    here = json.loads(Path(sys.argv[1]).read_text())
    words = sys.argv[2:]
    if "create" in words and "--bundle" in words:
        bundle = Path(words[words.index("--bundle") + 1]) / "config.json"
        spec = json.loads(bundle.read_text())
        if "NVIDIA_VISIBLE_DEVICES=all" in spec["process"].get("env", ()):
            _give_all(spec, here)
            bundle.write_text(json.dumps(spec))
    os.execv(here["runc"], [here["runc"], *words])  # noqa: S606


def _give_all(spec: dict[str, Any], here: dict[str, Any]) -> None:
    spec["process"]["env"] += here["env"]
    spec["mounts"] += [
        {"source": one["hostPath"], "destination": one["containerPath"], "type": "bind", "options": one["options"]}
        for one in here["mounts"]
    ]
    spec["linux"].setdefault("devices", []).extend(_device(Path(here["dev"]) / name) for name in here["nodes"])


def _device(node: Path) -> dict[str, Any]:
    found = node.stat()
    kind = {"type": "c", "major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev), "fileMode": 0o666}
    assert stat.S_ISCHR(found.st_mode)
    return {"path": f"/dev/{node.name}", **kind, "uid": 0, "gid": 0}


if __name__ == "__main__":
    main()
