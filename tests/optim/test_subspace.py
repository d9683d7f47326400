"""Ways to find a subspace: against the exact one, on gradients that say nothing, and their signs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.optim.subspace import (
    cholesky_qr,
    distance,
    exact_svd,
    fix_signs,
    gaussian,
    gram,
    householder,
    newton_schulz,
    random_orthonormal,
    randomised,
    renewed,
    subspace_iteration,
)

KEY = jax.random.key(0)
RANK = 5
REFRESHES = {
    "gram": gram,
    "randomised": randomised(),
    "randomised_cholesky": randomised(orthonormalise=cholesky_qr),
    "subspace": subspace_iteration(),
    "subspace_cholesky": subspace_iteration(orthonormalise=cholesky_qr),
    "subspace_newton_schulz": subspace_iteration(orthonormalise=newton_schulz),
}
EVERY = REFRESHES | {"svd": exact_svd, "random": random_orthonormal}


def with_gap(rows, columns, gap=4.0, seed=0):
    """A matrix whose singular value number RANK is `gap` times the next one."""
    small = min(rows, columns)
    values = np.concatenate([np.linspace(3, 1, RANK), np.linspace(1, 0.3, small - RANK) / gap])
    U, V = (np.linalg.qr(np.random.default_rng(seed + k).normal(size=(k, small)))[0] for k in (rows, columns))
    return jnp.asarray((U * values) @ V.T, jnp.float32)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)], ids=str)
@pytest.mark.parametrize("name", REFRESHES)
def test_all_find_the_first_singular_vectors(name, shape):
    G = with_gap(*shape)
    old = jnp.zeros((shape[0], RANK))
    found = jax.jit(lambda G: renewed(REFRESHES[name], G, old, KEY))(G)
    assert float(distance(found, exact_svd(G, old, KEY))) < 1e-3
    assert np.allclose(found.T @ found, np.eye(RANK), atol=1e-4)


def test_distance_is_the_norm_of_the_difference_of_projectors():
    P, Q = (random_orthonormal(None, jnp.zeros((9, 3)), jax.random.key(i)) for i in range(2))
    assert np.isclose(distance(P, Q), jnp.linalg.norm(P @ P.T - Q @ Q.T, ord=2), atol=1e-6)
    assert float(distance(P, P)) < 1e-6


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_size_of_a_gradient_does_not_matter(name, size):
    G, old = with_gap(12, 9), jnp.zeros((12, RANK))
    both = [renewed(EVERY[name], factor * G, old, KEY) for factor in (1.0, size)]
    assert float(distance(*both)) < 1e-3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_that_says_nothing_leaves_the_basis(name, bad):
    G = with_gap(12, 9)
    wrong = jnp.zeros_like(G) if bad == 0 else G.at[3, 2].set(bad)
    turn = jax.jit(lambda G, old: renewed(EVERY[name], G, old, KEY))
    old = turn(G, jnp.zeros((12, RANK)))
    assert bool(jnp.all(turn(wrong, old) == old))
    first = turn(wrong, jnp.zeros((12, RANK)))
    assert np.allclose(first.T @ first, np.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_of_low_rank_still_gives_a_whole_basis(name):
    G = with_gap(12, 9)[:, :1] * jnp.ones((1, 9))
    found = renewed(EVERY[name], G, jnp.zeros((12, RANK)), KEY)
    assert np.allclose(found.T @ found, np.eye(RANK), atol=1e-3)
    again = renewed(EVERY[name], G, found, KEY)
    assert np.allclose(again.T @ again, np.eye(RANK), atol=1e-3)


@pytest.mark.parametrize("make", [householder, cholesky_qr, newton_schulz])
def test_bases_of_what_is_nearly_dependent(make):
    """Singular values over four orders of magnitude."""
    U, V = (jnp.linalg.qr(jax.random.normal(jax.random.key(i), (40, 8)))[0] for i in range(2))
    Y = (U * jnp.logspace(0, -4, 8)[None]) @ V[:8].T
    Q = make(Y)
    assert np.allclose(Q.T @ Q, np.eye(8), atol=1e-3)
    # The columns of Y lie in the space of Q.
    assert float(jnp.linalg.norm(Y - Q @ (Q.T @ Y))) < 1e-4 * float(jnp.linalg.norm(Y))


def test_iterations_follow_a_gradient_that_turns_slowly():
    old = renewed(exact_svd, with_gap(20, 30), jnp.zeros((20, RANK)), KEY)
    moved = with_gap(20, 30) + 0.05 * jax.random.normal(KEY, (20, 30))
    exact = exact_svd(moved, old, KEY)
    before, after = distance(old, exact), distance(renewed(subspace_iteration(1), moved, old, KEY), exact)
    assert float(after) < float(before) / 4


def test_signs_follow_the_old_basis_and_at_first_the_largest_entry():
    P = random_orthonormal(None, jnp.zeros((9, 3)), KEY)
    first = fix_signs(P, jnp.zeros_like(P))
    assert bool(jnp.all(jnp.max(first, axis=0) > -jnp.min(first, axis=0)))
    old = P * jnp.asarray([[1.0, -1.0, 1.0]])
    assert bool(jnp.all(fix_signs(P, old) == old))
    assert bool(jnp.all(fix_signs(-P, old) == old))


def test_gaussian_entries_have_variance_one_over_rank():
    P = gaussian(None, jnp.zeros((400, 50)), KEY)
    assert np.isclose(jnp.var(P), 1 / 50, rtol=0.03)
