"""What every objective owes the train step: the generic tests over the table of objectives."""

import chex
import jax
import jax.numpy as jnp
import pytest

from lmlab.testing.tables import OBJECTIVES
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm()
KEY = jax.random.key(1)


@pytest.fixture(scope="module", params=OBJECTIVES)
def case(request):
    """The objective as one program, which the tests share."""
    case = OBJECTIVES[request.param]
    params = lively(case.model(LM).init(jax.random.key(0)))
    return jax.jit(case.build(LM)), params, case.batch()


def test_terms_are_scalar_float32_sums_with_scales(case):
    objective, params, batch = case
    terms = objective(params, batch, KEY)
    assert terms.losses.keys() == terms.scales.keys()
    for ratio in [*terms.losses.values(), *terms.metrics.values()]:
        chex.assert_shape([ratio.sum, ratio.weight], ())
        chex.assert_type([ratio.sum, ratio.weight], jnp.float32)


def test_sums_of_parts_are_the_sum_of_the_whole(case):
    objective, params, batch = case
    whole = objective(params, batch, KEY)
    rows = jax.tree.leaves(batch)[0].shape[0]
    parts = [objective(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch), KEY) for i in range(rows)]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    chex.assert_trees_all_close((total.losses, total.metrics), (whole.losses, whole.metrics), rtol=1e-5)


def test_weights_do_not_depend_on_the_parameters(case):
    objective, params, batch = case

    def weight(params):
        return sum(term.weight for term in objective(params, batch, KEY).losses.values())

    slopes = jax.jit(jax.grad(weight))(params)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_metrics_carry_no_gradient(case):
    objective, params, batch = case
    slopes = jax.jit(jax.grad(lambda p: sum(m.sum for m in objective(p, batch, KEY).metrics.values())))(params)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_same_key_same_terms_under_jit_and_without(case):
    objective, params, batch = case
    with jax.disable_jit():
        eager = objective(params, batch, KEY)
    chex.assert_trees_all_close(objective(params, batch, KEY), eager, rtol=2e-5)


def test_nothing_to_learn_from_is_zero_and_finite(case):
    objective, params, batch = case
    empty = jax.tree.map(jnp.zeros_like, batch)
    total = lambda p: sum(term.sum for term in objective(p, empty, KEY).losses.values())
    value, slopes = jax.jit(jax.value_and_grad(total))(params)
    assert value == 0
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))
