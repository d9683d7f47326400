"""Probabilistic programs over a language model: a step function of one particle, run for all of them at once.

    def five_letters(p, letters):
        p.observe(p.context.mask(p.tables["fits"][letters]), True)
        token = p.sample(p.context.next_token())
        p.finish(token == END)
        return p.tables["letters_after"][letters, token]

A step enters one token into each context. What it does to the weight is that of LLaMPPL (arXiv 2306.03081, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array, Key
from lmlab.inference.distributions import Context, Distribution

Step: TypeAlias = Callable[["Particle", Any], Any]
"""`step(particle, state) -> state`: what happens to one particle from one token to the next. `state` is whatever the
program counts: scalars and arrays of fixed shapes."""


class Particle:
    """One particle in the middle of a step. Programs are traced by JAX: what depends on values is said by `where`.

    What is done after `finish` or a failed condition has no effect on the weight.
    """

    def __init__(self, key: Key, logprobs_MV: Array, tables: Any, length: Array) -> None:
        """logprobs: of the next token of each context, float32, normalised."""
        self.contexts = [Context(logprobs_V) for logprobs_V in logprobs_MV]
        self.tables = tables
        """Arrays of the program."""
        self.length = length
        """Tokens so far, without the prompt."""
        self.log_weight = jnp.zeros(())
        self.log_twist = jnp.zeros(())
        self.finished = jnp.zeros((), bool)
        self._key, self._draws = key, 0

    @property
    def context(self) -> Context:
        """The first, or only, context: its tokens are the text."""
        return self.contexts[0]

    def sample(self, distribution: Distribution, proposal: Distribution | None = None) -> Any:
        """A draw; from a proposal it weighs what it is more probable under the distribution than under that."""
        source = distribution if proposal is None else proposal
        value = source.draw(self.key())
        drawn = source.log_prob(value)
        gain = jnp.zeros(()) if proposal is None else distribution.log_prob(value)
        # Of nothing nothing can be drawn.
        some = (drawn > -jnp.inf) & (gain > -jnp.inf)
        lost = jnp.zeros(()) if proposal is None else drawn
        self.score(jnp.where(some, gain - jnp.where(some, lost, 0), -jnp.inf))
        distribution.take(value)
        return value

    def observe(self, distribution: Distribution, value: Any) -> None:
        """Weigh the probability of a value, and go on as if it had been drawn."""
        self.score(distribution.log_prob(value))
        distribution.take(value)

    def condition(self, holds: Array | bool) -> None:
        """Die unless this holds."""
        self.score(jnp.where(holds, 0.0, -jnp.inf))

    def intervene(self, distribution: Distribution, value: Any) -> None:
        """Go on as if a value had been drawn, at no weight."""
        distribution.take(value)

    def score(self, log_weight: Array | float) -> None:
        """Multiply the weight."""
        self.log_weight += jnp.where(self.finished, 0.0, log_weight)

    def twist(self, log_twist: Array | float) -> None:
        """Multiply the weight until the next step, or the end: a guess at what is to come."""
        self.log_twist += log_twist

    def finish(self, when: Array | bool = True) -> None:
        """End the text here."""
        self.finished |= when

    def key(self) -> Key:
        """A key that nothing else uses."""
        self._draws += 1
        return jax.random.fold_in(self._key, self._draws)


@dataclass(frozen=True, eq=False)
class Program:
    """A step function, where it begins and what it looks up; equal only to itself."""

    step: Step
    start: Any = ()
    """State of a particle before its first token."""
    tables: Any = ()
    """Arrays that `Particle.tables` gives: part of what is passed, not of what is compiled."""
    contexts: int = 1
    """M: prompts that are read side by side."""
    temperature: float = 1.0
    """Divides the logits: the distribution that the program is about is the one at this temperature."""
    boundary: Callable[[Any], Array] | None = None
    """`boundary(state)`: whether particles may be compared after this token; None: after every one. See `in_blocks`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.contexts >= 1, "contexts", self.contexts, "at least 1")
        check(self.temperature > 0, "temperature", self.temperature, "a positive number")
