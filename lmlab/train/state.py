"""What training carries from step to step."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key, Params

Still: TypeAlias = tuple[str, ...]
"""Names of parts of the parameters."""


@struct.dataclass
class State:
    """Everything that an interrupted run needs to go on, beside the data, which depend on the step alone."""

    step: Array
    """[] int32: updates made."""
    params: Params
    opt_state: Any
    key: Key
    """The run's key; uses derive theirs from it and the step, so it never changes."""
    still: Still = struct.field(pytree_node=False, default=())
    """Names of the parts of the parameters that stay as they are: no gradient is formed of them, and the optimiser
    keeps nothing for them (a reference, a teacher, what adapters are added to)."""


def split(params: Params, still: Still) -> tuple[Params, Params]:
    """The parameters that move, and those that stay: the parts with these names."""
    if not still:
        return params, {}
    return ({name: part for name, part in params.items() if name not in still}, {name: params[name] for name in still})


def new_state(params: Params, tx: optax.GradientTransformation, key: Key, still: Still = ()) -> State:
    """The state before the first update."""
    opt_state = tx.init(split(params, still)[0])
    return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, key=key, still=still)


def init_state(
    init: Any, tx: optax.GradientTransformation, seed: int, shardings: Any = None, still: Still = ()
) -> State:  # fmt: skip
    """The state of a new run: `init(key)` makes the parameters. Jitted, so that nothing is made twice.

    shardings: where each array lies (`state_shardings`); every device then makes its own part and no other.
    """
    make = jax.jit(lambda key: new_state(init(key_for(key, "init")), tx, key, still), out_shardings=shardings)
    return make(jax.random.key(seed))


def loaded_state(
    params: Params, tx: optax.GradientTransformation, seed: int, shardings: Any, still: Still = (),
    complete: Callable[[Params, Key], Params] = lambda params, key: params,
) -> State:  # fmt: skip
    """The state of a run that begins with parameters that are there; they lie as `shardings` says, and are used up.

    complete: `complete(params, key)` adds what is trained beside them, or kept.
    """
    make = jax.jit(
        lambda params, key: new_state(complete(params, key), tx, key, still), out_shardings=shardings, donate_argnums=0
    )  # fmt: skip
    return make(params, jax.random.key(seed))
