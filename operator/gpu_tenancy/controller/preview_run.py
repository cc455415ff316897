"""`gpu-tenancy plan`: reads a cluster and manifests, and prints what the next cycle would do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from gpu_tenancy.controller import preview_tables
from gpu_tenancy.controller.preview import BadInputError, load, manifests, preview, save, take
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.kube.errors import KubeError


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be looked at."""

    files: tuple[Path, ...] = ()
    snapshot: Path | None = None
    save: Path | None = None
    settings: Path | None = None
    kubeconfig: str | None = None
    output: Literal["table", "json"] = "table"


async def run(order: Order, console: Console) -> int:
    """Print, and return the exit status. Raises ValueError with a sentence where something cannot be read."""
    with _quiet():
        return await _run(order, console)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the operator's warnings: what cannot be read stands in the table."""
    log = logging.getLogger("gpu_tenancy")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


async def _run(order: Order, console: Console) -> int:
    settings = Settings.load(order.settings, kubeconfig=order.kubeconfig)
    new = list(manifests(order.files))
    if order.snapshot is not None:
        taken = load(order.snapshot)
    else:
        try:
            taken = await take(settings.kubeconfig, settings)
        except KubeError as error:
            raise BadInputError(f"the cluster cannot be listed: {error}") from error
    if order.save is not None:
        save(taken, order.save)
    found = await preview(taken, new, settings)
    if order.output == "json":
        console.print_json(json.dumps(preview_tables.as_json(found)))
    else:
        for part in preview_tables.tables(found):
            console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return preview_tables.status(found)
