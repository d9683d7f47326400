"""The key-value cache: static shapes, one write cursor a row, exact under padding, rewinding and gathering."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from lmlab.core.types import Array

PerLayer: TypeAlias = Array | tuple[Array, ...]
"""[L, B, K, S, H], or an array [B, K, S, H] for each layer. Heads come before places, so that a query reads the keys of
its head in one sweep."""


@struct.dataclass
class KVCache:
    """Keys and values of the S places of each row. A place with segment 0 is empty and seen by nobody."""

    keys: PerLayer
    values: PerLayer
    positions_BS: Array
    segments_BS: Array
    length_B: Array
    """Where each row writes next."""


def empty_cache(
    layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: jnp.dtype, stacked: bool = True
) -> KVCache:
    """A cache with room for `length` tokens in each of `batch` rows; of all layers in one array, or each apart."""
    shape = (batch, kv_heads, length, head_dim)

    def zeros() -> PerLayer:
        return jnp.zeros((layers, *shape), dtype) if stacked else tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    places = lambda: jnp.zeros((batch, length), jnp.int32)
    # No array twice: a cache can be donated.
    return KVCache(zeros(), zeros(), places(), places(), jnp.zeros((batch,), jnp.int32))


def claim_places(cache: KVCache, positions_BT: Array, segments_BT: Array) -> tuple[KVCache, Array]:
    """Enter T tokens a row at its cursor; returns the cache and the places_BT that keys and values go to.

    Padding (segment 0, at the end of the row) is entered but not counted, so the next write covers it.
    Tokens beyond the last place are dropped.
    """
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    places_BT = cache.length_B[:, None] + jnp.arange(positions_BT.shape[1])[None]
    cache = replace(
        cache,
        positions_BS=cache.positions_BS.at[rows, places_BT].set(positions_BT, mode="drop"),
        segments_BS=cache.segments_BS.at[rows, places_BT].set(segments_BT, mode="drop"),
        length_B=cache.length_B + jnp.sum(segments_BT != 0, axis=1, dtype=jnp.int32),
    )
    return cache, places_BT


def write(cache: KVCache, layer: int | Array, places_BT: Array, keys_BTKH: Array, values_BTKH: Array) -> KVCache:
    """Keys and values of one layer into their places. Where layers lie apart, `layer` must be an int."""
    rows = jnp.arange(places_BT.shape[0])[:, None]
    at = (rows, slice(None), places_BT)

    def written(old: PerLayer, new_BTKH: Array) -> PerLayer:
        if isinstance(old, tuple):
            one = old[layer]
            return (*old[:layer], one.at[at].set(new_BTKH.astype(one.dtype), mode="drop"), *old[layer + 1 :])
        return old.at[(layer, *at)].set(new_BTKH.astype(old.dtype), mode="drop")

    return replace(cache, keys=written(cache.keys, keys_BTKH), values=written(cache.values, values_BTKH))


def read(cache: KVCache, layer: int | Array) -> tuple[Array, Array]:
    """All keys and values [B, S, K, H] of one layer."""

    def one(part: PerLayer) -> Array:
        layer_BKSH = part[layer] if isinstance(part, tuple) else jax.lax.dynamic_index_in_dim(part, layer, 0, False)
        return layer_BKSH.transpose(0, 2, 1, 3)

    return one(cache.keys), one(cache.values)


def take_rows(cache: KVCache, rows_N: Array) -> KVCache:
    """The cache of the chosen rows; repeats allowed (n samples of one prompt, resampled particles)."""
    return _each(cache, lambda x, axis: jnp.take(x, rows_N, axis=axis, mode="clip"))


def put_rows(cache: KVCache, rows_N: Array, other: KVCache) -> KVCache:
    """Rows of a cache of the same room in place of the chosen ones; those beyond the last row are dropped."""

    def put(x: Array, axis: int, new: Array) -> Array:
        return x.at[(*(slice(None),) * axis, rows_N)].set(new, mode="drop")

    return _each(cache, put, other)


def resize(cache: KVCache, length: int) -> KVCache:
    """The cache with room for `length` tokens a row, which must not be fewer than it holds."""

    def fit(x: Array, axis: int) -> Array:
        more = length - x.shape[axis]
        if more < 0:
            return jax.lax.slice_in_dim(x, 0, length, axis=axis)
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    big = lambda part: jax.tree.map(lambda x: fit(x, x.ndim - 2), part)
    return replace(
        cache,
        keys=big(cache.keys),
        values=big(cache.values),
        positions_BS=fit(cache.positions_BS, 1),
        segments_BS=fit(cache.segments_BS, 1),
    )


def rewind(cache: KVCache, length_B: Array) -> KVCache:
    """Forget all but the first `length_B` tokens of each row."""
    kept = jnp.arange(cache.segments_BS.shape[1])[None] < length_B[:, None]
    return replace(
        cache, segments_BS=jnp.where(kept, cache.segments_BS, 0), length_B=jnp.minimum(length_B, cache.length_B)
    )


def _each(cache: KVCache, change: Callable[..., Array], *others: KVCache) -> KVCache:
    """`change(array, axis of the rows, ...)` of every array of a cache."""
    big = lambda *parts: jax.tree.map(lambda x, *rest: change(x, x.ndim - 4, *rest), *parts)
    small = lambda *parts: change(parts[0], 0, *parts[1:])
    both = (cache, *others)
    return KVCache(
        keys=big(*(one.keys for one in both)),
        values=big(*(one.values for one in both)),
        positions_BS=small(*(one.positions_BS for one in both)),
        segments_BS=small(*(one.segments_BS for one in both)),
        length_B=small(*(one.length_B for one in both)),
    )
