"""Models in GGUF, the format of llama.cpp: weights by parts, dequantised as they are read, and the tokenizer.

The names and conventions are those of `convert_hf_to_gguf.py` of ggml-org/llama.cpp, taken back to transformers'.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken

from lmlab.core.errors import UserError, check
from lmlab.data.chat import ChatTemplate
from lmlab.data.tokenizers import wrap_tokenizer
from lmlab.interop.gguf_config import config_of
from lmlab.interop.rotary_rows import adjacent_rows
from lmlab.interop.source import Source
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.interop.vocabularies import byte_fallback, byte_level

_LLAMA = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GPT2 = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_CONTROL, _USER, _NORMAL, _UNKNOWN = 3, 4, 1, 2
"""Types of tokens (`tokenizer.ggml.token_type`)."""
_IGNORED = {"rope_freqs.weight"}  # What it says is in the configuration.


def open_gguf(path: Path) -> Source:
    """The model of a GGUF file of architecture llama, qwen2, qwen3 or gpt2; nothing is read before it is asked for.

    Quantised tensors are given as float32, the others in their type.

    Raises:
        UserError: not a GGUF file, a part of one, or a model with something that lmlab does not have.
    """
    reader, fields = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name not in _IGNORED}
    frequencies = next((tensor.data for tensor in reader.tensors if tensor.name in _IGNORED), None)
    config = config_of(fields, tensors, frequencies, str(path))
    names = {_name(name, config["model_type"], path): name for name in tensors}
    readers = {name: _reader(tensors[given], name, config) for name, given in names.items()}
    shapes = {name: _shape(tensors[given], name, config) for name, given in names.items()}

    def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        sizes = shapes[name]
        whole = (*slices, *(slice(None) for _ in sizes[len(slices) :]))
        return readers[name](tuple(slice(*part.indices(size)) for part, size in zip(whole, sizes, strict=True)))

    return Source(str(path), config, shapes, read)


def gguf_tokenizer(path: Path) -> TokenizerFiles | None:
    """The tokenizer and chat template in a GGUF file; None if it has none.

    Raises:
        UserError: as `open_gguf`; a vocabulary of a kind that lmlab does not read.
    """
    _, fields = _open(path)
    about = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    tokens, kinds = about.get("tokens"), about.get("token_type")
    if not tokens:
        return None
    kinds = kinds or [_NORMAL] * len(tokens)
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER)
    ]
    kind = about.get("model")
    check(kind in ("gpt2", "llama"), "tokenizer.ggml.model", kind, "gpt2 or llama")
    if kind == "gpt2":
        model = byte_level(tokens, about["merges"], about.get("pre", "default"), added)
    else:
        unknown = tokens[about.get("unknown_token_id", 0)]
        plain = [token_kind == _NORMAL for token_kind in kinds]
        first = about.get("add_space_prefix", True)
        model = byte_fallback(tokens, about["scores"], plain, added, unknown, space_first=first)
    ends = [about[name] for name in ("eos_token_id", "eot_token_id", "eom_token_id") if name in about]
    check(bool(ends), "tokenizer.ggml.eos_token_id", None, "the token that ends a text in the file")
    begins = about.get("add_bos_token", kind == "llama" or about.get("pre") == "llama-bpe")
    begin = (about["bos_token_id"],) if begins and "bos_token_id" in about else ()
    tokenizer = wrap_tokenizer(model, tokens[ends[0]], begin, tuple(dict.fromkeys(ends)))
    return TokenizerFiles(tokenizer, _chat(about, tokens), None)


def _chat(about: Mapping[str, Any], tokens: list[str]) -> ChatTemplate | None:
    source = about.get("tokenizer.chat_template")
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{short}_token": about.get(f"{long}_token_id") for long, short in names.items()}
    specials = {name: tokens[i] for name, i in ids.items() if i is not None}
    return ChatTemplate(source, specials) if source else None


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The reader of the library, and the metadata by name."""
    from gguf import GGUFReader

    check(path.is_file(), "model", str(path), "an existing GGUF file")
    with path.open("rb") as handle:
        check(handle.read(4) == b"GGUF", "model", str(path), "a GGUF file (it begins otherwise)")
    try:
        reader = GGUFReader(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, OSError, OverflowError) as error:
        # The library says of a file that ends early whatever its arrays say.
        raise UserError("model", str(path), f"a whole GGUF file ({error})", "Download it again.") from error


def _name(name: str, model_type: str, path: Path) -> str:
    """The name of a tensor in transformers."""
    table = _GPT2 if model_type == "gpt2" else _LLAMA
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not found or found[2] not in table:
        raise UserError("model", str(path), f"tensors of {model_type}; {name} is none")
    layers = "transformer.h" if model_type == "gpt2" else "model.layers"
    inside = f"{layers}.{found[1]}." if found[1] else ""
    return f"{inside}{table[found[2]]}.{found[3]}"


def _transposed(name: str, config: Mapping[str, Any]) -> bool:
    """GPT-2's matrices are [inputs, outputs] in transformers, its tables aside."""
    return config["model_type"] == "gpt2" and ".h." in name and name.endswith("weight") and "ln_" not in name


def _shape(tensor: Any, name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    # The file names the fastest axis first.
    shape = tuple(int(size) for size in tensor.shape)
    return shape if _transposed(name, config) else shape[::-1]


def _reader(tensor: Any, name: str, config: Mapping[str, Any]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    turned = _transposed(name, config)
    # llama.cpp rotates neighbours for llama, and halves for the others.
    rotary = config["model_type"] == "llama" and re.search(r"\.[qk]_proj\.", name)
    head = config["head_dim"] if rotary else 0

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = slices[::-1] if turned else slices
        part = _dequantise(tensor, tensor.data[adjacent_rows(rows, head) if head else rows])
        part = part[:, columns[0]] if columns else part
        return part.T if turned else part

    return read


def _dequantise(tensor: Any, rows: np.ndarray) -> np.ndarray:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind == Kind.BF16:
        return rows.view(ml_dtypes.bfloat16)
    if kind in (Kind.F32, Kind.F16, Kind.F64):
        return np.asarray(rows)
    try:
        return dequantize(rows, kind)
    except NotImplementedError as error:
        raise UserError("model", tensor.name, f"a quantisation that gguf can read, not {kind.name}") from error
