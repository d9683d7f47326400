"""Multiple choice by log-likelihood, counted as lm-evaluation-harness counts it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Params
from lmlab.evals.intervals import standard_error
from lmlab.evals.pairs import encode_pairs
from lmlab.inference.score import score
from lmlab.inference.text import TextCodec
from lmlab.models.lm import LM


@dataclass(frozen=True)
class Question:
    """A text and what may follow it."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""

    def __post_init__(self) -> None:
        """Check that it can be answered."""
        check(all(self.choices), "choices", self.choices, "texts that are not empty")
        check(0 <= self.answer < len(self.choices), "answer", self.answer, f"from 0 to {len(self.choices) - 1}")


class Choices(NamedTuple):
    """What a model makes of a list of questions."""

    values: dict[str, float]
    """acc, acc_norm, acc_bytes, each with its standard error (`acc_stderr`, ...)."""
    logprobs: list[np.ndarray]
    """Of the choices of each question, float64 [choices]."""


def answer_choices(
    lm: LM, params: Params, codec: TextCodec, questions: Sequence[Question], *, delimiter: str = " ",
    batch_tokens: int = 4096,
) -> Choices:  # fmt: skip
    """Score `delimiter + choice` after the context of each question; the most probable choice is the answer.

    acc goes by the log-probability, acc_norm by that over the characters of the choice and acc_bytes by that over its
    UTF-8 bytes (the names are lm_eval's; published acc_norm divides by characters). The first of equal choices counts.
    Raises `UserError` for no question, or one that is longer than the model's context.
    """
    check(len(questions) > 0, "questions", [], "at least one question")
    texts = [(question.context, delimiter + choice) for question in questions for choice in question.choices]
    pairs = encode_pairs(codec.encode_batch, codec.begin_ids or codec.end_ids[:1], texts)
    scored = score(lm, params, pairs, share_contexts=True, batch_tokens=batch_tokens)
    cuts = np.cumsum([len(question.choices) for question in questions])[:-1]
    logprobs = np.split(np.asarray([one.total for one in scored]), cuts)
    sizes = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode()),
    }
    values: dict[str, float] = {}
    for name, size in sizes.items():
        right_N = np.asarray([
            np.argmax(logprob / np.asarray([size(choice) for choice in question.choices])) == question.answer
            for question, logprob in zip(questions, logprobs, strict=True)
        ], np.float64)  # fmt: skip
        values |= {name: float(right_N.mean()), f"{name}_stderr": standard_error(right_N)}
    return Choices(values, logprobs)
