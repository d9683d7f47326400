"""Distributions that programs over a language model draw from and observe, of one particle."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array, Key
from lmlab.inference.draw import tokens_at


class Distribution(Protocol):
    """What `Particle.sample` and `Particle.observe` need. Values are scalars, traced or not."""

    def draw(self, key: Key) -> Any:
        """A value."""

    def log_prob(self, value: Any) -> Array:
        """Log-probability of a value, -inf outside of the support."""

    def take(self, value: Any) -> None:
        """Learn that the value was drawn or observed; distributions that stand alone do nothing."""


@dataclass(frozen=True, eq=False)
class Categorical:
    """A token, or any number from 0, by logits [V] that need not be normalised; -inf is never drawn."""

    logits_V: Array

    def draw(self, key: Key) -> Array:
        """An int32 in [0, V)."""
        return draw_token(key, self.logits_V)

    def log_prob(self, value: Array | int) -> Array:
        """Of a number in [0, V)."""
        return normalised(self.logits_V)[value]

    def take(self, value: Array | int) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, eq=False)
class Bernoulli:
    """True with a probability."""

    probability: Array | float

    def draw(self, key: Key) -> Array:
        """A bool."""
        return jax.random.bernoulli(key, self.probability)

    def log_prob(self, value: Array | bool) -> Array:
        """Of a bool."""
        return safe_log(jnp.where(value, self.probability, 1 - self.probability))

    def take(self, value: Array | bool) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, eq=False)
class Geometric:
    """1, 2, 3, ...: how many trials until one of this probability succeeds."""

    probability: Array | float

    def draw(self, key: Key) -> Array:
        """An int32 of at least 1."""
        return jax.random.geometric(key, self.probability, dtype=jnp.int32)

    def log_prob(self, value: Array | int) -> Array:
        """Of an int; -inf below 1."""
        value = jnp.asarray(value)
        probability = jnp.asarray(self.probability)
        logs = safe_log(probability) + jax.scipy.special.xlog1py(value - 1, -probability)
        return jnp.where(value >= 1, logs, -jnp.inf)

    def take(self, value: Array | int) -> None:
        """Nothing to learn."""


class Context:
    """What a particle expects next after one prompt and its tokens so far, in the middle of a step."""

    def __init__(self, logprobs_V: Array) -> None:
        """logprobs: float32 [V], normalised."""
        self.logprobs_V = logprobs_V
        """-inf of tokens that masks have taken away; not normalised again, see `log_mass`."""
        self.log_mass = jnp.zeros(())
        """log of the mass of the tokens that masks have left."""
        self.token: Array | None = None
        """What the step has made the next token, if it has."""

    def next_token(self) -> "NextToken":
        """The next token, among those that masks have left."""
        return NextToken(self)

    def mask(self, allowed_V: Array) -> "Mask":
        """Whether the next token is one of these, bool [V]. Tokens beyond the end of the mask are not: models have more
        logits than their tokenizers tokens, where that made their arrays rounder.
        """
        fine = allowed_V.dtype == bool and allowed_V.ndim == 1 and len(allowed_V) <= len(self.logprobs_V)
        check(fine, "mask", f"{allowed_V.dtype}{list(allowed_V.shape)}",
              f"a bool for each of {len(self.logprobs_V)} tokens, or of the first of them")  # fmt: skip
        return Mask(self, allowed_V)


@dataclass(frozen=True, eq=False)
class NextToken:
    """The next token of a context. Drawing or observing it enters it into the text."""

    context: Context

    def draw(self, key: Key) -> Array:
        """An int32 in [0, V)."""
        return draw_token(key, self.context.logprobs_V)

    def log_prob(self, value: Array | int) -> Array:
        """Under the model, given the masks before."""
        return _less(self.context.logprobs_V[value], self.context.log_mass)

    def take(self, value: Array | int) -> None:
        """Enter the token. Raises `UserError` for a second token in one step."""
        check(self.context.token is None, "step", "a second token", "one token a step for each context",
              "Count steps in the state, and let longer ones be blocks (Program.boundary).")  # fmt: skip
        self.context.token = jnp.asarray(value, jnp.int32)


@dataclass(frozen=True, eq=False)
class Mask:
    """Whether the next token of a context is one of some: what is said of it holds for the token that follows.

    Observed and then followed by a draw it is the locally optimal proposal, weighed by the mass of what is allowed.
    """

    context: Context
    allowed_V: Array

    def draw(self, key: Key) -> Array:
        """A bool."""
        return jnp.log(jax.random.uniform(key)) < self.log_prob(True)

    def log_prob(self, value: Array | bool) -> Array:
        """Log of the mass of the tokens on that side, of those that masks before have left."""
        return _less(_log_sum(self._left(value)), self.context.log_mass)

    def take(self, value: Array | bool) -> None:
        """Leave only the tokens of that side."""
        left_V = self._left(value)
        self.context.logprobs_V, self.context.log_mass = left_V, _log_sum(left_V)

    def _left(self, value: Array | bool) -> Array:
        allowed_V = jnp.pad(self.allowed_V, (0, len(self.context.logprobs_V) - len(self.allowed_V)))
        return jnp.where(allowed_V == value, self.context.logprobs_V, -jnp.inf)


def draw_token(key: Key, logits_V: Array) -> Array:
    """A token by its logits; any, where all are -inf."""
    some = jnp.any(logits_V > -jnp.inf)
    return tokens_at(jax.random.uniform(key, (1,)), jnp.where(some, logits_V, 0)[None])[0]


def normalised(logits_V: Array) -> Array:
    """Logits less the log of their sum of exponentials; all -inf, and no NaN, where they are."""
    return _less(logits_V, _log_sum(logits_V))


def safe_log(x: Array) -> Array:
    """log, -inf at and below 0, without a NaN in sight."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def _log_sum(logits_V: Array) -> Array:
    top = jnp.max(logits_V)
    sums = jnp.sum(jnp.exp(logits_V - jnp.where(top > -jnp.inf, top, 0)))
    return jnp.where(top > -jnp.inf, top + safe_log(sums), -jnp.inf)


def _less(log_part: Array, log_whole: Array) -> Array:
    """Log of a part of a whole; -inf, and no NaN, of nothing."""
    return jnp.where(log_part > -jnp.inf, log_part - jnp.where(log_whole > -jnp.inf, log_whole, 0), -jnp.inf)
