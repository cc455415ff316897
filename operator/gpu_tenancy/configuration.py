"""How both processes are configured: a frozen object, read once at start from a YAML file and the environment.

An unknown or impossible setting stops the start with a sentence. Nothing else reads the environment for settings.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

ENVIRONMENT_PREFIX: Final = "GPU_TENANCY_"


class Configuration(BaseModel):
    """Base of the settings of one process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
