"""Multi-token prediction (arXiv 2404.19737): head i of n learns the i-th next token."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array, Key, Objective, Params, Ratio, Terms, TokenBatch
from lmlab.models.lm import MultiTokenLM
from lmlab.objectives.cross_entropy import TokenSums, chunked_cross_entropy, heads_cross_entropy
from lmlab.objectives.next_token import label_weights

Labels: TypeAlias = Callable[[TokenBatch, int], tuple[Array, Array]]
"""`labels(batch, heads) -> (labels_BMT, weights_BMT)`."""


def multi_token(
    model: MultiTokenLM, *, head_weights: tuple[float, ...] = (), z_loss: float = 0.0, chunk: int = 64,
    token_bytes_V: Array | None = None, labels: Labels | None = None,
) -> Objective:  # fmt: skip
    """Objective `sum_i w_i mean_t -log p_i(x_t+i | x_<=t)` over a `TokenBatch` whose rows hold T + n tokens.

    A label of head i is a token in the same document as the one i places before it. Every head is a term of its own,
    `head_1` to `head_n`, divided by the number of its own labels. head_weights: w, 1 each if empty. z_loss, chunk,
    token_bytes_V: as for `next_token`, and so are the metrics `nll`, `accuracy` and `bits_per_byte`, which are those
    of head 1, the language model: the sum of the losses is no perplexity. `accuracy_i`: of head i > 1. labels: what is
    taught instead of `ahead`.
    """
    count = model.heads
    scales = head_weights or (1.0,) * count
    check(len(scales) == count, "objective.head_weights", head_weights, f"a weight for each of the {count} heads")

    def objective(params: Params, batch: TokenBatch, key: Key) -> Terms:
        del key
        labels_BMT, weights_BMT = (labels or ahead)(batch, count)
        hidden_BMTD = hidden_of_heads(model, params, batch)
        sums = _sums(model, params, hidden_BMTD, labels_BMT, weights_BMT, z_loss, chunk)
        counts_M = jnp.sum(weights_BMT, axis=(0, 2))
        nll_M, correct_M = jax.lax.stop_gradient((sums.nll, sums.correct))
        metrics = {"nll": Ratio(nll_M[0], counts_M[0]), "accuracy": Ratio(correct_M[0], counts_M[0])}
        metrics |= {f"accuracy_{i + 1}": Ratio(correct_M[i], counts_M[i]) for i in range(1, count)}
        if token_bytes_V is not None:
            read = jnp.sum(weights_BMT[:, 0] * token_bytes_V[labels_BMT[:, 0]])
            metrics["bits_per_byte"] = Ratio(nll_M[0] / math.log(2), read)
        names = [f"head_{i + 1}" for i in range(count)]
        losses = {name: Ratio(sums.loss[i], counts_M[i]) for i, name in enumerate(names)}
        return Terms(losses=losses, scales=dict(zip(names, scales, strict=True)), metrics=metrics)

    return objective


def ahead(batch: TokenBatch, heads: int) -> tuple[Array, Array]:
    """Labels and weights [B, M, T] of rows of T + M tokens: of head i at t, the token at t + i."""
    length = batch.tokens_BT.shape[1] - heads
    labels = [batch.tokens_BT[:, i : i + length] for i in range(1, heads + 1)]
    weights = [label_weights(batch, i)[:, :length] for i in range(1, heads + 1)]
    return jnp.stack(labels, axis=1), jnp.stack(weights, axis=1)


def hidden_of_heads(model: MultiTokenLM, params: Params, batch: TokenBatch) -> Array:
    """Normed hidden states [B, M, T, D] of all heads on the first T tokens of rows of T + n."""
    length = batch.tokens_BT.shape[1] - model.heads
    reading = model.read(
        params, batch.tokens_BT[:, :length], positions_BT=batch.positions_BT[:, :length],
        segments_BT=batch.segments_BT[:, :length],
    )  # fmt: skip
    hidden = []
    for i in range(model.heads):
        hidden_BTD, reading = model.head(params, i + 1, reading, batch.tokens_BT[:, i : i + length])
        hidden.append(hidden_BTD)
    return jnp.stack(hidden, axis=1)


def _sums(
    model: MultiTokenLM, params: Params, hidden_BMTD: Array, labels_BMT: Array, weights_BMT: Array, z_loss: float,
    chunk: int,
) -> TokenSums:  # fmt: skip
    """Sums of each head, [M]."""
    lm = model.lm
    head, axes = lm.head(params), lm.head(lm.axes)
    if model.heads > 1:
        return heads_cross_entropy(lm.logits, head, hidden_BMTD, labels_BMT, weights_BMT, z_loss, chunk, axes)
    alone = (x[:, 0] for x in (hidden_BMTD, labels_BMT, weights_BMT))
    sums = chunked_cross_entropy(lm.logits, head, *alone, z_loss, chunk, axes)
    return jax.tree.map(lambda x: x[None], sums)
