"""Layer by layer: the numbers of the ordinary step, and the memory of one layer's gradient."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.optim.galore import scale_by_galore
from lmlab.optim.matrices import by_path
from lmlab.optim.subspace import gram
from lmlab.optim.timing import together
from lmlab.train.layerwise import LayerwiseState, Stack, layerwise_state, layerwise_step

LAYERS = 6


def layer(params, x, number, batch):
    """A residual block whose strength depends on its number."""
    return x + jnp.tanh(x @ params["up"]) @ params["down"] / (1.0 + number)


STACK = Stack(
    first=lambda rest, batch: batch @ rest["embed"],
    layer=layer,
    last=lambda rest, x, batch: jnp.mean((x @ rest["head"] - batch) ** 2),
)


def parameters(width, ffn, inputs=5):
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / shape[-2] ** 0.5
    layers = {"up": draw(0, LAYERS, width, ffn), "down": draw(1, LAYERS, ffn, width)}
    return layers, {"embed": draw(2, inputs, width), "head": draw(3, width, inputs)}


def whole_loss(layers, rest, batch):
    x = STACK.first(rest, batch)
    one = lambda x, each: (jax.checkpoint(layer)(each[0], x, each[1], batch), None)
    return STACK.last(rest, jax.lax.scan(one, x, (layers, jnp.arange(LAYERS)))[0], batch)


def ordinary_step(tx):
    def step(state, batch):
        loss, (layers, rest) = jax.value_and_grad(whole_loss, (0, 1))(state.layers, state.rest, batch)
        updates, layers_opt = jax.vmap(tx.update)(layers, state.layers_opt, state.layers)
        others, rest_opt = tx.update(rest, state.rest_opt, state.rest)
        apply = optax.apply_updates
        return LayerwiseState(apply(state.layers, updates), apply(state.rest, others), layers_opt, rest_opt), loss

    return step


ADAM = optax.adamw(1e-2, weight_decay=0.1)
GALORE = optax.chain(
    scale_by_galore(by_path(), 3, refresh=gram, timing=together(2)), optax.scale_by_learning_rate(0.01)
)


@pytest.mark.parametrize("tx", [ADAM, GALORE], ids=["adamw", "galore"])
def test_it_is_the_ordinary_step(tx):
    batch = jax.random.normal(jax.random.key(9), (7, 5))
    one = two = layerwise_state(*parameters(8, 12), tx)
    mine, theirs = jax.jit(layerwise_step(STACK, tx)), jax.jit(ordinary_step(tx))
    for _ in range(4):
        (one, loss), (two, other) = mine(one, batch), theirs(two, batch)
        chex.assert_trees_all_close((one, loss), (two, other), atol=1e-4)


def test_gradients_of_other_layers_are_not_held():
    """The ordinary step holds the gradient of all layers beside parameters and state."""
    tx = optax.sgd(1e-2)
    state = jax.eval_shape(lambda: layerwise_state(*parameters(128, 256), tx))
    batch = jax.ShapeDtypeStruct((4, 5), jnp.float32)
    size = sum(x.size * 4 for x in jax.tree.leaves(state.layers))

    def temporary(step):
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    mine, theirs = temporary(layerwise_step(STACK, tx)), temporary(ordinary_step(tx))
    assert theirs > size
    assert mine < 4 * size / LAYERS
