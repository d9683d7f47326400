"""Rounds of several steps: particles run until each has come to a place where they may be compared."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lmlab.core.errors import check
from lmlab.core.types import Array, Key
from lmlab.inference.smc import Arrays, FeynmanKac, State

Boundary = Callable[[State], Array]
"""`boundary(state_R) -> bool_R`: whether particles may stop there."""
Potential = Callable[[Arrays, State], Array]
"""`potential(params, state_R) -> log_twist_R`: a guess at the future of particles that have just moved."""


@struct.dataclass
class Blocks:
    """Particles at the end of a block."""

    inner: State
    log_twist_P: Array


def every_step(state: State) -> Array:
    """Every step is a block of its own."""
    return jnp.ones((), bool)


def nothing(params: Arrays, state: State) -> Array:
    """No guess."""
    return jnp.zeros(())


@lru_cache
def in_blocks(
    model: FeynmanKac, boundary: Boundary = every_step, longest: int = 64, potential: Potential = nothing
) -> FeynmanKac:  # fmt: skip
    """The model with rounds that last until each particle is at a boundary, is done, or has made `longest` steps.

    Words, lines or gaps of different length are comparable at their ends only (arXiv 2306.03081, section 3). All P K
    children are run to their ends before any is chosen, so a `potential` may look at what the model expects after a
    child: a look ahead of one token. It changes who is chosen, never the target: it is a twist. Raises `UserError` for
    a model that cannot let particles wait.
    """
    check(model.waits, "model", "one whose particles cannot wait for others", "a Program with a boundary")

    def propose(params: Arrays, key: Key, state: Blocks, children: int) -> tuple[Blocks, Array]:
        particles = len(state.log_twist_P)
        rows_R = jnp.repeat(jnp.arange(particles), children)
        start = model.take(state.inner, rows_R)
        inner, gain_R = _run_block(model, boundary, longest, params, key, start)
        over_R = model.done(inner) | (gain_R == -jnp.inf)
        twist_R = jnp.where(over_R, 0, potential(params, inner))
        gain_R = gain_R + twist_R - state.log_twist_P[rows_R]
        return Blocks(inner, twist_R), gain_R.reshape(particles, children)

    def commit(
        params: Arrays, state: Blocks, moves: Blocks, parent_P: Array, child_P: Array, moving_P: Array
    ) -> Blocks:  # fmt: skip
        # Who is done has not moved in its block either.
        children = len(moves.log_twist_P) // len(state.log_twist_P)
        rows_P = parent_P * children + child_P
        twist_P = jnp.where(moving_P, moves.log_twist_P[rows_P], state.log_twist_P[parent_P])
        return Blocks(model.take(moves.inner, rows_P), twist_P)

    def twist(state: Blocks) -> Array:
        return state.log_twist_P + model.twist(state.inner)

    def take(state: Blocks, rows_N: Array) -> Blocks:
        return Blocks(model.take(state.inner, rows_N), state.log_twist_P[rows_N])

    return FeynmanKac(propose, commit, done=lambda state: model.done(state.inner), take=take, twist=twist)


def blocks(state: State, particles: int) -> Blocks:
    """Particles of the inner model that begin their first block."""
    return Blocks(state, jnp.zeros(particles))


def _run_block(
    model: FeynmanKac, boundary: Boundary, longest: int, params: Arrays, key: Key, start: State
) -> tuple[State, Array]:  # fmt: skip
    """Each row to its boundary, and the log of what its weight is multiplied by."""
    done_R = model.done(start)
    rows_R, only_R = jnp.arange(len(done_R)), jnp.zeros(len(done_R), jnp.int32)

    def step(carry: tuple[Any, Array, Array, Array]) -> tuple[Any, Array, Array, Array]:
        state, gain_R, moving_R, i = carry
        moves, more_R1 = model.propose(params, jax.random.fold_in(key, i), state, 1)
        gain_R = gain_R + jnp.where(moving_R, more_R1[:, 0], 0)
        moving_R &= gain_R > -jnp.inf
        state = model.commit(params, state, moves, rows_R, only_R, moving_R)
        return state, gain_R, moving_R & ~model.done(state) & ~boundary(state), i + 1

    going = lambda carry: jnp.any(carry[2]) & (carry[3] < longest)
    carry = start, jnp.zeros(len(done_R)), ~done_R, jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(going, step, carry)[:2]
