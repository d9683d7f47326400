"""Orders of documents to compare with: clusters, and windows of a document and its neighbours."""

import numpy as np

from lmlab.data.graph import Graph
from lmlab.retrieval.encoder import unit_rows

_ROUNDS = 8
_ROWS = 4096


def cluster_order(vectors_ND: np.ndarray, rng: np.random.Generator, clusters: int = 0) -> np.ndarray:
    """Clusters one after the other, at random within each: the ablation of the paper (arXiv 2310.10638, section 4.3).

    Spherical k-means; clusters = 0: the square root of the number of documents.
    """
    count = len(vectors_ND)
    clusters = min(clusters or max(int(count**0.5), 1), count)
    centres_CD = vectors_ND[np.sort(rng.choice(count, clusters, replace=False))]
    for _ in range(_ROUNDS):
        cluster_N = _nearest(vectors_ND, centres_CD)
        order = np.argsort(cluster_N, kind="stable")
        names, starts = np.unique(cluster_N[order], return_index=True)
        # A cluster that lost all its documents stays where it was.
        centres_CD[names] = unit_rows(np.add.reduceat(vectors_ND[order], starts, axis=0))
    shuffled = rng.permutation(count)
    return shuffled[np.argsort(cluster_N[shuffled], kind="stable")]


def _nearest(vectors_ND: np.ndarray, centres_CD: np.ndarray) -> np.ndarray:
    blocks = range(0, len(vectors_ND), _ROWS)
    return np.concatenate([np.argmax(vectors_ND[i : i + _ROWS] @ centres_CD.T, axis=1) for i in blocks])


def neighbour_windows(graph: Graph, sizes_N: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A document and its neighbours, nearest first, until a row of `length` tokens is full; documents repeat.

    The paper's kNN baseline: documents begin rows in a random order, and there are as many rows as the corpus has
    tokens for, so that it trains on the same budget. What a row has no room for is at the beginning of the next.
    """
    budget = int(np.sum(sizes_N))
    length = max(length, 1)
    room, path = 0, []
    for start in rng.permutation(graph.documents).tolist():
        room = min(length - (-room % length), budget)
        for here in [start, *graph.neighbours[graph.starts[start] : graph.starts[start + 1]].tolist()]:
            path.append(here)
            room -= int(sizes_N[here])
            budget -= int(sizes_N[here])
            if room <= 0:
                break
        if budget <= 0:
            break
    return np.asarray(path, np.int64)
