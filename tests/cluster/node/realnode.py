"""`RealNode`: a node with a real kubelet, containerd and runc that joins a running ControlPlane.

It may start programs only on its own Machine and write only into that machine's folder; it knows Kubernetes, but none
of gpu-tenancy's kinds. root on Linux; `missing` in possible.py says in a sentence what this machine lacks.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from tests.cluster import binaries
from tests.cluster.api import ApiError, Object
from tests.cluster.components import Component
from tests.cluster.control_plane import SOCKET_PATH_LIMIT, SOCKET_ROOM, ControlPlane, schedulable
from tests.cluster.eventually import eventually
from tests.cluster.node.images import write_archive
from tests.cluster.node.layout import NodeLayout, containerd, ctr, kubelet, write_files
from tests.cluster.node.machines import INIT, RELAY, Machine
from tests.cluster.node.procfs import below, mounts, namespace
from tests.cluster.processes import ProgramError

KUBELET: Final = "kubelet"
CONTAINERD: Final = "containerd"
_RELAY: Final = "relay-to-api-server"
_WORKS: Final = b"Starting to sync pod status with apiserver"
"""What kubelet says last when it starts."""


class RealNode:
    """Usage: ``async with RealNode(control_plane, "n1") as node: ...``, several side by side with different numbers.

    Everything ends, and the folder goes, when the block ends or when this process dies in any manner.
    """

    def __init__(
        self,
        control_plane: ControlPlane,
        name: str,
        *,
        number: int = 0,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        default_runtime: tuple[str, Path] | None = None,
        sync_frequency: str = "5s",
    ) -> None:
        """Nothing is started here. CPU and memory of the node are those of the machine that all this runs on.

        number: below 5000; nodes with different ones have different addresses.
        default_runtime: name and program of what containers are started with instead of runc; called just like runc,
            it ends with ``exec``ing the program "runc-unconfined" of `binaries.ensure` with its own arguments.
        sync_frequency: how often kubelet looks at a pod though nothing happened; its own default is "1m".
        """
        self.control_plane = control_plane
        self.name = name
        self._number = number
        self._labels = dict(labels or {})
        self._annotations = dict(annotations or {})
        self._default_runtime = default_runtime
        self._sync_frequency = sync_frequency
        self._machine = Machine()
        self._layout: NodeLayout | None = None
        self._asked = 0

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End everything and remove the folder. Can be repeated. The Node object stays, as when a server burns."""
        await asyncio.shield(self._machine.close())

    # --- what is where

    @property
    def layout(self) -> NodeLayout:
        """Folders, addresses and programs."""
        if self._layout is None:
            raise RuntimeError(f"the real node {self.name} is not running; use it in `async with`.")
        return self._layout

    @property
    def kubelet_root(self) -> Path:
        """kubelet's root folder, with ``plugins`` and ``plugins_registry``; its parent has nothing else in it."""
        return self.layout.kubelet_root

    @property
    def cdi_root(self) -> Path:
        """Where the container runtime looks for CDI files."""
        return self.layout.cdi_root

    @property
    def state_dir(self) -> Path:
        """A folder for the agent's checkpoint, which survives a reboot; its parent has nothing else in it."""
        return self.layout.directory / "agents" / self.name

    def boot_id(self) -> str:
        """Identity of the current boot, which is what programs on the node find where Linux has it."""
        return (self.layout.directory / "boot-id").read_text().strip()

    def log_tail(self, name: str, lines: int = 40) -> str:
        """The last lines of KUBELET, CONTAINERD or a program started by `spawn`."""
        return self._machine.log_tail(name, lines)

    # --- programs

    async def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> int:
        """Start any program on the node; it sees all processes there, and the API server at its usual address.

        Returns its process id as seen from here. It ends with the node or when its power is cut.
        """
        return await self._machine.start(name, command, env)

    async def kill(self, name: str) -> None:
        """kill -9, and wait for its end."""
        await self._machine.kill(name)

    def alive(self, name: str) -> bool:
        """Whether a program runs."""
        return self._machine.alive(name)

    async def kill_kubelet(self) -> None:
        """kill -9; pods run on."""
        await self._machine.kill(KUBELET)

    async def start_kubelet(self) -> None:
        """Start a kubelet that was killed, and wait until it is at work."""
        before = self.kubelet_log_end()
        await self._machine.start(KUBELET, kubelet(self.layout), self.layout.environment())
        await self.until_kubelet_says(_WORKS, before)

    async def restart_kubelet(self) -> None:
        """As `systemctl restart kubelet` does, only ruder."""
        await self.kill_kubelet()
        await self.start_kubelet()

    def kubelet_log_end(self) -> int:
        """Where in kubelet's log that begins which it will write from now on."""
        log = self._machine.log_of(KUBELET)
        return log.stat().st_size if log.exists() else 0

    async def until_kubelet_says(self, pattern: bytes, after: int, *programs: str) -> None:
        """Wait until kubelet's log matches a regular expression, beginning at a `kubelet_log_end` of before.

        Raises ProgramError when kubelet, or one of those programs on the node, ends meanwhile.
        """
        log = self._machine.log_of(KUBELET)

        async def look() -> bool:
            self._machine.check_alive([CONTAINERD, KUBELET, *programs])
            return re.search(pattern, log.read_bytes()[after:], re.DOTALL) is not None

        await eventually(f"the kubelet of {self.name} to say {pattern!r}", look)

    def pause_kubelet(self) -> None:
        """SIGSTOP: kubelet does nothing until it is resumed, and its plugins and the API server do not see why."""
        os.kill(self._machine.pid_of(KUBELET), signal.SIGSTOP)

    def resume_kubelet(self) -> None:
        """After `pause_kubelet`."""
        os.kill(self._machine.pid_of(KUBELET), signal.SIGCONT)

    async def cut_power(self) -> None:
        """Everything on the node ends at once; its disks keep what was on them."""
        await self._machine.cut_power()

    async def boot(self) -> None:
        """After `cut_power`: a new boot, with containerd and kubelet but nothing that `spawn` had started."""
        await self._boot()

    async def reboot(self) -> None:
        """Cut the power and boot."""
        await self.cut_power()
        await self.boot()

    async def cut_network(self) -> None:
        """The API server is out of reach from the node; pods run on."""
        await self._machine.kill(_RELAY)

    async def mend_network(self) -> None:
        """After `cut_network`."""
        port = str(urlsplit(self.control_plane.url).port)
        words = [sys.executable, "-I", "-S", str(RELAY), str(self._machine.pid_of(INIT)), "in", port, port]
        await self._machine.start_outside(_RELAY, words, dict(os.environ))

    async def reach(self, port: int) -> int:
        """A port here at which one on the node is reached, for metrics endpoints; for as long as this boot lasts."""
        name = f"relay-from-{port}"
        self._machine.log_of(name).unlink(missing_ok=True)
        words = [sys.executable, "-I", "-S", str(RELAY), str(self._machine.pid_of(INIT)), "out", "0", str(port)]
        await self._machine.start_outside(name, words, dict(os.environ))

        async def look() -> str:
            self._machine.check_alive([name])
            return self._machine.log_tail(name)

        return int(await eventually(f"a relay to port {port} of {self.name}", look))

    # --- pods

    async def logs(self, namespace: str, pod: str, container: str = "main") -> str:
        """What the containers of that name of the latest pod of its name have written, also after it is gone."""
        folders = self.layout.pod_logs.glob(f"{namespace}_{pod}_*/{container}")
        latest = max(folders, key=lambda folder: folder.parent.stat().st_mtime_ns, default=None)
        files = sorted(latest.glob("*.log")) if latest else []
        return "".join(f"{text}\n" for file in files for text in texts(file.read_text(errors="replace")))

    async def containers(self) -> list[str]:
        """Ids of what containerd has a running process for: containers and the sandboxes of pods."""
        listed = await self._ctr("tasks", "ls")
        rows = [line.split() for line in listed.splitlines()[1:]]
        return [row[0] for row in rows if row[2] == "RUNNING"]

    def processes(self, pod_uid: str) -> list[int]:
        """Ids, as seen from here, of the processes on the node that have files of that pod mounted."""
        init = self._machine.pid_of(INIT)
        # What the node itself runs has all pods' files mounted.
        own = namespace(init, "mnt")
        return [pid for pid in below(init) if namespace(pid, "mnt") != own and pod_uid in mounts(pid)]

    def all_processes(self) -> list[int]:
        """Ids, as seen from here, of everything that runs on the node but its first process."""
        return below(self._machine.pid_of(INIT))

    # --- start

    async def _start(self) -> None:
        wanted = [one.name for one in binaries.NODE]
        programs = await asyncio.to_thread(binaries.ensure, wanted)
        await self._machine.start_supervisor(0)
        self._layout = NodeLayout(
            name=self.name,
            directory=self._machine.directory,
            number=self._number,
            programs=programs,
            kubeconfig=self.control_plane.kubeconfig_for(f"system:node:{self.name}", ["system:nodes"]),
            authority=self.control_plane.directory / "pki" / "ca.crt",
            labels=self._labels,
            default_runtime=self._default_runtime,
            sync_frequency=self._sync_frequency,
        )
        if len(str(self.kubelet_root)) > SOCKET_PATH_LIMIT - SOCKET_ROOM:
            raise ValueError(f"{self.kubelet_root} is too long for unix sockets; set TMPDIR to /tmp.")
        write_files(self._layout)
        self.state_dir.mkdir(parents=True)
        await asyncio.to_thread(write_archive, self._layout.file("images.tar"))
        await self._boot()
        await self.until_ready()

    async def _boot(self) -> None:
        layout = self.layout
        await self._machine.boot(layout.address)
        await self.mend_network()
        await self._machine.start(CONTAINERD, containerd(layout), layout.environment())
        await eventually("containerd to answer", self._containerd_answers)
        await self._ctr("images", "import", "--local", "--snapshotter", "native", str(layout.file("images.tar")))
        await self.start_kubelet()

    async def until_ready(self) -> Object:
        """Wait until pods can be scheduled on the node; its Node."""
        path = f"/api/v1/nodes/{self.name}"

        async def look() -> Object | None:
            self._machine.check_alive([CONTAINERD, KUBELET, _RELAY])
            try:
                node = await self.control_plane.api.get(path)
            except ApiError as error:
                if error.code != 404:
                    raise
                return None
            return node if schedulable(node, Component.CONTROLLER_MANAGER in self.control_plane.components) else None

        try:
            await eventually(f"node {self.name} to become ready", look)
        except AssertionError as error:
            raise AssertionError(f"{error}\nkubelet: {self.log_tail(KUBELET)}") from error
        metadata = {"annotations": self._annotations}
        return await self.control_plane.api.patch(path, {"metadata": metadata})

    async def _containerd_answers(self) -> bool:
        self._machine.check_alive([CONTAINERD])
        try:
            await self._ctr("version")
        except ProgramError:
            return False
        return True

    async def _ctr(self, *words: str) -> str:
        self._asked += 1
        return await self._machine.run(f"ctr-{self._asked}", ctr(self.layout, *words), self.layout.environment())


def texts(log: str) -> list[str]:
    """What a container wrote: each line of its log begins with time, stream and a tag."""
    return [line.split(" ", 3)[3] for line in log.splitlines() if line.count(" ") >= 3]
