"""Attention on a mesh: each device attends with its rows, its heads and its part of the sequence.

Heads and rows need nothing of each other. Where the sequence is divided (mesh axis `context`), a device brings the
keys and values of the whole sequence together and keeps its own queries; the gradient is scattered back.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec

from lmlab.core.masking import AttentionMask, slice_mask
from lmlab.core.sharding import auto_axes, axis_size, free_axes, token_axes
from lmlab.core.types import Array

Attend: TypeAlias = Callable[[Array, Array, Array, AttentionMask], Array]

QUERY_BLOCK = 1024
"""Queries whose scores over the whole sequence are held at once where the sequence is divided."""


def attend_on_mesh(attend: Attend, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
    """`attend` under `jax.shard_map`; [B, T, N, H] as without a mesh. What the mesh does not divide stays whole."""
    free = free_axes()
    if not free:
        return attend(q_BTNH, k_BSKH, v_BSKH, mask)
    batch, length = q_BTNH.shape[:2]
    rows, places = token_axes(batch, length)
    heads = "tensor" if "tensor" in free and k_BSKH.shape[2] % axis_size("tensor") == 0 else None
    split = bool(places) and k_BSKH.shape[1] == length
    part = "context" if split else None

    def of_rows(array: Array, *rest: str | None) -> PartitionSpec:
        return PartitionSpec(rows if array.shape[0] == batch else None, *rest)

    mask_specs = _mask_specs(mask, part, of_rows)
    heads_spec = PartitionSpec(rows, part, heads)

    def local(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
        if not split:
            return attend(q_BTNH, k_BSKH, v_BSKH, mask)
        k_BSKH, v_BSKH = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k_BSKH, v_BSKH))
        return _in_blocks(attend, q_BTNH, k_BSKH, v_BSKH, replace(mask, ordered=False))

    # All axes, also those of one device: TPU kernels are left whole by the partitioner.
    return jax.shard_map(
        local, in_specs=(heads_spec, heads_spec, heads_spec, mask_specs), out_specs=heads_spec, axis_names=auto_axes(),
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, mask)  # fmt: skip


def _mask_specs(
    mask: AttentionMask, part: str | None, of_rows: Callable[..., PartitionSpec]
) -> AttentionMask:  # fmt: skip
    """The mask with a PartitionSpec in place of each array: queries are divided, keys are whole."""
    divided = {"query_positions_BT", "query_segments_BT", "allowed_BTS"}
    arrays = {f.name: getattr(mask, f.name) for f in fields(mask) if f.metadata.get("pytree_node", True)}
    specs: dict[str, Any] = {
        name: of_rows(array, part) if name in divided else of_rows(array)
        for name, array in arrays.items()
        if array is not None
    }
    return replace(mask, **specs)


def _in_blocks(attend: Attend, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
    """Block after block of queries, each computed again in the backward pass, so that no two hold their scores."""
    keys = slice(0, k_BSKH.shape[1])
    outputs = []
    for start in range(0, q_BTNH.shape[1], QUERY_BLOCK):
        queries = slice(start, start + QUERY_BLOCK)
        again = jax.checkpoint(attend)
        outputs.append(again(q_BTNH[:, queries], k_BSKH, v_BSKH, slice_mask(mask, queries, keys)))
    return jax.numpy.concatenate(outputs, axis=1)
