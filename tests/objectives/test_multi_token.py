"""The loss of several heads equals the naive form; every label is the right one, counted once, in its own document."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.errors import UserError
from lmlab.core.types import TokenBatch
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.models.heads import drop_heads, multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import MultiTokenLM
from lmlab.objectives.config import MultiTokenLossConfig
from lmlab.objectives.multi_token import ahead, multi_token
from lmlab.objectives.next_token import next_token
from lmlab.testing.tiny import VOCAB, all_sequences, lively, random_batch, sequence_logprobs, tiny_config, tiny_lm
from lmlab.train.state import new_state
from lmlab.train.step import make_step, total_loss

CHAINS = ("parallel", "causal", "linear", "sequential")
KEY = jax.random.key(1)


def model(heads=3, chain="parallel", layers=4, **changes):
    return multi_token_lm(MultiTokenConfig(tiny_config(layers=layers, **changes), heads, chain))


MODEL = model()
PARAMS = lively(MODEL.lm.init(jax.random.key(0)))
BATCH = random_batch(length=12)


@partial(jax.jit, static_argnums=0)
def loss(objective, params, batch=BATCH):
    terms = objective(params, batch, KEY)
    return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})


@pytest.mark.parametrize("chain", CHAINS)
def test_one_head_is_the_plain_model(chain):
    one, plain = model(1, chain), tiny_lm(layers=4)
    params = plain.init(jax.random.key(0))
    chex.assert_trees_all_equal(one.lm.init(jax.random.key(0)), params)
    params = lively(params)
    values = [
        jax.jit(jax.value_and_grad(lambda p, f=f: loss(f, p)))(params) for f in (multi_token(one), next_token(plain))
    ]  # fmt: skip
    chex.assert_trees_all_close(*values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chain", CHAINS)
def test_the_first_head_is_the_language_model_whatever_is_ahead(chain):
    three = model(3, chain)
    params = lively(three.lm.init(jax.random.key(0)))
    found = jax.jit(multi_token(three, chunk=4))(params, BATCH, KEY)
    # Rows of T + 1 are those of T + 3 without the last two tokens.
    wanted = jax.jit(next_token(three.lm))(params, jax.tree.map(lambda x: x[:, :-2], BATCH), KEY)
    chex.assert_trees_all_close(found.losses["head_1"], wanted.losses["next_token"], rtol=1e-5)
    chex.assert_trees_all_close(found.metrics["nll"], wanted.metrics["nll"], rtol=1e-5)
    assert found.losses.keys() == {"head_1", "head_2", "head_3"}


@pytest.mark.parametrize("chain", CHAINS)
def test_losses_and_gradients_equal_the_naive_ones(chain):
    three = model(3, chain)
    params = lively(three.lm.init(jax.random.key(0)))

    def naive(params):
        """Each head by itself, with all of its logits and optax's loss."""
        tokens, segments = BATCH.tokens_BT, BATCH.segments_BT
        reading = three.read(
            params, tokens[:, :-3], positions_BT=BATCH.positions_BT[:, :-3], segments_BT=segments[:, :-3]
        )
        total = 0.0
        for i in (1, 2, 3):
            hidden, reading = three.head(params, i, reading, tokens[:, i - 1 : i - 1 + 9])
            there = slice(i, i + 9)
            nll = optax.softmax_cross_entropy_with_integer_labels(three.lm.logits(params, hidden), tokens[:, there])
            same = (segments[:, :9] == segments[:, there]) & (segments[:, :9] != 0) & BATCH.label_mask_BT[:, there]
            total += i * jnp.sum(jnp.where(same, nll, 0)) / jnp.sum(same)
        return total

    ours = lambda params: loss(multi_token(three, head_weights=(1.0, 2.0, 3.0), chunk=4), params)
    one, two = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, naive))
    chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_multiple_of_the_loss_has_a_multiple_of_the_gradient():
    objective = multi_token(MODEL, chunk=4)
    once, thrice = (jax.jit(jax.grad(lambda p, c=c: c * loss(objective, p)))(PARAMS) for c in (1.0, 3.0))
    chex.assert_trees_all_close(jax.tree.map(lambda x: 3 * x, once), thrice, rtol=1e-5, atol=1e-6)


def test_the_loss_is_linear_in_the_weights_of_the_heads():
    each = [float(loss(multi_token(MODEL, head_weights=tuple(np.eye(3)[i])), PARAMS)) for i in range(3)]
    both = float(loss(multi_token(MODEL, head_weights=(0.5, 0.0, 2.0)), PARAMS))
    assert both == pytest.approx(0.5 * each[0] + 2 * each[2], rel=1e-5)


def test_heads_of_weight_zero_leave_the_gradient_of_the_language_model():
    slopes = jax.jit(jax.grad(lambda p: loss(multi_token(MODEL, head_weights=(1.0, 0.0, 0.0)), p)))(PARAMS)
    batch = jax.tree.map(lambda x: x[:, :-2], BATCH)
    alone = tiny_lm(layers=2)
    wanted = jax.jit(jax.grad(lambda p: loss(next_token(alone), p, batch)))(drop_heads(PARAMS))
    chex.assert_trees_all_close(drop_heads(slopes), wanted, rtol=1e-4, atol=1e-6)
    assert all(not jnp.any(x) for name in ("head_2", "head_3") for x in jax.tree.leaves(slopes[name]))


def test_labels_are_the_tokens_ahead_and_nothing_comes_round():
    batch = whole_rows(jnp.arange(2 * 9).reshape(2, 9))
    labels_BMT, weights_BMT = ahead(batch, 3)
    for i in (1, 2, 3):
        chex.assert_trees_all_equal(labels_BMT[:, i - 1], batch.tokens_BT[:, :6] + i)
    assert jnp.all(weights_BMT == 1)
    # In a row whose last tokens are padding no head has a label there.
    short = batch.replace(segments_BT=batch.segments_BT * (jnp.arange(9) < 5)[None])
    assert ahead(short, 3)[1].sum(axis=2).tolist() == [[4, 3, 2]] * 2


@pytest.mark.parametrize("chain", CHAINS)
def test_other_documents_in_the_row_change_nothing(chain):
    two = model(2, chain)
    params = lively(two.lm.init(jax.random.key(0)))
    changed = jnp.where(BATCH.segments_BT == 1, BATCH.tokens_BT, (BATCH.tokens_BT + 1) % VOCAB)
    first = BATCH.replace(label_mask_BT=BATCH.label_mask_BT & (BATCH.segments_BT == 1))
    objective = jax.jit(multi_token(two))
    one, other = (objective(params, first.replace(tokens_BT=x), KEY) for x in (BATCH.tokens_BT, changed))
    assert all(term.sum > 0 for term in one.losses.values())
    chex.assert_trees_all_close(one.losses, other.losses, rtol=1e-5)


def whole_rows(tokens_BT):
    ones = jnp.ones_like(tokens_BT)
    places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    return TokenBatch(tokens_BT, ones, places, ones.astype(bool))


@pytest.mark.parametrize("mode", ["concat", "pad", "whole"])
def test_how_far_is_looked_ahead_does_not_change_the_labels_of_head_1(mode):
    """But where whole documents share a row: what several heads read there would be another text for each n."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 14, 40)
    tokens, offsets = np.arange(sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])

    def labels(heads):
        packing = lay_out(tokens, offsets, length=8, lookahead=heads, mode=mode)
        batch = stack_rows([row_at(packing, i) for i in range(packing.rows)], packing.rows, 8 + heads)
        labels_BMT, weights_BMT = ahead(jax.tree.map(jnp.asarray, batch), heads)
        return np.sort(labels_BMT[:, 0][weights_BMT[:, 0] > 0]).tolist()

    assert (labels(1) == labels(3)) == (mode != "whole")


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_border_cuts_more_terms_than_a_token_has(heads):
    # Section 5.1 of the paper: n (n + 1) / 2 terms bear on a choice, n on a token that decides nothing.
    batch = whole_rows(jnp.zeros((1, 12), jnp.int32))
    objective, params = jax.jit(multi_token(model(heads), chunk=4)), model(heads).lm.init(KEY)
    counted = lambda batch: sum(float(term.weight) for term in objective(params, batch, KEY).losses.values())
    every = counted(batch)
    assert every == heads * (12 - heads)
    unlabelled = batch.replace(label_mask_BT=batch.label_mask_BT.at[0, 6].set(False))
    assert every - counted(unlabelled) == heads
    late = jnp.arange(12)[None] >= 6
    cut = batch.replace(segments_BT=batch.segments_BT + late, positions_BT=batch.positions_BT - 6 * late)
    assert every - counted(cut) == heads * (heads + 1) / 2


@pytest.mark.parametrize("chain", CHAINS)
def test_every_head_learns_its_own_token_of_a_cycle(chain):
    three = model(3, chain, vocab_size=5)
    tokens = (jnp.arange(12)[None] + jnp.arange(5)[:, None]) % 5
    objective, tx = multi_token(three), optax.adam(1e-2)
    step = jax.jit(make_step(objective, tx))
    state, batch = new_state(three.lm.init(jax.random.key(0)), tx, KEY), whole_rows(tokens.astype(jnp.int32))
    for _ in range(80):
        state, metrics = step(state, batch)
    assert all(metrics[f"loss/head_{i}"] < 0.05 for i in (1, 2, 3))
    assert all(metrics[name] == 1 for name in ("accuracy", "accuracy_2", "accuracy_3"))
    reading = jax.jit(three.read)(state.params, tokens[:, :9])
    for i in (1, 2, 3):
        hidden, reading = jax.jit(three.head, static_argnums=1)(state.params, i, reading, tokens[:, i - 1 : i + 8])
        best = jnp.argmax(three.lm.logits(state.params, hidden), axis=-1)
        assert jnp.array_equal(best, (tokens[:, :9] + i) % 5)


def heads_of(lm, params) -> MultiTokenLM:
    """A model of two heads whose second is the exact marginal of the language model; its hidden states are logits."""

    def read(params, inputs, **rest):
        del rest
        return inputs

    def head(_, number, inputs, following):
        del following
        if number == 1:
            return jax.nn.log_softmax(lm.logits(params, lm.apply(params, inputs)[0])), inputs
        marginal = 0.0
        for token in range(VOCAB):
            following = jnp.concatenate([inputs, jnp.full((len(inputs), 1), token)], axis=1)
            logprobs = jax.nn.log_softmax(lm.logits(params, lm.apply(params, following)[0]))
            marginal += jnp.exp(logprobs[:, -2, token, None] + logprobs[:, -1])
        return jnp.log(marginal)[:, None], inputs

    plain = replace(lm, logits=lambda _, hidden: hidden, head=lambda _: {}, apply=None)
    return MultiTokenLM(plain, 2, read, head, plain, None)


def test_two_losses_weigh_what_the_tokens_have_in_common_twice():
    # Appendix L.2: H(X) + H(Y) = H(X|Y) + 2 I(X;Y) + H(Y|X), and so for cross-entropies of data p under a model q.
    # All rows of three tokens are the data; X and Y are the two tokens after the first.
    lm = tiny_lm()
    params = lively(lm.init(jax.random.key(0)))
    rows = all_sequences(VOCAB, 3)
    terms = jax.jit(lambda batch: multi_token(heads_of(lm, params))({}, batch, KEY))(whole_rows(rows))
    found = sum(float(term.sum) for term in terms.losses.values()) / len(rows)
    joint = np.exp(np.asarray(sequence_logprobs(lm, params, rows, 1), np.float64)).reshape((VOCAB,) * 3)
    first, second = joint.sum(2, keepdims=True), joint.sum(1, keepdims=True)
    x_given_y, y_given_x = -np.log(joint / second).mean(), -np.log(joint / first).mean()
    common = np.log(joint / (first * second)).mean()
    assert found == pytest.approx(x_given_y + 2 * common + y_given_x, rel=1e-5)


def test_memory_does_not_grow_with_the_heads():
    def temp(heads, naive=False):
        wide = model(heads, layers=9, vocab_size=4096)
        shapes = jax.eval_shape(wide.lm.init, KEY)
        rows = jax.eval_shape(lambda: whole_rows(jnp.zeros((4, 64 + heads), jnp.int32)))
        if naive:

            def f(params, batch):
                reading, total = wide.read(params, batch.tokens_BT[:, :64]), 0.0
                for i in range(1, heads + 1):
                    hidden, reading = wide.head(params, i, reading, batch.tokens_BT)
                    total += jnp.sum(jax.nn.log_softmax(wide.lm.logits(params, hidden))[..., 0])
                return total
        else:
            f = lambda params, batch: loss(multi_token(wide, chunk=32), params, batch)
        return jax.jit(jax.grad(f)).lower(shapes, rows).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 4096 * 4
    assert temp(8) < 1.1 * temp(1)
    assert temp(8, naive=True) - temp(1, naive=True) > 6 * logits


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="head_weights"):
        multi_token(MODEL, head_weights=(1.0,))
    with pytest.raises(UserError, match="head_weights"):
        MultiTokenLossConfig(head_weights=(1.0, -1.0))
