"""Encoders by pooling: any LM; and MiniLM against transformers, and by numbers that transformers gave."""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmlab.core.errors import UserError
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.retrieval.bert import PACKAGE, bert, minilm
from lmlab.retrieval.build import build_encoder
from lmlab.retrieval.config import HashTfidf, MiniLM
from lmlab.retrieval.encoder import pooled_encoder
from lmlab.testing.tiny import lively, tiny_lm

TEXTS = ["A cat sat on the mat.", "A kitten rested on the rug.", "Interest rates rose again.", "", "é漢 " * 200]


def test_an_lm_is_an_encoder():
    lm = tiny_lm(vocab_size=257)
    params = lively(lm.init(jax.random.key(0)))
    hidden = lambda params, tokens, segments: lm.apply(params, tokens, segments_BT=segments)[0]
    encoder = pooled_encoder(hidden, params, byte_tokenizer().encode_batch, 16, "tiny", length=32, batch=8)
    found = encoder.fit([TEXTS])(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 1], atol=1e-5)
    (tokens_T,) = byte_tokenizer().encode_batch(TEXTS[:1])
    mean_D = np.mean(lm.apply(params, jnp.asarray(tokens_T[None]))[0][0], axis=0)
    np.testing.assert_allclose(found[0], mean_D / np.linalg.norm(mean_D), atol=1e-4)
    # What is beyond the length is not read.
    np.testing.assert_array_equal(found[4], encoder.fit([])([TEXTS[4][:20]])[0])


def test_configs_name_encoders():
    assert build_encoder(HashTfidf(dimensions=7)).dimensions == 7


def test_padding_of_a_row_changes_nothing():
    """And every weight is used: with one of them moved the states move."""
    weights = tiny_bert()
    tokens = jnp.asarray([[1, 2, 3, 4], [4, 3, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    run = lambda weights, tokens, segments: bert(weights, tokens, segments, layers=2, heads=2, eps=1e-12)
    both = run(weights, tokens, segments)
    alone = run(weights, tokens[1:, :2], segments[1:, :2])
    np.testing.assert_allclose(both[1:, :2], alone, atol=1e-5)
    for name in weights:
        moved = weights | {name: weights[name] + np.random.default_rng(1).normal(size=weights[name].shape)}
        if not name.endswith("key.bias"):  # The softmax does not see it.
            assert not np.allclose(run(moved, tokens, segments), both, atol=1e-3), name


def tiny_bert(width=8, ffn=12, vocab=5):
    rng = np.random.default_rng(0)
    sizes = {"embeddings.word_embeddings.weight": (vocab, width), "embeddings.position_embeddings.weight": (16, width),
             "embeddings.token_type_embeddings.weight": (2, width)}  # fmt: skip
    dense, norms = {}, ["embeddings.LayerNorm"]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        dense |= {f"{layer}.attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        dense |= {f"{layer}.attention.output.dense": (width, width), f"{layer}.intermediate.dense": (ffn, width),
                  f"{layer}.output.dense": (width, ffn)}  # fmt: skip
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    sizes |= {f"{name}.weight": size for name, size in dense.items()}
    sizes |= {f"{name}.bias": size[:1] for name, size in dense.items()}
    sizes |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("missing", ["folder", "weights", "shape"])
def test_what_is_no_bert_is_told_in_one_line(tmp_path, missing):
    if missing != "folder":
        kind = "gpt2" if missing == "shape" else "bert"
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "hidden_act": "gelu"}))
        save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder\.folder"):
        minilm(MiniLM(str(tmp_path / "no") if missing == "folder" else str(tmp_path)))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match=PACKAGE):
        build_encoder(MiniLM())


@pytest.fixture(scope="module")
def encode():
    try:
        return build_encoder(MiniLM(batch=8)).fit([])
    except UserError:
        pytest.skip(f"{PACKAGE} is not installed (84 MB; make parity installs it)")


def test_minilm_knows_what_texts_mean(encode):
    found = encode(TEXTS)
    assert found.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]


def test_minilm_equals_transformers(encode):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
    from lmlab.retrieval.bert import _package_folder

    folder = str(_package_folder())
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.no_grad():
        states_BTD = model(**inputs).last_hidden_state
    mask_BT1 = inputs["attention_mask"][:, :, None]
    mean_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    wanted = torch.nn.functional.normalize(mean_BD, dim=1).numpy()
    assert np.min(np.sum(encode(TEXTS) * wanted, axis=1)) > 0.9999
    np.testing.assert_allclose(encode(TEXTS), wanted, atol=1e-4)
