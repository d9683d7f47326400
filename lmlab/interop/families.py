"""Which model a config.json describes, and which config.json a model has."""

import dataclasses
from dataclasses import replace
from typing import Any

from lmlab.core.errors import UserError
from lmlab.interop.config_fields import resolve_fields
from lmlab.interop.family_table import FAMILIES, Family, Fields
from lmlab.models.config import ExecutionConfig, RotaryConfig, TransformerConfig


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


def write_config(config: TransformerConfig, model_type: str = "") -> dict[str, Any]:
    """A config.json of the model. Rotary pairs must be written as halves (see `huggingface.save_pretrained`).

    model_type: its family; empty: the one that can express it.

    Raises:
        UserError: no family can; names the field.
    """
    name = model_type or _choose_family(config)
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
    if config.rotary.skipped_layers:
        return "smollm3"
    if attention.qk_norm:
        return "qwen3"
    if attention.qkv_bias and not attention.out_bias:
        return "qwen2"
    # A Llama's width is a multiple of its heads.
    return "mistral" if attention.window or config.width % attention.heads else "llama"


def _normal_form(config: TransformerConfig) -> TransformerConfig:
    """Sizes written out, and what has no effect at its default."""
    rotary, unset = replace(config.rotary, pairs="half"), RotaryConfig()
    if rotary.scaling != "llama3":
        names = ("low_frequency_factor", "high_frequency_factor", "original_length")
        rotary = replace(rotary, **{name: getattr(unset, name) for name in names})
    if rotary.scaling == "none":
        rotary = replace(rotary, factor=unset.factor)
    attention = replace(config.attention, kv_heads=config.kv_heads, head_dim=config.head_dim)
    return replace(
        config, attention=attention, mlp=replace(config.mlp, width=config.mlp_width), execution=ExecutionConfig(),
        rotary=rotary if config.positions == "rotary" else unset,
    )  # fmt: skip


def _first_difference(ours: Any, theirs: Any, name: str) -> tuple[str, Any, Any] | None:
    if not dataclasses.is_dataclass(ours):
        return None if ours == theirs else (name, ours, theirs)
    for field in dataclasses.fields(ours):
        pair = getattr(ours, field.name), getattr(theirs, field.name)
        if difference := _first_difference(*pair, f"{name}.{field.name}"):
            return difference
    return None
