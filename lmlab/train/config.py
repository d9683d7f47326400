"""Length, rhythm and seed of a run. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal

from lmlab.core.errors import check


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh of devices. It changes speed and memory and, beyond rounding, no number; a run may go on on another."""

    data: int = 0
    """Replicas, each with its part of the batch; 0: as many as there are devices for."""
    fsdp: int = 1
    """Replicas that each store a part of every matrix (arXiv 1910.02054, stage 3)."""
    context: int = 1
    """Parts of every row (long sequences)."""
    tensor: int = 1
    """Parts of every layer: heads, feed-forward width, vocabulary (arXiv 1909.08053)."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: moments (and master weights) wait in the memory of the host between updates (arXiv 2101.06840)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.data >= 0, "parallel.data", self.data, "0 or more")
        for name in ("fsdp", "context", "tensor"):
            check(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class HostsConfig:
    """A job of several processes that run the same command. No part of what is computed, so no part of a recipe."""

    address: str = ""
    """Empty: one process. auto: Cloud TPU, GKE, SLURM or Open MPI know the job. Else HOST:PORT of the first process."""
    count: int = 0
    """Processes in all, where an address is given."""
    index: int = 0
    """Number of this process, from 0, where an address is given."""
    patience: int = 300
    """Seconds to wait for the other processes."""


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and what to do when."""

    steps: int = 1000
    """Updates in all."""
    microbatches: int = 1
    """Parts of a batch whose gradients are summed one after the other, to save memory."""
    seed: int = 0
    """Seed of the parameters and of all randomness but the order of the data."""
    log_every: int = 10
    """Steps between rows of metrics."""
    eval_every: int = 200
    """Steps between evaluations on held-out data; one more at the end."""
    sample_every: int = 200
    """Steps between samples; 0: none."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one more at the end, and one when interrupted."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss that are kept besides."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("steps", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep_last"):
            check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("sample_every", "keep_best"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
