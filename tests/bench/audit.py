"""Who writes how often to the API server, by the API server's own audit log: the count of neither side that is counted.

The log holds one line per finished write (metadata only) with the client's User-Agent; every program here uses the same
administrator's certificate, so that the name alone would not tell them apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import yaml

OPERATOR: Final = "gpu-tenancy-operator"
AGENT: Final = "gpu-tenancy-agent"
"""User-Agents of the two programs."""
WRITES: Final = ("create", "update", "patch", "delete", "deletecollection")
REFUSED: Final = 300
"""Answers from here on mean that nothing was written."""
POLICY: Final = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "verbs": list(WRITES)}, {"level": "None"}],
}


class _Reference(msgspec.Struct, frozen=True, rename="camel"):
    resource: str = ""
    subresource: str = ""
    api_group: str = ""


class _Answer(msgspec.Struct, frozen=True):
    code: int = 0


class _Line(msgspec.Struct, frozen=True, rename="camel"):
    verb: str
    user_agent: str = ""
    request_uri: str = msgspec.field(name="requestURI", default="")
    object_ref: _Reference = _Reference()
    response_status: _Answer = _Answer()


_LINE: Final = msgspec.json.Decoder(_Line)


@dataclass(slots=True)
class Writes:
    """Writes of one program, refused ones included."""

    counted: Counter[str] = field(default_factory=Counter)
    """By verb and resource, refusals apart: everything that a lease causes."""
    events: int = 0
    """Kubernetes Events, which are for people and may be lost."""
    dry_runs: int = 0
    """Requests that store nothing."""
    heartbeats: int = 0
    """Renewals of coordination Leases: they depend on time and nodes, not on leases."""

    @property
    def total(self) -> int:
        """All that counts."""
        return self.counted.total()


class AuditLog:
    """The log of one API server, in a folder that exists."""

    def __init__(self, folder: Path) -> None:
        self._policy = folder / "policy.yaml"
        self._log = folder / "audit.log"
        self._policy.write_text(yaml.safe_dump(POLICY))

    @property
    def flags(self) -> list[str]:
        """What makes kube-apiserver write it: before the answer is sent, so that nothing seen is missing."""
        return [f"--audit-policy-file={self._policy}", f"--audit-log-path={self._log}", "--audit-log-mode=blocking"]

    def position(self) -> int:
        """The end of the log, for `since`."""
        return self._log.stat().st_size

    def since(self, position: int, program: str) -> Writes:
        """Writes of a program (its User-Agent) since then."""
        found = Writes()
        with self._log.open("rb") as file:
            file.seek(position)
            for text in file:
                line = _LINE.decode(text)
                if line.user_agent.split("/")[0].split(" ")[0] == program:
                    _count(found, line)
        return found


def _count(found: Writes, line: _Line) -> None:
    what = line.object_ref
    if "dryRun=All" in line.request_uri:
        found.dry_runs += 1
    elif what.resource == "events":
        found.events += 1
    elif (what.api_group, what.resource) == ("coordination.k8s.io", "leases"):
        found.heartbeats += 1
    else:
        resource = f"{what.resource}/{what.subresource}" if what.subresource else what.resource
        code = line.response_status.code
        found.counted[f"{line.verb} {resource}" + (f" answered {code}" if code >= REFUSED else "")] += 1
