"""Killed at any NVML call, the agent goes on where it was: same end, no orphan, nothing served unscrubbed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from tests.cluster.world import ROOT, environment

SAMPLE: Final = 16
"""Kills of the sample."""
CHUNK: Final = 200
"""Kills that one warm process plays, where all of them are played."""
MOST: Final = 12_000
"""More calls than the script makes."""


def played(folder: Path, calls: Sequence[int]) -> list[dict[str, Any]]:
    """What came of each kill."""
    command = [sys.executable, "-m", "tests.unit.agent.crashing", str(folder), *map(str, calls)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def count_of_calls(folder: Path) -> int:
    """NVML calls of the script when nobody is killed."""
    [undisturbed] = played(folder, [0])
    assert undisturbed["trouble"] == ""
    count = int(undisturbed["calls"])
    assert 500 < count < MOST
    return count


def test_an_agent_killed_at_an_nvml_call_of_twenty_hand_overs_ends_where_it_would_have(
    tmp_path: Path, seed: int
) -> None:
    count = count_of_calls(tmp_path / "count")
    calls = sorted(Random(seed).sample(range(1, count - count // 20), SAMPLE))
    assert {one["call"]: one["trouble"] for one in played(tmp_path / "kills", calls) if one["trouble"]} == {}


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(1, MOST, CHUNK))
def test_an_agent_killed_at_every_nvml_call_of_twenty_hand_overs_ends_where_it_would_have(
    tmp_path: Path, first: int
) -> None:
    """Retries make the number of calls vary a little: a kill that comes too late is none."""
    count = count_of_calls(tmp_path / "count")
    calls = range(first, min(first + CHUNK, count + 1))
    outcomes = {one["call"]: one["trouble"] for one in played(tmp_path / "kills", calls)} if calls else {}
    assert {call: trouble for call, trouble in outcomes.items() if trouble and "fewer calls" not in trouble} == {}
