"""The real program, stopped by itself in mid-cycle: ``python -m tests.cluster.pausing --after "patch gpuleases" …``.

Everything after the options is gpu-tenancy's own command line. As soon as the first write of that kind was answered the
program sends SIGSTOP to its own process: what it has planned is not done yet, and what happens until somebody sends
SIGCONT is certain to come between. After that it is the program as it always is.
"""

import os
import signal

import click

from gpu_tenancy.__main__ import main as gpu_tenancy
from gpu_tenancy.controller.metrics import Metrics
from gpu_tenancy.kube.client import RequestInfo
from tests.cluster.crashing import is_write


def _pause_after(write: str) -> None:
    """Have this process stop itself, once, as soon as it is told that such a write was answered."""
    count_request = Metrics.count_request
    paused = False

    def count_and_pause(metrics: Metrics, info: RequestInfo) -> None:
        nonlocal paused
        count_request(metrics, info)
        if not paused and is_write(info) and info.subresource is None and f"{info.verb} {info.resource}" == write:
            paused = True
            os.kill(os.getpid(), signal.SIGSTOP)

    Metrics.count_request = count_and_pause  # type: ignore[method-assign,assignment]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--after", "write", required=True, help='The kind of write, such as "patch gpunodes".')
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(write: str, arguments: tuple[str, ...]) -> None:
    """Run gpu-tenancy with these arguments, stopped after the first WRITE."""
    _pause_after(write)
    gpu_tenancy.main(args=list(arguments))


if __name__ == "__main__":
    main()
