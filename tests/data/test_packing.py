"""Rows against brute force on tiny corpora: every token read once, every label once."""

import numpy as np
import pytest

from lmlab.data.packing import lay_out, row_at, stack_rows

DOCUMENTS = [[9, 1, 9], [9, 9], [9, 2, 3, 4, 5, 6, 7, 8, 9], [9, 5, 9], [9, 1, 2, 9]]


def corpus() -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, DOCUMENTS)])
    return np.concatenate(DOCUMENTS).astype(np.uint16), offsets


ORDERS = [None, np.array([4, 2, 0, 1, 3]), np.array([2, 0])]


@pytest.mark.parametrize("order", ORDERS, ids=["corpus", "permuted", "chosen"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 21, 22, 50])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_concat_rows_equal_brute_force(order, length, lookahead):
    tokens_N, offsets = corpus()
    packing = lay_out(tokens_N, offsets, length=length, lookahead=lookahead, order=order)
    numbers = range(len(DOCUMENTS)) if order is None else order.tolist()
    stream = [(d, i, token) for d in numbers for i, token in enumerate(DOCUMENTS[d])]
    assert packing.rows == -(-len(stream) // length)
    for r in range(packing.rows):
        row, part = row_at(packing, r), stream[r * length : r * length + length + lookahead]
        seen = list(dict.fromkeys(d for d, _, _ in part))
        begins = {d: min(i for other, i, _ in part if other == d) for d in seen}
        padding = [0] * (length + lookahead - len(part))
        assert row.tokens_T.tolist() == [token for _, _, token in part] + padding
        assert row.segments_T.tolist() == [seen.index(d) + 1 for d, _, _ in part] + padding
        assert row.positions_T.tolist() == [i - begins[d] for d, i, _ in part] + padding
        assert row.label_mask_T.tolist() == [True] * len(part) + [False] * len(padding)
        assert row.documents.tolist() == seen


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 30])
def test_every_token_is_read_once_and_every_possible_label_is_predicted_once(length):
    # Each token of a corpus of different numbers can be told apart.
    offsets = np.array([0, 3, 5, 11, 12, 18])
    packing = lay_out(np.arange(1, 19), offsets, length=length, lookahead=1)
    read, predicted = [], []
    for r in range(packing.rows):
        row = row_at(packing, r)
        same = (row.segments_T[1:] == row.segments_T[:-1]) & (row.segments_T[1:] != 0) & row.label_mask_T[1:]
        read += row.tokens_T[:length][row.segments_T[:length] != 0].tolist()
        predicted += row.tokens_T[1:][same].tolist()
    assert sorted(read) == list(range(1, 19))
    first = (offsets[:-1] + 1).tolist()
    assert sorted(predicted) == [token for token in range(1, 19) if token not in first]


def test_pad_gives_each_document_one_row_cut_to_the_width():
    tokens_N, offsets = corpus()
    packing = lay_out(tokens_N, offsets, length=3, lookahead=1, mode="pad", order=np.array([2, 1]))
    rows = [row_at(packing, r) for r in range(packing.rows)]
    assert [row.tokens_T.tolist() for row in rows] == [[9, 2, 3, 4], [9, 9, 0, 0]]
    assert [row.segments_T.tolist() for row in rows] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert [row.positions_T.tolist() for row in rows] == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert [row.documents.tolist() for row in rows] == [[2], [1]]


def test_missing_rows_of_a_batch_are_padding():
    tokens_N, offsets = corpus()
    packing = lay_out(tokens_N, offsets, length=4)
    batch = stack_rows([row_at(packing, 0)], 3, 5)
    assert batch.tokens_BT.shape == (3, 5)
    assert (batch.tokens_BT.dtype, batch.label_mask_BT.dtype) == (np.int32, bool)
    assert not batch.segments_BT[1:].any()
    assert not batch.label_mask_BT[1:].any()


def test_tokens_beyond_16_bits_and_a_million_documents():
    offsets = np.arange(0, 2_000_002, 2)
    tokens_N = np.repeat(np.arange(1_000_000, dtype=np.uint32), 2)
    packing = lay_out(tokens_N, offsets, length=6, lookahead=0)
    row = row_at(packing, packing.rows - 1)
    assert row.tokens_T.tolist() == [999999, 999999, 0, 0, 0, 0]
    assert row_at(packing, 200_000).tokens_T.tolist() == [600_000] * 2 + [600_001] * 2 + [600_002] * 2


def best_fit_decreasing(sizes: list[int], width: int) -> list[list[int]]:
    """The rule in its plainest words."""
    rows = []
    for document in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        open_rows = [row for row in rows if sum(sizes[i] for i in row) + sizes[document] <= width]
        fullest = max(open_rows, key=lambda row: sum(sizes[i] for i in row), default=None)
        if fullest is None:
            rows.append(fullest := [])
        fullest.append(document)
    return rows


@pytest.mark.parametrize("width", [5, 9, 16])
def test_whole_documents_share_rows_as_tightly_as_best_fit(width):
    rng = np.random.default_rng(width)
    sizes = rng.integers(1, 14, 60)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    order = rng.permutation(60)[:50]
    labels_N = rng.random(offsets[-1]) < 0.5
    packing = lay_out(
        np.arange(1, offsets[-1] + 1), offsets, length=width - 1, mode="whole", order=order, labels_N=labels_N
    )
    rows = [row_at(packing, r) for r in range(packing.rows)]
    assert sorted(np.concatenate([row.documents for row in rows])) == sorted(order)
    cut = [min(int(sizes[d]), width) for d in order]
    plain = best_fit_decreasing(cut, width)
    # Which of equally full rows is taken is left open.
    assert sorted(sum(cut[i] for i in row) for row in plain) == sorted((row.segments_T > 0).sum() for row in rows)
    for row in rows:
        kept = [np.arange(offsets[d], offsets[d] + min(sizes[d], width)) for d in row.documents]
        used = sum(map(len, kept))
        assert row.tokens_T.tolist() == [*(np.concatenate(kept) + 1), *[0] * (width - used)]
        assert row.label_mask_T.tolist() == [*labels_N[np.concatenate(kept)], *[False] * (width - used)]
        assert row.segments_T[:used].tolist() == [k for k, part in enumerate(kept, 1) for _ in part]
        assert row.positions_T[:used].tolist() == [i for part in kept for i in range(len(part))]


def test_labels_follow_their_tokens_in_every_mode():
    tokens_N, offsets = corpus()
    for mode in ("concat", "pad", "whole"):
        packing = lay_out(tokens_N, offsets, length=6, mode=mode, labels_N=tokens_N != 9)
        for r in range(packing.rows):
            row = row_at(packing, r)
            assert row.label_mask_T.tolist() == ((row.tokens_T != 9) & (row.segments_T > 0)).tolist()
