"""What every optimiser owes those who compose it: the generic tests over the table of transforms."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.objectives.next_token import next_token
from lmlab.testing.tables import TRANSFORMS
from lmlab.testing.tiny import lively, random_batch, tiny_lm
from lmlab.train.state import init_state
from lmlab.train.step import make_step

LM = tiny_lm()
PARAMS = LM.init(jax.random.key(0))
GRADS = lively(jax.tree.map(jnp.zeros_like, PARAMS), seed=1)


@pytest.fixture(params=TRANSFORMS)
def tx(request) -> optax.GradientTransformation:
    return TRANSFORMS[request.param](LM.axes)


def run(tx, grads=GRADS, params=PARAMS, jit=True, steps=3):
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_updates_have_the_shapes_of_the_parameters(tx):
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_tree_all_finite(updates)


def test_state_keeps_its_structure_and_types(tx):
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(run(tx)[1], state)


def test_jit_and_eager_agree(tx):
    chex.assert_trees_all_close(run(tx), run(tx, jit=False), rtol=1e-4, atol=1e-5)


def test_init_under_eval_shape(tx):
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, PARAMS), tx.init(PARAMS))


def test_in_a_chain_and_masked(tx):
    half = jax.tree_util.tree_map_with_path(lambda path, _: "mlp" in str(path), PARAMS)
    chained = optax.chain(tx, optax.scale(0.5))
    one, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    two, _ = chained.update(GRADS, chained.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x / 2, one), two, rtol=1e-6)
    frozen, _ = run(optax.partition({True: optax.set_to_zero(), False: optax.sgd(0.1)}, half))
    chex.assert_trees_all_equal(frozen["layers"]["mlp"], PARAMS["layers"]["mlp"])


def test_zero_gradient_and_no_history_only_decays(tx):
    # From rest, no rule but decay may move a parameter, and decay only shrinks.
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    moved, _ = run(tx, zero, steps=1)
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(moved), strict=True):
        assert bool(jnp.all(jnp.abs(after) <= jnp.abs(before)))


def test_it_learns(tx):
    step = jax.jit(make_step(next_token(LM), tx))
    state, batch = init_state(LM.init, tx, 0), random_batch()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
