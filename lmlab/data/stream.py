"""Batches as a pure function of (config, step): any step at once, the same rows on any number of hosts."""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeVar

import grain
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Batch, TokenBatch
from lmlab.data.cache import TokenCache
from lmlab.data.config import DataConfig
from lmlab.data.packing import Packing, Row, lay_out, row_at, stack_rows, turned

B = TypeVar("B")


@dataclass(frozen=True)
class Stream:
    """An endless stream of batches with random access."""

    batch_at: Callable[[int], Batch]
    """The batch of a step: NumPy arrays [B / hosts, ...], of texts a `TokenBatch` [B / hosts, T + n]."""
    documents_at: Callable[[int], list[str]]
    """Ids of the documents in that batch, in order, each once."""
    batches: Callable[..., Iterator[Batch]]
    """`batches(start, stop=None)`: batch_at(start), batch_at(start + 1), ..., made ahead by threads."""
    rows: int
    """Rows of all sources; one source is read once every rows / B steps."""
    tokens: int
    """Tokens of all sources, markers included."""
    text_bytes: int
    """UTF-8 bytes of all sources."""


def train_stream(
    config: DataConfig, caches: Mapping[str, TokenCache], *,
    lookahead: int = 1, host: int = 0, hosts: int = 1, orders: Mapping[str, np.ndarray] | None = None,
) -> Stream:  # fmt: skip
    """The training batches of a mixture of sources.

    Documents are laid out in a fixed order, shuffled by `config.seed` or as `orders` says; the rows are then
    visited in an order that is new in every epoch of their source. Weights hold at every point of the stream.

    Args:
        config: lengths, weights, seed.
        caches: tokens of each source.
        lookahead: n, tokens beyond T in a row.
        host: which part of the global batch to make: rows [host * B / hosts, (host + 1) * B / hosts).
        hosts: number of parts.
        orders: by source, the document numbers in the order in which to lay them out (any choice of them);
            a source that is absent has the order of the config.

    Raises:
        UserError: `hosts` does not divide the batch; the config's order is one that has to be made before.
    """
    share = host_rows(config.batch_size, host, hosts)
    corpora = {
        name: _lay_out(config, cache, lookahead, _document_order(config, name, cache, orders or {}))
        for name, cache in caches.items()
    }
    numbers = _row_numbers(config, corpora)
    seeds = [seed_of(config.seed, name, "cuts") for name in corpora] if config.recut else None
    locate = _locator(list(corpora.values()), seeds)
    sources = list(caches.values())

    def rows_at(step: int) -> list[tuple[int, Row]]:
        begin = step * config.batch_size + share.start
        return [locate(*numbers[i]) for i in range(begin, begin + len(share))]

    def batch_at(step: int) -> TokenBatch:
        return stack_rows([row for _, row in rows_at(step)], len(share), config.length + lookahead)

    def documents_at(step: int) -> list[str]:
        names = (sources[k].document_id(int(i)) for k, row in rows_at(step) for i in row.documents)
        return list(dict.fromkeys(names))

    def batches(start: int = 0, stop: int | None = None) -> Iterator[TokenBatch]:
        return prefetched(batch_at, start, stop, config.prefetch)

    return Stream(
        batch_at, documents_at, batches, rows=sum(corpus.rows for corpus in corpora.values()),
        tokens=sum(len(cache.tokens_N) for cache in sources),
        text_bytes=sum(cache.text_bytes for cache in sources),
    )  # fmt: skip


def heldout_batches(
    config: DataConfig, caches: Mapping[str, TokenCache], *, lookahead: int = 1, host: int = 0, hosts: int = 1
) -> Iterator[TokenBatch]:  # fmt: skip
    """Every row of every source once; the last batch is filled up with rows of padding.

    The order is a fixed shuffle, so that the first batches are a fair sample of the whole; it does not depend on
    `config.seed`, so that runs compare. Args and errors as `train_stream`; every host sees the same number of batches.
    """
    share = host_rows(config.batch_size, host, hosts)
    corpora = [_lay_out(config, cache, lookahead, None) for cache in caches.values()]
    locate, rows = _locator(corpora), sum(corpus.rows for corpus in corpora)
    order = np.random.default_rng(0).permutation(rows)

    def batch_at(step: int) -> TokenBatch:
        begin = step * config.batch_size + share.start
        found = [locate(i)[1] for i in order[begin : begin + len(share)]]
        return stack_rows(found, len(share), config.length + lookahead)

    return prefetched(batch_at, 0, -(-rows // config.batch_size), config.prefetch)


def host_rows(batch_size: int, host: int, hosts: int) -> range:
    """Which rows of a global batch a host makes. Raises `UserError` where they cannot be divided evenly."""
    check(
        batch_size % hosts == 0, "data.batch_size", batch_size,
        f"a multiple of the number of hosts, {hosts}", "The global batch is divided evenly.",
    )  # fmt: skip
    check(0 <= host < hosts, "host", host, f"0 to {hosts - 1}")
    size = batch_size // hosts
    return range(host * size, (host + 1) * size)


def _lay_out(config: DataConfig, cache: TokenCache, lookahead: int, order: np.ndarray | None) -> Packing:
    shape = {"length": config.length, "lookahead": lookahead}
    return lay_out(cache.tokens_N, cache.offsets, **shape, mode=config.packing, order=order, labels_N=cache.labels_N)


def _document_order(
    config: DataConfig, name: str, cache: TokenCache, orders: Mapping[str, np.ndarray]
) -> np.ndarray | None:  # fmt: skip
    """The order that is given, or that of the config; None: that of the corpus."""
    if name in orders:
        return orders[name]
    made = config.order != "in_context"
    check(made, "data.order", config.order, "the orders of all sources", "open_data makes them.")
    if config.order == "corpus":
        return None
    return np.random.default_rng(seed_of(config.seed, name, "documents")).permutation(cache.documents)


def seed_of(seed: int, name: str, use: str) -> int:
    """The seed of one use of a source."""
    # A hash, because grain adds the epoch to the seed: with nearby seeds two runs would share epochs.
    return zlib.crc32(f"{seed} {use} {name}".encode())


def _row_numbers(config: DataConfig, corpora: Mapping[str, Packing]) -> grain.MapDataset:
    """An endless sequence of (row number, epoch of its source) with random access; counted through all sources."""
    parts, weights, base = [], [], 0
    for name, corpus in corpora.items():
        numbers = grain.MapDataset.range(base, base + corpus.rows)
        shuffled = numbers.shuffle(seed=seed_of(config.seed, name, "rows")).repeat()
        parts.append(shuffled.map_with_index(partial(_with_epoch, corpus.rows)))
        weights.append(config.weights.get(name, 1.0))
        base += corpus.rows
    return grain.MapDataset.mix(parts, weights=weights) if len(parts) > 1 else parts[0]


def _with_epoch(rows: int, place: int, number: int) -> tuple[int, int]:
    return number, place // rows


def _locator(corpora: list[Packing], seeds: list[int] | None = None) -> Callable[..., tuple[int, Row]]:
    """From a row number counted through all sources, and an epoch, to (number of the source, row).

    seeds: of the places where each source is cut, new in every epoch; None: they stay.
    """
    ends = np.cumsum([corpus.rows for corpus in corpora])

    @lru_cache(maxsize=2 * len(corpora))
    def laid_out(k: int, epoch: int) -> Packing:
        if seeds is None or epoch == 0:
            return corpora[k]
        return turned(corpora[k], int(np.random.default_rng([seeds[k], epoch]).integers(len(corpora[k].starts) - 1)))

    def locate(number: int, epoch: int = 0) -> tuple[int, Row]:
        k = int(np.searchsorted(ends, number, side="right"))
        return k, row_at(laid_out(k, epoch), int(number - (ends[k] - corpora[k].rows)))

    return locate


def prefetched(batch_at: Callable[[int], B], start: int, stop: int | None, ahead: int) -> Iterator[B]:
    """batch_at(start), batch_at(start + 1), ..., made ahead by threads; stop None: without end."""
    steps = grain.MapDataset.range(start, sys.maxsize if stop is None else stop).map(batch_at)
    options = grain.ReadOptions(num_threads=min(2, ahead), prefetch_buffer_size=ahead)
    iterator = iter(steps.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
