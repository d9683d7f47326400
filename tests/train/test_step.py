"""The train step: microbatches change nothing, terms are weighed globally, state advances."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.types import Ratio, Terms
from lmlab.objectives.next_token import next_token
from lmlab.testing.tables import OBJECTIVES
from lmlab.testing.tiny import random_batch, tiny_lm
from lmlab.train.state import init_state, new_state
from lmlab.train.step import make_step

LM = tiny_lm()
# Plain descent: Adam divides by the gradient's own size and so blows rounding of tiny gradients up.
TX = optax.sgd(0.1)


def run(objective, batch, microbatches, steps=3, lm=LM):
    step = jax.jit(make_step(objective, TX, microbatches=microbatches))
    state = init_state(lm.init, TX, 0)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("microbatches", [2, 8])
def test_one_batch_of_8_is_8_of_1(name, microbatches):
    # Rows hold different numbers of labels, so a mean of means would be off in the first digit.
    case = OBJECTIVES[name]
    batch = case.batch(rows=8, seed=5)
    whole, parts = (run(case.build(LM), batch, m, lm=case.model(LM)) for m in (1, microbatches))
    chex.assert_trees_all_close(whole[0].params, parts[0].params, atol=1e-6)
    chex.assert_trees_all_close(whole[1], parts[1], rtol=1e-5, atol=1e-6)


# Keeps the gradient that it is given for its state, and moves nothing.
KEEP = optax.GradientTransformation(
    lambda params: optax.tree.zeros_like(params, dtype=jnp.float32),
    lambda grads, state, params: (optax.tree.zeros_like(grads), grads),
)


@pytest.mark.parametrize("microbatches", [1, 2, 8])
def test_gradients_of_bfloat16_parameters_lose_one_rounding_a_part(microbatches):
    batch, half = random_batch(rows=8, seed=5), optax.tree.cast(LM.init(jax.random.key(0)), jnp.bfloat16)

    def gradient(params, parts):
        step = jax.jit(make_step(next_token(LM), KEEP, microbatches=parts))
        return step(new_state(params, KEEP, jax.random.key(0)), batch)[0].opt_state

    exact = gradient(optax.tree.cast(half, jnp.float32), 1)
    for ours, wanted in zip(jax.tree.leaves(gradient(half, microbatches)), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.float32
        assert float(jnp.max(jnp.abs(ours - wanted))) <= 2**-7 * float(jnp.max(jnp.abs(wanted)))


def test_sums_over_microbatches_and_norms_are_float32():
    # Gradients of the eight parts: 1 and seven times 2^-9, which bfloat16 could not add to 1.
    def objective(params, batch, key):
        return Terms({"a": Ratio(jnp.sum(params["p"] * jnp.sum(batch, axis=0)), jnp.ones(()) / 8)}, {"a": 1.0}, {})

    small = 2.0**-9
    batch = jnp.asarray([[1.0]] + [[small]] * 7)
    state = new_state({"p": jnp.asarray([1.0], jnp.bfloat16)}, KEEP, jax.random.key(0))
    after, metrics = jax.jit(make_step(objective, KEEP, microbatches=8))(state, batch)
    assert float(after.opt_state["p"][0]) == 1 + 7 * small
    assert float(metrics["grad_norm"]) == 1 + 7 * small
    # The norm of 300 ones; in bfloat16 their sum would end at 256.
    ones = new_state({"p": jnp.ones(300, jnp.bfloat16)}, KEEP, jax.random.key(0))
    _, metrics = jax.jit(make_step(objective, KEEP))(ones, jnp.zeros((1, 300)))
    assert metrics["param_norm"].dtype == jnp.float32
    assert np.isclose(metrics["param_norm"], 300**0.5, rtol=1e-6)


def weighted(params, batch, key):
    """Two terms with weights and a metric that can be checked by hand; the gradient is known."""
    x, w = batch["x"], batch["w"]
    return Terms(
        losses={
            "a": Ratio(jnp.sum(w * params["p"] * x), jnp.sum(w)),
            "b": Ratio(params["p"] ** 2, jnp.ones(())),
        },
        scales={"a": 2.0, "b": 0.5},
        metrics={"mean_x": Ratio(jnp.sum(x), jnp.asarray(float(x.size)))},
    )


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_loss_is_scale_times_sum_over_weight(microbatches):
    batch = {"x": jnp.asarray([1.0, 2.0, 3.0, 4.0]), "w": jnp.asarray([1.0, 0.0, 0.0, 2.0])}
    tx = optax.sgd(1.0)
    state = init_state(lambda key: {"p": jnp.asarray(3.0)}, tx, 0)
    state, metrics = jax.jit(make_step(weighted, tx, microbatches=microbatches))(state, batch)
    # a: (1*1 + 2*4) / 3 = 3 per unit of p. b has weight 1 in each microbatch, so its mean is p^2.
    assert np.isclose(metrics["loss"], 2 * 3 * 3 + 0.5 * 9)
    assert np.isclose(metrics["loss/a"], 9)
    assert np.isclose(metrics["loss/b"], 9)
    assert np.isclose(metrics["mean_x"], 2.5)
    assert np.isclose(state.params["p"], 3 - (2 * 3 + 0.5 * 2 * 3))
    assert np.isclose(metrics["grad_norm"], 9)


def test_a_batch_without_labels_moves_nothing():
    batch = random_batch(rows=4)
    batch = batch.replace(label_mask_BT=jnp.zeros_like(batch.label_mask_BT))
    state, metrics = run(next_token(LM), batch, 2)
    chex.assert_trees_all_equal(state.params, init_state(LM.init, TX, 0).params)
    assert metrics["loss"] == 0


def test_weights_pass_costs_no_model():
    # The pass that sums the weights must not run the model: compiled FLOPs stay those of one gradient.
    batch = random_batch(rows=8)
    state = init_state(LM.init, TX, 0)
    objective = next_token(LM, chunk=100)
    step = jax.jit(make_step(objective, TX)).lower(state, batch).compile().cost_analysis()["flops"]
    total = lambda params: objective(params, batch, state.key).losses["next_token"].sum
    alone = jax.jit(jax.grad(total)).lower(state.params).compile().cost_analysis()["flops"]
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    assert step < 1.1 * alone + 60 * parameters


@pytest.mark.parametrize("microbatches", [1, 2])
def test_still_parts_are_read_and_neither_differentiated_nor_moved(microbatches):
    def objective(params, batch, key):
        moved = params["p"] * jnp.sum(batch) + params["held"]["p"] * params["p"]
        return Terms({"a": Ratio(jnp.sum(moved), jnp.ones(()) / microbatches)}, {"a": 1.0}, {})

    params = {"p": jnp.asarray([1.0, 2.0]), "held": {"p": jnp.asarray([5.0, 7.0])}}
    tx = optax.adam(0.1)
    state = new_state(params, tx, jax.random.key(0), still=("held",))
    assert {leaf.shape for leaf in jax.tree.leaves(state.opt_state)} == {(), (2,)}
    assert "held" not in state.opt_state[0].mu
    after, metrics = jax.jit(make_step(objective, tx, microbatches=microbatches))(state, jnp.ones(4))
    chex.assert_trees_all_equal(after.params["held"], params["held"])
    assert bool(jnp.all(after.params["p"] < params["p"]))
    # 4 + 5 and 4 + 7, however the rows are dealt: held is read once a part, of weight 1 / parts each.
    assert np.isclose(metrics["grad_norm"], np.hypot(4 + 5 * microbatches, 4 + 7 * microbatches))
    assert np.isclose(metrics["param_norm"], jnp.linalg.norm(after.params["p"]))
    assert after.still == ("held",)


def test_step_compiles_once():
    step = jax.jit(chex.assert_max_traces(make_step(next_token(LM), TX), n=1))
    state = init_state(LM.init, TX, 0)
    for seed in range(3):
        state, _ = step(state, random_batch(seed=seed))
    assert int(state.step) == 3


def test_seed_decides_the_run():
    one, again, other = (init_state(LM.init, TX, seed).params for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert bool(jnp.any(one["embedding"] != other["embedding"]))
