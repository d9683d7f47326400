"""LDAdam: Adam in a subspace that follows the gradient at every step, and what was projected away comes back later
(arXiv 2410.16103). The buffer of errors is as large as the chosen parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmlab.core.types import Array, Params
from lmlab.optim.galore import GaloreState, scale_by_galore
from lmlab.optim.matrices import Choice, Layout, Side, chosen_leaves, from_matrices, to_matrices
from lmlab.optim.moments import ROTATE, subspace_adam
from lmlab.optim.projector import Bases, Held, bases
from lmlab.optim.quantised import FLOAT32
from lmlab.optim.residual import plain
from lmlab.optim.subspace import Orthonormalise, householder, subspace_iteration
from lmlab.optim.timing import together


class LdadamState(NamedTuple):
    """State of `scale_by_ldadam`."""

    galore: GaloreState
    error: Any
    """What is to be added to the next gradient: float32 like the parameters, `optax.MaskedNode()` if not chosen."""


def scale_by_ldadam(
    matrices: Choice, rank: float, *, b1: float = 0.908, b2: float = 0.99, eps: float = 1e-8,
    side: Side = "std", orthonormalise: Orthonormalise = householder, seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Adam on projections of the chosen matrices, with error feedback (algorithm 1).

    The basis is turned by one power iteration on b1 * (lifted mean) + (1 - b1) * (gradient with error), moments are
    rotated into it, and what neither basis holds of gradient and momentum is added to the next gradient.
    """
    galore = scale_by_galore(
        matrices, rank, refresh=subspace_iteration(orthonormalise=orthonormalise), timing=together(1), side=side,
        inner=subspace_adam(b1, b2, eps, policy=ROTATE), lift=plain(1.0), seed=seed,
    )  # fmt: skip

    def init(params: Params) -> LdadamState:
        treedef: Any = jax.tree.structure(params)
        error = [
            jnp.zeros(leaf.layout.shape, jnp.float32) if leaf.layout else optax.MaskedNode()
            for leaf in chosen_leaves(params, matrices, rank, side)
        ]
        return LdadamState(galore.init(params), treedef.unflatten(error))

    def update(
        updates: Any, state: LdadamState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Any, LdadamState]:  # fmt: skip
        treedef: Any = jax.tree.structure(updates)
        parts, whole = treedef.flatten_up_to, treedef.unflatten
        found = [leaf.layout for leaf in chosen_leaves(updates, matrices, rank, side)]
        gradients = [
            g if how is None else g.astype(jnp.float32) + e
            for how, g, e in zip(found, parts(updates), parts(state.error), strict=True)
        ]
        before, momenta = _bases(parts, state.galore, found), parts(state.galore.inner.mu)
        started = jnp.maximum(1 - b1**state.galore.step, 1e-30)
        lifted = [old and _lifted(old[0], old[1], m) for old, m in zip(before, momenta, strict=True)]
        seen = [g if m is None else b1 * m / started + (1 - b1) * g for g, m in zip(gradients, lifted, strict=True)]
        steps, inner = galore.update(whole(gradients), state.galore, params, seen=whole(seen), **extra_args)
        after = _bases(parts, inner, found)
        lost = [
            optax.MaskedNode() if new is None else _outside(*new, g if m is None else g + b1 / (1 - b1) * m)
            for new, g, m in zip(after, gradients, lifted, strict=True)
        ]
        steps = jax.tree.map(lambda step, g: step.astype(g.dtype), steps, updates)
        return steps, LdadamState(inner, whole(lost))

    return optax.GradientTransformationExtraArgs(init, update)


def _bases(parts: Any, state: GaloreState, found: list[Layout | None]) -> list[tuple[Layout, Bases] | None]:
    held = zip(found, parts(state.left), parts(state.right), strict=True)
    return [how and (how, bases(how, Held(left, right), FLOAT32)) for how, left, right in held]


def _lifted(how: Layout, old: Bases, low: Array) -> Array:
    """What is in the subspace, as the full parameter."""
    with jax.default_matmul_precision("highest"):
        return from_matrices(old.back(to_matrices(low, how.axes)), how.axes, how.shape)


def _outside(how: Layout, new: Bases, x: Array) -> Array:
    """The part of x that the subspace does not hold."""
    matrices = to_matrices(x, how.axes)
    with jax.default_matmul_precision("highest"):
        return from_matrices(matrices - new.back(new.down(matrices)), how.axes, how.shape)
