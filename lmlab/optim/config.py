"""Optimisers and schedules as typed configs. Imports no JAX."""

from dataclasses import dataclass, field, fields
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
class GaloreConfig:
    """The rule run on low-rank projections of the gradients of hidden matrices (arXiv 2403.03507)."""

    rank: float = 0
    """Of the subspaces, at most the shorter side of a matrix; below 1 a share of it. 0: nothing is projected."""
    update: Literal["galore", "fira", "apollo", "apollo_mini", "frugal"] = "galore"
    """What is made of the step in the subspace: only that (galore); with the rest of the gradient, scaled alike (fira,
    arXiv 2410.01623) or its signs (frugal, arXiv 2411.07837); the gradient itself, scaled by channels (apollo) or as a
    whole (apollo_mini, arXiv 2412.05270). Both APOLLOs go with refresh gaussian, projectors drawn."""
    scale: float = 0.25
    """Of the step in the subspace against the learning rate; 1 and 128 for the APOLLOs."""
    refresh: Literal["subspace", "randomised", "svd", "gram", "gaussian", "orthonormal"] = "subspace"
    """How subspaces are found: iterations from the old one; a random range finder; exactly, two ways; at random, as
    Gaussian numbers or an orthonormal basis (GoLore, arXiv 2410.11289)."""
    refresh_every: int = 200
    """Updates between two refreshes."""
    timing: Literal["together", "stagger", "lazy"] = "together"
    """All subspaces at once; one by one over the period; each less often while it stands still (arXiv 2407.08296)."""
    side: Literal["std", "reverse_std", "left", "right", "two_sided"] = "std"
    """Side of a matrix that is projected: std the shorter one, reverse_std the longer one, which holds less state."""
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """adamw: what becomes of the moments at a refresh; rotate is LDAdam's (arXiv 2410.16103)."""
    moment_bits: Literal[32, 8] = 32
    """adamw: how the moments are stored."""
    projectors: Literal["float32", "bfloat16", "int4", "drawn"] = "float32"
    """How projectors are stored; drawn: not at all, for random ones."""
    orthonormalise: Literal["householder", "cholesky", "newton_schulz"] = "householder"
    """How refresh subspace and randomised make bases orthonormal; the last two are products of matrices, for TPUs."""
    include: tuple[str, ...] = ()
    """Only hidden matrices whose path contains one of these patterns (regular expressions); empty: all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        whole = 0 <= self.rank < 1 or (self.rank >= 1 and self.rank == int(self.rank))
        check(whole, "optim.galore.rank", self.rank, "0, a share below 1, or a whole number")
        changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
        check(self.rank > 0 or not changed, "optim.galore.rank", self.rank,
              f"a rank, since {', '.join(changed)} is set")  # fmt: skip
        check(self.scale > 0, "optim.galore.scale", self.scale, "a positive number")
        check(self.refresh_every >= 1, "optim.galore.refresh_every", self.refresh_every, "1 or more")
        check(self.side != "two_sided" or self.update in ("galore", "frugal"), "optim.galore.side", self.side,
              f"one side with update {self.update}")  # fmt: skip
        slanted = self.moments == "rotate" or self.update in ("fira", "frugal")
        check(self.refresh != "gaussian" or not slanted, "optim.galore.refresh", self.refresh,
              "orthonormal, or from the gradient, with moments rotate and updates fira and frugal")  # fmt: skip
        drawable = self.refresh in ("gaussian", "orthonormal") and self.timing == "together" and self.moments == "keep"
        check(self.projectors != "drawn" or drawable, "optim.galore.projectors", self.projectors,
              "refresh gaussian or orthonormal, timing together and moments keep beside it")  # fmt: skip


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
    galore: GaloreConfig = field(default_factory=GaloreConfig)

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(0 <= self.b1 < 1, "optim.b1", self.b1, "a number in [0, 1)")
        check(0 <= self.b2 < 1, "optim.b2", self.b2, "a number in [0, 1)")
        check(self.eps > 0, "optim.eps", self.eps, "a positive number")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        check(self.clip >= 0, "optim.clip", self.clip, "0 or more")
        projected, galore = self.galore.rank > 0, self.galore
        check(not projected or self.rule != "muon", "optim.galore.rank", galore.rank, "0 with rule muon",
              "Muon needs the full matrices.")  # fmt: skip
        adam = galore.moments == "keep" and galore.moment_bits == 32
        check(not projected or self.rule == "adamw" or adam, "optim.galore.moments", galore.moments,
              f"keep, and moment_bits 32, with rule {self.rule}")  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of the matrices themselves (arXiv 2106.09685)."""

    rank: int = 0
    """r; 0: no adapters, all parameters are trained."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r."""
    include: tuple[str, ...] = ()
    """Patterns of the paths of matrices that get one; empty: all hidden ones."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.rank >= 0, "lora.rank", self.rank, "0 (no adapters) or more")
        check(self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
