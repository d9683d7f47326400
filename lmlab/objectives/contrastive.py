"""Contrastive terms beside a reward model's loss, on the features of two views of each answer (arXiv 2401.06080, 3).

The two views are two draws of dropout. It is put on the embeddings, so that every LM takes it, and those whose layers
have none as well. With dropout 0 both views are the same, and SimCSE only spreads the features evenly.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.rng import key_for
from lmlab.core.types import AnswerBatch, Array, Key, Objective, Params, Preferences, Ratio, Terms

View: TypeAlias = Callable[[Params, Any, Key], Array]
"""`view(params, answers, key) -> features_BSD`: another key is another view."""
Rows: TypeAlias = Callable[[Array, Array], Sequence[tuple[Array, Array]]]
"""`rows(features_BSD, weights_BP) -> sets of (rows_ND, weights_N)`; rows of a set are told apart from each other."""
Contrast: TypeAlias = Callable[[Params, Array, Array, Array], Ratio]
"""`contrast(params, first_ND, second_ND, weights_N)`."""


def dropout_view(
    features: Callable[[Params, AnswerBatch, Array], Array], embed: Callable[[Params, Array], Array], rate: float = 0.1
) -> View:  # fmt: skip
    """The features of answers under dropout of embeddings. features, embed: of `RewardModel` and of its LM."""

    def view(params: Params, answers: AnswerBatch, key: Key) -> Array:
        embeddings_BTD = embed(params, answers.tokens_BT)
        kept_BTD = jax.random.bernoulli(key, 1 - rate, embeddings_BTD.shape)
        return features(params, answers, jnp.where(kept_BTD, embeddings_BTD / (1 - rate), 0))

    return view


def answer_rows(features_BSD: Array, weights_BP: Array) -> list[tuple[Array, Array]]:
    """One set: the features of all answers."""
    return [(features_BSD.reshape(-1, features_BSD.shape[-1]), jnp.repeat(weights_BP, 2, axis=1).ravel())]


def side_rows(features_BSD: Array, weights_BP: Array) -> list[tuple[Array, Array]]:
    """Two sets: the preferred answers, and the others."""
    flat = lambda x_BPD: x_BPD.reshape(-1, x_BPD.shape[-1])
    return [(flat(features_BSD[:, side::2]), weights_BP.ravel()) for side in (0, 1)]


def difference_rows(features_BSD: Array, weights_BP: Array) -> list[tuple[Array, Array]]:
    """One set: f(preferred) - f(other) of all pairs and the same with the other sign, which is its exact negative."""
    gap_BPD = features_BSD[:, 0::2] - features_BSD[:, 1::2]
    return answer_rows(jnp.stack([gap_BPD, -gap_BPD], axis=2).reshape(features_BSD.shape), weights_BP)


def sim_cse(first_ND: Array, second_ND: Array, weights_N: Array, temperature: float = 0.05) -> Ratio:
    """-log softmax_j(cos(first_i, second_j) / tau) at j = i (arXiv 2104.08821, equation 1); sum and weight over i.

    Rows of weight 0 are nobody's positive and nobody's negative. The sum is over the rows that are seen together, those
    of a microbatch: it is no sum over rows alone.
    """
    cosine_NN = unit(first_ND) @ unit(second_ND).T / temperature
    logits_NN = jnp.where(weights_N[None, :] != 0, cosine_NN, -jnp.inf)
    # A row that no other stands beside, and that does not count, has nothing but -inf.
    log_z_N = jax.nn.logsumexp(jnp.where(weights_N[:, None] != 0, logits_NN, 0.0), axis=1)
    losses_N = jnp.where(weights_N != 0, log_z_N - jnp.diagonal(cosine_NN), 0)
    return Ratio(jnp.sum(weights_N * losses_N), jnp.sum(weights_N))


def sinkhorn(scores_NK: Array, weights_N: Array, temperature: float = 0.05, iterations: int = 3) -> Array:
    """Codes [N, K] of rows: each sums to 1, and every prototype gets nearly the same weight of rows.

    arXiv 2006.09882, section 3.1. In logarithms, so that no score is too large. Rows of weight 0 get codes and claim
    nothing.
    """
    log_N = jnp.where(weights_N != 0, jnp.log(jnp.where(weights_N != 0, weights_N, 1)), -jnp.inf)
    # Without any row there is nothing to balance.
    log_N = jnp.where(jnp.any(weights_N != 0), log_N, 0.0)
    codes_NK = scores_NK / temperature
    for _ in range(iterations):
        codes_NK = codes_NK - jax.nn.logsumexp(codes_NK + log_N[:, None], axis=0, keepdims=True)
        codes_NK = jax.nn.log_softmax(codes_NK, axis=1)
    return jnp.exp(codes_NK)


def swav(
    first_ND: Array, second_ND: Array, weights_N: Array, prototypes_KD: Array, temperature: float = 0.1
) -> Ratio:  # fmt: skip
    """Each view predicts the other's code: -sum_k q2_k log p1_k - sum_k q1_k log p2_k (arXiv 2006.09882, equation 2).

    p is the softmax of the cosines with the prototypes over tau; q is `sinkhorn`'s, without a gradient. The lengths of
    the prototypes mean nothing, so that they need not be brought back to 1 after each update.
    """
    scores = [unit(view_ND) @ unit(prototypes_KD).T for view_ND in (first_ND, second_ND)]
    codes = [jax.lax.stop_gradient(sinkhorn(scores_NK, weights_N)) for scores_NK in scores]
    log_p = [jax.nn.log_softmax(scores_NK / temperature, axis=1) for scores_NK in scores]
    losses_N = -jnp.sum(codes[1] * log_p[0] + codes[0] * log_p[1], axis=1)
    return Ratio(jnp.sum(jnp.where(weights_N != 0, weights_N * losses_N, 0)), jnp.sum(weights_N))


def unit(rows_ND: Array) -> Array:
    """The rows at length 1; a row of zeros stays, and has a finite gradient."""
    return rows_ND * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(rows_ND), axis=-1, keepdims=True), 1e-12))


def with_contrast(objective: Objective, view: View, rows: Rows, contrast: Contrast, scale: float) -> Objective:
    """The objective, of `Preferences`, with a contrastive term `contrast` of its answers beside it.

    Settings of the paper: SwAV with 50 prototypes on `side_rows`, scale 0.1, or 20 on `difference_rows`, scale 0.5;
    SimCSE with scale 1. contrast: `lambda params, *views: sim_cse(*views)`, or
    `lambda params, *views: swav(*views, params["prototypes"])`.
    """

    def wrapped(params: Params, batch: Preferences, key: Key) -> Terms:
        terms = objective(params, batch, key)
        first, second = (
            rows(view(params, batch.answers, key_for(key, "view", number)), batch.weights_BP) for number in (0, 1)
        )
        found = [contrast(params, one, two, weights) for (one, weights), (two, _) in zip(first, second, strict=True)]
        # Means of several sets are added up: their weights are the same.
        term = Ratio(jnp.sum(jnp.stack([ratio.sum for ratio in found])), found[0].weight)
        return replace(
            terms, losses={**terms.losses, "contrast": term}, scales={**terms.scales, "contrast": scale}
        )  # fmt: skip

    return wrapped
