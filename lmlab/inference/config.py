"""How tokens are drawn. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal

from lmlab.core.errors import check

Verify = Literal["token", "block"]
"""Whether drafted tokens are kept one after another (arXiv 2211.17192), or as many as can be of the whole draft (block
verification, arXiv 2403.10444). Both leave the distribution as it is; greedy, they are the same."""


@dataclass(frozen=True)
class SamplingConfig:
    """Applied in this order: repetition_penalty, temperature, top_k, top_p, min_p."""

    repetition_penalty: float = 1.0
    """Makes tokens that were read or drawn before less probable where above 1 (arXiv 1909.05858)."""
    temperature: float = 1.0
    """Divides the logits; 0: always the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this times as probable as the best one (arXiv 2407.01082)."""
    max_new_tokens: int = 256
    """Tokens to draw at most."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are cut off."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a positive number")
        check(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        check(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "a probability in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check(all(self.stop), "stop", self.stop, "texts that are not empty")
