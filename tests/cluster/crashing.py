"""The real program, killed by itself after a given number of writes: ``python -m tests.cluster.crashing --after K …``.

Everything after the options is gpu-tenancy's own command line. Nothing is replaced: the one place that is told of every
request to the API server also counts the writes, and sends SIGKILL to its own process when the K-th was answered.
"""

import itertools
import os
import re
import signal
from collections.abc import Iterator
from typing import Final

import click

from gpu_tenancy.__main__ import main as gpu_tenancy
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.kube.client import RequestInfo

WRITES: Final = frozenset({"create", "update", "patch", "apply", "delete"})
_LINE: Final = re.compile(r"^write (\d+): (.+)$", re.MULTILINE)


def writes_in(log: str) -> list[str]:
    """The writes of the program's last run that its log tells of, in their order, such as "patch gpunodes"."""
    found: list[str] = []
    for number, what in _LINE.findall(log):
        found = [*(found if number != "1" else ()), str(what)]
    return found


def is_write(info: RequestInfo) -> bool:
    """Whether the request changed something that matters: an Event is a remark, a dry run stores nothing."""
    return info.verb in WRITES and 200 <= info.status < 300 and not info.dry_run and info.resource != "events"


def _name(info: RequestInfo) -> str:
    return f"{info.verb} {info.resource}" + (f"/{info.subresource}" if info.subresource else "")


def _crash_after(count: int) -> None:
    """Have this process kill itself as soon as it is told that its `count`-th write was answered."""
    count_request = Metrics.count_request
    numbers: Iterator[int] = itertools.count(1)

    def count_and_crash(metrics: Metrics, info: RequestInfo) -> None:
        count_request(metrics, info)
        if not is_write(info):
            return
        number = next(numbers)
        os.write(2, f"write {number}: {_name(info)}\n".encode())
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.count_request = count_and_crash  # type: ignore[method-assign,assignment]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--after", type=click.IntRange(min=1), required=True, help="Number of writes that are let through.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(after: int, arguments: tuple[str, ...]) -> None:
    """Run gpu-tenancy with these arguments until its write number AFTER."""
    _crash_after(after)
    gpu_tenancy.main(args=list(arguments))


if __name__ == "__main__":
    main()
