"""Arms of a benchmark as processes of their own, which work one at a time when they are told to: what else the machine
does then meets all alike, and no arm's threads or memory disturb another's.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmlab.core.errors import UserError


@dataclass(frozen=True)
class Arm:
    """A running process that answers every line with a line of numbers."""

    name: str
    process: subprocess.Popen[str]

    def ask(self, what: str = "") -> list[float]:
        """Its numbers. Raises `UserError` where it has died."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("an arm talks through pipes")
        try:
            stdin.write(f"{what}\n")
            stdin.flush()
            numbers = [float(word) for word in stdout.readline().split()]
        except (BrokenPipeError, ValueError):
            numbers = []
        if not numbers:
            raise UserError("--arms", self.name, "an arm that runs here", "Its own message is above.")
        return numbers


def start(module: str, name: str, options: Sequence[str] = ()) -> Arm:
    """Start `python -m module --worker name ...`; its messages go to standard error."""
    command = [sys.executable, "-m", module, "--worker", name, *options]
    pipe = subprocess.PIPE
    root = Path(__file__).resolve().parents[1]
    return Arm(name, subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True))


def serve(build: Callable[[], Callable[[str], Sequence[float]]]) -> None:
    """The other side: answer every line of standard input. Whatever else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    answer = build()
    for line in sys.stdin:
        print(*answer(line.strip()), file=answers, flush=True)
