"""Settings of the operator: one frozen object, read once at start from a YAML file and the environment.

Nothing else in the controller reads the environment. An unknown or impossible setting stops the start with a sentence.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpu_tenancy.api.names import SYSTEM_NAMESPACE

ENVIRONMENT_PREFIX: Final = "GPU_TENANCY_"


class Settings(BaseModel):
    """What a platform team may tune."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kubeconfig: str | None = None
    """Path of a kubeconfig; absent: the pod's service account, else ~/.kube/config."""
    system_namespace: str = SYSTEM_NAMESPACE
    """Namespace of archived UsageRecords and of the agents' heartbeats: those of agents that are told another are not
    seen, and nothing is planned on their nodes."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port of /metrics, /healthz and /readyz; 0: any free one."""
    host: str = "0.0.0.0"  # noqa: S104  (a pod's own address; the embedded control plane passes the loopback)
    """Address to listen on."""
    coalesce_ms: int = Field(default=20, ge=0, le=1000)
    """How long to wait for further events before a cycle, in milliseconds, at least: as long as the last cycle was work
    where that is longer, up to 500 ms."""
    resync_seconds: int = Field(default=60, ge=5, le=3600)
    """How often all kinds are listed anew, against lost events, in seconds."""
    drain_grace_seconds: int = Field(default=30, ge=0, le=3600)
    """Longest grace of a tenant's pods after the end of their lease, in seconds."""
    max_in_flight: int = Field(default=32, ge=1, le=512)
    """Concurrent requests to the API server."""
    events: bool = True
    """Write Kubernetes Events on transitions."""

    @classmethod
    def load(cls, path: Path | None, **overrides: object) -> Self:
        """Settings from a file (if any), then GPU_TENANCY_… variables, then `overrides` that are not None.

        Raises ValueError with one sentence per wrong setting.
        """
        values = _read(path) if path else {}
        for name in cls.model_fields:
            if (text := os.environ.get(ENVIRONMENT_PREFIX + name.upper())) is not None:
                values[name] = text
        values.update({name: value for name, value in overrides.items() if value is not None})
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            sentences = [f"setting {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ValueError("; ".join(sentences)) from error


def _read(path: Path) -> dict[str, object]:
    """The settings in a file. Raises ValueError where it is not YAML or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"settings file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"settings file {path} is not a mapping; write one `name: value` per line")  # noqa: TRY004  (a wrong setting like any other)
    return values
