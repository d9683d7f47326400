"""Masked sums let nothing out of a masked place; attention masks equal their definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.masking import dense_mask, masked_ratio, masked_sum, self_attention_mask, slice_mask

POSITIONS = np.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], np.int32)
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("mask", [[True, False, True], [1.0, 0.0, 0.5]], ids=["bool", "weights"])
def test_what_is_masked_leaks_neither_value_nor_gradient(bad, mask):
    values, mask = jnp.asarray([2.0, bad, 4.0]), jnp.asarray(mask)
    total, slope = jax.value_and_grad(masked_sum)(values, mask)
    weights = np.asarray(mask, np.float32)
    assert total == 2 * weights[0] + 4 * weights[2]
    assert slope.tolist() == weights.tolist()


def test_sums_are_float32_whatever_the_input():
    ones = jnp.ones(4096, jnp.bfloat16)
    total = masked_sum(ones, jnp.ones(4096, bool))
    assert total.dtype == jnp.float32
    assert total == 4096


def test_a_ratio_weighs_by_the_mask():
    ratio = masked_ratio(jnp.asarray([3.0, jnp.nan, 5.0]), jnp.asarray([1.0, 0.0, 2.0]))
    assert (ratio.sum, ratio.weight) == (13.0, 3.0)


CASES = list(itertools.product([True, False], [None, 2], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize(("causal", "window", "segmented", "prefixed", "ruled"), CASES)
def test_dense_mask_by_definition(causal, window, segmented, prefixed, ruled):
    prefix = np.asarray([2, 3])
    rule = (lambda query, key: (query + key) % 3 != 1) if ruled else None
    mask = self_attention_mask(
        jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS) if segmented else None, causal=causal, window=window,
        prefix_B=jnp.asarray(prefix) if prefixed else None, rule=rule,
    )  # fmt: skip
    out = np.broadcast_to(np.asarray(dense_mask(mask)), (2, 6, 6))
    for row, t, s in itertools.product(range(2), range(6), range(6)):
        query, key = POSITIONS[row, t], POSITIONS[row, s]
        expected = not causal or key <= query or (prefixed and key < prefix[row])
        expected &= window is None or query - key < window
        expected &= not segmented or SEGMENTS[row, t] == SEGMENTS[row, s] != 0
        expected &= not ruled or (query + key) % 3 != 1
        assert out[row, t, s] == expected


def test_a_slice_of_the_mask_is_the_mask_of_the_slice():
    allowed = jnp.asarray(np.random.default_rng(0).random((2, 6, 6)) < 0.7)
    mask = self_attention_mask(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS), allowed_BTS=allowed)
    part = slice_mask(mask, slice(1, 4), slice(0, 5))
    assert np.array_equal(dense_mask(part), dense_mask(mask)[:, 1:4, :5])
