"""Next-token prediction: the objective of pre-training and, with a label mask, of fine-tuning."""

import math

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key, Objective, Params, Ratio, Terms, TokenBatch
from lmlab.models.lm import LM
from lmlab.objectives.cross_entropy import chunked_cross_entropy


def label_weights(batch: TokenBatch, ahead: int = 1) -> Array:
    """float32 [B, T]: 1 where the token `ahead` places on is a label and lies in the same document.

    T is the length of the row less `ahead`.
    """
    here, there = batch.segments_BT[:, :-ahead], batch.segments_BT[:, ahead:]
    return ((here == there) & (here != 0) & batch.label_mask_BT[:, ahead:]).astype(jnp.float32)


def next_token(lm: LM, *, z_loss: float = 0.0, chunk: int = 64, token_bytes_V: Array | None = None) -> Objective:
    """Objective `-log p(x_t+1 | x_<=t)` over the labels of a `TokenBatch` whose rows hold T + 1 tokens.

    z_loss: coefficient of log(Z)^2 (arXiv 2204.02311). chunk: places of a row whose logits are held at once.
    token_bytes_V: bytes of text that each token stands for; adds the metric `bits_per_byte`.
    Metrics: `nll` in nats per label, `accuracy`, `bits_per_byte`.
    """

    def objective(params: Params, batch: TokenBatch, key: Key) -> Terms:
        del key
        tokens_BT, labels_BT = batch.tokens_BT[:, :-1], batch.tokens_BT[:, 1:]
        weights_BT = label_weights(batch)
        hidden_BTD, _ = lm.apply(
            params, tokens_BT, positions_BT=batch.positions_BT[:, :-1], segments_BT=batch.segments_BT[:, :-1]
        )
        sums = chunked_cross_entropy(
            lm.logits, lm.head(params), hidden_BTD, labels_BT, weights_BT, z_loss, chunk, lm.head(lm.axes)
        )
        count = jnp.sum(weights_BT)
        nll = jax.lax.stop_gradient(sums.nll)
        metrics = {"nll": Ratio(nll, count), "accuracy": Ratio(jax.lax.stop_gradient(sums.correct), count)}
        if token_bytes_V is not None:
            metrics["bits_per_byte"] = Ratio(nll / math.log(2), jnp.sum(weights_BT * token_bytes_V[labels_BT]))
        return Terms(losses={"next_token": Ratio(sums.loss, count)}, scales={"next_token": 1.0}, metrics=metrics)

    return objective
