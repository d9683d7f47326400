"""Choosing which weighted candidates go on: every scheme keeps each candidate's weight in expectation.

Weights are logarithms in float32, and -inf is a candidate that is dead: it is never chosen. Candidates are sorted by
weight first, so that the dead ones are last and no rounding of a running sum can reach them.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key

Scheme: TypeAlias = Callable[[Key, Array, int], Array]
"""`scheme(key, shares_C, count) -> places_N`: `count` places of candidates whose shares are sorted downwards and sum to
1; candidate j is chosen `count * shares_j` times in expectation."""


class Chosen(NamedTuple):
    """Candidates that go on, and their new weights."""

    index_N: Array
    """int32, which candidate each is. Where there is nobody left it says any dead one."""
    log_weight_N: Array
    """float32; -inf where there was nobody left."""


def log_total(log_weight_C: Array) -> Array:
    """Log of the sum of weights over the last axis; -inf, and no NaN, of the dead. A NaN among them is seen."""
    some = jnp.max(log_weight_C, axis=-1) != -jnp.inf
    return jnp.where(some, jax.nn.logsumexp(jnp.where(some[..., None], log_weight_C, 0), axis=-1), -jnp.inf)


def shares(log_weight_C: Array) -> Array:
    """Weights that sum to 1 over the last axis; zeros where all are dead."""
    # The log of their sum is rounded to a part in 1e7 of itself, and may be large: equal weights would differ from 1/C.
    top = jnp.max(log_weight_C, axis=-1, keepdims=True)
    parts_C = jnp.exp(log_weight_C - jnp.where(top > -jnp.inf, top, 0))
    return parts_C / jnp.maximum(jnp.sum(parts_C, axis=-1, keepdims=True), 1)


def effective_size(log_weight_C: Array) -> Array:
    """1 / the sum of squared shares over the last axis; 0 where all are dead."""
    squares = jnp.sum(jnp.square(shares(log_weight_C)), axis=-1)
    return jnp.where(squares == 0, 0, 1 / jnp.where(squares == 0, 1, squares))


def optimal(key: Key, log_weight_C: Array, count: int) -> Chosen:
    """Keep `count` of C >= count candidates, none twice, and the sum of weights exactly.

    Optimal resampling of Fearnhead & Clifford (JRSS-B 65(4), 2003), as in arXiv 2306.03081, algorithm 1.
    With c such that the sum of min(1, c share_j) is `count`: candidates of c share_j >= 1 keep their weight; of the
    others `count` less those are drawn by one uniform number, each with probability c share_j, and weigh total / c.
    Where no more than `count` are alive, all of them keep their weight and the other places are dead.
    """
    order_C = jnp.argsort(-log_weight_C)
    sorted_C = log_weight_C[order_C]
    kept, log_scale = threshold(log_weight_C, count)
    share_C, total = shares(sorted_C), log_total(log_weight_C)
    alive = jnp.sum(share_C > 0)
    chances_C = jnp.where(jnp.arange(len(order_C)) < kept, 0, share_C)
    slots_N = jnp.arange(count)
    drawn_N = _along(chances_C, slots_N - kept + jax.random.uniform(key), count - kept)
    place_N = jnp.where(slots_N < kept, slots_N, jnp.minimum(drawn_N, alive - 1)).astype(jnp.int32)
    log_weight_N = jnp.where(slots_N < kept, sorted_C[place_N], total - log_scale)
    # Sorting would leave a NaN behind, and nobody would see it.
    return Chosen(order_C[place_N].astype(jnp.int32), jnp.where(jnp.isnan(total), total, log_weight_N))


def threshold(log_weight_C: Array, count: int) -> tuple[Array, Array]:
    """How many candidates `optimal` keeps for certain, and log c (inf where all that are alive are kept).

    In closed form: v_0 >= v_1 >= ... the shares, c_k = (count - k) / (v_k + v_k+1 + ...); the first k with c_k v_k < 1.
    """
    share_C = -jnp.sort(-shares(log_weight_C))
    tail_C = jnp.cumsum(share_C[::-1])[::-1]
    left_C = count - jnp.arange(len(share_C))
    small_C = (left_C * share_C < tail_C) & (left_C > 0)
    crowded = jnp.sum(share_C > 0) > count
    kept = jnp.where(crowded, jnp.argmax(small_C), count)
    # Rounding may hide the last chance of ties to be small: one place is then left for those of equal share.
    kept = jnp.where(crowded & ~jnp.any(small_C), count - 1, kept)
    at = jnp.minimum(kept, len(share_C) - 1)
    scale = jnp.where(crowded, left_C[at] / jnp.where(crowded, tail_C[at], 1), 1)
    return kept, jnp.where(crowded, jnp.log(scale), jnp.inf)


def resampled(scheme: Scheme, key: Key, log_weight_N: Array) -> Chosen:
    """As many particles as there were, drawn by their weights; all weigh the mean then."""
    count = len(log_weight_N)
    order_N = jnp.argsort(-log_weight_N)
    share_N = shares(log_weight_N)[order_N]
    place_N = jnp.clip(scheme(key, share_N, count), 0, jnp.maximum(jnp.sum(share_N > 0) - 1, 0))
    mean = log_total(log_weight_N) - jnp.log(count)
    return Chosen(order_N[place_N].astype(jnp.int32), jnp.full(count, mean))


def multinomial(key: Key, shares_C: Array, count: int) -> Array:
    """Independent draws."""
    return _located(shares_C, jax.random.uniform(key, (count,)))


def stratified(key: Key, shares_C: Array, count: int) -> Array:
    """One uniform number in each of `count` equal parts of [0, 1)."""
    return _located(shares_C, (jnp.arange(count) + jax.random.uniform(key, (count,))) / count)


def systematic(key: Key, shares_C: Array, count: int) -> Array:
    """The same uniform number in each part: candidate j comes floor or ceil of count * share_j times."""
    return _located(shares_C, (jnp.arange(count) + jax.random.uniform(key)) / count)


def residual(key: Key, shares_C: Array, count: int) -> Array:
    """floor(count * share_j) times each, but for rounding, and independent draws from what is left."""
    expected_C = count * shares_C
    whole_C = jnp.floor(expected_C)
    certain = jnp.sum(whole_C).astype(jnp.int32)
    copies_N = jnp.searchsorted(jnp.cumsum(whole_C), jnp.arange(count), side="right")
    drawn_N = _located(expected_C - whole_C, jax.random.uniform(key, (count,)))
    return jnp.where(jnp.arange(count) < certain, copies_N, drawn_N)


def _located(shares_C: Array, points_N: Array) -> Array:
    """The candidate in whose part of [0, 1) each point lies."""
    return _along(shares_C, points_N, 1)


def _along(shares_C: Array, points_N: Array, length: Array | int) -> Array:
    """The candidates at these points of a line that they divide as their shares say."""
    upto_C = jnp.cumsum(shares_C)
    line_C = upto_C / jnp.where(upto_C[-1] > 0, upto_C[-1], 1) * length
    return jnp.searchsorted(line_C, points_N, side="right")


def at_home(parent_N: Array, count: int) -> Array:
    """Children ordered so that one of each particle that has any takes its place: int32 [N], which child goes where.

    Only the places of particles without children change hands then, so that rows can be copied in place.
    """
    order_N = jnp.argsort(parent_N)
    sorted_N = parent_N[order_N]
    first_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    free_N = jnp.nonzero(jnp.zeros(count, bool).at[parent_N].set(True) == 0, size=count, fill_value=count)[0]
    place_N = jnp.where(first_N, sorted_N, free_N[jnp.cumsum(~first_N) - 1])
    return jnp.zeros(count, jnp.int32).at[place_N].set(order_N.astype(jnp.int32))
