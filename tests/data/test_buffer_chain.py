"""The chain through a buffer: everything once, the best of the buffer next; BM25 by its formula; baselines."""

import math
from collections import Counter

import numpy as np
import pytest

from lmlab.data.baselines import cluster_order, neighbour_windows
from lmlab.data.buffer_chain import bm25_scorer, buffer_chain, vector_scorer
from lmlab.data.graph import build_graph
from lmlab.retrieval.encoder import unit_rows


@pytest.mark.parametrize("buffer", [1, 3, 50])
@pytest.mark.parametrize("length", [0, 5])
def test_every_document_once_and_the_best_of_the_buffer_next(buffer, length):
    rng = np.random.default_rng(0)
    vectors, sizes = unit_rows(rng.standard_normal((20, 4))), rng.integers(1, 4, 20)
    order = rng.permutation(20)
    found = list(buffer_chain(iter(order), vector_scorer(vectors), sizes, buffer, length))
    assert sorted(found) == list(range(20))
    if buffer == 1:
        assert found == order.tolist()
    waiting, rest, last, room = list(order[:buffer]), list(order[buffer:]), None, length
    for here in found:
        if last is None or (length and room <= 0):
            assert here == waiting[0]
            room += 0 if last is None else length
        else:
            scores = vectors[waiting] @ vectors[last]
            assert here == (waiting[int(np.argmax(scores))] if scores.max() > 0 else waiting[0])
        room -= sizes[here]
        waiting.remove(here)
        waiting += rest[:1]
        last, rest = here, rest[1:]


def test_a_chain_reads_no_further_than_its_buffer():
    read = []
    stream = (read.append(i) or i for i in range(10**9))
    chain = buffer_chain(stream, lambda last, some: np.zeros(len(some)), np.ones(100, int), 5, 0)
    assert [next(chain) for _ in range(10)] == list(range(10))
    assert len(read) <= 15


def test_bm25_by_its_formula():
    texts = ["a b b", "b c", "c c d d d", "a"]
    score = bm25_scorer(texts.__getitem__)
    words = [Counter(text.split()) for text in texts]

    def formula(query, buffered):
        mean = np.mean([words[i].total() for i in buffered])
        out = []
        for i in buffered:
            total = 0.0
            for word in words[query]:
                holders = sum(word in words[j] for j in buffered)
                idf = math.log(1 + (len(buffered) - holders + 0.5) / (holders + 0.5))
                tf = words[i][word]
                total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * words[i].total() / mean))
            out.append(total)
        return out

    # What has left the buffer no longer counts; what comes in does.
    for query, buffered in [(0, [1, 2, 3]), (1, [2, 3]), (2, [3, 0])]:
        np.testing.assert_allclose(score(query, buffered), formula(query, buffered), rtol=1e-6)


def test_chains_begin_where_rows_do():
    rng = np.random.default_rng(0)
    vectors, sizes = unit_rows(rng.standard_normal((60, 4))), rng.integers(3, 40, 60)
    path = np.asarray(list(buffer_chain(iter(range(60)), vector_scorer(vectors), sizes, 60, 10)))
    begins = np.concatenate([[0], np.cumsum(sizes[path])])
    waiting = list(range(60))
    for place, here in enumerate(path.tolist()):
        new_row = place == 0 or begins[place] // 10 > begins[place - 1] // 10
        scores = None if new_row else vectors[waiting] @ vectors[path[place - 1]]
        assert here == (waiting[0] if new_row or scores.max() <= 0 else waiting[int(np.argmax(scores))])
        waiting.remove(here)


def test_words_that_no_buffered_document_has_are_forgotten():
    score = bm25_scorer(lambda i: f"word{i} common")
    for i in range(50):
        score(i, [i + 1, i + 2])
    (holders,) = [cell.cell_contents for cell in score.__closure__ if isinstance(cell.cell_contents, dict)
                  and "common" in cell.cell_contents]  # fmt: skip
    assert set(holders) == {"common", "word50", "word51"}


def test_clusters_lie_together():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 200)
    vectors = unit_rows(np.eye(5)[label] + 0.01 * rng.standard_normal((200, 5)))
    order = cluster_order(vectors, np.random.default_rng(1), clusters=25)
    assert sorted(order.tolist()) == list(range(200))
    assert np.mean(label[order[1:]] == label[order[:-1]]) > 0.85
    assert not np.array_equal(order, cluster_order(vectors, np.random.default_rng(2), clusters=25))
    assert cluster_order(vectors[:1], rng).tolist() == [0]


def test_windows_of_neighbours_begin_anew_when_they_are_full():
    ids = np.asarray([[1, 2], [0, 2], [0, 1], [-1, -1]])
    graph = build_graph(ids, np.asarray([[0.9, 0.5], [0.9, 0.1], [0.5, 0.1], [-np.inf, -np.inf]], np.float32))
    path = neighbour_windows(graph, np.full(4, 10), 20, np.random.default_rng(0)).tolist()
    firsts = np.random.default_rng(0).permutation(4).tolist()
    windows = {0: [0, 1], 1: [1, 0], 2: [2, 0], 3: [3]}
    wanted = [i for first in firsts for i in windows[first]]
    assert path == wanted[: len(path)]
    assert len(path) == 4
