"""What a config.json may say: which fields are used, which change nothing, and that no other is passed over."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmlab.core.errors import UserError, check
from lmlab.models.config import RotaryConfig

_ORIGIN = """
architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash
tokenizer_class prefix finetuning_task task_specific_params problem_type id2label label2id num_labels _num_labels
transformers.js_config is_llama_config unsloth_fixed unsloth_version
"""
"""Where the file comes from, and what is done with it. The names of Pythia, SmolLM and GPT-2's own files among them."""
_EXECUTION = """
use_cache output_past output_attentions output_hidden_states return_dict return_dict_in_generate torchscript
use_bfloat16 tf_legacy_loss pretraining_tp gradient_checkpointing chunk_size_feed_forward attn_implementation
_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn reorder_and_upcast_attn
keys_to_ignore_at_inference is_decoder remove_invalid_values
"""
"""How transformers executes it."""
_TRAINING = """
initializer_range attention_dropout hidden_dropout classifier_dropout attention_probs_dropout_prob
hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop
"""
"""Initial values and dropout, which are a matter of training."""
_OTHER_HEADS = """
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout predict_special_tokens
"""
"""Heads that a causal LM does not have."""
_GENERATION = """
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id max_length min_length
do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences output_scores forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty
suppress_tokens begin_suppress_tokens n_ctx max_sequence_length tie_encoder_decoder
"""
"""Special tokens and settings of generation: tokenizer_config.json and generation_config.json say them again."""
HARMLESS = frozenset(f"{_ORIGIN}{_EXECUTION}{_TRAINING}{_OTHER_HEADS}{_GENERATION}".split())
"""Fields that change no logit."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "rope_interleaved": (False,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "qk_layernorm": (False,),
    "use_qk_norm": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "logit_scale": (None, 1.0),
    "per_layer_config": (None, {}),
    "rope_type": (None, "default"),
}
"""Fields that are not supported, and the values at which they change nothing."""

ROPE: Mapping[str, Any] = {
    "rope_theta": None, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None,
}  # fmt: skip
"""Fields of rotary embeddings: transformers 4 writes the first two, 5 the third."""

OPTIONAL_COUNTS = frozenset({"num_key_value_heads", "head_dim", "sliding_window", "n_inner"})
"""Fields that hold a positive integer or null."""

_SCALINGS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}
_LAYER_KINDS = ("full_attention", "sliding_attention")


def resolve_fields(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The `known` fields with the values of a config.json.

    known: names and what transformers takes where one is absent; the type `int` says that it must not be absent.

    Raises:
        UserError: a field is missing, ill-typed, or neither known nor harmless.
    """
    for name, value in config.items():
        if name in known or name in HARMLESS:
            continue
        neutral = NEUTRAL.get(name, ())
        # By type too: 0 is no False.
        if not any(value == fine and type(value) is type(fine) for fine in neutral):
            expected = " or ".join(map(repr, neutral)) if neutral else "no such field"
            raise UserError(f"config.json: {name}", value, f"{expected}, for a {config.get('model_type')}",
                            "lmlab does not know what it does to the model; remove it if it does nothing.",
                            )  # fmt: skip
    fields = {name: config.get(name, default) for name, default in known.items()}
    for name, value in fields.items():
        _check_type(name, value, known[name])
    return fields


def _check_type(name: str, value: Any, default: Any) -> None:
    if default is int or name in OPTIONAL_COUNTS:
        optional = name in OPTIONAL_COUNTS and value is None
        fine = optional or (type(value) is int and value >= 1)
        check(fine, f"config.json: {name}", None if value is int else value, "a positive integer")
    elif isinstance(default, bool | str):
        check(type(value) is type(default), f"config.json: {name}", value, f"a {type(default).__name__}")
    elif isinstance(default, int):
        check(type(value) is int and value >= 0, f"config.json: {name}", value, "an integer, 0 or more")
    elif isinstance(default, float):
        check(type(value) in (int, float) and value >= 0, f"config.json: {name}", value, "a number, 0 or more")


def read_rotary(
    fields: Mapping[str, Any], max_length: int, default_base: float = 10_000.0, default_fraction: float = 1.0,
) -> RotaryConfig:  # fmt: skip
    """Rotary embedding from the fields of `ROPE`; what stands inside `rope_parameters` (or `rope_scaling`) wins.

    Raises:
        UserError: a scaling, or a setting of one, that lmlab does not have.
    """
    old, new = fields["rope_scaling"] or {}, fields["rope_parameters"] or {}
    name = "config.json: rope_scaling" if old else "config.json: rope_parameters"
    inside = old or new
    check(isinstance(inside, Mapping), name, inside, "an object")
    check(not (old and new) or old == new, name, inside, "the same as rope_parameters, or one of them only")
    kind = inside.get("rope_type", inside.get("type", "default"))
    check(kind in _SCALINGS, f"{name}.rope_type", kind, f"one of {', '.join(_SCALINGS)}",
          "lmlab has no other way to scale rotary embeddings.")  # fmt: skip
    allowed = _SCALINGS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key, value in inside.items():
        idle = value is None or (key == "factor" and value == 1) or key == "original_max_position_embeddings"
        check(key in allowed or idle, f"{name}.{key}", value, f"no such field for rope_type {kind!r}")
    defaults = {
        "rope_theta": fields["rope_theta"] or default_base,
        "partial_rotary_factor": fields["partial_rotary_factor"] or default_fraction,
        "original_max_position_embeddings": max_length,
    }
    values = defaults | {key: value for key, value in inside.items() if value is not None}
    for key in sorted(_SCALINGS[kind] | {"rope_theta", "partial_rotary_factor"}):
        number = isinstance(values.get(key), int | float) and values[key] > 0
        check(number, f"{name}.{key}", values.get(key), "a positive number")
    base, fraction = float(values["rope_theta"]), float(values["partial_rotary_factor"])
    if kind == "default":
        return RotaryConfig(base=base, fraction=fraction)
    if kind == "linear":
        return RotaryConfig(base=base, fraction=fraction, scaling="linear", factor=float(values["factor"]))
    return RotaryConfig(
        base=base, fraction=fraction, scaling="llama3", factor=float(values["factor"]),
        low_frequency_factor=float(values["low_freq_factor"]),
        high_frequency_factor=float(values["high_freq_factor"]),
        original_length=int(values["original_max_position_embeddings"]),
    )  # fmt: skip


def write_rotary(rotary: RotaryConfig) -> dict[str, Any] | None:
    """`rope_scaling` as transformers 4 writes it and 5 reads it; its base and fraction go beside it."""
    if rotary.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rotary.scaling, "factor": rotary.factor}
    if rotary.scaling == "llama3":
        scaling["low_freq_factor"] = rotary.low_frequency_factor
        scaling["high_freq_factor"] = rotary.high_frequency_factor
        scaling["original_max_position_embeddings"] = rotary.original_length
    return scaling


def read_window(window: int | None, kinds: Sequence[str] | None, layers: int) -> int:
    """The sliding window of all layers, 0 for none. kinds: `layer_types`; None: all slide if there is a window.

    Raises:
        UserError: layers differ, as they may not in lmlab, or slide without a window.
    """
    if kinds is None:
        return window or 0
    name = "config.json: layer_types"
    fine = isinstance(kinds, list | tuple) and len(kinds) == layers and all(kind in _LAYER_KINDS for kind in kinds)
    check(fine, name, kinds, f"{layers} of {' and '.join(_LAYER_KINDS)}")
    check(len(set(kinds)) == 1, name, list(kinds), "layers of one kind",
          "lmlab has no models that mix full and sliding attention.")  # fmt: skip
    if kinds[0] == "full_attention":
        return 0
    check(window is not None, "config.json: sliding_window", window, "a window, since layer_types asks for one")
    return window or 0
