"""Encoders: texts to unit vectors. The contract, and any language model as one by the mean of its states."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array

Encode: TypeAlias = Callable[[Sequence[str]], np.ndarray]
"""`encode(texts) -> float32 [N, D]`: rows of length 1, or 0 for a text in which nothing is found."""
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Encoder:
    """A way to turn texts into vectors whose inner product says how alike they are."""

    dimensions: int
    """D."""
    fingerprint: str
    """Says all that decides the vectors, the texts aside."""
    fit: Callable[[Iterable[Sequence[str]]], Encode]
    """`fit(batches of all texts) -> encode`; what learns nothing from the corpus does not read them."""


def pooled_encoder(
    hidden: Callable[[Any, Array, Array], Array], params: Any, tokenise: Callable[[Sequence[str]], list[np.ndarray]],
    dimensions: int, fingerprint: str, *, length: int = 256, batch: int = 32,
) -> Encoder:  # fmt: skip
    """The mean of a model's states over the tokens of a text, as a unit vector.

    Args:
        hidden: `hidden(params, tokens_BT, segments_BT) -> states_BTD`; segments are 1 for a token and 0 for padding.
            Of an LM: `lambda params, tokens, segments: lm.apply(params, tokens, segments_BT=segments)[0]`.
        params: of the model.
        tokenise: texts to their ids.
        dimensions: D.
        fingerprint: says which model, parameters and tokenizer these are.
        length: tokens that are read of a text.
        batch: texts in a batch.
    """

    @jax.jit
    def pool(params: Any, tokens_BT: Array, segments_BT: Array) -> Array:
        states_BTD = hidden(params, tokens_BT, segments_BT).astype(jnp.float32)
        mean_BD = jnp.sum(states_BTD * segments_BT[:, :, None], axis=1) / jnp.maximum(
            jnp.sum(segments_BT, axis=1, keepdims=True), 1
        )
        return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = [ids[:length] for ids in tokenise(texts)]
        vectors_ND = np.zeros((len(rows), dimensions), np.float32)
        # Texts of like length share a batch, so that little of it is padding.
        order = np.argsort([len(ids) for ids in rows], kind="stable")
        for start in range(0, len(rows), batch):
            chosen = order[start : start + batch]
            width = min(length, next(size for size in (*_LENGTHS, length) if size >= len(rows[chosen[-1]])))
            tokens_BT, segments_BT = np.zeros((2, batch, width), np.int32)
            for row, number in enumerate(chosen):
                tokens_BT[row, : len(rows[number])] = rows[number]
                segments_BT[row, : len(rows[number])] = 1
            vectors_ND[chosen] = np.asarray(pool(params, tokens_BT, segments_BT))[: len(chosen)]
        return vectors_ND

    return Encoder(dimensions, f"mean {fingerprint} {length} {batch}", lambda texts: encode)


def unit_rows(vectors_ND: np.ndarray) -> np.ndarray:
    """The rows at length 1, float32; rows of zeros stay."""
    vectors_ND = np.asarray(vectors_ND, np.float32)
    norms_N1 = np.sqrt(np.sum(np.square(vectors_ND), axis=1, keepdims=True))
    return vectors_ND / np.where(norms_N1 > 0, norms_N1, 1)
