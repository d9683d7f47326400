"""One attention for all methods: softmax(q k' / sqrt(H) under a mask) v, and the back-ends that compute it.

A query that sees no key gets zeros from every back-end.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lmlab.core.errors import UserError
from lmlab.core.masking import AttentionMask, dense_mask, slice_mask
from lmlab.core.sharding import devices_in_mesh, platform
from lmlab.core.types import Array
from lmlab.models.attention_mesh import attend_on_mesh
from lmlab.models.splash import splash_attention, splash_obstacle

HIDDEN_SCORE = -1e30
"""Score of a hidden key: below any real score, and finite, so that a row of them gives no NaN."""


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask, backend: str = "auto") -> Array:
    """Attention output [B, T, N, H]; N is a multiple of K. Softmax in float32, scale 1/sqrt(H).

    backend: xla, cudnn (GPU, 16 bit), splash (TPU), reference (float32, for tests), or auto.
    A back-end asked for by name that cannot serve raises `UserError`; auto never picks one that cannot. On a mesh the
    back-end sees what lies on one device.
    """
    attend = partial(_attend, backend=backend)
    if devices_in_mesh() > 1:
        return attend_on_mesh(attend, q_BTNH, k_BSKH, v_BSKH, mask)
    return attend(q_BTNH, k_BSKH, v_BSKH, mask)


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask, backend: str) -> Array:
    chosen = _choose(q_BTNH, mask) if backend == "auto" else backend
    if chosen == "cudnn" and (reason := _cudnn_obstacle(q_BTNH)):
        raise UserError("model.execution.attention", backend, reason, "Use auto.")
    if chosen == "splash" and (reason := splash_obstacle(mask, q_BTNH)):
        raise UserError("model.execution.attention", backend, reason, "Use auto.")
    return BACKENDS[chosen](q_BTNH, k_BSKH, v_BSKH, mask)


def _choose(q_BTNH: Array, mask: AttentionMask) -> str:
    device = platform()
    if device == "tpu" and not splash_obstacle(mask, q_BTNH):
        return "splash"
    if device == "gpu" and not _cudnn_obstacle(q_BTNH):
        return "cudnn"
    return "xla"


def reference_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
    """The definition, in float32 with every score held: what the other back-ends are tested against."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q, k_BSNH, precision="highest") / q.shape[-1] ** 0.5
    seen_BNTS = jnp.broadcast_to(dense_mask(mask)[:, None], scores_BNTS.shape)
    weights_BNTS = jax.nn.softmax(jnp.where(seen_BNTS, scores_BNTS, HIDDEN_SCORE), axis=-1)
    weights_BNTS = jnp.where(jnp.any(seen_BNTS, axis=-1, keepdims=True), weights_BNTS, 0)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH, precision="highest").astype(q_BTNH.dtype)


def xla_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
    """Einsum and softmax, heads first. Where the mask is causal in order, blocks of queries skip later keys."""
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BKGTH = (q_BTNH * size**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    block = _query_block(length) if mask.ordered else length
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        keys = slice(0, stop if mask.ordered else k_BSKH.shape[1])
        seen_BTS = dense_mask(slice_mask(mask, slice(start, stop), keys))
        scores = jnp.einsum(
            "bkgth,bksh->bkgts",
            q_BKGTH[:, :, :, start:stop],
            k_BKSH[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        weights = _masked_softmax(scores, seen_BTS[:, None, None]).astype(v_BSKH.dtype)
        outputs.append(jnp.einsum("bkgts,bksh->bkgth", weights, v_BKSH[:, :, keys]))
    out_BKGTH = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _query_block(length: int) -> int:
    """At most eight blocks, none shorter than 64: 9/16 of the full square at a length of 512 and more."""
    return max(64, -(-length // 8))


def _masked_softmax(scores: Array, seen: Array) -> Array:
    """Softmax over the seen places of the last axis; zeros where none is seen."""
    scores = jnp.where(seen, scores, HIDDEN_SCORE)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - top), 0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def _cudnn_obstacle(q_BTNH: Array) -> str:
    """Why cuDNN's fused attention cannot take these queries; empty if it can."""
    if platform() != "gpu":
        return "a GPU for cudnn attention"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"16-bit activations for cudnn attention (they are {q_BTNH.dtype})"
    return ""


def cudnn_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask: AttentionMask) -> Array:
    """CuDNN's fused kernel under a dense mask."""
    seen_B1TS = jnp.broadcast_to(dense_mask(mask)[:, None], (q_BTNH.shape[0], 1, q_BTNH.shape[1], k_BSKH.shape[1]))
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=seen_B1TS, implementation="cudnn")
    # The kernel averages all values for a query that sees no key.
    return jnp.where(jnp.any(seen_B1TS, axis=-1).transpose(0, 2, 1)[..., None], out_BTNH, 0)


BACKENDS: dict[str, Callable[[Array, Array, Array, AttentionMask], Array]] = {
    "reference": reference_attention,
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
