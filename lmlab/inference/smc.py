"""Sequential Monte Carlo over any Feynman-Kac model: one loop, and the two ways to choose who goes on.

A particle is a partial text with a weight. In every round each unfinished particle proposes children, children are
weighed, and as many as there are particles go on. The mean weight is an unbiased estimate of the normalising constant
Z whatever the number of particles, the proposal and the scheme (arXiv 2306.03081, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from lmlab.core.errors import check
from lmlab.core.types import Array, Key
from lmlab.inference.resampling import (
    Chosen,
    Scheme,
    at_home,
    effective_size,
    log_total,
    optimal,
    resampled,
    shares,
    stratified,
)  # fmt: skip

Arrays: TypeAlias = Any
"""What the functions of a model read: any pytree of arrays."""
State: TypeAlias = Any
"""What a model keeps of P particles: a pytree that it alone looks into."""
Moves: TypeAlias = Any
"""What a model has proposed: K children for each of P particles."""
Select: TypeAlias = Callable[[Key, Array, int], Chosen]
"""`select(key, log_weight_C, particles)`: which of the C children go on."""


@dataclass(frozen=True, eq=False)
class FeynmanKac:
    """Particles that move and are weighed, as functions that read `params`; equal only to itself, so that it can be a
    static argument of `jax.jit`. P particles, K children each.
    """

    propose: Callable[[Arrays, Key, State, int], tuple[Moves, Array]]
    """`propose(params, key, state_P, K) -> (moves_PK, log_weight_PK)`: K children of each particle. A child weighs its
    potential, times the density of the transition over that of the proposal. Their number may differ from K where a
    model has its own way to branch: what counts is the mean of weights over children."""
    commit: Callable[[Arrays, State, Moves, Array, Array, Array], State]
    """`commit(params, state_P, moves_PK, parent_P, child_P, moving_P) -> state_P`: the chosen children in place of the
    particles, parents as `at_home` orders them. A particle that does not move stays what its parent was."""
    done: Callable[[State], Array]
    """`done(state_P) -> bool_P`: it moves no more and keeps its weight."""
    take: Callable[[State, Array], State]
    """`take(state_P, rows_N) -> state_N`: the chosen particles, repeats allowed."""
    twist: Callable[[State], Array] = lambda state: jnp.zeros(())
    """`twist(state_P) -> log_twist_P`: how much of a particle's log-weight is a guess at its future, which `propose`
    takes back at its next move; 0 of finished ones."""
    waits: bool = True
    """Whether particles may be left as they are while others move, as `in_blocks` does."""
    record: Callable[[Moves], Any] = lambda moves: None
    """`record(moves_PK)`: arrays [P, K, ...] to be kept of every round."""


@dataclass(frozen=True)
class Driver:
    """How many children a particle has, and who goes on."""

    children: int
    select: Select


@struct.dataclass
class History:
    """What happened, round by round; of T rounds, those that were made are filled."""

    moves_TPK: Any
    """What the model records of all children."""
    child_weight_TPK: Array
    """log-weights of all children, before any was chosen."""
    parent_TP: Array
    """Whose child each particle is."""
    child_TP: Array
    """Which of its children."""
    log_weight_TP: Array
    """log-weights of those that went on."""
    effective_T: Array
    """Effective number of children before any was chosen."""


@struct.dataclass
class Population:
    """P particles after some rounds."""

    state: State
    log_weight_P: Array
    """float32, -inf of the dead."""
    done_P: Array
    """Finished or dead."""
    rounds: Array
    """How many were made."""
    history: History

    @property
    def log_evidence(self) -> Array:
        """Log of the estimate of Z: the mean weight. Of several populations side by side, one each."""
        return log_total(self.log_weight_P) - jnp.log(self.log_weight_P.shape[-1])

    @property
    def probabilities(self) -> Array:
        """[P] weights that sum to 1: what the posterior gives each particle. Zeros where all are dead."""
        return shares(self.log_weight_P)


@lru_cache
def steering(children: int = 3) -> Driver:
    """SMC steering (arXiv 2306.03081, algorithm 1): K children each, chosen without replacement. With one child all go
    on, as in importance sampling. Cached, since the driver is a part of what is compiled. Raises `UserError` for fewer.
    """
    check(children >= 1, "children", children, "at least 1")
    return Driver(children, optimal)


@lru_cache
def standard(scheme: Scheme = stratified, threshold: float = 0.5) -> Driver:
    """Standard SMC: particles are drawn anew where their effective number falls below `threshold` times their number.

    0: never (importance sampling); 1: whenever weights differ. Raises `UserError` for other numbers.
    """
    check(0 <= threshold <= 1, "threshold", threshold, "a number in [0, 1]")

    def select(key: Key, log_weight_C: Array, count: int) -> Chosen:
        keep = Chosen(jnp.arange(count, dtype=jnp.int32), log_weight_C)
        # Equal weights have an effective size that float32 may write as a little less than their number.
        poor = effective_size(log_weight_C) < threshold * count * (1 - 1e-6)
        chosen = resampled(scheme, key, log_weight_C)
        poor &= log_total(log_weight_C) > -jnp.inf
        return jax.tree.map(partial(jnp.where, poor), chosen, keep)

    return Driver(1, select)


@partial(jax.jit, static_argnums=(0, 1, 4))
def population(model: FeynmanKac, driver: Driver, params: Arrays, state: State, rounds: int) -> Population:
    """Particles in their first state, all of weight 1, with room for the history of so many rounds."""
    done_P = model.done(state)

    def propose() -> tuple[Any, Array]:
        moves, weights_PK = model.propose(params, jax.random.key(0), state, driver.children)
        return model.record(moves), weights_PK

    # Shapes alone are looked at: nothing is proposed yet.
    moves, weights_PK = jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), jax.eval_shape(propose))
    count_TP = jnp.zeros((rounds, *done_P.shape), jnp.int32)
    history = History(moves, weights_PK, count_TP, count_TP, count_TP.astype(jnp.float32), jnp.zeros(rounds))
    return Population(state, jnp.zeros(done_P.shape), done_P, jnp.zeros((), jnp.int32), history)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(
    model: FeynmanKac, driver: Driver, params: Arrays, particles: Population, key: Key, until: Array | int
) -> Population:  # fmt: skip
    """Make rounds until so many were made (no more than there is room for) or every particle is done.

    Round t draws from fold_in(key, t), so the number of calls that the rounds are made in changes nothing.
    """
    most = jnp.minimum(until, len(particles.history.effective_T))
    going = lambda particles: (particles.rounds < most) & ~jnp.all(particles.done_P)
    step = lambda particles: _round(model, driver, params, particles, jax.random.fold_in(key, particles.rounds))
    return jax.lax.while_loop(going, step, particles)


def run(model: FeynmanKac, driver: Driver, params: Arrays, state: State, key: Key, rounds: int) -> Population:
    """All rounds, until every particle is done or so many were made; then `concluded`."""
    start = population(model, driver, params, state, rounds)
    return concluded(model, advance(model, driver, params, start, key, rounds))


def concluded(model: FeynmanKac, particles: Population) -> Population:
    """Particles with their own weights: what a twist has lent to those that were cut short is taken back."""
    return replace(particles, log_weight_P=particles.log_weight_P - model.twist(particles.state))


def only(particles: Population, chosen_P: Array) -> Population:
    """Those that are not chosen are dead. Of finished ones: what is left follows the posterior given that the rounds
    suffice.
    """
    return replace(particles, log_weight_P=jnp.where(chosen_P, particles.log_weight_P, -jnp.inf))


def choose(driver: Driver, key: Key, log_weight_PK: Array) -> Chosen:
    """As many children as there are particles, each in the place of its parent where it can be."""
    count, children = log_weight_PK.shape
    chosen = driver.select(key, log_weight_PK.reshape(-1), count)
    order_P = at_home(chosen.index_N // children, count)
    return jax.tree.map(lambda x_P: x_P[order_P], chosen)


def _round(model: FeynmanKac, driver: Driver, params: Arrays, old: Population, key: Key) -> Population:
    propose_key, select_key = jax.random.split(key)
    moves, gain_PK = model.propose(params, propose_key, old.state, driver.children)
    children = gain_PK.shape[1]
    only_K = jnp.where(jnp.arange(children) == 0, 0.0, -jnp.inf)
    # Who is done has one child, itself.
    gain_PK = jnp.where(old.done_P[:, None], only_K, gain_PK.astype(jnp.float32) - jnp.log(children))
    # Not a sum: -inf and inf would make a NaN. One that a program has made stays, and is seen.
    dead_P1 = (old.log_weight_P == -jnp.inf)[:, None]
    log_weight_PK = jnp.where(dead_P1, -jnp.inf, old.log_weight_P[:, None] + gain_PK)
    chosen = choose(driver, select_key, log_weight_PK)
    parent_P, child_P = chosen.index_N // children, chosen.index_N % children
    stays_P = old.done_P[parent_P] | (chosen.log_weight_N == -jnp.inf)
    state = model.commit(params, old.state, moves, parent_P, child_P, ~stays_P)
    effective = effective_size(log_weight_PK.reshape(-1))
    record = History(model.record(moves), log_weight_PK, parent_P, child_P, chosen.log_weight_N, effective)
    put = lambda room, new: room.at[old.rounds].set(new)
    return Population(
        state=state, log_weight_P=chosen.log_weight_N, done_P=stays_P | model.done(state), rounds=old.rounds + 1,
        history=jax.tree.map(put, old.history, record),
    )  # fmt: skip
