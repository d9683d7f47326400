"""Fira, APOLLO and FRUGAL by their formulas, and random projections that nobody stores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import gradients, run

from lmlab.core.errors import UserError
from lmlab.optim.galore import scale_by_galore
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.matrices import by_path
from lmlab.optim.residual import apollo, fira, frugal, limit_growth, plain
from lmlab.optim.subspace import exact_svd, gaussian, random_orthonormal
from lmlab.optim.timing import together

SHAPES = ((6, 10), (10, 6))


def projections(shape):
    """Gradients, P R and the Adam step N lifted and not, by hand; the subspace is that of the first gradient."""
    G = np.asarray(gradients(*shape), float)
    left = shape[0] <= shape[1]
    flip = (lambda x: x) if left else np.transpose
    P = np.linalg.svd(flip(G[0]), full_matrices=False)[0][:, :2]
    M = V = 0
    for step, g in enumerate(G, start=1):
        R = P.T @ flip(g)
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R * R
        N = (M / (1 - 0.9**step)) / (np.sqrt(V / (1 - 0.999**step)) + 1e-8)
        columns = np.linalg.norm(N, axis=0) / np.linalg.norm(R, axis=0)
        yield g, flip(P @ R), flip(P @ N), flip(np.broadcast_to(columns, P.shape[:1] + columns.shape)), N, R


def limited(update, last):
    size = np.linalg.norm(update)
    allowed = min(size, 1.01 * last) if last else size
    return update * allowed / size, allowed


def made(lift, shape):
    return run(scale_by_galore(by_path(), 2, refresh=exact_svd, lift=lift), gradients(*shape))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fira(shape):
    last = 0
    for update, (G, PR, PN, columns, _, _) in zip(made(fira(0.25), shape), projections(shape), strict=True):
        rest, last = limited((G - PR) * columns, last)
        assert np.allclose(update, 0.25 * PN + rest, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apollo(shape):
    for lift, scale in ((apollo(), 1), (apollo(128.0, per="tensor"), 128)):
        last = 0
        for update, (G, _, _, columns, N, R) in zip(made(lift, shape), projections(shape), strict=True):
            share = columns if scale == 1 else np.linalg.norm(N) / np.linalg.norm(R)
            expected, last = limited(scale**0.5 * G * share, last)
            assert np.allclose(update, expected, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_frugal(shape):
    for update, (G, PR, PN, _, _, _) in zip(made(frugal(0.25, 0.5), shape), projections(shape), strict=True):
        assert np.allclose(update, 0.25 * PN + 0.5 * np.sign(G - PR), atol=1e-4)


def test_norms_grow_by_a_hundredth_and_fall_freely():
    size, seen = jnp.zeros((2,)), []
    for factor in (1.0, 5.0, 5.0, 0.1, 0.0, 3.0):
        update, size = limit_growth(factor * jnp.ones((2, 2, 2)) * jnp.asarray([1.0, 2.0])[:, None, None], size)
        seen.append(float(jnp.linalg.norm(update[0])))
        assert np.allclose(size, seen[-1] * np.asarray([1, 2]), rtol=1e-5)
    # After a zero gradient nothing limits.
    assert np.allclose(seen, [2, 2.02, 2.0402, 0.2, 0, 6], rtol=1e-5)


def test_matrices_of_a_stack_are_limited_one_by_one():
    choice = lambda *_: MatrixAxes((0,), (1,), (2,))
    G = gradients(3, 6, 10)
    stacked, _ = run(scale_by_galore(choice, 2, refresh=exact_svd, lift=fira()), G)
    for i in range(3):
        alone, _ = run(scale_by_galore(by_path(), 2, refresh=exact_svd, lift=fira()), G[:, i])
        for a, b in zip(stacked, alone, strict=True):
            assert np.allclose(a[i], b, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rest_that_is_but_rounding_has_no_sign(shape):
    G = gradients(*shape)
    whole, _ = run(scale_by_galore(by_path(), 8, refresh=exact_svd, lift=frugal(0.25, 0.25)), G)
    wanted, _ = run(scale_by_galore(by_path(), 8, refresh=exact_svd, lift=plain(0.25)), G)
    assert np.array_equal(whole, wanted)


@pytest.mark.parametrize("lift", [fira(1.0), apollo(1.0), apollo(1.0, per="tensor")], ids=["fira", "apollo", "mini"])
def test_without_an_inner_transform_the_gradient_comes_back_whole(lift):
    """N = R: the projection and the rest, or the gradient times 1."""
    G = gradients(6, 10, steps=1)
    (update,), _ = run(scale_by_galore(by_path(), 2, inner=optax.identity(), lift=lift), G)
    assert np.allclose(update, G[0], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("refresh", [gaussian, random_orthonormal], ids=["gaussian", "orthonormal"])
def test_drawn_projectors_are_drawn_again_and_not_stored(refresh, shape):
    tx = scale_by_galore(
        by_path(), 2, refresh=refresh, store=None, timing=together(3), inner=optax.identity(), lift=plain(1.0)
    )
    G = jnp.broadcast_to(gradients(*shape, steps=1), (7, *shape))
    updates, state = run(tx, G)
    assert sum(x.size for x in jax.tree.leaves(state)) == 1
    same = [bool(jnp.all(a == b)) for a, b in itertools.pairwise(updates)]
    assert same == [True, True, False, True, True, False]
    assert all(int(jnp.linalg.matrix_rank(update)) == 2 for update in updates)
    adam = scale_by_galore(by_path(), 2, refresh=refresh, store=None)
    assert sum(x.size for x in jax.tree.leaves(adam.init({"w": G[0]})) if x.dtype == jnp.float32) == 2 * 2 * 10


def test_channels_need_one_side():
    tx = scale_by_galore(by_path(), 2, side="two_sided", lift=fira())
    with pytest.raises(UserError, match="two_sided"):
        tx.update({"w": jnp.ones((6, 10))}, tx.init({"w": jnp.ones((6, 10))}))
    with pytest.raises(UserError, match="per = 'row'"):
        apollo(per="row")
