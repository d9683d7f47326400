"""Live against transformers, both ways: `python -m pytest tests/interop/test_parity.py` with torch and transformers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, TOKENS

from lmlab.interop.families import FAMILIES, read_config
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.pretrained import load_pretrained
from lmlab.models.config import AttentionConfig
from lmlab.testing.tables import LMS
from lmlab.testing.tiny import lively

torch = pytest.importorskip("torch", reason="make parity installs torch and transformers")
transformers = pytest.importorskip("transformers", reason="make parity installs torch and transformers")
pytestmark = pytest.mark.filterwarnings("default")


def theirs(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


def ours(lm, params, tokens=TOKENS):
    hidden_BTD, _ = jax.jit(lm.apply)(params, jnp.asarray(tokens, jnp.int32))
    return np.asarray(lm.logits(params, hidden_BTD))


def read_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_transformers_comes_in_and_goes_back(name, tmp_path):
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # Fresh ones hold zeros and ones that hide mistakes.
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    loaded = load_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(ours(loaded.lm, loaded.params), theirs(model), atol=1e-4)
    save_pretrained(tmp_path / "ours", loaded.config, loaded.params, shard_bytes=8000)
    again = read_by_transformers(tmp_path / "ours")
    assert type(again) is type(model)
    np.testing.assert_array_equal(theirs(again), theirs(model))


@pytest.mark.parametrize("name", sorted(set(LMS) - {"no_positions"}))
def test_a_model_of_lmlab_is_one_of_transformers(name, tmp_path):
    lm = LMS[name]()
    params = lively(lm.init(jax.random.key(0)))
    save_pretrained(tmp_path / "out", lm.config, params)
    tokens = TOKENS % lm.vocab_size
    np.testing.assert_allclose(
        theirs(read_by_transformers(tmp_path / "out"), tokens), ours(lm, params, tokens), atol=2e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_absent_is_what_transformers_takes(name):
    full = transformers.AutoConfig.for_model(name).to_dict()
    required = {field for field, default in FAMILIES[name].known.items() if default is int}
    few = read_config({"model_type": name, **{field: full[field] for field in required}})
    sizes = {"kv_heads": few.kv_heads, "head_dim": few.head_dim}
    assert replace(few.attention, **sizes) == replace(read_config(full).attention, **sizes)
    assert (few.kv_heads, few.head_dim) == (read_config(full).kv_heads, read_config(full).head_dim)
    assert replace(few, attention=AttentionConfig()) == replace(read_config(full), attention=AttentionConfig())


def test_long_contexts_are_rotated_alike(tmp_path):
    # Angles are products of float32 numbers on both sides; at 8192 they are good to some 1e-4 on each.
    config = {**CONFIGS["llama31"], "max_position_embeddings": 16384, "rope_theta": 500_000.0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(tmp_path / "theirs")
    places = 9000 + np.arange(TOKENS.shape[1])[None] + np.zeros_like(TOKENS)
    hidden_BTD, _ = jax.jit(loaded.lm.apply)(
        loaded.params, jnp.asarray(TOKENS, jnp.int32), positions_BT=jnp.asarray(places)
    )
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(TOKENS), position_ids=torch.from_numpy(places)).logits.numpy()
    np.testing.assert_allclose(loaded.lm.logits(loaded.params, hidden_BTD), expected, atol=1e-4)
