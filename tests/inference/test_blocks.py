"""Rounds of several steps: blocks of any length, and a guess at what follows them, leave the target as it is."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigrams import (
    BIGRAMS,
    END,
    LONGEST,
    NO_TWIST,
    SYMBOLS,
    TEXTS,
    errors,
    random_tables,
    starting,
    tables,
    text_weights,
    true_twists,
    weight_of,
)

from lmlab.core.errors import UserError
from lmlab.inference.blocks import blocks, in_blocks
from lmlab.inference.programs import Program
from lmlab.inference.resampling import systematic
from lmlab.inference.smc import run, standard, steering
from lmlab.inference.texts import infer, program_model
from lmlab.testing.tiny import lively, tiny_lm

TABLES = random_tables()
PLAIN = replace(TABLES, log_twist_TV=NO_TWIST)
WEIGHTS = np.asarray([weight_of(TABLES, text) for text in TEXTS])
RUNS, STEERING, STANDARD = 2000, steering(3), standard(systematic, 1.0)


def last(chains):
    at = jnp.maximum(chains.length_P - 1, 0)
    return chains.tokens_PT[jnp.arange(len(at)), at]


def after_one(chains):
    """Blocks end with symbol 1: they are of 1 to 4 symbols."""
    return last(chains) == 1


def guess(tables, chains):
    """A potential that means nothing, unlike the twist of the tables."""
    return jnp.sin(7.0 * last(chains) + chains.length_P + tables.log_p_TUV[0, 0, 0])


def ahead(tables, chains):
    """The log of the mass that the next symbol's potential leaves."""
    next_PV = (tables.log_p_TUV + tables.log_potential_TUV)[jnp.minimum(chains.length_P, LONGEST - 1), last(chains)]
    return jax.nn.logsumexp(jnp.maximum(next_PV, -30.0), axis=-1)


MODELS = {
    "unequal": in_blocks(BIGRAMS, after_one, LONGEST),
    "steps": in_blocks(BIGRAMS),
    "cut": in_blocks(BIGRAMS, after_one, 2),
    "guess": in_blocks(BIGRAMS, after_one, LONGEST, guess),
    "ahead": in_blocks(BIGRAMS, potential=ahead),
}


@cache
def many(name, driver=STEERING, particles=3):
    """`many(...)(tables, key)`: all runs of a model in blocks."""
    one = lambda tables, key: run(
        MODELS[name], driver, tables, blocks(starting(particles), particles), key, LONGEST
    )  # fmt: skip
    return jax.jit(lambda tables, key: jax.vmap(one, (None, 0))(tables, jax.random.split(key, RUNS)))


def drawn(name, proposal, key=0, **changes):
    found = many(name, **changes)(proposal, jax.random.key(key))
    chains = found.state.inner
    return found, text_weights(chains.tokens_PT, chains.length_P, found.log_weight_P)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_leave_the_posterior_as_it_is(name):
    for i, proposal in enumerate((PLAIN, TABLES, replace(TABLES, ahead=jnp.asarray(True)))):
        found, share_RX = drawn(name, proposal, i)
        assert abs(errors(share_RX.sum(axis=1), WEIGHTS.sum())) < 3
        assert np.abs(errors(share_RX, WEIGHTS)[(share_RX > 0).mean(axis=0) > 0.05]).max() < 4
        assert not share_RX[:, WEIGHTS == 0].any()
        if name == "steps":
            assert int(found.rounds.max()) == LONGEST
        if name == "unequal":  # The text 0001 is one block, and 1111 four.
            assert set(found.rounds.tolist()) >= {1, 2, 3}


def test_standard_resampling_between_blocks_is_unbiased_too():
    _, share_RX = drawn("guess", TABLES, 5, driver=STANDARD)
    assert abs(errors(share_RX.sum(axis=1), WEIGHTS.sum())) < 3
    assert np.abs(errors(share_RX, WEIGHTS)[(share_RX > 0).mean(axis=0) > 0.05]).max() < 4


def test_a_round_ends_at_a_boundary_and_weighs_what_the_block_does():
    model = MODELS["unequal"]
    moves, gain_PK = model.propose(PLAIN, jax.random.key(1), blocks(starting(6), 6), 5)
    chains = moves.inner
    lengths = set()
    for row, (tokens, length) in enumerate(zip(chains.tokens_PT.tolist(), chains.length_P.tolist(), strict=True)):
        text, gain = tokens[:length], float(gain_PK.reshape(-1)[row])
        lengths.add(length)
        potentials = np.asarray(TABLES.log_potential_TUV)[range(length), [0, *text[:-1]], text]
        if gain > -np.inf:
            np.testing.assert_allclose(gain, potentials.sum(), rtol=1e-4)
            assert text.index(1) == length - 1 if 1 in text else text[-1] == END or length == LONGEST
    assert lengths >= {1, 2, 3}


def test_a_look_ahead_sees_a_dead_end_before_it_is_chosen():
    # After 0 nothing is possible, after 1 everything is; with the look ahead nobody who goes on stands at 0.
    p = np.broadcast_to(np.asarray([0.5, 0.5, 0.0]), (LONGEST, SYMBOLS, SYMBOLS))
    possible = np.ones_like(p)
    possible[1:, 0] = 0
    dead_end = tables(p, possible)
    plain, _ = drawn("steps", dead_end, particles=3)
    looked, share_RX = drawn("ahead", dead_end, particles=3)
    # 1, 1, 1 and then either: an eighth.
    assert abs(errors(share_RX.sum(axis=1), 1 / 8)) < 3
    alive = lambda found: (np.asarray(found.log_weight_P) > -np.inf).mean()
    assert alive(looked) > alive(plain) + 0.1
    assert np.exp(looked.log_evidence).var() < 0.7 * np.exp(plain.log_evidence).var()


def test_a_twist_of_the_steps_is_carried_through_blocks():
    exact = replace(PLAIN, log_twist_TV=true_twists(PLAIN), ahead=jnp.asarray(True))
    found, _ = drawn("unequal", exact)
    np.testing.assert_allclose(np.exp(found.log_evidence), WEIGHTS.sum(), rtol=1e-5)


def test_particles_that_wait_at_a_boundary_keep_what_the_model_says():
    lm = tiny_lm(max_length=16)
    params, prompt = lively(lm.init(jax.random.key(0)), seed=3), np.asarray([1, 0, 5], np.int32)

    def step(p, state):
        token = p.sample(p.context.next_token())
        p.score(p.tables[token])
        p.finish(token == 6)
        return token

    program = Program(step, jnp.int32(0), jnp.asarray([0.0, 1.0, -1.0, 0.5, -0.5, 0.0, -2.0]), boundary=lambda t: t < 3)
    whole = jax.jit(lambda params, whole_PT: lm.logits(params, lm.apply(params, whole_PT)[0]))
    compared, waited = 0, 0
    for found in infer(lm, params, program, [prompt], jax.random.key(0), steering(2), particles=6, tokens=8, stride=1):
        texts = found.state.inner
        length_P = np.asarray(texts.length_P)
        going_P = np.asarray((found.log_weight_P > -jnp.inf) & ~texts.finished_P)
        logits_PTV = whole(params, jnp.concatenate([jnp.tile(prompt, (6, 1)), texts.tokens_PS], axis=1))
        expected_PV = np.asarray(logits_PTV)[np.arange(6), len(prompt) + length_P - 1]
        np.testing.assert_allclose(np.asarray(texts.logits_PMV)[going_P, 0], expected_PV[going_P], atol=1e-4)
        compared += going_P.sum()
        waited += len(set(length_P[going_P].tolist())) > 1
    assert compared > 8
    assert waited > 1


def test_a_model_whose_particles_cannot_wait_is_refused():
    step = lambda p, state: p.sample(p.context.next_token())
    alone = program_model(tiny_lm(), Program(step, jnp.int32(0)))
    with pytest.raises(UserError, match="cannot wait"):
        in_blocks(alone)
    in_blocks(program_model(tiny_lm(), Program(step, jnp.int32(0), boundary=lambda state: state == 1)))
