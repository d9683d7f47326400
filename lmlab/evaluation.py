"""What `lmlab eval` measures of a model at a path."""

from collections.abc import Sequence
from pathlib import Path

from lmlab.core.errors import UserError
from lmlab.evals.perplexity import text_values
from lmlab.interop.pretrained import tokenizer_of
from lmlab.loading import load_model


def evaluate_texts(path: Path, texts: Sequence[str], dtype: str) -> dict[str, float]:
    """Perplexity and bits per byte of text files, each as one text. Raises `UserError` for a file that is none."""
    if not texts:
        return {}
    read = {name: _read(Path(name)) for name in texts}
    model = load_model(path, dtype)
    codec = tokenizer_of(model)
    values = {name: text_values(model.lm, model.params, codec, [text]) for name, text in read.items()}
    return {f"{name} {what}": value for name, found in values.items() for what, value in found.items()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--texts", str(path), f"a file of UTF-8 text ({error})") from error
