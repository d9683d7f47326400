"""What `lmlab eval` measures of a model at a path, besides a run's own held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmlab.core.errors import UserError, check
from lmlab.data.chat import render
from lmlab.evals.harness import Served, harness_model
from lmlab.evals.perplexity import text_values
from lmlab.interop.pretrained import Pretrained, tokenizer_of
from lmlab.loading import load_model


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
