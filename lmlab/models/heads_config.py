"""Shape of a model that predicts several tokens at once. Imports no JAX."""

from dataclasses import dataclass, field, replace
from typing import Literal

from lmlab.core.errors import check
from lmlab.models.config import ModelConfig, TransformerConfig

Chain = Literal["parallel", "causal", "linear", "sequential"]
"""parallel: a layer for each head on the trunk of L - n; causal: each head's layer on the one before; linear: a matrix
for each further head on all L layers; sequential: a further layer for each, which also reads the token that the head
before it predicts (arXiv 2412.19437, section 2.2)."""


def of_depth(config: ModelConfig, depth: int) -> ModelConfig:
    """The first layers of a model as a model; each rotates, or does not, as in the whole."""
    skipped = tuple(layer for layer in config.rotary.skipped_layers if layer < depth)
    return replace(config, layers=depth, rotary=replace(config.rotary, skipped_layers=skipped))


@dataclass(frozen=True)
class MultiTokenConfig:
    """A model of L layers with n heads (arXiv 2404.19737), of which the first is a language model."""

    model: ModelConfig = field(default_factory=TransformerConfig)
    """L layers, those of all heads included where a head is a layer: n = 1 is exactly this model.

    Heads stand beside one another, not at places of their own: where rotary.skipped_layers names the last layer of head
    1's model, number `depth` - 1, the layers of all heads do without rotation, and else none does. Numbers beyond it
    mean nothing with heads that are layers. So heads can begin as copies of head 1.
    """
    heads: int = 4
    """n: head i predicts the i-th next token."""
    chain: Chain = "parallel"

    def __post_init__(self) -> None:
        """Check that a trunk is left."""
        check(self.heads >= 1, "heads", self.heads, "at least 1")
        check(not self.own_layers or self.heads < self.model.layers, "heads", self.heads,
              f"less than model.layers = {self.model.layers}, of which the heads are the last ones")  # fmt: skip

    @property
    def own_layers(self) -> bool:
        """Whether heads are layers taken off the trunk."""
        return self.chain in ("parallel", "causal")

    @property
    def depth(self) -> int:
        """Layers of the first head's language model, its own included."""
        return self.model.layers - self.heads + 1 if self.own_layers else self.model.layers

    @property
    def first(self) -> ModelConfig:
        """The language model that the first head is."""
        return of_depth(self.model, self.depth)
