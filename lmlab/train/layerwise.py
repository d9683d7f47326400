"""The step in which a layer's gradient is used up as soon as it is there, so that the others' never exist beside it.

For models that are a stack of alike layers between a first and a last part. Nothing that needs all gradients at once
goes with it: no clipping by the global norm, no microbatches (GaLore, arXiv 2403.03507, section 4.4; arXiv 2306.09782).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmlab.core.types import Array, Batch, Params


class Stack(NamedTuple):
    """A model and its loss in three parts. `rest` are the parameters that belong to no layer."""

    first: Callable[[Params, Batch], Array]
    """`first(rest, batch) -> x`: what goes into the first layer."""
    layer: Callable[[Params, Array, Array, Batch], Array]
    """`layer(params, x, number, batch) -> x`, of the same shape."""
    last: Callable[[Params, Array, Batch], Array]
    """`last(rest, x, batch) -> loss`: [] float32."""


class LayerwiseState(NamedTuple):
    """Parameters and optimiser states. Every layer has a state of its own; all are stacked along the first axis."""

    layers: Params
    rest: Params
    layers_opt: Any
    rest_opt: Any


def layerwise_state(layers: Params, rest: Params, tx: optax.GradientTransformation) -> LayerwiseState:
    """The state before the first step; layers: stacked along the first axis."""
    return LayerwiseState(layers, rest, jax.vmap(tx.init)(layers), tx.init(rest))


def layerwise_step(
    stack: Stack, tx: optax.GradientTransformation
) -> Callable[[LayerwiseState, Batch], tuple[LayerwiseState, Array]]:  # fmt: skip
    """`step(state, batch) -> (state, loss)`: pure. Donate the state, and parameters are renewed in place.

    Only what goes into each layer is kept for the backward pass; layers are computed again there.
    """

    def step(state: LayerwiseState, batch: Batch) -> tuple[LayerwiseState, Array]:
        number = len(jax.tree.leaves(state.layers)[0])
        start, first_slope = jax.vjp(lambda rest: stack.first(rest, batch), state.rest)

        def forward(x: Array, i: Array) -> tuple[Array, Array]:
            return stack.layer(_at(state.layers, i), x, i, batch), x

        end, inputs = jax.lax.scan(forward, start, jnp.arange(number))
        loss, (rest_grad, slope) = jax.value_and_grad(stack.last, (0, 1))(state.rest, end, batch)

        def backward(i: Array, carry: tuple[Params, Any, Array]) -> tuple[Params, Any, Array]:
            layers, states, slope = carry
            here = number - 1 - i
            params, opt = _at(layers, here), _at(states, here)
            _, pull = jax.vjp(lambda params, x: stack.layer(params, x, here, batch), params, inputs[here])
            grad, slope = pull(slope)
            updates, opt = tx.update(grad, opt, params)
            # One layer at a time also for the compiler, which might put off the updates.
            params, opt, slope = jax.lax.optimization_barrier((optax.apply_updates(params, updates), opt, slope))
            return _put(layers, params, here), _put(states, opt, here), slope

        layers, layers_opt, slope = jax.lax.fori_loop(0, number, backward, (state.layers, state.layers_opt, slope))
        rest_grad = jax.tree.map(jnp.add, rest_grad, first_slope(slope)[0])
        updates, rest_opt = tx.update(rest_grad, state.rest_opt, state.rest)
        return LayerwiseState(layers, optax.apply_updates(state.rest, updates), layers_opt, rest_opt), loss

    return step


def _at(tree: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Any, one: Any, i: Array) -> Any:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), tree, one)
