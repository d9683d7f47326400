"""Particles as rows of a cache: what they hold is what a fresh pass says, however the rounds are made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference.programs import Program
from lmlab.inference.smc import standard, steering
from lmlab.inference.texts import infer, program_model
from lmlab.testing.tables import CACHES, LMS
from lmlab.testing.tiny import lively

END, TOKENS, KEY = 6, 6, jax.random.key(2)
PROMPT = np.asarray([3, 1, 4, 1], np.int32)
SCORES = jnp.asarray([0.0, -2.0, 1.0, -1.0, 0.5, -0.5, -2.0])


def scored(p, state):
    """Each token multiplies the weight; the third or a later one may end the text."""
    token = p.sample(p.context.next_token())
    p.score(p.tables[token])
    p.finish((token == END) & (p.length > 1))
    return state


def model(name):
    lm = LMS[name]()
    return lm, lively(lm.init(jax.random.key(1)), seed=1)


@pytest.mark.parametrize("name", CACHES)
def test_logits_of_particles_are_those_of_a_fresh_pass_over_their_texts(name):
    lm, params = model(name)
    program = Program(scored, tables=SCORES)
    *_, found = infer(lm, params, program, [PROMPT], KEY, steering(2), particles=6, tokens=TOKENS)
    # Some had two children that went on and some had none.
    assert any(len(set(row.tolist())) < 6 for row in np.asarray(found.history.parent_TP[1:]))
    going_P = np.asarray((found.log_weight_P > -jnp.inf) & ~found.state.finished_P)
    assert going_P.sum() >= 2
    assert (found.state.length_P[going_P] == TOKENS).all()
    assert len(set(map(tuple, found.state.tokens_PS[going_P].tolist()))) >= 2
    whole_PT = jnp.concatenate([jnp.tile(PROMPT, (6, 1)), found.state.tokens_PS], axis=1)
    whole = jax.jit(lambda params, whole_PT: lm.logits(params, lm.apply(params, whole_PT)[0][:, -1]))
    expected_PV = whole(params, whole_PT)
    np.testing.assert_allclose(found.state.logits_PMV[going_P, 0], expected_PV[going_P], atol=1e-4)


def test_rounds_in_several_calls_are_those_of_one_and_are_compiled_once():
    traced = []
    step = lambda p, state: (traced.append(1), scored(p, state))[1]
    (lm, params), program = model("llama"), Program(step, tables=SCORES.at[END].set(2.0))

    def go(key, stride=0):
        sizes = {"particles": 4, "tokens": TOKENS, "stride": stride}
        return infer(lm, params, program, [PROMPT], key, steering(3), **sizes)

    *_, whole = go(KEY)
    before = len(traced)
    for stride in (1, 4):
        rounds = []
        for part in go(KEY, stride):
            rounds.append(int(part.rounds))
        made = int(whole.rounds)
        assert rounds == [*range(stride, made, stride), made]
        jax.tree.map(np.testing.assert_array_equal, part, whole)
    finished = {int(last.state.finished_P.sum()) for seed in range(8) for last in go(jax.random.key(seed))}
    # Siblings, and particles that are still alike, draw for themselves.
    first_PK = np.asarray(whole.history.moves_TPK[0])
    assert any(len(set(row.tolist())) > 1 for row in first_PK)
    assert any(len(set(row.tolist())) > 1 for row in first_PK.T)
    # However many have finished.
    assert len(finished) > 2
    assert len(traced) == before


def test_bad_input_is_refused():
    lm, params = model("llama")

    one, two = Program(scored), Program(scored, contexts=2)

    def refused(match, program=one, prompts=(PROMPT,), **changes):
        changes = {"particles": 2, "tokens": 3, **changes}
        with pytest.raises(UserError, match=match):
            next(infer(lm, params, program, prompts, KEY, steering(2), **changes))

    refused("particles = 0: expected at least 1", particles=0)
    refused("tokens = 0: expected at least 1", tokens=0)
    refused("prompts = 2: expected 1, one for each context", prompts=[PROMPT, PROMPT])
    refused("prompts = 1: expected 2, one for each context", program=two)
    refused("30 tokens and 3 to be written'?: expected at most model.max_length = 32", prompts=[np.zeros(30, np.int32)])
    refused("30 tokens and 3", program=two, prompts=[PROMPT, np.zeros(30, np.int32)])
    refused("less than model.max_length", prompts=[np.zeros(32, np.int32)])
    refused("token ids from 0 to 6", prompts=[np.asarray([7], np.int32)])
    refused("at least one token each", prompts=[np.zeros(0, np.int32)])
    for wrong in ({"contexts": 0}, {"temperature": 0.0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Program(scored, **wrong)
    twice = Program(lambda p, state: [p.sample(p.context.next_token()) for _ in range(2)] and state)
    with pytest.raises(UserError, match="one token a step"):
        next(infer(lm, params, twice, [PROMPT], KEY, steering(2), particles=2, tokens=3))
    wrong = {
        "state = 'float32": Program(lambda p, n: n + 0.5 * p.sample(p.context.next_token()), jnp.int32(0)),
        "state = 'int32": Program(lambda p, n: p.sample(p.context.next_token()), jnp.asarray(False)),
        "one like Program.start": Program(lambda p, n: (p.sample(p.context.next_token()), n), jnp.int32(0)),
        "step = 'no token'": Program(lambda p, state: p.finish() or state),
        "mask = 'int32": Program(lambda p, state: p.observe(p.context.mask(jnp.arange(3)), True) or state),
        "mask = 'bool": Program(lambda p, state: p.observe(p.context.mask(jnp.ones(9, bool)), True) or state),
    }
    for message, program in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            next(infer(lm, params, program, [PROMPT], KEY, steering(2), particles=2, tokens=3))


@pytest.mark.parametrize("driver", [steering(2), standard(threshold=1.0)], ids=["steering", "standard"])
def test_a_weight_that_is_no_number_is_seen_in_the_evidence(driver):
    def step(p, state):
        token = p.sample(p.context.next_token())
        p.score(jnp.where((token == 4) & (p.length == 1), jnp.nan, 0.0))
        return state

    lm, params = model("llama")
    *_, found = infer(lm, params, Program(step), [PROMPT], KEY, driver, particles=8, tokens=4)
    assert (found.history.moves_TPK[1] == 4).any()
    assert jnp.isnan(found.log_evidence)


def test_particles_are_taken_in_any_order():
    lm, params = model("llama")
    program = Program(lambda p, state: p.sample(p.context.next_token()), jnp.int32(0))
    *_, found = infer(lm, params, program, [PROMPT], KEY, standard(threshold=0), particles=4, tokens=3)
    take = program_model(lm.for_decoding(params)[0], program).take
    turned = jax.jit(take)(found.state, jnp.asarray([3, 0, 1, 1]))
    # Rows change places with one another, so nothing can have been copied over what was still to be read.
    np.testing.assert_array_equal(turned.tokens_PS, found.state.tokens_PS[np.asarray([3, 0, 1, 1])])
    np.testing.assert_array_equal(turned.cache.keys[0], found.state.cache.keys[0][np.asarray([3, 0, 1, 1])])
