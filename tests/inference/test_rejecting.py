"""Weighted rejection: draws and weights are those of a mask, by enumeration and on average."""

from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.inference.programs import Program
from lmlab.inference.rejecting import accepted_token, weighted_rejection
from lmlab.inference.smc import standard
from lmlab.inference.texts import infer
from lmlab.testing.tiny import lively, tiny_lm

PROBABILITIES = np.asarray([0.35, 0.05, 0.3, 0.1, 0.2])
ALLOWED = [[1, 3], [0], [0, 2, 4], [0, 1, 2, 3, 4], []]


def estimate_of(order, allowed):
    """Token and mass by the definition, of tokens that are drawn in this order."""
    mass, left = 1.0, 1.0
    for place, token in enumerate(order):
        share = PROBABILITIES[token] / left
        if token in allowed:
            following = order[place + 1] if place + 1 < len(order) else None
            return token, mass * (1.0 if following in allowed else share)
        mass *= 1 - share
        left -= PROBABILITIES[token]
    return None, 0.0


def chance_of(order):
    """That tokens are drawn without replacement in this order."""
    left, chance = 1.0, 1.0
    for token in order:
        chance *= PROBABILITIES[token] / left
        left -= PROBABILITIES[token]
    return chance


@pytest.mark.parametrize("allowed", ALLOWED, ids=str)
def test_weighted_draws_are_those_of_the_mask(allowed):
    """Exactly for the definition, over all orders; then for the code, order by order and on average."""
    exact = np.zeros(5)
    for order in permutations(range(5)):
        token, mass = estimate_of(order, allowed)
        if token is not None:
            exact[token] += chance_of(order) * mass
    wanted = np.where(np.isin(np.arange(5), allowed), PROBABILITIES, 0)
    assert np.allclose(exact, wanted, atol=1e-12)
    table = jnp.isin(jnp.arange(5), jnp.asarray(allowed, jnp.int32))
    logits_V = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)) + 3
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens, logs = jax.jit(jax.vmap(lambda key: weighted_rejection(key, logits_V, lambda token: table[token])))(keys)
    masses = np.exp(np.asarray(logs, float))
    assert not np.isnan(masses).any()
    by_token = np.asarray([np.where(np.asarray(tokens) == v, masses, 0) for v in range(5)])
    errors = 4 * by_token.std(axis=1) / len(keys) ** 0.5 + 1e-6
    assert np.all(np.abs(by_token.mean(axis=1) - wanted) <= errors)
    noise = np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, (5,)))(keys[:50]))
    orders = np.argsort(-(np.log(PROBABILITIES) + noise))
    for i, order in enumerate(orders):
        token, mass = estimate_of(order, allowed)
        assert masses[i] == pytest.approx(mass, abs=1e-5)
        assert token is None or int(tokens[i]) == token


@pytest.mark.parametrize("gap", [10.0, 18.0, 40.0])
def test_the_mass_is_right_where_the_model_is_sure_of_what_is_refused(gap):
    logits_V = jnp.asarray([gap, 0.0, -1.0, -1.0])
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = lambda key: weighted_rejection(key, logits_V, lambda token: (token == 1) | (token == 2))
    masses = np.exp(np.asarray(jax.jit(jax.vmap(draw))(keys)[1], float))
    exact = np.exp(np.asarray(logits_V, float))
    wanted = exact[1:3].sum() / exact.sum()
    assert abs(masses.mean() - wanted) < 4 * masses.std() / len(keys) ** 0.5
    assert masses.min() > 0


def test_tokens_of_no_probability_are_never_asked_about():
    logits_V = jnp.asarray([-jnp.inf, 0.0, -jnp.inf, 0.0])
    token, log_mass = weighted_rejection(jax.random.key(0), logits_V, lambda token: (token == 0) | (token == 2))
    assert log_mass == -jnp.inf
    token, log_mass = weighted_rejection(jax.random.key(0), logits_V, lambda token: token != 0)
    assert int(token) in (1, 3)
    assert float(log_mass) == pytest.approx(0, abs=1e-6)


def test_a_program_by_questions_has_the_evidence_of_its_mask():
    lm = tiny_lm(vocab_size=4, max_length=16)
    params = lively(lm.init(jax.random.key(0)), seed=2)
    follows = jnp.asarray([[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]], bool)

    def asked(p, last):
        return accepted_token(p, lambda token: p.tables[last, token])

    def masked(p, last):
        p.observe(p.context.mask(p.tables[last]), True)
        return p.sample(p.context.next_token())

    prompt = np.asarray([1, 0], np.int32)

    def evidence(step, particles, seed):
        program = Program(step, jnp.int32(0), follows)
        settings = {"particles": particles, "tokens": 4}
        *_, found = infer(lm, params, program, [prompt], jax.random.key(seed), standard(), **settings)
        return float(found.log_evidence)

    # Both are unbiased; with this many particles they are near the same number, and far from that without weights, 0.
    assert evidence(asked, 512, 0) == pytest.approx(evidence(masked, 512, 1), abs=0.12)
    assert evidence(masked, 512, 1) < -0.5
