"""What is said on stderr while text is prepared: a bar for a person who waits, one line for a log."""

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
Advance: TypeAlias = Callable[[int], None]
"""`advance(done)`: how much of a known whole is done."""


def say(text: str) -> None:
    """One line on stderr, so that stdout stays free for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def counting(label: str) -> Iterator[Tell]:
    """Show counts while the body calls the yielded function; a bar on a terminal, and one line at the end."""
    with _bar(label, None) as show:
        show(0, _describe(0, 0))
        yield lambda documents, tokens: show(documents, _describe(documents, tokens))


@contextmanager
def advancing(label: str, total: int, unit: str = "documents") -> Iterator[Advance]:
    """The same of work whose size is known; nothing is said if nothing is done."""
    with _bar(label, total) as show:
        yield lambda done: show(done, f"{done:,} of {total:,} {unit}")


@contextmanager
def _bar(label: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    begin, text = time.monotonic(), ""
    columns = (TextColumn(f"{label}  {{task.fields[counts]}}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total, counts="")

    def show(done: int, counts: str) -> None:
        nonlocal text
        text = counts
        if bar.console.is_terminal and time.monotonic() - begin > PATIENCE_SECONDS:
            bar.start()  # Does nothing when it runs already.
            bar.update(task, counts=text, completed=done)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
    if text:
        say(f"{label}  {text} in {time.monotonic() - begin:.1f} s")


def _describe(documents: int, tokens: int) -> str:
    return f"{documents:,} documents, {tokens:,} tokens"
