"""Pieces of path: taken edge by edge, joined end to end where their ends are most alike, and laid out as a tour."""

from dataclasses import dataclass

import numpy as np

from lmlab.data.graph import Graph, edges
from lmlab.data.tour import Tour
from lmlab.retrieval.index import exact_search

_BLOCK = 1 << 16
_NEAREST, _FEW, _STALLED = 8, 512, 16
_ROWS = 2048


@dataclass(frozen=True)
class Links:
    """Pieces of path in the making; `join` changes the arrays in place."""

    degree: np.ndarray
    """[N] links of each document: 0, 1 or 2."""
    parent: np.ndarray
    """[N] a forest whose roots name the pieces."""
    pairs: list[tuple[int, int]]
    """The links."""


def no_links(count: int) -> Links:
    """Every document is a piece of its own."""
    return Links(np.zeros(count, np.int8), np.arange(count), [])


def join(links: Links, low: np.ndarray, high: np.ndarray) -> int:
    """Take pairs in their order wherever both have an end free and lie in different pieces; how many were taken."""
    before = len(links.pairs)
    degree, parent = links.degree, links.parent.tolist()

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for begin in range(0, len(low), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        free = (degree[low[part]] < 2) & (degree[high[part]] < 2)
        for i, j in zip(low[part][free].tolist(), high[part][free].tolist(), strict=True):
            if degree[i] < 2 and degree[j] < 2 and (a := root(i)) != (b := root(j)):
                parent[max(a, b)] = min(a, b)
                degree[i] += 1
                degree[j] += 1
                links.pairs.append((i, j))
    links.parent[:] = [root(i) for i in range(len(parent))]
    return len(links.pairs) - before


def greedy_edges(graph: Graph) -> Links:
    """Edges by falling similarity, each taken if the path allows it: greedy matching of the travelling salesman."""
    links = no_links(graph.documents)
    low, high, _ = edges(graph)
    join(links, low, high)
    return links


def cut(tour: Tour, count: int) -> Links:
    """A path as pieces that end where it jumps."""
    links = no_links(count)
    inside = np.ones(len(tour.path), bool)
    inside[tour.jumps] = False
    places = np.flatnonzero(inside)
    join(links, tour.path[places - 1], tour.path[places])
    return links


def assemble(links: Links) -> Tour:
    """The pieces one after the other, by their lowest end, from that end on."""
    count = len(links.degree)
    beside = np.full((count, 2), -1, np.int64)
    if links.pairs:
        pairs = np.asarray(links.pairs, np.int64)
        ends, others = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]])
        order = np.argsort(ends, kind="stable")
        ends, others = ends[order], others[order]
        second = np.concatenate([[False], ends[1:] == ends[:-1]])
        beside[ends, second.astype(int)] = others
    rows = beside.tolist()
    path: list[int] = []
    jumps: list[int] = []
    seen = bytearray(count)
    for start in np.flatnonzero(links.degree < 2).tolist():
        if seen[start]:
            continue
        jumps.append(len(path))
        here = start
        while here >= 0:
            seen[here] = 1
            path.append(here)
            here = next((j for j in rows[here] if j >= 0 and not seen[j]), -1)
    return Tour(np.asarray(path, np.int64), np.asarray(jumps, np.int64))


def link_fragments(links: Links, vectors_ND: np.ndarray) -> Links:
    """Join free ends in rounds; either end of a piece may meet either end of another.

    Each round finds the nearest few free ends of every free end, and takes these pairs by falling similarity. Where
    that joins few, because all ends have the same nearest, ends are joined in the order of their numbers as well. When
    few are left all their pairs are taken, which ends it.

    vectors_ND: unit rows of the documents.
    """
    while len(links.pairs) < len(links.degree) - 1:
        ends = np.flatnonzero(links.degree < 2)
        rows_ED = np.asarray(vectors_ND[ends], np.float32)
        low, high, sims = _all_pairs(rows_ED) if len(ends) <= _FEW else _near_pairs(rows_ED)
        order = np.lexsort((high, low, -sims))
        joined = join(links, ends[low[order]], ends[high[order]])
        if joined * _STALLED < len(ends):
            join(links, ends[:-1], ends[1:])
    return links


def _all_pairs(rows_ED: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = np.triu_indices(len(rows_ED), 1)
    return low, high, (rows_ED @ rows_ED.T)[low, high]


def _near_pairs(rows_ED: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    search, count = exact_search(rows_ED, _NEAREST), len(rows_ED)
    block = min(_ROWS, count)
    found = []
    for begin in range(0, count, block):
        # All blocks have one shape, so that the search is compiled once a round: the last begins earlier.
        places = np.arange(min(begin, count - block), min(begin + block, count))
        ids_QK, sims_QK = search(rows_ED[places], places)
        here_QK = np.broadcast_to(places[:, None], ids_QK.shape)
        found.append([np.minimum(here_QK, ids_QK), np.maximum(here_QK, ids_QK), sims_QK])
    low, high, sims = (np.concatenate(part).ravel() for part in zip(*found, strict=True))
    return low, high, sims
