"""How the story is told: as a live picture in a terminal, as plain lines anywhere else.

It shows what it is given and measures how long each step takes; it neither reads the cluster nor judges anything.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from tests.cluster.picture import Scene, Step, StepState, picture

FRAMES_PER_SECOND: Final = 6


class Telling:
    """The steps of a story and how far they are; on a terminal as a picture of `scene`, else line by line."""

    def __init__(self, titles: Sequence[str], console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.steps = [Step(title) for title in titles]
        self._began = time.monotonic()
        self._step_began = self._began

    @property
    def elapsed(self) -> float:
        """Seconds since the story began."""
        return time.monotonic() - self._began

    @asynccontextmanager
    async def drawn(self, scene: Callable[[], Scene]) -> AsyncIterator[None]:
        """While this context lasts the picture of the latest scene is on the terminal; elsewhere nothing is drawn.

        Drawn between the event loop's other work, so that no scene is taken while what it shows is being changed.
        """
        self._began = time.monotonic()
        if not self.live:
            yield
            return
        frame = _Frame(scene)
        with Live(get_renderable=lambda: frame, console=self.console, screen=True, auto_refresh=False) as live:
            drawing = asyncio.create_task(_draw(live))
            try:
                yield
            finally:
                drawing.cancel()
                with suppress(asyncio.CancelledError):
                    await drawing

    def say(self, text: str) -> None:
        """One line of the log, or the note below the present step."""
        for line in text.splitlines():
            if not self.live:
                self._print(f"  {line}")
        if text:
            self._change(note=text.splitlines()[-1])

    def awaits(self, what: str) -> None:
        """What the present step looks for; a picture shows it, a log does not."""
        self._change(awaits=what)

    @contextmanager
    def step(self, index: int) -> Iterator[Callable[[str], None]]:
        """A step of the story; call what this gives with what was seen. Marked as failed when the body raises."""
        self._step_began = time.monotonic()
        self.steps[index] = replace(self.steps[index], state=StepState.NOW)
        if not self.live:
            self._print(f"▶ {self.steps[index].title}")
        seen: list[str] = []
        try:
            yield seen.append
        except BaseException:
            self._end(index, StepState.FAILED, "")
            raise
        self._end(index, StepState.DONE, seen[-1] if seen else "")

    def present(self) -> tuple[Step, ...]:
        """The steps, with the time that the present one has taken so far."""
        return tuple(self._timed(step) if step.state is StepState.NOW else step for step in self.steps)

    def present_title(self) -> str:
        """Title of the step that failed or is being told; of the last one when all are done."""
        unfinished = (step.title for step in self.steps if step.state in (StepState.NOW, StepState.FAILED))
        return next(unfinished, self.steps[-1].title)

    def summary(self) -> None:
        """The steps with their times, for a terminal from which the picture has gone."""
        marks = {StepState.DONE: "✓", StepState.FAILED: "✗"}
        for step in self.steps if self.live else ():
            if step.state in marks:
                line = f"{marks[step.state]} {step.seconds:5.1f} s  {step.note or step.title}"
                self.console.print(line, markup=False, highlight=False)

    def _end(self, index: int, state: StepState, seen: str) -> None:
        step = self._timed(replace(self.steps[index], state=state, note=seen or self.steps[index].note))
        self.steps[index] = step
        mark = "✓" if state is StepState.DONE else "✗"
        if not self.live:
            self._print(f"{mark} {seen or step.title} ({step.seconds:.1f} s)")

    def _timed(self, step: Step) -> Step:
        return replace(step, seconds=time.monotonic() - self._step_began)

    def _change(self, **fields: str) -> None:
        for index, step in enumerate(self.steps):
            if step.state is StepState.NOW:
                self.steps[index] = replace(step, **fields)  # type: ignore[arg-type]

    def _print(self, line: str) -> None:
        # Lines of a log are not broken: whoever reads it searches in it.
        self.console.print(f"[{self.elapsed:6.2f} s] {line}", soft_wrap=True, markup=False, highlight=False)


class _Frame:
    """Draws the scene as it is when rich asks, in the terminal's present size."""

    def __init__(self, scene: Callable[[], Scene]) -> None:
        self._scene = scene

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield picture(self._scene(), options.max_width, options.height or console.height)


async def _draw(live: Live) -> None:
    while True:
        live.refresh()
        await asyncio.sleep(1 / FRAMES_PER_SECOND)
