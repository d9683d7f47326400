"""The stream: any step at once, any number of hosts, every row once an epoch, weights kept everywhere."""

import time
import zlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.config import DataConfig, Files
from lmlab.data.stream import heldout_batches, train_stream
from lmlab.testing.tiny import tiny_cache

TWO = {"a": Files("a"), "b": Files("b")}


def config(**changes) -> DataConfig:
    return DataConfig(**{"sources": {"a": Files("a")}, "length": 16, "batch_size": 4} | changes)


def fields(batch) -> list[np.ndarray]:
    return [batch.tokens_BT, batch.segments_BT, batch.positions_BT, batch.label_mask_BT]


def assert_same(one, other):
    for left, right in zip(fields(one), fields(other), strict=True):
        np.testing.assert_array_equal(left, right)


def rows_of(batches) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch.tokens_BT]


def test_iteration_without_an_end_goes_on():
    stream = train_stream(config(), {"a": tiny_cache("a", 50)})
    endless = stream.batches(7)
    assert_same(next(endless), stream.batch_at(7))
    endless.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_heldout_rows(hosts):
    caches, settings = {"a": tiny_cache("a", 30), "b": tiny_cache("b", 20, seed=1)}, config(sources=TWO)
    heldout = (batch for h in range(hosts) for batch in heldout_batches(settings, caches, host=h, hosts=hosts))
    assert Counter(rows_of(heldout)) == Counter(rows_of(heldout_batches(settings, caches)))


def test_every_epoch_holds_every_row_in_an_order_of_its_own():
    stream = train_stream(config(batch_size=1, length=8), {"a": tiny_cache("a", 40)})
    epochs = [
        rows_of(stream.batch_at(step) for step in range(e * stream.rows, (e + 1) * stream.rows)) for e in range(3)
    ]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1]
    assert epochs[1] != epochs[2]


def test_rows_that_are_cut_anew_hold_the_same_documents_side_by_side():
    caches = {"a": tiny_cache("a", 40)}
    settings = config(batch_size=1, length=64)
    kept, anew = train_stream(settings, caches), train_stream(replace(settings, recut=True), caches)
    epoch = lambda stream, e: rows_of(stream.batch_at(step) for step in range(e * stream.rows, (e + 1) * stream.rows))
    assert epoch(anew, 0) == epoch(kept, 0)
    assert set(epoch(kept, 1)) == set(epoch(kept, 0))
    assert len(set().union(*(epoch(anew, e) for e in range(8)))) > 6 * anew.rows
    together = lambda stream, e: {
        pair for step in range(e * stream.rows, (e + 1) * stream.rows) for pair in pairwise(stream.documents_at(step))
    }
    # Neighbours are those of the one order, its ends made to meet.
    order = np.random.default_rng(zlib.crc32(f"{settings.seed} documents a".encode())).permutation(40)
    circle = {(f"a {a}", f"a {b}") for a, b in zip(order, np.roll(order, -1), strict=True)}
    assert together(anew, 1) <= circle
    read = Counter()
    for step in range(anew.rows, 2 * anew.rows):
        batch = anew.batch_at(step)
        read.update(batch.tokens_BT[0, :64][batch.segments_BT[0, :64] != 0].tolist())
    assert read == Counter(caches["a"].tokens_N.tolist())


def test_cutting_anew_is_for_documents_in_one_stream():
    with pytest.raises(UserError, match=r"data\.recut"):
        config(recut=True, packing="pad")


def test_one_epoch_reads_every_token_once():
    cache = tiny_cache("a", 40)
    stream = train_stream(config(batch_size=1, length=8), {"a": cache})
    read = Counter()
    for step in range(stream.rows):
        batch = stream.batch_at(step)
        read.update(batch.tokens_BT[0, :8][batch.segments_BT[0, :8] != 0].tolist())
    assert read == Counter(cache.tokens_N.tolist())
    assert stream.tokens == len(cache.tokens_N)


def test_seeds_give_other_orders_and_neighbouring_seeds_share_no_epoch():
    cache = {"a": tiny_cache("a", 40)}
    orders = set()
    for seed in range(3):
        stream = train_stream(config(seed=seed, order="corpus", batch_size=1), cache)
        for epoch in range(3):
            steps = range(epoch * stream.rows, (epoch + 1) * stream.rows)
            orders.add(tuple(rows_of(stream.batch_at(step) for step in steps)))
    assert len(orders) == 9


def test_mixture_keeps_its_weights_at_every_point():
    caches = {"a": tiny_cache("a", 60), "b": tiny_cache("b", 25, seed=1)}
    stream = train_stream(config(sources=TWO, weights={"a": 3.0}, batch_size=1), caches)
    for begin in (0, 10**7):
        sources = [stream.documents_at(step)[0].split()[0] for step in range(begin, begin + 400)]
        assert abs(sources.count("a") - 300) <= 2
        assert all(abs(sources[i : i + 40].count("a") - 30) <= 2 for i in range(0, 400, 40))


def test_adding_a_source_keeps_the_order_of_the_others():
    caches = {"a": tiny_cache("a", 30), "b": tiny_cache("b", 20, seed=1)}
    alone = train_stream(config(batch_size=1), {"a": caches["a"]})
    mixed = train_stream(config(sources=TWO, batch_size=1), caches)
    from_a = [s for s in range(40) if mixed.documents_at(s)[0].startswith("a")]
    for k, step in enumerate(from_a):
        assert_same(mixed.batch_at(step), alone.batch_at(k))


def test_documents_of_a_step_are_those_in_its_rows():
    cache = tiny_cache("a", 30)
    stream = train_stream(config(batch_size=2), {"a": cache})
    texts = {cache.document_id(i): cache.tokens_N[slice(*cache.offsets[i : i + 2])].tolist() for i in range(30)}
    for step in range(10):
        batch, names = stream.batch_at(step), stream.documents_at(step)
        pieces = [
            row[segments == k].tolist()
            for row, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True)
            for k in range(1, segments.max() + 1)
        ]
        for piece in pieces:
            assert any(str(piece)[1:-1] in str(texts[name]) for name in names)


def test_a_given_order_decides_which_documents_meet():
    cache = tiny_cache("a", 12)
    stream = train_stream(config(batch_size=1, length=400), {"a": cache}, orders={"a": np.array([7, 2, 9])})
    assert stream.rows == 1
    assert stream.documents_at(0) == ["a 7", "a 2", "a 9"]


def test_heldout_holds_every_row_once_and_ends_in_padding():
    caches = {"a": tiny_cache("a", 13), "b": tiny_cache("b", 9, seed=1)}
    batches = list(heldout_batches(config(sources=TWO, length=8, batch_size=4), caches, lookahead=1))
    assert {batch.tokens_BT.shape for batch in batches} == {(4, 9)}
    read = np.concatenate([batch.tokens_BT[:, :8][batch.segments_BT[:, :8] != 0] for batch in batches])
    both = np.concatenate([cache.tokens_N for cache in caches.values()])
    np.testing.assert_array_equal(np.sort(read), np.sort(both))
    assert read.tolist() != both.tolist()
    labels = sum(
        int((batch.segments_BT[:, 1:] == batch.segments_BT[:, :-1])[batch.label_mask_BT[:, 1:]].sum())
        for batch in batches
    )
    assert labels == len(both) - 22


def test_a_corpus_smaller_than_a_batch_repeats():
    stream = train_stream(config(batch_size=8, length=4000), {"a": tiny_cache("a", 3)})
    assert stream.rows == 1
    assert len(set(rows_of([stream.batch_at(0)]))) == 1


def test_seeking_far_ahead_takes_milliseconds():
    stream = train_stream(config(), {"a": tiny_cache("a", 200)})
    stream.batch_at(0)
    seconds = []
    for step in (10**9, 10**9 + 12345, 10**8):
        begin = time.perf_counter()
        stream.batch_at(step)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05


def test_hosts_have_to_divide_the_batch():
    with pytest.raises(UserError, match=r"batch_size = 4.*multiple of the number of hosts, 3"):
        train_stream(config(), {"a": tiny_cache("a", 5)}, hosts=3)
