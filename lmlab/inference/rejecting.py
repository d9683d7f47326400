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
from lmlab.inference.distributions import normalised
from lmlab.inference.programs import Particle

Accept: TypeAlias = Callable[[Array], Array]
"""`accept(token) -> bool`, of a scalar; it may ask Python by `jax.pure_callback`."""


class Search(NamedTuple):
    """Tokens asked about so far."""

    left_V: Array
    """log-probabilities, -inf of tokens that were drawn."""
    log_weight: Array
    token: Array
    """The accepted one."""
    share: Array
    """Its share of what was left when it was drawn."""
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
    # The largest of perturbed log-probabilities is a draw; the next largest one from what is left (Gumbel).
    order_V = logprobs_V + jax.random.gumbel(key, logprobs_V.shape)

    def ask(search: Search) -> Search:
        token = jnp.argmax(jnp.where(search.left_V > -jnp.inf, order_V, -jnp.inf)).astype(jnp.int32)
        share = jnp.exp(normalised(search.left_V)[token])
        some, fine = jnp.any(search.left_V > -jnp.inf), accept(token)
        first, second = some & ~search.accepted, some & search.accepted
        log_rejected = jnp.log1p(-jnp.minimum(share, 1))
        gain = jnp.where(first & ~fine, log_rejected, 0.0)
        # Nothing else left to be drawn counts as rejected: the share of the accepted token is 1 then.
        gain += jnp.where(search.accepted & ~(second & fine), jnp.log(search.share), 0.0)
        return Search(
            left_V=jnp.where(jnp.arange(len(order_V)) == token, -jnp.inf, search.left_V),
            log_weight=search.log_weight + gain,
            token=jnp.where(first & fine, token, search.token),
            share=jnp.where(first & fine, share, search.share),
            accepted=search.accepted | (first & fine),
            over=search.accepted | ~some,
        )

    start = Search(logprobs_V, jnp.zeros(()), jnp.int32(0), jnp.ones(()), jnp.zeros((), bool), jnp.zeros((), bool))
    found: Any = jax.lax.while_loop(lambda search: ~search.over, ask, start)
    return found.token, jnp.where(found.accepted, found.log_weight, -jnp.inf)
