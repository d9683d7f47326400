"""Log-probabilities of all pairs under the reference, computed once before training."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np

from lmlab.core.types import AnswerBatch, Array, Params
from lmlab.data.answers import PairRows, preferences_of
from lmlab.data.progress import counting
from lmlab.models.lm import LM
from lmlab.objectives.dpo import answer_sums
from lmlab.objectives.logprobs import answer_logprobs


def with_reference(
    rows: PairRows, lm: LM, params: Params, *, batch_size: int = 8, tail: float = 1.0, chunk: int = 64
) -> PairRows:  # fmt: skip
    """The rows with the log-probabilities of their answers under a model. tail: see `answer_sums`."""
    found_N2 = np.zeros((len(rows.pairs), 2), np.float32)
    with counting("scoring pairs under the reference") as tell:
        for start in range(0, rows.rows, batch_size):
            numbers = range(start, min(start + batch_size, rows.rows))
            batch = preferences_of(rows, numbers, batch_size)
            sums_BS = np.asarray(score_answers(lm, tail, chunk, params, batch.answers))
            for b, number in enumerate(numbers):
                held = rows.pairs_of(number)
                found_N2[held] = sums_BS[b].reshape(-1, 2)[: len(held)]
            tell(int(rows.row_starts[numbers[-1] + 1]), int(rows.row_starts[numbers[-1] + 1]))
    return replace(rows, reference_N2=found_N2)


@partial(jax.jit, static_argnums=(0, 1, 2))
def score_answers(lm: LM, tail: float, chunk: int, params: Params, answers: AnswerBatch) -> Array:
    """Log-probabilities [B, S] of answers."""
    return answer_sums(answer_logprobs(lm, params, answers, chunk), answers, tail)
