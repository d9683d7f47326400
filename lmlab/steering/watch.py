"""What the user watches: a table of particles in a terminal, plain lines elsewhere; both on standard error."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lmlab.steering.rounds import Round
from lmlab.steering.told import number, visible

FRAME_SECONDS, LINE_SECONDS = 0.12, 5.0
"""Time between frames in a terminal, and between lines where there is none."""
BAR = 10
"""Characters of the bar of the heaviest particle."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Watch:
    """Shows the particles round by round."""

    def __init__(
        self, rounds: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """A display for so many rounds at most."""
        self._most, self._clock = rounds, clock
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._shown = -LINE_SECONDS
        self._first: float | None = None
        self._tokens = 0

    @property
    def seconds(self) -> float:
        """Time since the first round, which compiles."""
        return 0.0 if self._first is None else self._clock() - self._first

    def update(self, made: int, one: Round, texts: Callable[[], Sequence[str]]) -> None:
        """Show a round. texts: gives those of the particles, where they are to be seen."""
        now = self._clock()
        if self._first is None:
            self._first = now
        else:
            self._tokens += sum(map(len, one.tokens))
        terminal = self._console.is_terminal
        if now - self._shown < (FRAME_SECONDS if terminal else LINE_SECONDS) and made < self._most:
            return
        self._shown = now
        head = self._head(made, one)
        if terminal:
            table = particle_table(one, texts(), self._console.height - 4, self._console.width)
            self._live.update(Group(Text(head, no_wrap=True, overflow="ellipsis"), table), refresh=True)
        else:
            self._console.print(head, markup=False, emoji=False, soft_wrap=True)

    def _head(self, made: int, one: Round) -> str:
        alive = int(np.sum(one.share_P > 0))
        parts = [
            f"round {made}/{self._most}", f"log Z {number(one.log_evidence, '.2f')}",
            f"effective size {one.effective:.1f}/{len(one.share_P)}", f"{int(np.sum(one.finished_P))} finished",
            f"{len(one.share_P) - alive} dead",
        ]  # fmt: skip
        if made > 1:
            parts.append(f"{self._tokens / self.seconds:,.0f} tok/s")
        return "  ".join(parts)

    def __enter__(self) -> Self:
        """Start the live display if there is a terminal."""
        if self._console.is_terminal:
            self._live.update(Text("reading the prompt and compiling"))
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clear the table: the result says more."""
        if self._console.is_terminal:
            self._live.stop()


def particle_table(one: Round, texts: Sequence[str], rows: int, width: int) -> Table:
    """As many particles as there are rows, heaviest first: weight, mark, and the end of the text."""
    table = Table.grid(padding=(0, 1))
    order = np.argsort(-one.share_P, kind="stable")
    shown = order[: max(1, rows - 1)] if len(order) > rows else order
    top = max(float(one.share_P.max()), 1e-30)
    room = max(8, width - BAR - 12)
    for p in shown:
        dead, finished = one.share_P[p] == 0, bool(one.finished_P[p])
        mark, style = ("x", "red") if dead else ("■", "green") if finished else (" ", "")
        tail = visible(texts[p])
        tail = tail if len(tail) <= room else f"…{tail[1 - room :]}"
        cells = Text(f"{one.share_P[p]:.3f}"), Text(bar(one.share_P[p] / top), "blue"), Text(mark, style)
        table.add_row(*cells, Text(tail, "dim" if dead else "", no_wrap=True, overflow="crop"))
    if len(order) > len(shown):
        table.add_row("", "", "", Text(f"{len(order) - len(shown)} more", "dim"))
    return table


def bar(share: float) -> str:
    """A bar of up to `BAR` characters, in eighths of one."""
    eighths = round(float(share) * BAR * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(BAR)
