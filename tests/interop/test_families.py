"""Config.json to config and back: both spellings, the defaults of transformers, and that no field is passed over."""

from dataclasses import replace

import pytest
from tiny_models import CONFIGS, GPT2, LLAMA, LLAMA31_ROPE, NEOX

from lmlab.core.errors import UserError
from lmlab.interop.families import FAMILIES, read_config, write_config
from lmlab.models.config import AttentionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.testing.tables import LMS
from lmlab.testing.tiny import tiny_config

QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5}
MISTRAL = {**LLAMA, "model_type": "mistral"}
SMOLLM3 = {**LLAMA, "model_type": "smollm3"}
FULL, SLIDES = "full_attention", "sliding_attention"

REFUSED = {
    "yarn": ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = 'yarn'"),
    "dynamic": ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type = 'dynamic'"),
    "longrope": ({**LLAMA, "rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type = 'longrope'"),
    "unhashable_rope": ({**LLAMA, "rope_scaling": {"type": ["yarn"]}}, "rope_scaling.rope_type = ['yarn']"),
    "rope_list": ({**LLAMA, "rope_scaling": [1]}, "rope_scaling = [1]"),
    "mrope": ({**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section"),
    "rope_by_layer": ({**LLAMA, "rope_parameters": {FULL: {"rope_type": "default"}}}, f"rope_parameters.{FULL}"),
    "linear_without_factor": ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor = None"),
    "llama3_without_factor": (
        {**LLAMA, "rope_scaling": {**LLAMA31_ROPE, "low_freq_factor": None}}, "rope_scaling.low_freq_factor = None",
    ),
    "two_ropes": (
        {**LLAMA, "rope_scaling": LLAMA31_ROPE, "rope_parameters": {"rope_theta": 5.0}}, "the same as rope_parameters",
    ),
    "partial_llama": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "interleaved": ({**LLAMA, "rope_interleaved": True}, "rope_interleaved = True"),
    "relu": ({**LLAMA, "hidden_act": "relu"}, "hidden_act = 'relu'"),
    "gelu_llama": ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "silu_gpt2": ({**GPT2, "activation_function": "silu"}, "activation_function = 'silu'"),
    "mixed_by_count": ({**QWEN2, "max_window_layers": 1}, "layer_types"),
    "mixed_layers": ({**QWEN2, "layer_types": [FULL, SLIDES]}, "layer_types"),
    "unknown_layers": ({**QWEN2, "layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "layers_of_another_count": ({**QWEN2, "layer_types": [FULL]}, "layer_types"),
    "slides_without_window": ({**QWEN2, "use_sliding_window": False, "layer_types": [SLIDES] * 2}, "sliding_window"),
    "mistral_contradicts": ({**MISTRAL, "layer_types": [FULL] * 2}, "layer_types"),
    "llama_slides": ({**LLAMA, "layer_types": [SLIDES] * 2}, "sliding_window"),
    "smollm3_mixed": (
        {**SMOLLM3, "use_sliding_window": True, "sliding_window": 3, "no_rope_layers": [1, 0]}, "layer_types",
    ),
    "no_rope_count": ({**SMOLLM3, "no_rope_layers": [1]}, "no_rope_layers = [1]"),
    "inverse_layer": ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    "unscaled": ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights = False"),
    "cross": ({**GPT2, "add_cross_attention": True}, "add_cross_attention = True"),
    "quantised": ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
    "softcapping": ({**LLAMA, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "mlp_bias": ({**QWEN2, "mlp_bias": True}, "mlp_bias = True"),
    "attention_bias": ({**MISTRAL, "attention_bias": True}, "attention_bias = True"),
    "code_of_its_own": ({**LLAMA, "auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "unknown": ({**LLAMA, "flux_capacitor": 1.21}, "flux_capacitor = 1.21: expected no such field"),
    "zero_is_no_false": ({**GPT2, "scale_attn_weights": 1}, "scale_attn_weights = 1"),
    "neox_disagrees": ({**NEOX, "rotary_pct": 0.5, "partial_rotary_factor": 0.25}, "rotary_pct = 0.5"),
    "missing": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size = None"),
    "text": ({**LLAMA, "hidden_size": "16"}, "hidden_size = '16'"),
    "truth": ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers = True"),
    "no_bool": ({**LLAMA, "tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
    "eps_text": ({**LLAMA, "rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
    "negative": ({**LLAMA, "head_dim": -4}, "head_dim = -4"),
    "heads_do_not_divide": ({**GPT2, "n_head": 5}, "model.attention.heads = 5"),
    "family": ({**LLAMA, "model_type": "gemma2"}, "one of llama, qwen2, qwen3, mistral, smollm3, gpt2, gpt_neox"),
    "no_family": ({"hidden_size": 3}, "model_type = None"),
    "odd_family": ({"model_type": ["llama"]}, "model_type = ['llama']"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_mathematics_is_never_ignored(name):
    fields, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        read_config(fields)
    assert message in str(error.value)


FIVE = {
    "llama31": {"rope_theta": 300.0, **LLAMA31_ROPE},
    "llama_linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "llama_tied": {"rope_type": "default", "rope_theta": 500.0},
    "neox": {"rope_type": "default", "rope_theta": 100, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("name", FIVE)
def test_both_spellings_of_transformers_say_the_same(name):
    old = CONFIGS[name]
    bare = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct")}
    new = {**bare, "rope_parameters": FIVE[name], "dtype": "float32"}
    assert read_config(new) == read_config({**old, "torch_dtype": "float32"})
    assert read_config(new).rotary != read_config(bare).rotary


def test_fields_become_the_config():
    config = read_config(CONFIGS["llama31"])
    assert config.rotary == RotaryConfig(
        base=300.0, scaling="llama3", factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0,
        original_length=16,
    )  # fmt: skip
    assert (config.head_dim, config.kv_heads, config.mlp_width, config.tied) == (8, 2, 20, False)
    assert read_config(CONFIGS["smollm3"]).rotary.skipped_layers == (0,)
    assert read_config({**SMOLLM3, "num_hidden_layers": 9}).rotary.skipped_layers == (3, 7)
    assert read_config(CONFIGS["neox"]).rotary == RotaryConfig(base=100.0, fraction=0.25)


PUBLISHED = {
    "SmolLM2": (
        {**LLAMA, "architectures": ["LlamaForCausalLM"], "initializer_range": 0.04, "is_llama_config": True,
         "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "pretraining_tp": 1,
         "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "torch_dtype": "bfloat16"},
        RotaryConfig(100_000.0),
    ),
    "Qwen2.5": (
        {**LLAMA, "model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768, "use_mrope": False,
         "use_sliding_window": False, "rope_theta": 1000000.0, "use_cache": True, "bos_token_id": 1},
        RotaryConfig(1e6),
    ),
    "SmolLM3": (
        {**SMOLLM3, "layer_types": [FULL] * 2, "max_window_layers": 28, "no_rope_layer_interval": 4,
         "no_rope_layers": [1, 1], "sliding_window": None, "use_sliding_window": False, "rope_theta": 5e6},
        RotaryConfig(5e6),
    ),
    "Pythia": (
        {**NEOX, "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True, "hidden_dropout": 0.0,
         "initializer_range": 0.02, "attention_bias": True},
        RotaryConfig(fraction=0.25),
    ),
    "GPT-2": (
        {**GPT2, "n_ctx": 64, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "summary_type": "cls_index",
         "summary_use_proj": True, "summary_activation": None, "task_specific_params": {"text-generation": {}},
         "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
        RotaryConfig(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_files_say_besides_is_no_obstacle(name):
    fields, rotary = PUBLISHED[name]
    assert read_config(fields).rotary == rotary


def test_windows_of_every_spelling():
    window = lambda fields: read_config(fields).attention.window
    assert window({**QWEN2, "max_window_layers": 0}) == 5
    assert window({**QWEN2, "max_window_layers": 2}) == 0
    assert window({**QWEN2, "use_sliding_window": False, "max_window_layers": 0}) == 0
    assert window({**QWEN2, "layer_types": [SLIDES] * 2}) == 5
    assert window({**QWEN2, "layer_types": [FULL] * 2}) == 0
    assert window({**MISTRAL, "sliding_window": None}) == 0
    assert window({**MISTRAL, "layer_types": [SLIDES] * 2}) == window(MISTRAL) == 4096


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_back(name):
    config = read_config(CONFIGS[name])
    fields = write_config(config)
    assert fields["model_type"] == CONFIGS[name]["model_type"]
    assert fields["architectures"] == [FAMILIES[fields["model_type"]].architecture]
    again = read_config(fields)
    assert write_config(again) == fields
    # Sizes that were left to a default are written out.
    assert replace(again, attention=config.attention, mlp=config.mlp) == config
    assert (again.kv_heads, again.head_dim, again.mlp_width) == (config.kv_heads, config.head_dim, config.mlp_width)


TRANSFORMERS = sorted(name for name in set(LMS) - {"no_positions"} if isinstance(LMS[name]().config, TransformerConfig))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_transformer_of_lmlab_has_a_family(name):
    config = LMS[name]().config
    again = read_config(write_config(config))
    rotary = replace(config.rotary, pairs="half")
    assert (again.rotary == rotary) or config.positions != "rotary"
    assert again.attention.window == config.attention.window
    assert again.parallel_residual == config.parallel_residual


HEADS = AttentionConfig(heads=4, kv_heads=2)
MLP = MLPConfig(24, "gelu", bias=True)
NOWHERE = {
    "no_positions": ({"positions": "none"}, "model.positions = 'none'"),
    "gelu_llama": ({"mlp": MLPConfig(24, "gelu")}, "model.mlp.activation = 'gelu'"),
    "rms_learned": ({"positions": "learned"}, "model.positions = 'learned'"),
    "parallel_llama": ({"parallel_residual": True}, "model.parallel_residual = True"),
    "out_bias": ({"attention": replace(HEADS, out_bias=True)}, "model.attention.qkv_bias = False"),
    "grouped_neox": (
        {"norm": "layer", "mlp": MLP, "attention": replace(HEADS, qkv_bias=True, out_bias=True)},
        "model.attention.kv_heads = 2",
    ),
    "bias_and_window": ({"attention": replace(HEADS, window=3, qkv_bias=True, out_bias=True)}, "attention.qkv_bias"),
    "partial_llama": ({"rotary": RotaryConfig(fraction=0.5)}, "model.rotary.fraction = 0.5"),
    "mixed_norms": ({"norm": "layer"}, "model.attention.kv_heads = 2"),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_a_model_of_no_family_is_told_by_its_field(name):
    changes, message = NOWHERE[name]
    with pytest.raises(UserError) as error:
        write_config(tiny_config(**changes))
    assert message in str(error.value)
