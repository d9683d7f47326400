"""Constraints that can be asked of one token at a time: adaptive weighted rejection sampling (arXiv 2504.05410).

Where it would cost too much to know which tokens of the vocabulary a constraint allows, tokens are drawn and asked
about until two are accepted: about 2 / (allowed mass) questions. That gives a draw from the allowed tokens with an
unbiased estimate of their mass, so that particles are weighed as if a mask had been observed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key
from lmlab.inference.distributions import normalised, safe_log
from lmlab.inference.programs import Particle

Accept: TypeAlias = Callable[[Array], Array]
"""`accept(token) -> bool`, of a scalar; it may ask Python by `jax.pure_callback`."""


class Search(NamedTuple):
    """Tokens asked about so far."""

    asked: Array
    """How many."""
    log_weight: Array
    place: Array
    """Of the accepted one, in the order of drawing."""
    accepted: Array
    over: Array


def accepted_token(p: Particle, accept: Accept) -> Array:
    """The next token of the first context among those accepted, weighed by an unbiased estimate of their mass."""
    token, log_mass = weighted_rejection(p.key(), p.context.logprobs_V, accept)
    p.score(log_mass)
    p.intervene(p.context.next_token(), token)
    return token


def weighted_rejection(key: Key, logits_V: Array, accept: Accept) -> tuple[Array, Array]:
    """An accepted token, and the log of an unbiased estimate of the mass of all accepted ones; -inf if there is none.

    The recursive form: with q the share of a token in what was not drawn before it, the estimate is the product of
    1 - q over those rejected first, times 1 if the draw after the accepted token is accepted too, else times its q.
    """
    logprobs_V = normalised(logits_V)
    # Perturbed log-probabilities, largest first, are draws without replacement (Gumbel).
    order_V = jnp.argsort(-(logprobs_V + jax.random.gumbel(key, logprobs_V.shape)))
    mass_V = jnp.exp(logprobs_V[order_V])
    # What is left before each draw and after all, summed from its small end: 1 less a share that is nearly 1 would lose
    # all of its digits.
    log_left_V1 = safe_log(jnp.append(jnp.cumsum(mass_V[::-1])[::-1], 0))
    some = jnp.sum(mass_V > 0)

    def ask(search: Search) -> Search:
        at = jnp.minimum(search.asked, len(order_V) - 1)
        drawn = search.asked < some
        fine = drawn & accept(order_V[at].astype(jnp.int32))
        gain = jnp.where(drawn & ~fine & ~search.accepted, log_left_V1[at + 1] - log_left_V1[at], 0.0)
        # Where nothing else is left to be drawn the share of the accepted token is 1.
        share = safe_log(mass_V[search.place]) - log_left_V1[search.place]
        gain += jnp.where(search.accepted & ~fine, share, 0.0)
        return Search(
            asked=search.asked + 1, log_weight=search.log_weight + gain,
            place=jnp.where(fine & ~search.accepted, at, search.place), accepted=search.accepted | fine,
            over=search.accepted | ~drawn,
        )  # fmt: skip

    no = jnp.zeros((), bool)
    start = Search(jnp.int32(0), jnp.zeros(()), jnp.int32(0), no, no)
    found: Any = jax.lax.while_loop(lambda search: ~search.over, ask, start)
    return order_V[found.place].astype(jnp.int32), jnp.where(found.accepted, found.log_weight, -jnp.inf)
