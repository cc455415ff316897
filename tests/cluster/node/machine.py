"""The parent of every program of one real node, and the machine that they believe to be on.

Started as a script by boots.py, with nothing but the standard library on its path, as root on Linux. A booted machine
is a process namespace with a network and a mount table of its own: kubelet, containerd, shims and containers can leave
it in no way, so that killing its first process ends them all, and their mounts and network devices go with them. When
its standard input closes or its parent is gone it halts the machine and removes its folder and its control groups. It
may not import anything of this repository, and it knows nothing of Kubernetes but which files a node's programs write.

Standard input and output carry one JSON object per line:
    in   {"do": "boot", "name", "address"} | {"do": "start", "name", "argv", "env", "log", "inside"}
         {"do": "kill", "name"}; to kill the one that was booted is to cut the machine's power
    out  {"event": "ready", "directory", "ports"} | {"event": "started", "name", "pid"}
         {"event": "failed", "name", "message"} | {"event": "ended", "name", "pid", "status"}
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x00020000, 0x20000000, 0x40000000, 0x08000000
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8914, 0x8916, 0x891C, 1

# What a node's programs write to at fixed places, whatever their configuration says: each machine has its own.
OWN_FOLDERS = {
    "/run": {"containerd", "netns", "runc", "systemd"},
    "/var/lib": {"cni", "containerd", "kubelet"},
    "/var/log": {"containers", "pods"},
}
# kubelet sets these of the kernel, which all machines share: it is shown files that say what it wants to read.
SHOWN = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}

KUBELETS_CONTROLLERS = {"cpu", "cpuset", "hugetlb", "memory", "pids"}
NEEDED_CONTROLLERS = {"cpu", "memory", "pids"}

libc = ctypes.CDLL(None, use_errno=True)


class Machine:
    """One machine, on or off, and the programs on it."""

    def __init__(self, parent: int, directory: Path) -> None:
        self.directory = directory
        self.over = False
        self._parent = parent
        self._half_line = b""
        self._init: int | None = None
        self._init_name = ""
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._namespaces: dict[str, int] = {}
        self._lifeline = -1

    def run(self) -> None:
        """Serve requests until the input closes, a signal comes or the parent is gone; then leave nothing behind."""
        with contextlib.closing(wakeups()) as woken, selectors.DefaultSelector() as ready:
            ready.register(sys.stdin.fileno(), selectors.EVENT_READ, self._read)
            ready.register(woken, selectors.EVENT_READ, lambda: self._woken(woken))
            self._watch_parent(ready)
            while not self.over:
                for key, _ in ready.select():
                    key.data()
            self._halt(woken)
        remove_groups(self.directory.name)

    def _watch_parent(self, ready: selectors.BaseSelector) -> None:
        """End with the parent even if something it forked still holds the other end of our input."""
        try:
            ready.register(os.pidfd_open(self._parent), selectors.EVENT_READ, self._end)
        except ProcessLookupError:
            self._end()

    def _end(self) -> None:
        self.over = True

    def _read(self) -> None:
        received = os.read(sys.stdin.fileno(), 2**16)
        if not received:
            self._end()
        *lines, self._half_line = (self._half_line + received).split(b"\n")
        for line in lines:
            self._obey(json.loads(line))

    def _woken(self, woken: socket.socket) -> None:
        numbers = woken.recv(1024)
        if set(numbers) - {signal.SIGCHLD}:
            self._end()
        self._reap()

    def _obey(self, request: dict[str, Any]) -> None:
        name = request["name"]
        try:
            match request["do"]:
                case "boot":
                    self._boot(name, request["address"])
                case "start":
                    self._start(name, request)
                case "kill":
                    self._kill(name)
                case unknown:
                    raise ValueError(f"a machine knows no request {unknown!r}.")
        except (OSError, subprocess.SubprocessError) as error:
            say({"event": "failed", "name": name, "message": sentence(error)})

    # --- programs

    def _start(self, name: str, request: dict[str, Any]) -> None:
        enter = self._entrance() if request["inside"] else die_with_parent
        with Path(request["log"]).open("ab") as output:
            process = subprocess.Popen(
                request["argv"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=request["env"],
                preexec_fn=enter,  # noqa: PLW1509  (there are no threads here)
            )
        self._programs[name] = process
        say({"event": "started", "name": name, "pid": process.pid})

    def _entrance(self) -> Callable[[], None]:
        """What a child runs before its program, to be on the machine. (In its processes' namespace it was born.)"""
        if not self._namespaces:
            raise OSError(errno.EHOSTDOWN, "the machine is off")
        namespaces = dict(self._namespaces)

        def enter() -> None:
            die_with_parent()
            check(libc.setns(namespaces["net"], CLONE_NEWNET), "enter the machine's network")
            check(libc.setns(namespaces["ipc"], CLONE_NEWIPC), "enter the machine's memory segments")
            check(libc.setns(namespaces["mnt"], CLONE_NEWNS), "enter the machine's mounts")
            os.chdir(self.directory)

        return enter

    def _kill(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            if name == self._init_name and self._init is not None:
                os.kill(self._init, signal.SIGKILL)
            elif process := self._programs.get(name):
                process.kill()

    def _reap(self) -> None:
        for name, process in list(self._programs.items()):
            if process.poll() is not None:
                del self._programs[name]
                say({"event": "ended", "name": name, "pid": process.pid, "status": process.returncode})
        if self._init is not None and (status := ended(self._init)) is not None:
            self._off(status)

    # --- power

    def _boot(self, name: str, address: str) -> None:
        if self._init is not None:
            raise OSError(errno.EBUSY, "the machine is on already")
        boot_id = self.directory / "boot-id"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        make_groups(self.directory.name)
        check(libc.unshare(CLONE_NEWPID), "make a namespace of processes")
        lifeline, self._lifeline = os.pipe()
        told, telling = os.pipe()
        self._init, self._init_name = os.fork(), name
        if self._init == 0:
            init(address, self.directory, lifeline, telling, keep_out=self._lifeline)
        os.close(lifeline)
        os.close(telling)
        with os.fdopen(told) as answer:
            complaint = answer.read()
        if complaint:
            raise OSError(errno.EPERM, complaint)  # init has ended, and that will be noticed in a moment
        for kind in ("mnt", "net", "ipc"):
            self._namespaces[kind] = os.open(f"/proc/{self._init}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        say({"event": "started", "name": name, "pid": self._init})

    def _off(self, status: int) -> None:
        """Everything that ran on the machine has ended: the kernel ends its first process last."""
        pid, self._init = self._init, None
        for opened in (*self._namespaces.values(), self._lifeline):
            os.close(opened)
        self._namespaces.clear()
        # Back to our own namespace for children: in the dead one nothing can be started.
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        check(libc.setns(own, CLONE_NEWPID), "leave the machine's namespace of processes")
        os.close(own)
        remove_groups(self.directory.name)  # kubelet would spend seconds on what it takes for containers
        say({"event": "ended", "name": self._init_name, "pid": pid, "status": status})

    def _halt(self, woken: socket.socket) -> None:
        for name in (self._init_name, *self._programs):
            self._kill(name)
        self._reap()
        while self._init is not None or self._programs:
            woken.recv(1024)
            self._reap()


# ------------------------------------------------------------------------------------- the first process of a machine


def init(address: str, directory: Path, lifeline: int, telling: int, keep_out: int) -> None:
    """Set the machine up, say so by closing `telling` (or say why not), and be there until the lifeline is cut."""
    try:
        die_with_parent()
        os.close(keep_out)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)  # orphans of others are reaped by the kernel then
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())
        set_up(address, directory)
    except OSError as error:
        os.write(telling, sentence(error).encode())
        os._exit(1)
    os.close(telling)
    os.read(lifeline, 1)
    os._exit(0)


def set_up(address: str, directory: Path) -> None:
    """Mounts and network."""
    check(libc.unshare(CLONE_NEWNET), "make a namespace of networks")
    try_cable()  # in a network that goes away with the next line
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC), "make namespaces of mounts and network")
    mount("none", "/", "", MS_REC | MS_SLAVE)
    for folder, names in OWN_FOLDERS.items():
        if Path(folder).is_dir():
            own_folder(folder, names)
    mount("proc", "/proc", "proc")
    shown = directory / "sysctl"
    shown.mkdir(exist_ok=True)
    for name, value in SHOWN.items():
        source = shown / name.replace("/", ".")
        source.write_text(f"{value}\n")
        if Path("/proc/sys", name).exists():
            mount(str(source), f"/proc/sys/{name}", "", MS_BIND)
    mount(str(directory / "boot-id"), "/proc/sys/kernel/random/boot_id", "", MS_BIND)
    network(address)


def own_folder(folder: str, names: set[str]) -> None:
    """A folder in memory instead of that one: with all that is in it, but for `names`, which are new and empty."""
    before = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    entries = list(os.scandir(folder))
    mount("tmpfs", folder, "tmpfs")
    for entry in entries:
        if entry.name not in names:
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                show(entry, before, Path(folder, entry.name))
    for name in names:
        Path(folder, name).mkdir()
    os.close(before)


def show(entry: os.DirEntry[str], folder: int, place: Path) -> None:
    """Have an entry of that open folder, which is hidden by a mount, at a new place too."""
    if entry.is_symlink():
        place.symlink_to(os.readlink(entry.name, dir_fd=folder))
        return
    place.mkdir() if entry.is_dir() else place.touch()
    mount(f"/proc/self/fd/{folder}/{entry.name}", str(place), "", MS_BIND | MS_REC)


def try_cable() -> None:
    """Make a pair of virtual network devices: without them no pod gets an address, and kubelet would say so late."""
    kind = struct.pack("HH4s", 8, 1, b"veth")  # IFLA_INFO_KIND
    information = struct.pack("HH", 4 + len(kind), 18) + kind  # IFLA_LINKINFO
    # RTM_NEWLINK as a request to create, exclusively, and to acknowledge
    message = struct.pack("IHHII", 32 + len(information), 16, 0x0605, 1, 0) + bytes(16) + information
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.sendall(message)
        (number,) = struct.unpack_from("i", link.recv(4096), 16)
    if number:
        raise OSError(-number, f"cannot make a pair of virtual network devices (veth): {os.strerror(-number)}")


def network(address: str) -> None:
    """The loopback device, which also has the machine's own address: kubelet wants one that is not 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.255")):
            number = socket.inet_aton(value)
            fcntl.ioctl(control, request, struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, number))


# ------------------------------------------------------------------------------------------------------ control groups


def control_groups() -> Iterator[tuple[Path, set[str]]]:
    """Where hierarchies of control groups can be written, and their controllers.

    With version 1 several are mounted, each with some of the controllers; with version 2 there is one with all.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        place, (kind, _, options) = Path(before.split()[4]), after.split(" ", 2)
        if os.access(place, os.W_OK):
            if kind == "cgroup":
                yield place, set(options.split(","))
            elif kind == "cgroup2":
                yield place, set((place / "cgroup.controllers").read_text().split())


def make_groups(name: str) -> None:
    """A group in every hierarchy, for kubelet to make those of pods in."""
    hierarchies = list(control_groups())
    lacking = NEEDED_CONTROLLERS.difference(*(controllers for _, controllers in hierarchies))
    if lacking:
        raise OSError(errno.ENODEV, f"there are no writable control groups for {', '.join(sorted(lacking))}")
    for hierarchy, controllers in hierarchies:
        hand_down(hierarchy, controllers)
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # without them nothing can be put into a group of version 1
            if (hierarchy / "cgroup.clone_children").exists() and (group / setting).exists():
                (group / setting).write_text((hierarchy / setting).read_text())


def hand_down(hierarchy: Path, controllers: set[str]) -> None:
    """With version 2, controllers must be handed down to where kubelet shall use them; most hosts have done so."""
    enabled = hierarchy / "cgroup.subtree_control"
    if enabled.exists():
        for controller in controllers & KUBELETS_CONTROLLERS - set(enabled.read_text().split()):
            try:
                enabled.write_text(f"+{controller}")
            except OSError as error:
                what = f"the control group controller {controller} cannot be handed down below {hierarchy}"
                raise OSError(error.errno, f"{what}: {error.strerror}") from error


def remove_groups(name: str) -> None:
    """Remove them with all that was made in them; nothing runs there any more."""
    for hierarchy, _ in control_groups():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            remove_group(Path(folder))


def remove_group(group: Path) -> None:
    """Remove an empty group. The kernel may need a moment to see that its last process is gone."""
    for _ in range(100):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.02)
        else:
            return


# ------------------------------------------------------------------------------------------------------------- helpers


def mount(source: str, place: str, kind: str, flags: int = 0) -> None:
    """mount(2)."""
    check(libc.mount(source.encode(), place.encode(), kind.encode(), flags, None), f"mount {kind or source} on {place}")


def check(result: int, what: str) -> None:
    """Raise OSError when a call of libc failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {what}: {os.strerror(number)}")


def sentence(error: Exception) -> str:
    """What an error says, without its number."""
    own = isinstance(error, OSError) and error.filename is None and error.strerror
    return own or str(error) or type(error).__name__


def die_with_parent() -> None:
    """The kernel is to kill this process when the one that forked it ends in any manner."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def ended(pid: int) -> int | None:
    """Exit status of a child that has ended (the signal's number, negative, as subprocess has it), else None."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wakeups() -> socket.socket:
    """A socket that has a byte, the signal's number, for every signal that matters here."""
    waking, woken = socket.socketpair()
    waking.setblocking(False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(waking.detach())
    return woken


def say(event: dict[str, Any]) -> None:
    """Write one event; a reader that is gone is noticed on the input instead."""
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


def main(parent: int) -> None:
    """Create the folder, then be a machine for the process `parent`."""
    directory = Path(tempfile.mkdtemp(prefix="gpu-tenancy-"))
    try:
        with (directory / "machine.log").open("ab") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        say({"event": "ready", "directory": str(directory), "ports": []})
        Machine(parent, directory).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
