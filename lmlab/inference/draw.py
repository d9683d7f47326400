"""A token from its distribution, with one uniform number a row."""

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key

BLOCK = 64
"""Tokens whose probabilities are summed together; the place inside a block is searched after the block is found."""


def draw_tokens(keys_B: Key, logits_BV: Array) -> Array:
    """int32 [B]: token v of row b with probability softmax(logits)_v; never one of logit -inf.

    The inverse of the cumulative distribution, summed in two levels: a noise for every token, as by the Gumbel trick,
    would cost more than a small model's step. As exact as float32 numbers in [0, 1) are: to 2^-23 a token.
    """
    batch, vocab = logits_BV.shape
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weights_BGK = jnp.pad(weights_BV, ((0, 0), (0, -vocab % BLOCK))).reshape(batch, -1, BLOCK)
    upto_BG = jnp.cumsum(jnp.sum(weights_BGK, axis=-1), axis=-1)
    uniform_B = jax.vmap(lambda key: jax.random.uniform(key))(keys_B)
    goal_B = uniform_B * upto_BG[:, -1]
    group_B = _first_above(upto_BG, goal_B)
    rows = jnp.arange(batch)
    before_B = jnp.where(group_B > 0, upto_BG[rows, group_B - 1], 0)
    inside_BK = weights_BGK[rows, group_B]
    return group_B * BLOCK + _first_above(jnp.cumsum(inside_BK, axis=-1), goal_B - before_B)


def _first_above(upto_BN: Array, goal_B: Array) -> Array:
    """The first place whose running sum exceeds the goal. Where rounding leaves none, the last that adds to the sum."""
    none_B = upto_BN[:, -1] <= goal_B
    found_BN = upto_BN > jnp.where(none_B, jnp.nextafter(upto_BN[:, -1], -jnp.inf), goal_B)[:, None]
    return jnp.argmax(found_BN, axis=-1).astype(jnp.int32)
