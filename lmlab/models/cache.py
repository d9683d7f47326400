"""The key-value cache: static shapes, one write cursor a row, exact under padding, rewinding and gathering."""

from dataclasses import replace

import jax.numpy as jnp
from flax import struct

from lmlab.core.types import Array


@struct.dataclass
class KVCache:
    """Keys and values of the S places of each row. A place with segment 0 is empty and seen by nobody."""

    keys_LBSKH: Array
    values_LBSKH: Array
    positions_BS: Array
    segments_BS: Array
    length_B: Array
    """Where each row writes next."""


def empty_cache(layers: int, batch: int, length: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVCache:
    """A cache with room for `length` tokens in each of `batch` rows."""
    zeros = jnp.zeros((layers, batch, length, kv_heads, head_dim), dtype)
    places = jnp.zeros((batch, length), jnp.int32)
    return KVCache(zeros, zeros, places, places, jnp.zeros((batch,), jnp.int32))


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
    """Keys and values of one layer into their places."""
    rows = jnp.arange(places_BT.shape[0])[:, None]
    at = (layer, rows, places_BT)
    return replace(
        cache,
        keys_LBSKH=cache.keys_LBSKH.at[at].set(keys_BTKH.astype(cache.keys_LBSKH.dtype), mode="drop"),
        values_LBSKH=cache.values_LBSKH.at[at].set(values_BTKH.astype(cache.values_LBSKH.dtype), mode="drop"),
    )


def take_rows(cache: KVCache, rows_N: Array) -> KVCache:
    """The cache of the chosen rows; repeats allowed (n samples of one prompt, resampled particles)."""
    return KVCache(
        keys_LBSKH=cache.keys_LBSKH[:, rows_N],
        values_LBSKH=cache.values_LBSKH[:, rows_N],
        positions_BS=cache.positions_BS[rows_N],
        segments_BS=cache.segments_BS[rows_N],
        length_B=cache.length_B[rows_N],
    )


def put_rows(cache: KVCache, rows_N: Array, other: KVCache) -> KVCache:
    """Rows of a cache of the same room in place of the chosen ones; those beyond the last row are dropped."""
    return KVCache(
        keys_LBSKH=cache.keys_LBSKH.at[:, rows_N].set(other.keys_LBSKH, mode="drop"),
        values_LBSKH=cache.values_LBSKH.at[:, rows_N].set(other.values_LBSKH, mode="drop"),
        positions_BS=cache.positions_BS.at[rows_N].set(other.positions_BS, mode="drop"),
        segments_BS=cache.segments_BS.at[rows_N].set(other.segments_BS, mode="drop"),
        length_B=cache.length_B.at[rows_N].set(other.length_B, mode="drop"),
    )


def rewind(cache: KVCache, length_B: Array) -> KVCache:
    """Forget all but the first `length_B` tokens of each row."""
    kept = jnp.arange(cache.segments_BS.shape[1])[None] < length_B[:, None]
    return replace(
        cache, segments_BS=jnp.where(kept, cache.segments_BS, 0), length_B=jnp.minimum(length_B, cache.length_B)
    )
