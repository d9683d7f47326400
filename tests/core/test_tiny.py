"""The helpers of the tests do what the tests believe."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lmlab.testing.tiny import all_sequences, lively, random_batch, sequence_logprobs, tiny_lm


def test_all_sequences_are_all_of_them_once():
    rows = np.asarray(all_sequences(3, 4))
    assert rows.shape == (81, 4)
    assert sorted(rows @ [27, 9, 3, 1]) == list(range(81))


def test_probabilities_of_all_sequences_sum_to_one_after_any_prompt():
    lm = tiny_lm(vocab_size=3, layers=1)
    params = lively(lm.init(jax.random.key(0)))
    rows = all_sequences(3, 4)
    logprobs = np.asarray(jax.jit(lambda params: sequence_logprobs(lm, params, rows, 2))(params))
    for first in all_sequences(3, 2):
        own = np.all(np.asarray(rows)[:, :2] == np.asarray(first), axis=1)
        assert np.isclose(np.exp(logprobs[own]).sum(), 1, atol=1e-5)


def test_lively_moves_every_leaf_and_repeats():
    lm = tiny_lm(layers=1)
    params = lm.init(jax.random.key(0))
    moved = lively(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a != b)), params, moved)))
    chex.assert_trees_all_equal(moved, lively(params))


def test_random_batches_hold_documents_padding_and_tokens_that_are_no_labels():
    batch = random_batch(rows=20, length=9)
    segments, positions, labels = (np.asarray(x) for x in (batch.segments_BT, batch.positions_BT, batch.label_mask_BT))
    assert (segments == 0).any()
    assert (segments == 3).any()
    assert not labels[segments == 0].any()
    assert (~labels[segments > 0]).any()
    for row in range(20):
        for number in set(segments[row]) - {0}:
            own = segments[row] == number
            assert positions[row, own].tolist() == list(range(own.sum()))
            assert np.all(np.diff(np.flatnonzero(own)) == 1)
