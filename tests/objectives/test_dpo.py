"""Objectives over pairs: layout, padding and cuts of the batch change nothing; the reference is a constant."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.preferences import EncodedPair
from lmlab.models.config import ExecutionConfig
from lmlab.objectives.dpo import REFERENCE, answer_sums, beside, dpo, kto_objective, no_reference
from lmlab.objectives.logprobs import answer_lengths, answer_logprobs, chunked_logprobs, sum_by_answer
from lmlab.objectives.pair_losses import after, kto, per_token, sigmoid, simpo
from lmlab.reference import with_reference
from lmlab.testing.tables import CACHES, LMS
from lmlab.testing.tiny import lively, random_pairs, random_preferences, sequence_logprobs, tiny_lm
from lmlab.train.state import new_state
from lmlab.train.step import make_step, total_loss

LM = tiny_lm()
KEY = jax.random.key(0)
PARAMS = lively(LM.init(KEY))
PAIRS = random_pairs(9, seed=3, longest=6)


def batch_of(rows, batch_size=0):
    return jax.tree.map(jnp.asarray, preferences_of(rows, range(rows.rows), batch_size or rows.rows))


@partial(jax.jit, static_argnums=0)
def sums(lm, params, answers):
    """Log-probabilities [B, S] of answers."""
    return answer_sums(answer_logprobs(lm, params, answers, 4), answers)


def sums_of(lm, params, rows):
    """[pairs, 2] of the log-probabilities that rows of any layout give."""
    sums_BS = np.asarray(sums(lm, params, batch_of(rows).answers))
    found = np.zeros((len(rows.pairs), 2))
    for row in range(rows.rows):
        held = rows.pairs_of(row)
        found[held] = sums_BS[row].reshape(-1, 2)[: len(held)]
        assert not sums_BS[row].reshape(-1, 2)[len(held) :].any()
    return found


@pytest.mark.parametrize("name", CACHES)
def test_shared_prompts_copies_of_them_and_one_answer_at_a_time_give_the_same(name):
    lm = LMS[name]()
    params = lively(lm.init(KEY))
    shared = sums_of(lm, params, lay_out_pairs(PAIRS, 32))
    apart = sums_of(lm, params, lay_out_pairs(PAIRS, 32, shared=False))
    np.testing.assert_allclose(apart, shared, atol=2e-5, rtol=1e-5)
    for i in (0, 5):
        for side in (0, 1):
            text = np.concatenate([PAIRS[i].prompt, PAIRS[i].answers[side]])[None]
            alone = sequence_logprobs(lm, params, jnp.asarray(text), len(PAIRS[i].prompt))[0]
            np.testing.assert_allclose(shared[i, side], alone, atol=2e-5, rtol=1e-5)


def test_positions_that_went_on_through_the_other_answer_would_show():
    answers = batch_of(lay_out_pairs(PAIRS, 32)).answers
    places = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32), answers.tokens_BT.shape)
    right, wrong = (answer_logprobs(LM, PARAMS, b, 8) for b in (answers, answers.replace(positions_BT=places)))
    assert float(jnp.abs(right - wrong).max()) > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunked_logprobs_and_their_gradients_are_those_of_the_whole_logits(chunk):
    keys = jax.random.split(KEY, 3)
    hidden, labels = jax.random.normal(keys[0], (2, 7, 16)), jax.random.randint(keys[1], (2, 7), 0, 7)
    factors = jax.random.normal(keys[2], (2, 7)).at[:, 5:].set(0)

    def naive(head, hidden):
        logprobs = jax.nn.log_softmax(LM.logits(head, hidden))
        return jnp.take_along_axis(logprobs, labels[..., None], axis=-1)[..., 0]

    found = lambda head, hidden: chunked_logprobs(LM.logits, head, hidden, labels, chunk)
    head = LM.head(PARAMS)
    chex.assert_trees_all_close(found(head, hidden), naive(head, hidden), atol=1e-5)
    slopes = [jax.grad(lambda *x, f=f: jnp.sum(factors * f(*x)), argnums=(0, 1))(head, hidden) for f in (found, naive)]
    chex.assert_trees_all_close(*slopes, atol=1e-5)
    # Labels without a factor may hold any number.
    labels = labels.at[:, 5:].set(-1000)
    chex.assert_trees_all_close(
        jax.grad(lambda *x: jnp.sum(factors * found(*x)), argnums=(0, 1))(head, hidden), slopes[0], atol=1e-6
    )


def test_the_logits_of_a_batch_are_never_held():
    lm = tiny_lm(vocab_size=4096)
    params = jax.eval_shape(lm.init, KEY)
    batch = random_preferences(rows=8, vocab=4096, length=32)
    objective = dpo(lm, sigmoid, 0.1, chunk=2)
    loss = lambda params: objective(params, batch, KEY).losses["preference"].sum
    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    widest = 8 * 2 * 4096
    sizes = [np.prod([int(n) for n in part.split("x")[:-1] if n]) for part in
             (piece.split(">")[0] for piece in text.split("tensor<")[1:]) if "4096" in part]  # fmt: skip
    assert sizes
    assert max(sizes) <= max(widest, 4096 * 16)


@partial(jax.jit, static_argnums=0)
def value(objective, params, batch):
    terms = objective(params, batch, KEY)
    return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})


def test_at_the_reference_the_loss_is_log_two_and_the_gradient_half_beta_of_both_answers():
    batch, beta = random_preferences().replace(reference_BS=None), 0.3
    params = {**PARAMS, REFERENCE: PARAMS}
    found, slopes = jax.value_and_grad(partial(value, dpo(LM, sigmoid, beta)))(params, batch)
    assert float(found) == pytest.approx(np.log(2), rel=1e-6)
    chex.assert_trees_all_equal(slopes.pop(REFERENCE), jax.tree.map(jnp.zeros_like, PARAMS))

    def towards(params):
        sums_BS = sums(LM, params, batch.answers)
        gap_BP = sums_BS[:, 1::2] - sums_BS[:, 0::2]
        return 0.5 * beta * jnp.sum(batch.weights_BP * gap_BP) / jnp.sum(batch.weights_BP)

    chex.assert_trees_all_close(slopes, jax.grad(towards)(PARAMS), atol=1e-5, rtol=1e-4)


def test_a_precomputed_reference_is_one_computed_beside():
    held = lively(LM.init(KEY), seed=5)
    rows = lay_out_pairs(PAIRS, 32)
    objective = dpo(LM, sigmoid, 0.3, tail=0.4)
    stored = batch_of(with_reference(rows, LM, held, batch_size=2, tail=0.4))
    assert stored.reference_BS is not None
    one = jax.value_and_grad(partial(value, objective))(PARAMS, stored)
    other = jax.value_and_grad(partial(value, objective))({**PARAMS, REFERENCE: held}, batch_of(rows))
    other[1].pop(REFERENCE)
    chex.assert_trees_all_close(one, other, atol=1e-5, rtol=1e-5)


def test_padding_and_how_pairs_share_rows_change_nothing():
    objective, results = dpo(LM, after(per_token, sigmoid), 0.3, sft=0.2), []
    for rows, batch_size in (
        (lay_out_pairs(PAIRS, 32), 0),
        (lay_out_pairs(PAIRS, 20), 14),
        (lay_out_pairs(PAIRS, 32, alone=True), 0),
    ):
        rows = with_reference(rows, LM, lively(PARAMS, seed=2), batch_size=4)
        terms = objective(PARAMS, batch_of(rows, batch_size), KEY)
        results.append((terms.losses, terms.metrics))
    chex.assert_trees_all_close(results[1], results[0], rtol=2e-5, atol=1e-5)
    chex.assert_trees_all_close(results[2], results[0], rtol=2e-5, atol=1e-5)


def test_a_batch_of_no_pairs_teaches_nothing():
    batch = random_preferences()
    batch = batch.replace(weights_BP=jnp.zeros_like(batch.weights_BP))
    found, slopes = jax.value_and_grad(partial(value, dpo(LM, sigmoid, 0.1, sft=1.0)))(PARAMS, batch)
    assert float(found) == 0
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


@pytest.mark.parametrize("q", [1.0, 0.8, 0.0])
def test_a_target_is_the_probability_that_the_label_is_right(q):
    batch = random_preferences()
    soft = batch.replace(targets_BP=jnp.full_like(batch.targets_BP, q))
    found = value(dpo(LM, sigmoid, 0.3), PARAMS, soft)
    smoothed = value(dpo(LM, partial(sigmoid, smoothing=1 - q), 0.3), PARAMS, batch)
    assert float(found) == pytest.approx(float(smoothed), rel=1e-6)


def test_losses_without_a_reference_need_none():
    batch = random_preferences().replace(reference_BS=None)
    objective = dpo(LM, partial(simpo, gamma=0.5), 2.0, reference=no_reference)
    chex.assert_tree_all_finite(jax.value_and_grad(partial(value, objective))(PARAMS, batch))
    with pytest.raises(KeyError, match=REFERENCE):
        dpo(LM, sigmoid, 0.1)(PARAMS, batch, KEY)


def test_the_tail_of_the_longer_answer_weighs_less():
    answers = batch_of(lay_out_pairs(PAIRS, 32)).answers
    logprobs = answer_logprobs(LM, PARAMS, answers)
    found = answer_sums(logprobs, answers, 0.3)
    lengths = np.asarray(answer_lengths(answers))
    for row in range(len(found)):
        for s in range(found.shape[1]):
            tokens = np.asarray(logprobs[row])[np.asarray(answers.answers_BA[row]) == s + 1]
            shorter = int(min(lengths[row, s], lengths[row, s ^ 1]))
            wanted = tokens[:shorter].sum() + 0.3 * tokens[shorter:].sum()
            assert float(found[row, s]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_metrics_by_hand():
    batch = random_preferences()
    sums_BS = sums(LM, PARAMS, batch.answers)
    # One pair without a margin counts half.
    batch = batch.replace(reference_BS=batch.reference_BS.at[0, :2].set(sums_BS[0, :2]))
    metrics = {
        name: float(ratio.sum / ratio.weight)
        for name, ratio in dpo(LM, sigmoid, 0.5)(PARAMS, batch, KEY).metrics.items()
    }
    ratios, weights = np.asarray(sums_BS - batch.reference_BS), np.asarray(batch.weights_BP)
    margins = 0.5 * (ratios[:, 0::2] - ratios[:, 1::2])
    mean = lambda values: (weights * values).sum() / weights.sum()
    assert metrics["margin"] == pytest.approx(mean(margins), rel=1e-4)
    right = np.where(margins == 0, 0.5, margins > 0)
    assert right[0, 0] == 0.5
    assert metrics["accuracy"] == pytest.approx(mean(right), rel=1e-5)
    assert metrics["reward/chosen"] == pytest.approx(mean(0.5 * ratios[:, 0::2]), rel=1e-4)
    assert metrics["reward/rejected"] == pytest.approx(mean(0.5 * ratios[:, 1::2]), rel=1e-4)
    lengths = np.asarray(answer_lengths(batch.answers))[:, 0::2]
    chosen = np.asarray(sums_BS)[:, 0::2]
    assert metrics["nll/chosen"] == pytest.approx(-(weights * chosen).sum() / (weights * lengths).sum(), rel=1e-5)


def test_kto_is_the_loss_of_the_paper_on_answers_and_answers_to_other_prompts():
    batch = random_preferences()
    batch = batch.replace(targets_BP=jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]))
    terms = kto_objective(LM, 0.5, lambdas=(1.0, 1.5))(PARAMS, batch, KEY)
    ratios = sums(LM, PARAMS, batch.answers) - batch.reference_BS
    weights = batch.weights_BP
    anchor = jnp.maximum(0.5 * jnp.sum(weights * ratios[:, 1::2]) / jnp.sum(weights), 0)
    wanted = jnp.sum(weights * kto(ratios[:, 0::2], batch.targets_BP > 0.5, anchor, 0.5, (1.0, 1.5)))
    assert float(terms.losses["kto"].sum) == pytest.approx(float(wanted), rel=1e-5)
    assert float(terms.metrics["anchor"].sum / terms.metrics["anchor"].weight) == pytest.approx(float(anchor), abs=1e-6)


def test_log_probabilities_of_long_answers_under_bfloat16_are_added_up_in_float32():
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(0, 7, 150).astype(np.int32)
    rows = lay_out_pairs([EncodedPair("long", tokens()[:4], (tokens(), tokens()), 1.0, 0.0)], 304)
    half = tiny_lm(max_length=512, execution=ExecutionConfig(compute_dtype="bfloat16"))
    full = tiny_lm(max_length=512)
    params, batch = full.init(KEY), batch_of(rows)
    rough, exact = (sums(lm, params, batch.answers) for lm in (half, full))
    assert rough.dtype == jnp.float32
    # Some 290 nats each: sums in bfloat16 would be off by whole nats, hidden states of bfloat16 by hundredths.
    assert float(jnp.abs(rough - exact).max()) < 0.1
    assert float(exact.min()) < -250


def test_a_still_reference_beside_the_policy_trains_as_a_stored_one():
    held = lively(PARAMS, seed=4)
    rows = lay_out_pairs(PAIRS, 32)
    tx = optax.sgd(0.05)
    step = jax.jit(make_step(dpo(LM, sigmoid, 0.3, reference=beside(LM)), tx))
    moving = new_state({**PARAMS, REFERENCE: held}, tx, KEY, still=(REFERENCE,))
    stored = new_state(PARAMS, tx, KEY)
    for _ in range(3):
        moving, told = step(moving, batch_of(rows))
        stored, also = step(stored, batch_of(with_reference(rows, LM, held)))
    chex.assert_trees_all_equal(moving.params[REFERENCE], held)
    chex.assert_trees_all_close({k: v for k, v in moving.params.items() if k != REFERENCE}, stored.params, atol=1e-5)
    chex.assert_trees_all_close(told, also, atol=1e-4, rtol=1e-4)


def test_sums_by_answer_leave_out_empty_places():
    answers = batch_of(lay_out_pairs(PAIRS, 32)).answers
    ones = jnp.ones(answers.labels_BA.shape)
    assert float(sum_by_answer(ones, answers).sum()) == sum(len(a) for pair in PAIRS for a in pair.answers)


def test_a_margin_is_asked_for_beside_the_difference():
    batch = random_preferences()
    margins = jnp.linspace(-1.0, 2.0, batch.margins_BP.size).reshape(batch.margins_BP.shape)
    found = dpo(LM, sigmoid, 0.5)(PARAMS, batch.replace(margins_BP=margins), KEY).losses["preference"]
    ratios = sums(LM, PARAMS, batch.answers) - batch.reference_BS
    wanted = -jax.nn.log_sigmoid(0.5 * (ratios[:, 0::2] - ratios[:, 1::2]) - margins)
    assert float(found.sum) == pytest.approx(float(jnp.sum(batch.weights_BP * wanted)), rel=1e-5)


def test_a_target_of_nothing_is_the_pair_turned_round():
    rows = lay_out_pairs(PAIRS, 32, alone=True)
    swapped = lay_out_pairs([replace(pair, answers=pair.answers[::-1]) for pair in PAIRS], 32, alone=True)
    held = lively(PARAMS, seed=2)
    one, other = (batch_of(with_reference(made, LM, held)) for made in (rows, swapped))
    objective = dpo(LM, sigmoid, 0.3, sft=0.2)
    ours = objective(PARAMS, one.replace(targets_BP=jnp.zeros_like(one.targets_BP)), KEY)
    theirs = objective(PARAMS, other, KEY)
    chex.assert_trees_all_close(ours.losses, theirs.losses, rtol=1e-5)
    for name in ("accuracy", "margin", "nll/chosen"):
        chex.assert_trees_all_close(ours.metrics[name], theirs.metrics[name], rtol=1e-4, atol=1e-5)


def test_the_sft_term_by_hand():
    batch = random_preferences()
    sums_BS, weights = sums(LM, PARAMS, batch.answers), batch.weights_BP
    terms = dpo(LM, sigmoid, 0.3, sft=0.7, tail=0.2)(PARAMS, batch, KEY)
    # A mean over all tokens of preferred answers, whatever the tail weighs elsewhere.
    wanted = -jnp.sum(weights * sums_BS[:, 0::2]), jnp.sum(weights * answer_lengths(batch.answers)[:, 0::2])
    chex.assert_trees_all_close(tuple(jax.tree.leaves(terms.losses["sft"])), wanted, rtol=1e-5)
    assert terms.scales["sft"] == 0.7
