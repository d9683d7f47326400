"""The k nearest of many vectors, exactly: blocks of inner products on every device, candidates gathered, not scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmlab.core.types import Array

Search: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""`search(queries_QD, own_Q) -> (ids_QK, sims_QK)`: int64 and float32, the nearest first, ties by lower id; the
vector whose id is the query's own (-1: none) is never found. Fewer than K: id -1 and similarity -inf."""


class Rows(Protocol):
    """Vectors that may lie on disk: an array [N, D], or what reads as one."""

    @property
    def shape(self) -> Any:
        """(N, D)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


SPARE = 8
"""Candidates kept beyond k until the exact scores are known: matmuls round by the shape of their blocks."""
_GROUP = 32


def exact_search(
    vectors_ND: Rows, k: int, *, block: int = 16384, devices: Sequence[jax.Device] | None = None,
    compute_dtype: str = "float32",
) -> Search:  # fmt: skip
    """Search by inner product among all rows; the matrix is divided over the devices of this host.

    Every device goes through its rows in blocks and keeps its best; k candidates of each device are gathered. Those
    kept are scored anew in float32 with one fixed order of summation, so that equal vectors tie exactly.

    Args:
        vectors_ND: the corpus, read once.
        k: how many to find.
        block: rows that a device compares at once.
        devices: default: all of this host.
        compute_dtype: of the first pass; bfloat16 is what accelerators are fast in.
    """
    mesh = Mesh(np.asarray(devices or jax.local_devices()), ("corpus",))
    share = -(-len(vectors_ND) // mesh.size)
    blocks = max(-(-share // block), 1)
    # Blocks of one size with little padding, in whole groups where they are large.
    block = -(-share // blocks)
    block += -block % _GROUP if block > _GROUP else 0
    share = blocks * max(block, 1)
    corpus = _place(vectors_ND, share, mesh)
    kept = min(k + SPARE, share)
    shape = _Shape(mesh, k, kept, max(block, 1), compute_dtype)

    def search(queries_QD: np.ndarray, own_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Whatever mesh the caller has set for its model.
        with jax.set_mesh(mesh):
            ids_QK, sims_QK = _search(
                corpus, np.asarray(queries_QD, np.float32), own_Q.astype(np.int32), np.int32(len(vectors_ND)), shape
            )
        return np.asarray(ids_QK).astype(np.int64), np.asarray(sims_QK)

    return search


@dataclass(frozen=True)
class _Shape:
    """What a search is compiled for."""

    mesh: Mesh
    k: int
    kept: int
    block: int
    dtype: str


@partial(jax.jit, static_argnums=4)
def _search(corpus_ND: Array, queries_QD: Array, own_Q: Array, count: Array, shape: _Shape) -> tuple[Array, Array]:
    whole, rows = PartitionSpec(), PartitionSpec("corpus")
    search = jax.shard_map(
        partial(_nearest, shape=shape), mesh=shape.mesh, in_specs=(rows, whole, whole, whole), out_specs=whole,
        check_vma=False,
    )  # fmt: skip
    return search(corpus_ND, queries_QD, own_Q, count)


def _place(vectors_ND: Rows, share: int, mesh: Mesh) -> Array:
    """The rows, padded with zeros to `share` a device, each device given its own part alone."""
    shape = (share * mesh.size, vectors_ND.shape[1])

    def part(index: Any) -> np.ndarray:
        rows = vectors_ND[index[0]]
        return np.pad(np.asarray(rows, np.float32), ((0, share - len(rows)), (0, 0)))

    return jax.make_array_from_callback(shape, NamedSharding(mesh, PartitionSpec("corpus")), part)


def _nearest(
    corpus_ND: Array, queries_QD: Array, own_Q: Array, count: Array, shape: _Shape
) -> tuple[Array, Array]:  # fmt: skip
    """What one device does with its rows; the result is the same on all."""
    k, kept, block = shape.k, shape.kept, shape.block
    first = jax.lax.axis_index("corpus") * len(corpus_ND)
    low = queries_QD.astype(shape.dtype)

    def compare(best: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        rows_CD = jax.lax.dynamic_slice_in_dim(corpus_ND, number * block, block).astype(shape.dtype)
        sims_QC = jnp.matmul(low, rows_CD.T, preferred_element_type=jnp.float32, precision="highest")
        ids_C = first + number * block + jnp.arange(block, dtype=jnp.int32)
        absent_QC = (ids_C >= count)[None] | (ids_C[None] == own_Q[:, None])
        sims_QK, places_QK = block_top_k(jnp.where(absent_QC, -jnp.inf, sims_QC), min(kept, block))
        # What was found before has lower ids and stands first, so that ties go to them.
        both = jnp.concatenate([best[0], sims_QK], axis=1), jnp.concatenate([best[1], ids_C[places_QK]], axis=1)
        sims_QK, order_QK = jax.lax.top_k(both[0], kept)
        return (sims_QK, jnp.take_along_axis(both[1], order_QK, axis=1)), None

    start = jnp.full((len(queries_QD), kept), -jnp.inf), jnp.full((len(queries_QD), kept), -1, jnp.int32)
    (sims_QK, ids_QK), _ = jax.lax.scan(compare, start, jnp.arange(len(corpus_ND) // block, dtype=jnp.int32))
    rows_QKD = corpus_ND[jnp.clip(ids_QK - first, 0, len(corpus_ND) - 1)]
    exact_QK = jnp.sum(rows_QKD * queries_QD[:, None], axis=-1)
    sims_QK = jnp.where(jnp.isneginf(sims_QK), -jnp.inf, exact_QK)
    sims_QK, ids_QK = (jax.lax.all_gather(x, "corpus", axis=1, tiled=True) for x in (sims_QK, ids_QK))
    ids_QK = jnp.where(jnp.isneginf(sims_QK), jnp.iinfo(jnp.int32).max, ids_QK)
    falling_QK, ids_QK = jax.lax.sort((-sims_QK, ids_QK), num_keys=2)
    short = max(k - ids_QK.shape[1], 0)
    falling_QK, ids_QK = (jnp.pad(falling_QK, ((0, 0), (0, short)), constant_values=jnp.inf)[:, :k],
                          jnp.pad(ids_QK, ((0, 0), (0, short)))[:, :k])  # fmt: skip
    return jnp.where(jnp.isposinf(falling_QK), -1, ids_QK), -falling_QK


def block_top_k(values_QC: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k`, in groups: the k largest lie in the k groups with the largest maxima. Ties by lower place.

    The maxima are one sweep over memory; only they, and k groups, are sorted.
    """
    width = values_QC.shape[1]
    if width % _GROUP or width // _GROUP <= k:
        return jax.lax.top_k(values_QC, k)
    groups_QGg = values_QC.reshape(len(values_QC), -1, _GROUP)
    chosen_QK = jnp.sort(jax.lax.top_k(jnp.max(groups_QGg, axis=-1), k)[1], axis=1)
    members_QK = jnp.take_along_axis(groups_QGg, chosen_QK[:, :, None], axis=1).reshape(len(values_QC), -1)
    top_QK, places_QK = jax.lax.top_k(members_QK, k)
    return top_QK, jnp.take_along_axis(chosen_QK, places_QK // _GROUP, axis=1) * _GROUP + places_QK % _GROUP


def merge_pieces(
    ids_MK: np.ndarray, sims_MK: np.ndarray, document_M: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """From neighbours of pieces to neighbours of documents: two documents are as alike as their closest pieces.

    Args:
        ids_MK: the neighbours of each piece, numbers of pieces; -1: none.
        sims_MK: their similarities.
        document_M: the document of each piece, rising.
        k: neighbours of a document.

    Returns:
        (ids, sims) [documents, k] as a search gives them.
    """
    found = ids_MK >= 0
    here = np.broadcast_to(document_M[:, None], ids_MK.shape)[found]
    there, sims = document_M[ids_MK[found]], sims_MK[found]
    other = here != there
    here, there, sims = here[other], there[other], sims[other]
    order = np.lexsort((-sims, there, here))
    here, there, sims = here[order], there[order], sims[order]
    first = np.ones(len(here), bool)
    first[1:] = (here[1:] != here[:-1]) | (there[1:] != there[:-1])
    here, there, sims = here[first], there[first], sims[first]
    order = np.lexsort((there, -sims, here))
    here, there, sims = here[order], there[order], sims[order]
    documents = int(document_M[-1]) + 1 if len(document_M) else 0
    starts = np.searchsorted(here, np.arange(documents))
    rank = np.arange(len(here)) - starts[here]
    ids_NK, sims_NK = np.full((documents, k), -1, np.int64), np.full((documents, k), -np.inf, np.float32)
    near = rank < k
    ids_NK[here[near], rank[near]], sims_NK[here[near], rank[near]] = there[near], sims[near]
    return ids_NK, sims_NK
