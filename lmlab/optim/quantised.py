"""How arrays of an optimiser's state are stored: float32, bfloat16, or block by block in 8 or 4 bits.

Codes keep the shape of the array, so that they lie on a mesh as it does; blocks run along its last axis longer than 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array

BLOCK = 256
"""Most numbers that share a scale."""
SMALL = 4096
"""Arrays with fewer numbers are left in float32 by the 8-bit stores."""


class Coded(NamedTuple):
    """A quantised array."""

    codes: Array
    """[shape] uint8; INT4 packs two numbers into one along the axis of the blocks."""
    scales: Array
    """[shape, with blocks in place of the numbers of that axis] float32; of INT4 twice as many, with the minima."""


class Store(NamedTuple):
    """A way to store float32 arrays."""

    encode: Callable[[Array], Any]
    decode: Callable[[Any, tuple[int, ...]], Array]
    """`decode(stored, shape)`: float32 of the shape that was encoded."""


def _plain(dtype: Any) -> Store:
    return Store(lambda x: x.astype(dtype), lambda stored, _: stored.astype(jnp.float32))


FLOAT32, BFLOAT16 = _plain(jnp.float32), _plain(jnp.bfloat16)


def dynamic_code(signed: bool) -> np.ndarray:
    """256 ascending numbers in [-1, 1] or [0, 1]: seven decades, the last the finest (arXiv 2110.02861, part 2.2)."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += [*means, *(-means if signed else [])]
    code = np.sort(np.asarray(numbers, np.float32))
    if signed:
        # Theirs ends at -0.993 on this side; the largest number of a block is to be exact whatever its sign.
        code[0] = -1
    return code


def _blockwise(signed: bool) -> Store:
    code = dynamic_code(signed)
    borders = (code[1:] + code[:-1]) / 2

    def encode(x: Array) -> Array | Coded:
        if x.size < SMALL:
            return x.astype(jnp.float32)
        blocks = _blocks(x)
        scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        share = blocks / jnp.where(scales > 0, scales, 1)
        codes = jnp.searchsorted(jnp.asarray(borders), share, method="scan_unrolled")
        if not signed:
            # A second moment that is not zero must not become zero: the step would be divided by nothing.
            codes = jnp.where((share > 0) & (codes == 0), 1, codes)
        return Coded(_unblocked(codes.astype(jnp.uint8), x.shape), _per_block(scales, x.shape))

    def decode(stored: Array | Coded, shape: tuple[int, ...]) -> Array:
        if not isinstance(stored, Coded):
            return stored
        numbers = jnp.asarray(code)[_blocks(stored.codes).astype(jnp.int32)]
        return _unblocked(numbers * _to_blocks(stored.scales, shape), shape)

    return Store(encode, decode)


def _by_root(store: Store) -> Store:
    return Store(lambda x: store.encode(jnp.sqrt(x)), lambda stored, shape: store.decode(stored, shape) ** 2)


SIGNED8, SQUARE8 = _blockwise(signed=True), _by_root(_blockwise(signed=False))
"""8 bits with one scale a block: for first moments, and for second ones, by their roots, which span half as many
decades (the steps err half as much where the columns of a gradient differ a thousandfold)."""


def _encode_int4(x: Array) -> Coded:
    blocks = _blocks(x)
    low, high = jnp.min(blocks, axis=-1, keepdims=True), jnp.max(blocks, axis=-1, keepdims=True)
    step = jnp.where(high > low, (high - low) / 15, 1)
    codes = _unblocked(jnp.round((blocks - low) / step).astype(jnp.uint8), x.shape)
    scales = jnp.concatenate([_per_block(step, x.shape), _per_block(low, x.shape)], axis=block_axis(x.shape))
    return Coded(_packed(codes), scales)


def _decode_int4(stored: Coded, shape: tuple[int, ...]) -> Array:
    axis = block_axis(shape)
    step, low = (_to_blocks(part, shape) for part in jnp.split(stored.scales, 2, axis=axis))
    codes = _unpacked(stored.codes, shape)
    return _unblocked(_blocks(codes).astype(jnp.float32) * step + low, shape)


INT4 = Store(_encode_int4, _decode_int4)
"""4 bits between the least and the largest number of a block: for projectors (arXiv 2407.08296, section 3.3)."""


def block_axis(shape: tuple[int, ...]) -> int:
    """The axis that blocks run along: the last one longer than 1."""
    return max((i for i, size in enumerate(shape) if size > 1), default=len(shape) - 1)


def _cut(size: int) -> tuple[int, int]:
    """How many blocks, and of how many numbers."""
    blocks = -(-size // BLOCK)
    return blocks, -(-size // blocks)


def _blocks(x: Array) -> Array:
    """[..., n, 1...] -> [..., blocks, block], padded by zeros."""
    axis = block_axis(x.shape)
    blocks, block = _cut(x.shape[axis])
    x = x.reshape(x.shape[: axis + 1])
    padded = jnp.pad(x, [(0, 0)] * axis + [(0, blocks * block - x.shape[axis])])
    return padded.reshape(*x.shape[:axis], blocks, block)


def _unblocked(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Undo `_blocks`."""
    axis = block_axis(shape)
    return blocks.reshape(*shape[:axis], -1)[..., : shape[axis]].reshape(shape)


def _per_block(scales: Array, shape: tuple[int, ...]) -> Array:
    """[..., blocks, 1] -> the shape of the array, with the blocks in place of the numbers."""
    axis = block_axis(shape)
    return scales.reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _to_blocks(scales: Array, shape: tuple[int, ...]) -> Array:
    """Undo `_per_block`."""
    return scales.reshape(*shape[: block_axis(shape)], -1, 1)


def _packed(codes: Array) -> Array:
    """Two 4-bit codes in one uint8, the second of them 0 beyond the end."""
    axis = block_axis(codes.shape)
    flat = codes.reshape(codes.shape[: axis + 1])
    flat = jnp.pad(flat, [(0, 0)] * axis + [(0, flat.shape[axis] % 2)])
    pairs = flat[..., 0::2] | (flat[..., 1::2] << 4)
    return pairs.reshape(*pairs.shape, *codes.shape[axis + 1 :])


def _unpacked(pairs: Array, shape: tuple[int, ...]) -> Array:
    """Undo `_packed`."""
    axis = block_axis(shape)
    both = jnp.stack([pairs & 15, pairs >> 4], axis=axis + 1).reshape(*shape[:axis], -1)
    return both[..., : shape[axis]].reshape(shape)


def stored_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
