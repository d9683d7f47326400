"""What the user watches: a live bar in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10.0
"""Time between lines where there is no terminal."""
MEMORY = 0.95
"""Weight of the past in the average time of a step."""


class Progress:
    """Shows step, loss, bits per byte, speed and time left."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        """A display for the steps from `start_step` to `total_steps`."""
        self._total, self._step, self._clock = total_steps, start_step, clock
        self._mark: float | None = None
        self._shown = -LINE_SECONDS
        self._seconds_per_step: float | None = None
        self._console = Console(file=sys.stdout, highlight=False)
        self._bar = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[values]}"),
            console=self._console, auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total_steps, completed=start_step, values="compiling")
        self._live = Live(self._bar, console=self._console, auto_refresh=False, transient=False)

    def update(self, step: int, values: Mapping[str, float], tokens_per_second: float) -> None:
        """Show the newest step."""
        now = self._clock()
        # The first interval is compilation, not pace.
        if self._mark is not None and step > self._step:
            self._learn_pace((now - self._mark) / (step - self._step))
        self._step, self._mark = step, now
        text = self._describe(values, tokens_per_second)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, values=text)
            self._live.refresh()
        elif now - self._shown >= LINE_SECONDS or step == self._total:
            self._shown = now
            self.say(f"step {step}/{self._total}  {text}")

    def _learn_pace(self, seconds: float) -> None:
        past = self._seconds_per_step
        self._seconds_per_step = seconds if past is None else MEMORY * past + (1 - MEMORY) * seconds

    def seconds_left(self) -> float:
        """Time to the last step at the recent pace."""
        return (self._total - self._step) * (self._seconds_per_step or 0.0)

    def _describe(self, values: Mapping[str, float], tokens_per_second: float) -> str:
        parts = [f"loss {values['loss']:.3f}"]
        if "bits_per_byte" in values:
            parts.append(f"{values['bits_per_byte']:.3f} bits/byte")
        if self._seconds_per_step is None:
            return "  ".join(parts)
        left = round(self.seconds_left())
        hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
        eta = f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
        return "  ".join([*parts, f"{tokens_per_second:,.0f} tok/s", f"ETA {eta}"])

    def say(self, text: str) -> None:
        """Show lines above the bar. The text is shown as it is, brackets and all."""
        self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    def __enter__(self) -> Self:
        """Start the live display if there is a terminal."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._console.is_terminal:
            self._live.stop()
