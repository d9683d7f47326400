"""Every back-end against the float32 reference, every mask against its definition."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.core.masking import AttentionMask, dense_mask, self_attention_mask
from lmlab.models.attention import attention, reference_attention
from lmlab.models.splash import splash_attention

B, T, N, K, H = 2, 160, 4, 2, 8


def operands(length: int = T, size: int = H, dtype: str = "float32") -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, length, N, size), (B, length, K, size), (B, length, K, size)]
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def packed(length: int) -> tuple[jax.Array, jax.Array]:
    """Segments of uneven length, the last 7 places empty; positions count within the segment."""
    segments = np.repeat([1, 2, 3], [length // 3, length // 2, length - length // 3 - length // 2])
    segments[-7:] = 0
    starts = np.r_[0, np.flatnonzero(np.diff(segments)) + 1]
    positions = np.arange(length) - np.repeat(starts, np.diff(np.r_[starts, length]))
    rows = lambda x: jnp.asarray(np.stack([x] * B), jnp.int32)
    return rows(positions), rows(segments)


MASKS = {
    "causal": lambda pos, seg: self_attention_mask(jnp.broadcast_to(jnp.arange(pos.shape[1]), pos.shape)),
    "packed": lambda pos, seg: self_attention_mask(pos, seg),
    "window": lambda pos, seg: self_attention_mask(pos, seg, window=5),
    "full": lambda pos, seg: self_attention_mask(pos, seg, causal=False),
    "prefix": lambda pos, seg: self_attention_mask(pos, seg, prefix_B=jnp.asarray([3, 11])),
    "rule": lambda pos, seg: self_attention_mask(pos, seg, rule=lambda q, k: (q + k) % 3 != 0),
    "allowed": lambda pos, seg: self_attention_mask(
        jnp.broadcast_to(jnp.arange(T), (B, T)),
        allowed_BTS=jax.random.bernoulli(jax.random.key(1), 0.3, (B, T, T)),
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_equals_reference_with_gradients(name, dtype):
    mask = MASKS[name](*packed(T))
    q, k, v = operands(dtype=dtype)

    def value(backend: str):
        weigh = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, mask, backend).astype(jnp.float32)))
        return jax.jit(jax.grad(weigh, argnums=(0, 1, 2)))(q, k, v), attention(q, k, v, mask, backend)

    tolerance = 2e-5 if dtype == "float32" else 6e-2
    chex.assert_trees_all_close(value("xla"), value("reference"), atol=tolerance, rtol=tolerance)


def brute_force(mask: AttentionMask, row: int, i: int, j: int, prefix: int | None) -> bool:
    at = lambda x, place: int(x[row, place])
    q, k = at(mask.query_positions_BT, i), at(mask.key_positions_BS, j)
    seen = not mask.causal or k <= q or (prefix is not None and k < prefix)
    if mask.window is not None:
        seen = seen and q - k < mask.window
    if mask.query_segments_BT is not None:
        seen = seen and at(mask.query_segments_BT, i) == at(mask.key_segments_BS, j) != 0
    if mask.rule is not None:
        seen = seen and (q + k) % 3 != 0
    return seen


@pytest.mark.parametrize("name", ["causal", "packed", "window", "full", "prefix", "rule"])
def test_dense_mask_is_its_definition(name):
    mask = MASKS[name](*packed(24))
    dense = np.asarray(dense_mask(mask))
    prefixes = [None, None] if mask.prefix_B is None else [3, 11]
    expected = [[[brute_force(mask, b, i, j, prefixes[b]) for j in range(24)] for i in range(24)] for b in range(B)]
    assert np.array_equal(dense, np.asarray(expected))


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients(backend):
    positions = jnp.zeros((B, T), jnp.int32)
    mask = self_attention_mask(positions, jnp.zeros((B, T), jnp.int32))
    out, slopes = jax.value_and_grad(lambda q: jnp.sum(attention(q, *operands()[1:], mask, backend)))(operands()[0])
    assert out == 0
    chex.assert_tree_all_finite(slopes)


def test_one_query_against_a_cache_sees_its_past():
    q, k, v = operands()
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    full = reference_attention(q, k, v, self_attention_mask(places))
    one = attention(q[:, 9:10], k, v, AttentionMask(jnp.full((B, 1), 9), places), "xla")
    chex.assert_trees_all_close(one[:, 0], full[:, 9], atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "packed", "window"])
def test_splash_equals_reference(name):
    # The TPU kernel, interpreted: the same program, in slow motion.
    q, k, v = operands(256, 128)
    mask = MASKS[name](*packed(256))
    out = splash_attention(q, k, v, mask, interpret=True)
    chex.assert_trees_all_close(out, reference_attention(q, k, v, mask), atol=2e-3)


@pytest.mark.parametrize(("backend", "hint"), [("cudnn", "a GPU"), ("splash", "a TPU")])
def test_a_backend_that_cannot_serve_says_why(backend, hint):
    with pytest.raises(UserError, match=hint):
        attention(*operands(), MASKS["causal"](*packed(T)), backend)
