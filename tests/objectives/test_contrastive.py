"""Contrastive terms: closed forms, balanced codes, where gradients flow, padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.models.reward import reward_model
from lmlab.objectives import contrastive as c
from lmlab.objectives.reward import reward_pairs
from lmlab.testing.tiny import lively, random_preferences, tiny_lm, tiny_tokenformer
from lmlab.train.step import ratio_value

RNG = np.random.default_rng(0)
FIRST, SECOND = (jnp.asarray(RNG.normal(size=(12, 8)), jnp.float32) for _ in range(2))
ONES = jnp.ones(12)
PROTOTYPES = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
KEY = jax.random.key(0)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_sim_cse_of_identical_views_and_orthogonal_rows(tau):
    found = ratio_value(c.sim_cse(3 * jnp.eye(6), jnp.eye(6), jnp.ones(6), tau))
    assert found == pytest.approx(math.log1p(5 * math.exp(-1 / tau)), abs=1e-6)


def test_sim_cse_by_hand():
    unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
    logits = unit(FIRST) @ unit(SECOND).T / 0.1
    expected = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    assert ratio_value(c.sim_cse(FIRST, SECOND, ONES, 0.1)) == pytest.approx(expected, rel=1e-4)


def test_rows_of_weight_0_are_not_there():
    weights = jnp.asarray([1.0] * 8 + [0.0] * 4)
    first, second = FIRST.at[8:].set(0), SECOND.at[8:].set(7)
    for loss in (c.sim_cse, lambda *x: c.swav(*x, PROTOTYPES)):
        some, all_of_8 = loss(first, second, weights), loss(FIRST[:8], SECOND[:8], ONES[:8])
        np.testing.assert_allclose(some.sum, all_of_8.sum, rtol=1e-4)
        slope = jax.grad(lambda x, loss=loss: loss(x, second, weights).sum)(first)
        assert np.isfinite(slope).all()
        assert not slope[8:].any()
        nothing, slope = jax.value_and_grad(lambda x, loss=loss: loss(x, second, 0 * weights).sum)(first)
        assert nothing == 0
        assert not slope.any()


def test_codes_are_balanced_and_each_sums_to_1():
    scores = jnp.asarray(RNG.uniform(-1, 1, size=(40, 5)), jnp.float32)
    codes = c.sinkhorn(scores, jnp.ones(40), 0.5, iterations=30)
    np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(codes.sum(axis=0), 40 / 5, rtol=1e-3)
    # As the paper writes it, without logarithms.
    q = np.exp(np.asarray(scores, float) / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * 5
        q /= q.sum(axis=0, keepdims=True) * 40
    np.testing.assert_allclose(c.sinkhorn(scores, jnp.ones(40), 0.5, 3), (q * 40).T, rtol=1e-4)


def test_codes_of_scores_that_overflow_an_exponential():
    assert np.isfinite(c.sinkhorn(100 * SECOND, ONES)).all()


def test_swav_is_at_least_the_entropy_of_the_codes_and_leaves_them_without_gradient():
    loss = ratio_value(c.swav(FIRST, SECOND, ONES, PROTOTYPES))
    scores = [c.unit(view) @ c.unit(PROTOTYPES).T for view in (FIRST, SECOND)]
    codes = [c.sinkhorn(score, ONES) for score in scores]
    assert loss >= sum(float(-jnp.sum(q * jnp.log(q + 1e-30), axis=1).mean()) for q in codes)

    def with_fixed_codes(first):
        log_p = [jax.nn.log_softmax(c.unit(view) @ c.unit(PROTOTYPES).T / 0.1) for view in (first, SECOND)]
        return -jnp.sum(codes[1] * log_p[0] + codes[0] * log_p[1])

    slopes = [jax.grad(f)(FIRST) for f in (with_fixed_codes, lambda x: c.swav(x, SECOND, ONES, PROTOTYPES).sum)]
    np.testing.assert_allclose(*slopes, atol=1e-4)


def test_lengths_of_features_and_prototypes_mean_nothing():
    value = c.swav(FIRST, SECOND, ONES, PROTOTYPES).sum
    np.testing.assert_allclose(c.swav(9 * FIRST, SECOND / 3, ONES, 5 * PROTOTYPES).sum, value, rtol=1e-4)
    np.testing.assert_allclose(c.unit(FIRST * 0), 0)


def test_rows_of_pairs():
    features, weights = jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32), jnp.asarray([[1.0, 0.5], [2.0, 0.0]])
    ((rows, row_weights),) = c.answer_rows(features, weights)
    np.testing.assert_array_equal(rows, features.reshape(8, 3))
    np.testing.assert_array_equal(row_weights, [1, 1, 0.5, 0.5, 2, 2, 0, 0])
    (good, weighed), (bad, _) = c.side_rows(features, weights)
    np.testing.assert_array_equal(good, features[:, ::2].reshape(4, 3))
    np.testing.assert_array_equal(bad, features[:, 1::2].reshape(4, 3))
    np.testing.assert_array_equal(weighed, [1, 0.5, 2, 0])
    ((gaps, _),) = c.difference_rows(features, weights)
    np.testing.assert_array_equal(gaps[::2], good - bad)
    np.testing.assert_array_equal(gaps[1::2], bad - good)


ARMS = [
    (tiny_lm, c.answer_rows, lambda params, *views: c.sim_cse(*views)),
    (tiny_tokenformer, c.side_rows, lambda params, *views: c.swav(*views, params["prototypes"])),
]


@pytest.mark.parametrize(("make", "rows", "contrast"), ARMS)
def test_a_term_beside_the_loss_with_any_model(make, rows, contrast):
    model = reward_model(make(), "normal")
    prototypes = jnp.asarray(RNG.normal(size=(5, 16)), jnp.float32)
    params, batch = {**lively(model.init(KEY)), "prototypes": prototypes}, random_preferences(rows=2)
    plain, view = reward_pairs(model.rewards), c.dropout_view(model.features, model.lm.embed, 0.2)
    objective = jax.jit(c.with_contrast(plain, view, rows, contrast, 0.5))
    terms = objective(params, batch, KEY)
    alone = jax.jit(plain)(params, batch, KEY).losses["preference"]
    np.testing.assert_allclose(terms.losses["preference"].sum, alone.sum, rtol=1e-5)
    assert terms.scales["contrast"] == 0.5
    assert terms.losses["contrast"].sum > 0
    # Another key, another view.
    assert objective(params, batch, jax.random.key(1)).losses["contrast"].sum != terms.losses["contrast"].sum


def test_without_dropout_both_views_are_the_features():
    model = reward_model(tiny_lm(), "normal")
    params, batch = lively(model.init(KEY)), random_preferences()
    view = c.dropout_view(model.features, model.lm.embed, 0.0)(params, batch.answers, KEY)
    np.testing.assert_allclose(view, model.features(params, batch.answers), atol=1e-5)
