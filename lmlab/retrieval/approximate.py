"""Approximate search with faiss (extra `retrieval`), for corpora whose inner products are too many to compute."""

import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.retrieval.config import FaissSearch
from lmlab.retrieval.index import SPARE, Rows, Search

_BLOCK = 65536


def faiss_search(vectors_ND: Rows, k: int, config: FaissSearch) -> Search:
    """Search as `exact_search` does, but only in the cells nearest to a query, and by compressed vectors at first.

    What is found there is scored with the vectors themselves, so that similarities are exact and only neighbours may
    be missed. The paper's code: IVF32768,PQ256 with 64 probes.

    Raises:
        UserError: faiss is not installed, does not know the factory, or has too few vectors to train it.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "data.in_context.search", "faiss", "the package faiss-cpu", "pip install 'lmlab[retrieval]'"
        ) from error
    count, size = vectors_ND.shape
    try:
        index = faiss.index_factory(size, config.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors_ND[np.unique(np.linspace(0, count - 1, min(config.train, count)).astype(np.int64))])
    except RuntimeError as error:
        expected = f"an index that faiss can train on {count:,} vectors of {size} dimensions"
        reason = str(error).splitlines()[-1].strip()
        raise UserError("data.in_context.search.factory", config.factory, expected, f"faiss: {reason}") from error
    for begin in range(0, count, _BLOCK):
        index.add(vectors_ND[begin : begin + _BLOCK])
    if "IVF" in config.factory:
        faiss.extract_index_ivf(index).nprobe = config.probes
    check(index.ntotal == count, "data.in_context.search.factory", config.factory,
          "an index that holds every vector once")  # fmt: skip

    def search(queries_QD: np.ndarray, own_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        _, ids_QK = index.search(np.ascontiguousarray(queries_QD, np.float32), min(k + 1 + SPARE, count))
        sims_QK = np.full(ids_QK.shape, -np.inf, np.float32)
        found = (ids_QK >= 0) & (ids_QK != own_Q[:, None])
        rows, _ = np.nonzero(found)
        sims_QK[found] = np.sum(queries_QD[rows] * vectors_ND[ids_QK[found]], axis=1)
        order = np.lexsort((ids_QK, -sims_QK), axis=1)[:, :k]
        ids_QK, sims_QK = np.take_along_axis(ids_QK, order, 1), np.take_along_axis(sims_QK, order, 1)
        short = ((0, 0), (0, max(k - ids_QK.shape[1], 0)))
        ids_QK = np.pad(np.where(np.isfinite(sims_QK), ids_QK, -1), short, constant_values=-1)
        return ids_QK, np.pad(sims_QK, short, constant_values=-np.inf)

    return search
