"""What every stream owes the loop: the generic tests over the table of streams."""

import chex
import jax
import numpy as np
import pytest

from lmlab.testing.tables import STREAMS

STEPS = (0, 1, 7, 10**9)


@pytest.fixture(params=STREAMS)
def build(request):
    return STREAMS[request.param]


def test_a_batch_is_a_pure_function_of_its_step(build):
    one, other = build(0, 1), build(0, 1)
    for step in reversed(STEPS):
        chex.assert_trees_all_equal(one.batch_at(step), other.batch_at(step))
    assert any((one.batch_at(0).tokens_BT != one.batch_at(step).tokens_BT).any() for step in STEPS)


def test_iteration_equals_seeking_from_any_start(build):
    stream = build(0, 1)
    for start in STEPS:
        for step, batch in enumerate(stream.batches(start, start + 3), start=start):
            chex.assert_trees_all_equal(batch, stream.batch_at(step))


def test_every_batch_has_one_structure_and_shape(build):
    stream = build(0, 1)
    for step in STEPS:
        chex.assert_trees_all_equal_shapes_and_dtypes(stream.batch_at(step), stream.batch_at(0))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_make_the_same_batch(build, hosts):
    whole, parts = build(0, 1), [build(host, hosts) for host in range(hosts)]
    for step in STEPS:
        split = [part.batch_at(step) for part in parts]
        joined = jax.tree.map(lambda *pieces: np.concatenate(pieces), *split)
        chex.assert_trees_all_equal(joined, whole.batch_at(step))
        named = [name for part in parts for name in part.documents_at(step)]
        assert set(named) == set(whole.documents_at(step))


def test_rows_are_well_formed(build):
    stream = build(0, 1)
    for step in STEPS:
        batch = stream.batch_at(step)
        segments_BT, positions_BT = batch.segments_BT, batch.positions_BT
        assert segments_BT[:, 0].min() == 1
        new_BT = np.diff(segments_BT, axis=1) != 0
        assert set(np.diff(segments_BT, axis=1)[new_BT & (segments_BT[:, 1:] != 0)].tolist()) <= {1}
        padding_BT = segments_BT == 0
        assert (np.diff(padding_BT.astype(int), axis=1) >= 0).all(), "padding stands at the end"
        begins_BT = np.pad(new_BT, ((0, 0), (1, 0)), constant_values=True)
        assert (positions_BT[begins_BT] == 0).all()
        assert (np.diff(positions_BT, axis=1)[~new_BT & ~padding_BT[:, 1:]] == 1).all()
        assert not batch.label_mask_BT[padding_BT].any()
