"""How the demo judges its story, without telling it."""

from __future__ import annotations

import io

from rich.console import Console

from tests.cluster.demo import FAILED, STORY_SECONDS, verdict


def judged(seconds: float) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=120)
    code = verdict(seconds, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue().strip()


def test_a_story_that_was_told_in_time_is_a_success() -> None:
    assert judged(STORY_SECONDS) == (0, "Every step was observed, in 90.0 s.")


def test_a_story_that_took_too_long_has_failed_and_says_how_long_it_took() -> None:
    told = "Every step was observed, but it took 90.6 s; at most 90 s are allowed."
    assert judged(STORY_SECONDS + 0.6) == (FAILED, told)
