"""LDAdam by its algorithm; LoRA and factorised weights by what they are at first and what they learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.objectives.next_token import next_token
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.ldadam import scale_by_ldadam
from lmlab.optim.low_rank import as_products, lora_factors, random_factors, with_products
from lmlab.optim.matrices import by_axes, by_path, to_matrices
from lmlab.testing.tiny import lively, random_batch, tiny_lm

LM = tiny_lm()
PARAMS = lively(LM.init(jax.random.key(0)))
CHOICE = by_axes(LM.axes)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)], ids=str)
def test_ldadam_is_its_algorithm(shape):
    """In float64 by hand, up to the basis of the first step, which only has to be some basis of that space."""
    tx = scale_by_ldadam(by_path(), 2)
    G = jax.random.normal(jax.random.key(0), (4, *shape))
    flip = (lambda x: np.asarray(x, float)) if shape[0] <= shape[1] else (lambda x: np.asarray(x, float).T)
    state, update = tx.init({"w": G[0]}), jax.jit(tx.update)
    b1, b2, M, V, e, old = 0.908, 0.99, np.zeros((2, 10)), np.zeros((2, 10)), np.zeros((6, 10)), np.zeros((6, 2))
    for t, g in enumerate(G):
        step, state = update({"w": g}, state)
        P = flip(state.galore.left["w"] if shape[0] <= shape[1] else state.galore.right["w"])
        a = flip(g) + e
        m, v = (M / (1 - b1**t), V / (1 - b2**t)) if t else (M, V)
        if t:
            B = b1 * old @ m + (1 - b1) * a
            Y = B @ (B.T @ old)
            assert np.linalg.norm(Y - P @ (P.T @ Y)) < 1e-4 * np.linalg.norm(Y)
        C, was = P.T @ old, M
        M, V = C @ M, (1 - b2**t) * np.abs((C * C) @ (v - m * m) + (C @ m) ** 2)
        R = P.T @ a
        M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R * R
        N = (M / (1 - b1 ** (t + 1))) / (np.sqrt(V / (1 - b2 ** (t + 1))) + 1e-8)
        e = a - P @ R + b1 / (1 - b1) * (old @ was - P @ (P.T @ (old @ was)))
        assert np.allclose(flip(step["w"]), P @ N, atol=1e-3)
        assert np.allclose(flip(state.error["w"]), e, atol=1e-3)
        old = P


def test_of_a_gradient_of_the_rank_nothing_is_left_over():
    u, v = jax.random.normal(jax.random.key(0), (6, 2)), jax.random.normal(jax.random.key(1), (2, 10))
    tx = scale_by_ldadam(by_path("w"), 2)
    grads = {"w": u @ v, "b": jnp.ones((3,))}
    _, state = tx.update(grads, tx.init(grads))
    assert float(jnp.abs(state.error["w"]).max()) < 1e-4
    assert jax.tree.leaves(state.error["b"]) == []


def test_lora_changes_nothing_at_first_and_then_by_its_rank():
    factors = lora_factors(PARAMS, CHOICE, 3, jax.random.key(0))
    merged = with_products(PARAMS, factors, CHOICE)
    chex.assert_trees_all_equal(merged, PARAMS)
    moved = lively(factors)
    change = jax.tree.map(jnp.subtract, with_products(PARAMS, moved, CHOICE, scale=2.0), PARAMS)
    kernel = change["layers"]["mlp"]["gate_up"]["kernel"]  # [L, D, 2, F]
    matrices = np.asarray(to_matrices(kernel, MatrixAxes((0, 2), (1,), (3,))))
    assert np.linalg.matrix_rank(matrices, rtol=1e-4).tolist() == [[3, 3], [3, 3]]
    assert float(jnp.abs(change["embedding"]).max()) == 0
    assert float(jnp.abs(kernel).max()) > 0


def test_products_have_the_size_of_the_parameters_that_they_replace():
    big = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(1), x.shape), {"w": jnp.ones((200, 300))})
    factors = random_factors(big, by_path(), 20, jax.random.key(0))
    product = as_products(big, factors, by_path())["w"]
    assert np.isclose(jnp.std(product), 0.02, rtol=0.05)
    assert int(jnp.linalg.matrix_rank(product)) == 20


def test_factors_learn_under_any_objective():
    objective = next_token(LM)
    factors, tx = lora_factors(PARAMS, CHOICE, 2, jax.random.key(0)), optax.adam(1e-2)
    batch, state = random_batch(), None

    def loss(factors):
        term = objective(with_products(PARAMS, factors, CHOICE), batch, jax.random.key(0)).losses["next_token"]
        return term.sum / term.weight

    state, step, losses = tx.init(factors), jax.jit(jax.value_and_grad(loss)), []
    for _ in range(10):
        value, grads = step(factors)
        updates, state = tx.update(grads, state)
        factors = optax.apply_updates(factors, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.01
