"""Rotary position embedding (arXiv 2104.09864), base, partial and scaled."""

import math

import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array
from lmlab.models.config import RotaryConfig


def rotary_frequencies(config: RotaryConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each rotated pair, float64 [R/2] with R = head_dim * fraction."""
    rotated = int(head_dim * config.fraction)
    frequencies = config.base ** (-np.arange(0, rotated, 2) / rotated)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "llama3":
        return _llama3_frequencies(config, frequencies)
    return frequencies


def _llama3_frequencies(config: RotaryConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1 model card)."""
    waves_in_context = config.original_length * frequencies / (2 * math.pi)
    low, high = config.low_frequency_factor, config.high_frequency_factor
    kept = np.clip((waves_in_context - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / config.factor)


def rotary_table(config: RotaryConfig, head_dim: int, positions_BT: Array) -> tuple[Array, Array]:
    """Cosine and sine [B, T, R/2] in float32 at the given positions."""
    frequencies = jnp.asarray(rotary_frequencies(config, head_dim), jnp.float32)
    angles_BTR = jnp.einsum("bt,r->btr", positions_BT.astype(jnp.float32), frequencies, precision="highest")
    return jnp.cos(angles_BTR), jnp.sin(angles_BTR)


def stand_still(table: tuple[Array, Array], still: Array) -> tuple[Array, Array]:
    """The table of rotations by nothing where `still` (a scalar) holds, else the table."""
    cos, sin = table
    return jnp.where(still, 1, cos), jnp.where(still, 0, sin)


def rotate(x_BTNH: Array, table: tuple[Array, Array], pairs: str) -> Array:
    """Turn each pair of the first R coordinates of every head by its angle, in float32; the rest pass."""
    cos, sin = (part[:, :, None, :] for part in table)
    rotated = 2 * cos.shape[-1]
    x, rest = x_BTNH[..., :rotated], x_BTNH[..., rotated:]
    if pairs == "half":
        a, b = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    turned = turned.astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
