"""Distillation: a student learns what a teacher says of the same answers after other tokens (arXiv 2209.15189)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmlab.core.types import AnswerBatch, Array, Distillation, Key, Objective, Params, Ratio, Terms, TokenBatch
from lmlab.models.lm import LM
from lmlab.objectives.divergence import (
    Compare,
    Divergence,
    DivergenceSums,
    against_logits,
    against_top_k,
    chunked_divergence,
    forward_kl,
)
from lmlab.objectives.logprobs import read_answers

TEACHER = "teacher"
"""The part of the parameters where a teacher lies that is computed beside the student."""


@dataclass(frozen=True)
class Teacher:
    """A model, of the student's vocabulary, and where its parameters are found. No gradient flows into it."""

    lm: LM
    params: Callable[[Params], Params]
    """Of the teacher, given those that the objective is given."""


def beside(lm: LM) -> Teacher:
    """A model with the parameters at `params["teacher"]`, which are to stand still (`State.still`)."""
    return Teacher(lm, lambda params: params[TEACHER])


def under_adapters(base: LM) -> Teacher:
    """The model that adapters are added to, which reads its own parameters where the student reads both."""
    return Teacher(base, lambda params: params)


def distill(
    lm: LM, divergence: Divergence = forward_kl, *, teacher: Teacher | None = None, temperature: float = 1.0,
    chunk: int = 64,
) -> Objective:  # fmt: skip
    """Objective: the mean over labels of `temperature^2 D(q, p)`, of a `Distillation` (arXiv 2209.15189, section 3).

    q is what the teacher says of a label's place, after its context, and p what the student says of it, after its own.
    Where answers were written after scratch-pads, the mean over samples of them is taken by the mean over rows: of the
    forward KL it has the gradient of the KL from the mean of q.

    Args:
        lm: the student.
        divergence: of p from q: `forward_kl`, `reverse_kl`, `jensen_shannon(b)`.
        teacher: where the batch brings no `stored` predictions; None: `beside(lm)`.
        temperature: divides both sides' logits; stored predictions have to be made at the same one.
        chunk: places of a row whose logits are held at once.

    Metrics: `agreement` (both find the same token most probable), `teacher_entropy` and `nll` (of the labels, by the
    student, at temperature 1) in nats per label.
    """
    teacher = teacher or beside(lm)

    def objective(params: Params, batch: Distillation, key: Key) -> Terms:
        del key
        hidden_BAD = hidden_of_labels(lm, params, batch.student)
        head, axes = lm.head(params), lm.head(lm.axes)
        compare, taught, target = _taught(teacher, params, batch, temperature)
        sums = chunked_divergence(
            compare, divergence, temperature, lm.logits, chunk, axes, (head, taught), hidden_BAD, target,
            batch.student.labels_BA, batch.weights_BA,
        )  # fmt: skip
        return _terms(sums, jnp.sum(batch.weights_BA))

    return objective


def _taught(teacher: Teacher, params: Params, batch: Distillation, temperature: float) -> tuple[Compare, Any, Any]:
    """How to compare with the teacher, and what: stored predictions, or the unembedding and the hidden states."""
    if batch.stored is not None:
        return against_top_k(temperature), (), batch.stored
    assert batch.teacher is not None
    held = jax.lax.stop_gradient(teacher.params(params))
    target = jax.lax.stop_gradient(hidden_of_labels(teacher.lm, held, batch.teacher))
    return against_logits(teacher.lm.logits, temperature), teacher.lm.head(held), target


def _terms(sums: DivergenceSums, count: Array) -> Terms:
    found = {"agreement": sums.agreement, "teacher_entropy": sums.entropy, "nll": sums.nll}
    metrics = {name: Ratio(jax.lax.stop_gradient(value), count) for name, value in found.items()}
    return Terms({"divergence": Ratio(sums.loss, count)}, {"divergence": 1.0}, metrics)


def hidden_of_labels(lm: LM, params: Params, batch: AnswerBatch) -> Array:
    """Hidden states [B, A, D] that the labels are predicted from."""
    hidden_BTD = read_answers(lm, params, batch)
    return jnp.take_along_axis(hidden_BTD, batch.places_BA[..., None], axis=1)


def hard_labels(batch: Distillation) -> TokenBatch:
    """The student's rows for `next_token`: sampled answers as labels, an unbiased estimate of the sequence KL.

    Weights other than 0 are taken for 1. Rows in which answers share a prompt have no such form.
    """
    student = batch.student
    rows = jnp.arange(student.labels_BA.shape[0])[:, None]
    counted_BA = (batch.weights_BA != 0) & (student.answers_BA != 0)
    # A label stands after the place that predicts it.
    mask_BT = jnp.zeros(student.tokens_BT.shape, bool).at[rows, student.places_BA + 1].max(counted_BA)
    return TokenBatch(student.tokens_BT, student.segments_BT, student.positions_BT, mask_BT)
