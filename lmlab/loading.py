"""A model at a path, whatever has written it: a run of lmlab, transformers, llama.cpp or llama2.c."""

from pathlib import Path

from lmlab.interop.convert import convert
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.pretrained import Pretrained, load_pretrained
from lmlab.interop.tokenizer_files import read_tokenizer_files
from lmlab.runs import load_run
from lmlab.train.folder import is_run


def load_model(path: Path, dtype: str = "float32") -> Pretrained:
    """The model at a path: a run folder (its newest parameters, in the type they are trained in), or what
    `load_pretrained` reads (in `dtype`). Raises `UserError` as these do.
    """
    if not is_run(path):
        return load_pretrained(path, dtype=dtype)
    run = load_run(path)
    return Pretrained(run.lm.config, run.lm, run.params, read_tokenizer_files(path))


def export(source: Path, target: Path, dtype: str = "float32") -> None:
    """Write the model at a path as a folder of transformers. Raises `UserError`; nothing is left half-written."""
    if not is_run(source):
        convert(source, target, dtype)
        return
    model = load_model(source)
    save_pretrained(target, model.config, model.params, model.text, dtype=dtype)
