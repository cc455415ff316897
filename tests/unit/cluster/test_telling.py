"""How the story is told: lines where there is no terminal, a picture where there is one."""

import asyncio
import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from tests.cluster.picture import Scene, StepState
from tests.cluster.telling import Telling

TITLES = ("all mine", "one rents")


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    # Without the elapsed seconds, which are a machine's matter.
    return [line.split("] ", 1)[-1] for line in console.file.getvalue().splitlines()]


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), width=40)


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)


def test_a_log_has_one_line_for_each_thing_however_long_it_is(log: Console) -> None:
    telling = Telling(TITLES, log)
    with telling.step(0) as saw:
        telling.say("$ kubectl apply -f a.yaml\ncreated")
        telling.awaits("what no log needs")
        saw("all mine: [bold] " + "x" * 60)
    assert lines(log) == [
        "▶ all mine",
        "  $ kubectl apply -f a.yaml",
        "  created",
        f"✓ all mine: [bold] {'x' * 60} ({telling.steps[0].seconds:.1f} s)",
    ]


def test_a_step_whose_body_raises_has_failed_and_is_the_present_one(log: Console) -> None:
    telling = Telling(TITLES, log)
    with telling.step(0) as saw:
        saw("fine")
    with pytest.raises(RuntimeError, match="nobody"), telling.step(1):
        raise RuntimeError("nobody")
    assert [step.state for step in telling.steps] == [StepState.DONE, StepState.FAILED]
    assert telling.present_title() == "one rents"
    assert lines(log)[-1].startswith("✗ one rents (")


def test_a_terminal_has_the_picture_and_afterwards_the_steps(terminal: Console) -> None:
    telling = Telling(TITLES, terminal)

    def scene() -> Scene:
        return Scene(datetime(2026, 3, 1, 12, 0, tzinfo=UTC), telling.elapsed, steps=telling.present())

    async def tell() -> None:
        async with telling.drawn(scene):
            with telling.step(0) as saw:
                telling.say("$ kubectl apply -f a.yaml")
                await asyncio.sleep(0)  # others may work: the picture is drawn
                saw("all 16 mine")

    asyncio.run(tell())
    telling.summary()
    assert isinstance(terminal.file, io.StringIO)
    text = terminal.file.getvalue()
    assert "leased 0  mining 0" in text
    assert "$ kubectl apply -f a.yaml" in text
    assert "▶ all mine" not in text, "the log's lines would tear the picture"
    assert text.splitlines()[-1].endswith("all 16 mine")


def test_a_picture_that_cannot_be_drawn_is_not_hidden(terminal: Console) -> None:
    async def tell() -> None:
        async with Telling(TITLES, terminal).drawn(lambda: Scene(datetime(2026, 3, 1, tzinfo=UTC), 0.0, nodes=[{}])):
            await asyncio.sleep(0.01)

    with pytest.raises(KeyError, match="metadata"):
        asyncio.run(tell())
