"""Speculation leaves the target's distribution as it is: by enumeration of the rule, and by samples of the whole."""

import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.speculative import (
    Model,
    acceptance,
    append,
    begin,
    block_acceptance,
    keep_block,
    residual,
    speculate,
)
from lmlab.testing.tiny import all_sequences, lively, sequence_logprobs, tiny_lm

KEY = jax.random.key(11)


def model(seed, **changes):
    lm = tiny_lm(vocab_size=3, max_length=16, **changes)
    return Model(lm, lively(lm.init(jax.random.key(seed)), seed=seed))


TARGET, DRAFT = model(3), model(4, layers=1)


def ids(*tokens):
    return np.asarray(tokens, np.int32)


def all_next_probs(model):
    """p(. | prefix) of every sequence of 5 tokens at each of its places, [3^5, 5, V], by one pass."""
    hidden, _ = model.lm.apply(model.params, all_sequences(3, 5))
    return np.asarray(jax.nn.softmax(model.lm.logits(model.params, hidden)), np.float64)


NEXT = {id(model): all_next_probs(model) for model in (TARGET, DRAFT)}


def next_probs(model, prefix):
    # Sequences are in the order of their digits, so the first that begins with the prefix ends in zeros.
    row = sum(token * 3 ** (4 - i) for i, token in enumerate(prefix))
    return NEXT[id(model)][row, len(prefix) - 1]


def test_one_token_of_any_draft_is_the_targets_exactly():
    rng = np.random.default_rng(0)
    for zeros in (0, 1):
        target_NV, draft_NV = rng.dirichlet(np.ones(5), (2, 50))
        if zeros:  # filters leave zeros
            target_NV, draft_NV = target_NV * (target_NV > 0.1), draft_NV * (draft_NV > 0.1)
            target_NV, draft_NV = (x / x.sum(-1, keepdims=True) for x in (target_NV, draft_NV))
        kept_NV = draft_NV * np.asarray(acceptance(jnp.asarray(target_NV), jnp.asarray(draft_NV)))
        rest_NV = np.asarray(residual(jnp.asarray(target_NV), jnp.asarray(draft_NV)))
        whole_NV = kept_NV + (1 - kept_NV.sum(-1, keepdims=True)) * rest_NV
        np.testing.assert_allclose(whole_NV, target_NV, atol=2e-6)


def test_equal_models_reject_nothing_and_leave_no_nan():
    probs_NV = jnp.asarray([[0.2, 0.8, 0.0]])
    chex.assert_trees_all_equal(acceptance(probs_NV, probs_NV)[:, :2], jnp.ones((1, 2)))
    chex.assert_trees_all_equal(residual(probs_NV, probs_NV), probs_NV)


def test_a_round_of_two_tokens_ahead_gives_the_targets_sequences():
    # Every draft, every way that it can be cut, and whatever the target would say after it: exact, no samples.
    prompt, found = (1, 0), dict.fromkeys(itertools.product(range(3), repeat=3), 0.0)
    for draft in itertools.product(range(3), repeat=2):
        drafted = reached = 1.0
        for cut in range(3):
            prefix = prompt + draft[:cut]
            p = next_probs(TARGET, prefix)
            if cut == 2:
                following = p
                stay = 0.0
            else:
                q = next_probs(DRAFT, prefix)
                stay = float(acceptance(jnp.asarray(p), jnp.asarray(q))[draft[cut]])
                following = np.asarray(residual(jnp.asarray(p), jnp.asarray(q)))
            later = [next_probs(DRAFT, prompt + draft[:i])[draft[i]] for i in range(cut, 2)]
            weight = drafted * float(np.prod(later)) * reached * (1 - stay)
            for token in range(3):
                for rest in itertools.product(range(3), repeat=2 - cut):
                    whole = (*draft[:cut], token, *rest)
                    then = [next_probs(TARGET, prompt + whole[:i])[whole[i]] for i in range(cut + 1, 3)]
                    found[whole] += weight * following[token] * float(np.prod(then))
            reached *= stay
            if cut < 2:
                drafted *= next_probs(DRAFT, prefix)[draft[cut]]
    every = all_sequences(3, 3)
    exact = jnp.exp(
        sequence_logprobs(*TARGET, jnp.concatenate([jnp.tile(jnp.asarray([prompt], jnp.int32), (27, 1)), every], 1), 2)
    )
    np.testing.assert_allclose([found[tuple(row.tolist())] for row in every], exact, atol=1e-5)


@pytest.mark.parametrize(("ahead", "filters"), [(1, {}), (3, {}), (2, {"temperature": 0.7, "top_k": 2})])
def test_samples_follow_the_targets_distribution(ahead, filters):
    rows, config = 8192, SamplingConfig(max_new_tokens=3, **filters)
    drawn = speculate(TARGET, DRAFT, [ids(1, 0)] * rows, KEY, config, ahead=ahead)
    plain = sample(*TARGET, [ids(1, 0)] * rows, jax.random.key(5), config, rows=rows)
    number = lambda one: int(one.tokens @ np.asarray([9, 3, 1]))
    found, expected = (
        np.bincount([number(one) for one in samples], minlength=27) for samples in (drawn.samples, plain)
    )
    # Two samples of one distribution: chi-square of 26 degrees of freedom exceeds 60 once in 6000 times.
    both = found + expected
    assert np.sum(np.where(both > 0, (found - expected) ** 2 / np.maximum(both, 1), 0)) < 60
    assert 0 < drawn.accepted < 1


def test_logprobs_are_the_targets():
    one = speculate(TARGET, DRAFT, [ids(2)], KEY, SamplingConfig(max_new_tokens=9), ahead=4).samples[0]
    whole = jnp.asarray([[2, *one.tokens]])
    assert len(one.tokens) == 9
    np.testing.assert_allclose(one.logprobs.sum(), sequence_logprobs(*TARGET, whole, 1)[0], atol=1e-5)


def test_greedy_drafts_change_nothing():
    config = SamplingConfig(max_new_tokens=12, temperature=0)
    prompts = [ids(2), ids(0, 1, 1, 0), ids(1)]
    plain = sample(*TARGET, prompts, KEY, config)
    for ahead in (1, 5):
        drawn = speculate(TARGET, DRAFT, prompts, KEY, config, ahead=ahead).samples
        assert [one.tokens.tolist() for one in drawn] == [one.tokens.tolist() for one in plain]


def test_a_model_that_drafts_for_itself_is_always_right():
    drawn = speculate(TARGET, TARGET, [ids(1)], KEY, SamplingConfig(max_new_tokens=10), ahead=4)
    assert drawn.accepted > 0.99
    assert drawn.passes == 2


def test_ends_and_limits_are_kept():
    counting = Model(counting_lm(), {})
    prompts = [ids(50), ids(3)]
    drawn = speculate(counting, counting, prompts, KEY, SamplingConfig(max_new_tokens=20), end_ids=(END,)).samples
    assert drawn[0].tokens.tolist() == list(range(51, END))
    assert drawn[1].tokens.tolist() == list(range(4, 24))
    assert [one.ended for one in drawn] == [True, False]


def test_what_cannot_draft_is_refused():
    with pytest.raises(UserError, match="vocabulary"):
        speculate(TARGET, Model(counting_lm(), {}), [ids(1)], KEY, SamplingConfig())
    with pytest.raises(UserError, match="ahead"):
        speculate(TARGET, DRAFT, [ids(1)], KEY, SamplingConfig(), ahead=0)
    with pytest.raises(UserError, match="verify = 'blok': expected token or block"):
        speculate(TARGET, DRAFT, [ids(1)], KEY, SamplingConfig(), verify="blok")


def test_what_is_kept_is_counted_among_what_was_on_offer():
    begun = begin([ids(4, 5)] * 5, SamplingConfig(max_new_tokens=3), ahead=3, longest=12)
    # Row by row: cut by the limit; all kept up to an end; an end after two drafts; none kept; a row that was done.
    new = jnp.asarray([[6, 7, 8, 9], [6, 2, 7, 8], [6, 7, 2, 9], [6, 7, 8, 9], [6, 7, 8, 9]])
    count = jnp.asarray([3, 3, 2, 0, 3])
    state = replace(begun, done_B=jnp.asarray([False] * 4 + [True]))
    state = append(state, new, jnp.zeros((5, 4)), count, end_ids=(2,))
    assert (state.length_B - begun.length_B).tolist() == [3, 1, 2, 1, 0]
    assert int(state.offered) == 3 + 2 + 3 + 3
    assert int(state.kept) == 3 + 2 + 2 + 0


def test_block_verification_gives_the_target_exactly_and_keeps_more():
    # Every draft of two letters of three, every number of them kept, whatever the target says after that.
    keys = iter(jax.random.split(jax.random.key(0), 8))
    table = lambda *shape: np.asarray(jax.nn.softmax(2 * jax.random.normal(next(keys), shape)), np.float64)
    target, draft = [table(3), table(3, 3), table(3, 3, 3)], [table(3), table(3, 3)]
    found, joint = np.zeros((3, 3, 3)), target[0][:, None, None] * target[1][:, :, None] * target[2]
    kept = {"block": 0.0, "token": 0.0}
    for a, b in itertools.product(range(3), repeat=2):
        drafted = draft[0][a] * draft[1][a, b]
        q = np.stack([draft[0], draft[1][a]])
        p = np.stack([target[0], target[1][a], target[2][a, b]])
        chance, rest = block_acceptance(jnp.asarray([[a, b]]), jnp.asarray(q)[None], jnp.asarray(p)[None])
        chance, rest = np.asarray(chance[0], np.float64), np.asarray(rest[0] / rest[0].sum(-1, keepdims=True))
        two, one = chance[1], (1 - chance[1]) * chance[0]
        found[a, b] += drafted * two * rest[2]
        found[a] += drafted * one * rest[1][:, None] * target[2][a]
        found += drafted * (1 - two - one) * rest[0][:, None, None] * target[1][:, :, None] * target[2]
        first, second = (float(acceptance(jnp.asarray(p[i]), jnp.asarray(q[i]))[x]) for i, x in enumerate((a, b)))
        kept["block"] += drafted * (2 * two + one)
        kept["token"] += drafted * first * (1 + second)
    np.testing.assert_allclose(found, joint, atol=1e-6)
    assert kept["block"] > kept["token"] + 1e-3


def test_block_verification_follows_its_probabilities():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (1, 3, 3)))
    q = jax.nn.softmax(jax.random.normal(jax.random.key(2), (1, 2, 3)))
    drafted, rows = jnp.asarray([[2, 0]]), 20_000
    chance, rest = (np.asarray(x[0], np.float64) for x in block_acceptance(drafted, q, p))
    wide = lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:]))
    count, token = keep_block(jax.random.uniform(jax.random.key(3), (rows, 3)), wide(drafted), wide(q), wide(p))
    kept = [(1 - chance[0]) * (1 - chance[1]), chance[0] * (1 - chance[1]), chance[1]]
    expected = rows * np.asarray(kept)[:, None] * rest / rest.sum(axis=1, keepdims=True)
    counted = np.bincount(3 * np.asarray(count) + np.asarray(token), minlength=9).reshape(3, 3)
    some = expected > 0
    assert not counted[~some].any()
    # Chi-square of 8 degrees of freedom exceeds 30 once in 5000 times.
    assert np.sum((counted - expected)[some] ** 2 / expected[some]) < 30


def test_equal_models_keep_every_block():
    p = jax.nn.softmax(jax.random.normal(jax.random.key(1), (1, 3, 3)))
    chance, _ = block_acceptance(jnp.asarray([[2, 0]]), p[:, :2], p)
    assert float(chance[0, 1]) == pytest.approx(1)
