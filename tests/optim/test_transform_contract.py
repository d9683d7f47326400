"""What every optimiser owes those who compose it: the generic tests over the table of transforms."""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.core.types import Params
from lmlab.objectives.next_token import next_token
from lmlab.optim.precision import cast_parameters
from lmlab.testing.tables import TRANSFORMS
from lmlab.testing.tiny import lively, random_batch, tiny_lm
from lmlab.train.step import ratio_value

LM = tiny_lm()
PARAMS = LM.init(jax.random.key(0))
GRADS = lively(jax.tree.map(jnp.zeros_like, PARAMS), seed=1)
ROUNDING = 5e-5
"""Singular vectors move by the rounding of their matrix over the gap between two singular values."""


@jax.jit
@jax.value_and_grad
def loss_and_slope(params):
    """Loss of a batch in float32, whatever the parameters are."""
    full = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return ratio_value(next_token(LM)(full, random_batch(), jax.random.key(0)).losses["next_token"])


@dataclass(frozen=True)
class Made:
    """A transform, and parameters in the type that it wants."""

    tx: optax.GradientTransformation
    """Compiled, so that all tests share two programs."""
    eager: optax.GradientTransformation
    params: Params
    rtol: float
    """How near results are that differ in the order of float32 operations."""
    stored: frozenset[str]


@pytest.fixture(scope="module", params=TRANSFORMS)
def made(request) -> Made:
    case = TRANSFORMS[request.param]
    tx, params = case.build(LM.axes), cast_parameters(PARAMS, case.parameters)
    rtol = 1e-4 if case.parameters == "float32" else 2**-7
    return Made(compiled(tx), tx, params, rtol, case.stored)


def compiled(tx):
    return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))


def run(tx, params, grads=GRADS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_updates_have_the_shapes_of_the_parameters_and_are_float32(made):
    updates, _ = made.tx.update(GRADS, made.tx.init(made.params), made.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_tree_all_finite(updates)


def test_state_keeps_its_structure_and_types(made):
    state = made.tx.init(made.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(run(made.tx, made.params)[1], state)


def test_moments_are_float32_whatever_the_parameters_are_unless_they_are_coded(made):
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made.tx.init(made.params))} <= made.stored


def test_jit_and_eager_agree(made):
    # Two updates: one that finds subspaces, one that keeps them.
    one, two = (run(tx, made.params, steps=2) for tx in (made.tx, made.eager))
    chex.assert_trees_all_close(one, two, rtol=made.rtol, atol=ROUNDING)


def test_a_scan_of_steps_is_the_steps(made):
    def one(carry, _):
        updates, state = made.eager.update(GRADS, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    scanned, _ = jax.jit(lambda: jax.lax.scan(one, (made.params, made.tx.init(made.params)), length=3))()
    chex.assert_trees_all_close(scanned, run(made.tx, made.params), rtol=made.rtol, atol=ROUNDING)


def test_init_under_eval_shape(made):
    abstract = jax.eval_shape(made.eager.init, made.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, made.eager.init(made.params))


def test_in_a_chain_and_partitioned(made):
    half = jax.tree_util.tree_map_with_path(lambda path, _: "mlp" in str(path), PARAMS)
    chained = compiled(optax.chain(made.eager, optax.scale(0.5)))
    one, two = (tx.update(GRADS, tx.init(made.params), made.params)[0] for tx in (made.tx, chained))
    # Two programs, which may round otherwise; an update under master weights is a difference of such as are near 1.
    chex.assert_trees_all_close(jax.tree.map(lambda x: x / 2, one), two, rtol=1e-5, atol=1e-6)
    parts = optax.partition({True: optax.set_to_zero(), False: made.eager}, half)
    moved, _ = run(compiled(parts), made.params)
    chex.assert_trees_all_equal(moved["layers"]["mlp"], made.params["layers"]["mlp"])
    assert bool(jnp.any(moved["embedding"] != made.params["embedding"]))


def test_zero_gradient_and_no_history_only_decays(made):
    # From rest, no rule but decay may move a parameter, and decay only shrinks.
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    moved, _ = run(made.tx, made.params, zero, steps=1)
    for before, after in zip(jax.tree.leaves(made.params), jax.tree.leaves(moved), strict=True):
        assert before.dtype == after.dtype
        assert bool(jnp.all(jnp.abs(after) <= jnp.abs(before)))


def test_it_learns(made):
    params, state, losses = made.params, made.tx.init(made.params), []
    for _ in range(20):
        value, grads = loss_and_slope(params)
        updates, state = made.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]
