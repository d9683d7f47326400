"""Steps of a transform on gradients of one matrix."""

import jax
import jax.numpy as jnp


def gradients(*shape, steps=7, seed=0):
    return jax.random.normal(jax.random.key(seed), (steps, *shape))


def run(tx, grads):
    """Updates [steps, m, n], and the last state."""
    state, out, update = tx.init({"w": grads[0]}), [], jax.jit(tx.update)
    for G in grads:
        updates, state = update({"w": G}, state)
        out.append(updates["w"])
    return jnp.stack(out), state
