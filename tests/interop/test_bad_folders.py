"""Folders that cannot be used, in or out: one clear message each, in time, and nothing half-written."""

import errno
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIGS, weight, write_tiny

from lmlab.core.errors import UserError
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.interop import huggingface
from lmlab.interop.huggingface import open_folder, save_pretrained, whole_folder, write_folder
from lmlab.interop.pretrained import load_pretrained
from lmlab.interop.tensor_files import INDEX, WHOLE
from lmlab.interop.tokenizer_files import TokenizerFiles, write_tokenizer_files
from lmlab.testing.tiny import tiny_config

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edited(folder, edit):
    """The folder with its tensors as `edit` leaves them."""
    held = load_file(folder / WHOLE)
    edit(held)
    save_file(held, folder / WHOLE)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder):
    edited(folder, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))


def drop_head(folder):
    edited(folder, lambda held: held.pop(HEAD))


def add(folder):
    edited(folder, lambda held: held.update({"model.layers.0.self_attn.q_proj.lora_A.weight": weight("a", (2, 2))}))


def add_layer(folder):
    edited(folder, lambda held: held.update({"model.layers.2.input_layernorm.weight": weight("a", (16,))}))


def reshape(folder):
    edited(folder, lambda held: held.update({"model.norm.weight": weight("a", (17,))}))


def quantise(folder):
    edited(folder, lambda held: held.update({"model.norm.weight": np.ones(16, np.int8)}))


def truncate(folder):
    data = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(data[:-5])


def empty(folder):
    (folder / WHOLE).write_bytes(b"")


def only_pickles(folder):
    (folder / WHOLE).rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / WHOLE).unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text("{")


def list_config(folder):
    (folder / "config.json").write_text("[]")


def tie_another_head(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)


def larger_vocabulary(folder):
    edit_json(folder / "config.json", vocab_size=25)


def larger_tokenizer(folder):
    write_tokenizer_files(folder, TokenizerFiles(byte_tokenizer(), None, None))


def tokenizer_of_sentencepiece(folder):
    (folder / "tokenizer.model").write_bytes(b"x")


BAD = {
    drop: "model.layers.1.mlp.up_proj.weight': expected all tensors",
    drop_head: "set tie_word_embeddings",
    add: "lora_A.weight': expected no tensors that config.json does not account for",
    add_layer: "model.layers.2.input_layernorm.weight': expected no tensors",
    reshape: "model.norm.weight = [17]: expected the shape [16], by config.json",
    quantise: "model.norm.weight = 'I8': expected one of BF16, F16, F32",
    truncate: "expected a whole safetensors file",
    empty: "expected a whole safetensors file",
    only_pickles: "It has pytorch_model.bin",
    no_weights: f"expected a folder with {WHOLE} or {INDEX}.",
    no_config: "a folder with config.json, a .gguf file",
    broken_config: "expected readable JSON",
    list_config: "expected a JSON object",
    tie_another_head: f"{HEAD} = 'another table than the embedding'",
    larger_tokenizer: "tokenizer = 257: expected at most as many tokens as the model has, 24",
    tokenizer_of_sentencepiece: "a folder with tokenizer.json",
    larger_vocabulary: f"{EMBEDDING} = [24, 16]: expected the shape [25, 16]",
}


def fails(folder, message, monkeypatch):
    """Loading says so, and reads no parameter before it does."""
    monkeypatch.setattr("lmlab.interop.weights._load_leaf", lambda *_: pytest.fail("read before all was checked"))
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_folder_that_cannot_be_used_says_why(spoil, tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "model", CONFIGS["llama"])
    spoil(folder)
    fails(folder, BAD[spoil], monkeypatch)


def missing_shard(folder, index, names):
    (folder / names[1]).unlink()


def truncated_shard(folder, index, names):
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-1])


def index_of_nothing(folder, index, names):
    edit_json(folder / INDEX, weight_map=index | {"model.ghost.weight": names[0]})


def index_elsewhere(folder, index, names):
    edit_json(folder / INDEX, weight_map=index | {EMBEDDING: names[1]})


def index_outside(folder, index, names):
    edit_json(folder / INDEX, weight_map=index | {EMBEDDING: "../" + names[0]})


def no_map(folder, index, names):
    (folder / INDEX).write_text("{}")


def odd_map(folder, index, names):
    (folder / INDEX).write_text('{"weight_map": {"a": 3}}')


BAD_SHARDS = {
    missing_shard: "expected an existing file, since model.safetensors.index.json names it",
    truncated_shard: "expected a whole safetensors file",
    index_of_nothing: "model.ghost.weight = 'model-00001-of-",
    index_elsewhere: f"{EMBEDDING} = 'model-00002-of-",
    index_outside: "expected the name of a file in the folder",
    no_map: "the weight_map of safetensors",
    odd_map: "the weight_map of safetensors",
}


@pytest.mark.parametrize("spoil", BAD_SHARDS, ids=lambda spoil: spoil.__name__)
def test_shards_that_cannot_be_used_say_why(spoil, tmp_path, monkeypatch):
    folder = write_tiny(tmp_path / "model", CONFIGS["llama"], shard_bytes=4000)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    spoil(folder, index, sorted(set(index.values())))
    fails(folder, BAD_SHARDS[spoil], monkeypatch)


def test_names_of_old_files_are_understood(tmp_path):
    gpt2, neox = (write_tiny(tmp_path / name, CONFIGS[name]) for name in ("gpt2", "neox"))
    before = open_folder(gpt2).shapes, open_folder(neox).shapes
    held = load_file(gpt2 / WHOLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    save_file(bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8)}, gpt2 / WHOLE)
    held = load_file(neox / WHOLE)
    held["lm_head.weight"] = held.pop("embed_out.weight")
    save_file(held | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float32)}, neox / WHOLE)
    assert (open_folder(gpt2).shapes, open_folder(neox).shapes) == before
    read = open_folder(gpt2).read("transformer.h.0.ln_1.weight", (slice(2, 5),))
    np.testing.assert_array_equal(read, weight("transformer.h.0.ln_1.weight", (16,))[2:5])


def test_a_head_that_repeats_the_embedding_may_be_there_though_tied(tmp_path):
    folder = write_tiny(tmp_path / "model", CONFIGS["llama_tied"])
    edited(folder, lambda held: held.update({HEAD: held[EMBEDDING]}))
    assert set(load_pretrained(folder).params) == {"embedding", "layers", "final_norm"}


def export(folder, make=None, **options):
    options = {"dtype": "float32", **options}
    write_folder(folder, {}, {"a": (4,)}, make or (lambda name: np.ones(4, np.float32)), None, **options)


def test_nothing_is_overwritten_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="a folder that is empty, or does not exist yet"):
            export(tmp_path / name)
    assert (tmp_path / "full/note").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    export(tmp_path / "new/deep")
    assert (tmp_path / "empty/config.json").exists()
    assert (tmp_path / "new/deep/config.json").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(error, tmp_path):
    def make(name):
        raise error

    with pytest.raises((UserError, KeyboardInterrupt)) as raised:
        export(tmp_path / "out", make)
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_folder_does_not_have_the_name(tmp_path):
    with whole_folder(tmp_path / "out") as partial:
        assert partial.parent == tmp_path
        assert not (tmp_path / "out").exists()
        (partial / "a").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype = 'float64': expected one of float32, bfloat16, float16"),
        ({"shard_bytes": 0}, "shard_bytes = 0"),
        ({"dtype": "float16", "make": lambda name: np.full(4, 1e5, np.float32)}, "a = 100000.0: expected finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_told(options, message, tmp_path):
    with pytest.raises(UserError) as error:
        export(tmp_path / "out", **options)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_family_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="'none'"):
        save_pretrained(tmp_path / "out", tiny_config(positions="none"), {})
    assert list(tmp_path.iterdir()) == []


def test_types_of_parameters_are_checked(tmp_path):
    with pytest.raises(UserError, match="dtype = 'float16'"):
        load_pretrained(write_tiny(tmp_path / "model", CONFIGS["llama"]), dtype="float16")
    assert huggingface.SHARD_BYTES == 5 * 10**9


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ([], "nowhere", "a folder with config.json, a .gguf file, or a .bin of llama2.c"),
        ([], ".", "a folder with config.json"),
        (["a.gguf", "b.gguf"], ".", "the folder has several .gguf files"),
        (["a.txt"], "a.txt", "a folder with config.json"),
        (["a.bin"], "a.bin", "a.bin"),
    ],
)
def test_what_is_no_model_is_told(files, path, message, tmp_path):
    for name in files:
        (tmp_path / name).write_text("no model")
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / path)
    assert message in str(error.value)
