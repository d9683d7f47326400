"""What `lmlab eval` measures: a run on its own held-out data, a model at any path on texts and tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lmlab.core.errors import UserError, check
from lmlab.core.rng import key_for
from lmlab.data.chat import render
from lmlab.evals.harness import Served, harness_model
from lmlab.evals.perplexity import make_held_out, text_values
from lmlab.interop.pretrained import Pretrained, tokenizer_of
from lmlab.loading import load_model
from lmlab.multi_token import heads_pieces
from lmlab.preference import tuning_pieces
from lmlab.pretrain import pretrain_pieces
from lmlab.recipe import MultiToken, Pretrain
from lmlab.runs import LoadedHeads, LoadedRun, load_heads, load_run, load_whole
from lmlab.train.folder import read_config
from lmlab.train.parallel import Share
from lmlab.training import compare


def evaluate_run(folder: Path) -> dict[str, float]:
    """Held-out values of a run's newest parameters on all of its held-out data, and bits per byte of baselines."""
    config, share = read_config(folder), Share(0, 1)
    if isinstance(config, MultiToken):
        run: LoadedRun | LoadedHeads = load_heads(folder)
        pieces = heads_pieces(config, share)
    elif isinstance(config, Pretrain):
        run = load_run(folder)
        pieces = pretrain_pieces(config, share)
    else:
        run = load_whole(folder)
        pieces = tuning_pieces(folder, config, run.text, share)
    key = key_for(jax.random.key(config.train.seed), "held-out")
    values = make_held_out(pieces.objective, pieces.data.heldout, key)(run.params)
    scores = compare(pieces, lambda: values, folder)
    return values | {f"bits_per_byte/{name}": value for name, value in scores.items() if name != "model"}


def evaluate_texts(path: Path, texts: Sequence[str], dtype: str) -> dict[str, float]:
    """Perplexity and bits per byte of text files, each as one text. Raises `UserError` for a file that is none."""
    read = {name: _read(Path(name)) for name in texts}
    model = load_model(path, dtype)
    codec = tokenizer_of(model)
    values = {name: text_values(model.lm, model.params, codec, [text]) for name, text in read.items()}
    return {f"{name} {what}": value for name, found in values.items() for what, value in found.items()}


def evaluate_tasks(path: Path, tasks: Sequence[str], limit: int, dtype: str) -> dict[str, float]:
    """What lm-evaluation-harness finds of its tasks, by name or as .yaml files. Raises `UserError`."""
    check(limit >= 0, "--limit", limit, "0 or more")
    configs = [_task(name) for name in tasks]
    adapter = harness_model(served(load_model(path, dtype)))
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(model=adapter, tasks=configs, limit=limit or None, verbosity="ERROR")
    except (KeyError, ValueError, OSError) as error:
        raise UserError("--tasks", list(tasks), f"tasks that lm_eval can run here ({error})",
                        "lm_eval ls tasks lists its own; those need their data sets.") from error  # fmt: skip
    # Its keys are "metric,filter".
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float)
    }


def served(model: Pretrained) -> Served:
    """A model as the harness asks it, with its chat template where it has one."""
    tokenizer = tokenizer_of(model)
    chat = model.text.chat if model.text else None
    if chat is None:
        return Served(model.lm, model.params, tokenizer)
    write = lambda messages, prompt: render(chat, messages, add_generation_prompt=prompt)
    return Served(model.lm, model.params, tokenizer, render=write, template=chat.source)


def _task(name: str) -> Any:
    if not name.endswith((".yaml", ".yml")):
        return name
    import yaml

    try:
        return yaml.safe_load(_read(Path(name)))
    except yaml.YAMLError as error:
        raise UserError("--tasks", name, f"a task of lm_eval in YAML ({' '.join(str(error).split())})") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("file", str(path), f"a file of UTF-8 text ({error})") from error
