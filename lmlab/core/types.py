"""The types that all packages share: batches of tokens, and the terms of a loss."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import struct

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
"""A typed PRNG key (`jax.random.key`)."""
Params: TypeAlias = Mapping[str, Any]
"""Parameters: nested dicts of arrays."""
Batch: TypeAlias = Any
"""A pytree of arrays whose first axis is the batch."""


@struct.dataclass
class TokenBatch:
    """Packed rows of tokens. Any number of documents share a row; a segment is one (part of a) document.

    Rows hold the tokens that are read and those that are only predicted: an objective that looks n tokens
    ahead is given rows of length T + n.
    """

    tokens_BT: Array
    """int32 token ids."""
    segments_BT: Array
    """int32, 0 for padding, 1, 2, ... for the documents of the row from left to right."""
    positions_BT: Array
    """int32 position within the segment, from 0."""
    label_mask_BT: Array
    """bool, true where the token counts as a label (it must also have a token before it in its segment)."""


@struct.dataclass
class Ratio:
    """A quantity that is a quotient of two sums, so that it can be added up over devices and batches."""

    sum: Array
    """[] float32 numerator."""
    weight: Array
    """[] float32 denominator; a ratio of weight 0 counts as 0."""


@struct.dataclass
class Terms:
    """What an objective returns: `loss = sum over names of scale * sum / weight`, all sums global.

    The division is made once, by the train step, after the sums over microbatches and devices. Weights
    must not depend on the parameters; they are treated as constants.
    """

    losses: dict[str, Ratio]
    """Terms of the loss by name."""
    scales: dict[str, Array | float]
    """The coefficient of each term; same names."""
    metrics: dict[str, Ratio]
    """Further quantities to report; no gradient flows from them."""


Objective: TypeAlias = Callable[[Params, Batch, Key], Terms]
"""`objective(params, batch, key) -> Terms`: pure, differentiable in `params`."""
