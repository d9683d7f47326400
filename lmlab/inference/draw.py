"""A token from its distribution, with one uniform number a row."""

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key

BLOCK = 64
"""Tokens whose probabilities are summed together; the place inside a block is searched after the block is found."""


def draw_tokens(keys_B: Key, logits_BV: Array) -> Array:
    """int32 [B]: token v of row b with probability softmax(logits)_v; never one of logit -inf where another is left."""
    return tokens_at(jax.vmap(lambda key: jax.random.uniform(key))(keys_B), logits_BV)


def tokens_at(uniform_B: Array, logits_BV: Array) -> Array:
    """int32 [B]: the token whose share of [0, 1), in order of the vocabulary, holds the number.

    The cumulative distribution is summed in two levels: a noise for every token, as by the Gumbel trick, would cost
    more than a small model's step. As exact as float32 numbers in [0, 1) are: to 2^-23 a token.
    """
    batch, vocab = logits_BV.shape
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weights_BGK = jnp.pad(weights_BV, ((0, 0), (0, -vocab % BLOCK))).reshape(batch, -1, BLOCK)
    sums_BG = jnp.sum(weights_BGK, axis=-1)
    group_B, rest_B = _locate(sums_BG, uniform_B * jnp.sum(sums_BG, axis=-1))
    place_B, _ = _locate(weights_BGK[jnp.arange(batch), group_B], rest_B)
    return group_B * BLOCK + place_B


def _locate(weights_BN: Array, goal_B: Array) -> tuple[Array, Array]:
    """The first place whose running sum exceeds the goal, and how much of the goal is left there.

    Only places of some weight: running sums are made in parallel and rounded, so they may rise or fall where nothing
    is added. Where rounding leaves no place, the last of some weight.
    """
    upto_BN = jnp.cumsum(weights_BN, axis=-1)
    some_BN = weights_BN > 0
    found_BN = some_BN & (upto_BN > goal_B[:, None])
    last_B = weights_BN.shape[1] - 1 - jnp.argmax(some_BN[:, ::-1], axis=-1)
    place_B = jnp.where(jnp.any(found_BN, axis=-1), jnp.argmax(found_BN, axis=-1), last_B).astype(jnp.int32)
    before_B = jnp.where(place_B > 0, upto_BN[jnp.arange(len(goal_B)), place_B - 1], 0)
    return place_B, goal_B - before_B
