"""Preference strength: what an ensemble of reward models says of each pair (arXiv 2401.06080, section 2.1).

Low strength means that the ensemble disagrees with the label. That is so of wrong labels, and just as well of right
ones that it has not learnt: without an estimate of the noise rate it is no reason to flip anything.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmlab.core.types import Array

RATES = tuple(step / 100 for step in range(46))
"""Noise rates that are tried."""


class Strength(NamedTuple):
    """Of every pair, over M members [N] each."""

    mean_N: Array
    """mu: the mean difference r(preferred) - r(other), in units of the reward."""
    std_N: Array
    """sigma: the standard deviation of the members, divided by M and not by M - 1."""
    vote_N: Array
    """The share of members whose difference is above 0."""


def preference_strength(differences_MN: Array, *, normalise: bool = False) -> Strength:
    """Strength from the differences of M members. normalise: each is divided by its root mean square over the pairs.

    A difference is free of the offset of its member's rewards, but not of their scale.
    """
    if normalise:
        rms_M1 = jnp.sqrt(jnp.mean(jnp.square(differences_MN), axis=1, keepdims=True))
        differences_MN = differences_MN / jnp.where(rms_M1 > 0, rms_M1, 1)
    votes_MN = (differences_MN > 0).astype(jnp.float32)
    return Strength(jnp.mean(differences_MN, axis=0), jnp.std(differences_MN, axis=0), jnp.mean(votes_MN, axis=0))


def out_of_fold(differences_RFN: Array, folds_RN: Array) -> Array:
    """Differences [R, N] of each pair by members that did not train on it.

    differences_RFN: of R rounds with F members each, of which member f has not seen the pairs of fold f. folds_RN: the
    fold of each pair, 0 to F - 1, drawn anew in every round.
    """
    return jnp.take_along_axis(differences_RFN, folds_RN[:, None, :], axis=1)[:, 0]


def noise_rate(probabilities_N: Array) -> Array:
    """The share of wrong labels [] by confident learning (arXiv 1911.00068, section 3.1), from out-of-fold numbers.

    A label counts where the probability of it, or of its opposite, reaches the mean that given labels have: the classes
    "first is better" and "second is better" mirror each other, so they have one threshold. What stays below on both
    sides does not count. A model that errs on right labels is counted as noise: a rate from one that is hardly better
    than chance says more of the model than of the labels.

    probabilities_N: of the given label, s(d) of pairs that the model was not trained on.
    """
    threshold = jnp.mean(probabilities_N)
    agrees_N = (probabilities_N >= threshold) & (probabilities_N >= 0.5)
    opposes_N = (1 - probabilities_N >= threshold) & (probabilities_N < 0.5)
    counted = jnp.sum(agrees_N) + jnp.sum(opposes_N)
    return jnp.where(counted > 0, jnp.sum(opposes_N) / jnp.maximum(counted, 1), 0.0)


def fit_noise(strength_N: Array, rates: Sequence[float] = RATES) -> tuple[Array, Array]:
    """(scale c, noise rate e), [] each, under which the given labels are most probable: (1 - e) s(c mu) + e s(-c mu).

    By a search over these rates and over powers of 2^(1/4) from 1/64 to 64. A wrong label is one that was turned round
    whatever the pair; that pairs of little strength are often labelled against it is no noise, the scale explains it.
    So the errors of a weak ensemble do not count as noise, as they do for `noise_rate`; but where no label is all but
    certain to the ensemble, noise and doubt look alike. strength_N: of pairs that the members were not trained on.
    rates: one number where the rate is known.
    """
    scales_C, rates_E1 = jnp.exp2(jnp.linspace(-6.0, 6.0, 49)), jnp.asarray(rates, jnp.float32)[:, None]

    def fit(scale: Array) -> Array:
        right_1N = jax.nn.sigmoid(scale * strength_N)[None]
        return jnp.mean(jnp.log(jnp.maximum((1 - rates_E1) * right_1N + rates_E1 * (1 - right_1N), 1e-30)), axis=1)

    fits_CE = jax.lax.map(fit, scales_C)
    best, column = jnp.unravel_index(jnp.argmax(fits_CE), fits_CE.shape)
    return scales_C[best], rates_E1[column, 0]
