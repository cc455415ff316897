"""What a container gets of a prepared claim, as Container Device Interface files: one file per claim.

The container runtime reads the files, kubelet passes the names. Source: CDI specification 0.6.0. Blocking; small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gpu_tenancy.agent.situation import PreparedClaim, Situation
from gpu_tenancy.api.names import DRIVER

CDI_VERSION: Final = "0.6.0"
KIND: Final = f"{DRIVER}/device"


def device_id(claim: PreparedClaim, device: str) -> str:
    """Qualified CDI name of one device of a claim."""
    return f"{KIND}={_name(claim.uid, device)}"


def path_of(folder: Path, uid: str) -> Path:
    """The CDI file of a claim."""
    return folder / f"{DRIVER}-claim_{uid}.json"


def spec(situation: Situation, claim: PreparedClaim) -> dict[str, Any]:
    """The CDI file's content.

    NVIDIA's container runtime would add GPUs by environment variable; `void` tells it that all is done here.
    """
    return {
        "cdiVersion": CDI_VERSION,
        "kind": KIND,
        "devices": [
            {"name": _name(claim.uid, one.device), "containerEdits": _edits(situation, claim, one.requests, one.device)}
            for one in claim.devices
        ],
    }


def _edits(situation: Situation, claim: PreparedClaim, requests: Sequence[str], device: str) -> dict[str, Any]:
    """Each device of a request brings the same variables, listing all of them: the order does not matter then."""
    together = [one.device for one in claim.devices if set(one.requests) & set(requests)] or [device]
    uuids = [situation.held[name].uuid for name in together]
    variables: Mapping[str, str] = {
        "NVIDIA_VISIBLE_DEVICES": "void",
        "GPU_TENANCY_DEVICE": ",".join(together),
        "GPU_TENANCY_UUID": ",".join(uuids),
    }
    edits: dict[str, Any] = {"env": [f"{name}={value}" for name, value in variables.items()]}
    nodes = _nodes(situation, device)
    return edits | {"deviceNodes": [{"path": node} for node in nodes]} if nodes else edits


def _nodes(situation: Situation, device: str) -> tuple[str, ...]:
    shape = situation.held[device].shape
    return shape.nodes if shape else ()


def write(folder: Path, uid: str, content: Mapping[str, Any]) -> None:
    """Put the file of a claim in place at one stroke: the runtime never reads half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, uid)
    fresh = path.with_suffix(".new")  # the runtime reads .json and .yaml only
    fresh.write_text(json.dumps(content, indent=1))
    fresh.replace(path)


def remove(folder: Path, uid: str) -> None:
    """Take the file of a claim away; one that is gone is fine."""
    path_of(folder, uid).unlink(missing_ok=True)


def _name(uid: str, device: str) -> str:
    return f"{uid}-{device}"
