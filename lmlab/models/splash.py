"""TPU splash attention: block-sparse, no [T, S] tensor in memory, segments and windows inside the kernel."""

import jax
import jax.numpy as jnp

from lmlab.core.masking import AttentionMask
from lmlab.core.sharding import platform
from lmlab.core.types import Array

BLOCK = 128
"""Rows of a kernel tile; lengths must be a multiple of it."""


def splash_obstacle(mask: AttentionMask, q_BTNH: Array) -> str:
    """Why the kernel cannot take these queries under this mask; empty if it can."""
    if platform() != "tpu":
        return "a TPU for splash attention"
    if not mask.ordered or mask.rule is not None or mask.allowed_BTS is not None:
        return "a causal self-attention mask without rules, over rows that are whole, for splash attention"
    if q_BTNH.shape[1] % BLOCK:
        return f"a length that is a multiple of {BLOCK} for splash attention (it is {q_BTNH.shape[1]})"
    if q_BTNH.shape[3] % BLOCK:
        return f"a head size that is a multiple of {BLOCK} for splash attention (it is {q_BTNH.shape[3]})"
    return ""


def splash_attention(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, mask: AttentionMask, interpret: bool = False
) -> Array:
    """The kernel, row by row under vmap. `interpret` runs it in slow motion on any device, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, size = q_BTNH.shape
    shape = (length, length)
    one = masks.CausalMask(shape) if mask.window is None else masks.LocalMask(shape, (mask.window - 1, 0), 0)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    groups = heads // k_BTKH.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BTNH * size**-0.5, k_BTKH, v_BTKH))
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    segments_BT = mask.query_segments_BT
    if segments_BT is None:
        return jax.vmap(attend)(q, k, v).transpose(0, 2, 1, 3)
    out_BNTH = jax.vmap(attend)(q, k, v, kernel.SegmentIds(q=segments_BT, kv=segments_BT))
    # The kernel lets padding attend to padding; everywhere else in lmlab it sees nothing and gets zeros.
    return jnp.where(segments_BT[:, :, None, None] != 0, out_BNTH.transpose(0, 2, 1, 3), 0)
