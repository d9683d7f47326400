"""The options of `lmlab label-noise`. Imports no JAX."""

import math
from dataclasses import dataclass, field
from typing import Literal

import tyro

from lmlab.core.errors import check


@dataclass(frozen=True)
class HeadConfig:
    """How the members of the ensemble are made and trained."""

    kind: Literal["linear", "mlp"] = "linear"
    """On the features of an answer: a weighted sum, or one hidden layer."""
    hidden: int = 32
    """mlp: its units."""
    epochs: int = 2
    """Passes over the pairs; with many, members learn wrong labels by heart."""
    rate: float = 1e-3
    """Learning rate of AdamW; it falls to a tenth."""
    decay: float = 0.1
    """Its weight decay."""
    batch: int = 32
    """Pairs of a step."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("hidden", "epochs", "batch"):
            check(getattr(self, name) >= 1, f"--head.{name}", getattr(self, name), "at least 1")
        check(0 < self.rate < math.inf, "--head.rate", self.rate, "a positive learning rate")
        check(0 <= self.decay < math.inf, "--head.decay", self.decay, "0 or more, and finite")


@dataclass(frozen=True)
class LabelNoise:
    """Find the labels of a file of preferences that an ensemble disagrees with; write a treated copy and a page."""

    data: tyro.conf.Positional[str]
    """.jsonl or .jsonl.gz, a pair a line, as preference training reads it: chosen and rejected with a prompt, with
    messages, or as whole dialogues."""
    out: str = ""
    """Folder for cleaned.jsonl (.gz as the input), strength.jsonl and report.html; empty: runs/NAME-label-noise."""
    treat: Literal["soft", "weight", "flip", "drop", "none"] = "soft"
    """What is done. soft: every pair gets "target", the probability that its label is right, which training reads;
    weight: suspects get it as their "weight"; flip: chosen and rejected of suspects change places; drop: suspects are
    left out; none: a copy."""
    share: float = 0.0
    """The share of wrong labels, where it is known; 0: it is estimated. So many pairs of lowest strength are suspects,
    if it is below 0."""
    model: str = ""
    """Features of any model that lmlab reads, frozen: its states at the last token and their mean; empty: hashed words
    and pairs of words by tf-idf, which need no model."""
    folds: int = 5
    """Parts of the pairs, each of which is judged by members that were trained on the others; pairs of one prompt are
    in one part."""
    rounds: int = 10
    """Times that the pairs are dealt to folds: as many members judge each pair."""
    planted: float = 0.2
    """Share of labels that is flipped on purpose, in a second ensemble, to tell how many of them it finds; 0: none. As
    that one learns from more wrong labels, it finds fewer."""
    dimensions: int = 2048
    """Of the vectors of words."""
    length: int = 512
    """With --model: tokens of a prompt with both answers; longer prompts lose their beginning, longer answers their
    end."""
    invalid: Literal["error", "drop"] = "error"
    """What to do with a line that is no pair: end, or leave it out and count it."""
    rows: int = 100
    """Pairs of each kind on the page."""
    seed: int = 0
    """Of folds, shuffles and heads."""
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.folds >= 2, "--folds", self.folds, "at least 2: each is judged by members trained on the others")
        check(self.rounds >= 2, "--rounds", self.rounds, "at least 2 members to judge a pair")
        check(0 <= self.share < 0.5, "--share", self.share, "0, or a share below 0.5")
        check(0 <= self.planted < 0.5, "--planted", self.planted, "0, or a share below 0.5")
        check(self.dimensions >= 1, "--dimensions", self.dimensions, "at least 1")
        check(self.length >= 8, "--length", self.length, "at least 8: a prompt, two answers")
        check(self.rows >= 1, "--rows", self.rows, "at least 1")
        check(0 <= self.seed < 2**32, "--seed", self.seed, "from 0 to 2^32 - 1")
