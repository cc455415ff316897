"""The demo, `up` and `down` as a user starts them: exit codes, what they print, and that they leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.cluster.detached import find, state_file

ROOT = Path(__file__).parents[2]
FIRST = "✓ all 16 GPUs mine"
STEPS = (
    "✓ all 16 GPUs mine: 14 whole ones, and 2 in MIG mode on their 7g.80gb slice",
    "✓ train has 4 GPUs of gpu-b, ",
    "✓ evaluate has a 3g.40gb of a GPU of gpu-b, ",
    "✓ pretrain waits. Position 1 in the queue: needs room for 3 pods with 4 free GPUs",
    "✓ the Deployment notebook runs on its lease's device, a 2g.20gb of gpu-b",
    "✓ train was extended to 20m: ",
    "✓ notebook was given notice. The lease ends at ",
    "✓ evaluate is Completed. Job evaluate-1 finished.",
    "✓ notebook is Expired, 20 s billed. ",
    "✓ train is Deleted, ",
    "✓ pretrain got its place, 3 pods × 4 GPUs at once, and is Completed.",
    "✓ the bill of 4 UsageRecords is ",
    "✓ 16 GPUs × 8 slices × ",
    "✓ all 16 GPUs mine again",
)


@dataclass
class Told:
    """What a run of the demo has printed, its exit code, and the processes that it had."""

    lines: list[str] = field(default_factory=list)
    code: int | None = None
    children: list[psutil.Process] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"exit code {self.code}"])


def tell(interrupt_after: str | None = None) -> Told:
    """Run the demo without a terminal, to its end or to the Ctrl-C that follows a line."""
    told = Told()
    command = [sys.executable, "-m", "tests.cluster", "demo"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        try:
            assert demo.stdout is not None
            for line in demo.stdout:
                told.lines.append(line.rstrip("\n"))
                if FIRST in line and not told.children:
                    told.children = psutil.Process(demo.pid).children(recursive=True)
                if interrupt_after is not None and interrupt_after in line:
                    demo.send_signal(signal.SIGINT)
            told.code = demo.wait()
        finally:
            demo.terminate()
    return told


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "operator"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8", **more}


def still_there(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_the_demo_observes_every_step_and_leaves_nothing() -> None:
    told = tell()
    assert told.code == 0, told
    text = "\n".join(told.lines)
    found = [text.find(step) for step in STEPS]
    assert -1 not in found, (STEPS[found.index(-1)], str(told))
    assert found == sorted(found), told
    assert re.search(r"^Hand-over: train was Ready \d+\.\d\d s after it appeared", text, re.MULTILINE), told
    bill = {words[1]: words for line in told.lines if re.match(r"[0-9a-f]{8}-1 ", line) and (words := line.split())}
    assert {name: words[2:4] for name, words in bill.items()} == {
        "train": ["full", "4"],
        "evaluate": ["3g.40gb", "1"],
        "notebook": ["2g.20gb", "1"],
        "pretrain": ["full", "12"],
    }, told
    assert re.search(r"^Every step was observed, in \d+\.\d s\.$", text, re.MULTILINE), told
    assert len(told.children) > 8, "control plane, operator, two agents and kubelet's stand-in were to be seen"
    assert still_there(told.children) == []


@pytest.mark.exhaustive
def test_an_interrupted_demo_leaves_nothing() -> None:
    told = tell(interrupt_after=FIRST)
    assert told.code == 130, told
    assert told.lines[-1] == "Interrupted; everything was ended and removed."
    assert len(told.children) > 8
    assert still_there(told.children) == []


def test_up_leaves_a_world_that_kubectl_can_use_and_down_ends_it(tmp_path: Path) -> None:
    env = environment(XDG_STATE_HOME=str(tmp_path))

    def typed(command: str) -> str:
        shell = ["sh", "-c", command]
        done = subprocess.run(shell, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    python = f'"{sys.executable}" -m tests.cluster'
    assert "Nothing to end" in typed(f"{python} down")
    said = typed(f"{python} up")
    world = find(state_file(environ=env))
    assert world is not None, said
    processes = [psutil.Process(world.supervisor_pid)]
    processes += processes[0].children(recursive=True)
    try:
        assert "All 16 GPUs are mining." in said
        exports = "; ".join(line for line in said.splitlines() if line.startswith("  export "))
        assert typed(f"{exports}; kubectl get gpun -o name").split() == [
            "gpunode.gpu-tenancy.dev/gpu-a",
            "gpunode.gpu-tenancy.dev/gpu-b",
        ]
        tries = [line.split("#")[0] for line in said.splitlines() if line.startswith("  kubectl ")]
        assert len(tries) == 3
        assert "train created" in typed(f"{exports}; {tries[0]}")
        typed(f"{exports}; kubectl wait --for=condition=Ready gpul/train -n team-a --timeout=60s")
        assert re.search(r"train +Ready +4 +full +gpu-b", typed(f"{exports}; {tries[1]}"))
        assert "deleted" in typed(f"{exports}; {tries[2]}")
        again = typed(f"{python} up")
        assert "It runs already." in again
        assert str(world.kubeconfig) in again
    finally:
        ended = typed(f"{python} down")
    assert "Ended" in ended
    assert still_there(processes) == []
    assert not world.directory.exists()
