"""Subspaces that hold most of a gradient: an orthonormal basis P [m, r] from a matrix G [m, n].

Every `Refresh` is a function of one matrix in float32, of size 1 by its largest entry; `renewed` is what to call. All
products are made in full float32: a TPU would otherwise round their operands to bfloat16.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key

Refresh: TypeAlias = Callable[[Any, Array, Key], Array]
"""`refresh(G_MN, old_MR, key) -> P_MR`; the old basis is zero before the first refresh. G is None where bases are drawn
again at every step: random ones do not read it."""
Orthonormalise: TypeAlias = Callable[[Array], Array]
"""`orthonormalise(Y_MR) -> Q_MR`: an orthonormal basis of a space that contains the columns of Y."""


def householder(Y_MR: Array) -> Array:
    """By QR: one call of a library on CPUs, slow on TPUs."""
    return jnp.linalg.qr(Y_MR)[0]


def cholesky_qr(Y_MR: Array) -> Array:
    """By Cholesky factors of Y^T Y, three times (arXiv 1809.11085): products and a small triangular solve alone."""
    Y_MR = _unit_columns(Y_MR)
    identity = jnp.eye(Y_MR.shape[1], dtype=Y_MR.dtype)
    # The first pass is for columns that are nearly dependent; what the shift leaves undone the others do.
    for shift in (1e-5, 0.0, 0.0):
        gram_RR = Y_MR.T @ Y_MR
        lower_RR = jnp.linalg.cholesky(gram_RR + shift * jnp.trace(gram_RR) * identity)
        Y_MR = jax.lax.linalg.triangular_solve(lower_RR, Y_MR, lower=True, transpose_a=True)
    return Y_MR


def newton_schulz(Y_MR: Array) -> Array:
    """By iterations of products alone: Muon's polynomial lifts small singular values, the cubic one brings all to 1."""
    Y_MR = _unit_columns(Y_MR)
    Y_MR = Y_MR / jnp.linalg.norm(Y_MR)
    for _ in range(14):
        gram_RR = Y_MR.T @ Y_MR
        Y_MR = 3.4445 * Y_MR + Y_MR @ (-4.775 * gram_RR + 2.0315 * gram_RR @ gram_RR)
    for _ in range(6):
        Y_MR = 1.5 * Y_MR - 0.5 * Y_MR @ (Y_MR.T @ Y_MR)
    return Y_MR


def _unit_columns(Y_MR: Array) -> Array:
    """Columns of norm 1 and a grain of noise, by which the basis is whole also where Y has rank below r."""
    size_1R = jnp.linalg.norm(Y_MR, axis=0, keepdims=True)
    noise_MR = jax.random.normal(jax.random.key(0), Y_MR.shape) / jnp.sqrt(len(Y_MR))
    gone_1R = size_1R <= 1e-6 * jnp.max(size_1R)
    return jnp.where(gone_1R, noise_MR, Y_MR / jnp.where(gone_1R, 1, size_1R) + 3e-5 * noise_MR)


def exact_svd(G_MN: Array, old_MR: Array, key: Key) -> Array:
    """The first r left singular vectors: the reference (arXiv 2403.03507, algorithm 2), slow."""
    del key
    return jnp.linalg.svd(G_MN, full_matrices=False)[0][:, : old_MR.shape[1]]


def gram(G_MN: Array, old_MR: Array, key: Key) -> Array:
    """The same from eigenvectors on the shorter side. Directions below 3e-4 of the first are lost in float32."""
    del key
    rows, columns = G_MN.shape
    top = lambda square: jnp.linalg.eigh(square)[1][:, ::-1][:, : old_MR.shape[1]]
    return top(G_MN @ G_MN.T) if rows <= columns else householder(G_MN @ top(G_MN.T @ G_MN))


def randomised(
    oversample: int = 8, iterations: int = 3, orthonormalise: Orthonormalise = householder
) -> Refresh:  # fmt: skip
    """By a random range finder (arXiv 0909.4061, algorithm 4.4) and an SVD of r + oversample rows."""

    def refresh(G_MN: Array, old_MR: Array, key: Key) -> Array:
        rank = old_MR.shape[1]
        width = min(rank + oversample, *G_MN.shape)
        Q = orthonormalise(G_MN @ jax.random.normal(key, (G_MN.shape[1], width)))
        for _ in range(iterations):
            Q = orthonormalise(G_MN @ orthonormalise(G_MN.T @ Q))
        # Eigenvectors of the small square turn the basis to the singular vectors, first ones first.
        small = Q.T @ G_MN
        return Q @ jnp.linalg.eigh(small @ small.T)[1][:, ::-1][:, :rank]

    return refresh


def subspace_iteration(
    iterations: int = 1, first: int = 5, orthonormalise: Orthonormalise = householder
) -> Refresh:  # fmt: skip
    """By power iterations from the old basis, `first` of them from a random one where there is none.

    Gradients change slowly, so one iteration a refresh follows them, for 4 m n r operations.
    """

    def refresh(G_MN: Array, old_MR: Array, key: Key) -> Array:
        power = lambda _, P_MR: orthonormalise(G_MN @ (G_MN.T @ P_MR))
        cold = jnp.all(old_MR == 0)
        start_MR = jax.lax.cond(cold, lambda: gaussian(G_MN, old_MR, key), lambda: old_MR)
        return jax.lax.fori_loop(0, jnp.where(cold, first, iterations), power, start_MR)

    return refresh


def gaussian(G_MN: Array, old_MR: Array, key: Key) -> Array:
    """Random, entries of variance 1 / r, whatever G is (Flora, arXiv 2402.03293; APOLLO, arXiv 2412.05270)."""
    del G_MN
    return jax.random.normal(key, old_MR.shape) / jnp.sqrt(old_MR.shape[1])


def random_orthonormal(G_MN: Array, old_MR: Array, key: Key) -> Array:
    """A random orthonormal basis, whatever G is (GoLore, arXiv 2410.11289)."""
    return householder(gaussian(G_MN, old_MR, key))


def renewed(refresh: Refresh, G_MN: Array, old_MR: Array, key: Key) -> Array:
    """The new basis, its signs fixed by the old one.

    A gradient that is zero or not finite says nothing: the old basis stays; a first one is that of random numbers.
    """
    size = jnp.max(jnp.abs(G_MN))
    good = tells(size)
    chance = lambda: jax.random.normal(jax.random.fold_in(key, 1), G_MN.shape)
    # Of size 1, squares neither overflow nor vanish.
    unit_MN = jax.lax.cond(good, lambda: G_MN / size, chance)
    with jax.default_matmul_precision("highest"):
        fresh_MR = fix_signs(refresh(unit_MN, old_MR, key), old_MR)
    wanted = (good | jnp.all(old_MR == 0)) & jnp.all(jnp.isfinite(fresh_MR))
    return jnp.where(wanted, fresh_MR, old_MR)


def tells(size: Array) -> Array:
    """Whether gradients whose largest entries these are say anything of their subspaces."""
    return jnp.isfinite(size) & (size > 0)


def fix_signs(new_MR: Array, old_MR: Array) -> Array:
    """Columns that point as the old ones do; without old ones, those whose largest entry is positive.

    Singular vectors have no sign of their own, and moments that are kept would change theirs at every refresh.
    """
    largest_1R = jnp.argmax(jnp.abs(new_MR), axis=0, keepdims=True)
    first_1R = jnp.take_along_axis(new_MR, largest_1R, axis=0)
    along_1R = jnp.where(jnp.all(old_MR == 0), first_1R, jnp.sum(new_MR * old_MR, axis=0, keepdims=True))
    return jnp.where(along_1R < 0, -new_MR, new_MR)


def distance(P_MR: Array, Q_MR: Array) -> Array:
    """How far two subspaces lie apart: ||P P^T - Q Q^T||_2, the sine of the largest angle, in [0, 1]."""
    return jnp.linalg.norm(P_MR - Q_MR @ (Q_MR.T @ P_MR), ord=2)
