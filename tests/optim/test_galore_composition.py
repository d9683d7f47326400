"""GaLore among other transforms, in programs, in checkpoints; and the elements of its state, exactly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.galore import STATIC, galore, scale_by_galore
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.matrices import by_axes, by_path
from lmlab.optim.moments import ROTATE, subspace_adam
from lmlab.optim.precision import cast_parameters
from lmlab.optim.residual import plain
from lmlab.optim.subspace import exact_svd
from lmlab.optim.timing import together
from lmlab.testing.tables import TRANSFORMS
from lmlab.testing.tiny import random_batch, tiny_lm
from lmlab.train.checkpoint import finish, open_checkpoints, restore, save
from lmlab.train.state import init_state
from lmlab.train.step import make_step

SIZES = {
    "60M": (512, 1376, 8, 8, 128), "130M": (768, 2048, 12, 12, 256), "350M": (1024, 2736, 16, 24, 256),
    "1B": (2048, 5461, 32, 24, 512), "7B": (4096, 11008, 32, 32, 1024),
}  # fmt: skip
ELEMENTS = {
    "60M": (116_147_200, 81_871_872, 79_217_664), "130M": (268_211_712, 171_480_576, 159_684_096),
    "350M": (735_938_560, 326_404_096, 294_848_512), "1B": (2_678_165_504, 1_042_460_672, 916_643_840),
    "7B": (13_476_831_232, 4_702_347_264, 4_022_870_016),
}  # fmt: skip
"""Of Adam, GaLore and GaLore on the longer side; the authors' LLaMAs with a vocabulary of 32,000."""


@pytest.mark.parametrize("size", SIZES)
def test_state_elements_are_those_of_the_table(size):
    width, ffn, heads, layers, rank = SIZES[size]
    lm = transformer(TransformerConfig(
        vocab_size=32_000, layers=layers, width=width, tied=False, attention=AttentionConfig(heads=heads),
        mlp=MLPConfig(width=ffn),
    ))  # fmt: skip
    params = jax.eval_shape(lm.init, jax.random.key(0))
    rules = [optax.scale_by_adam(), *(scale_by_galore(by_axes(lm.axes), rank, side=s) for s in ("std", "reverse_std"))]
    found = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, params)) if x.dtype == jnp.float32) for tx in rules
    ]
    assert tuple(found) == ELEMENTS[size]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_state_has_arrays_without_elements(name):
    """Orbax refuses them."""
    lm = tiny_lm()
    case = TRANSFORMS[name]
    init = lambda key: case.build(lm.axes).init(cast_parameters(lm.init(key), case.parameters))
    state = jax.eval_shape(init, jax.random.key(0))
    assert all(x.size > 0 for x in jax.tree.leaves(state))


def gradients(*shape, steps=5, seed=0):
    return jax.random.normal(jax.random.key(seed), (steps, *shape))


def primitives(jaxpr, inside=()):
    """(name, names of what it is inside of) of all operations."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, (*inside, eqn.primitive.name))


def test_the_decomposition_is_in_a_branch():
    tx = scale_by_galore(by_path(), 2, refresh=exact_svd)
    params = {"w": jnp.zeros((6, 10))}
    found = list(primitives(jax.make_jaxpr(tx.update)(params, tx.init(params)).jaxpr))
    assert [("cond" in inside) for name, inside in found if name == "svd"] == [True]


def test_over_seeds_it_stays_there_while_they_share_the_count():
    tx = scale_by_galore(by_path(), 2, refresh=exact_svd)
    params = {"w": jnp.zeros((6, 10))}
    state = tx.init(params)
    many = jax.tree.map(lambda x: jnp.stack([x] * 3), params)
    one = tx.init(params)
    axes = jax.tree.map(lambda x: None if x.dtype == jnp.int32 else 0, one)
    states = jax.tree.map(lambda x, axis: x if axis is None else jnp.stack([x] * 3), one, axes)
    update = jax.vmap(tx.update, (0, axes), (0, axes))
    found = list(primitives(jax.make_jaxpr(update)(many, states).jaxpr))
    assert [("cond" in inside) for name, inside in found if name == "svd"] == [True]
    G = gradients(6, 10, steps=3)
    updates, states = jax.jit(update)({"w": G}, states)
    for i in range(3):
        alone, _ = tx.update({"w": G[i]}, state)
        chex.assert_trees_all_close(alone["w"], updates["w"][i], atol=1e-5)


def test_a_second_call_compiles_nothing():
    tx = scale_by_galore(by_path(), 2)
    params = {"w": jnp.ones((6, 10)), "b": jnp.ones((3,))}
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for _ in range(3):
        _, state = update(params, state)


def test_masked_and_with_hyperparameters_injected():
    params = {"w": gradients(6, 10)[0], "v": gradients(7, 5)[0]}
    tx = galore(0.1, by_path(), 2)
    alone, _ = tx.update({"w": params["w"]}, tx.init({"w": params["w"]}))
    masked = optax.masked(tx, {"w": True, "v": False})
    updates, _ = masked.update(params, masked.init(params), params)
    chex.assert_trees_all_equal(updates, {"w": alone["w"], "v": params["v"]})
    injected = optax.inject_hyperparams(galore, static_args=STATIC)(optax.linear_schedule(0.1, 0.0, 2), by_path(), 2)
    state = injected.init(params)
    for rate in (0.1, 0.05):
        updates, state = jax.jit(injected.update)(params, state, params)
        assert np.isclose(state.hyperparams["learning_rate"], rate)
    chex.assert_trees_all_close(updates["w"], alone["w"] / 2, rtol=0.02, atol=1e-6)


def test_optax_finds_the_parameters_in_the_state():
    params = {"w": jnp.ones((6, 10)), "b": jnp.ones((3,))}
    tx = scale_by_galore(by_path("w"), 2)
    state = tx.init(params)
    ones = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal(ones.inner.mu, jax.tree.map(lambda x: x + 1, state.inner.mu))
    chex.assert_trees_all_equal(ones.left["w"], state.left["w"] + 1)
    chex.assert_trees_all_equal(ones.step, state.step)


def test_the_subspace_is_that_of_the_accumulated_gradient():
    lm = tiny_lm(layers=1)
    tx = TRANSFORMS["galore_rotated"].build(lm.axes)
    states = []
    for microbatches in (1, 4):
        step = jax.jit(make_step(next_token(lm), tx, microbatches=microbatches))
        state = init_state(lm.init, tx, 0)
        for seed in range(2):
            state, _ = step(state, random_batch(rows=4, seed=seed))
        states.append(state)
    chex.assert_trees_all_close(states[0].opt_state, states[1].opt_state, atol=1e-3)
    chex.assert_trees_all_close(states[0].params, states[1].params, atol=1e-3)


@pytest.mark.parametrize("name", ["galore_rotated", "galore_8bit", "q_galore", "apollo"])
def test_a_restored_run_goes_on_bit_for_bit(name, tmp_path):
    lm = tiny_lm()
    case = TRANSFORMS[name]
    tx = case.build(lm.axes)
    step = jax.jit(make_step(next_token(lm), tx))
    states = [init_state(lm.init, tx, 0)]
    for seed in range(5):
        states.append(step(states[-1], random_batch(seed=seed))[0])
    checkpoints = open_checkpoints(tmp_path / "checkpoints", keep_last=1)
    save(checkpoints, states[3], {})
    finish(checkpoints)
    state = restore(open_checkpoints(tmp_path / "checkpoints"), states[0])
    chex.assert_trees_all_equal(state.opt_state, states[3].opt_state)
    for seed in (3, 4):
        state, _ = step(state, random_batch(seed=seed))
    chex.assert_trees_all_equal(state.opt_state, states[5].opt_state)
    chex.assert_trees_all_equal(state.params, states[5].params)


def test_bfloat16_parameters_have_float32_state_and_stay_finite():
    params = {"w": jnp.ones((6, 10), jnp.bfloat16), "b": jnp.ones((10,), jnp.bfloat16)}
    # Steps of 0.01: smaller ones than half the spacing of bfloat16 would be rounded away.
    tx = galore(1e-2, by_path("w"), 2, inner=subspace_adam(policy=ROTATE), timing=together(50), lift=plain(1.0))
    state = tx.init(params)
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}

    def one(carry, key):
        params, state = carry
        noise = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), params)
        updates, state = tx.update(jax.tree.map(lambda p, n: p + 0.1 * n, params, noise), state, params)
        return (optax.apply_updates(params, updates), state), None

    end, _ = jax.jit(lambda: jax.lax.scan(one, (params, state), jax.random.split(jax.random.key(0), 1000)))()
    chex.assert_trees_all_equal_shapes_and_dtypes(end, (params, state))
    chex.assert_tree_all_finite(end)
    assert float(optax.tree.norm(end[0])) < 0.5 * float(optax.tree.norm(params))


def parabola(x):
    return jnp.sum((x - jnp.asarray([[1.0, 2.0, -1.0]])) ** 2)


def rosenbrock(x):
    return jnp.sum(100.0 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2)


def mixed(tree):
    return parabola(tree["w"]) + jnp.sum((tree["b"] - 0.5) ** 2) + jnp.sum((tree["stack"] - 1.0) ** 2)


PROBLEMS = {
    "parabola": (parabola, jnp.asarray([[-1.0, 10.0, 1.0], [3.0, 0.0, -4.0], [0.0, 5.0, 2.0]])),
    "rosenbrock": (rosenbrock, jnp.asarray([[0.0, 0.0], [-1.0, 0.5]])),
    "matrix": (lambda x: jnp.sum((x - jnp.eye(5, 4)) ** 2), jnp.ones((5, 4))),
    "mixed": (mixed, {"w": jnp.zeros((2, 3)), "b": jnp.zeros((4,)), "stack": jnp.zeros((2, 3, 4))}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_solves_the_problems_that_optax_asks_of_its_optimisers(problem):
    loss, start = PROBLEMS[problem]
    axes = lambda path, shape: {2: MatrixAxes((), (0,), (1,)), 3: MatrixAxes((0,), (1,), (2,))}.get(len(shape))
    tx = galore(1e-2, axes, 1, inner=subspace_adam(policy=ROTATE), timing=together(10), lift=plain(1.0))

    def one(carry, _):
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (end, _), _ = jax.jit(lambda x: jax.lax.scan(one, (x, tx.init(x)), length=30_000))(start)
    assert float(loss(end)) < 1e-2
