"""Weights as the world names them, whatever file they lie in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Source:
    """A model on disk in the terms of a Hugging Face folder: readers of other formats rename into these terms, so that
    all that follows knows one language.
    """

    origin: str
    """Where it lies, for messages."""
    config: Mapping[str, Any]
    """As in config.json: `model_type`, `hidden_size`, ..."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor by its name in transformers (`model.layers.0.self_attn.q_proj.weight`)."""
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    """`read(name, slices)`: that part of a tensor (fewer slices than axes: all of the rest) and no other, in the type
    it is stored in; rotary queries and keys with their halves as pairs, as transformers has them. Raises `UserError`
    where the file is damaged."""
