"""What every container with a GPU needs of NVIDIA's driver, as CDI container edits.

Libraries, firmware files, hooks: NVIDIA's own tool knows them, and which they are changes with every driver. It is
asked once for each version, and its answer is kept. What is a device's own, its nodes, is left out: the agent adds
those of the claim. Starts nvidia-ctk; writes one file in the agent's state folder.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gpu_tenancy.agent import checkpoint
from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.settings import AgentSettings

SECONDS: Final = 60.0
"""How long nvidia-ctk may take."""
DEVICE_EDITS: Final = ("deviceNodes",)
"""Edits that are the claim's own matter: containers get the nodes of their devices, not those of all."""


def edits(settings: AgentSettings, version: str) -> Mapping[str, Any]:
    """The container edits for this version of the driver. Raises GpuError with what to do. Blocking."""
    if settings.driver_cdi is not None:
        return _common(_json(settings.driver_cdi), f"the file {settings.driver_cdi} (setting driver_cdi)")
    kept = settings.state_dir / f"driver-{version}.json"
    if not kept.exists():
        checkpoint.write(kept, _generate(settings))
    return _common(_json(kept), f"{settings.nvidia_ctk} cdi generate")


def _common(spec: Any, source: str) -> Mapping[str, Any]:  # noqa: ANN401  (whatever JSON was found)
    """The edits for all devices of a CDI specification."""
    found = spec.get("containerEdits") if isinstance(spec, dict) else None
    if not isinstance(found, dict):
        raise GpuError(f"{source} holds no CDI specification with containerEdits; update NVIDIA's container toolkit")
    return {name: value for name, value in found.items() if name not in DEVICE_EDITS}


def _generate(settings: AgentSettings) -> str:
    command = [settings.nvidia_ctk, "cdi", "generate", "--format=json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except FileNotFoundError:
        raise GpuError(
            f"there is no {settings.nvidia_ctk} on PATH, and without it no container gets the driver's libraries; "
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
