"""Direct preference optimisation: objectives over pairs of answers, and over single ones, for any loss of them."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.masking import masked_ratio, masked_sum
from lmlab.core.types import AnswerBatch, Array, Key, Objective, Params, Preferences, Ratio, Terms
from lmlab.models.lm import LM
from lmlab.objectives.logprobs import answer_lengths, answer_logprobs, members, sum_by_answer
from lmlab.objectives.pair_losses import PairLoss, PairScores, kto, kto_anchor

Reference: TypeAlias = Callable[[Params, AnswerBatch], Array]
"""`reference(params, answers) -> logprobs_BA`: log-probabilities of the answers' tokens; no gradient flows into it."""

REFERENCE = "reference"
"""The part of the parameters where a reference lies that is computed beside the policy."""


def beside(lm: LM, chunk: int = 64) -> Reference:
    """The model with the parameters at `params["reference"]`, which are to stand still (`State.still`)."""
    return lambda params, answers: jax.lax.stop_gradient(answer_logprobs(lm, params[REFERENCE], answers, chunk))


def under_adapters(base: LM, chunk: int = 64) -> Reference:
    """The model that adapters are added to, which reads its own parameters where the policy reads both."""
    return lambda params, answers: jax.lax.stop_gradient(answer_logprobs(base, params, answers, chunk))


def no_reference(params: Params, answers: AnswerBatch) -> Array:
    """For losses that have none: SimPO, ORPO, CPO, and any of `without_reference` scores."""
    del params
    return jnp.zeros(answers.labels_BA.shape, jnp.float32)


def answer_sums(logprobs_BA: Array, answers: AnswerBatch, tail: float = 1.0) -> Array:
    """Log-probabilities of answers [B, S], the sums over their tokens.

    tail: weight of the tokens of an answer that come after the length of the shorter one of its pair (LD-DPO, arXiv
    2409.06411).
    """
    if tail == 1:
        return sum_by_answer(logprobs_BA, answers)
    shorter_BS = jnp.repeat(jnp.minimum(*_pairs(answer_lengths(answers))), 2, axis=1)
    # Places of the tokens within their answer: labels of an answer stand together, in order.
    members_BAS = members(answers)
    beyond_BAS = members_BAS & (jnp.cumsum(members_BAS, axis=1) > shorter_BS[:, None])
    return sum_by_answer(jnp.where(jnp.any(beyond_BAS, axis=-1), tail * logprobs_BA, logprobs_BA), answers)


def dpo(
    lm: LM, loss: PairLoss, beta: float, *, reference: Reference | None = None, sft: float = 0.0, tail: float = 1.0,
    chunk: int = 64,
) -> Objective:  # fmt: skip
    """Objective: the mean over pairs of `loss(scores, beta)`, of `Preferences` (arXiv 2305.18290, equation 7).

    Of a pair with a target below 1 it is the expected loss, see `expected_loss`. A margin m asks for
    beta (h_w - h_l) - m in place of beta (h_w - h_l) (ODPO, arXiv 2402.10571); losses without a reference know none.

    Args:
        lm: the policy.
        loss: one of `pair_losses`.
        beta: strength of the tie to the reference; beta h is the implicit reward of an answer.
        reference: where the batch brings no `reference_BS`; None: `beside(lm, chunk)`.
        sft: coefficient of the preferred answers' negative log-likelihood, a mean over all their tokens (RPO, arXiv
            2404.19733; CPO, ORPO).
        tail: see `answer_sums`; the sums in `reference_BS` have to be weighed alike.
        chunk: places of a row whose logits are held at once.

    Metrics: `accuracy` (share of pairs with a margin above 0; of 0: half), `margin`, `reward/chosen`,
    `reward/rejected`, `logprob/chosen`, `nll/chosen` (nats a token), `length/chosen`, `length/rejected`. A
    `logprob/chosen` that falls is likelihood displacement (arXiv 2410.08847).
    """
    reference = reference or beside(lm, chunk)

    def objective(params: Params, batch: Preferences, key: Key) -> Terms:
        del key
        answers, weights_BP = batch.answers, batch.weights_BP
        logprobs_BA = answer_logprobs(lm, params, answers, chunk)
        sums_BS = answer_sums(logprobs_BA, answers, tail)
        held_BS = reference_sums(reference, params, batch, tail)
        scores = PairScores(*_pairs(sums_BS), *_pairs(held_BS), *_pairs(answer_lengths(answers)))
        asked = scores._replace(chosen_reference=scores.chosen_reference + batch.margins_BP / beta)
        loss_BP = expected_loss(loss, asked, beta, batch.targets_BP)
        nll = preferred_nll(_pairs(sum_by_answer(logprobs_BA, answers)), scores, batch)
        losses = {"preference": masked_ratio(loss_BP, weights_BP)} | ({"sft": nll} if sft else {})
        values = pair_metrics(scores, beta, batch.targets_BP)
        metrics = {name: masked_ratio(value, weights_BP) for name, value in values.items()}
        metrics = jax.lax.stop_gradient(metrics | {"nll/chosen": nll})
        return Terms(losses, {name: sft if name == "sft" else 1.0 for name in losses}, metrics)

    return objective


def preferred_nll(sums: tuple[Array, Array], scores: PairScores, batch: Preferences) -> Ratio:
    """Negative log-likelihood of preferred answers and their tokens, each answer by the probability that it is it."""
    q_BP, lengths = batch.targets_BP, (scores.chosen_length, scores.rejected_length)
    total, count = (masked_sum(q_BP * one + (1 - q_BP) * other, batch.weights_BP) for one, other in (sums, lengths))
    return Ratio(-total, count)


def expected_loss(loss: PairLoss, scores: PairScores, beta: float, targets: Array) -> Array:
    """The loss of every pair, and that of its answers the other way round, by the probability that each is right."""
    turned = PairScores(
        scores.rejected, scores.chosen, scores.rejected_reference, scores.chosen_reference, scores.rejected_length,
        scores.chosen_length,
    )  # fmt: skip
    return targets * loss(scores, beta) + (1 - targets) * loss(turned, beta)


def reference_sums(reference: Reference, params: Params, batch: Preferences, tail: float) -> Array:
    """Log-probabilities [B, S] under the reference: those that the batch brings, or else computed."""
    if batch.reference_BS is not None:
        return batch.reference_BS
    return answer_sums(reference(params, batch.answers), batch.answers, tail)


def pair_metrics(scores: PairScores, beta: float, targets: Array) -> dict[str, Array]:
    """Values of every pair; accuracy and margin towards the answer that is better, on the average over which it is."""
    margin = (2 * targets - 1) * beta * scores.delta
    return {
        "accuracy": (jnp.sign(scores.delta) * (2 * targets - 1) + 1) / 2,
        "margin": margin,
        "reward/chosen": beta * scores.chosen_ratio,
        "reward/rejected": beta * scores.rejected_ratio,
        "logprob/chosen": scores.chosen,
        "length/chosen": scores.chosen_length,
        "length/rejected": scores.rejected_length,
    }


def _pairs(values_BS: Array) -> tuple[Array, Array]:
    """[B, 2 P] -> of the preferred answers and of the others, [B, P] each."""
    return values_BS[:, 0::2], values_BS[:, 1::2]


def kto_objective(
    lm: LM, beta: float, *, reference: Reference | None = None, lambdas: tuple[float, float] = (1.0, 1.0),
    chunk: int = 64,
) -> Objective:  # fmt: skip
    """Kahneman-Tversky optimisation of single answers that were found good or bad (arXiv 2402.01306, section 4).

    Takes `Preferences` in which a pair is an answer and, in place of the other one, an answer to another prompt, and
    `targets_BP` tells which answers are good (1) and which bad (0). The answers to other prompts estimate the KL from
    the reference: one number for all answers that are scored together, those of a microbatch. So, unlike with other
    objectives, the number of microbatches is part of what is computed. Arguments as of `dpo`;
    lambdas: weights of good and of bad answers.

    Metrics: `accuracy` (good above the anchor, bad below), `anchor` (z0), `reward/good`, `reward/bad`.
    """
    reference = reference or beside(lm, chunk)

    def objective(params: Params, batch: Preferences, key: Key) -> Terms:
        del key
        weights_BP, good_BP = batch.weights_BP, batch.targets_BP > 0.5
        sums_BS = answer_sums(answer_logprobs(lm, params, batch.answers, chunk), batch.answers)
        ratios_BP, mismatched_BP = _pairs(sums_BS - reference_sums(reference, params, batch, 1.0))
        anchor = kto_anchor(mismatched_BP, weights_BP, beta)
        term = masked_ratio(kto(ratios_BP, good_BP, anchor, beta, lambdas), weights_BP)
        rewards_BP = beta * ratios_BP
        right_BP = jnp.where(good_BP, rewards_BP > anchor, rewards_BP < anchor)
        count = jnp.sum(weights_BP)
        metrics = {
            "accuracy": masked_ratio(right_BP, weights_BP),
            "anchor": Ratio(anchor * count, count),
            "reward/good": masked_ratio(rewards_BP, weights_BP * good_BP),
            "reward/bad": masked_ratio(rewards_BP, weights_BP * ~good_BP),
        }
        return Terms({"kto": term}, {"kto": 1.0}, jax.lax.stop_gradient(metrics))

    return objective
