"""Weights in and out: against transformers' logits, bit for bit, on meshes, and without a second copy in memory."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import CONFIGS, LLAMA, SHOWN, TOKENS, write_tiny

from lmlab.data.tokenizers import byte_tokenizer
from lmlab.inference.config import SamplingConfig
from lmlab.interop.convert import convert
from lmlab.interop.families import read_config
from lmlab.interop.huggingface import open_folder, save_pretrained
from lmlab.interop.pretrained import Pretrained, load_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles, write_tokenizer_files
from lmlab.interop.weights import load_params
from lmlab.models.config import ExecutionConfig, RotaryConfig
from lmlab.testing.tiny import lively, tiny_lm
from lmlab.train import parallel
from lmlab.train.config import ParallelConfig

GOLDENS = Path(__file__).parent / "goldens"
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def logits(loaded, tokens_BT=TOKENS):
    hidden_BTD, _ = jax.jit(loaded.lm.apply)(loaded.params, jnp.asarray(tokens_BT, jnp.int32))
    return np.asarray(loaded.lm.logits(loaded.params, hidden_BTD))


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def on_mesh(sizes):
    mesh = parallel.make_mesh(ParallelConfig(*sizes))
    return mesh, lambda lm, shapes: parallel.param_shardings(lm.axes, shapes, mesh)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path):
    golden = np.asarray(json.loads((GOLDENS / f"{name}.json").read_text()))
    ours = logits(load_pretrained(write_tiny(tmp_path / "model", CONFIGS[name])))
    np.testing.assert_allclose(ours[0, SHOWN], golden, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_comes_in_goes_out_bit_for_bit(name, tmp_path):
    dtype = list(STORED)[list(CONFIGS).index(name) % 3]
    folder = write_tiny(tmp_path / "in", CONFIGS[name], dtype)
    loaded = load_pretrained(folder)
    save_pretrained(tmp_path / "out", loaded.config, loaded.params, dtype=dtype, shard_bytes=3000)
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(STORED[dtype])}
    chex.assert_trees_all_equal(before, after)
    again = load_pretrained(tmp_path / "out")
    assert again.config == replace(loaded.config, attention=again.config.attention, mlp=again.config.mlp)
    chex.assert_trees_all_equal(loaded.params, again.params)


MESHES = {"llama": (1, 8, 1, 1), "qwen3": (2, 1, 1, 1), "gpt2": (2, 2, 1, 2), "neox": (1, 2, 2, 2)}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gets_the_same_arrays_where_it_asked(name, tmp_path):
    folder = write_tiny(tmp_path / "in", CONFIGS[name])
    mesh, place = on_mesh(MESHES[name])
    placed, whole = load_pretrained(folder, place=place), load_pretrained(folder)
    wanted = place(placed.lm, jax.eval_shape(placed.lm.init, jax.random.key(0)))
    same = lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert jax.tree.all(jax.tree.map(same, placed.params, wanted))
    assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(placed.params))
    chex.assert_trees_all_equal(jax.device_get(placed.params), jax.device_get(whole.params))
    save_pretrained(tmp_path / "out", placed.config, placed.params)
    chex.assert_trees_all_equal(tensors(folder), tensors(tmp_path / "out"))


def counted(source):
    """The source, and a list of the bytes of every read."""
    sizes = []

    def read(name, ranges):
        part = source.read(name, ranges)
        sizes.append(part.nbytes)
        return part

    return replace(source, read=read), sizes


@pytest.mark.parametrize(
    ("name", "sizes", "parts"), [("llama", (1, 8, 1, 1), 8), ("gpt2", (4, 1, 1, 2), 1), ("qwen3", (1, 1, 1, 1), 1)]
)
def test_every_byte_is_read_once_however_many_devices_hold_it(name, sizes, parts, tmp_path):
    folder = write_tiny(tmp_path / "model", CONFIGS[name])
    source, read = counted(open_folder(folder))
    load_params(source, read_config(source.config), place=on_mesh(sizes)[1])
    assert sum(read) == sum(tensor.nbytes for tensor in tensors(folder).values())
    assert max(read) <= max(tensor.nbytes for tensor in tensors(folder).values()) / parts


def test_the_host_never_holds_the_model_twice(tmp_path):
    fields = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    folder = write_tiny(tmp_path / "model", fields, "bfloat16")
    loaded = load_pretrained(folder)
    save_pretrained(tmp_path / "first", loaded.config, loaded.params)  # What is compiled once is not counted.
    del loaded
    largest = 8 * 256 * 2 * 512 * 4
    model = sum(tensor.size * 4 for tensor in tensors(folder).values())
    tracemalloc.start()
    loaded = load_pretrained(folder)
    at_most = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    save_pretrained(tmp_path / "out", loaded.config, loaded.params)
    exported = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    # JAX on a CPU may keep the very arrays that it is given, in which case they are the model.
    assert at_most < model + largest / 4
    assert exported < model / 4


def test_bfloat16_stays_bfloat16(tmp_path):
    folder = write_tiny(tmp_path / "in", CONFIGS["llama"], "bfloat16")
    exact, half = load_pretrained(folder), load_pretrained(folder, dtype="bfloat16")
    assert exact.config.execution.compute_dtype == "float32"
    assert half.config.execution.compute_dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params), exact.params)
    mixed = load_pretrained(folder, dtype="bfloat16", execution=ExecutionConfig(unroll=0))
    assert mixed.config.execution == ExecutionConfig(unroll=0)
    np.testing.assert_allclose(logits(mixed), logits(exact), atol=1e-4)
    save_pretrained(tmp_path / "out", half.config, half.params, dtype="bfloat16")
    chex.assert_trees_all_equal(tensors(folder), tensors(tmp_path / "out"))


@pytest.mark.parametrize("name", ["adjacent", "adjacent_qk_norm", "adjacent_partial"])
def test_adjacent_pairs_are_exported_as_halves(name, tmp_path):
    attention, biased = (getattr(read_config(CONFIGS["llama"]), part) for part in ("attention", "mlp"))
    lm = {
        "adjacent": lambda: tiny_lm(attention=attention, rotary=RotaryConfig(100.0, pairs="adjacent"), mlp=biased),
        "adjacent_qk_norm": lambda: tiny_lm(
            attention=replace(attention, qk_norm=True), rotary=RotaryConfig(100.0, pairs="adjacent")
        ),
        "adjacent_partial": lambda: tiny_lm(
            attention=replace(attention, heads=2, kv_heads=2), norm="layer", mlp=replace(biased, activation="gelu"),
            parallel_residual=True, rotary=RotaryConfig(100.0, 0.5, "adjacent"),
        ),
    }  # fmt: skip
    model = lm[name]()
    params = lively(model.init(jax.random.key(0)))
    save_pretrained(tmp_path / "out", model.config, params)
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.config.rotary.pairs == "half"
    tokens = TOKENS % 7
    expected = logits(Pretrained(model.config, model, params, None), tokens)
    np.testing.assert_allclose(logits(loaded, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "neox", "smollm3"])
def test_converting_is_loading_and_saving(name, tmp_path):
    folder = write_tiny(tmp_path / "in", CONFIGS[name])
    convert(folder, tmp_path / "out", "bfloat16")
    loaded = load_pretrained(folder)
    save_pretrained(tmp_path / "saved", loaded.config, loaded.params, dtype="bfloat16")
    chex.assert_trees_all_equal(tensors(tmp_path / "out"), tensors(tmp_path / "saved"))
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "saved/config.json").read_text()


def test_the_text_of_a_model_goes_with_it(tmp_path):
    folder = write_tiny(tmp_path / "in", {**CONFIGS["llama"], "vocab_size": 260})
    assert load_pretrained(folder).text is None
    write_tokenizer_files(folder, TokenizerFiles(byte_tokenizer(), None, SamplingConfig(temperature=0.5)))
    loaded = load_pretrained(folder)
    save_pretrained(tmp_path / "saved", loaded.config, loaded.params, loaded.text)
    convert(folder, tmp_path / "converted")
    for name in ("saved", "converted"):
        again = load_pretrained(tmp_path / name).text
        assert again.tokenizer.fingerprint == loaded.text.tokenizer.fingerprint
        assert again.sampling == loaded.text.sampling
        stated = json.loads((tmp_path / name / "config.json").read_text())
        assert (stated["bos_token_id"], stated["eos_token_id"], stated["pad_token_id"]) == (256, 256, None)


def test_tokens_that_a_source_states_survive_without_a_tokenizer(tmp_path):
    folder = write_tiny(tmp_path / "in", {**CONFIGS["llama"], "eos_token_id": [3, 4], "pad_token_id": 5})
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [3, 4]
    convert(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 5
