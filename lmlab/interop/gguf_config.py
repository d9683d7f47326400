"""The configuration in a GGUF file, in the terms of config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmlab.core.errors import UserError, check

_SHARED = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "rope.freq_base": "rope_theta",
}  # fmt: skip
_GPT2 = {
    "block_count": "n_layer", "context_length": "n_positions", "embedding_length": "n_embd",
    "feed_forward_length": "n_inner", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
_CHECKED = {
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
}  # fmt: skip
"""Fields that are looked at, or of which others say the same."""
_NEEDED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")


def config_of(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], frequencies: np.ndarray | None, origin: str
) -> dict[str, Any]:  # fmt: skip
    """The config.json that a GGUF file stands for.

    Args:
        fields: its metadata.
        tensors: its tensors by their names in the file.
        frequencies: [head size / 2] by what Llama 3.1 divides its rotary frequencies; None: by nothing.
        origin: the file, for messages.

    Raises:
        UserError: an architecture or a field that lmlab does not have, or a field that is missing.
    """
    architecture: str = fields.get("general.architecture", "")
    supported = ("llama", "qwen2", "qwen3", "gpt2")
    if architecture not in supported:
        raise UserError("general.architecture", architecture, f"one of {', '.join(supported)}, in {origin}",
                        "No other architecture is supported.")  # fmt: skip
    own = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()
           if name.startswith(f"{architecture}.")}  # fmt: skip
    names = _GPT2 if architecture == "gpt2" else _SHARED
    for name, value in own.items():
        known = name in names or name in _CHECKED
        # A field that says nothing may stay: files state them with the value for none.
        check(known or not value, f"{architecture}.{name}", value, f"no such field in {origin}",
              "lmlab does not know what it does to the model.")  # fmt: skip
        check(not isinstance(value, list), f"{architecture}.{name}", value, "one value for all layers")
    for name in _NEEDED:
        check(name in own, f"{architecture}.{name}", None, f"a value in {origin}")
    config = {names[name]: value for name, value in own.items() if name in names}
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if name in config:  # Stored in float32: 1e-5 is read as 9.99999974737875e-06.
            config[name] = float(f"{config[name]:.6g}")
    check("token_embd.weight" in tensors, "model", origin, "a file with token_embd.weight")
    config |= {
        "model_type": architecture, "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
    }  # fmt: skip
    return config if architecture == "gpt2" else config | _rest(architecture, own, tensors, frequencies)


def _rest(
    architecture: str, own: Mapping[str, Any], tensors: Mapping[str, Any], frequencies: np.ndarray | None
) -> dict[str, Any]:  # fmt: skip
    """Fields of models in the shape of Llama that have no name of their own in the file."""
    heads = own["attention.head_count"]
    head = own.get("attention.key_length", own["embedding_length"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        check(own.get(name, head) == head, f"{architecture}.{name}", own.get(name), f"the size of a head, {head}")
    rest: dict[str, Any] = {
        "head_dim": head, "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "rope_theta": own.get("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(architecture, own, frequencies, head),
    }  # fmt: skip
    if architecture != "qwen2":
        rest["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture == "llama":
        rest["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return rest


def _scaling(
    architecture: str, own: Mapping[str, Any], frequencies: np.ndarray | None, head: int
) -> dict[str, Any] | None:  # fmt: skip
    kind = own.get("rope.scaling.type", "none")
    field = f"{architecture}.rope.scaling.type"
    check(kind in ("none", "linear"), field, kind, "none or linear", "lmlab reads no other scaling from GGUF.")
    if frequencies is not None:
        check(kind == "none", field, kind, "none, since rope_freqs.weight says how frequencies are scaled")
        return _llama3(frequencies, own.get("rope.freq_base", 10_000.0), head)
    return {"rope_type": "linear", "factor": own["rope.scaling.factor"]} if kind == "linear" else None


def _llama3(frequencies: np.ndarray, base: float, head: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, told by its effect: the file holds that alone."""
    factor = float(np.max(frequencies))
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    periods = 2 * np.pi * base ** (np.arange(0, head, 2) / head)
    smooth = np.clip((8192 / periods - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if frequencies.shape != expected.shape or not np.allclose(frequencies, expected, rtol=1e-3):
        raise UserError("rope_freqs.weight", frequencies.shape, "the rotary scaling of Llama 3.1, no other")
    return scaling
