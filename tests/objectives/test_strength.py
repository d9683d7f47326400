"""Strength of preferences, who judges whom out of fold, and the noise rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.evals.ranking import auc
from lmlab.objectives.strength import fit_noise, noise_rate, out_of_fold, preference_strength

RNG = np.random.default_rng(0)
SCORES = jnp.asarray(RNG.normal(size=(5, 20)), jnp.float32)
PLAIN = np.asarray(SCORES)


def test_mean_population_deviation_and_vote():
    mean, std, vote = preference_strength(SCORES)
    np.testing.assert_allclose(mean, PLAIN.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(np.mean((PLAIN - PLAIN.mean(axis=0)) ** 2, axis=0)), atol=1e-6)
    np.testing.assert_allclose(vote, np.sum(PLAIN > 0, axis=0) / 5, rtol=1e-6)
    same = preference_strength(jnp.tile(SCORES[:1], (7, 1)))
    np.testing.assert_allclose(same.std_N, 0, atol=1e-6)
    for one, other in zip(preference_strength(SCORES[::-1]), (mean, std, vote), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_normalised_members_count_alike_whatever_their_scale():
    scaled = SCORES * jnp.asarray([1.0, 10.0, 0.1, 3.0, 1.0])[:, None]
    normal = [preference_strength(scores, normalise=True).mean_N for scores in (SCORES, scaled)]
    np.testing.assert_allclose(*normal, atol=1e-6)
    assert np.isfinite(preference_strength(jnp.zeros((2, 3)), normalise=True).mean_N).all()


def test_out_of_fold_takes_the_member_that_has_not_seen_the_pair():
    folds = RNG.integers(0, 3, (2, 20))
    scores = jnp.asarray(RNG.normal(size=(2, 3, 20)), jnp.float32)
    expected = [[scores[r, folds[r, i], i] for i in range(20)] for r in range(2)]
    np.testing.assert_array_equal(out_of_fold(scores, jnp.asarray(folds)), expected)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_noise_rate_of_a_model_that_knows_the_truth(rate):
    sure = RNG.uniform(0.8, 1.0, 20_000)
    flips = RNG.random(20_000) < rate
    found = noise_rate(jnp.asarray(np.where(flips, 1 - sure, sure), jnp.float32))
    assert found == pytest.approx(rate, abs=0.01 + 0.1 * rate)


def test_what_is_not_sure_does_not_count_and_nothing_gives_nothing():
    # Threshold 0.66: of the five one is for the label, none against it.
    assert noise_rate(jnp.asarray([0.95, 0.6, 0.6, 0.6, 0.55])) == 0
    # A model without an opinion agrees with all that it is given.
    assert noise_rate(jnp.full(4, 0.5)) == 0
    # Threshold 0.56: three for, two against.
    assert noise_rate(jnp.asarray([0.9, 0.9, 0.8, 0.1, 0.1])) == pytest.approx(0.4)


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_scale_that_strengths_were_drawn_with_is_found(scale):
    mu = RNG.normal(size=50_000)
    truth = RNG.random(50_000) < 1 / (1 + np.exp(-scale * mu))
    given = truth ^ (RNG.random(50_000) < 0.2)
    labelled = jnp.asarray(np.where(given, mu, -mu), jnp.float32)
    known, rate = fit_noise(labelled, [0.2])
    assert abs(np.log2(known / scale)) <= 0.25
    assert rate == np.float32(0.2)
    if scale == 4:  # else there are few pairs whose label is all but certain, and noise is hard to tell from doubt
        found, rate = fit_noise(labelled)
        assert abs(np.log2(found / scale)) <= 0.5
        assert rate == pytest.approx(0.2, abs=0.03)


def test_errors_of_a_weak_model_are_noise_to_confident_learning_alone():
    # Labels are drawn from the model's own probabilities: nobody has turned any round.
    mu = RNG.normal(size=20_000)
    labelled = jnp.asarray(np.where(RNG.random(20_000) < 1 / (1 + np.exp(-mu)), mu, -mu), jnp.float32)
    assert fit_noise(labelled)[1] <= 0.02
    assert noise_rate(jax.nn.sigmoid(labelled)) > 0.15


def test_the_area_under_the_curve_counts_pairs():
    scores, positive = RNG.integers(0, 6, 40), RNG.random(40) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(wins))
    assert np.isnan(auc(scores, np.ones(40, bool)))


def test_all_of_it_can_be_jitted():
    jitted = jax.jit(lambda scores: (preference_strength(scores), noise_rate(jax.nn.sigmoid(scores[0]))))
    np.testing.assert_allclose(jitted(SCORES)[0].mean_N, preference_strength(SCORES).mean_N, atol=1e-6)
