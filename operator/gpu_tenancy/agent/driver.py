"""What every container with a GPU needs of NVIDIA's driver, as CDI container edits.

Libraries, firmware files, hooks: NVIDIA's own tool knows them, and which they are changes with every driver. It is
asked once for each version, and its answer is kept. What is a device's own, its nodes, is left out: the agent adds
those of the claim. An agent in a pod sees the host's driver somewhere else than the host does, who is told its own
paths. Starts nvidia-ctk; writes one file in the agent's state folder. Source: CDI specification.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent.cdi import CDI_VERSION, DriverPart
from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.settings import AgentSettings

SECONDS: Final = 60.0
"""How long nvidia-ctk may take."""
DEVICE_EDITS: Final = ("deviceNodes",)
"""Edits that are the claim's own matter: containers get the nodes of their devices, not those of all."""
HOST_PATHS: Final = {"mounts": "hostPath", "hooks": "path"}
"""Edits with a path of the host's, and where it stands."""
_VERSION: Final = re.compile(r"\d+(\.\d+)+")


def part(settings: AgentSettings, version: str) -> DriverPart:
    """The container edits for this version of the driver. Raises GpuError with what to do. Blocking."""
    if settings.driver_cdi is not None:
        return _common(_json(settings.driver_cdi), f"the file {settings.driver_cdi} (setting driver_cdi)")
    command = _command(settings)
    asked = sha256("\0".join(command).encode()).hexdigest()[:8]
    kept = settings.state_dir / f"driver-{version}-{asked}.json"
    if not kept.exists():
        checkpoint.write(kept, _generate(command))
    found = _common(_json(kept), f"{settings.nvidia_ctk} cdi generate")
    return DriverPart(_as_host_sees(found.edits, settings), found.cdi_version)


def _common(spec: Any, source: str) -> DriverPart:  # noqa: ANN401  (whatever JSON was found)
    """The edits for all devices of a CDI specification."""
    found = spec.get("containerEdits") if isinstance(spec, dict) else None
    if not isinstance(found, dict):
        raise GpuError(f"{source} holds no CDI specification with containerEdits; update NVIDIA's container toolkit")
    version = str(spec.get("cdiVersion", CDI_VERSION))
    if not _VERSION.fullmatch(version):
        raise GpuError(f"{source} names the CDI version {version!r}, which is none; update NVIDIA's container toolkit")
    return DriverPart({name: value for name, value in found.items() if name not in DEVICE_EDITS}, version)


def _as_host_sees(edits: Mapping[str, Any], settings: AgentSettings) -> Mapping[str, Any]:
    """The same edits with the host's paths: what the runtime mounts into containers, and what it runs."""
    moved = dict(edits)
    for kind, key in HOST_PATHS.items():
        if kind in moved:
            moved[kind] = [{**one, key: _on_host(one[key], settings)} if key in one else one for one in moved[kind]]
    return moved


def _on_host(path: str, settings: AgentSettings) -> str:
    inside = Path(path)
    if not inside.is_relative_to(settings.driver_root):
        return path
    return str(settings.host_driver_root / inside.relative_to(settings.driver_root))


def _command(settings: AgentSettings) -> list[str]:
    command = [settings.nvidia_ctk, "cdi", "generate", "--format=json"]
    if settings.driver_root != Path("/"):
        command += [f"--driver-root={settings.driver_root}", f"--dev-root={settings.driver_root}"]
    return command


def _generate(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except FileNotFoundError:
        raise GpuError(
            f"there is no {command[0]} on PATH, and without it no container gets the driver's libraries; "
            f"install NVIDIA's container toolkit, or name a file of CDI container edits in the setting driver_cdi"
        ) from None
    except subprocess.TimeoutExpired:
        raise GpuError(f"{' '.join(command)} did not end within {SECONDS:.0f} s; run it by hand") from None
    if done.returncode != 0:
        raise GpuError(f"{' '.join(command)} failed with exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def _json(path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GpuError(f"{path} cannot be read as JSON: {error}; remove it, it is made anew") from None
