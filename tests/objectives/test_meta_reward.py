"""MetaRM: the spread J, the step ahead, first and second order."""

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import Preferences, Ratio, Terms
from lmlab.models.reward import mlp_head, reward_model
from lmlab.objectives.meta_reward import MetaBatch, along_gradient, answer_spread, at_random, meta_reward
from lmlab.objectives.reward import preference_loss, reward_pairs
from lmlab.testing.tiny import lively, random_preferences, tiny_lm
from lmlab.train.step import ratio_value, total_loss

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
HEAD = mlp_head(3, 5)


def every(rewards):
    return jnp.ones(rewards.shape, bool)


def value(rewards):
    rewards = jnp.asarray(rewards, jnp.float32)
    return float(ratio_value(answer_spread(rewards, every(rewards))))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_bounds_and_what_changes_nothing(k):
    rewards = RNG.normal(size=(6, k))
    assert value(0 * rewards) == pytest.approx((k - 1) / (2 * k))
    assert value(1e4 * np.arange(k)[None]) == pytest.approx((k - 1) / k)
    assert (k - 1) / (2 * k) < value(rewards) < (k - 1) / k
    assert value(rewards[:, ::-1]) == pytest.approx(value(rewards), rel=1e-6)
    assert value(rewards + RNG.normal(size=(6, 1))) == pytest.approx(value(rewards), rel=1e-5)


def test_two_answers_and_by_enumeration():
    rewards = RNG.normal(size=(4, 3))
    sigma = lambda x: 1 / (1 + np.exp(-x))
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([2 / 9 * sum(sigma(abs(row[i] - row[j])) for i, j in pairs) for row in rewards])
    assert value(rewards) == pytest.approx(expected, rel=1e-5)
    assert value([[1.0, 3.0]]) == pytest.approx(sigma(2.0) / 2)


def test_answers_that_are_not_there_do_not_count():
    rewards = jnp.asarray([[1.0, 2.0, 9.0], [4.0, jnp.nan, 8.0]])
    found = answer_spread(rewards, jnp.asarray([[True, True, False], [True, False, False]]))
    assert found.weight == 1
    assert ratio_value(found) == pytest.approx(1 / (1 + np.exp(-1.0)) / 2)
    slope = jax.grad(lambda r: answer_spread(r, jnp.zeros((2, 3), bool)).sum)(jnp.nan_to_num(rewards))
    assert not slope.any()


def test_ties_have_no_slope():
    slope = jax.grad(lambda r: answer_spread(r, every(r)).sum)(jnp.ones((2, 4)))
    assert not slope.any()


def spread(params, answers):
    rewards = HEAD.rewards(params, answers)
    return answer_spread(rewards, every(rewards))


def make_batch(dtype=jnp.float32):
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), dtype)
    ones = jnp.ones((6, 1), dtype)
    return MetaBatch(Preferences(draw(6, 2, 3), ones, ones, 0 * ones, None), draw(6, 4, 3))


def loss_of(objective, batch):
    def loss(params):
        terms = objective(params, batch, KEY)
        return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})

    return loss


PLAIN = reward_pairs(HEAD.rewards)


def test_a_step_of_length_0_is_the_objective_bit_for_bit():
    params, batch = HEAD.init(KEY), make_batch()
    with_step = jax.value_and_grad(loss_of(meta_reward(PLAIN, spread, 0.0), batch))(params)
    chex.assert_trees_all_equal(with_step, jax.value_and_grad(loss_of(PLAIN, batch.pairs))(params))


def test_first_order_is_the_gradient_at_the_point_ahead():
    params, batch, eta = HEAD.init(KEY), make_batch(), 0.7
    rise = jax.grad(lambda p: ratio_value(spread(p, batch.samples)))(params)
    ahead = jax.tree.map(lambda p, g: p + eta * g, params, rise)
    expected = jax.value_and_grad(loss_of(PLAIN, batch.pairs))(ahead)
    found = jax.value_and_grad(loss_of(meta_reward(PLAIN, spread, eta), batch))(params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert ratio_value(spread(ahead, batch.samples)) > ratio_value(spread(params, batch.samples))


@pytest.mark.parametrize("direct", [along_gradient, at_random])
def test_parts_that_stand_still_do_not_go_ahead(direct):
    params, seen = HEAD.init(KEY), []
    name, *others = params
    assert others

    def recording(params, batch, key):
        seen.append(params)
        return PLAIN(params, batch, key)

    def lengths(gradient, key):
        assert set(gradient) == set(others)
        return direct(gradient, key)

    terms = meta_reward(recording, spread, 0.7, direct=lengths, still=(name,))(params, make_batch(), KEY)
    assert terms.losses["preference"].weight == 6
    chex.assert_trees_all_equal(seen[0][name], params[name])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), seen[0], params)
    assert any(jax.tree.leaves([moved[other] for other in others]))


def in_float64(params, batch, key):
    """As PLAIN, whose sums are rounded to float32."""
    rewards = HEAD.rewards(params, batch.answers)
    losses = preference_loss(rewards[:, 0] - rewards[:, 1])
    return Terms({"preference": Ratio(jnp.sum(losses), jnp.asarray(6.0))}, {"preference": 1.0}, {})


def test_second_order_by_central_differences_and_how_far_the_first_is_off():
    with jax.enable_x64(True):
        batch = make_batch(jnp.float64)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), HEAD.init(KEY))
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        exact = lambda eta: loss_of(meta_reward(in_float64, spread, eta, second_order=True), batch)
        slope = jax.flatten_util.ravel_pytree(jax.grad(exact(0.5))(params))[0]
        loss = jax.jit(lambda x: exact(0.5)(unravel(x)))
        moves = 1e-5 * np.eye(len(flat))
        numeric = np.asarray([(loss(flat + move) - loss(flat - move)) / 2e-5 for move in moves])
        np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-4 * np.abs(numeric).max())

        def gap(eta):
            first = jax.grad(loss_of(meta_reward(in_float64, spread, eta), batch))(params)
            second = jax.grad(exact(eta))(params)
            return float(
                jnp.linalg.norm(jax.flatten_util.ravel_pytree(first)[0] - jax.flatten_util.ravel_pytree(second)[0])
            )

        # First minus second order goes to 0 with eta, in proportion.
        assert gap(0.02) > 0
        assert gap(0.02) / gap(0.01) == pytest.approx(2, rel=0.1)


def test_the_random_direction_is_as_long_as_the_gradient():
    gradient = HEAD.init(KEY)
    length = lambda tree: float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))
    drawn = at_random(gradient, KEY)
    assert length(drawn) == pytest.approx(length(gradient), rel=1e-5)
    cosine = sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (drawn, gradient)), strict=True))
    assert abs(float(cosine)) < 0.9 * length(gradient) ** 2
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    chex.assert_trees_all_close(at_random(zeros, KEY), zeros)


def test_of_a_language_model_whose_head_is_fresh_the_step_goes_nowhere():
    model = reward_model(tiny_lm())
    batch = random_preferences()

    def spread(params, answers):
        return answer_spread(model.rewards(params, answers), answers.ends_BS > 0)

    both = MetaBatch(batch, batch.answers)
    fresh = model.init(KEY)
    rise = jax.jit(jax.grad(lambda p: spread(p, batch.answers).sum))(fresh)
    chex.assert_trees_all_equal(rise, jax.tree.map(jnp.zeros_like, rise))
    objective = reward_pairs(model.rewards)
    terms = jax.jit(meta_reward(objective, spread, 0.3))(lively(fresh), both, KEY)
    plain = jax.jit(objective)(lively(fresh), batch, KEY)
    assert terms.losses["preference"].sum != plain.losses["preference"].sum
    assert 0.25 <= ratio_value(terms.metrics["spread"]) < 0.75
