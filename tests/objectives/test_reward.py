"""The loss of reward differences by hand and at its optimum; the objective over pairs; targets, margins, weights."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import Preferences
from lmlab.objectives import treatments as cure
from lmlab.objectives.reward import preference_loss, reward_pairs, unbiased_targets
from lmlab.train.step import ratio_value, total_loss

RNG = np.random.default_rng(0)
D, Q, M = RNG.normal(0, 3, 200), RNG.random(200), RNG.normal(0, 1, 200)
KEY = jax.random.key(0)


def entropy(q):
    return -q * math.log(q) - (1 - q) * math.log(1 - q)


def loss(*args):
    return np.asarray(preference_loss(*(jnp.asarray(x, jnp.float32) for x in args)))


def test_values_and_slopes_by_hand():
    assert loss(0.0) == pytest.approx(math.log(2))
    direct = -Q * np.log(1 / (1 + np.exp(M - D))) - (1 - Q) * np.log(1 / (1 + np.exp(D - M)))
    np.testing.assert_allclose(loss(D, Q, M), direct, rtol=1e-4, atol=1e-6)
    slopes = jax.vmap(jax.grad(preference_loss))(*(jnp.asarray(x, jnp.float32) for x in (D, Q, M)))
    np.testing.assert_allclose(slopes, 1 / (1 + np.exp(M - D)) - Q, atol=1e-5)


def test_arms_are_choices_of_target_and_margin():
    np.testing.assert_allclose(loss(D, 1.0, M), loss(D - M), rtol=1e-4)  # margin is a shift
    np.testing.assert_array_equal(loss(D, 1 - 0.0), loss(D))  # smoothing by 0 is none
    np.testing.assert_allclose(loss(D, 0.5), loss(-D, 0.5), rtol=1e-6)  # no label: symmetric
    np.testing.assert_allclose(loss(D, 0.0), loss(-D), rtol=1e-6)  # a flip is target 0
    # Swapping the answers, with the other target and the margin's other sign, is the same loss.
    np.testing.assert_allclose(loss(D, Q, M), loss(-D, 1 - Q, -M), rtol=1e-5)
    np.testing.assert_allclose(loss(D, 0.0, M), loss(-D, 1.0, -M), rtol=1e-6)


@pytest.mark.parametrize("q", [0.8, 0.55, 0.1])
def test_least_where_the_log_odds_are_and_there_the_entropy(q):
    margin, best = 0.7, 0.7 + math.log(q / (1 - q))
    grid = np.linspace(best - 2, best + 2, 401)
    values = loss(grid, q, margin)
    assert grid[np.argmin(values)] == pytest.approx(best, abs=0.011)
    assert loss(best, q, margin) == pytest.approx(entropy(q), abs=1e-6)


def test_numbers_of_the_paper_for_smoothing_of_two_tenths():
    assert loss(math.log(4), 0.8) == pytest.approx(0.50040, abs=1e-5)
    assert math.log(4) == pytest.approx(1.38629, abs=1e-5)


def test_far_out_values_and_slopes_are_finite():
    for d in (-1e4, 1e4):
        value, slope = jax.value_and_grad(preference_loss)(jnp.float32(d), 0.9, 0.0)
        assert np.isfinite([value, slope]).all()


@pytest.mark.parametrize("flips", [0.1, 0.3])
def test_the_mean_over_flipped_labels_of_the_unbiased_loss_is_that_of_clean_ones(flips):
    given, turned = loss(D, unbiased_targets(1.0, flips)), loss(D, unbiased_targets(0.0, flips))
    np.testing.assert_allclose((1 - flips) * given + flips * turned, loss(D), rtol=1e-4, atol=1e-5)
    written = ((1 - flips) * loss(D) - flips * loss(-D)) / (1 - 2 * flips)
    np.testing.assert_allclose(given, written, rtol=1e-4, atol=1e-5)


def batch_of(rewards, weights, targets=None, margins=None):
    ones = jnp.ones_like(weights)
    targets = ones if targets is None else targets
    return Preferences(rewards, weights, targets, 0 * ones if margins is None else margins, None)


REWARDS = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
WEIGHTS = jnp.asarray([[1, 2], [1, 0], [0.5, 1], [0, 0], [1, 1]], jnp.float32)
TAKE = lambda params, rewards: rewards + params


def mean_loss(objective, params, batch):
    terms = objective(params, batch, KEY)
    return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})


def test_the_objective_is_the_weighted_mean_over_pairs():
    targets, margins = jnp.asarray(RNG.random((5, 2)), jnp.float32), jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32)
    batch = batch_of(REWARDS, WEIGHTS, targets, margins)
    objective = reward_pairs(TAKE, margin_scale=0.5, center=0.1)
    d, both = REWARDS[:, ::2] - REWARDS[:, 1::2], REWARDS[:, ::2] + REWARDS[:, 1::2]
    expected = np.average(loss(d, targets, 0.5 * margins), weights=WEIGHTS) + 0.1 * np.average(both**2, weights=WEIGHTS)
    assert mean_loss(objective, jnp.zeros(()), batch) == pytest.approx(expected, rel=1e-5)
    terms = objective(jnp.zeros(()), batch, KEY)
    found = {name: float(ratio_value(ratio)) for name, ratio in terms.metrics.items()}
    # Right is d > 0, whatever the margin says.
    assert found["accuracy"] == pytest.approx(np.average(d > 0, weights=WEIGHTS))
    assert found["margin"] == pytest.approx(np.average(d, weights=WEIGHTS), abs=1e-6)
    assert found["reward/square"] == pytest.approx(np.average(REWARDS**2, weights=np.repeat(WEIGHTS, 2, 1)), rel=1e-5)


def test_ties_are_half_right():
    terms = reward_pairs(TAKE)(jnp.zeros(()), batch_of(jnp.zeros((2, 2)), jnp.ones((2, 1))), KEY)
    assert ratio_value(terms.metrics["accuracy"]) == 0.5


def test_what_both_answers_share_changes_no_loss_but_the_centring():
    shift = jnp.asarray(RNG.normal(size=(5, 1)), jnp.float32)
    batch = batch_of(REWARDS, WEIGHTS)
    for center, same in ((0.0, True), (0.1, False)):
        objective = reward_pairs(TAKE, center=center)
        values = [float(mean_loss(objective, by, batch)) for by in (jnp.zeros((1, 1)), shift)]
        assert (values[0] == pytest.approx(values[1], rel=1e-5)) == same


def test_a_pair_that_weighs_nothing_may_hold_anything():
    broken = REWARDS.at[3].set(jnp.inf)
    objective = reward_pairs(TAKE)
    value, slope = jax.value_and_grad(lambda p: mean_loss(objective, p, batch_of(broken, WEIGHTS)))(jnp.zeros((5, 4)))
    assert value == pytest.approx(float(mean_loss(objective, jnp.zeros(()), batch_of(REWARDS, WEIGHTS))))
    assert not slope[3].any()


MU = jnp.asarray([-2.0, -0.5, 0.1, 0.4, 1.0, 3.0, -1.0, 2.0, 0.2, 0.3])


def test_treatments_are_what_they_say():
    given = cure.as_given(MU)
    chex.assert_trees_all_equal(given, cure.Treatment(jnp.ones(10), jnp.zeros(10), jnp.ones(10)))
    low = cure.lowest(MU, 0.2)
    assert np.flatnonzero(low).tolist() == [0, 6]
    chex.assert_trees_all_equal(cure.flip(MU, low), given._replace(targets_N=jnp.where(low, 0.0, 1.0)))
    chex.assert_trees_all_equal(cure.drop(MU, low), given._replace(weights_N=jnp.where(low, 0.0, 1.0)))
    np.testing.assert_allclose(cure.soft(MU).targets_N, 1 / (1 + np.exp(-MU)), rtol=1e-6)
    np.testing.assert_array_equal(cure.margin(MU, 2.0).margins_N, 2 * MU)
    np.testing.assert_array_equal(cure.margin(MU, 2.0, signed=False).margins_N, np.maximum(2 * MU, 0))
    np.testing.assert_allclose(np.unique(cure.rating_margin(MU).margins_N), [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    smoothed = {where: cure.smooth(MU, 0.2, where, 0.2).targets_N for where in ("all", "negative", "bottom", "top")}
    for where, places in {"all": range(10), "negative": [0, 1, 6], "bottom": [0, 6], "top": [5, 7]}.items():
        assert np.flatnonzero(smoothed[where] == np.float32(0.8)).tolist() == list(places)


@pytest.mark.parametrize("flips", [0.01, 0.2, 0.45])
def test_the_posterior_is_bayes_rule(flips):
    s = 1 / (1 + np.exp(-4 * np.asarray(MU, float)))
    expected = (1 - flips) * s / ((1 - flips) * s + flips * (1 - s))
    np.testing.assert_allclose(cure.posterior(MU, flips, 4.0).targets_N, expected, rtol=1e-4, atol=1e-7)


def test_a_treated_pair_in_its_true_order_has_the_same_loss():
    flips = jnp.asarray(RNG.random(10) < 0.5)
    treated = cure.posterior(MU, 0.2)._replace(margins_N=cure.margin(MU).margins_N)
    true = jnp.asarray(RNG.normal(size=10), jnp.float32)
    turned = cure.with_flips(treated, flips)
    np.testing.assert_allclose(
        loss(jnp.where(flips, -true, true), treated.targets_N, treated.margins_N),
        loss(true, turned.targets_N, turned.margins_N), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_data_smoothing_moves_targets_toward_the_model():
    q, d = jnp.ones(3), jnp.asarray([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(cure.toward_model(q, d, 0.0), q)
    np.testing.assert_allclose(cure.toward_model(q, d, 0.25), 0.75 + 0.25 / (1 + np.exp(-d)), rtol=1e-6)
