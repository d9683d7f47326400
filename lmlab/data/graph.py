"""Who is near whom: an undirected graph of documents from the neighbours that a search found."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Graph:
    """Rows of neighbours (CSR): each row falls in similarity, ties rise in number."""

    starts: np.ndarray
    """[N + 1] int64 where the row of each document begins."""
    neighbours: np.ndarray
    """[2 E] int64; every edge stands in the rows of both its ends."""
    sims: np.ndarray
    """[2 E] float32 similarity along each edge."""

    @property
    def documents(self) -> int:
        """N."""
        return len(self.starts) - 1

    @property
    def owners(self) -> np.ndarray:
        """[2 E] the document in whose row each entry stands."""
        return np.repeat(np.arange(self.documents), np.diff(self.starts))


def build_graph(
    ids_NK: np.ndarray, sims_NK: np.ndarray, kept: np.ndarray | None = None, *, mutual: bool = False,
    min_sim: float = -np.inf, max_degree: int = 0,
) -> Graph:  # fmt: skip
    """The graph of the kept documents, numbered anew from 0 in their order (arXiv 2310.10638, section 2.2).

    Pairs of similarity 0 are no edges.

    Args:
        ids_NK: neighbours of each document; -1: none.
        sims_NK: their similarities; where the two directions differ the larger counts.
        kept: rising numbers of the documents to keep; None: all. Edges to the others are dropped.
        mutual: an edge needs both directions, not either.
        min_sim: edges below it are dropped.
        max_degree: an edge has to be among the best so many of both its ends; 0: no limit.
    """
    count = len(ids_NK)
    number = np.full(count, -1, np.int64)
    kept = np.arange(count) if kept is None else kept
    number[kept] = np.arange(len(kept))
    here = np.repeat(number, ids_NK.shape[1])
    there = np.where(ids_NK >= 0, number[ids_NK], -1).ravel()
    sims = sims_NK.ravel().astype(np.float32)
    # A document without a word has similarity 0 to all: whom a search names beside it are no neighbours.
    fine = (here >= 0) & (there >= 0) & (here != there) & (sims >= min_sim) & (sims != 0)
    low, high, sims = _pairs(here[fine], there[fine], sims[fine], len(kept), mutual)
    graph = _rows(low, high, sims, len(kept))
    if max_degree and np.diff(graph.starts).max(initial=0) > max_degree:
        row = graph.owners
        near = np.arange(len(row)) - graph.starts[row] < max_degree
        low, high, sims = _pairs(row[near], graph.neighbours[near], graph.sims[near], len(kept), True)
        graph = _rows(low, high, sims, len(kept))
    return graph


def _pairs(
    here: np.ndarray, there: np.ndarray, sims: np.ndarray, count: int, mutual: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Each pair once, lower end first, with its largest similarity."""
    low, high = np.minimum(here, there), np.maximum(here, there)
    order = np.lexsort((-sims, low * count + high))
    low, high, sims = low[order], high[order], sims[order]
    first = np.ones(len(low), bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    if mutual:
        # A search names a neighbour once, so that a pair that stands there twice was found from both ends.
        first[:-1] &= ~first[1:]
        first[-1:] = False
    return low[first], high[first], sims[first]


def _rows(low: np.ndarray, high: np.ndarray, sims: np.ndarray, count: int) -> Graph:
    here, there, both = np.concatenate([low, high]), np.concatenate([high, low]), np.concatenate([sims, sims])
    order = np.lexsort((there, -both, here))
    starts = np.concatenate([[0], np.cumsum(np.bincount(here, minlength=count))]).astype(np.int64)
    return Graph(starts, there[order], both[order])


def edges(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both ends and the similarity of every edge once: falling in similarity, ties rising in numbers."""
    here = graph.owners
    once = here < graph.neighbours
    low, high, sims = here[once], graph.neighbours[once], graph.sims[once]
    order = np.lexsort((high, low, -sims))
    return low[order], high[order], sims[order]


def components(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """[count] the smallest member of the component of each document, by edges (low, high)."""
    label = np.arange(count)
    while True:
        best = label.copy()
        np.minimum.at(best, low, label[high])
        np.minimum.at(best, high, label[low])
        # Labels are members, and their own labels lie lower still: each turn doubles how far a label reaches.
        best = best[best]
        if np.array_equal(best, label):
            return label
        label = best


def edge_weights(graph: Graph, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Similarity along each of the edges (here, there), NaN where there is none."""
    if not len(graph.neighbours):
        return np.full(len(here), np.nan, np.float32)
    keys = graph.owners * graph.documents + graph.neighbours
    order = np.argsort(keys)
    wanted = here * graph.documents + there
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    found = order[place]
    return np.where(keys[found] == wanted, graph.sims[found], np.nan)
