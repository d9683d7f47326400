"""When the subspaces of a projected gradient are renewed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array


class Timing(NamedTuple):
    """Which of the matrices of a parameter get a new subspace at a step. States hold what each has learned."""

    init: Callable[[int], Any]
    """`init(matrices) -> state`."""
    due: Callable[[Any, Array, Array, int], Array]
    """`due(state, count, numbers_N, total) -> bool_N` before update `count` (from 0). The numbers are the places of
    these matrices among all `total` of the model. At count 0 all are due: nobody has a subspace yet."""
    learn: Callable[[Any, Array, Array, Array], Any]
    """`learn(state, count, due_N, cosine_N) -> state`: |cosine| between first columns of the new and old basis; -1:
    the gradient said nothing."""
    epoch: Callable[[Array], Array] | None = None
    """`epoch(count)`: how often all were renewed before; None where they are not renewed together."""


def together(every: int = 200) -> Timing:
    """All at once, at updates 0, `every`, 2 `every`, ... (arXiv 2403.03507)."""
    _check_every(every)
    due = lambda count, numbers_N, total: jnp.broadcast_to(count % every == 0, numbers_N.shape)
    return _stateless(due)._replace(epoch=lambda count: count // every)


def staggered(every: int = 200) -> Timing:
    """Each once in `every` updates, number l of L at l every / L of them: no step waits for all."""
    _check_every(every)

    def due(count: Array, numbers_N: Array, total: int) -> Array:
        return (count == 0) | ((count - numbers_N * every // total) % every == 0)

    return _stateless(due)


def _check_every(every: int) -> None:
    check(every >= 1, "every", every, "1 or more updates between two refreshes")


def _stateless(due: Callable[[Array, Array, int], Array]) -> Timing:
    return Timing(
        lambda matrices: (), lambda _, count, numbers_N, total: due(count, numbers_N, total),
        lambda state, count, due_N, cosine_N: state,
    )  # fmt: skip


class LazyState(NamedTuple):
    """State of `lazy`, for N matrices."""

    last: Array
    """[N] int32: the update at which each was renewed."""
    every: Array
    """[N] int32."""
    cosines: Array
    """[N, window] float32, the newest last; -1: none yet."""


def lazy(every: int = 200, threshold: float = 0.4, window: int = 5) -> Timing:
    """Half as often for a matrix whose subspace stands still: mean |cosine| of its last renewals at the threshold.

    arXiv 2407.08296, section 3.2. The authors' code takes the cosine with its sign, which the SVD leaves to chance.
    """
    _check_every(every)
    check(window >= 1, "window", window, "1 or more renewals to take the mean of")

    def init(matrices: int) -> LazyState:
        zeros = jnp.zeros((matrices,), jnp.int32)
        return LazyState(zeros, zeros + every, jnp.full((matrices, window), -1.0))

    def due(state: LazyState, count: Array, numbers_N: Array, total: int) -> Array:
        return (count == 0) | (count - state.last >= state.every)

    def learn(state: LazyState, count: Array, due_N: Array, cosine_N: Array) -> LazyState:
        newer = jnp.concatenate([state.cosines[:, 1:], cosine_N[:, None]], axis=1)
        # The first renewal has no basis to compare with.
        told_N = due_N & (count > 0) & (cosine_N >= 0)
        cosines = jnp.where(told_N[:, None], newer, state.cosines)
        calm_N = told_N & jnp.all(cosines >= 0, axis=1) & (jnp.mean(cosines, axis=1) >= threshold)
        return LazyState(
            jnp.where(due_N, count, state.last), jnp.where(calm_N, 2 * state.every, state.every), cosines
        )  # fmt: skip

    return Timing(init, due, learn)
