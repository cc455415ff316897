"""What runs on a machine, as /proc shows it from outside. Reads only; processes may end at any moment."""

from pathlib import Path


def below(init: int) -> list[int]:
    """All processes in the process namespace of that one and in those within, without itself."""
    own = namespace(init)
    children: dict[int, list[int]] = {}
    rest = []
    for pid in (int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal()):
        children.setdefault(parent(pid), []).append(pid)
        if own and namespace(pid) == own:
            rest.append(pid)
    found: set[int] = set()
    while rest:
        pid = rest.pop()
        if pid not in found:
            found.add(pid)
            rest += children.get(pid, [])
    return sorted(found - {init})


def parent(pid: int) -> int:
    """Its parent; 0 where there is none or it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def namespace(pid: int, kind: str = "pid") -> str:
    """Its namespace of that kind; empty where it has ended or is not ours to look at."""
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def mounts(pid: int) -> str:
    """Its mount table; empty where it has ended or is not ours to look at."""
    try:
        return Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return ""
