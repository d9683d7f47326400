"""A model of the world as an LM of lmlab: its config, parameters and text, whatever it is stored as."""

from dataclasses import dataclass, replace
from pathlib import Path

from lmlab.core.errors import UserError, check
from lmlab.core.types import Params
from lmlab.data.chat import ChatTemplate
from lmlab.data.tokenizers import TextTokenizer
from lmlab.interop.families import read_config
from lmlab.interop.huggingface import CONFIG, open_folder
from lmlab.interop.source import Source
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lmlab.interop.weights import Place, load_params
from lmlab.models.config import ExecutionConfig, ModelConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer


@dataclass(frozen=True)
class Pretrained:
    """A model to use, train or search with."""

    config: ModelConfig
    lm: LM
    params: Params
    text: TokenizerFiles | None
    """Its tokenizer, chat template and sampling; None if the files have no tokenizer."""


def load_pretrained(
    path: Path, *, dtype: str = "float32", execution: ExecutionConfig | None = None, place: Place | None = None
) -> Pretrained:  # fmt: skip
    """The model at a path.

    Args:
        path: a folder of transformers (config.json), a .gguf file or a folder with exactly one, or a llama2.c .bin.
        dtype: of the parameters in memory, "float32" or "bfloat16", whatever type is on disk.
        execution: how the model is computed; None: the defaults, with activations in `dtype` too.
        place: `place(lm, shapes) -> shardings` says where the parameters lie; None: on the first device.

    Raises:
        UserError: nothing is there, or what is there is damaged or not supported.
    """
    check(dtype in ("float32", "bfloat16"), "dtype", dtype, "float32 or bfloat16")
    source, text = open_pretrained(path)
    if execution is None:
        execution = ExecutionConfig(compute_dtype=dtype)  # type: ignore[arg-type]
    config = replace(read_config(source.config), execution=execution)
    check_vocabulary(source, config, text)
    return Pretrained(config, transformer(config), load_params(source, config, dtype=dtype, place=place), text)


def tokenizer_of(model: Pretrained) -> TextTokenizer:
    """The tokenizer of a model. Raises `UserError` if its files have none."""
    if model.text is None:
        raise UserError("model", "no tokenizer", "a model with a tokenizer beside its weights",
                        "Put its tokenizer.json into the folder.")  # fmt: skip
    return model.text.tokenizer


def chat_of(model: Pretrained) -> ChatTemplate:
    """The chat template of a model. Raises `UserError` if its files have none."""
    if model.text is None or model.text.chat is None:
        raise UserError("model", "no chat template", "a model that was tuned for chats",
                        "Put a chat_template.jinja into its folder, or continue texts without --chat.")  # fmt: skip
    return model.text.chat


def check_vocabulary(source: Source, config: TransformerConfig, text: TokenizerFiles | None) -> None:
    """Raise `UserError` if the tokenizer has tokens that the model has no embedding of."""
    size = 0 if text is None else text.tokenizer.vocab_size
    check(size <= config.vocab_size, f"{source.origin}: tokenizer", size,
          f"at most as many tokens as the model has, {config.vocab_size}",
          "Tokens were added to the tokenizer and not to the model.")  # fmt: skip


def open_pretrained(path: Path) -> tuple[Source, TokenizerFiles | None]:
    """The weights and the text of a model, by what lies at the path; no weights are read yet.

    Raises:
        UserError: see `load_pretrained`.
    """
    path = path.expanduser()
    if path.is_dir():
        if (path / CONFIG).is_file():
            return open_folder(path), _folder_text(path)
        found = sorted(path.glob("*.gguf"))
        check(len(found) < 2, "model", str(path), "one model; the folder has several .gguf files", "Name one of them.")
        if found:
            return open_pretrained(found[0])
    elif path.suffix == ".gguf" and path.is_file():
        from lmlab.interop.gguf import gguf_tokenizer, open_gguf

        return open_gguf(path), gguf_tokenizer(path)
    elif path.suffix == ".bin" and path.is_file():
        from lmlab.interop.llama2c import llama2c_tokenizer, open_llama2c

        return open_llama2c(path), llama2c_tokenizer(path)
    raise UserError("model", str(path), "a folder with config.json, a .gguf file, or a .bin of llama2.c",
                    "Check the path; models of the hub must be downloaded first: hf download NAME --local-dir FOLDER.",
                    )  # fmt: skip


def _folder_text(folder: Path) -> TokenizerFiles | None:
    # Any of them: a tokenizer that cannot be read is told of, not dropped.
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    return read_tokenizer_files(folder) if any((folder / name).is_file() for name in names) else None
