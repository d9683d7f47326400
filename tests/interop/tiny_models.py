"""A tiny model of every family as its config.json, with weights that follow from the names of its tensors alone."""

import zlib

import numpy as np

from lmlab.interop.families import read_config
from lmlab.interop.huggingface import write_folder
from lmlab.interop.weights import model_parts

LLAMA = {
    "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA31_ROPE = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama": {**LLAMA, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    "llama_tied": {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": None, "rope_theta": 500.0},
    "llama31": {**LLAMA, "rope_theta": 300.0, "rope_scaling": LLAMA31_ROPE, "head_dim": 8},
    "llama_linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        **LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
    },
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 6, "num_key_value_heads": 1, "attention_bias": True},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "smollm3": {**LLAMA, "model_type": "smollm3", "no_rope_layers": [0, 1], "rope_theta": 50.0, "pad_token_id": None},
    "gpt2": GPT2,
    "gpt2_untied": {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 20},
    "neox": {**NEOX, "rotary_emb_base": 100, "rotary_pct": 0.25},
    "neox_sequential": {
        **NEOX, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new", "rotary_pct": 0.5,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Between them: grouped and plain heads, tied and not, every bias, both kinds of scaled rotation, windows."""
LENGTH = 24
"""Longer than the windows, and than the context that `llama31` was extended from."""
TOKENS = (np.arange(2 * LENGTH).reshape(2, LENGTH) * 7 + 3) ** 2 % 23
SHOWN = (9, LENGTH - 1)
"""Places whose logits are kept as goldens."""


def weight(name, shape):
    """Numbers that look random (the finaliser of MurmurHash3 over name and index), float32; norms are near 1."""
    bits = np.arange(np.prod(shape), dtype=np.uint64) + zlib.crc32(name.encode())
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = ((bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    uniform = (bits.astype(np.float64) / 2**31 - 1).reshape(shape)
    norm = len(shape) == 1 and name.endswith("weight")
    return (1 + 0.5 * uniform if norm else 0.6 * uniform).astype(np.float32)


def write_tiny(folder, fields, dtype="float32", **options):
    """A folder of transformers with these weights."""
    parts = model_parts(read_config(fields), fields["model_type"])
    shapes = {part.tensor: part.shape for part in parts}
    write_folder(folder, fields, shapes, lambda name: weight(name, shapes[name]), None, dtype=dtype, **options)
    return folder
