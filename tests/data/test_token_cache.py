"""The token cache: complete or absent, whoever dies while building it, and made anew when damaged."""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.cache import open_cache
from lmlab.data.folders import cache_root
from lmlab.data.sources import Document
from lmlab.data.tokenizers import byte_tokenizer

BUILD = """
import sys
from pathlib import Path
from lmlab.data.cache import open_cache
from lmlab.data.sources import Document
from lmlab.data.tokenizers import byte_tokenizer

documents = (Document(f"d {i}", chr(97 + i % 26) * (i % 500 + 1)) for i in range(6000))
print("begin", flush=True)
open_cache(lambda: documents, "killed", byte_tokenizer(), Path(sys.argv[1]), label="killed")
print("built", flush=True)
"""


def corpus(n: int = 6000) -> Iterator[Document]:
    return (Document(f"d {i}", chr(97 + i % 26) * (i % 500 + 1)) for i in range(n))


def never() -> Iterator[Document]:
    raise AssertionError("the documents were read again")


def open_at(folder: Path, documents=corpus, fingerprint="killed", tokenizer=None):
    return open_cache(documents, fingerprint, tokenizer or byte_tokenizer(), folder, label="killed")


def contents(folder: Path) -> dict[str, bytes]:
    (cache,) = [path for path in folder.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


def test_documents_lie_between_end_tokens_with_their_ids(tmp_path, nasty):
    documents = [Document(f"name\n{i} é", text) for i, text in enumerate(nasty)]
    cache = open_at(tmp_path, lambda: iter([documents[0], Document("empty", ""), *documents[1:]]), "nasty")
    assert cache.documents == len(nasty)
    assert cache.text_bytes == sum(len(text.encode()) for text in nasty)
    for i, document in enumerate(documents):
        begin, end = cache.offsets[i : i + 2]
        assert cache.tokens_N[begin:end].tolist() == [256, *document.text.encode(), 256]
        assert cache.document_id(i) == document.id
        assert cache.text(i, byte_tokenizer()) == document.text
    assert cache.tokens_N.dtype == np.uint16
    again = open_at(tmp_path, never, "nasty")
    np.testing.assert_array_equal(again.tokens_N, cache.tokens_N)


def test_wide_vocabularies_take_four_bytes(tmp_path):
    wide = replace(byte_tokenizer(), vocab_size=2**16 + 1, end_id=2**16, fingerprint="wide")
    cache = open_at(tmp_path, lambda: corpus(3), tokenizer=wide)
    assert cache.tokens_N.dtype == np.uint32
    assert cache.tokens_N[:3].tolist() == [65536, 97, 65536]


def test_killed_at_any_instant_then_built_equals_clean(tmp_path):
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    open_at(clean)
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", BUILD, str(killed)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begin\n"
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.communicate()
        finished = [path for path in killed.glob("tokens-*") if path.is_dir() and path.suffix != ".partial"]
        if finished:
            assert contents(killed) == contents(clean)
            shutil.rmtree(finished[0])
    open_at(killed)
    assert contents(killed) == contents(clean)
    assert not list(killed.glob("*.partial"))


def test_two_builders_at_once_build_once(tmp_path):
    run = [sys.executable, "-c", BUILD, str(tmp_path / "shared")]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("tokenising" in stderr for _, stderr in outputs) == 1
    open_at(tmp_path / "clean")
    assert contents(tmp_path / "shared") == contents(tmp_path / "clean")


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "ids.txt", "ids.npy", "meta.json"])
def test_damaged_caches_are_made_anew(tmp_path, capsys, damage, name):
    open_at(tmp_path, lambda: corpus(200))
    whole = contents(tmp_path)
    (cache,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    damage(cache / name)
    capsys.readouterr()
    open_at(tmp_path, lambda: corpus(200))
    assert "damaged and is made anew" in capsys.readouterr().err
    assert contents(tmp_path) == whole


def test_other_text_or_tokenizer_is_another_cache(tmp_path):
    fingerprints = {
        open_at(tmp_path, lambda: corpus(3), name, tokenizer).fingerprint
        for name in ("one", "two")
        for tokenizer in (byte_tokenizer(), replace(byte_tokenizer(), fingerprint="other"))
    }
    assert len(fingerprints) == 4


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_corpus(tmp_path, texts):
    with pytest.raises(UserError, match=r"'killed': expected at least one document with text.*heldout_percent"):
        open_at(tmp_path, lambda: iter(Document("d", text) for text in texts))
    assert not list(tmp_path.glob("tokens-*/"))


@pytest.mark.parametrize("bad", [300, -1])
def test_token_outside_the_vocabulary_names_its_document(tmp_path, bad):
    def encode_batch(texts):
        return [np.array([1, bad] if "c" in text else [1], np.int32) for text in texts]

    with pytest.raises(UserError, match=rf"token id = {bad}: expected 0 to 256.*document d 2 of killed"):
        open_at(tmp_path, tokenizer=replace(byte_tokenizer(), encode_batch=encode_batch))
    assert not list(tmp_path.glob("tokens-*/"))


def test_full_disk_says_what_is_free_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cache_dir.*space for more than [\d,]+ bytes.*bytes are free.*another disk"):
        open_at(tmp_path)
    assert not list(tmp_path.glob("tokens-*/"))


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir.*can be written"):
        cache_root(tmp_path / "file" / "below")
    monkeypatch.setenv("LMLAB_CACHE", str(tmp_path / "from env"))
    assert cache_root() == tmp_path / "from env"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
