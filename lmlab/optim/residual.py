"""The update of a matrix from what the inner optimiser made in the subspace: GaLore, Fira, APOLLO, FRUGAL.

All act on batches of matrices: G [*batch, m, n], R and N [*batch, r, n] (left) or [*batch, m, r] (right), and
`back`, which lifts from the subspace.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array
from lmlab.optim.matrices import Layout

GROWTH = 1.01
"""How much larger an update may be than the one before (Fira, section 3.3)."""


class Projected(NamedTuple):
    """A gradient, its projection, and the step that the inner optimiser makes of it."""

    gradient: Array
    low: Array
    step: Array
    back: Callable[[Array], Array]
    layout: Layout


class Lift(NamedTuple):
    """The update of the full matrix."""

    init: Callable[[tuple[int, ...]], Any]
    """`init(batch) -> state`."""
    update: Callable[[Projected, Any], tuple[Array, Any]]
    """`update(projected, state) -> (update, state)`."""


def plain(scale: float = 0.25) -> Lift:
    """Scale * P N (arXiv 2403.03507)."""
    return Lift(lambda batch: (), lambda x, state: (scale * x.back(x.step), state))


def fira(scale: float = 0.25) -> Lift:
    """Scale * P N, and the rest of the gradient stepped like its projection, column by column (arXiv 2410.01623).

    The rest is scaled by |N_j| / |R_j| of each column of the longer side, and its norm may grow by 1% a step. Bases
    must be orthonormal: what they hold is no rest.
    """

    def update(x: Projected, largest: Array) -> tuple[Array, Array]:
        rest = (x.gradient - x.back(x.low)) * _relative_step(x, _axis(x))
        rest, largest = limit_growth(rest, largest)
        return scale * x.back(x.step) + rest, largest

    return Lift(jnp.zeros, update)


def apollo(scale: float = 1.0, per: str = "channel") -> Lift:
    """The gradient itself, each channel scaled as the step in the subspace says (arXiv 2412.05270).

    per: channel, or tensor with one number a matrix (APOLLO-Mini: rank 1, scale 128). The norm may grow by 1% a step.
    """
    check(per in ("channel", "tensor"), "per", per, "channel or tensor")

    def update(x: Projected, largest: Array) -> tuple[Array, Array]:
        axes = (-2, -1) if per == "tensor" else _axis(x)
        return limit_growth(scale**0.5 * x.gradient * _relative_step(x, axes), largest)

    return Lift(jnp.zeros, update)


def frugal(scale: float = 0.25, rest: float = 0.25) -> Lift:
    """Scale * P N, and the signs of the rest of the gradient (arXiv 2411.07837, algorithm 1).

    Bases must be orthonormal: what they hold is no rest. Entries that are but rounding have no sign.
    """

    def update(x: Projected, state: Any) -> tuple[Array, Any]:
        beyond = x.gradient - x.back(x.low)
        real = jnp.abs(beyond) > 1e-5 * jnp.max(jnp.abs(x.gradient), axis=(-2, -1), keepdims=True)
        return scale * x.back(x.step) + rest * jnp.where(real, jnp.sign(beyond), 0), state

    return Lift(lambda batch: (), update)


def _axis(x: Projected) -> tuple[int, ...]:
    """The axis of the subspace, over which norms of channels are taken."""
    check(x.layout.left != x.layout.right, "side", "two_sided", "one side where channels are scaled one by one")
    return (-2,) if x.layout.left else (-1,)


def _relative_step(x: Projected, axes: tuple[int, ...]) -> Array:
    size = lambda y: jnp.sqrt(jnp.sum(y * y, axis=axes, keepdims=True))
    return size(x.step) / (size(x.low) + 1e-8)


def limit_growth(update: Array, largest: Array) -> tuple[Array, Array]:
    """The update [*batch, m, n], no more than 1% larger than the norm [*batch] of the one before; and its norm.

    After a norm of 0, which is also that of the state at first, anything is allowed.
    """
    size = jnp.sqrt(jnp.sum(update * update, axis=(-2, -1)))
    allowed = jnp.where(largest > 0, jnp.minimum(size, GROWTH * largest), size)
    share = allowed / jnp.where(size > 0, size, 1)
    return update * share[..., None, None], allowed
