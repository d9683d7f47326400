"""Parameters in bfloat16: with a float32 master copy in the state, or without one and rounded at random.

Both wrap a whole optax chain, which then sees nothing but float32. The compiler may skip a pair of casts to bfloat16
and back; `lax.reduce_precision` is the rounding that it has to make.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmlab.core.errors import UserError
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Params
from lmlab.optim.groups import path_name


class MasterState(NamedTuple):
    """State of `master_weights`."""

    master: Params
    """The parameters in float32. Rounded to bfloat16 they are those of the model, bit for bit."""
    inner: Any


class StochasticState(NamedTuple):
    """State of `stochastic_rounding`."""

    step: Array
    """[] int32: updates made; with the seed and the path of a parameter it decides what is drawn."""
    inner: Any


def cast_parameters(params: Params, parameters: str) -> Params:
    """The parameters in the type of `OptimConfig.parameters`; for once, at the start."""
    return optax.tree.cast(params, jnp.float32 if parameters == "float32" else jnp.bfloat16)


def master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on a float32 copy of bfloat16 parameters (arXiv 1710.03740, section 3.1).

    `optax.apply_updates(params, updates)` is the new copy rounded to bfloat16, bit for bit. Raises `UserError` for
    parameters of another type.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> MasterState:
        master = _widened(params)
        return MasterState(master, inner.init(master))

    def update(
        grads: Any, state: MasterState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Any, MasterState]:
        held = _widened(params)
        grads = optax.tree.cast(grads, jnp.float32)
        steps, inner_state = inner.update(grads, state.inner, state.master, **extra_args)
        master = optax.apply_updates(state.master, steps)
        updates = jax.tree.map(lambda new, old: _update_to(_round(new), old), master, held)
        master = jax.tree.map(_synchronised, master, held, updates)
        return updates, MasterState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_rounding(
    inner: optax.GradientTransformation, seed: int | Array = 0
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in float32 on bfloat16 parameters and round what comes out at random, right on average.

    No copy is kept; updates far below the spacing of bfloat16 add up nevertheless (arXiv 2010.06192). What is drawn
    depends on the seed, the path of the parameter and the number of updates made, so a resumed run draws the same, on
    any mesh. Raises `UserError` for parameters of another type.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> StochasticState:
        return StochasticState(jnp.zeros((), jnp.int32), inner.init(_widened(params)))

    def update(
        grads: Any, state: StochasticState, params: Params | None = None, **extra_args: Any
    ) -> tuple[Any, StochasticState]:
        held = _widened(params)
        grads = optax.tree.cast(grads, jnp.float32)
        steps, inner_state = inner.update(grads, state.inner, held, **extra_args)
        key = jax.random.key(seed)

        def rounded(path: Any, new: Array, old: Array) -> Array:
            noise = jax.random.bits(key_for(key, path_name(path), state.step), new.shape, jnp.uint16)
            return _update_to(round_by_noise(new, noise), old)

        updates = jax.tree_util.tree_map_with_path(rounded, optax.apply_updates(held, steps), held)
        return updates, StochasticState(optax.safe_increment(state.step), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def round_by_noise(x: Array, noise: Array) -> Array:
    """Float32 numbers rounded to bfloat16 (kept as float32), up in magnitude for as many of the 2^16 values of the
    uint16 noise as the lower half of x says. So the mean over all noise is x, exactly.

    A finite number never becomes infinite: beyond the largest bfloat16 it is rounded towards zero. Infinities and
    NaN stay.
    """
    kept, infinite = jnp.uint32(0xFFFF0000), jnp.uint32(0x7F800000)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # The carry into the upper half, and from the mantissa into the exponent, is the rounding up.
    up = (bits + noise.astype(jnp.uint32)) & kept
    chosen = jnp.where(up & infinite == infinite, bits & kept, up)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(chosen, jnp.float32), x)


def _widened(params: Params | None) -> Params:
    """The parameters in float32. What the compiler held before it rounded to bfloat16 must not come back here."""
    if params is None:
        raise UserError("params", None, "the bfloat16 parameters", "Call tx.update(grads, state, params).")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.bfloat16:
            raise UserError(f"parameter {path_name(path)}", str(leaf.dtype), "bfloat16",
                            "Cast the parameters once, at the start (cast_parameters).")  # fmt: skip
    return jax.tree.map(lambda leaf: _round(leaf.astype(jnp.float32)), params)


def _round(x: Array) -> Array:
    """To the nearest bfloat16, ties to even, in float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _update_to(target: Array, old: Array) -> Array:
    """The float32 update that makes of `old` the target, both of them bfloat16 numbers kept in float32.

    Eight significant bits each: unless one is 2^15 times the other their difference is exact, and so is old +
    update. In a far larger target the errors do not reach its last bit. A far smaller one may be missed, by at
    most 2^-24 of `old`: near zero no float32 update leads to every bfloat16.
    """
    # Two finite numbers may be further apart than float32 reaches.
    largest = jnp.finfo(jnp.float32).max
    update = target - old
    return jnp.where(jnp.isfinite(target), jnp.clip(update, -largest, largest), update)


def _synchronised(master: Array, old: Array, update: Array) -> Array:
    """The master copy; where the update misses its rounded value, what the parameter becomes instead."""
    word = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
    reached = _round(old + update)
    return jnp.where(word(reached) == word(_round(master)), master, reached)
