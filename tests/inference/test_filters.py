"""Filters of logits against their definitions, written out token by token in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference.config import SamplingConfig
from lmlab.inference.filters import filter_logits, keep_min_p, keep_top_k, keep_top_p, penalise_repetition

RANDOM = np.random.default_rng(0).normal(size=(20, 6)) * 2
# Every row of 4 logits out of three values: all ways to tie.
TIES = np.asarray(list(itertools.product([-1.0, 0.0, 2.0], repeat=4)))
ROWS = pytest.mark.parametrize("logits", [RANDOM, TIES], ids=["random", "ties"])


def probs(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def top_k(row, k):
    """A token stays if fewer than k are strictly better."""
    return {i for i in range(len(row)) if sum(other > row[i] for other in row) < k}


def top_p(row, p):
    """A token stays if those strictly better hold less than p."""
    return {
        i for i in range(len(row)) if sum(q for q, other in zip(probs(row), row, strict=True) if other > row[i]) < p
    }


def min_p(row, p):
    return {i for i, q in enumerate(probs(row)) if q >= p * probs(row).max() * (1 - 1e-6)}


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


@ROWS
@pytest.mark.parametrize("k", [1, 2, 3, 100])
def test_top_k_by_definition(logits, k):
    assert kept(keep_top_k(jnp.asarray(logits), k)) == [top_k(row, k) for row in logits]


@ROWS
@pytest.mark.parametrize("p", [1e-6, 0.37, 0.713, 0.951, 0.9999])
def test_top_p_by_definition(logits, p):
    assert kept(keep_top_p(jnp.asarray(logits), p)) == [top_p(row, p) for row in logits]


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    for row, got in zip(RANDOM, kept(keep_top_p(jnp.asarray(RANDOM), 0.8)), strict=True):
        held = sum(probs(row)[list(got)])
        assert held >= 0.8
        assert held - min(probs(row)[list(got)]) < 0.8


@ROWS
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 1.0])
def test_min_p_by_definition(logits, p):
    assert kept(keep_min_p(jnp.asarray(logits), p)) == [min_p(row, p) for row in logits]


def wide_rows():
    """Rows of 1000: plain, of few values, of huge and tiny ones, half hidden, and all but one hidden."""
    rng = np.random.default_rng(2)
    plain = rng.normal(size=1000) * 3
    half = np.where(rng.random(1000) < 0.5, plain, -np.inf)
    alone = np.where(np.arange(1000) == 700, -4.0, -np.inf)
    extreme = plain * np.exp(rng.uniform(-40, 40, 1000))
    return np.stack([plain, np.round(plain), half, alone, extreme, np.zeros(1000)]).astype(np.float32)


@pytest.mark.parametrize("k", [1, 50, 999, 1000])
def test_top_k_of_many_by_a_sort(k):
    rows = wide_rows()
    least_B1 = -np.sort(-rows, axis=-1)[:, k - 1 : k]
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(rows), k), np.where(rows >= least_B1, rows, -np.inf))


@pytest.mark.parametrize("p", [1e-45, 0.01, 0.5, 0.9003])
def test_top_p_of_many_by_a_sort(p):
    rows = wide_rows()
    sorted_BV = -np.sort(-rows.astype(np.float64), axis=-1)
    weights_BV = np.exp(sorted_BV - sorted_BV[:, :1])
    upto_BV = np.cumsum(weights_BV / weights_BV.sum(axis=-1, keepdims=True), axis=-1)
    least_B1 = np.take_along_axis(sorted_BV, np.argmax(upto_BV >= p, axis=-1)[:, None], axis=-1)
    np.testing.assert_array_equal(keep_top_p(jnp.asarray(rows), p), np.where(rows >= least_B1, rows, -np.inf))


def test_repetition_is_penalised_by_definition():
    rng = np.random.default_rng(0)
    logits_BV, tokens_BS = rng.normal(size=(5, 9)).astype(np.float32), rng.integers(0, 9, (5, 7))
    logits_BV[3, tokens_BS[3, 0]] = -np.inf
    length_B = np.asarray([0, 1, 4, 7, 7])
    for penalty in (1.3, 0.7):
        expected_BV = logits_BV.copy()
        for row, tokens, length in zip(expected_BV, tokens_BS, length_B, strict=True):
            for token in set(tokens[:length].tolist()):  # once, however often the row has it
                row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        found_BV = penalise_repetition(jnp.asarray(logits_BV), jnp.asarray(tokens_BS), jnp.asarray(length_B), penalty)
        np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-6)


@pytest.mark.parametrize(
    "keep", [lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.5), lambda x: keep_min_p(x, 0.5)]
)
def test_what_stays_is_not_changed(keep):
    logits = jnp.asarray(RANDOM)
    out = np.asarray(keep(logits))
    assert np.all((out == np.asarray(logits)) | (out == -np.inf))
    assert np.any(out == -np.inf)


@pytest.mark.parametrize("others", [{}, {"top_k": 2, "top_p": 0.1, "min_p": 1.0}])
def test_temperature_0_keeps_the_first_best_alone(others):
    out = np.asarray(filter_logits(jnp.asarray(TIES), SamplingConfig(temperature=0.0, **others)))
    assert kept(out) == [{int(np.argmax(row))} for row in TIES]
    assert out[np.isfinite(out)].tolist() == [0.0] * len(TIES)


def test_no_filter_changes_nothing_but_the_type():
    out = filter_logits(jnp.asarray(RANDOM, jnp.bfloat16), SamplingConfig())
    assert out.dtype == jnp.float32
    assert np.array_equal(out, np.asarray(jnp.asarray(RANDOM, jnp.bfloat16), np.float32))


def test_filters_come_in_the_stated_order():
    """Temperature, top-k, top-p, min-p; on rows where any other order keeps another set."""
    config = SamplingConfig(temperature=2.0, top_k=4, top_p=0.77, min_p=0.3)
    steps = {
        "temperature": lambda row: row / 2.0,
        "top_k": lambda row: keep_only(row, top_k(row, 4)),
        "top_p": lambda row: keep_only(row, top_p(row, 0.77)),
        "min_p": lambda row: keep_only(row, min_p(row, 0.3)),
    }

    def keep_only(row, chosen):
        return np.asarray([x if i in chosen else -np.inf for i, x in enumerate(row)])

    def apply(order, row):
        for name in order:
            row = steps[name](row)
        return set(np.flatnonzero(np.isfinite(row)))

    got = kept(filter_logits(jnp.asarray(RANDOM), config))
    assert got == [apply(("temperature", "top_k", "top_p", "min_p"), row) for row in RANDOM]
    for wrong in (("top_p", "temperature", "top_k", "min_p"), ("temperature", "top_p", "top_k", "min_p")):
        assert got != [apply(wrong, row) for row in RANDOM]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1},
     {"max_new_tokens": 0}, {"stop": ("ok", "")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
