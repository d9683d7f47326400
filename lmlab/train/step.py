"""The one train step, for every objective and every optax transform."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Batch, Key, Objective, Params, Ratio, Terms
from lmlab.train.state import State, split

Metrics: TypeAlias = dict[str, Array]
Step: TypeAlias = Callable[[State, Batch], tuple[State, Metrics]]
Reduce: TypeAlias = Callable[[Any], Any]


def make_step(
    objective: Objective, tx: optax.GradientTransformation, *, microbatches: int = 1,
    reduce: Reduce = lambda sums: sums,
) -> Step:  # fmt: skip
    """`step(state, batch) -> (state, metrics)`: pure, to be jitted by the caller.

    loss = sum_k scale_k * (sum of the sums of term k) / (sum of its weights), over all microbatches and devices.
    The division is by the global weight, so how rows are dealt to microbatches or devices changes nothing.
    The weights are summed first; as they do not depend on the parameters, the compiler drops the model from
    that pass. `microbatches` divides the batch's rows; microbatch i takes the rows i, i + M, i + 2M, ..., so that
    rows stay on their device. Parts of the parameters that `state.still` names reach the objective and nothing else.
    `reduce` sums a pytree over devices where the caller maps the step (psum); identity under jit, which sees global
    arrays. Gradients are added up and given to `tx` in float32, whatever the type of the parameters.
    Metrics: `loss`, `loss/<term>` if there are several, the objective's metrics, `grad_norm`, `param_norm` (of what
    moves), `weight` (of the first term: the labels of the batch).
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        parts = jax.tree.map(lambda x: _deal(x, microbatches), batch)
        keys = jax.random.split(key_for(state.key, "objective", state.step), microbatches)

        weights = reduce(_weights(objective, state.params, (parts, keys)))
        moving, still = split(state.params, state.still)

        def share(moving: Params, part: tuple[Batch, Key]) -> tuple[Array, tuple[Terms, Array]]:
            terms = objective({**moving, **still} if still else moving, *part)
            return total_loss(terms, weights), jax.lax.stop_gradient((terms, jnp.ones(())))

        def gradient(part: tuple[Batch, Key]) -> tuple[Params, tuple[Terms, Array]]:
            grad, seen = jax.grad(share, has_aux=True)(moving, part)
            return optax.tree.cast(grad, jnp.float32), seen

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        if microbatches == 1:
            sums = gradient(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first))
            add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
            sums, _ = jax.lax.scan(add, zeros, (parts, keys))
        grad, (terms, parts_seen) = reduce(sums)
        updates, opt_state = tx.update(grad, state.opt_state, moving)
        moved = optax.apply_updates(moving, updates)
        metrics = term_metrics(terms, parts_seen, weights)
        wide = optax.tree.cast(moved, jnp.float32)
        metrics |= {"grad_norm": optax.tree.norm(grad), "param_norm": optax.tree.norm(wide)}
        params = {**moved, **still} if still else moved
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def _weights(objective: Objective, params: Params, parts: tuple[Batch, Key]) -> dict[str, Array]:
    """The weight of each term, over all microbatches."""

    def one(_: None, part: tuple[Batch, Key]) -> tuple[None, dict[str, Array]]:
        return None, {name: term.weight for name, term in objective(params, *part).losses.items()}

    weights = jax.lax.stop_gradient(jax.lax.scan(one, None, parts)[1])
    return jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)


def _deal(x: Array, microbatches: int) -> Array:
    """[B, ...] -> [M, B / M, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)


def ratio_value(ratio: Ratio) -> Array:
    """Sum / weight; 0 where the weight is 0."""
    return jnp.where(ratio.weight != 0, ratio.sum / jnp.where(ratio.weight != 0, ratio.weight, 1), 0)


def total_loss(terms: Terms, weights: dict[str, Array]) -> Array:
    """The loss: each term's sum over the given global weight, times its scale. Terms of weight 0 are left out."""
    shares = [terms.scales[name] * ratio_value(Ratio(term.sum, weights[name])) for name, term in terms.losses.items()]
    return jnp.sum(jnp.stack(shares))


def term_metrics(terms: Terms, parts: Array, weights: dict[str, Array]) -> Metrics:
    """Values to report from terms that were summed over `parts` calls of the objective, scales included."""
    terms = replace(terms, scales=jax.tree.map(lambda scale: scale / parts, terms.scales))
    metrics = {"loss": total_loss(terms, weights), "weight": next(iter(weights.values()))}
    if len(terms.losses) > 1:
        metrics |= {f"loss/{name}": ratio_value(term) for name, term in terms.losses.items()}
    return metrics | {name: ratio_value(ratio) for name, ratio in terms.metrics.items()}


def make_evaluation(objective: Objective) -> Callable[[Params, Batch, Key], Terms]:
    """The sums of an objective on one batch, without gradient: add them up over batches with `jax.tree.map`."""
    return lambda params, batch, key: jax.lax.stop_gradient(objective(params, batch, key))
