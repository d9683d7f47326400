"""Models of llama2.c written here, its way of cutting text, and a real model where the data are."""

import struct
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_at_hand import data_file, records

from lmlab.core.errors import UserError
from lmlab.interop.llama2c import llama2c_tokenizer, open_llama2c
from lmlab.interop.pretrained import load_pretrained
from lmlab.models.config import RotaryConfig
from lmlab.models.transformer import transformer

WIDTH, FFN, LAYERS, HEADS, KV, VOCAB, LENGTH = SIZES = (16, 24, 2, 4, 2, 262, 8)
STORIES = "models/stories260K/stories260K.bin"
PIECES = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256)), b" ", b"a", b"ab"]


def write_model(path, vocabulary=VOCAB):
    rng = np.random.default_rng(0)
    stacks = [(WIDTH,), (WIDTH, WIDTH), (KV * 4, WIDTH), (KV * 4, WIDTH), (WIDTH, WIDTH), (WIDTH,), (FFN, WIDTH),
              (WIDTH, FFN), (FFN, WIDTH)]  # fmt: skip
    shapes = [(VOCAB, WIDTH), *((LAYERS, *shape) for shape in stacks), (WIDTH,), (LENGTH, 2), (LENGTH, 2)]
    arrays = [rng.standard_normal(shape).astype("<f4") for shape in (*shapes, *([(VOCAB, WIDTH)] * (vocabulary < 0)))]
    header = struct.pack("<7i", *SIZES[:5], vocabulary, LENGTH)
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return arrays


def write_pieces(path, pieces=PIECES):
    entries = b"".join(struct.pack("<fi", -float(i), len(piece)) + piece for i, piece in enumerate(pieces))
    path.write_bytes(struct.pack("<i", 9) + entries)


@pytest.mark.parametrize("tied", [True, False])
def test_arrays_are_read_by_their_names_in_transformers(tmp_path, tied):
    path = tmp_path / "model.bin"
    arrays = write_model(path, VOCAB if tied else -VOCAB)
    source = open_llama2c(path)
    assert (source.config["tie_word_embeddings"], source.config["vocab_size"]) == (tied, VOCAB)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight", ()), arrays[0])
    value = source.read("model.layers.1.self_attn.v_proj.weight", (slice(2, 5), slice(3, 9)))
    np.testing.assert_array_equal(value, arrays[4][1, 2:5, 3:9])
    np.testing.assert_array_equal(source.read("model.layers.0.mlp.down_proj.weight", ()), arrays[8][0])
    if not tied:
        np.testing.assert_array_equal(source.read("lm_head.weight", ()), arrays[-1])
    # Row i of the first half of a head is row 2i of the file, row i of the second half its neighbour.
    rows = [8, 10, 9, 11, 12]
    query = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(source.read(query, (slice(8, 13),)), arrays[2][1][rows])
    np.testing.assert_array_equal(source.read(query, ())[8:13], arrays[2][1][rows])


def test_the_model_rotates_neighbours(tmp_path):
    path = tmp_path / "model.bin"
    arrays = write_model(path)
    model = load_pretrained(path)
    assert model.text is None
    # The rows as they lie in the file, and the rule of llama2.c.
    raw = transformer(replace(model.config, rotary=RotaryConfig(pairs="adjacent")))
    heads = [array.reshape(LAYERS, -1, 4, WIDTH).transpose(0, 3, 1, 2) for array in (arrays[2], arrays[3])]
    layers = model.params["layers"]
    attention = layers["attention"]
    key_value = attention["key_value"]["kernel"].at[:, :, 0].set(heads[1])
    moved = attention | {"query": {"kernel": jnp.asarray(heads[0])}, "key_value": {"kernel": key_value}}
    params = model.params | {"layers": layers | {"attention": moved}}
    tokens_BT = jnp.asarray([[1, 5, 200, 7, 31]])
    ours, theirs = model.lm.apply(model.params, tokens_BT)[0], raw.apply(params, tokens_BT)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def encode(pieces: list[bytes], scores: list[float], text: str) -> list[int]:
    """As llama2.c does it: a blank in front, characters, bytes where there is none, then the best neighbours."""
    ids_of = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    ids = [ids_of[b" "]] if text else []
    for letter in text:
        code = letter.encode()
        ids += [ids_of[code]] if code in ids_of else [byte + 3 for byte in code]
    while True:
        pairs = [pieces[left] + pieces[right] for left, right in pairwise(ids)]
        found = [(-scores[ids_of[pair]], at) for at, pair in enumerate(pairs) if pair in ids_of]
        if not found:
            return ids
        at = min(found)[1]
        ids[at : at + 2] = [ids_of[pairs[at]]]


def test_text_is_cut_by_scores(tmp_path):
    write_pieces(tmp_path / "tok.bin")
    tokenizer = llama2c_tokenizer(tmp_path / "model.bin").tokenizer
    assert (tokenizer.begin_ids, tokenizer.end_ids, tokenizer.vocab_size) == ((1,), (1, 2), VOCAB)
    scores = [-float(i) for i in range(VOCAB)]
    for text in ["ab", "aab b", "é", "<s>a", ""]:
        ids_T = tokenizer.encode_batch([text])[0]
        assert ids_T.tolist() == encode(PIECES, scores, text)
        assert tokenizer.decode(ids_T) == text


def test_stories_are_cut_as_llama2c_cuts_them():
    file = data_file("models/stories260K/tok512.bin")
    tokenizer = llama2c_tokenizer(file).tokenizer
    data, place, pieces, scores = file.read_bytes(), 4, [], []
    while place < len(data):
        score, size = struct.unpack_from("<fi", data, place)
        pieces.append(data[place + 8 : place + 8 + size])
        scores.append(score)
        place += 8 + size
    # Longer ones take this loop too long.
    texts = [record["text"][:400] for record in records("text/tinystories_sample.jsonl.gz", 150)]
    texts += [record["text"][:300] for record in records("text/c4_sample.jsonl.gz", 50)]
    texts += ["aaaa eee  ll\n\n", "é 漢字 🧑‍🚀", " ", "Lily's"]
    for text, ids_T in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids_T.tolist() == encode(pieces, scores, text), text
        assert tokenizer.decode(ids_T) == text


def test_stories260k_expects_stories():
    model = load_pretrained(data_file(STORIES))
    texts = [record["text"] for record in records("text/tinystories_sample.jsonl.gz", 12)]
    rows = [[*model.text.tokenizer.begin_ids, *ids_T][:200] for ids_T in model.text.tokenizer.encode_batch(texts)]
    tokens_BT = jnp.asarray([row for row in rows if len(row) == 200])
    logprobs_BTV = jax.nn.log_softmax(model.lm.logits(model.params, model.lm.apply(model.params, tokens_BT[:, :-1])[0]))
    chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], -1)
    assert float(jnp.exp(-chosen_BT.mean())) < 4.5  # Halves for neighbours: over 200.


def test_faults(tmp_path):
    path = tmp_path / "model.bin"
    with pytest.raises(UserError, match=r"existing \.bin"):
        open_llama2c(path)
    write_model(path)
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole + b"\0\0\0\0", whole[:3000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="bytes, as the sizes say"):
            open_llama2c(path)
    for other in (b"", whole[:20], b"ak42" + whole[4:]):
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"model\.bin"):
            open_llama2c(path)
    write_pieces(tmp_path / "tok.bin", PIECES[:200])
    with pytest.raises(UserError, match="at least 259 pieces, not 200"):
        llama2c_tokenizer(path)
    write_pieces(tmp_path / "tok.bin")
    (tmp_path / "tok.bin").write_bytes((tmp_path / "tok.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="whole vocabulary"):
        llama2c_tokenizer(path)
    (tmp_path / "tok2.bin").touch()
    with pytest.raises(UserError, match=r"one tok\*.bin"):
        llama2c_tokenizer(path)
