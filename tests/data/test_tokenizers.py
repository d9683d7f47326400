"""Round trips on nasty text, bytes per token, special text as plain text, saving, and faults."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lmlab.core.errors import UserError
from lmlab.data.config import Bytes, TokenizerFile, TrainedBPE
from lmlab.data.sources import Document
from lmlab.data.spellings import spellings
from lmlab.data.tokenizers import build_tokenizer, load_tokenizer, wrap_tokenizer

CORPUS = [Document(str(i), f"the cat {i} sat on the mat; " * 20) for i in range(50)]


def build(config, tmp_path):
    return build_tokenizer(config, lambda: iter(CORPUS), tmp_path, "corpus")


@pytest.fixture(params=["bytes", "trained", "byte_level_file", "byte_fallback_file"])
def tokenizer(request, tmp_path):
    if request.param == "bytes":
        return build(Bytes(), tmp_path)
    if request.param == "trained":
        return build(TrainedBPE(400), tmp_path)
    make = byte_level if request.param == "byte_level_file" else byte_fallback
    path = tmp_path / "given.json"
    make().save(str(path))
    return build(TokenizerFile(str(path)), tmp_path)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*alphabet, "th", "the"])}, [("t", "h"), ("th", "e")])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    model.add_tokens([AddedToken("   ", normalized=False)])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    model.enable_truncation(5)
    return model


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "é", "漢", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    return model


def test_text_survives_and_bytes_add_up(tokenizer, nasty):
    for text, ids_T in zip(nasty, tokenizer.encode_batch(nasty), strict=True):
        assert ids_T.dtype == np.int32
        assert tokenizer.decode(ids_T) == text
        assert tokenizer.token_bytes_V[ids_T].sum() == len(text.encode())
        assert tokenizer.end_id not in ids_T


def test_spellings_of_tokens_are_the_text(tokenizer, nasty):
    assert len(tokenizer.spellings_V) == tokenizer.vocab_size
    for text, ids_T in zip(nasty, tokenizer.encode_batch(nasty), strict=True):
        assert b"".join(tokenizer.spellings_V[i] for i in ids_T) == text.encode()


def test_signs_of_word_pieces_are_text_in_other_vocabularies():
    words = {"##": 0, "####": 1, "▁#": 2, "##ing": 3, "[SEP]": 4}
    pieces = Tokenizer(models.BPE(words, [], unk_token="##"))
    assert spellings(pieces, 5)[:4] == (b"##", b"####", b" #", b"##ing")
    assert spellings(Tokenizer(models.WordPiece(words, unk_token="[SEP]")), 6)[3:] == (b"ing", b"[SEP]", b"")


def test_special_tokens_have_no_bytes_and_no_text(tokenizer):
    assert tokenizer.token_bytes_V.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes_V[tokenizer.end_id] == 0
    assert tokenizer.spellings_V[tokenizer.end_id] == b""
    assert tokenizer.decode([tokenizer.end_id]) == ""


def test_saved_tokenizer_needs_nothing_else(tokenizer, tmp_path, nasty):
    folder = tmp_path / "run"
    folder.mkdir()
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert (loaded.fingerprint, loaded.end_id, loaded.vocab_size) == (
        tokenizer.fingerprint, tokenizer.end_id, tokenizer.vocab_size,
    )  # fmt: skip
    for one, other in zip(tokenizer.encode_batch(nasty), loaded.encode_batch(nasty), strict=True):
        np.testing.assert_array_equal(one, other)


def test_marked_text_says_where_its_tokens_lie(tokenizer, nasty):
    for text in nasty:
        ids_T, spans_T2 = tokenizer.encode_marked(text)
        assert tokenizer.decode(ids_T) == text or "</s>" in text
        assert (spans_T2 >= 0).all()
        assert (np.diff(spans_T2[:, 0]) >= 0).all()
        assert spans_T2.max(initial=0) == len(text)


def test_marked_text_holds_special_tokens_and_plain_text_does_not(tmp_path):
    byte_level().save(str(tmp_path / "given.json"))
    tokenizer = build(TokenizerFile(str(tmp_path / "given.json")), tmp_path)
    ids_T, spans_T2 = tokenizer.encode_marked("<s>the</s>")
    assert ids_T.tolist() == [258, 257, 259]
    assert spans_T2.tolist() == [[0, 3], [3, 6], [6, 10]]
    assert not {258, 259} & set(tokenizer.encode_batch(["<s>the</s>"])[0].tolist())


def test_beginning_and_ends_survive(tmp_path):
    wrap_tokenizer(byte_level(), "</s>", (258,), (259, 258)).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.begin_ids, loaded.end_ids) == ((258,), (259, 258))


def test_bytes_decode_what_is_not_utf8():
    tokenizer = build(Bytes(), None)
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.decode([256, 0xE9, 97, 256]) == "\ufffda"


def test_trained_bpe_is_cached_and_follows_its_inputs(tmp_path):
    first = build(TrainedBPE(300), tmp_path)
    assert first.vocab_size <= 300
    assert len(first.encode_batch(["the cat"])[0]) < 7

    def never():
        raise AssertionError("read again")

    again = build_tokenizer(TrainedBPE(300), never, tmp_path, "corpus")
    assert again.fingerprint == first.fingerprint
    assert build(TrainedBPE(280), tmp_path).fingerprint != first.fingerprint


def test_trained_bpe_stops_at_train_bytes(tmp_path):
    read = []
    documents = (read.append(d.id) or d for d in CORPUS)
    build_tokenizer(TrainedBPE(300, train_bytes=1000), lambda: documents, tmp_path, "x")
    assert len(read) == 2


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_trained_bpe_is_the_same_in_every_process(tmp_path, hash_seed):
    code = (
        "import sys; from pathlib import Path; from lmlab.data.config import TrainedBPE;"
        "from lmlab.data.sources import Document; from lmlab.data.tokenizers import build_tokenizer;"
        "docs = [Document(str(i), f'the cat {i} sat on the mat; ' * 20) for i in range(50)];"
        "print(build_tokenizer(TrainedBPE(400), lambda: iter(docs), Path(sys.argv[1]), 'c').fingerprint)"
    )
    folder = tmp_path / hash_seed
    folder.mkdir()
    here = build(TrainedBPE(400), tmp_path)
    run = [sys.executable, "-c", code, str(folder)]
    there = subprocess.run(run, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed})
    assert there.stdout.strip() == here.fingerprint


def test_end_token_by_name(tmp_path):
    path = tmp_path / "given.json"
    byte_level().save(str(path))
    assert build(TokenizerFile(str(path)), tmp_path).end_id == 259
    assert build(TokenizerFile(str(path), end_token="<s>"), tmp_path).end_id == 258


def test_faults_of_tokenizer_files(tmp_path):
    def message(**fields) -> str:
        with pytest.raises(UserError) as caught:
            build(TokenizerFile(**fields), tmp_path)
        return str(caught.value)

    assert "existing tokenizer.json" in message(path=str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"a": 1}))
    assert "data.tokenizer.path" in message(path=str(tmp_path / "bad.json"))
    byte_level().save(str(tmp_path / "given.json"))
    missing = message(path=str(tmp_path / "given.json"), end_token="<stop>")
    assert "data.tokenizer.end_token = '<stop>'" in missing
    assert "</s>, <s>" in missing
    with pytest.raises(UserError, match="saved tokenizer"):
        load_tokenizer(tmp_path)
