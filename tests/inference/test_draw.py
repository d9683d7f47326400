"""Draws are the inverse of the cumulative distribution, to the width of a number, and never what has no weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.inference.draw import BLOCK, draw_tokens, tokens_at

GRID = 1 << 14
LAST = np.float32(1 - 2**-24)
"""The largest number below 1."""


@jax.jit
def at(uniform_N, logits_V):
    """The token of each number, all under the same logits."""
    return tokens_at(uniform_N, jnp.broadcast_to(logits_V, (len(uniform_N), len(logits_V))))


def some_logits(vocab, seed=0):
    return np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * 2


def shares(logits_V):
    weights_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    return weights_V / weights_V.sum()


@pytest.mark.parametrize("vocab", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("hidden", [0.0, 0.5], ids=["all", "half"])
def test_a_token_has_its_share_of_the_numbers(vocab, hidden):
    logits_V = some_logits(vocab)
    logits_V[np.random.default_rng(1).permutation(vocab)[: int(hidden * vocab)]] = -np.inf
    tokens_N = np.asarray(at(jnp.asarray((np.arange(GRID) + 0.5) / GRID, jnp.float32), jnp.asarray(logits_V)))
    assert tokens_N.dtype == np.int32
    # In the order of the vocabulary, so that each token's numbers are an interval: its ends are known to the grid.
    assert np.all(np.diff(tokens_N) >= 0)
    counts_V = np.bincount(tokens_N, minlength=vocab)
    upto_V = np.cumsum(shares(logits_V))
    assert np.abs(np.cumsum(counts_V) / GRID - upto_V).max() <= 0.5 / GRID + 1e-6
    assert not np.any(counts_V[np.isinf(logits_V)])


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_only_token_left_is_drawn_whatever_the_number(vocab):
    for left in {0, vocab // 2, vocab - 1}:
        logits_V = np.full(vocab, -np.inf, np.float32)
        logits_V[left] = -3.0
        uniform_N = jnp.asarray([0, 2**-24, 0.5, LAST], jnp.float32)
        assert np.asarray(at(uniform_N, jnp.asarray(logits_V))).tolist() == [left] * 4


def test_the_ends_of_the_numbers_are_the_first_and_the_last_token():
    logits_V = np.asarray([-np.inf, 0, *[0.1] * BLOCK, 0, -np.inf], np.float32)
    assert np.asarray(at(jnp.asarray([0, LAST]), jnp.asarray(logits_V))).tolist() == [1, len(logits_V) - 2]


def test_a_border_belongs_to_the_token_after_it():
    uniform_N = jnp.asarray([0, 0.25, 0.5, 0.75], jnp.float32)
    assert np.asarray(at(uniform_N, jnp.asarray([0, -np.inf, 0, 0, 0]))).tolist() == [0, 2, 3, 4]
    # Between blocks too.
    logits_V = np.full(4 * BLOCK, -np.inf, np.float32)
    logits_V[::BLOCK] = 0
    assert np.asarray(at(uniform_N, jnp.asarray(logits_V))).tolist() == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]


def test_where_rounding_leaves_nothing_it_is_the_last_token_of_some_weight():
    logits_V = np.asarray([-np.inf, 0, 1, *[-np.inf] * (2 * BLOCK)], np.float32)
    assert np.asarray(at(jnp.asarray([1.0]), jnp.asarray(logits_V))).tolist() == [2]


def test_no_number_draws_a_token_of_no_weight():
    # Sums of many blocks, made in parallel, rise and fall by rounding where nothing is added: try the borders.
    vocab = 512 * BLOCK
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits_V = some_logits(vocab, seed) * 1.5
        logits_V[rng.random(vocab) < 0.5] = -np.inf
        logits_V[np.repeat(rng.random(vocab // BLOCK) < 0.5, BLOCK)] = -np.inf
        sums_G = jnp.sum(jnp.exp(jnp.asarray(logits_V) - logits_V.max()).reshape(-1, BLOCK), axis=-1)
        upto_G = np.asarray(jnp.cumsum(sums_G))
        borders_N = rng.choice(upto_G[:-1] / upto_G[-1], 256) + rng.integers(-1, 2, 256) * 2.0**-24
        drawn_N = np.asarray(at(jnp.asarray(np.clip(borders_N, 0, LAST), jnp.float32), jnp.asarray(logits_V)))
        assert np.all(np.isfinite(logits_V[drawn_N]))


def test_each_row_has_its_own_number():
    keys_B, logits_BV = jax.random.split(jax.random.key(0), 64), jnp.zeros((64, 100))
    drawn_B = np.asarray(draw_tokens(keys_B, logits_BV))
    assert drawn_B.tolist() == np.asarray(draw_tokens(keys_B[::-1], logits_BV))[::-1].tolist()
    # 64 numbers of 100: 47 different ones are to be expected.
    assert len(set(drawn_B.tolist())) > 35
