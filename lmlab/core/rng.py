"""Random keys as pure functions of (seed, use, step): a resumed run draws what it would have drawn."""

import zlib

import jax

from lmlab.core.types import Array, Key


def key_for(key: Key, use: str, step: int | Array = 0) -> Key:
    """The key of one use at one step: fold_in by a stable number of the name, then by the step."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(use.encode())), step)
