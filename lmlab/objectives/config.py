"""Settings of objectives. Imports no JAX."""

from dataclasses import dataclass

from lmlab.core.errors import check


@dataclass(frozen=True)
class NextTokenConfig:
    """Next-token prediction."""

    z_loss: float = 0.0
    """Coefficient of log(Z)^2, which keeps logits from drifting (arXiv 2204.02311); PaLM: 1e-4."""
    chunk: int = 64
    """Places of each row whose logits are held at once."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.z_loss >= 0, "objective.z_loss", self.z_loss, "0 or more")
        check(self.chunk >= 1, "objective.chunk", self.chunk, "at least 1")


@dataclass(frozen=True)
class MultiTokenLossConfig(NextTokenConfig):
    """Prediction of several tokens at once (arXiv 2404.19737)."""

    head_weights: tuple[float, ...] = ()
    """Coefficient of each head's loss; empty: 1 each."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        positive = all(weight >= 0 for weight in self.head_weights)
        check(positive, "objective.head_weights", self.head_weights, "0 or more each")
