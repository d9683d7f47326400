"""Which documents are copies of which, and which of them stay; and who is near whom, both ways."""

import numpy as np
import pytest

from lmlab.data.duplicates import (
    alike_pairs,
    drop_followers,
    equal_pairs,
    minhash_pairs,
    prefix_jaccard,
    representatives,
)
from lmlab.data.graph import build_graph, components, edge_weights, edges

TEXT = "a quick brown fox jumps over the lazy dog and then sleeps under an old oak for days"


def pairs(found) -> set[tuple[int, int]]:
    return {tuple(sorted(pair)) for pair in zip(*(part.tolist() for part in found), strict=True)}


def stands(low, high, count, rank=None, **settings) -> list[int]:
    rank = np.arange(count) if rank is None else np.asarray(rank)
    return representatives(np.asarray(low, int), np.asarray(high, int), rank, **settings).tolist()


def test_a_chain_of_copies_goes_whole_or_only_as_far_as_what_stays():
    assert stands([0, 1, 2], [1, 2, 3], 5) == [0, 0, 0, 0, 4]
    assert stands([0, 1, 2], [1, 2, 3], 5, complete=True) == [0, 0, 2, 2, 4]
    assert stands([], [], 3) == stands([], [], 3, complete=True) == [0, 1, 2]


@pytest.mark.parametrize("complete", [False, True])
def test_the_document_of_lowest_rank_stays(complete):
    # Document 2 has rank 0, say as the longest.
    assert stands([0, 0, 1], [1, 2, 2], 3, rank=[1, 2, 0], complete=complete) == [2, 2, 2]


def test_complete_linkage_drops_only_copies_of_what_stays():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 50, (2, 60))
    low, high = low[low != high], high[low != high]
    rank = rng.permutation(50)
    found = np.asarray(stands(low, high, 50, rank, complete=True))
    copies = {frozenset(pair) for pair in zip(low.tolist(), high.tolist(), strict=True)}
    kept = {i for i in range(50) if found[i] == i}
    for i in range(50):
        assert i in kept or (frozenset((i, int(found[i]))) in copies and found[i] in kept and rank[found[i]] < rank[i])
    assert not any(copy <= kept for copy in copies)


def test_components_by_brute_force():
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 200, (2, 150))
    label = np.arange(200)
    for _ in range(200):
        for i, j in zip(low, high, strict=True):
            label[i] = label[j] = min(label[i], label[j])
    np.testing.assert_array_equal(components(low, high, 200), label)
    line = np.arange(999)
    assert not components(line, line + 1, 1000).any()


def test_pairs_above_the_threshold_from_either_side():
    ids = np.asarray([[1, 2], [0, -1], [1, 0]])
    sims = np.asarray([[0.97, 0.5], [0.97, -np.inf], [0.96, 0.5]], np.float32)
    assert pairs(alike_pairs(ids, sims, 0.95)) == {(0, 1), (1, 2)}
    assert pairs(alike_pairs(ids, sims, 1.01)) == set()


def test_equal_texts_up_to_case_and_space():
    assert pairs(equal_pairs(["a b", "A\n b ", "ab", "a b"])) == {(0, 1), (0, 3)}


def test_minhash_finds_what_shares_its_shingles():
    text, near, other = TEXT, f"{TEXT} more", " ".join(reversed(TEXT.split()))
    assert pairs(minhash_pairs([text, other, near, text.upper()], 0.7)) >= {(0, 3), (0, 2)}
    assert pairs(minhash_pairs([text, other, near, text.upper()], 0.99)) == {(0, 3)}
    assert pairs(minhash_pairs([text, other], 0.05)) == set()
    assert pairs(minhash_pairs(["", ""], 0.5)) == {(0, 1)}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
def test_minhash_finds_most_pairs_just_above_its_threshold(threshold):
    texts, shared = [], int(100 * 2 * threshold / (1 + threshold)) + 6
    for pair in range(40):
        words = [f"w{pair}x{i}" for i in range(300)]
        texts += [" ".join(words[:104]), " ".join(words[104 - shared - 4 : 208 - shared - 4])]
    found = pairs(minhash_pairs(texts, threshold))
    assert len(found & {(2 * i, 2 * i + 1) for i in range(40)}) >= 30
    assert all(i // 2 == j // 2 for i, j in found)


def test_the_released_rule_compares_with_the_document_before():
    assert prefix_jaccard("abcd", "abce") == pytest.approx(1 / 3)
    assert prefix_jaccard("", "ab") == 1.0
    assert prefix_jaccard("abc", "") == 0.0
    assert prefix_jaccard("x" * 100 + "one", "x" * 100 + "two") == 1.0
    texts = ["one text here", "one text here!", "another thing", "one text here"]
    assert list(drop_followers(np.arange(4), texts.__getitem__, 0.85)) == [0, 2, 3]
    assert list(drop_followers(np.arange(0), texts.__getitem__)) == []


IDS = np.asarray([[1, 2], [0, 3], [3, 0], [-1, -1]])
SIMS = np.asarray([[0.9, 0.3], [0.8, 0.6], [0.5, 0.4], [-np.inf, -np.inf]], np.float32)


def listed(graph) -> dict[tuple[int, int], float]:
    low, high, sims = edges(graph)
    assert (np.diff(sims) <= 0).all()
    return {(i, j): round(float(s), 3) for i, j, s in zip(low, high, sims, strict=True)}


def test_an_edge_from_either_side_with_the_larger_weight():
    assert listed(build_graph(IDS, SIMS)) == {(0, 1): 0.9, (0, 2): 0.4, (1, 3): 0.6, (2, 3): 0.5}
    assert listed(build_graph(IDS, SIMS, mutual=True)) == {(0, 1): 0.9, (0, 2): 0.4}
    assert listed(build_graph(IDS, SIMS, min_sim=0.5)) == {(0, 1): 0.9, (1, 3): 0.6, (2, 3): 0.5}
    assert listed(build_graph(IDS, SIMS, np.asarray([0, 2, 3]))) == {(0, 1): 0.4, (1, 2): 0.5}
    assert listed(build_graph(IDS, SIMS, max_degree=1)) == {(0, 1): 0.9}


def test_making_a_graph_of_a_graph_changes_nothing():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(30)[:4] for _ in range(30)])
    graph = build_graph(ids, rng.random((30, 4), np.float32))
    width = int(np.diff(graph.starts).max())
    again_ids, again_sims = np.full((30, width), -1), np.full((30, width), -np.inf, np.float32)
    for i in range(30):
        row = slice(*graph.starts[i : i + 2])
        size = row.stop - row.start
        again_ids[i, :size], again_sims[i, :size] = graph.neighbours[row], graph.sims[row]
    for mutual in (False, True):
        again = build_graph(again_ids, again_sims, mutual=mutual)
        np.testing.assert_array_equal(again.starts, graph.starts)
        np.testing.assert_array_equal(again.neighbours, graph.neighbours)
        np.testing.assert_array_equal(again.sims, graph.sims)
    # Rows fall in similarity, and equal ones rise in number.
    alike = build_graph(ids, np.ones((30, 4), np.float32))
    assert all(
        (np.diff(alike.neighbours[a:b]) > 0).all() for a, b in zip(alike.starts[:-1], alike.starts[1:], strict=True)
    )
    dense = edge_weights(graph, *np.divmod(np.arange(900), 30)).reshape(30, 30)
    np.testing.assert_array_equal(dense, dense.T)
    assert np.sum(~np.isnan(dense)) == len(graph.neighbours)
