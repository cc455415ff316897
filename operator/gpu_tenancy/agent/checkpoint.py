"""The agent's memory across restarts: one JSON file, replaced as a whole, and a lock that makes it one agent's.

It holds what neither hardware nor API server can tell after a kill: which instances are the agent's own, which claims
kubelet was given, what was published. It is written before the act that it tells of. Blocking; `Memory` calls it off
the event loop.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from gpu_tenancy.agent.gpus import GpuFacts
from gpu_tenancy.agent.situation import Counters, Fence, Former, Held, Made, PreparedClaim, Situation
from gpu_tenancy.api.base import ApiModel


class UnreadableCheckpoint(Exception):  # noqa: N818  (the message is the remedy)
    """The checkpoint is there but makes no sense: acting without it could hand out a device that is in use."""


class Checkpoint(ApiModel):
    """What is kept."""

    version: Literal[1] = 1
    """Format of the file."""
    boot_id: str = ""
    """Boot that the rest belongs to."""
    held: tuple[Held, ...] = ()
    """Devices in hand."""
    made: tuple[Made, ...] = ()
    """Instances of the agent's own making."""
    prepared: tuple[PreparedClaim, ...] = ()
    """Prepared claims."""
    former: dict[str, dict[int, Former]] = {}
    """Who had which memory slice of which GPU last."""
    fences: tuple[Fence, ...] = ()
    """Where nothing is made or served."""
    gpus: tuple[GpuFacts, ...] = ()
    """GPUs of this boot, as they were last seen: one that has fallen off the bus is not listed any more."""
    xids: dict[str, int] = {}
    """Xid events counted in this boot, by GPU."""
    examined: dict[str, Counters] = {}
    """What each GPU had counted at its last hand-over."""


def of(situation: Situation, boot_id: str) -> Checkpoint:
    """The part of a situation that has to survive; the same situation always gives the same text."""
    return Checkpoint(
        boot_id=boot_id,
        held=tuple(situation.held[device] for device in sorted(situation.held)),
        made=tuple(sorted(situation.made)),
        prepared=tuple(situation.prepared[uid] for uid in sorted(situation.prepared)),
        former={gpu: dict(sorted(situation.former[gpu].items())) for gpu in sorted(situation.former)},
        fences=situation.fences,
        gpus=tuple(situation.gpus[uuid] for uuid in sorted(situation.gpus)),
        xids=dict(sorted(situation.xids.items())),
        examined=dict(sorted(situation.examined.items())),
    )


def situation_of(checkpoint: Checkpoint) -> Situation:
    """The situation as far as a checkpoint tells it."""
    return Situation(
        held={held.slot.device: held for held in checkpoint.held},
        made=frozenset(checkpoint.made),
        prepared={claim.uid: claim for claim in checkpoint.prepared},
        former=checkpoint.former,
        fences=checkpoint.fences,
        gpus={gpu.uuid: gpu for gpu in checkpoint.gpus},
        xids=checkpoint.xids,
        examined=checkpoint.examined,
    )


def read(path: Path) -> Checkpoint:
    """The checkpoint in the file; an empty one where there is none. Raises UnreadableCheckpoint."""
    try:
        return Checkpoint.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Checkpoint()
    except (OSError, ValidationError) as error:
        raise UnreadableCheckpoint(
            f"checkpoint {path} cannot be read: {_sentence(error)}. Stop every pod that uses a GPU of this "
            f"node, move the file away and start the agent again; instances it made are then reported as not its own"
        ) from error


def _sentence(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return str(error)
    mistakes = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in mistakes[:3])


def write(path: Path, text: str) -> None:
    """Replace the file, so that after a crash at any moment it holds the old text or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lock(path: Path) -> IO[bytes] | None:
    """Become the one agent of this checkpoint until the file is closed or the process ends; None: another one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_suffix(".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
