"""Program text by bytes, the sources of Python's standard library, for trainings of several seeds side by side."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import TokenBatch
from lmlab.data.config import DataConfig
from lmlab.data.open import open_data


@dataclass(frozen=True)
class Text:
    """What all arms of an experiment read."""

    rows: Callable[[int, int], TokenBatch]
    """`rows(first, count)`: batches [count, S, rows, ...] from a step on; every seed has its own rows."""
    held_out: TokenBatch


def read_text(seeds: int, rows: int, length: int, held_out: int) -> Text:
    """Rows of `length` bytes, `rows` of them to a batch of each seed, and `held_out` of text that no batch has."""
    data = open_data(DataConfig(length=length, batch_size=rows * seeds))
    deal = lambda *x: np.stack([np.asarray(part).reshape(seeds, -1, *part.shape[1:]) for part in x])
    batches = lambda first, count: jax.tree.map(deal, *data.train.batches(first, first + count))
    kept = itertools.islice(data.heldout(), -(-held_out // (rows * seeds)))
    return Text(batches, jax.tree.map(lambda *x: jnp.concatenate(x)[:held_out], *kept))
