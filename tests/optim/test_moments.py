"""Moments in a changing basis, and in 8 bits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import gradients, run

from lmlab.optim.galore import scale_by_galore
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.matrices import by_path, layout
from lmlab.optim.moments import KEEP, RESET, ROTATE, Change, rotate_moments, subspace_adam
from lmlab.optim.quantised import (
    BFLOAT16,
    INT4,
    SIGNED8,
    SMALL,
    SQUARE8,
    Coded,
    dynamic_code,
    stored_bytes,
)
from lmlab.optim.subspace import random_orthonormal
from lmlab.optim.timing import together


def change_of(side, old, new):
    how = layout(MatrixAxes((), (0,), (1,)), (6, 10), 3, side)
    overlap = new.T @ old
    return Change(how, jnp.ones((), bool), overlap if how.left else None, overlap if how.right else None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rotated_moments_are_those_of_the_formula(side):
    rows = 6 if side == "left" else 10
    old, new = (random_orthonormal(None, jnp.zeros((rows, 3)), jax.random.key(i)) for i in range(2))
    adam = subspace_adam(policy=ROTATE)
    low = gradients(3, 10) if side == "left" else gradients(6, 3)
    state = adam.init({"w": low[0]})
    for R in low:
        _, state = adam.update({"w": R}, state)
    moved = adam.move(state, {"w": change_of(side, old, new)})
    # arXiv 2410.16103, in float64 and left form.
    turn = (lambda x: x) if side == "left" else np.transpose
    M, V, C = (np.asarray(x, float) for x in (turn(state.mu["w"]), turn(state.nu["w"]), new.T @ old))
    d1, d2 = 1 - 0.9**7, 1 - 0.999**7
    m, v = M / d1, V / d2
    assert np.allclose(turn(moved.mu["w"]), C @ M, atol=1e-6)
    assert np.allclose(turn(moved.nu["w"]), d2 * np.abs((C * C) @ (v - m * m) + (C @ m) ** 2), atol=1e-7)
    assert not np.allclose(moved.mu["w"], state.mu["w"], atol=1e-2)
    same = adam.move(state, {"w": change_of(side, old, old)})
    chex.assert_trees_all_close(same, state, atol=1e-6)


def test_signs_of_columns_are_nothing_to_rotated_moments():
    old, new = (random_orthonormal(None, jnp.zeros((6, 3)), jax.random.key(i)) for i in range(2))
    adam, signs = subspace_adam(policy=ROTATE), jnp.asarray([1.0, -1.0, -1.0])
    state = adam.init({"w": jnp.zeros((3, 10))})
    for R in gradients(3, 10):
        _, state = adam.update({"w": R}, state)
    one, other = (adam.move(state, {"w": change_of("left", old, P)}) for P in (new, new * signs[None]))
    chex.assert_trees_all_close(other.mu["w"], signs[:, None] * one.mu["w"], atol=1e-6)
    chex.assert_trees_all_close(other.nu["w"], one.nu["w"], atol=1e-6)


def test_before_the_first_update_there_is_nothing_to_rotate():
    adam = subspace_adam(policy=ROTATE)
    state = adam.init({"w": jnp.zeros((3, 10))})
    old = random_orthonormal(None, jnp.zeros((6, 3)), jax.random.key(0))
    chex.assert_trees_all_equal(adam.move(state, {"w": change_of("left", old, old)}), state)


def test_what_varies_not_at_all_turns_with_the_basis():
    """With v = m^2 there is no variance, and coordinates turn like vectors."""
    C, m = gradients(3, 3, steps=1)[0], gradients(3, 5, steps=1)[0]
    turned, square = rotate_moments(m, m * m, C)
    assert np.allclose(square, turned**2, atol=1e-5)


def test_a_turn_there_and_back_within_the_space_is_none_for_first_moments():
    Q = random_orthonormal(None, jnp.zeros((3, 3)), jax.random.key(0))
    m, v = gradients(3, 5, steps=1)[0], jnp.ones((3, 5)) * 4
    assert np.allclose(rotate_moments(*rotate_moments(m, v, Q), Q.T)[0], m, atol=1e-5)


def test_a_reset_begins_anew():
    G = gradients(6, 10, steps=9)
    tx = scale_by_galore(by_path(), 2, timing=together(3), inner=subspace_adam(policy=RESET), refresh=random_once)
    whole, state = run(tx, G)
    for start in (3, 6):
        anew, _ = run(tx, G[start:])
        assert np.allclose(whole[start : start + 3], anew[:3], atol=1e-6)
    kept, _ = run(scale_by_galore(by_path(), 2, timing=together(3), refresh=random_once), G)
    assert np.allclose(kept[:3], whole[:3], atol=1e-6)
    assert not np.allclose(kept[3:], whole[3:], atol=1e-2)
    assert int(state.ages["w"][0, 0]) == 3


def random_once(G, old, key):
    """The same basis at every renewal."""
    return random_orthonormal(G, old, jax.random.key(7))


@pytest.mark.parametrize("policy", [KEEP, ROTATE, RESET], ids=["keep", "rotate", "reset"])
def test_moments_in_8_bits_step_nearly_alike(policy):
    # Columns of very different sizes, as rows of an embedding or channels of a layer have.
    G = gradients(64, 256, steps=12) * jnp.logspace(-3, 0, 256)[None, None]
    build = lambda **stores: scale_by_galore(
        by_path(), 32, timing=together(5), inner=subspace_adam(policy=policy, **stores)
    )
    full, _ = run(build(), G)
    small, state = run(build(mu_store=SIGNED8, nu_store=SQUARE8), G)
    assert {str(x.dtype) for x in jax.tree.leaves(state.inner[1:])} == {"uint8", "float32"}
    assert np.isfinite(small).all()
    assert float(jnp.abs(small).max()) < 2 * float(jnp.abs(full).max())
    assert float(jnp.linalg.norm(small - full)) < 0.15 * float(jnp.linalg.norm(full))
    assert stored_bytes((state.inner.mu, state.inner.nu)) <= 2 * 32 * 256 * (1 + 4 / 256)


def test_the_dynamic_code():
    signed, positive = dynamic_code(True), dynamic_code(False)
    for code in (signed, positive):
        assert len(code) == 256
        assert np.all(np.diff(code) > 0)
        assert code[-1] == 1
        assert 0 in code
    # As many on either side of 0, and the same ones, but for the two next to the ends.
    assert signed[0] == -1
    assert np.allclose(signed[1:127], -signed[128:-2][::-1])
    assert np.isclose(positive[1], 1e-6 * (0.1 + 0.55) / 2)


@pytest.mark.parametrize("shape", [(64, 256), (3, 40, 700), (16, 300, 1, 1), (5000,)], ids=str)
@pytest.mark.parametrize("store", [SIGNED8, SQUARE8, INT4], ids=["signed", "positive", "int4"])
def test_what_is_stored_is_near_what_was_given(shape, store):
    x = gradients(*shape, steps=1)[0]
    x = x * x if store is SQUARE8 else x
    stored = jax.jit(store.encode)(x)
    back = store.decode(stored, shape)
    assert back.shape == shape
    error = np.abs(back - x)
    if store is INT4:
        # Half of one of fifteen steps through what a block spans.
        assert error.max() <= float(jnp.max(x) - jnp.min(x)) / 30 + 1e-5
    else:
        assert error.max() <= 0.02 * float(jnp.abs(x).max())
        assert np.all(error <= 0.15 * np.abs(x) + 3e-4 * float(jnp.abs(x).max()))
        assert stored.codes.shape == shape
        chex.assert_trees_all_equal(store.encode(back), stored)
    assert stored_bytes(stored) < x.size * (0.56 if store is INT4 else 1.02) + 64


def test_second_moments_that_are_not_zero_stay_so():
    x = jnp.concatenate([jnp.ones((4, 256)), jnp.full((28, 256), 1e-30), jnp.zeros((4, 256))]).T.reshape(-1, 36 * 4)
    back = SQUARE8.decode(SQUARE8.encode(x), x.shape)
    assert bool(jnp.all((back > 0) == (x > 0)))


def test_small_arrays_stay_in_float32():
    x = gradients(SMALL - 1, steps=1)[0]
    chex.assert_trees_all_equal(SIGNED8.encode(x), x)
    assert isinstance(SIGNED8.encode(jnp.ones(SMALL)), Coded)


def test_projectors_in_4_bits_and_bfloat16():
    G = gradients(64, 256, steps=4)
    full, _ = run(scale_by_galore(by_path(), 16), G)
    for store, near in ((BFLOAT16, 0.03), (INT4, 0.3)):
        small, state = run(scale_by_galore(by_path(), 16, store=store), G)
        assert float(jnp.linalg.norm(small - full)) < near * float(jnp.linalg.norm(full))
        assert stored_bytes(state.left) <= {BFLOAT16: 2, INT4: 1.0}[store] * 64 * 16
    assert optax.tree.norm(full) > 0
