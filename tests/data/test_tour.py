"""Paths: every document once, every step what the rule says, by brute force; and how near the optimum they come."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from lmlab.data import linking
from lmlab.data.graph import Graph, build_graph, components, edge_weights, edges
from lmlab.data.linking import assemble, cut, greedy_edges, link_fragments
from lmlab.data.path_quality import path_quality, upper_bound
from lmlab.data.tour import release, walk
from lmlab.retrieval.encoder import unit_rows


def graph_of(pairs, count) -> Graph:
    """A graph from {(i, j): similarity}."""
    width = max(len(pairs), 1)
    ids, sims = np.full((count, width), -1), np.zeros((count, width), np.float32)
    for column, ((i, j), sim) in enumerate(pairs.items()):
        ids[i, column], sims[i, column] = j, sim
    return build_graph(ids, sims)


def points(count, size, seed=0):
    return unit_rows(np.random.default_rng(seed).standard_normal((count, size)))


def neighbours(vectors, k):
    sims = vectors @ vectors.T
    np.fill_diagonal(sims, -np.inf)
    ids = np.argsort(-sims, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(sims, ids, axis=1)
    return np.where(np.isfinite(found), ids, -1), found


HAND = {(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.7, (2, 3): 0.6, (4, 5): 0.5}
GRAPHS = {
    "one": graph_of({}, 1),
    "none": graph_of({}, 0),
    "empty": graph_of({}, 7),
    "complete": graph_of({(i, j): 0.1 + 0.01 * (i * 7 + j) for i in range(7) for j in range(i)}, 7),
    "star": graph_of({(0, i): 0.1 * i for i in range(1, 8)}, 8),
    "apart": graph_of(
        {(3 * i + a, 3 * i + b): 0.5 + 0.1 * a for i in range(4) for a in range(3) for b in range(a)}, 12
    ),
    "hand": graph_of(HAND, 6),
    "all alike": build_graph(*neighbours(np.ones((9, 3), np.float32), 4)),
    "k beyond N": build_graph(*neighbours(points(5, 3), 20)),
    "random": build_graph(*neighbours(points(60, 4), 3)),
    "mutual": build_graph(*neighbours(points(60, 4), 3), mutual=True),
}
RULES = {
    "dynamic": walk,
    "static": lambda graph: walk(graph, dynamic=False),
    "greedy edges": lambda graph: assemble(greedy_edges(graph)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_document_once_whatever_the_graph(name, rule):
    graph = GRAPHS[name]
    tour = RULES[rule](graph)
    assert sorted(tour.path.tolist()) == list(range(graph.documents))
    low, high, _ = edges(graph)
    parts = len(set(components(low, high, graph.documents).tolist()))
    assert len(tour.jumps) >= parts
    if name == "empty":
        assert len(tour.jumps) == graph.documents
    # A step without an edge is a jump, and the other way round.
    steps = np.isnan(edge_weights(graph, tour.path[:-1], tour.path[1:]))
    assert [0, *(np.flatnonzero(steps) + 1)][: graph.documents] == tour.jumps.tolist()


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_step_is_the_one_that_the_rule_says(name, dynamic):
    graph = GRAPHS[name]
    rows = [
        list(zip(graph.neighbours[a:b].tolist(), graph.sims[a:b].tolist(), strict=True))
        for a, b in pairwise(graph.starts)
    ]
    tour = walk(graph, dynamic=dynamic)
    left = set(range(graph.documents))
    for place, here in enumerate(tour.path.tolist()):
        before = tour.path[place - 1] if place else None
        if place in tour.jumps:
            assert before is None or not [j for j, _ in rows[before] if j in left]
            degree = {i: sum(j in left for j, _ in rows[i]) if dynamic else len(rows[i]) for i in left}
            assert here == min(left, key=lambda i: (degree[i], i))
        else:
            assert here == min((-sim, j) for j, sim in rows[before] if j in left)[1]
        left.remove(here)


def test_the_case_by_hand():
    graph = GRAPHS["hand"]
    tour = walk(graph)
    assert tour.path.tolist() == [3, 2, 0, 1, 4, 5]
    assert tour.jumps.tolist() == [0, 4]
    quality = path_quality(tour.path, graph, np.ones((6, 1), np.float32))
    assert quality["weight"] == pytest.approx(2.8)
    assert quality["jumps"] == pytest.approx(2 / 6)
    best = max(np.nansum(edge_weights(graph, *np.stack([order[:-1], order[1:]]))) for order in
               map(np.asarray, permutations(range(6))))  # fmt: skip
    assert best == pytest.approx(2.8)
    assert upper_bound(graph) == pytest.approx((1.7 + 1.6 + 1.5 + 0.6 + 0.5 + 0.5) / 2)


def test_near_the_optimum_of_small_graphs_and_never_above_the_bound():
    orders = np.asarray(list(permutations(range(8))))
    ratios = {name: [] for name in RULES}
    for seed in range(40):
        graph = build_graph(*neighbours(points(8, 4, seed), 3))
        table = np.nan_to_num(edge_weights(graph, *np.divmod(np.arange(64), 8))).reshape(8, 8)
        best = np.max(np.sum(table[orders[:, :-1], orders[:, 1:]], axis=1))
        for name, rule in RULES.items():
            path = rule(graph).path
            weight = np.sum(table[path[:-1], path[1:]])
            ratios[name].append(weight / best)
            assert weight <= best * (1 + 1e-6) <= upper_bound(graph) * (1 + 2e-6)
    assert np.mean(ratios["dynamic"]) > 0.85
    assert min(ratios["dynamic"]) > 0.6


def cliques():
    """Three complete parts, each with one more document of a degree of its own, from which the walk covers all."""
    rng = np.random.default_rng(0)
    pairs = {}
    for part in range(3):
        members = range(8 * part, 8 * part + 7)
        pairs |= {(i, j): rng.random() for i in members for j in members if j < i}
        pairs |= {(8 * part + 7, member): rng.random() for member in members[: part + 1]}
    return pairs


@pytest.mark.parametrize("rule", RULES)
def test_numbering_anew_numbers_the_path_anew(rule):
    shuffle = np.random.default_rng(1).permutation(24)
    tour = RULES[rule](graph_of(cliques(), 24))
    moved = RULES[rule](graph_of({(int(shuffle[i]), int(shuffle[j])): sim for (i, j), sim in cliques().items()}, 24))
    pieces = lambda tour, name: {tuple(name[piece].tolist()) for piece in np.split(tour.path, tour.jumps[1:])}
    if rule == "greedy edges":
        # The pieces are the same; which end and which piece comes first is a matter of numbers.
        either = lambda found: {min(piece, piece[::-1]) for piece in found}
        assert either(pieces(tour, shuffle)) == either(pieces(moved, np.arange(24)))
    else:
        assert shuffle[tour.path].tolist() == moved.path.tolist()
        assert len(tour.jumps) == 3


@pytest.mark.parametrize("few", [10, 1000])
def test_linking_leaves_one_path_and_raises_the_similarity(few, monkeypatch):
    monkeypatch.setattr(linking, "_FEW", few)
    monkeypatch.setattr(linking, "_ROWS", 50)
    vectors = points(300, 8)
    graph = build_graph(*neighbours(vectors, 4))
    for links in (cut(walk(graph), 300), greedy_edges(graph)):
        before = assemble(links)
        pieces = {frozenset(pair) for pair in links.pairs}
        after = assemble(link_fragments(links, vectors))
        assert sorted(after.path.tolist()) == list(range(300))
        assert after.jumps.tolist() == [0]
        assert pieces <= {frozenset(pair) for pair in pairwise(after.path.tolist())}
        gain = [path_quality(tour.path, graph, vectors)["similarity"] for tour in (before, after)]
        assert gain[1] > gain[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_linking_of_few(count):
    links = link_fragments(greedy_edges(graph_of({}, count)), points(count, 3))
    assert sorted(assemble(links).path.tolist()) == list(range(count))


def test_ends_that_all_look_alike_are_joined_in_few_rounds(monkeypatch):
    rounds = []
    near = linking._near_pairs
    monkeypatch.setattr(linking, "_near_pairs", lambda rows: rounds.append(len(rows)) or near(rows))
    links = link_fragments(greedy_edges(graph_of({}, 3000)), np.ones((3000, 4), np.float32) / 2)
    assert sorted(assemble(links).path.tolist()) == list(range(3000))
    assert len(rounds) <= 3


def test_cutting_a_path_and_putting_it_together_changes_no_piece():
    graph = GRAPHS["random"]
    tour = walk(graph)
    again = assemble(cut(tour, graph.documents))
    pieces = lambda t: {min(p, p[::-1]) for p in map(tuple, np.split(t.path, t.jumps[1:]))}
    assert pieces(again) == pieces(tour)


def test_the_released_rule():
    # Two full chains of 3, and document 6, whose second neighbour lies in the second chain.
    ids = np.asarray([[1, 2], [2, 0], [0, 1], [4, 5], [5, 3], [3, 4], [-1, 4], [-1, -1]])
    tour = release(ids, longest=3)
    assert tour.path.tolist() == [0, 1, 2, 3, 6, 4, 5, 7]
    assert tour.jumps.tolist() == [0, 3, 7]
    ids, _ = neighbours(points(200, 5), 12)
    assert sorted(release(ids).path.tolist()) == list(range(200))


def test_better_rules_find_better_paths():
    """The order of the table of the specification: random, released code, dynamic, with linking."""
    rng = np.random.default_rng(0)
    centres = points(30, 32)
    vectors = unit_rows(centres[rng.integers(0, 30, 600)] + 0.1 * rng.standard_normal((600, 32)))
    ids, sims = neighbours(vectors, 10)
    graph = build_graph(ids, sims)
    paths = {
        "random": rng.permutation(600),
        "release": release(ids).path,
        "dynamic": walk(graph).path,
        "linked": assemble(link_fragments(cut(walk(graph), 600), vectors)).path,
    }
    found = {name: path_quality(path, graph, vectors) for name, path in paths.items()}
    values = [found[name]["similarity"] for name in paths]
    assert values == sorted(values)
    assert found["dynamic"]["jumps"] < found["release"]["jumps"] < found["random"]["jumps"]
    assert all(0 <= quality["ratio"] <= 1 for quality in found.values())
