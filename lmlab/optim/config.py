"""Optimisers and schedules as typed configs. Imports no JAX."""

from dataclasses import dataclass, field
from typing import Literal

from lmlab.core.errors import check


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up to the peak, then a decay."""

    peak: float = 1e-3
    """Highest learning rate."""
    warmup: float = 0.05
    """Length of the warm-up: a share of the run if below 1, else steps."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine; a line; constant and then a line over the last part (arXiv 2404.06395);
    or constant to the end."""
    end: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    cooldown: float = 0.2
    """wsd: length of the last part: a share of the run if below 1, else steps."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.peak > 0, "optim.schedule.peak", self.peak, "a positive learning rate")
        check(self.warmup >= 0, "optim.schedule.warmup", self.warmup, "0 or more")
        check(self.cooldown >= 0, "optim.schedule.cooldown", self.cooldown, "0 or more")
        check(0 <= self.end <= 1, "optim.schedule.end", self.end, "a share between 0 and 1")


@dataclass(frozen=True)
class OptimConfig:
    """An optax chain: clip by global norm, the rule, decoupled weight decay, the schedule."""

    rule: Literal["adamw", "lion", "adafactor", "muon", "sgd"] = "adamw"
    """Muon steps the hidden matrices and leaves the rest to AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    b1: float = 0.9
    """Decay of the first moment (momentum of sgd)."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    no_decay: tuple[str, ...] = ("norm", "bias", "scale")
    """Parameters whose path contains one of these patterns (regular expressions) are not decayed."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    parameters: Literal["float32", "bfloat16_master", "bfloat16_stochastic"] = "float32"
    """How parameters are held: float32; bfloat16 with a float32 copy beside the moments (6 bytes each, arXiv
    1710.03740); bfloat16 alone, rounded at random (2 bytes, arXiv 2010.06192). Moments are float32."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(0 <= self.b1 < 1, "optim.b1", self.b1, "a number in [0, 1)")
        check(0 <= self.b2 < 1, "optim.b2", self.b2, "a number in [0, 1)")
        check(self.eps > 0, "optim.eps", self.eps, "a positive number")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        check(self.clip >= 0, "optim.clip", self.clip, "0 or more")
