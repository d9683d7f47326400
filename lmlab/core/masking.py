"""Masked sums, and the description of who attends to whom that all methods share."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import jax.numpy as jnp
from flax import struct

from lmlab.core.types import AnswerBatch, Array, Ratio

Rule: TypeAlias = Callable[[Array, Array], Array]
"""`rule(query_positions, key_positions) -> bool`, on arrays that broadcast against each other."""


def masked_sum(values: Array, mask: Array) -> Array:
    """Float32 sum of `values` where `mask` (same shape, bool or weights) is not 0; other values may be NaN.

    The value is replaced before the product, so that neither it nor its gradient leaks out of a masked place.
    """
    chosen = jnp.where(mask != 0, values, 0).astype(jnp.float32)
    return jnp.sum(chosen * mask.astype(jnp.float32))


def masked_ratio(values: Array, mask: Array) -> Ratio:
    """Sum of `values` under `mask`, with the sum of the mask as its weight."""
    return Ratio(sum=masked_sum(values, mask), weight=jnp.sum(mask.astype(jnp.float32)))


@struct.dataclass
class AttentionMask:
    """Who attends to whom, as data that each attention back-end turns into its own form.

    Query t sees key s where all of these hold: both belong to the same segment, which is not 0; s is not
    after t (`causal`), or s lies in the prefix; s is less than `window` before t; `rule` says so; `allowed` says so.
    Positions count within the segment. Arrays that are None do not restrict.
    """

    query_positions_BT: Array
    key_positions_BS: Array
    query_segments_BT: Array | None = None
    key_segments_BS: Array | None = None
    prefix_B: Array | None = None
    """Keys at positions below this are seen from everywhere in their segment (prefix LM)."""
    allowed_BTS: Array | None = None
    """bool, any further restriction."""
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    rule: Rule | None = struct.field(pytree_node=False, default=None)
    ordered: bool = struct.field(pytree_node=False, default=False)
    """Promise that queries and keys are the same rows in order, so that index order is time order within a
    segment. Lets a back-end skip the half above the diagonal."""


def self_attention_mask(
    positions_BT: Array, segments_BT: Array | None = None, *, causal: bool = True, window: int | None = None,
    prefix_B: Array | None = None, rule: Rule | None = None, allowed_BTS: Array | None = None,
) -> AttentionMask:  # fmt: skip
    """The mask of a row over itself; positions rise by one within each segment."""
    return AttentionMask(
        query_positions_BT=positions_BT, key_positions_BS=positions_BT,
        query_segments_BT=segments_BT, key_segments_BS=segments_BT,
        prefix_B=prefix_B, allowed_BTS=allowed_BTS, causal=causal, window=window, rule=rule,
        ordered=causal and prefix_B is None,
    )  # fmt: skip


def answers_mask(batch: AnswerBatch, window: int | None = None) -> AttentionMask | None:
    """The mask of rows in which answers share a prompt and do not see each other; None: the usual one does."""
    if batch.branches_BT is None:
        return None
    query_BT1, key_B1T = batch.branches_BT[:, :, None], batch.branches_BT[:, None, :]
    allowed_BTS = (key_B1T == 0) | (key_B1T == query_BT1)
    return self_attention_mask(batch.positions_BT, batch.segments_BT, window=window or None, allowed_BTS=allowed_BTS)


def dense_mask(mask: AttentionMask) -> Array:
    """The mask as bool [B, T, S] (or [1, T, S] where no row differs)."""
    query_BT1, key_B1S = mask.query_positions_BT[:, :, None], mask.key_positions_BS[:, None, :]
    seen = jnp.ones(jnp.broadcast_shapes(query_BT1.shape, key_B1S.shape), bool)
    if mask.causal:
        seen = key_B1S <= query_BT1
    if mask.prefix_B is not None:
        seen |= key_B1S < mask.prefix_B[:, None, None]
    if mask.window is not None:
        seen &= query_BT1 - key_B1S < mask.window
    if mask.rule is not None:
        seen &= mask.rule(query_BT1, key_B1S)
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        query_segment, key_segment = mask.query_segments_BT[:, :, None], mask.key_segments_BS[:, None, :]
        seen &= (query_segment == key_segment) & (key_segment != 0)
    if mask.allowed_BTS is not None:
        seen &= mask.allowed_BTS
    return seen


def slice_mask(mask: AttentionMask, queries: slice, keys: slice) -> AttentionMask:
    """The same mask over a block of queries and a block of keys."""
    cut = lambda array, part: None if array is None else array[:, part]
    allowed = mask.allowed_BTS
    return replace(
        mask,
        query_positions_BT=mask.query_positions_BT[:, queries], key_positions_BS=mask.key_positions_BS[:, keys],
        query_segments_BT=cut(mask.query_segments_BT, queries), key_segments_BS=cut(mask.key_segments_BS, keys),
        allowed_BTS=None if allowed is None else allowed[:, queries, keys],
    )  # fmt: skip
