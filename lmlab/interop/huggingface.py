"""Folders of transformers: opened as a `Source`, and written from any model that a family can express."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import Array, Params
from lmlab.interop.families import family_of, write_config
from lmlab.interop.source import Source
from lmlab.interop.tensor_files import DTYPES, check_stored, open_tensor_files, read_json, write_tensor_files
from lmlab.interop.tensors import BUFFERS, Part, base_prefix, head_name, write_tensor
from lmlab.interop.tokenizer_files import TokenizerFiles, write_tokenizer_files
from lmlab.interop.weights import flat_leaves, model_parts
from lmlab.models.config import TransformerConfig

CONFIG = "config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_BYTES = 5 * 10**9
"""Of a file of weights, as transformers has it."""


def open_folder(folder: Path) -> Source:
    """A folder that transformers' `save_pretrained` or the hub wrote. Reads headers only.

    Raises:
        UserError: the family is not supported, files are missing or damaged, weights are quantised.
    """
    check((folder / CONFIG).is_file(), "folder", str(folder), f"a folder of transformers, with its {CONFIG}")
    config = read_json(folder / CONFIG)
    check(isinstance(config, dict), "file", str(folder / CONFIG), "a JSON object")
    family_of(config)
    files = open_tensor_files(folder)
    stored = _full_names([name for name in files.shapes if not BUFFERS.search(name)], config["model_type"])
    for name in stored.values():
        check_stored(folder, name, files.dtypes[name])
    return Source(
        str(folder), config, {name: files.shapes[stored[name]] for name in stored},
        lambda name, ranges: files.read(stored[name], ranges),
    )  # fmt: skip


def _full_names(names: list[str], model_type: str) -> dict[str, str]:
    """Names in a file by names in a model with its head: files of the bare model lack the prefix."""
    prefix, head = base_prefix(model_type), head_name(model_type)
    heads = ("lm_head.weight", "embed_out.weight")
    bare = not any(name.startswith(prefix) for name in names)
    return {head if name in heads else f"{prefix}{name}" if bare else name: name for name in names}


def save_pretrained(
    folder: Path, config: TransformerConfig, params: Params, text: TokenizerFiles | None = None, *,
    dtype: str = "float32", shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a model as a folder of transformers. It appears whole or not at all; one tensor is in memory at a time.

    Args:
        folder: must not exist, or be empty.
        config: of the model. Rotary pairs that are adjacent are written as halves, which is the same model.
        params: all of them on devices of this process.
        text: its tokenizer, chat template and sampling; None: no such files.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        shard_bytes: most bytes of a file.

    Raises:
        UserError: no family of transformers can express the model, or the folder cannot be written.
    """
    fields = write_config(config)
    leaves = flat_leaves(params)
    by_tensor = _by_tensor(model_parts(config, fields["model_type"]))
    order = _half_order(config)

    def fetch(part: Part) -> np.ndarray:
        block = _fetch_block(leaves[part.leaf], part)
        return block if order is None or not _is_rotated(part) else block[..., order]

    def make(name: str) -> np.ndarray:
        return write_tensor(by_tensor[name], fetch, leaves[by_tensor[name][0].leaf].dtype)

    tensors = {name: parts[0].shape for name, parts in by_tensor.items()}
    write_folder(folder, fields, tensors, make, text, dtype=dtype, shard_bytes=shard_bytes)


def write_folder(
    folder: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], np.ndarray],
    text: TokenizerFiles | None, *, dtype: str, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """`fields` as config.json, tensors by `make(name)` when each is written, and the files of the tokenizer.

    Raises:
        UserError: the folder is not empty or cannot be written, or a value does not fit the type.
    """
    check(dtype in DTYPES, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    check(shard_bytes >= 1, "shard_bytes", shard_bytes, "a positive number of bytes")
    # Said even where there are none: the defaults of some families lie outside of a small vocabulary.
    config = dict.fromkeys(TOKENS) | dict(fields) | {"torch_dtype": dtype}
    if text is not None and text.tokenizer.begin_ids:
        config["bos_token_id"] = text.tokenizer.begin_ids[0]
    if text is not None:
        ends = text.tokenizer.end_ids
        config["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    with whole_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        write_tensor_files(partial, shapes, make, dtype, shard_bytes)
        if text is not None:
            write_tokenizer_files(partial, text)


def check_empty(folder: Path) -> None:
    """Raise `UserError` unless a model can be written there: `folder` does not exist, or is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("folder", str(folder), "a folder that is empty, or does not exist yet", "Choose another.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name when all is written, and else is removed.

    Raises:
        UserError: `folder` exists and is not an empty folder, or the disk does not take what is written.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        check_empty(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise UserError("folder", str(folder), f"a folder that can be written to ({error.strerror or error})",
                        "Make room, or choose another.") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _by_tensor(parts: list[Part]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.tensor, []).append(part)
    return found


def _half_order(config: TransformerConfig) -> np.ndarray | None:
    """Places of a head, in order of a rotation by halves, where the model rotates adjacent ones; else None."""
    if config.positions != "rotary" or config.rotary.pairs == "half":
        return None
    rotated = int(config.head_dim * config.rotary.fraction)
    return np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, config.head_dim)])


def _is_rotated(part: Part) -> bool:
    """Whether the last axis of a block is that of rotated heads: queries, keys and their norms."""
    if part.leaf.startswith("layers.attention.key_value."):
        return next(place for place in reversed(part.block) if place is not None) == 0
    return part.leaf.startswith(("layers.attention.query", "layers.attention.key_norm"))


def _fetch_block(leaf: Array | np.ndarray, part: Part) -> np.ndarray:
    """The block of a parameter that a part is, on the host."""
    index = tuple(slice(None) if place is None else place for place in part.block)
    if not part.leaf.startswith("layers."):
        return np.asarray(leaf)[index]
    return np.asarray(_take_layer(leaf, index[0]))[index[1:]]


@jax.jit
def _take_layer(leaf: Array, layer: Array) -> Array:
    # The layer is no constant of the program: one compilation serves all.
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
