"""The families of transformers that lmlab can hold: config.json to `TransformerConfig` and back.

Fields are those of the configuration and modelling files of transformers 4 and 5. Written are the names of version 4,
which both understand.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmlab.core.errors import UserError, check
from lmlab.interop.config_fields import ROPE, read_rotary, read_window, resolve_fields, write_rotary
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig

Fields = Mapping[str, Any]
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_SILU = {"silu": "swiglu", "swish": "swiglu"}


@dataclass(frozen=True)
class Family:
    """A model_type of transformers."""

    architecture: str
    """Its class with a language-model head."""
    known: Fields
    """Fields that it understands; see `resolve_fields`."""
    read: Callable[[Fields], TransformerConfig]
    """From resolved fields."""
    write: Callable[[TransformerConfig], dict[str, Any]]
    """Fields that say as much of a config as the family can."""


def read_config(config: Fields) -> TransformerConfig:
    """The model that a config.json describes.

    Raises:
        UserError: the family is not supported, or a field asks for what lmlab does not have.
    """
    family = family_of(config)
    return family.read(resolve_fields(config, family.known))


def family_of(config: Fields) -> Family:
    """The family of a config.json. Raises `UserError` if lmlab does not have it."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError("config.json: model_type", kind, f"one of {', '.join(FAMILIES)}",
                        "No other family is supported.")  # fmt: skip
    return FAMILIES[kind]


def write_config(config: TransformerConfig) -> dict[str, Any]:
    """A config.json of the family that can express the model.

    Rotary pairs must be written as halves (see `huggingface.save_pretrained`).

    Raises:
        UserError: no family can; names the field.
    """
    name = _choose_family(config)
    fields = {"model_type": name, "architectures": [FAMILIES[name].architecture], **FAMILIES[name].write(config)}
    # What reading makes of it decides whether the family can say it.
    difference = _first_difference(_normal_form(config), _normal_form(read_config(fields)), "model")
    if difference:
        field, ours, theirs = difference
        raise UserError(field, ours, f"{theirs!r}, as the nearest family of transformers, {name}, has it",
                        "No family has this model: it can not be exported.")  # fmt: skip
    return fields


def _choose_family(config: TransformerConfig) -> str:
    if config.norm == "layer":
        return "gpt2" if config.positions == "learned" else "gpt_neox"
    attention = config.attention
    if attention.qk_norm:
        return "qwen3"
    if attention.qkv_bias and not attention.out_bias:
        return "qwen2"
    # A Llama's width is a multiple of its heads.
    return "mistral" if attention.window or config.width % attention.heads else "llama"


def _normal_form(config: TransformerConfig) -> TransformerConfig:
    """Sizes written out, and what has no effect at its default."""
    rotary = replace(config.rotary, pairs="half")
    if rotary.scaling != "llama3":
        rotary = RotaryConfig(rotary.base, rotary.fraction, "half", rotary.scaling, rotary.factor)
    if rotary.scaling == "none":
        rotary = replace(rotary, factor=1.0)
    attention = replace(config.attention, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return replace(
        config, attention=attention, mlp=replace(config.mlp, width=config.mlp_width), execution=ExecutionConfig(),
        rotary=rotary if config.positions == "rotary" else RotaryConfig(),
    )  # fmt: skip


def _first_difference(ours: Any, theirs: Any, name: str) -> tuple[str, Any, Any] | None:
    if not dataclasses.is_dataclass(ours):
        return None if ours == theirs else (name, ours, theirs)
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if difference := _first_difference(*pair, f"{name}.{field.name}"):
            return difference
    return None


def _activation(fields: Fields, name: str, known: Mapping[str, str]) -> Any:
    check(fields[name] in known, f"config.json: {name}", fields[name], f"one of {', '.join(known)}")
    return known[fields[name]]


def _read_llama(fields: Fields, **attention: Any) -> TransformerConfig:
    """What all families in the shape of Llama share. attention: its biases, norms and window."""
    layers, max_length = fields["num_hidden_layers"], fields["max_position_embeddings"]
    rotary = read_rotary(fields, max_length)
    check(rotary.fraction == 1, "config.json: partial_rotary_factor", rotary.fraction, "1.0")
    bias = fields.get("attention_bias", False)
    heads = {"qkv_bias": bias, "out_bias": bias, "window": read_window(None, fields["layer_types"], layers)}
    return TransformerConfig(
        vocab_size=fields["vocab_size"], layers=layers, width=fields["hidden_size"], max_length=max_length,
        norm_eps=fields["rms_norm_eps"], tied=fields["tie_word_embeddings"], rotary=rotary,
        attention=AttentionConfig(
            heads=fields["num_attention_heads"], kv_heads=fields["num_key_value_heads"] or 0,
            head_dim=fields["head_dim"] or 0, **(heads | attention),
        ),
        mlp=MLPConfig(
            fields["intermediate_size"], _activation(fields, "hidden_act", _SILU), fields.get("mlp_bias", False)
        ),
    )  # fmt: skip


def _read_qwen(fields: Fields, **attention: Any) -> TransformerConfig:
    layers, window = fields["num_hidden_layers"], fields["sliding_window"] if fields["use_sliding_window"] else None
    kinds = fields["layer_types"]
    if kinds is None:
        slides = [window is not None and layer >= fields["max_window_layers"] for layer in range(layers)]
        kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    window = read_window(window, kinds, layers)
    return _read_llama({**fields, "layer_types": None}, window=window, **attention)


def _read_mistral(fields: Fields) -> TransformerConfig:
    window, kinds = fields["sliding_window"], fields["layer_types"]
    layers = fields["num_hidden_layers"]
    read = read_window(window, kinds, layers)
    check(read == (window or 0), "config.json: layer_types", kinds, "sliding_attention, since sliding_window is set")
    return _read_llama({**fields, "layer_types": None}, window=read)


def _read_gpt2(fields: Fields) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=fields["vocab_size"], layers=fields["n_layer"], width=fields["n_embd"],
        max_length=fields["n_positions"], positions="learned", norm="layer",
        norm_eps=fields["layer_norm_epsilon"], tied=fields["tie_word_embeddings"],
        attention=AttentionConfig(heads=fields["n_head"], qkv_bias=True, out_bias=True),
        mlp=MLPConfig(fields["n_inner"] or 0, _activation(fields, "activation_function", _GELU), bias=True),
    )  # fmt: skip


def _read_neox(fields: Fields) -> TransformerConfig:
    def one_of(first: str, second: str, default: float) -> float:
        """Either name; both are written by some versions."""
        given = {name: fields[name] for name in (first, second) if fields[name] is not None}
        check(len(set(given.values())) < 2, f"config.json: {first}", fields[first], f"{fields[second]}, as {second}")
        return next(iter(given.values()), default)

    base, fraction = one_of("rotary_emb_base", "rope_theta", 10_000.0), one_of(
        "rotary_pct", "partial_rotary_factor", 0.25)  # fmt: skip
    bias = fields["attention_bias"]
    return TransformerConfig(
        vocab_size=fields["vocab_size"], layers=fields["num_hidden_layers"], width=fields["hidden_size"],
        max_length=fields["max_position_embeddings"], norm="layer", norm_eps=fields["layer_norm_eps"],
        tied=fields["tie_word_embeddings"], parallel_residual=fields["use_parallel_residual"],
        attention=AttentionConfig(heads=fields["num_attention_heads"], qkv_bias=bias, out_bias=bias),
        mlp=MLPConfig(fields["intermediate_size"], _activation(fields, "hidden_act", _GELU), bias=True),
        rotary=read_rotary(
            {**fields, "rope_theta": base, "partial_rotary_factor": fraction}, fields["max_position_embeddings"]
        ),
    )  # fmt: skip


def _write_llama(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    """Fields that all families in the shape of Llama share, and `more`."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied, "rope_theta": config.rotary.base,
        "rope_scaling": write_rotary(config.rotary), **more,
    }  # fmt: skip


def _write_qwen(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    window = config.attention.window
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return _write_llama(config, **(sliding if window else {"use_sliding_window": False}), **more)


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "n_layer": config.layers, "n_embd": config.width,
        "n_head": config.attention.heads, "n_inner": config.mlp_width, "n_positions": config.max_length,
        "activation_function": _gelu_name(config), "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


def _write_neox(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.width, "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers, "num_attention_heads": config.attention.heads,
        "hidden_act": _gelu_name(config), "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "use_parallel_residual": config.parallel_residual, "attention_bias": config.attention.out_bias,
        "rotary_emb_base": config.rotary.base, "rotary_pct": config.rotary.fraction,
        "rope_scaling": write_rotary(config.rotary),
    }  # fmt: skip


def _gelu_name(config: TransformerConfig) -> str:
    return "gelu_new" if config.mlp.activation == "gelu_tanh" else "gelu"


_LLAMA: Fields = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "layer_types": None, **ROPE,
}  # fmt: skip
_QWEN: Fields = {
    **_LLAMA, "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_GPT2: Fields = {
    "vocab_size": int, "n_layer": int, "n_embd": int, "n_head": int, "n_inner": None, "n_positions": 1024,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
_NEOX: Fields = {
    "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True, "rotary_emb_base": None,
    "rotary_pct": None, **ROPE,
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", {**_LLAMA, "attention_bias": False, "mlp_bias": False}, _read_llama,
        lambda config: _write_llama(config, attention_bias=config.attention.out_bias, mlp_bias=config.mlp.bias),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _QWEN, lambda fields: _read_qwen(fields, qkv_bias=True), _write_qwen,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128, "attention_bias": False},
        lambda fields: _read_qwen(fields, qk_norm=True),
        lambda config: _write_qwen(config, attention_bias=config.attention.out_bias),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        _read_mistral, lambda config: _write_llama(config, sliding_window=config.attention.window or None),
    ),
    "gpt2": Family("GPT2LMHeadModel", _GPT2, _read_gpt2, _write_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", _NEOX, _read_neox, _write_neox),
}  # fmt: skip
"""Every supported model_type. Names of their tensors are in `lmlab.interop.tensors`."""
