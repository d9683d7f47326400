"""A model at a path, whatever has written it: a run of lmlab, transformers, llama.cpp or llama2.c."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmlab.core.errors import UserError, check
from lmlab.core.types import Params
from lmlab.data.tokenizers import TextTokenizer
from lmlab.interop.convert import convert
from lmlab.interop.families import read_config as read_family
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.pretrained import Pretrained, check_vocabulary, load_pretrained, open_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lmlab.interop.weights import check_tensors, load_params, model_parts
from lmlab.models.config import ExecutionConfig, ModelConfig, TransformerConfig
from lmlab.optim.precision import cast_parameters
from lmlab.runs import alone, load_run
from lmlab.train.folder import is_run, read_config


def load_model(path: Path, dtype: str = "float32") -> Pretrained:
    """The model at a path: a run folder (its newest parameters, in the type they are trained in), or what
    `load_pretrained` reads (in `dtype`). Raises `UserError` as these do.
    """
    if not is_run(path):
        return load_pretrained(path, dtype=dtype)
    run = load_run(path)
    return Pretrained(run.lm.config, run.lm, run.params, run.text)


@dataclass(frozen=True)
class Opened:
    """A model to train on; none of its weights are read yet."""

    config: ModelConfig
    text: TokenizerFiles | None
    load: Callable[[Any], Params]
    """`load(shardings) -> params`: the parameters, laid out like that, each part read by the process that holds it."""


def open_model(path: Path, execution: ExecutionConfig, parameters: str) -> Opened:
    """The model at a path, to be trained as `OptimConfig.parameters` says. Layers must be stacked, there and here.

    Raises:
        UserError: as `load_model`, but for what only the reading of the weights brings to light.
    """
    if is_run(path):
        model = alone(read_config(path)).model
        check(model.execution.stacked, "source", str(path), "a run whose layers are stacked (model.execution.stacked)")

        def load(shardings: Any) -> Params:
            return cast_parameters(load_run(path, lambda lm, shapes: shardings).params, parameters)

        return Opened(replace(model, execution=execution), read_tokenizer_files(path), load)
    source, text = open_pretrained(path)
    config = replace(read_family(source.config), execution=execution)
    check_vocabulary(source, config, text)
    check_tensors(source, model_parts(config, source.config["model_type"]), config.tied)
    dtype = "float32" if parameters == "float32" else "bfloat16"
    return Opened(
        config, text, lambda shardings: load_params(source, config, dtype=dtype, place=lambda lm, shapes: shardings)
    )


def check_same_tokens(source: Path, text: TokenizerFiles | None, tokenizer: TextTokenizer) -> None:
    """Raise `UserError` unless data are cut into the tokens that the model at `source` has learnt, as `text` says."""
    same = text is not None and text.tokenizer.fingerprint == tokenizer.fingerprint
    check(same, "data.tokenizer", "another tokenizer", f"that of {source}, whose tokens the model has learnt",
          f"Train on the same data, or name its file: TokenizerFile({str(source / 'tokenizer.json')!r}).")  # fmt: skip


def export(source: Path, target: Path, dtype: str = "float32") -> None:
    """Write the model at a path as a folder of transformers. Raises `UserError`; nothing is left half-written."""
    if not is_run(source):
        convert(source, target, dtype)
        return
    model = load_model(source)
    if not isinstance(model.config, TransformerConfig):
        raise UserError("model", str(source), "a transformer",
                        "No family of transformers has this model: it can not be exported.")  # fmt: skip
    save_pretrained(target, model.config, model.params, model.text, dtype=dtype)
