"""Chunked cross-entropy equals the naive form; labels, masks and bytes are counted right."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import TokenBatch
from lmlab.objectives.cross_entropy import chunked_cross_entropy
from lmlab.objectives.next_token import label_weights, next_token
from lmlab.testing.tiny import VOCAB, all_sequences, lively, random_batch, sequence_logprobs, tiny_lm

LM = tiny_lm()
PARAMS = lively(LM.init(jax.random.key(0)))


def unembed(head, hidden):
    return jnp.einsum("...d,vd->...v", hidden, head["w"], preferred_element_type=jnp.float32)


def naive(head, hidden, labels, weights, z_loss):
    logits = unembed(head, hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * log_z**2))


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradient_equal_the_naive_form(chunk, z_loss):
    keys = jax.random.split(jax.random.key(0), 4)
    head = {"w": jax.random.normal(keys[0], (11, 5))}
    hidden = jax.random.normal(keys[1], (3, 7, 5))
    labels = jax.random.randint(keys[2], (3, 7), 0, 11)
    weights = jax.random.uniform(keys[3], (3, 7)) * (jnp.arange(7)[None] != 2)
    ours = lambda head, hidden: chunked_cross_entropy(unembed, head, hidden, labels, weights, z_loss, chunk).loss
    theirs = lambda head, hidden: naive(head, hidden, labels, weights, z_loss)
    one, two = (jax.value_and_grad(f, argnums=(0, 1))(head, hidden) for f in (ours, theirs))
    chex.assert_trees_all_close(one, two, rtol=2e-5, atol=1e-5)


def test_labels_of_weight_zero_may_hold_anything_and_hidden_nan_stays_out():
    head = {"w": jnp.ones((11, 5))}
    hidden = jnp.ones((1, 3, 5)).at[0, 1].set(jnp.nan)
    labels, weights = jnp.asarray([[1, 99, 2]]), jnp.asarray([[1.0, 0.0, 1.0]])
    f = lambda hidden: chunked_cross_entropy(unembed, head, hidden, labels, weights, 0.1, 2).nll
    assert np.isclose(f(hidden), 2 * math.log(11), rtol=1e-5)


def test_memory_does_not_hold_all_logits():
    def temp(chunk: int) -> int:
        head, hidden = {"w": jnp.zeros((4096, 8))}, jnp.zeros((2, 256, 8))
        labels, weights = jnp.zeros((2, 256), jnp.int32), jnp.ones((2, 256))
        loss = lambda head, hidden: chunked_cross_entropy(unembed, head, hidden, labels, weights, 0.0, chunk).loss
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 2 * 256 * 4096 * 4
    assert temp(256) >= whole
    assert temp(16) < whole / 4


def test_bfloat16_gradients_come_back_in_their_types():
    head = {"w": jax.random.normal(jax.random.key(0), (11, 5), jnp.bfloat16)}
    hidden = jax.random.normal(jax.random.key(1), (2, 4, 5), jnp.bfloat16)
    labels, weights = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4))
    loss = lambda head, hidden: chunked_cross_entropy(unembed, head, hidden, labels, weights, 0.0, 2).loss
    slopes = jax.grad(loss, argnums=(0, 1))(head, hidden)
    chex.assert_trees_all_equal_dtypes(slopes, (head, hidden))


def test_label_weights_by_definition():
    batch = random_batch(rows=6, length=8, seed=3)
    segments, mask = np.asarray(batch.segments_BT), np.asarray(batch.label_mask_BT)
    for ahead in (1, 2):
        expected = [
            [float(row[t] == row[t + ahead] != 0 and ok[t + ahead]) for t in range(8 - ahead)]
            for row, ok in zip(segments, mask, strict=True)
        ]
        assert np.array_equal(label_weights(batch, ahead), expected)


def test_loss_is_the_mean_over_every_document_of_a_language():
    # All 343 rows of 3 tokens, weighed alike: the objective's sum is that of -log p of each, by enumeration.
    rows = all_sequences(VOCAB, 3)
    ones = jnp.ones_like(rows)
    batch = TokenBatch(rows, ones, jnp.broadcast_to(jnp.arange(3)[None], rows.shape), ones.astype(bool))
    terms = next_token(LM, chunk=1)(PARAMS, batch, jax.random.key(0))
    expected = -jnp.sum(sequence_logprobs(LM, PARAMS, rows, prompt=1))
    assert np.isclose(terms.losses["next_token"].sum, expected, rtol=1e-5)
    assert terms.losses["next_token"].weight == rows.size - len(rows)


def test_other_documents_in_the_row_change_nothing():
    batch = random_batch(rows=1, length=9, seed=1)
    changed = jnp.where(batch.segments_BT == 1, batch.tokens_BT, (batch.tokens_BT + 1) % VOCAB)
    only_first = batch.label_mask_BT & (batch.segments_BT == 1)
    values = [
        next_token(LM)(PARAMS, batch.replace(tokens_BT=tokens, label_mask_BT=only_first), jax.random.key(0))
        for tokens in (batch.tokens_BT, changed)
    ]
    assert np.isclose(values[0].losses["next_token"].sum, values[1].losses["next_token"].sum, rtol=1e-5)


def test_bits_per_byte_counts_bytes_of_labels():
    batch = random_batch()
    bytes_V = jnp.arange(VOCAB, dtype=jnp.float32)
    terms = next_token(LM, token_bytes_V=bytes_V)(PARAMS, batch, jax.random.key(0))
    weights = label_weights(batch)
    assert terms.metrics["bits_per_byte"].weight == jnp.sum(weights * bytes_V[batch.tokens_BT[:, 1:]])
    nll = terms.metrics["nll"].sum
    assert np.isclose(terms.metrics["bits_per_byte"].sum, nll / math.log(2))


def test_accuracy_of_a_model_that_knows():
    # Tied embeddings of huge identity: the model repeats its input, so labels equal to their input are right.
    tokens = jnp.asarray([[2, 2, 2, 3]])
    sums = chunked_cross_entropy(
        unembed, {"w": jnp.eye(7)}, jax.nn.one_hot(tokens[:, :-1], 7), tokens[:, 1:], jnp.ones((1, 3)), 0.0, 2
    )
    assert sums.correct == 2
