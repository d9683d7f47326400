"""What is said on stderr while text is tokenised: a bar for a person who waits, one line for a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE_SECONDS = 1.0
"""Shorter waits get no bar."""

Tell: TypeAlias = Callable[[int, int], None]
"""`tell(documents, tokens)`: the counts up to now."""


def say(text: str) -> None:
    """One line on stderr, so that stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def counting(label: str) -> Iterator[Tell]:
    """Show counts while the body calls the yielded function; a bar on a terminal, and one line at the end."""
    begin, counts = time.monotonic(), (0, 0)
    columns = (TextColumn(f"{label}  {{task.fields[counts]}}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None, counts="")

    def tell(documents: int, tokens: int) -> None:
        nonlocal counts
        counts = documents, tokens
        if bar.console.is_terminal and time.monotonic() - begin > PATIENCE_SECONDS:
            bar.start()  # Does nothing when it runs already.
            bar.update(task, counts=_describe(counts))

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()
    say(f"{label}  {_describe(counts)} in {time.monotonic() - begin:.1f} s")


def _describe(counts: tuple[int, int]) -> str:
    return f"{counts[0]:,} documents, {counts[1]:,} tokens"
