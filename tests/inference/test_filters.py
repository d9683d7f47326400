"""Filters of logits against their definitions, written out token by token in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference.config import SamplingConfig
from lmlab.inference.filters import filter_logits, keep_min_p, keep_top_k, keep_top_p

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
