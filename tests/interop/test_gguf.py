"""GGUF files written here: names, shapes, parts, orders of rows and fields; and a real model where it is installed."""

import gzip
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from data_at_hand import data_file, records, smollm2_file
from tokenizers import Tokenizer

from lmlab.core.errors import UserError
from lmlab.interop.families import read_config
from lmlab.interop.gguf import gguf_tokenizer, open_gguf
from lmlab.interop.pretrained import load_pretrained
from lmlab.interop.weights import load_params
from lmlab.models.transformer import transformer

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF files: pip install gguf")
HEADS, KV, HEAD, WIDTH, FFN, VOCAB = 4, 2, 8, 32, 64, 96
SIZES = {
    "block_count": 1, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": FFN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.freq_base": 500.0,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": HEAD, "vocab_size": VOCAB,
}  # fmt: skip
LAYER = {
    "attn_norm": (WIDTH,), "attn_q": (HEADS * HEAD, WIDTH), "attn_k": (KV * HEAD, WIDTH), "attn_v": (KV * HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD), "ffn_norm": (WIDTH,), "ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH),
    "ffn_down": (WIDTH, FFN),
}  # fmt: skip
BLOCK = "blk.0."


def arrays(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def llama(**more: tuple[int, ...]) -> dict:
    layer = {f"{BLOCK}{name}.weight": shape for name, shape in LAYER.items()}
    return arrays({"token_embd.weight": (VOCAB, WIDTH), **layer, "output_norm.weight": (WIDTH,), **more})


@pytest.fixture
def write(tmp_path):
    def make(tensors: dict, fields: dict | None = None, architecture: str = "llama", kind: str = "F32", **about):
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        numbers = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        for name, value in (SIZES if fields is None else fields).items():
            numbers.get(type(value), writer.add_array)(f"{architecture}.{name}", value)
        for name, value in about.items():
            numbers.get(type(value), writer.add_array)(f"tokenizer.{name.replace('__', '.')}", value)
        quantised = gguf.GGMLQuantizationType[kind]
        for name, array in tensors.items():
            if array.ndim == 1 or kind == "F32":
                writer.add_tensor(name, array)
            else:
                writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def test_a_llama_is_read_as_transformers_names_it(write):
    tensors = llama()
    source = open_gguf(write(tensors))
    assert source.config == {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": FFN,
        "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": HEAD,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": None,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assert source.shapes["model.layers.0.mlp.down_proj.weight"] == (WIDTH, FFN)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight", ()), tensors["token_embd.weight"])
    down = source.read("model.layers.0.mlp.down_proj.weight", (slice(3, 9), slice(10, 20)))
    np.testing.assert_array_equal(down, tensors["blk.0.ffn_down.weight"][3:9, 10:20])
    model = load_pretrained(write(tensors))
    assert (model.config.head_dim, model.text) == (HEAD, None)


def permuted(matrix: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys of transformers (`LlamaModel.permute`)."""
    return matrix.reshape(-1, 2, HEAD // 2, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


@pytest.mark.parametrize(("architecture", "moved"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_rows_of_queries_and_keys_come_back_to_their_places(write, architecture, moved):
    wanted = llama()
    stored = dict(wanted)
    for name in ("attn_q", "attn_k"):
        wanted[f"{BLOCK}{name}.bias"] = np.arange(len(wanted[f"{BLOCK}{name}.weight"]), dtype=np.float32)
        for kind in ("weight", "bias"):
            key = f"{BLOCK}{name}.{kind}"
            stored[key] = permuted(wanted[key]) if moved else wanted[key]
    source = open_gguf(write(stored, architecture=architecture))
    for name, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        for kind in ("weight", "bias"):
            whole, tensor = wanted[f"{BLOCK}{name}.{kind}"], f"model.layers.0.self_attn.{ours}.{kind}"
            np.testing.assert_array_equal(source.read(tensor, ()), whole)
            np.testing.assert_array_equal(source.read(tensor, (slice(3, 13),)), whole[3:13])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_parts_of_any_type_are_parts_of_the_whole(write, kind):
    tensors = llama()
    source = open_gguf(write(tensors, kind=kind))
    whole = source.read("model.layers.0.mlp.up_proj.weight", ())
    assert whole.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    tolerance = {"F32": 0, "F16": 1e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_1": 0.3}[kind]
    np.testing.assert_allclose(whole.astype(np.float32), tensors["blk.0.ffn_up.weight"], atol=tolerance, rtol=tolerance)
    for rows, columns in ((slice(5, 17), slice(None)), (slice(None), slice(7, 30)), (slice(5, 6), slice(31, 32))):
        part = source.read("model.layers.0.mlp.up_proj.weight", (rows, columns))
        np.testing.assert_array_equal(part, whole[rows, columns])
    queries = source.read("model.layers.0.self_attn.q_proj.weight", ())
    part = source.read("model.layers.0.self_attn.q_proj.weight", (slice(6, 21), slice(1, 5)))
    np.testing.assert_array_equal(part, queries[6:21, 1:5])


def test_gpt2_is_turned_as_transformers_has_it(write):
    fields = {name: SIZES[name] for name in list(SIZES)[:5]} | {"attention.layer_norm_epsilon": 1e-5}
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH), "position_embd.weight": (64, WIDTH), "output_norm.weight": (WIDTH,),
        "output_norm.bias": (WIDTH,),
    }  # fmt: skip
    for name, shape in {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (FFN, WIDTH),
                        "ffn_down": (WIDTH, FFN)}.items():  # fmt: skip
        shapes |= {f"{BLOCK}{name}.weight": shape, f"{BLOCK}{name}.bias": shape[:1]}
    for name in ("attn_norm", "ffn_norm"):
        shapes |= {f"{BLOCK}{name}.weight": (WIDTH,), f"{BLOCK}{name}.bias": (WIDTH,)}
    tensors = arrays(shapes)
    path = write(tensors, fields, "gpt2")
    source = open_gguf(path)
    name = "transformer.h.0.attn.c_attn.weight"
    assert source.shapes[name] == (WIDTH, 3 * WIDTH)
    part = source.read(name, (slice(2, 5), slice(30, 40)))
    np.testing.assert_array_equal(part, tensors["blk.0.attn_qkv.weight"].T[2:5, 30:40])
    loaded = load_params(source, read_config(source.config))
    np.testing.assert_array_equal(loaded["layers"]["mlp"]["up"]["kernel"][0], tensors["blk.0.ffn_up.weight"].T)


def test_scaling_of_rotary_frequencies(write):
    linear = write(llama(), SIZES | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert open_gguf(linear).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    long = SIZES | {"rope.freq_base": 500000.0}
    periods = [2 * math.pi * 500000.0 ** (i / HEAD) for i in range(0, HEAD, 2)]
    # As llama.cpp's converter makes them of Llama 3.1: factor 8, 1 and 4, 8192.
    smooth = [(8192 / period - 1) / 3 for period in periods]
    factors = [
        1.0 if p < 2048 else 8.0 if p > 8192 else 1 / ((1 - s) / 8 + s) for p, s in zip(periods, smooth, strict=True)
    ]
    tensors = llama() | {"rope_freqs.weight": np.asarray(factors, np.float32)}
    assert read_config(open_gguf(write(tensors, long)).config).rotary.scaling == "llama3"
    with pytest.raises(UserError, match=r"rope_freqs.*Llama 3.1"):
        open_gguf(write(llama() | {"rope_freqs.weight": np.asarray([1, 2, 3, 4], np.float32)}, long))


@pytest.mark.parametrize(
    ("fields", "architecture", "message"),
    [
        ({}, "falcon", "general.architecture = 'falcon'.*llama, qwen2"),
        ({"expert_count": 8}, "llama", "llama.expert_count = 8"),
        ({"rope.scaling.type": "yarn"}, "llama", "rope.scaling.type = 'yarn'"),
        ({"attention.head_count_kv": [2, 1]}, "llama", "one value for all layers"),
        ({"rope.dimension_count": 4}, "llama", "size of a head, 8"),
    ],
)
def test_what_lmlab_does_not_have_is_named(write, fields, architecture, message):
    with pytest.raises(UserError, match=message):
        open_gguf(write(llama(), SIZES | fields, architecture))


def test_damaged_files_are_one_message_each(write, tmp_path):
    path = write(llama())
    whole = path.read_bytes()
    for size in (6, 40, 200, 600, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a whole GGUF file .*Download it again"):
            open_gguf(path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(UserError, match="begins otherwise"):
        open_gguf(path)
    with pytest.raises(UserError, match="existing GGUF file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match=r"blk.0.attn_sinks.weight is none"):
        open_gguf(write(llama(**{"blk.0.attn_sinks.weight": (4,)})))


def test_byte_level_vocabulary_with_its_markers_and_chat(write):
    letters = [*"abchet", "Ġ", "th", "the"]
    about = {
        "ggml__model": "gpt2", "ggml__pre": "gpt-2", "ggml__tokens": ["<|end|>", "<|user|>", *letters],
        "ggml__token_type": [3, 4, *[1] * len(letters)], "ggml__merges": ["t h", "th e"], "ggml__eos_token_id": 0,
        "ggml__bos_token_id": 0, "ggml__add_bos_token": True, "ggml__eot_token_id": 1,
        "chat_template": "{{ bos_token }}x",
    }  # fmt: skip
    files = gguf_tokenizer(write(llama(), **about))
    tokenizer = files.tokenizer
    assert (tokenizer.begin_ids, tokenizer.end_ids) == ((0,), (0, 1))
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == [10, 8, 4, 2, 7]
    assert tokenizer.encode_marked("<|user|>the<|end|>")[0].tolist() == [1, 10, 0]
    assert (files.chat.source, files.chat.specials) == (
        "{{ bos_token }}x",
        {"bos_token": "<|end|>", "eos_token": "<|end|>"},
    )
    with pytest.raises(UserError, match=r"tokenizer.ggml.pre = 'tekken'"):
        gguf_tokenizer(write(llama(), **about | {"ggml__pre": "tekken"}))
    with pytest.raises(UserError, match=r"tokenizer.ggml.model = 'bert'"):
        gguf_tokenizer(write(llama(), **about | {"ggml__model": "bert"}))


def test_smollm2_cuts_text_as_its_own_tokenizer(nasty_texts):
    tokenizer = gguf_tokenizer(smollm2_file()).tokenizer
    original = Tokenizer.from_str(
        gzip.decompress(data_file("tokenizers/smollm2/tokenizer.json.gz").read_bytes()).decode()
    )
    texts = [record["text"] for record in records("text/c4_sample.jsonl.gz", 100)] + nasty_texts
    for text, ids_T in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids_T.tolist() == original.encode(text).ids
        assert tokenizer.decode(ids_T) == text


@pytest.fixture
def nasty_texts():
    return ["", "  two  spaces\n\n\tand tabs ", "é 漢字 🧑‍🚀", "12345 x=1; don't WE'LL"]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france_and_plain_english():
    model = load_pretrained(smollm2_file())
    tokenizer = model.text.tokenizer
    plain = (
        "Photosynthesis is the process by which green plants use sunlight to make food from carbon dioxide and water."
    )
    prompt_BT, plain_BT = (
        jnp.asarray(ids_T)[None] for ids_T in tokenizer.encode_batch(["The capital of France is", plain])
    )

    def logits(lm, tokens_BT):
        return lm.logits(model.params, lm.apply(model.params, tokens_BT)[0])

    def perplexity(lm):
        logprobs_BTV = jax.nn.log_softmax(logits(lm, plain_BT[:, :-1]))
        return float(jnp.exp(-jnp.take_along_axis(logprobs_BTV, plain_BT[:, 1:, None], -1).mean()))

    assert tokenizer.decode([int(logits(model.lm, prompt_BT)[0, -1].argmax())]) == " Paris"
    wrong = replace(model.config, rotary=replace(model.config.rotary, pairs="adjacent"))
    # 10.0 and 31.7 on a CPU.
    assert perplexity(model.lm) < 11
    assert perplexity(transformer(wrong)) > 25
