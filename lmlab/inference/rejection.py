"""Exact draws from a posterior, one after another: what sequential Monte Carlo is measured against.

Other baselines need no code of their own. Importance sampling is `standard(threshold=0)`: particles that are never
chosen anew. Masked decoding is the same with a program that observes a mask before it draws, and weights forgotten. The
best of N is `max(sample(...), key=lambda one: one.logprobs.sum())` of `lmlab.inference.sample`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import Sample, sample
from lmlab.models.lm import LM


@dataclass(frozen=True)
class Accepted:
    """Texts of the posterior, independent and all of the same weight."""

    samples: list[Sample]
    draws: int
    """How many texts were drawn up to the last one that was wanted, or in all."""
    enough: bool
    """Whether as many as wanted were accepted."""

    @property
    def evidence(self) -> float:
        """An unbiased estimate of Z, the share of texts that are accepted (Girshick, Mosteller & Savage 1946).

        Who stops at an acceptance has one acceptance too many; who stops at a number of draws has not.
        """
        last = int(self.enough)
        return (len(self.samples) - last) / (self.draws - last)


def rejection(
    lm: LM, params: Params, prompt: np.ndarray, accept: Callable[[Sample], bool], key: Key, *,
    wanted: int, budget: int, tokens: int, end_ids: Sequence[int] = (), temperature: float = 1.0, rows: int = 64,
) -> Accepted:  # fmt: skip
    """Draw whole texts of up to `tokens` tokens until so many are wanted by `accept`, or the budget of texts is spent.

    accept: of a sample, its end token left away; it sees whether the text has ended. end_ids: tokens that end a text.
    rows: texts drawn at a time. Texts are judged in the order of their numbers, never of their lengths: who ends first
    is not typical. Raises `UserError` for fewer than two wanted (one says nothing of Z) and a budget that is too small.
    """
    check(wanted >= 2, "wanted", wanted, "at least 2")
    check(budget >= wanted, "budget", budget, f"at least wanted = {wanted}")
    check(rows >= 1, "rows", rows, "at least 1")
    check(temperature > 0, "temperature", temperature, "a positive number")
    config = SamplingConfig(temperature=temperature, max_new_tokens=tokens)
    found: list[Sample] = []
    for first in range(0, budget, rows):
        drawn = sample(lm, params, [prompt] * min(rows, budget - first), jax.random.fold_in(key, first), config,
                       end_ids=tuple(end_ids), rows=rows)  # fmt: skip
        for number, one in enumerate(drawn, start=first + 1):
            if accept(one):
                found.append(one)
            if len(found) == wanted:
                return Accepted(found, number, enough=True)
    return Accepted(found, budget, enough=False)
