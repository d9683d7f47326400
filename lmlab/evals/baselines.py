"""What a model must beat: byte n-grams and a compressor, in bits per byte on the same held-out text."""

import lzma
from collections.abc import Iterable

import numpy as np

from lmlab.core.errors import check

END = 0
"""The byte that stands for the end of a document in n-gram counts; text does not hold it."""


def _joined(texts: Iterable[str]) -> tuple[np.ndarray, int]:
    """Documents as bytes, each with END after it and two before the first; and the bytes of text."""
    blobs = [text.encode() for text in texts]
    joined = b"\0\0" + b"\0".join(blobs) + b"\0"
    return np.frombuffer(joined, np.uint8).astype(np.int64), sum(map(len, blobs))


def ngram_bits_per_byte(train: Iterable[str], held_out: Iterable[str]) -> dict[str, float]:
    """Byte unigram and trigram with Witten-Bell interpolation, in bits per byte of held-out text.

    Ends of documents are predicted and paid for, as they are by the model, and count no bytes.
    P(b | context) = (count(context b) + types(context) P(b | shorter)) / (count(context) + types(context)).
    """
    seen, _ = _joined(train)
    text, size = _joined(held_out)
    check(size > 0, "held-out text", size, "at least one byte to measure by")
    one, two, three = seen[2:], seen[1:-1] * 256 + seen[2:], (seen[:-2] * 256 + seen[1:-1]) * 256 + seen[2:]
    shorter = np.full(256, 1 / 256)
    for order, codes in ((1, one), (2, two), (3, three)):
        counts = np.bincount(codes, minlength=256**order).reshape(-1, 256)
        totals, types = counts.sum(1, keepdims=True), (counts > 0).sum(1, keepdims=True)
        backing = np.tile(shorter.reshape(-1, 256), (max(1, 256 ** (order - 2)), 1)) if order > 1 else shorter
        # A context that was never seen leaves all to the shorter one.
        weight = np.where(types > 0, types, 1)
        shorter = (counts + weight * backing) / (totals + weight)
        if order == 1:
            unigram = shorter.reshape(-1)[text[2:]]
    trigram = shorter.reshape(-1)[(text[:-2] * 256 + text[1:-1]) * 256 + text[2:]]
    return {
        "unigram": float(-np.log2(unigram).sum() / size),
        "trigram": float(-np.log2(trigram).sum() / size),
    }


def xz_bits_per_byte(held_out: Iterable[str]) -> float:
    """The held-out text compressed by xz at its highest level, alone, in bits per byte. Ends of documents are
    compressed with it and count no bytes.
    """
    joined, size = _joined(held_out)
    check(size > 0, "held-out text", size, "at least one byte to measure by")
    packed = lzma.compress(joined.astype(np.uint8).tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / size
