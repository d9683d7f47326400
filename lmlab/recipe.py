"""A recipe: everything that decides what a pre-training run computes, as one frozen dataclass. Imports no JAX.

A file in `configs/` holds a function `recipe()` that returns one.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lmlab.core.errors import UserError, check
from lmlab.data.config import DataConfig
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig
from lmlab.train.config import ParallelConfig, TrainConfig


@dataclass(frozen=True)
class EvalConfig:
    """What is measured and shown of a model while it trains."""

    batches: int = 16
    """Held-out batches of an evaluation during the run; 0: all. The last evaluation always reads all."""
    prompts: tuple[str, ...] = ("", "import os\n", "class ")
    """Beginnings of documents that are continued when a sample is due."""
    baselines: bool = True
    """Measure byte n-grams and xz on the same held-out text at the end."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95))
    """How samples are drawn."""


@dataclass(frozen=True)
class Pretrain:
    """Next-token pre-training of a language model."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        check(self.data.batch_size % self.train.microbatches == 0, "train.microbatches", self.train.microbatches,
              f"a divisor of data.batch_size = {self.data.batch_size}")  # fmt: skip
        check(self.data.length <= self.model.max_length, "data.length", self.data.length,
              f"at most model.max_length = {self.model.max_length}",
              "Shorten the rows or raise model.max_length.")  # fmt: skip
        check(self.data.length % self.parallel.context == 0, "parallel.context", self.parallel.context,
              f"a divisor of data.length = {self.data.length}")  # fmt: skip


def load_recipe(name: str) -> tuple[str, Pretrain]:
    """Name and recipe from a Python file, or from the name of a file in ./configs. Raises `UserError`."""
    folder = Path("configs")
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.py"))) or "none here"
        raise UserError("recipe", name, "a Python file, or the name of one in ./configs", f"There: {known}.")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError("recipe", name, "a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, "recipe", None)):
        raise UserError("recipe", name, "a file with a function recipe() that returns lmlab.recipe.Pretrain")
    made = module.recipe()
    if not isinstance(made, Pretrain):
        raise UserError("recipe", name, f"recipe() to return lmlab.recipe.Pretrain, not {type(made).__name__}")
    return path.stem, made
