"""Rows of prompts with their answers. A row is a pure function of its number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from lmlab.core.types import AnswerBatch, Preferences
from lmlab.data.packing import best_fit
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.preferences import EncodedPair
from lmlab.data.stream import Stream, host_rows, prefetched, seed_of

MULTIPLE = 8
"""Shapes are rounded up to this, so that data sets of nearly the same size share a compiled program."""


@dataclass(frozen=True)
class PairRows:
    """How pairs lie in rows; made by `lay_out_pairs`."""

    pairs: Sequence[EncodedPair]
    order: np.ndarray
    """The pairs, row by row."""
    row_starts: np.ndarray
    """[rows + 1] where each row begins in that."""
    length: int
    """T."""
    shared: bool
    """Whether both answers of a pair follow one copy of the prompt."""
    per_row: int
    """P: the pairs of a row at most."""
    labels: int
    """A: the answers' tokens in a row at most."""
    reference_N2: np.ndarray | None = None
    """float32 log-probabilities of every pair's answers under the reference."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1

    def pairs_of(self, row: int) -> np.ndarray:
        """The numbers of the pairs in a row."""
        return self.order[self.row_starts[row] : self.row_starts[row + 1]]


def lay_out_pairs(
    pairs: Sequence[EncodedPair], length: int, *, shared: bool = True, alone: bool = False
) -> PairRows:  # fmt: skip
    """Pairs in rows of `length` tokens: the longest first, each where it leaves the least room. Each fits a row.

    alone: a row for every pair, in their order.
    """
    copies = 1 if shared else 2
    answers = np.asarray([sum(map(len, pair.answers)) for pair in pairs])
    sizes = answers + copies * np.asarray([len(pair.prompt) for pair in pairs])
    order, starts = (np.arange(len(pairs)), np.arange(len(pairs) + 1)) if alone else best_fit(sizes, length)
    labels = np.add.reduceat(answers[order], starts[:-1]).max()
    return PairRows(
        pairs,
        order,
        starts,
        length,
        shared,
        per_row=int(np.diff(starts).max()),
        labels=-(-int(labels) // MULTIPLE) * MULTIPLE,
    )


def preferences_of(rows: PairRows, numbers: Sequence[int], batch_size: int) -> Preferences:
    """The rows with these numbers as a batch of NumPy arrays; rows missing to `batch_size` are all padding."""
    width, labels, pairs = (batch_size, rows.length), (batch_size, rows.labels), (batch_size, rows.per_row)
    tokens, segments, positions, branches = np.zeros((4, *width), np.int32)
    found, places, answers = np.zeros((3, *labels), np.int32)
    ends = np.zeros((batch_size, 2 * rows.per_row), np.int32)
    weights, margins = np.zeros((2, *pairs), np.float32)
    targets, reference = np.ones(pairs, np.float32), np.zeros(ends.shape, np.float32)
    for b, number in enumerate(numbers):
        stop, scored, segment = 0, 0, 0
        for p, index in enumerate(rows.pairs_of(number)):
            pair = rows.pairs[index]
            weights[b, p], margins[b, p], targets[b, p] = pair.weight, pair.margin, pair.target
            if rows.reference_N2 is not None:
                reference[b, 2 * p : 2 * p + 2] = rows.reference_N2[index]
            for side, answer in enumerate(pair.answers):
                if side == 0 or not rows.shared:
                    segment += 1
                    prompt = slice(stop, stop + len(pair.prompt))
                    tokens[b, prompt], segments[b, prompt] = pair.prompt, segment
                    positions[b, prompt] = np.arange(len(pair.prompt))
                    stop = prompt.stop
                here, label = slice(stop, stop + len(answer)), slice(scored, scored + len(answer))
                tokens[b, here], segments[b, here], branches[b, here] = answer, segment, side + 1
                positions[b, here] = len(pair.prompt) + np.arange(len(answer))
                # The first is predicted from the prompt's last token, wherever that stands.
                places[b, label] = np.concatenate([[prompt.stop - 1], np.arange(here.start, here.stop - 1)])
                found[b, label], answers[b, label] = answer, 2 * p + side + 1
                ends[b, 2 * p + side] = here.stop - 1
                stop, scored = here.stop, label.stop
    batch = AnswerBatch(tokens, segments, positions, branches if rows.shared else None, found, places, answers, ends)  # type: ignore[arg-type]
    held = None if rows.reference_N2 is None else reference
    return Preferences(batch, weights, targets, margins, held)  # type: ignore[arg-type]


def pairs_stream(rows: PairRows, config: PairsConfig, *, host: int = 0, hosts: int = 1) -> Stream:
    """Training batches: every row once in every epoch, in an order that is new each time.

    Arguments and errors as `train_stream`.
    """
    share = host_rows(config.batch_size, host, hosts)
    numbers = grain.MapDataset.range(rows.rows).shuffle(seed=seed_of(config.seed, "pairs", "rows")).repeat()

    def numbers_at(step: int) -> list[int]:
        begin = step * config.batch_size + share.start
        return [int(numbers[i]) for i in range(begin, begin + len(share))]

    def batch_at(step: int) -> Preferences:
        return preferences_of(rows, numbers_at(step), len(share))

    def documents_at(step: int) -> list[str]:
        names = (rows.pairs[i].where for number in numbers_at(step) for i in rows.pairs_of(number))
        return list(dict.fromkeys(names))

    tokens = sum(len(pair.prompt) + sum(map(len, pair.answers)) for pair in rows.pairs)
    batches = lambda start=0, stop=None: prefetched(batch_at, start, stop, config.prefetch)
    return Stream(batch_at, documents_at, batches, rows=rows.rows, tokens=tokens, text_bytes=0)


def pairs_once(rows: PairRows, config: PairsConfig, *, host: int = 0, hosts: int = 1) -> Iterator[Preferences]:
    """Every row once, in a fixed shuffle; the last batch is filled up with rows of padding."""
    share = host_rows(config.batch_size, host, hosts)
    order = np.random.default_rng(0).permutation(rows.rows)

    def batch_at(step: int) -> Preferences:
        begin = step * config.batch_size + share.start
        return preferences_of(rows, order[begin : begin + len(share)].tolist(), len(share))

    return prefetched(batch_at, 0, -(-rows.rows // config.batch_size), config.prefetch)
