"""Several models side by side: one program trains all members of an ensemble, each on rows of its own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from lmlab.core.types import Array, Key, Params
from lmlab.train.state import State, new_state
from lmlab.train.step import Step


def new_members(init: Callable[[Key], Params], tx: optax.GradientTransformation, keys_K: Key) -> State:
    """States [K, ...] of members, from keys of their own."""
    return jax.jit(jax.vmap(lambda key: new_state(init(key), tx, key)))(keys_K)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=1)
def train_members(step: Step, states: State, data: Any, rows_SKB: Array, own: Any = None) -> State:
    """The members after one step for each of S batches of rows.

    Args:
        step: made by `make_step`; the batch that it takes is a pytree like `data`, of B rows.
        states: [K, ...], used up.
        data: arrays [N, ...] that the rows are taken from, or [K, N, ...] where each member has its own.
        rows_SKB: which rows each member takes at each step.
        own: None where all share the data, 0 where each has its own; or a tree of these, as `jax.vmap` takes it.
    """
    one = lambda state, data, rows_B: step(state, jax.tree.map(lambda x: x[rows_B], data))[0]
    every = jax.vmap(one, (0, own, 0))
    return jax.lax.scan(lambda states, rows_KB: (every(states, data, rows_KB), None), states, rows_SKB)[0]


def shuffled_rows(allowed_KN: np.ndarray, epochs: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """int32 rows [S, K, B]: epochs of shuffles of each member's own rows; what is left over at the end is not used.

    allowed_KN: bool, which of N rows a member may see. All take as many steps as the one with the fewest rows.
    """
    steps = max(1, int(allowed_KN.sum(axis=1).min()) // batch)
    made = np.empty((epochs, steps, len(allowed_KN), batch), np.int32)
    for member, allowed_N in enumerate(allowed_KN):
        mine = np.flatnonzero(allowed_N)
        for epoch in range(epochs):
            # Fewer rows than a batch are repeated.
            shuffle = np.resize(rng.permutation(mine), max(len(mine), batch))
            made[epoch, :, member] = shuffle[: steps * batch].reshape(steps, batch)
    return made.reshape(epochs * steps, len(allowed_KN), batch)
