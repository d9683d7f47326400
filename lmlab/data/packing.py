"""Rows of fixed length from documents of any length. A row is a pure function of its number."""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from lmlab.core.types import Array, TokenBatch
from lmlab.data.config import PackingMode


@dataclass(frozen=True)
class Packing:
    """How the documents of one corpus are laid out in rows; made by `lay_out`."""

    tokens_N: np.ndarray
    """Tokens of all documents, in the order of the corpus; may be memory-mapped."""
    offsets: np.ndarray
    """[documents of the corpus + 1] int64 where each document begins in `tokens_N`, and the end."""
    order: np.ndarray | None
    """[documents] the documents that are laid out, first to last; None: all, in the order of the corpus."""
    labels_N: np.ndarray | None
    """[N] bool which tokens count as labels; None: all."""
    starts: np.ndarray
    """[documents + 1] int64 where each document begins when they follow one another in `order`."""
    row_starts: np.ndarray | None
    """[rows + 1] where each row begins among those places; None: every T of them are a row."""
    length: int
    """T: tokens that are read in a row."""
    lookahead: int
    """n: further tokens in a row that are only predicted."""
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
    mode: PackingMode = "concat", order: np.ndarray | None = None, labels_N: np.ndarray | None = None,
) -> Packing:  # fmt: skip
    """Prepare rows of T = `length` tokens to read and n = `lookahead` more to predict.

    "concat": the documents in `order` form one stream; row r holds its places [rT, rT + T + n), so each token
    is read in exactly one row, and the n places shared with the next row let every token that has one before
    it in its document be a label exactly once for a look-ahead of 1. The last row ends in padding.
    "pad": one document a row, cut at T + n tokens, padded.
    "whole": documents share rows and are never divided between them; each is cut at T + n tokens. The longest first,
    each goes to the row that it leaves the least room in (best-fit decreasing, arXiv 2404.10830).

    Args:
        tokens_N: [N] ids of any integer type.
        offsets: [documents + 1] int64, rising: no document is empty.
        length: T.
        lookahead: n.
        mode: see above.
        order: [documents] document numbers, any choice of them; costs 8 bytes a document for the new offsets.
        labels_N: [N] bool which tokens count as labels; None: all.
    """
    row_ranks = None
    if mode == "whole":
        chosen = np.arange(len(offsets) - 1) if order is None else order
        sizes = np.minimum(np.diff(offsets)[chosen], length + lookahead)
        fitted, row_ranks = best_fit(sizes, length + lookahead)
        order, sizes = chosen[fitted], sizes[fitted]
    elif order is not None:
        sizes = np.diff(offsets)[order]
    starts = offsets if order is None else np.concatenate([[0], np.cumsum(sizes)])
    row_starts = {"concat": None, "pad": starts, "whole": starts[row_ranks] if mode == "whole" else None}[mode]
    rows = -(-int(starts[-1]) // length) if row_starts is None else len(row_starts) - 1
    return Packing(tokens_N, offsets, order, labels_N, starts, row_starts, length, lookahead, rows)


def best_fit(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document comes where when each goes to the fullest row that has room, and where the rows begin in that.

    Documents of one size keep their order. A bit for each room that some row has finds that row at once.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(document)
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    ranks = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.asarray([document for row in rows for document in row], np.int64), ranks


def turned(packing: Packing, first: int) -> Packing:
    """The same circle of documents cut open before the document at place `first` of their order ("concat" only).

    Documents keep their neighbours, and rows begin at other places among them. Costs 16 bytes a document.
    """
    count = len(packing.starts) - 1
    order = np.roll(np.arange(count) if packing.order is None else packing.order, -first)
    sizes = np.roll(np.diff(packing.starts), -first)
    return replace(packing, order=order, starts=np.concatenate([[0], np.cumsum(sizes)]))


def row_at(packing: Packing, row: int) -> Row:
    """Row number `row` of 0 .. rows - 1, in O(log documents + T).

    A document that is cut at a row's end goes on as the first segment of the next row, at position 0.
    """
    width = packing.length + packing.lookahead
    if packing.row_starts is None:
        begin, end = row * packing.length, packing.starts[-1]
    else:
        begin, end = (int(place) for place in packing.row_starts[row : row + 2])
    places = np.arange(begin, min(begin + width, int(end)))
    first, last = np.searchsorted(packing.starts, places[[0, -1]], side="right") - 1
    rank = first + np.searchsorted(packing.starts[first + 1 : last + 1], places, side="right")
    numbers = np.arange(first, last + 1) if packing.order is None else packing.order[first : last + 1]
    in_document = places - packing.starts[rank]
    in_corpus = packing.offsets[numbers][rank - first] + in_document
    labels = True if packing.labels_N is None else packing.labels_N[in_corpus]
    rows_4T = np.zeros((4, width), np.int32)
    rows_4T[:3, : len(places)] = (
        packing.tokens_N[in_corpus], rank - first + 1, np.minimum(in_document, places - begin),
    )  # fmt: skip
    rows_4T[3, : len(places)] = labels
    return Row(rows_4T[0], rows_4T[1], rows_4T[2], rows_4T[3].astype(bool), np.asarray(numbers))


def stack_rows(rows: list[Row], batch_size: int, width: int) -> TokenBatch:
    """The rows as a batch of NumPy arrays [B, T + n]; rows missing to `batch_size` are all padding."""
    fields_4BT = np.zeros((4, batch_size, width), np.int32)
    for b, row in enumerate(rows):
        fields_4BT[:, b] = row.tokens_T, row.segments_T, row.positions_T, row.label_mask_T
    # NumPy stands in for jax.Array until the batch is placed on a device.
    tokens_BT, segments_BT, positions_BT, labels_BT = cast(tuple[Array, ...], tuple(fields_4BT))
    return TokenBatch(tokens_BT, segments_BT, positions_BT, labels_BT.astype(bool))
