"""A policy that is a table of logits, whose optimum is known in closed form: reference * exp(reward / beta) / Z."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array
from lmlab.objectives import pair_losses
from lmlab.objectives.pair_losses import PairLoss, PairScores

ANSWERS, BETA, FLIPS = 6, 0.5, 0.2
STEPS = 30
FIRST, SECOND = (np.asarray(part) for part in zip(*((i, j) for i in range(ANSWERS) for j in range(ANSWERS) if i != j),
                                                  strict=True))  # fmt: skip
"""Every ordered pair of answers."""


def run_table(seeds: int) -> dict[str, Any]:
    """Total variation to the optimum after descent on the expected loss over infinitely many pairs, by arm and seed.

    Labels are drawn as Bradley and Terry say, and with `FLIPS` of them turned round afterwards.
    """
    arms: dict[str, tuple[PairLoss, float]] = {
        "DPO": (pair_losses.sigmoid, 0.0),
        "DPO, 20% flips": (pair_losses.sigmoid, FLIPS),
        "conservative, 20% flips": (partial(pair_losses.sigmoid, smoothing=FLIPS), FLIPS),
        "robust, 20% flips": (partial(pair_losses.robust, flips=FLIPS), FLIPS),
        "DPO, labels at random": (pair_losses.sigmoid, 0.5),
    }
    keys = jax.random.split(jax.random.key(0), seeds)
    found = {name: jax.jit(jax.vmap(partial(_distance, loss, flips)))(keys) for name, (loss, flips) in arms.items()}
    before = jax.vmap(lambda key: _apart(*_problem(key)[1:]))(keys)
    return {"before": before.tolist(), "after": {name: distances.tolist() for name, distances in found.items()}}


def _problem(key: Array) -> tuple[Array, Array, Array]:
    """Rewards, log-probabilities of the reference, and of the optimum."""
    keys = jax.random.split(key)
    rewards = jax.random.normal(keys[0], (ANSWERS,))
    reference = jax.nn.log_softmax(jax.random.normal(keys[1], (ANSWERS,)))
    return rewards, reference, jax.nn.log_softmax(reference + rewards / BETA)


def _apart(one: Array, other: Array) -> Array:
    """Total variation of two distributions, given by log-probabilities."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(one) - jnp.exp(other)))


def _distance(loss: PairLoss, flips: float, key: Array) -> Array:
    rewards, reference, optimum = _problem(key)
    preferred = jax.nn.sigmoid(rewards[FIRST] - rewards[SECOND])
    weights = (1 - flips) * preferred + flips * (1 - preferred)
    ones = jnp.ones(len(FIRST))

    def expected(logits: Array) -> Array:
        policy = jax.nn.log_softmax(logits)
        scores = PairScores(policy[FIRST], policy[SECOND], reference[FIRST], reference[SECOND], ones, ones)
        return jnp.mean(weights * loss(scores, BETA))

    return _apart(jax.nn.log_softmax(descend(expected, reference)), optimum)


def descend(function: Callable[[Array], Array], start: Array) -> Array:
    """Where Newton's method ends. The losses are convex in the logits, and flat where all are moved alike."""

    def update(point: Array, _: None) -> tuple[Array, None]:
        curvature = jax.hessian(function)(point) + jnp.ones((ANSWERS, ANSWERS)) / ANSWERS
        return point - jnp.linalg.solve(curvature, jax.grad(function)(point)), None

    return jax.lax.scan(update, start, length=STEPS)[0]
