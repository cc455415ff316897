"""A control plane that outlives the command that started it: how it is remembered, found again and ended.

For ``up`` and ``down``. What is remembered is one small file in the user's state folder; the truth is the supervisor's
process, and a file whose process is gone is taken away. It ends nothing but a supervisor that such a file names.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from tests.cluster.control_plane import ControlPlane

PATIENCE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Detached:
    """A control plane that runs by itself."""

    supervisor_pid: int
    started: float
    """When the supervisor started (seconds since 1970): with the pid, its identity."""
    directory: Path
    """Its temporary folder: logs and keys."""
    kubeconfig: Path
    url: str

    def alive(self) -> bool:
        """Whether it still runs; another process that was given the same pid does not count."""
        return self._process() is not None

    def end(self) -> None:
        """End it with everything in it, and wait for that. No error when it has ended."""
        if process := self._process():
            process.terminate()
            try:
                process.wait(PATIENCE_SECONDS)
            except psutil.TimeoutExpired:
                process.kill()  # the kernel then kills its programs
        shutil.rmtree(self.directory, ignore_errors=True)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.supervisor_pid)
            same = abs(process.create_time() - self.started) < 0.01
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def state_file(name: str = "default", environ: Mapping[str, str] = os.environ) -> Path:
    """Where the detached control plane `name` is remembered (`$XDG_STATE_HOME` or `~/.local/state`)."""
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "gpu-tenancy" / f"{name}.json"


async def detach(control_plane: ControlPlane, path: Path, lifetime_seconds: float) -> Detached:
    """Let `control_plane`, and what it has spawned, outlive this process for at most `lifetime_seconds`.

    Remembered in `path`. The `async with` that it came from then ends without ending it.
    """
    pid = control_plane.supervisor_pid
    detached = Detached(
        supervisor_pid=pid,
        started=psutil.Process(pid).create_time(),
        directory=control_plane.directory,
        kubeconfig=control_plane.kubeconfig,
        url=control_plane.url,
    )
    # Remembered before it is let go: killed in between, it ends with us, and the file is found to be void.
    _remember(detached, path)
    await control_plane.detach(lifetime_seconds)
    return detached


def _remember(detached: Detached, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(detached, enc_hook=str))


def find(path: Path) -> Detached | None:
    """The control plane remembered in `path`, or None; what a dead one has left is removed."""
    try:
        detached = msgspec.json.decode(path.read_bytes(), type=Detached, dec_hook=lambda _, value: Path(value))
    except FileNotFoundError:
        return None
    if not detached.alive():
        shutil.rmtree(detached.directory, ignore_errors=True)
        path.unlink(missing_ok=True)
        return None
    return detached


def end(path: Path) -> bool:
    """End the control plane remembered in `path` and forget it. Returns whether there was one."""
    detached = find(path)
    if detached is None:
        return False
    detached.end()
    path.unlink(missing_ok=True)
    return True
