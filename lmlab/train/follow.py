"""A part of the parameters that stands still and now and then comes after the others: the reference of TR-DPO."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Batch
from lmlab.train.state import State, split
from lmlab.train.step import Metrics, Step


def following(step: Step, name: str, *, rate: float = 1.0, every: int = 1) -> Step:
    """The step, after which every so many steps the part `name` moves towards what the step trains.

    The part is a copy of the trained parameters, and one of those that stand still (`State.still`): a reference or a
    teacher. rate 1 and every 512: it is renewed; rate 0.005 and every 1: it is an average (arXiv 2404.09656, section
    3). Moves are made in float32.
    """

    def followed(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        trained, still = split(state.params, state.still)
        share = jnp.where(state.step % every == 0, rate, 0.0)

        def move(held: Array, now: Array) -> Array:
            wide = held.astype(jnp.float32)
            return (wide + share * (now.astype(jnp.float32) - wide)).astype(held.dtype)

        moved = jax.tree.map(move, still[name], trained)
        return replace(state, params={**state.params, name: moved}), metrics

    return followed
