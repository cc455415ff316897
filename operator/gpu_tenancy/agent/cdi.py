"""What a container gets of a prepared claim, as Container Device Interface files: one file per claim.

The container runtime reads the files, kubelet passes the names. What every container with a GPU needs of the driver
comes from NVIDIA's own tool (`driver`); here the device nodes of the claim's own devices are added, the variables, and
a folder that bears the claim's UID: whoever has it among its mounts was given the claim, whatever pod it is of. Source:
CDI specification 0.6.0. Blocking; small.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.situation import PreparedClaim, Situation
from gpu_tenancy.api.names import DRIVER

CDI_VERSION: Final = "0.6.0"
"""What the agent's own edits need."""
KIND: Final = f"{DRIVER}/device"
MARKS: Final = "/run/gpu-tenancy/claims"
"""Folder in a container that holds a folder for each claim it was given."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DriverPart:
    """What every container with a GPU needs of NVIDIA's driver."""

    edits: Mapping[str, Any] = field(default_factory=dict)
    """CDI container edits."""
    cdi_version: str = CDI_VERSION
    """Version of the CDI specification that they need."""


NO_DRIVER: Final = DriverPart()
"""Nothing is needed: for GPUs that are in memory only."""


class ClaimFiles:
    """The CDI files of one node's claims, and the folders that mark who has which claim."""

    def __init__(self, settings: AgentSettings, driver: DriverPart) -> None:
        self._cdi = settings.cdi_root
        self._marks = settings.state_dir / "claims"
        self._dev_root = settings.dev_root
        self._driver = driver

    def write(self, situation: Situation, claim: PreparedClaim) -> None:
        """Put the file of a claim in place at one stroke: the runtime never reads half of it. Raises OSError."""
        mark = self._marks / claim.uid
        mark.mkdir(parents=True, exist_ok=True)
        content = spec(situation, claim, self._driver, mark, self._dev_root)
        self._cdi.mkdir(parents=True, exist_ok=True)
        path = path_of(self._cdi, claim.uid)
        fresh = path.with_suffix(".new")  # the runtime reads .json and .yaml only
        fresh.write_text(json.dumps(content, indent=1))
        fresh.replace(path)

    def remove(self, uid: str) -> None:
        """Take the file of a claim away; one that is gone is fine. Raises OSError."""
        path_of(self._cdi, uid).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (self._marks / uid).rmdir()

    def remove_all_but(self, claims: Collection[str]) -> None:
        """Take away what claims left that are not prepared any more: an agent was killed before it could."""
        here = {path.stem.rpartition("_")[2] for path in self._cdi.glob(f"{DRIVER}-claim_*.json")}
        marked = {path.name for path in self._marks.glob("*")}
        for uid in sorted((here | marked) - set(claims)):
            _log.info("Removing the CDI file of claim %s, which is not prepared.", uid)
            self.remove(uid)


def device_id(claim: PreparedClaim, device: str) -> str:
    """Qualified CDI name of one device of a claim."""
    return f"{KIND}={_name(claim.uid, device)}"


def path_of(folder: Path, uid: str) -> Path:
    """The CDI file of a claim."""
    return folder / f"{DRIVER}-claim_{uid}.json"


def spec(situation: Situation, claim: PreparedClaim, driver: DriverPart, mark: Path, dev_root: Path) -> dict[str, Any]:
    """The CDI file's content.

    NVIDIA's container runtime would add GPUs by environment variable; `void` tells it that all is done here.
    """
    return {
        "cdiVersion": max(CDI_VERSION, driver.cdi_version, key=_version),
        "kind": KIND,
        "containerEdits": _joined(driver.edits, _for_all(claim, mark)),
        "devices": [
            {"name": _name(claim.uid, one.device), "containerEdits": _edits(situation, claim, one.device, dev_root)}
            for one in claim.devices
        ],
    }


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _for_all(claim: PreparedClaim, mark: Path) -> dict[str, Any]:
    """What every container with any device of the claim gets."""
    options = ["ro", "nosuid", "nodev", "noexec", "bind"]
    mount = {"hostPath": str(mark), "containerPath": f"{MARKS}/{claim.uid}", "options": options}
    return {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": [mount]}


def _joined(driver: Mapping[str, Any], ours: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Both edits; lists are joined, ours last."""
    return {**driver, **{key: [*driver.get(key, ()), *values] for key, values in ours.items()}}


def _edits(situation: Situation, claim: PreparedClaim, device: str, dev_root: Path) -> dict[str, Any]:
    """Each device of a request brings the same variables, listing all of them: the order does not matter then."""
    requests = {request for one in claim.devices if one.device == device for request in one.requests}
    together = [one.device for one in claim.devices if set(one.requests) & requests] or [device]
    uuids = [situation.held[name].uuid for name in together]
    variables = {"GPU_TENANCY_DEVICE": ",".join(together), "GPU_TENANCY_UUID": ",".join(uuids)}
    edits: dict[str, Any] = {"env": [f"{name}={value}" for name, value in variables.items()]}
    nodes = [_node(path, dev_root) for path in _nodes(situation, device)]
    return edits | {"deviceNodes": nodes} if nodes else edits


def _node(path: str, dev_root: Path) -> dict[str, str]:
    """A device node; where the host has it elsewhere, the runtime is told where."""
    host = dev_root / path.removeprefix("/")
    return {"path": path} if str(host) == path else {"path": path, "hostPath": str(host)}


def _nodes(situation: Situation, device: str) -> Sequence[str]:
    shape = situation.held[device].shape
    return shape.nodes if shape else ()


def _name(uid: str, device: str) -> str:
    return f"{uid}-{device}"
