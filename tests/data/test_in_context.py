"""The whole way from texts to rows of related documents: what stays, what goes, what is made again and what is not."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from related_texts import SMALL, corpus, topics

from lmlab.core.errors import UserError
from lmlab.core.serialize import from_json, to_json
from lmlab.data.config import Bytes, DataConfig, Files
from lmlab.data.in_context import order_documents, related_documents
from lmlab.data.open import open_data
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.data.path_quality import step_similarities
from lmlab.data.stream import train_stream
from lmlab.data.vectors import corpus_of
from lmlab.objectives.next_token import label_weights
from lmlab.testing.tiny import tiny_cache


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
    assert left == set(range(60))
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


def test_a_piece_in_common_makes_no_copies(tmp_path):
    licence = " ".join(f"l{i}" for i in range(20))
    texts = [f"{licence} {text}" for text in topics(40, topic_count=40)]
    config = replace(SMALL, piece_words=20, pieces="each")
    order = order_documents(config, corpus([*texts, texts[0]]), tmp_path)
    assert order.report["copies"] == 1
    assert len(order.documents) == 40


@pytest.mark.parametrize("tour", ["dynamic", "greedy_edges", "clusters", "random", "buffer_chain"])
def test_the_released_rule_for_copies_goes_along_any_path(tmp_path, tour):
    texts = [text for text in topics(30) for _ in range(2)]
    config = replace(SMALL, duplicates="prefix_jaccard", threshold=0.85, tour=tour)
    order = order_documents(config, corpus(texts), tmp_path)
    path = order.documents.tolist()
    assert len(path) == len(set(path))
    assert order.report["copies"] == len(texts) - len(path)
    assert not any(texts[a] == texts[b] for a, b in pairwise(path))


def test_documents_without_words_are_near_nobody(tmp_path):
    texts = ["", *topics(30, topic_count=3), "", "!?"]
    related = related_documents(replace(SMALL, duplicates="none"), corpus(texts), tmp_path)
    degrees = np.diff(related.graph.starts)
    assert degrees[[0, 31, 32]].tolist() == [0, 0, 0]
    assert (degrees[1:31] > 0).all()


def test_settings_of_the_graph_reach_it(tmp_path):
    def graph(**changes):
        return related_documents(replace(SMALL, duplicates="none", **changes), corpus(topics()), tmp_path).graph

    assert graph(min_sim=0.5).sims.min() >= 0.5 > graph().sims.min()
    assert np.diff(graph(max_degree=2).starts).max() == 2 < np.diff(graph().starts).max()
    assert len(graph(mutual=True).sims) < len(graph().sims)
    assert not np.allclose(np.mean(graph(center=True).sims), np.mean(graph().sims), atol=1e-3)
    with pytest.raises(UserError, match="min_sim"):
        replace(SMALL, min_sim=float("nan"))
    with pytest.raises(UserError, match="packing"):
        DataConfig(order="in_context", packing="whole")


@pytest.mark.parametrize("pieces", ["each", "mean"])
def test_long_documents_have_a_vector_for_each_piece(tmp_path, pieces):
    texts = [f"{one} {other}" for one, other in zip(topics(), topics(seed=1), strict=True)]
    config = replace(SMALL, piece_words=20, pieces=pieces, duplicates="none")
    order = order_documents(config, corpus(texts), tmp_path)
    assert sorted(order.documents.tolist()) == list(range(len(texts)))
    assert len(list(tmp_path.glob("vectors-*/document.npy"))) == (pieces == "each")


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
