"""The whole way from texts to rows of related documents: what stays, what goes, what is made again and what is not."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.core.serialize import from_json, to_json
from lmlab.data import stages, vectors
from lmlab.data.config import Bytes, DataConfig, Files, InContextOrder
from lmlab.data.in_context import order_documents, related_documents
from lmlab.data.open import open_data
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.data.path_quality import step_similarities
from lmlab.data.stream import train_stream
from lmlab.data.vectors import Corpus, corpus_of
from lmlab.objectives.next_token import label_weights
from lmlab.retrieval.config import ExactSearch, HashTfidf
from lmlab.testing.tiny import tiny_cache

SMALL = InContextOrder(encoder=HashTfidf(dimensions=64, bits=12), neighbours=6)


def topics(count=120, topic_count=12, seed=0) -> list[str]:
    """Texts of a few words of one topic each, in a random order."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"t{topic}w{w}" for w in rng.integers(0, 12, 20)) for topic in rng.integers(0, topic_count, count)]


def corpus(texts, name="train") -> Corpus:
    sizes_N = np.asarray([len(text) + 2 for text in texts])
    return Corpus(len(texts), texts.__getitem__, sizes_N, f"{name} {hash(tuple(texts))}", name)


def related_share(texts, order) -> float:
    """Share of neighbours in the order that have a topic in common."""
    names = [texts[i].split("w")[0] for i in order]
    return float(np.mean([a == b for a, b in pairwise(names)]))


@pytest.mark.parametrize("tour", ["dynamic", "static", "greedy_edges", "release", "buffer_chain", "clusters", "random"])
@pytest.mark.parametrize("link", [False, True])
def test_every_rule_orders_every_kept_document_once(tmp_path, tour, link):
    if link and tour in ("buffer_chain", "clusters", "random"):
        with pytest.raises(UserError, match="link_fragments"):
            replace(SMALL, tour=tour, link_fragments=link)
        return
    texts = topics()
    config = replace(SMALL, tour=tour, link_fragments=link, duplicates="none")
    order = order_documents(config, corpus(texts), tmp_path)
    assert sorted(order.documents.tolist()) == list(range(len(texts)))
    assert (related_share(texts, order.documents) > 0.5) == (tour != "random")
    assert order.report["similarity"] == pytest.approx(
        float(
            np.mean(step_similarities(order.documents, related_documents(config, corpus(texts), tmp_path).vectors_nD))
        )
    )


def test_windows_of_neighbours_spend_the_same_tokens(tmp_path):
    texts = topics()
    source = corpus(texts)
    order = order_documents(replace(SMALL, tour="neighbours"), source, tmp_path, length=400)
    assert max(Counter(order.documents.tolist()).values()) > 1
    assert 0 <= source.sizes_N[order.documents].sum() - source.sizes_N.sum() < source.sizes_N.max()


def test_bm25_chains_related_documents(tmp_path):
    texts = topics()
    config = replace(SMALL, tour="buffer_chain", scorer="bm25", buffer=50, duplicates="none")
    order = order_documents(config, corpus(texts), tmp_path, length=500)
    assert sorted(order.documents.tolist()) == list(range(len(texts)))
    assert related_share(texts, order.documents) > 0.6


@pytest.mark.parametrize("how", ["cosine", "minhash", "exact"])
def test_planted_copies_go_and_one_of_each_stays(tmp_path, how):
    texts = topics(60)
    copies = [text.upper() + "  " for text in texts[:10]]
    near = [f"{text} t0w1" for text in texts[10:20]] if how == "cosine" else []
    every = texts + copies + near
    config = replace(SMALL, duplicates=how, threshold=0.9)
    order = order_documents(config, corpus(every), tmp_path)
    left = set(order.documents.tolist())
    assert left <= set(range(60))
    assert left == set(range(60)) or how == "cosine"
    assert order.report["copies"] == len(every) - len(left)
    # Of a document and its copy the longer stays if that is asked for.
    longest = order_documents(replace(config, keep="longest"), corpus(every), tmp_path).documents.tolist()
    assert not set(range(10)) & set(longest)
    assert set(range(60, 70)) <= set(longest) or how == "cosine"
    nothing = order_documents(replace(config, threshold=1.5), corpus(every), tmp_path).report["copies"]
    assert nothing == (len(copies) if how == "exact" else 0)


def test_what_is_near_held_out_text_is_left_out_first(tmp_path):
    texts = topics(60)
    held = corpus([texts[3], texts[7] + "!"], "heldout")
    order = order_documents(SMALL, corpus(texts), tmp_path, heldout=held)
    assert not {3, 7} & set(order.documents.tolist())
    assert order.report["held_out"] >= 2
    all_stay = replace(SMALL, heldout_threshold=2.0)
    assert order_documents(all_stay, corpus(texts), tmp_path, heldout=held).report["held_out"] == 0
    with pytest.raises(UserError, match="heldout_threshold"):
        order_documents(SMALL, corpus(texts[:2]), tmp_path, heldout=corpus(texts[:2], "heldout"))


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents(tmp_path, count):
    assert len(order_documents(SMALL, corpus(topics(count)), tmp_path).documents) == count


@pytest.mark.parametrize("pieces", ["each", "mean"])
def test_long_documents_have_a_vector_for_each_piece(tmp_path, pieces):
    texts = [f"{one} {other}" for one, other in zip(topics(), topics(seed=1), strict=True)]
    config = replace(SMALL, piece_words=20, pieces=pieces, duplicates="none")
    order = order_documents(config, corpus(texts), tmp_path)
    assert sorted(order.documents.tolist()) == list(range(len(texts)))
    assert len(list(tmp_path.glob("vectors-*/document.npy"))) == (pieces == "each")


def test_stages_are_kept_and_only_what_changes_is_made_again(tmp_path):
    texts = topics()
    order_documents(SMALL, corpus(texts), tmp_path)
    made = {path.name for path in tmp_path.glob("*-*") if path.is_dir()}
    assert Counter(name.split("-")[0] for name in made) == {"vectors": 1, "neighbours": 1, "order": 1}
    never = replace(corpus(texts), text=lambda i: pytest.fail("read again"))
    again = order_documents(SMALL, never, tmp_path, seed=5, length=7)
    order_documents(replace(SMALL, tour="static"), never, tmp_path)
    now = {path.name for path in tmp_path.glob("*-*") if path.is_dir()}
    assert Counter(name.split("-")[0] for name in now - made) == {"order": 1}
    (again.folder / "order.npy").write_bytes(b"damaged")
    fixed = order_documents(SMALL, never, tmp_path)
    np.testing.assert_array_equal(fixed.documents, order_documents(SMALL, corpus(texts), tmp_path / "other").documents)


class Killed(BaseException):
    """Stands for kill -9: nothing is caught or cleaned up for it."""


def build(folder: Path, die_at: int, monkeypatch) -> int:
    """Order a corpus in blocks of 8 and die at the n-th moment; how many moments there were."""
    moments = 0

    def moment(function):
        def passing(*args, **kwargs):
            nonlocal moments
            for when in (False, True):
                moments += 1
                if moments == die_at:
                    raise Killed
                result = None if when else function(*args, **kwargs)
                kept.append(result)
            return kept[-2]

        kept = []
        return passing

    config = replace(SMALL, search=ExactSearch(queries=32, block=32))
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "_DOCUMENTS", 32)
        for module, name in ((stages, "write_atomically"), (stages, "seal"), (stages.np.memmap, "flush"), (np, "save")):
            patch.setattr(module, name, moment(getattr(module, name)))
        order_documents(config, replace(corpus(topics()), fingerprint="fixed"), folder)
    return moments


def artefacts(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_any_moment_then_gone_on_with_equals_clean(tmp_path, monkeypatch):
    whole = build(tmp_path / "clean", 0, monkeypatch)
    assert whole > 30
    for moment in range(1, whole + 1, 3):
        folder = tmp_path / str(moment)
        with pytest.raises(Killed):
            build(folder, moment, monkeypatch)
        left = build(folder, 0, monkeypatch)
        assert artefacts(folder) == artefacts(tmp_path / "clean")
        # It went on, and did not begin anew: at most one block, and its notes, are done twice.
        assert left <= whole - moment + 9


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="space"):
        order_documents(SMALL, corpus(topics(20)), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
import lmlab.data.stages as stages
from tests.data.test_in_context import *

def note(path, text, write=stages.write_atomically):
    write(path, text)
    if text == sys.argv[2] and "neighbours" in str(path):
        os.kill(os.getpid(), 9)

stages.write_atomically = note
build(Path(sys.argv[1]), 0, pytest.MonkeyPatch())
"""


def test_a_process_that_is_killed_in_the_search_goes_on_there(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root}/tests"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), "64"], env=env, stderr=subprocess.DEVNULL,
                          check=False)  # fmt: skip
    assert done.returncode == -9
    (left,) = (tmp_path / "a").glob("neighbours-*.partial")
    assert (left / "done.txt").read_text() == "64"
    build(tmp_path / "a", 0, monkeypatch)
    build(tmp_path / "clean", 0, monkeypatch)
    assert artefacts(tmp_path / "a") == artefacts(tmp_path / "clean")


def settings(write_jsonl, tmp_path, **changes) -> DataConfig:
    path = write_jsonl("texts.jsonl", [{"text": text} for text in topics()])
    fields = {"sources": {"a": Files(str(path))}, "tokenizer": Bytes(), "length": 300, "batch_size": 2,
              "order": "in_context", "in_context": SMALL, "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    return DataConfig(**(fields | changes))


def test_a_run_reads_related_documents_in_shuffled_rows(write_jsonl, tmp_path):
    data = open_data(settings(write_jsonl, tmp_path))
    order = data.orders["a"].documents
    cache = data.caches["train"]["a"]
    found = related_documents(SMALL, corpus_of(cache, data.tokenizer, "a/train"), tmp_path / "cache",
                              heldout=corpus_of(data.caches["heldout"]["a"], data.tokenizer, "a/heldout"))  # fmt: skip
    vector = dict(zip(found.kept.tolist(), found.vectors_nD, strict=True))
    rows = [data.train.batch_at(step) for step in range(data.train.rows // 2)]
    assert data.summary["a/train/order"] == data.orders["a"].folder.name
    # Within a row neighbours are related, and rows that follow one another in the stream are no more so than any.
    packing = lay_out(cache.tokens_N, cache.offsets, length=300, order=np.asarray(order))
    near, across = [], []
    documents = {row_at(packing, r).tokens_T.tobytes(): row_at(packing, r).documents for r in range(packing.rows)}
    stream = [documents[row.tobytes()] for batch in rows for row in batch.tokens_BT]
    for row, following in pairwise(stream):
        near += [vector[int(a)] @ vector[int(b)] for a, b in pairwise(row)]
        across.append(
            np.mean([vector[int(a)] for a in row], axis=0) @ np.mean([vector[int(b)] for b in following], axis=0)
        )
    chance = np.mean(np.stack(list(vector.values())) @ np.stack(list(vector.values())).T)
    assert np.mean(near) > 4 * chance
    assert abs(np.mean(across) - chance) < 0.2
    assert np.mean(near) > 1.5 * np.mean(across)


def test_rows_in_path_order_give_back_the_tokens_of_the_path(write_jsonl, tmp_path):
    data = open_data(settings(write_jsonl, tmp_path))
    cache, order = data.caches["train"]["a"], np.asarray(data.orders["a"].documents)
    packing = lay_out(cache.tokens_N, cache.offsets, length=300, order=order)
    rows = [row_at(packing, r) for r in range(packing.rows)]
    tokens = np.concatenate([row.tokens_T[:300][row.segments_T[:300] > 0] for row in rows])
    path = np.concatenate([cache.tokens_N[cache.offsets[i] : cache.offsets[i + 1]] for i in order])
    np.testing.assert_array_equal(tokens, path)
    for row in rows:
        # A segment rises by one where the end token of a document is followed by that of the next.
        inside = row.segments_T > 0
        steps = np.diff(row.segments_T[inside])
        begins = (row.tokens_T[inside][:-1] == 256) & (row.tokens_T[inside][1:] == 256)
        np.testing.assert_array_equal(steps, begins)
    labels = sum(int(np.sum(label_weights(stack_rows([row], 1, 301)))) for row in rows)
    assert labels == len(path) - len(order)


def test_a_stream_that_has_no_order_yet_says_so():
    config = DataConfig(sources={"a": Files("a")}, order="in_context")
    with pytest.raises(UserError, match=r"data\.order"):
        train_stream(config, {"a": tiny_cache()})


def test_settings_and_report_survive_json(tmp_path):
    order = order_documents(SMALL, corpus(topics(40)), tmp_path)
    assert json.loads((order.folder / "report.json").read_text()) == order.report
    assert from_json(to_json(SMALL)) == SMALL
