"""What is done about labels that may be wrong: from strength to target, margin and weight of every pair.

Treatments of different parts go together: `flip(...)._replace(margins_N=margin(...).margins_N)`. A flipped pair has
target 0 and keeps the sign of its margin: -log s(-(d - m)) is the loss of the swapped pair with the margin -m.
Source: arXiv 2401.06080, section 2; what is not from there says so.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lmlab.core.types import Array

Where = Literal["all", "negative", "bottom", "top"]


class Treatment(NamedTuple):
    """Arguments of `preference_loss` for every pair, [N] float32 each."""

    targets_N: Array
    margins_N: Array
    weights_N: Array


def as_given(strength_N: Array) -> Treatment:
    """Nothing is done: Bradley-Terry on the labels as they are."""
    ones_N = jnp.ones_like(strength_N, jnp.float32)
    return Treatment(ones_N, jnp.zeros_like(ones_N), ones_N)


def lowest(strength_N: Array, share: float) -> Array:
    """Which pairs are the given share of lowest strength, bool [N]."""
    ranks_N = jnp.argsort(jnp.argsort(strength_N))
    return ranks_N < jnp.round(share * len(strength_N))


def flip(strength_N: Array, suspects_N: Array) -> Treatment:
    """The labels of suspects are turned round."""
    return as_given(strength_N)._replace(targets_N=jnp.where(suspects_N, 0.0, 1.0))


def drop(strength_N: Array, suspects_N: Array) -> Treatment:
    """Suspects are left out."""
    return as_given(strength_N)._replace(weights_N=jnp.where(suspects_N, 0.0, 1.0))


def soft(strength_N: Array) -> Treatment:
    """The target is q = s(mu)."""
    return as_given(strength_N)._replace(targets_N=jax.nn.sigmoid(strength_N.astype(jnp.float32)))


def posterior(strength_N: Array, flips: Array | float, scale: Array | float = 1.0) -> Treatment:
    """The target is P(label is right | mu, e) by Bayes' rule: (1 - e) s / ((1 - e) s + e (1 - s)), s = s(scale mu).

    flips: e, the rate of wrong labels, which are as frequent among all pairs. scale: see `fit_noise`.
    """
    log_odds_N = scale * strength_N.astype(jnp.float32) + jnp.log1p(-flips) - jnp.log(flips)
    return as_given(strength_N)._replace(targets_N=jax.nn.sigmoid(log_odds_N))


def smooth(strength_N: Array, amount: float = 0.2, where: Where = "all", share: float = 0.1) -> Treatment:
    """The target is 1 - a: of all pairs, of those with mu < 0, or of a share of them at the bottom or at the top."""
    chosen_N = {
        "all": lambda: jnp.ones(strength_N.shape, bool),
        "negative": lambda: strength_N < 0,
        "bottom": lambda: lowest(strength_N, share),
        "top": lambda: lowest(-strength_N, share),
    }[where]()
    return as_given(strength_N)._replace(targets_N=jnp.where(chosen_N, 1.0 - amount, 1.0))


def margin(strength_N: Array, scale: float = 1.0, *, signed: bool = True) -> Treatment:
    """The adaptive margin m = scale mu. A negative one lowers the bar of a suspect; signed = False: it is cut at 0."""
    margins_N = scale * strength_N.astype(jnp.float32)
    return as_given(strength_N)._replace(margins_N=margins_N if signed else jnp.maximum(margins_N, 0))


def rating_margin(strength_N: Array, steps: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)) -> Treatment:
    """Margins by grade, as raters give them (arXiv 2307.09288, section 3.2.2): equally many pairs to each grade."""
    ranks_N = jnp.argsort(jnp.argsort(strength_N))
    grades_N = ranks_N * len(steps) // len(strength_N)
    return as_given(strength_N)._replace(margins_N=jnp.asarray(steps, jnp.float32)[grades_N])


def toward_model(targets_N: Array, differences_N: Array, rate: float) -> Array:
    """Targets after one more epoch of iterative data smoothing: q <- (1 - b) q + b s(d) (arXiv 2401.16335)."""
    return (1 - rate) * targets_N + rate * jax.nn.sigmoid(differences_N)


def with_flips(treatment: Treatment, flips_N: Array) -> Treatment:
    """A treatment of given labels as one of pairs in their true order, where some labels are the other way round."""
    targets_N, margins_N, weights_N = treatment
    return Treatment(
        jnp.where(flips_N, 1 - targets_N, targets_N), jnp.where(flips_N, -margins_N, margins_N), weights_N
    )  # fmt: skip
