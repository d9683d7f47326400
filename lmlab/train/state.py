"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key, Params


@struct.dataclass
class State:
    """Everything that an interrupted run needs to go on, beside the data, which depend on the step alone."""

    step: Array
    """[] int32: updates made."""
    params: Params
    opt_state: Any
    key: Key
    """The run's key; uses derive theirs from it and the step, so it never changes."""


def new_state(params: Params, tx: optax.GradientTransformation, key: Key) -> State:
    """The state before the first update."""
    return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), key=key)


def init_state(init: Any, tx: optax.GradientTransformation, seed: int, shardings: Any = None) -> State:
    """The state of a new run: `init(key)` makes the parameters. Jitted, so that nothing is made twice.

    shardings: where each array lies (`state_shardings`); every device then makes its own part and no other.
    """
    make = jax.jit(lambda key: new_state(init(key_for(key, "init")), tx, key), out_shardings=shardings)
    return make(jax.random.key(seed))


def loaded_state(params: Params, tx: optax.GradientTransformation, seed: int, shardings: Any) -> State:
    """The state of a run that begins with parameters that are there; they lie as `shardings` says, and are used up."""
    make = jax.jit(lambda params, key: new_state(params, tx, key), out_shardings=shardings, donate_argnums=0)
    return make(params, jax.random.key(seed))
