"""Settings of preference data. Imports no JAX."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from lmlab.core.errors import check
from lmlab.data.config import Files


@dataclass(frozen=True)
class PairsConfig:
    """Pairs of answers of which one was preferred: .jsonl or .jsonl.gz, one a line.

    A line has "chosen" and "rejected": texts, messages [{"role", "content"}, ...], or whole dialogues of Human and
    Assistant as in Anthropic's HH; with a "prompt" (or "instruction" and "input"; or "messages" or "conversation"), or
    with what both have in common as the prompt. "weight", "margin" and "target", the probability that the label is
    right, may stand beside.
    """

    train: str
    """Glob of the training files; ** matches folders."""
    heldout: str = ""
    """Glob of the held-out files. Empty: a share of the lines is held out, by content hash."""
    heldout_percent: int = 4
    """That share, in percent."""
    layout: Literal["shared", "apart"] = "shared"
    """shared: both answers follow one copy of the prompt, and do not see each other; apart: each follows a copy of its
    own, for attention kernels that take no such mask (splash on TPUs)."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What to do with a pair whose answers do not fit a row: drop it, or cut them. A prompt that does not fit loses its
    beginning in any case; all is counted and told."""
    invalid: Literal["error", "drop"] = "error"
    """What to do with a line that is no pair, or has an empty answer. Equal answers are dropped and counted."""
    date: str = "2024-07-26"
    """The date that templates which ask for it are told: fixed, so that the data are the same on every day."""
    length: int = 512
    """T: the tokens of a row; a row holds as many pairs as it has room for."""
    batch_size: int = 8
    """B: rows in a global batch, over all hosts."""
    seed: int = 0
    """Seed of the order of rows."""
    prefetch: int = 4
    """Batches made ahead of the train step."""

    def __post_init__(self) -> None:
        """Check the ranges, and by `Files` the globs."""
        check(self.length >= 4, "data.length", self.length, "at least 4: a prompt, two answers")
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1 row")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1 batch")
        try:
            datetime.fromisoformat(self.date)
        except ValueError:
            check(False, "data.date", self.date, "a date such as 2024-07-26")
        self.files()

    def files(self) -> Files:
        """What is read."""
        return Files(self.train, self.heldout, self.heldout_percent)
