"""The state of an optimiser grows with the parameters: what was there goes on, what is new begins."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.core.errors import UserError
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.optim.extend import extend_state

AXES = {"keys": ("embed", "param_tokens"), "norm": ("norm",)}
SMALL, LARGE = {"keys": jnp.ones((4, 3)), "norm": jnp.ones(4)}, {"keys": jnp.ones((4, 5)), "norm": jnp.ones(4)}
RULES = ["adamw", "lion", "muon", "sgd"]


def rule(name, parameters="float32", **schedule):
    constant = ScheduleConfig(**{"peak": 1e-2, "warmup": 0, "decay": "constant", **schedule})
    return build_optimizer(OptimConfig(rule=name, schedule=constant, parameters=parameters, weight_decay=0.0), AXES, 10)


def slopes(seed, params=SMALL):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {name: jax.random.normal(key, params[name].shape) for name, key in zip(params, keys, strict=True)}


def padded(tree):
    return tree | {"keys": jnp.pad(tree["keys"], ((0, 0), (0, 2)))}


def trained(tx, params, steps=2):
    state = tx.init(params)
    for seed in range(steps):
        _, state = tx.update(slopes(seed), state, params)
    return state


@pytest.mark.parametrize("parameters", ["float32", "bfloat16_master", "bfloat16_stochastic"])
@pytest.mark.parametrize("name", RULES)
def test_an_extended_state_is_one_of_the_grown_parameters(name, parameters):
    tx = rule(name, parameters)
    dtype = jnp.float32 if parameters == "float32" else jnp.bfloat16
    small, large = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (SMALL, LARGE))
    state = extend_state(trained(tx, small), tx.init(large))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(large))
    updates, _ = jax.jit(tx.update)(padded(slopes(2)), state, large)
    chex.assert_tree_all_finite(updates)


# Muon scales its steps by the sides of a matrix.
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_old_parameters_are_stepped_as_before_and_new_ones_without_gradient_stay(name):
    tx = rule(name)
    state = trained(tx, SMALL)
    wanted, _ = tx.update(slopes(2), state, SMALL)
    got, _ = tx.update(padded(slopes(2)), extend_state(state, tx.init(LARGE)), LARGE)
    chex.assert_trees_all_close(got, padded(wanted), atol=1e-7)


def test_master_copies_keep_their_digits_and_begin_with_the_new_parameters():
    tx = rule("adamw", "bfloat16_master")
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    state = trained(tx, half(SMALL))
    new = half(LARGE | {"keys": 3 * LARGE["keys"]})
    extended = extend_state(state, tx.init(new))
    chex.assert_trees_all_equal(extended.master["keys"][:, :3], state.master["keys"])
    assert jnp.all(extended.master["keys"][:, 3:] == 3)


def test_counts_go_on_and_the_schedule_begins_anew():
    tx = rule("adamw", warmup=5, decay="cosine")
    state = trained(tx, SMALL, steps=3)
    extended = extend_state(state, tx.init(LARGE))
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    parts = jax.tree.leaves(extended, is_leaf=lambda part: isinstance(part, kinds))
    counts = {type(part).__name__: int(part.count) for part in parts if isinstance(part, kinds)}
    assert counts == {"ScaleByAdamState": 3, "ScaleByScheduleState": 0}


@pytest.mark.parametrize("parameters", ["float32", "bfloat16_master"])
def test_factored_moments_are_refused(parameters):
    # Of 132 x 130 the rows are the larger axis, of 132 x 140 the columns: with the factors exchanged all sizes fit.
    tx, dtype = rule("adafactor", parameters), jnp.float32 if parameters == "float32" else jnp.bfloat16
    small, large = ({"keys": jnp.ones((132, size), dtype), "norm": jnp.ones(4, dtype)} for size in (130, 140))
    with pytest.raises(UserError, match=r"factored.*--optimizer reset"):
        extend_state(tx.init(small), tx.init(large))


@pytest.mark.parametrize("galore", [GaloreConfig(rank=2), GaloreConfig(rank=2, moment_bits=8)], ids=["32", "8"])
def test_projected_gradients_are_refused(galore):
    tx = build_optimizer(OptimConfig(galore=galore), AXES, 10)
    with pytest.raises(UserError, match=r"projected.*--optimizer reset"):
        extend_state(tx.init(SMALL), tx.init(LARGE))


def test_another_rule_or_a_smaller_model_is_refused():
    adam, sgd = rule("adamw"), rule("sgd")
    with pytest.raises(UserError, match="one of the same rule"):
        extend_state(trained(sgd, SMALL), adam.init(LARGE))
    with pytest.raises(UserError, match=r"mu/keys = \[4, 5\]: expected a part of \[4, 3\]"):
        extend_state(adam.init(LARGE), adam.init(SMALL))
