"""Models of karpathy/llama2.c: its first .bin format, and the tok*.bin of pieces and scores that lies beside it."""

import math
import struct
from pathlib import Path

import numpy as np
from tokenizers import AddedToken

from lmlab.core.errors import UserError, check
from lmlab.data.tokenizers import wrap_tokenizer
from lmlab.interop.rotary_rows import adjacent_rows
from lmlab.interop.source import Source
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.interop.vocabularies import byte_fallback

_HEADER = struct.Struct("<7i")
_UNKNOWN, _BEGIN, _END, _FIRST_PLAIN = 0, 1, 2, 259
"""Ids: three markers, 256 bytes, then pieces of text."""


def open_llama2c(path: Path) -> Source:
    """The model of a .bin file, memory-mapped: seven sizes and float32 arrays, one for all layers of a kind.

    Raises:
        UserError: no such file, or its length is not that of the model that its sizes describe.
    """
    width, ffn, layers, heads, kv_heads, vocabulary, length = _sizes(path)
    tied, vocabulary, head = vocabulary > 0, abs(vocabulary), width // heads
    key_value = kv_heads * head
    stacks = {
        "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (key_value, width),
        "self_attn.v_proj": (key_value, width), "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,), "mlp.gate_proj": (ffn, width), "mlp.down_proj": (width, ffn),
        "mlp.up_proj": (ffn, width),
    }  # fmt: skip
    tables = 2 * length * (head // 2)  # Cosines and sines, which nobody needs.
    order = [(name, layer, shape) for name, shape in stacks.items() for layer in range(layers)]
    places: dict[str, tuple[int, tuple[int, ...]]] = {"model.embed_tokens.weight": (0, (vocabulary, width))}
    end = vocabulary * width
    for name, layer, shape in order:
        places[f"model.layers.{layer}.{name}.weight"] = end, shape
        end += math.prod(shape)
    places["model.norm.weight"] = end, (width,)
    end += width + tables
    if not tied:
        places["lm_head.weight"] = end, (vocabulary, width)
        end += vocabulary * width
    size = path.stat().st_size
    expected = _HEADER.size + 4 * end
    wanted = f"{expected:,} bytes, as the sizes say that it begins with, not {size:,}"
    check(size == expected, "model", str(path), wanted, "Later formats of llama2.c are not read.")
    values = np.memmap(path, "<f4", "r", _HEADER.size).view(np.ndarray)

    def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        begin, shape = places[name]
        tensor = values[begin : begin + math.prod(shape)].reshape(shape)
        if ".q_proj." in name or ".k_proj." in name:
            rows, columns = (*slices, slice(None), slice(None))[:2]
            return tensor[adjacent_rows(slice(*rows.indices(shape[0])), head)][:, columns]
        return tensor[slices]

    config = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": length, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": tied,
    }  # fmt: skip
    return Source(str(path), config, {name: shape for name, (_, shape) in places.items()}, read)


def llama2c_tokenizer(path: Path) -> TokenizerFiles | None:
    """The tokenizer in the tok*.bin beside a model; None if there is none.

    Its models have seen texts that each begin with <s>: it ends a text, too.

    Raises:
        UserError: several such files, or a damaged one.
    """
    found = sorted(path.parent.glob("tok*.bin"))
    check(len(found) < 2, "model", str(path.parent), "one tok*.bin", "Move the model and its own into a folder.")
    if not found:
        return None
    pieces, scores = _read_pieces(found[0])
    pieces[:3] = "<unk>", "<s>", "</s>"
    markers = [AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]]
    plain = [i >= _FIRST_PLAIN for i in range(len(pieces))]
    model = byte_fallback(pieces, scores, plain, markers, "<unk>")
    return TokenizerFiles(wrap_tokenizer(model, "<s>", (_BEGIN,), (_BEGIN, _END)), None, None)


def _sizes(path: Path) -> tuple[int, ...]:
    check(path.is_file(), "model", str(path), "an existing .bin file of llama2.c")
    with path.open("rb") as handle:
        header = handle.read(_HEADER.size)
    sizes = _HEADER.unpack(header) if len(header) == _HEADER.size else (0,) * 7
    width, _, _, heads, kv_heads, vocabulary, _ = sizes
    positive = min(*sizes[:5], sizes[6]) > 0 and vocabulary != 0
    fine = positive and width % heads == 0 and heads % kv_heads == 0 and width // heads % 2 == 0
    check(fine, "model", str(path), "a llama2.c model, which begins with seven sizes", "Later formats are not read.")
    return sizes


def _read_pieces(path: Path) -> tuple[list[str], list[float]]:
    """Pieces with ▁ for the blank, and their scores."""
    data, place, pieces, scores = path.read_bytes(), 4, [], []
    try:
        while place < len(data):
            score, size = struct.unpack_from("<fi", data, place)
            place += 8 + size
            check(
                0 < size <= len(data) and place <= len(data), "tokenizer", str(path), "a whole vocabulary of llama2.c"
            )
            pieces.append(data[place - size : place].decode().replace(" ", "▁"))
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError("tokenizer", str(path), f"a vocabulary of llama2.c ({error})") from error
    check(len(pieces) >= _FIRST_PLAIN, "tokenizer", str(path), f"at least {_FIRST_PLAIN} pieces, not {len(pieces)}")
    return pieces, scores
