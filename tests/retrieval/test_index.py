"""Exact search equals a dense argsort, on any number of devices, whatever the blocks, ties included."""

import jax
import numpy as np
import pytest

from lmlab.retrieval.encoder import unit_rows
from lmlab.retrieval.index import block_top_k, exact_search, merge_pieces


def dense(vectors, queries, own, k):
    """All similarities, sorted by falling similarity and rising id."""
    sims = np.sum(vectors[None] * queries[:, None], axis=-1, dtype=np.float32)
    found = []
    for row, me in zip(sims, own, strict=True):
        order = [i for i in np.lexsort((np.arange(len(row)), -row)) if i != me][:k]
        found.append(order + [-1] * (k - len(order)))
    return np.asarray(found)


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize(("count", "block"), [(1, 4), (7, 4), (40, 5), (333, 64), (333, 1000)])
def test_block_top_k_equals_a_dense_sort(devices, count, block):
    rng = np.random.default_rng(count)
    vectors = rng.integers(-2, 3, (count, 4)).astype(np.float32)  # Exact in float32, and ties everywhere.
    own = np.arange(count)
    search = exact_search(vectors, 5, block=block, devices=jax.devices()[:devices])
    ids, sims = search(vectors, own)
    np.testing.assert_array_equal(ids, dense(vectors, vectors, own, 5))
    exact = np.where(ids >= 0, np.sum(vectors[ids] * vectors[:, None], axis=-1), -np.inf)
    np.testing.assert_allclose(sims, exact, atol=1e-6)


def test_a_query_from_outside_finds_everything_and_bfloat16_is_scored_again():
    rng = np.random.default_rng(0)
    vectors = unit_rows(rng.standard_normal((100, 8)))
    queries = unit_rows(rng.standard_normal((3, 8)))
    ids, sims = exact_search(vectors, 3, block=16, compute_dtype="bfloat16")(queries, np.full(3, -1))
    np.testing.assert_array_equal(ids, dense(vectors, queries, [-1] * 3, 3))
    np.testing.assert_allclose(sims, np.sum(vectors[ids] * queries[:, None], axis=-1), atol=1e-6)


def test_the_mesh_of_a_model_does_not_disturb():
    vectors = unit_rows(np.random.default_rng(0).standard_normal((20, 4)))
    found = exact_search(vectors, 3)(vectors, np.arange(20))[0]
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"))):
        np.testing.assert_array_equal(exact_search(vectors, 3)(vectors, np.arange(20))[0], found)


def test_groups_find_what_top_k_finds():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, (6, 32 * 40)).astype(np.float32)
    for k in (1, 4, 31):
        for found, wanted in zip(block_top_k(values, k), jax.lax.top_k(values, k), strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_documents_are_as_alike_as_their_closest_pieces():
    document = np.asarray([0, 0, 1, 2, 2])
    ids = np.asarray([[1, 2, 3], [0, 4, 2], [0, 1, 4], [4, 0, -1], [1, 3, 2]])
    sims = np.asarray([[0.9, 0.5, 0.4], [0.9, 0.7, 0.6], [0.5, 0.6, 0.1], [0.8, 0.4, -np.inf], [0.7, 0.8, 0.1]], "f")
    ids, sims = merge_pieces(ids, sims, document, 2)
    np.testing.assert_array_equal(ids, [[2, 1], [0, 2], [0, 1]])
    np.testing.assert_allclose(sims, [[0.7, 0.6], [0.6, 0.1], [0.7, 0.1]])
    ids, _ = merge_pieces(np.asarray([[1], [0]]), np.ones((2, 1), "f"), np.asarray([0, 0]), 2)
    np.testing.assert_array_equal(ids, [[-1, -1]])
