"""Distillation: alignment, the frozen teacher, layout and padding, and what the loss means, by enumeration."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.types import TopK
from lmlab.data.distillation import Example, distillation_of, lay_out_examples
from lmlab.distillation import predictions
from lmlab.objectives.distill import TEACHER, beside, distill, hard_labels
from lmlab.objectives.divergence import jensen_shannon, reverse_kl
from lmlab.objectives.logprobs import answer_logprobs
from lmlab.objectives.next_token import next_token
from lmlab.testing.tables import LMS
from lmlab.testing.tiny import all_sequences, lively, random_distillation, random_examples, tiny_lm
from lmlab.train.state import new_state
from lmlab.train.step import make_step, total_loss

MODEL = tiny_lm()
KEY = jax.random.key(0)
PARAMS = lively(MODEL.init(KEY))
BOTH = {**PARAMS, TEACHER: lively(PARAMS, seed=3)}
EXAMPLES = random_examples(9, seed=3, contexts=2)


def batch_of(rows, batch_size=0):
    return jax.tree.map(jnp.asarray, distillation_of(rows, range(rows.rows), batch_size or rows.rows))


def value(objective, params, batch):
    terms = jax.jit(objective)(params, batch, KEY)
    return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})


def sums(objective, params, batch):
    terms = jax.jit(objective)(params, batch, KEY)
    return terms.losses, terms.metrics


@pytest.mark.parametrize(("name", "shared"), [("llama", True), ("gpt2", False)])
def test_with_an_empty_context_a_copy_of_the_teacher_has_nothing_to_learn_at_any_token(name, shared):
    lm = LMS[name]()
    params = lively(lm.init(KEY))
    both = {**params, TEACHER: params}
    nothing = np.zeros(0, np.int32)
    same = [replace(x, context=nothing, scratchpad=nothing, student_context=nothing) for x in EXAMPLES]
    batch = batch_of(lay_out_examples(same, 24, 24, shared=shared, per_row=2))
    objective = distill(lm)
    one = lambda weights_BA: sums(objective, both, batch.replace(weights_BA=weights_BA))[0]["divergence"].sum
    places = jnp.eye(batch.weights_BA.size).reshape(-1, *batch.weights_BA.shape) * (batch.weights_BA != 0)[None]
    assert float(jnp.abs(jax.lax.map(jax.jit(one), places)).max()) < 1e-6
    slopes = jax.jit(jax.grad(partial(value, objective)))(both, batch)
    assert max(float(jnp.abs(slope).max()) for slope in jax.tree.leaves(slopes)) < 1e-5
    # Were the pairs of places off by one, this would show.
    moved = batch.student.replace(places_BA=jnp.maximum(batch.student.places_BA - 1, 0))
    assert float(value(objective, both, batch.replace(student=moved))) > 1e-2


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_contexts_read_once_a_row_and_copies_of_them_give_the_same(name):
    lm = LMS[name]()
    both = {**lively(lm.init(KEY)), TEACHER: lively(lm.init(KEY), seed=3)}
    objective = jax.jit(partial(sums, distill(lm, chunk=3)))
    shared = objective(both, batch_of(lay_out_examples(EXAMPLES, 24, 24)))
    for rows in (
        lay_out_examples(EXAMPLES, 30, 24, shared=False),
        lay_out_examples(EXAMPLES, 24, 24, per_row=1),
        lay_out_examples(list(reversed(EXAMPLES)), 32, 16),
    ):
        chex.assert_trees_all_close(objective(both, batch_of(rows, rows.rows + 2)), shared, rtol=2e-5, atol=1e-5)


def test_positions_go_on_from_the_context_in_every_example_of_a_row():
    batch = batch_of(lay_out_examples(EXAMPLES, 24, 24))
    objective = distill(MODEL)
    places = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), batch.teacher.tokens_BT.shape)
    wrong = batch.replace(teacher=batch.teacher.replace(positions_BT=places))
    assert abs(float(value(objective, BOTH, batch) - value(objective, BOTH, wrong))) > 1e-3


def test_one_example_by_hand():
    example = Example("one", *(np.asarray(x, np.int32) for x in ([5, 1], [2, 3], [4, 0, 6], [1], [0])), 2.0)
    batch = batch_of(lay_out_examples([example], 24, 24))
    told = sums(distill(MODEL, reverse_kl), BOTH, batch)
    logits = lambda params, *tokens: MODEL.logits(params, MODEL.apply(params, jnp.asarray([tokens]))[0])[0, -4:-1]
    logq = jax.nn.log_softmax(logits(BOTH[TEACHER], 5, 1, 2, 3, 1, 4, 0, 6))
    logp = jax.nn.log_softmax(logits(PARAMS, 0, 2, 3, 4, 0, 6))
    assert float(told[0]["divergence"].weight) == 6
    assert float(told[0]["divergence"].sum) == pytest.approx(2 * float(reverse_kl(logq, logp).sum()), rel=1e-4)
    nll = -float(logp[jnp.arange(3), jnp.asarray([4, 0, 6])].sum())
    assert float(told[1]["nll"].sum) == pytest.approx(2 * nll, rel=1e-4)


def test_microbatches_change_nothing_and_what_the_teacher_says_stands_still():
    batch, tx = random_distillation(), optax.sgd(0.02)
    step = jax.jit(make_step(distill(MODEL, chunk=3), tx, microbatches=2))
    told = lambda params: MODEL.apply(params[TEACHER], batch.teacher.tokens_BT)[0]
    state, before = new_state(BOTH, tx, KEY, still=(TEACHER,)), told(BOTH)
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(told(state.params), before)
    moved = {name: part for name, part in state.params.items() if name != TEACHER}
    plain = new_state(BOTH, tx, KEY, still=(TEACHER,))
    once = jax.jit(make_step(distill(MODEL, chunk=100), tx))
    for _ in range(5):
        plain, _ = once(plain, batch)
    chex.assert_trees_all_close(moved, {k: v for k, v in plain.params.items() if k != TEACHER}, atol=1e-5, rtol=1e-5)


def test_a_teacher_of_another_shape_teaches_what_the_same_predictions_stored_do():
    other = LMS["gpt2"]()
    both = {**PARAMS, TEACHER: lively(other.init(KEY))}
    batch = random_distillation()
    objective = distill(MODEL, jensen_shannon(0.3), teacher=beside(other), temperature=2.0)
    stored = predictions(other, 7, 2.0, both[TEACHER], batch.teacher)
    one = jax.value_and_grad(partial(value, objective))(both, batch)
    two = jax.value_and_grad(partial(value, objective))(PARAMS, batch.replace(teacher=None, stored=stored))
    one[1].pop(TEACHER)
    chex.assert_trees_all_close(one, two, atol=1e-5, rtol=1e-4)


SYMBOLS = 3


def table_lm():
    """A student that knows nothing but a table: of the first answer token, and of the second given the first.

    Its rows are [input, y1, y2]; tokens 0 to 2 are symbols, 3 is the input.
    """

    def apply(params, tokens_BT, **options):
        del params, options
        first = jnp.pad(tokens_BT, ((0, 0), (0, 1)))[:, :-1] == SYMBOLS
        state_BT = jnp.where(first, SYMBOLS, tokens_BT)
        return jax.nn.one_hot(state_BT, SYMBOLS + 1), None

    logits = lambda head, hidden: hidden @ head["table"]
    return replace(
        MODEL, apply=apply, logits=logits, head=lambda params: {"table": params["table"]}, vocab_size=SYMBOLS,
        axes={"table": (None, None)}, init=lambda key: {"table": jax.random.normal(key, (SYMBOLS + 1, SYMBOLS))},
    )  # fmt: skip


class Worlds:
    """A teacher's scratch-pads z (4 of them) and answers of two symbols after them: probabilities by enumeration."""

    rng = np.random.default_rng(0)
    pads = rng.dirichlet(np.ones(4))
    first = rng.dirichlet(np.ones(SYMBOLS), 4)
    second = rng.dirichlet(np.ones(SYMBOLS), (4, SYMBOLS))


def world_batch(pads):
    """Every answer after every one of these scratch-pads, weighed by its probability, and the teacher's predictions."""
    answers = np.asarray(all_sequences(SYMBOLS, 2))
    weight = lambda z, y: (
        Worlds.pads[z] * Worlds.first[z, y[0]] * Worlds.second[z, y[0], y[1]] / Worlds.pads[pads].sum()
    )
    examples = [Example(f"{z} {y}", np.asarray([0]), np.asarray([SYMBOLS]), y, weight=float(weight(z, y)))
                for z in pads for y in answers]  # fmt: skip
    batch = batch_of(lay_out_examples(examples, 8, 8, per_row=1))
    q = np.stack([[Worlds.first[z], Worlds.second[z, y[0]]] for z in pads for y in answers])
    ids = np.argsort(-q, axis=-1)
    logprobs = np.log(np.take_along_axis(q, ids, -1))
    logprobs = np.concatenate([logprobs, np.full_like(logprobs[..., :1], np.log(1e-9))], -1)
    pad = lambda x: jnp.asarray(np.pad(x, ((0, 0), (0, 6), (0, 0))))
    return batch.replace(teacher=None, stored=TopK(pad(logprobs).astype(jnp.float32), pad(ids).astype(jnp.int32)))


def test_hard_labels_over_all_answers_are_the_soft_divergence_and_the_teachers_entropy():
    lm, batch = table_lm(), world_batch([1])
    params = lm.init(KEY)
    hard = lambda params: -jnp.sum(batch.weights_BA * answer_logprobs(lm, params, batch.student))
    terms = distill(lm)(params, batch, KEY)
    soft = lambda params: distill(lm)(params, batch, KEY).losses["divergence"].sum
    entropy = float(terms.metrics["teacher_entropy"].sum)
    q = Worlds.first[1][:, None] * Worlds.second[1]
    assert entropy == pytest.approx(-(q * np.log(q)).sum(), rel=1e-5)
    assert float(hard(params)) == pytest.approx(float(soft(params)) + entropy, rel=1e-5)
    chex.assert_trees_all_close(jax.grad(hard)(params), jax.grad(soft)(params), atol=1e-6)


def test_the_student_arrives_at_the_teachers_marginal_over_scratchpads():
    lm, batch = table_lm(), world_batch([0, 1, 2, 3])
    joint = np.einsum("z,za,zab->ab", Worlds.pads, Worlds.first, Worlds.second)
    marginal = {"table": jnp.asarray(np.log(np.concatenate([joint / joint.sum(1, keepdims=True), [joint.sum(1)]])))}
    loss = lambda params: distill(lm)(params, batch, KEY).losses["divergence"].sum
    slopes = jax.grad(loss)(jax.tree.map(jnp.float32, marginal))
    assert float(jnp.abs(slopes["table"]).max()) < 1e-6

    tx = optax.adam(0.1)
    params = lm.init(KEY)

    def one(carry, _):
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    params = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), length=1500)[0][0])(params)
    np.testing.assert_allclose(jax.nn.softmax(params["table"]), jnp.exp(marginal["table"]), atol=1e-4)


def test_hard_labels_are_the_answers_of_the_students_rows():
    batch = random_distillation()
    tokens = hard_labels(batch)
    weighed = batch.replace(weights_BA=(batch.weights_BA != 0).astype(jnp.float32))
    terms = next_token(MODEL)(PARAMS, tokens, KEY)
    mine = distill(MODEL)(BOTH, weighed, KEY)
    assert float(terms.losses["next_token"].weight) == float(weighed.weights_BA.sum())
    assert float(terms.metrics["nll"].sum) == pytest.approx(float(mine.metrics["nll"].sum), rel=1e-5)


def test_examples_of_no_weight_teach_nothing():
    batch = random_distillation()
    batch = batch.replace(weights_BA=jnp.zeros_like(batch.weights_BA))
    found, slopes = jax.value_and_grad(partial(value, distill(MODEL)))(BOTH, batch)
    assert float(found) == 0
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_mixed_contexts_are_the_weighted_sum_of_each():
    whole = sums(distill(MODEL), BOTH, batch_of(lay_out_examples(EXAMPLES, 24, 24)))[0]["divergence"]
    parts = [sums(distill(MODEL), BOTH, batch_of(lay_out_examples(EXAMPLES[i::2], 24, 24)))[0]["divergence"]
             for i in (0, 1)]  # fmt: skip
    chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)
