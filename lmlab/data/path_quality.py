"""How good an order of documents is, beside the best that any could be."""

import numpy as np

from lmlab.data.graph import Graph, edge_weights


def upper_bound(graph: Graph) -> float:
    """Half the sum over documents of their two heaviest edges: no path that visits each once weighs more."""
    total = 0.0
    for rank in (0, 1):
        there = np.diff(graph.starts) > rank
        total += float(np.sum(np.maximum(graph.sims[graph.starts[:-1][there] + rank], 0), dtype=np.float64))
    return total / 2


def step_similarities(path: np.ndarray, vectors_ND: np.ndarray) -> np.ndarray:
    """[N - 1] float32 cosine of each document with the one before it in the path; vectors are unit rows."""
    sims = np.empty(max(len(path) - 1, 0), np.float32)
    for begin in range(0, len(sims), 65536):
        end = min(begin + 65536, len(sims))
        rows_CD = np.asarray(vectors_ND[path[begin : end + 1]], np.float32)
        sims[begin:end] = np.sum(rows_CD[:-1] * rows_CD[1:], axis=1)
    return sims


def path_quality(path: np.ndarray, graph: Graph, vectors_ND: np.ndarray) -> dict[str, float]:
    """What the table of `lmlab order` shows of a path over the documents of the graph.

    similarity: mean cosine of neighbours. jumps: share of the steps that follow no edge (the first step counts as
    one, as in the paper's pseudo-code). weight: sum of the edges that are followed. bound: `upper_bound`; ratio: of
    both.
    """
    weights = edge_weights(graph, path[:-1], path[1:])
    followed = ~np.isnan(weights)
    weight, bound = float(np.sum(weights[followed], dtype=np.float64)), upper_bound(graph)
    sims = step_similarities(path, vectors_ND)
    return {
        "similarity": float(np.mean(sims)) if len(sims) else 0.0,
        "jumps": float(len(path) - np.sum(followed)) / max(len(path), 1),
        "weight": weight,
        "bound": bound,
        "ratio": weight / bound if bound > 0 else 1.0,
    }
