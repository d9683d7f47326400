"""MetaRM: the gradient is taken a step ahead, where the current policy's answers differ more (arXiv 2405.00438)."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Batch, Key, Objective, Params, Ratio, Terms

Spread: TypeAlias = Callable[[Params, Batch], Ratio]
"""`spread(params, samples)`: J, as a sum over prompts and their number."""
Direct: TypeAlias = Callable[[Params, Key], Params]
"""`direct(gradient, key)`: the direction in place of the gradient."""


@struct.dataclass
class MetaBatch:
    """Labelled pairs, and answers of the current policy without labels."""

    pairs: Batch
    samples: Batch
    """Rows of one prompt each, with k answers."""


def answer_spread(rewards_BS: Array, present_BS: Array) -> Ratio:
    """J: the sum over prompts of (2 / k^2) sum_{i < j} s(|r_i - r_j|), with their number (arXiv 2405.00438, section 3).

    Between (k - 1) / (2 k), where all rewards are the same, and (k - 1) / k. A row is a prompt with k answers, those
    that are present; a row with fewer than two does not count. It asks for distance, not for the right order.
    """
    count_B = jnp.sum(present_BS, axis=1).astype(rewards_BS.dtype)
    gaps_BSS = rewards_BS[:, :, None] - rewards_BS[:, None, :]
    # Not jnp.abs, which has the slope 1 at 0: equal rewards shall stay where they are.
    gaps_BSS = gaps_BSS * jnp.sign(gaps_BSS)
    both_BSS = present_BS[:, :, None] & present_BS[:, None, :]
    pairs_BSS = both_BSS & jnp.triu(jnp.ones(both_BSS.shape[1:], bool), 1)[None]
    sums_B = jnp.sum(jnp.where(pairs_BSS, jax.nn.sigmoid(gaps_BSS), 0), axis=(1, 2))
    counts_B = count_B >= 2
    values_B = jnp.where(counts_B, 2 * sums_B / jnp.maximum(count_B, 1) ** 2, 0)
    return Ratio(jnp.sum(values_B), jnp.sum(counts_B).astype(rewards_BS.dtype))


def along_gradient(gradient: Params, key: Key) -> Params:
    """The gradient itself: ascent."""
    del key
    return gradient


def at_random(gradient: Params, key: Key) -> Params:
    """A random direction as long as the gradient: what a step of this length does that has no aim."""
    leaves, treedef = jax.tree.flatten(gradient)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    length = lambda leaves: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
    return jax.tree.unflatten(treedef, [leaf * (length(leaves) / length(drawn)) for leaf in drawn])


def meta_reward(
    objective: Objective, spread: Spread, eta: float, *, second_order: bool = False, direct: Direct = along_gradient,
    still: tuple[str, ...] = (),
) -> Objective:  # fmt: skip
    """The objective at theta' = theta + eta grad J(theta), for a `MetaBatch`; its gradient moves theta.

    Args:
        objective: of the pairs.
        spread: J of the samples.
        eta: length of the step, plain gradient ascent; with 0 nothing changes.
        second_order: whether theta' is differentiated as well: (I + eta Hess J) grad L(theta') in place of
            grad L(theta'). Costs a gradient of a gradient.
        direct: what is gone along in place of the gradient: for controls.
        still: parts of the parameters that stay where they are, as `State.still` names them.

    Metrics: the objective's, at theta', and `spread`, J at theta: where the loss at theta' is least, theta lies lower
    on J than theta' does. Microbatches share out the samples too, and each takes the step of its own.
    """

    def wrapped(params: Params, batch: MetaBatch, key: Key) -> Terms:
        fixed = {name: params[name] for name in still}
        moving = {name: part for name, part in params.items() if name not in still} if still else params

        def mean_spread(moving: Params) -> tuple[Array, Ratio]:
            ratio = spread({**moving, **fixed} if still else moving, batch.samples)
            return ratio.sum / jnp.maximum(ratio.weight, 1), ratio

        gradient, seen = jax.grad(mean_spread, has_aux=True)(moving)
        step = jax.tree.map(lambda g: eta * g, direct(gradient, key_for(key, "direction")))
        step = step if second_order else jax.lax.stop_gradient(step)
        ahead = jax.tree.map(lambda p, s: p + s.astype(p.dtype), moving, step)
        terms = objective({**ahead, **fixed} if still else ahead, batch.pairs, key)
        return replace(terms, metrics={**terms.metrics, "spread": jax.lax.stop_gradient(seen)})

    return wrapped
