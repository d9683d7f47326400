"""The search of faiss beside our own (extra `retrieval`); skipped where faiss is not installed."""

import sys

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.retrieval.approximate import faiss_search
from lmlab.retrieval.config import FaissSearch
from lmlab.retrieval.encoder import unit_rows
from lmlab.retrieval.index import exact_search


@pytest.fixture(scope="module")
def vectors():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra `retrieval`)")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 16))
    return unit_rows(centres[rng.integers(0, 20, 700)] + 0.7 * rng.standard_normal((700, 16)))


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_faiss_finds_what_exact_search_finds(vectors, factory):
    """IVF with all cells probed is Flat."""
    own = np.arange(100)
    ids, sims = faiss_search(vectors, 10, FaissSearch(factory, probes=16))(vectors[:100], own)
    wanted_ids, wanted_sims = exact_search(vectors, 10)(vectors[:100], own)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_allclose(sims, wanted_sims, atol=1e-5)


def test_compressed_vectors_in_some_cells_still_find_most(vectors):
    own = np.arange(700)
    ids, sims = faiss_search(vectors, 10, FaissSearch("IVF16,PQ8x6", probes=8))(vectors, own)
    wanted, _ = exact_search(vectors, 10)(vectors, own)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), wanted.tolist(), strict=True)])
    assert recall > 0.9
    np.testing.assert_allclose(sims, np.sum(vectors[ids] * vectors[:, None], axis=-1), atol=1e-5)
    assert not np.any(ids == own[:, None])


def test_of_ten_thousand_vectors_nine_in_ten_neighbours_are_found(vectors):
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((200, 64))
    many = unit_rows(centres[rng.integers(0, 200, 10_000)] + 0.7 * rng.standard_normal((10_000, 64)))
    own = np.arange(0, 10_000, 10)
    ids, _ = faiss_search(many, 10, FaissSearch("IVF64,PQ32", probes=16))(many[own], own)
    wanted, _ = exact_search(many, 10)(many[own], own)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), wanted.tolist(), strict=True)])
    assert recall >= 0.9


def test_fewer_than_k(vectors):
    ids, sims = faiss_search(vectors[:4], 6, FaissSearch("Flat"))(vectors[:4], np.arange(4))
    assert (np.sort(ids, axis=1)[:, :3] == -1).all()
    assert np.isneginf(sims[:, 3:]).all()


@pytest.mark.parametrize("factory", ["IVF5000,Flat", "nonsense"])
def test_an_index_that_cannot_be_is_told(vectors, factory):
    with pytest.raises(UserError, match=r"search\.factory"):
        faiss_search(vectors, 3, FaissSearch(factory))


def test_without_faiss_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss-cpu"):
        faiss_search(np.eye(3, dtype=np.float32), 1, FaissSearch())
