"""Filters of logits as pure functions: what a filter removes gets -inf, and the best token always stays."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.types import Array
from lmlab.inference.config import SamplingConfig

Processor: TypeAlias = Callable[[Array, Array, Array], Array]
"""`processor(logits_BV, tokens_BS, length_B) -> logits_BV`: the logits of the next token as they are to be filtered,
given the first `length` tokens of each row, prompt and all. Built once, since it is a part of what is compiled."""


def penalise_repetition(logits_BV: Array, tokens_BS: Array, length_B: Array, penalty: float) -> Array:
    """Logits of tokens that the row holds, divided by the penalty where positive, else times it (arXiv 1909.05858)."""
    batch, vocab = logits_BV.shape
    held_BS = jnp.arange(tokens_BS.shape[1])[None] < length_B[:, None]
    rows = jnp.arange(batch)[:, None]
    seen_BV = jnp.zeros((batch, vocab), bool).at[rows, jnp.where(held_BS, tokens_BS, vocab)].set(True, mode="drop")
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_top_k(logits_BV: Array, k: int) -> Array:
    """Keep the k largest logits of each row, and those that tie with the last of them."""
    k = min(k, logits_BV.shape[-1])
    least_B1 = jax.lax.top_k(logits_BV, k)[0][..., -1:]
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Array, p: float) -> Array:
    """Keep the smallest set of most probable tokens that holds probability p, with ties of its last."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    # A token is kept if those above it do not hold p yet.
    least_B1 = jnp.min(jnp.where(before_BV < p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: Array, p: float) -> Array:
    """Keep tokens at least p times as probable as the most probable one."""
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV >= top_B1 + jnp.log(p), logits_BV, -jnp.inf)


def filter_logits(logits_BV: Array, config: SamplingConfig) -> Array:
    """Logits of the distribution that is drawn from, float32 [B, V]. Temperature 0 keeps the first best token."""
    logits_BV = logits_BV.astype(jnp.float32)
    if config.temperature == 0:
        best = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1], dtype=bool)
        return jnp.where(best, 0.0, -jnp.inf)
    logits_BV = logits_BV / config.temperature
    if config.top_k:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    if config.min_p > 0:
        logits_BV = keep_min_p(logits_BV, config.min_p)
    return logits_BV
