"""Settings of objectives. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

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


PairLossName: TypeAlias = Literal[
    "sigmoid", "robust", "ipo", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "simpo", "cpo", "orpo",
]  # fmt: skip


@dataclass(frozen=True)
class PairLossConfig:
    """DPO and its family: what is asked of the log-probabilities of a pair's answers."""

    loss: PairLossName = "sigmoid"
    """sigmoid is DPO (arXiv 2305.18290); the others are told in lmlab/objectives/pair_losses.py (those by optimal
    transport couple all pairs of a batch and want rows of as many pairs each: they are for code)."""
    beta: float = 0.1
    """Strength of the tie to the reference; of orpo the weight of the odds ratio, of simpo the scale (2 to 2.5)."""
    smoothing: float = 0.0
    """Share of labels that are taken to be wrong: of sigmoid, robust, exo_pair (more than 0)."""
    per_token: bool = False
    """Means over tokens in place of sums: length-normalised losses; IPO is used so."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"
    """What keeps the policy near the reference (arXiv 2309.16240)."""
    gamma: float = 1.0
    """Margin of simpo."""
    reference: Literal["stored", "beside", "uniform"] = "stored"
    """stored: log-probabilities of all pairs under the source are computed once, before the first step; beside: in
    every step, by a copy of the source (with adapters by the source itself); uniform: all answers are as probable."""
    sft: float = 0.0
    """Coefficient of the preferred answers' negative log-likelihood (RPO); the papers of CPO and ORPO have 1."""
    tail: float = 1.0
    """Weight of tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411)."""
    chunk: int = 64
    """Places of each row whose logits are held at once."""

    def __post_init__(self) -> None:
        """Check the ranges, and what goes together."""
        check(self.beta > 0, "loss.beta", self.beta, "a positive number")
        check(0 <= self.smoothing < 0.5, "loss.smoothing", self.smoothing, "from 0 to less than 0.5")
        smoothed = ("sigmoid", "robust", "exo_pair")
        check(not self.smoothing or self.loss in smoothed, "loss.smoothing", self.smoothing,
              f"0 with loss = {self.loss!r}", f"It is an option of {', '.join(smoothed)}.")  # fmt: skip
        check(self.loss not in ("exo_pair", "robust") or self.smoothing > 0, "loss.smoothing", self.smoothing,
              f"more than 0 with loss = {self.loss!r}", "EXO's paper has 0.001.")  # fmt: skip
        check(self.gamma == 1 or self.loss == "simpo", "loss.gamma", self.gamma, "1 unless loss is simpo")
        means = ("simpo", "orpo")
        check(not self.per_token or self.loss not in means, "loss.per_token", self.per_token,
              f"False with loss = {self.loss!r}, which is of means already")  # fmt: skip
        check(self.sft >= 0, "loss.sft", self.sft, "0 or more")
        check(0 <= self.tail <= 1, "loss.tail", self.tail, "from 0 to 1")
        check(self.chunk >= 1, "loss.chunk", self.chunk, "at least 1")
        free = ("simpo", "cpo", "orpo")
        check(self.loss not in free or self.reference == "uniform", "loss.reference", self.reference,
              f"uniform with loss = {self.loss!r}, which has no reference")  # fmt: skip
        check(self.divergence == "reverse_kl" or self.loss not in free, "loss.divergence", self.divergence,
              f"reverse_kl with loss = {self.loss!r}", "It has no reference to keep near to.")  # fmt: skip
