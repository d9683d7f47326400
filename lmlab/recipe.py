"""Recipes: everything that decides what a run computes, as one frozen dataclass. Imports no JAX.

A file in `configs/` holds a function `recipe()` that returns a `Pretrain`.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from lmlab.core.errors import UserError, check
from lmlab.data.config import ConversationsConfig, DataConfig
from lmlab.data.pairs_config import PairsConfig
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import ExecutionConfig, GrowthConfig, ModelConfig, TransformerConfig
from lmlab.models.heads_config import Chain, MultiTokenConfig
from lmlab.objectives.config import MultiTokenLossConfig, NextTokenConfig, PairLossConfig
from lmlab.optim.config import LoraConfig, OptimConfig, ScheduleConfig
from lmlab.train.config import ParallelConfig, TrainConfig

RUNS = Path("runs")
"""Where run folders go if nothing else is said."""


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

    model: ModelConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        check(self.data.length <= self.model.max_length, "data.length", self.data.length,
              f"at most model.max_length = {self.model.max_length}",
              "Shorten the rows or raise model.max_length.")  # fmt: skip
        _check_divides(self)


@dataclass(frozen=True)
class Grown(Pretrain):
    """The same of a model that begins as a trained one with parameter tokens added; what the run folder keeps."""

    source: str = field(kw_only=True)
    """The run that grows."""
    growth: GrowthConfig = field(kw_only=True)
    """How."""


@dataclass(frozen=True)
class MultiToken(Pretrain):
    """Pre-training of a model with several heads, each of which predicts one token further ahead.

    Head 1 is a language model like any other; as one the run is opened wherever a model is asked for.
    """

    objective: MultiTokenLossConfig = field(default_factory=MultiTokenLossConfig)
    heads: int = 4
    """n: head i predicts the i-th next token."""
    chain: Chain = "parallel"
    """parallel or causal: the heads are the last n of the model's layers; linear or sequential: each further head is a
    matrix, or a layer, beside them."""
    source: str = ""
    """A trained model to begin with, of as many layers as head 1's has: a run folder, a folder of transformers, a .gguf
    file; empty: none."""

    def __post_init__(self) -> None:
        """Check that the heads fit the model, and their weights the heads."""
        super().__post_init__()
        check(self.heads == 1 or self.data.packing != "whole", "data.packing", self.data.packing,
              "concat or pad with several heads: heads - 1 tokens of a row would be no labels of head 1")  # fmt: skip
        check(len(self.objective.head_weights) in (0, self.several.heads), "objective.head_weights",
              self.objective.head_weights, f"a weight for each of the {self.heads} heads, or none")  # fmt: skip

    @property
    def several(self) -> MultiTokenConfig:
        """The model with its heads."""
        return MultiTokenConfig(self.model, self.heads, self.chain)


@dataclass(frozen=True)
class ChatEvalConfig:
    """What is measured and shown of a chat model while it trains."""

    batches: int = 16
    """Held-out batches of an evaluation during the run; 0: all. The last evaluation always reads all."""
    prompts: tuple[str, ...] = ("What is the capital of France?", "Give three tips for staying healthy.")
    """What a user says first, to be answered when a sample is due."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=96))
    """How answers are drawn."""


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: a model that is there learns to answer as the assistant of conversations does."""

    source: str
    """The model: a run folder, a folder of transformers, a .gguf file, or a llama2.c .bin with its tokenizer."""
    data: ConversationsConfig
    template: str = ""
    """File of the chat template (Jinja) where the source has none, or another is wanted; empty: the source's."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    objective: NextTokenConfig = field(default_factory=NextTokenConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            schedule=ScheduleConfig(peak=2e-5, decay="linear", end=0.0), b2=0.999, weight_decay=0.0
        )
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: ChatEvalConfig = field(default_factory=ChatEvalConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        check(self.execution.stacked, "execution.stacked", self.execution.stacked,
              "True: models are read with their layers stacked")  # fmt: skip
        _check_divides(self)


@dataclass(frozen=True)
class ResolvedSFT(SFT):
    """The same with the model that the source holds, so that a run can be opened without it."""

    model: ModelConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check that rows fit the model."""
        super().__post_init__()
        check(self.data.length <= self.model.max_length, "data.length", self.data.length,
              f"at most the context of the source, {self.model.max_length} tokens", "Shorten the rows.")  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """Learning from pairs of answers of which one was preferred: DPO and its family (arXiv 2305.18290)."""

    source: str
    """The model: a run folder, a folder of transformers, a .gguf file, or a llama2.c .bin with its tokenizer. It is the
    reference, too."""
    data: PairsConfig
    template: str = ""
    """File of the chat template (Jinja) where the source has none, or another is wanted; empty: the source's, or, where
    it has none, prompts are texts that answers follow."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    loss: PairLossConfig = field(default_factory=PairLossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            schedule=ScheduleConfig(peak=1e-6, decay="linear", end=0.0), b2=0.999, weight_decay=0.0
        )
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: ChatEvalConfig = field(default_factory=ChatEvalConfig)

    def __post_init__(self) -> None:
        """Check what concerns two parts at once."""
        check(self.execution.stacked, "execution.stacked", self.execution.stacked,
              "True: models are read with their layers stacked")  # fmt: skip
        _check_divides(self)


@dataclass(frozen=True)
class ResolvedPreference(Preference):
    """The same with the model that the source holds, so that a run can be opened without it."""

    model: ModelConfig = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check that rows fit the model."""
        super().__post_init__()
        check(self.data.length <= self.model.max_length, "data.length", self.data.length,
              f"at most the context of the source, {self.model.max_length} tokens", "Shorten the rows.")  # fmt: skip


def _check_divides(recipe: Pretrain | SFT | Preference) -> None:
    rows, length = recipe.data.batch_size, recipe.data.length
    check(rows % recipe.train.microbatches == 0, "train.microbatches", recipe.train.microbatches,
          f"a divisor of data.batch_size = {rows}")  # fmt: skip
    check(length % recipe.parallel.context == 0, "parallel.context", recipe.parallel.context,
          f"a divisor of data.length = {length}")  # fmt: skip


def load_recipe(name: str) -> tuple[str, Pretrain]:
    """Name and recipe from a Python file, or from the name of a file in ./configs. Raises `UserError`."""
    folder = Path("configs")
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.py"))) or "none here"
        raise UserError("recipe", name, "a Python file, or the name of one in ./configs", f"There: {known}.")
    module = load_file("recipe", path)
    if not callable(getattr(module, "recipe", None)):
        raise UserError("recipe", name, "a file with a function recipe() that returns lmlab.recipe.Pretrain")
    made = module.recipe()
    if not isinstance(made, Pretrain):
        raise UserError("recipe", name, f"recipe() to return lmlab.recipe.Pretrain, not {type(made).__name__}")
    return path.stem, made


def load_file(kind: str, path: Path) -> ModuleType:
    """A user's Python file as a module; what it raises is told as Python does. Raises `UserError` if it is none."""
    check(path.is_file(), kind, str(path), "a Python file that is there")
    spec = importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(kind, str(path), "a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses defined in the file look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
