"""Held-out values are those of one computation over the whole set, however it is cut into batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import Ratio, Terms
from lmlab.evals.perplexity import make_held_out
from lmlab.objectives.next_token import next_token
from lmlab.testing.tiny import VOCAB, lively, random_batch, tiny_lm

LM = tiny_lm(layers=1)
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)))
BYTES = np.arange(1, VOCAB + 1)
WHOLE = random_batch(rows=6)
KEY = jax.random.key(1)
OBJECTIVE = next_token(LM, token_bytes_V=jnp.asarray(BYTES, jnp.float32))


def cut(sizes):
    starts = np.cumsum([0, *sizes[:-1]])
    parts = zip(starts, sizes, strict=True)
    return [jax.tree.map(lambda x, a=start, n=size: x[a : a + n], WHOLE) for start, size in parts]


@jax.jit
def forward(params, batch):
    hidden, _ = LM.apply(params, batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
    return jax.nn.log_softmax(LM.logits(params, hidden))


LOGPROBS = np.asarray(forward(PARAMS, WHOLE), np.float64)


def by_hand(rows):
    """Loss, accuracy and bits per byte label by label, in float64."""
    arrays = (WHOLE.tokens_BT, WHOLE.segments_BT, WHOLE.label_mask_BT)
    tokens, segments, labels = (np.asarray(array) for array in arrays)
    nll, right, size, count = 0.0, 0, 0, 0
    for row in range(rows):
        for t in range(1, tokens.shape[1]):
            if labels[row, t] and segments[row, t] == segments[row, t - 1] != 0:
                nll -= LOGPROBS[row, t - 1, tokens[row, t]]
                right += LOGPROBS[row, t - 1].argmax() == tokens[row, t]
                size += BYTES[tokens[row, t]]
                count += 1
    loss = nll / count
    return {"loss": loss, "nll": loss, "perplexity": math.exp(loss), "accuracy": right / count,
            "bits_per_byte": nll / math.log(2) / size}  # fmt: skip


@pytest.mark.parametrize("sizes", [[6], [2, 4], [1, 1, 4]])
def test_any_split_gives_the_values_of_the_whole(sizes):
    values = make_held_out(OBJECTIVE, lambda: cut(sizes), KEY)(PARAMS)
    assert values == pytest.approx(by_hand(6), rel=1e-5)


@pytest.mark.parametrize(("limit", "rows"), [(1, 2), (2, 4), (9, 6)])
def test_a_limit_reads_the_first_batches_and_no_more(limit, rows):
    taken = []

    def batches():
        for batch in cut([2, 2, 2]):
            taken.append(batch)
            yield batch

    values = make_held_out(OBJECTIVE, batches, KEY, limit=limit)(PARAMS)
    assert values == pytest.approx(by_hand(rows), rel=1e-5)
    assert len(taken) == rows // 2


def test_no_batches_give_no_values():
    assert make_held_out(OBJECTIVE, list, KEY)(PARAMS) == {}


def test_scales_count_once_and_not_once_a_batch():
    def objective(params, batch, key):
        del params, key
        losses = {
            "a": Ratio(jnp.sum(batch), jnp.asarray(2.0)),
            "b": Ratio(jnp.asarray(3.0), jnp.asarray(1.0)),
        }
        return Terms(losses=losses, scales={"a": 0.5, "b": 4.0}, metrics={})

    batches = [jnp.asarray([float(i)]) for i in range(3)]
    values = make_held_out(objective, lambda: batches, KEY)({})
    assert values == pytest.approx({"loss": 0.5 * 3 / 6 + 4 * 3, "loss/a": 0.5, "loss/b": 3.0})


def test_randomness_differs_by_batch_and_repeats_by_call():
    def objective(params, batch, key):
        noise = jax.random.uniform(key)
        return Terms({"noise": Ratio(noise, jnp.ones(()))}, {"noise": 1.0}, {"square": Ratio(noise**2, jnp.ones(()))})

    held_out = make_held_out(objective, lambda: [0, 0, 0], KEY)
    values = held_out({})
    assert values == held_out({})
    # Equal draws would have no variance.
    assert values["square"] - values["loss"] ** 2 > 1e-4
    assert values != make_held_out(objective, lambda: [0, 0, 0], jax.random.key(2))({})
