"""Rows of fixed length from documents of any length. A row is a pure function of its number."""

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from lmlab.core.types import Array, TokenBatch


@dataclass(frozen=True)
class Packing:
    """How the documents of one corpus are laid out in rows; made by `lay_out`."""

    tokens_N: np.ndarray
    """Tokens of all documents, in the order of the corpus; may be memory-mapped."""
    offsets: np.ndarray
    """[documents of the corpus + 1] int64 where each document begins in `tokens_N`, and the end."""
    order: np.ndarray | None
    """[documents] the documents that are laid out, first to last; None: all, in the order of the corpus."""
    starts: np.ndarray
    """[documents + 1] int64 where each document begins when they follow one another in `order`."""
    length: int
    """T: tokens that are read in a row."""
    lookahead: int
    """n: further tokens in a row that are only predicted."""
    mode: Literal["concat", "pad"]
    rows: int
    """Number of rows."""


@dataclass(frozen=True)
class Row:
    """One packed row: arrays of length T + n as in `TokenBatch`, and the numbers of its documents."""

    tokens_T: np.ndarray
    segments_T: np.ndarray
    positions_T: np.ndarray
    label_mask_T: np.ndarray
    documents: np.ndarray
    """The document of each segment, from segment 1 on."""


def lay_out(
    tokens_N: np.ndarray, offsets: np.ndarray, *, length: int, lookahead: int = 1,
    mode: Literal["concat", "pad"] = "concat", order: np.ndarray | None = None,
) -> Packing:  # fmt: skip
    """Prepare rows of T = `length` tokens to read and n = `lookahead` more to predict.

    "concat": the documents in `order` form one stream; row r holds its places [rT, rT + T + n), so each token
    is read in exactly one row, and the n places shared with the next row let every token that has one before
    it in its document be a label exactly once for a look-ahead of 1. The last row ends in padding.
    "pad": one document a row, cut at T + n tokens, padded.

    Args:
        tokens_N: [N] ids of any integer type.
        offsets: [documents + 1] int64, rising: no document is empty.
        length: T.
        lookahead: n.
        mode: see above.
        order: [documents] document numbers, any choice of them; costs 8 bytes a document for the new offsets.
    """
    starts = offsets
    if order is not None:
        starts = np.concatenate([[0], np.cumsum(np.diff(offsets)[order])])
    rows = len(starts) - 1 if mode == "pad" else -(-int(starts[-1]) // length)
    return Packing(tokens_N, offsets, order, starts, length, lookahead, mode, rows)


def row_at(packing: Packing, row: int) -> Row:
    """Row number `row` of 0 .. rows - 1, in O(log documents + T).

    A document that is cut at a row's end goes on as the first segment of the next row, at position 0.
    """
    width = packing.length + packing.lookahead
    if packing.mode == "pad":
        begin = int(packing.starts[row])
        places = np.arange(begin, min(begin + width, int(packing.starts[row + 1])))
    else:
        begin = row * packing.length
        places = np.arange(begin, min(begin + width, int(packing.starts[-1])))
    first, last = np.searchsorted(packing.starts, places[[0, -1]], side="right") - 1
    rank = first + np.searchsorted(packing.starts[first + 1 : last + 1], places, side="right")
    numbers = np.arange(first, last + 1) if packing.order is None else packing.order[first : last + 1]
    in_document = places - packing.starts[rank]
    in_corpus = packing.offsets[numbers][rank - first] + in_document
    return _pad(
        width, packing.tokens_N[in_corpus], rank - first + 1, np.minimum(in_document, places - begin), numbers
    )  # fmt: skip


def _pad(
    width: int, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray, documents: np.ndarray
) -> Row:  # fmt: skip
    rows_3T = np.zeros((3, width), np.int32)
    rows_3T[:, : len(tokens)] = tokens, segments, positions
    return Row(rows_3T[0], rows_3T[1], rows_3T[2], np.arange(width) < len(tokens), np.asarray(documents))


def stack_rows(rows: list[Row], batch_size: int, width: int) -> TokenBatch:
    """The rows as a batch of NumPy arrays [B, T + n]; rows missing to `batch_size` are all padding."""
    fields_4BT = np.zeros((4, batch_size, width), np.int32)
    for b, row in enumerate(rows):
        fields_4BT[:, b] = row.tokens_T, row.segments_T, row.positions_T, row.label_mask_T
    # NumPy stands in for jax.Array until the batch is placed on a device.
    tokens_BT, segments_BT, positions_BT, labels_BT = cast(tuple[Array, ...], tuple(fields_4BT))
    return TokenBatch(tokens_BT, segments_BT, positions_BT, labels_BT.astype(bool))
