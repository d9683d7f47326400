"""Distributions of programs: they draw what they say, also where something cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference.distributions import Bernoulli, Categorical, Context, Geometric, normalised, safe_log

LOGITS = jnp.asarray([1.0, -jnp.inf, 0.0, 2.5])
SHARES = np.exp([1, -np.inf, 0, 2.5]) / np.exp([1, -np.inf, 0, 2.5]).sum()
ALLOWED = jnp.asarray([True, True, False, False])


def masked(value):
    """The token after a mask was observed, or sampled."""
    context = Context(normalised(LOGITS))
    context.mask(ALLOWED).take(value)
    return context.next_token()


CASES = {
    "categorical": (lambda: Categorical(LOGITS), SHARES),
    "bernoulli": (lambda: Bernoulli(0.3), [0.7, 0.3]),
    "never": (lambda: Bernoulli(0.0), [1, 0]),
    "geometric": (lambda: Geometric(0.4), [0, *(0.4 * 0.6 ** np.arange(40))]),
    "once": (lambda: Geometric(1.0), [0, 1, 0, 0]),
    "next_token": (lambda: Context(normalised(LOGITS)).next_token(), SHARES),
    "mask": (lambda: Context(normalised(LOGITS)).mask(ALLOWED), [SHARES[2:].sum(), SHARES[:2].sum()]),
    "shorter_mask": (lambda: Context(normalised(LOGITS)).mask(ALLOWED[:3]), [SHARES[2:].sum(), SHARES[:2].sum()]),
    "all": (lambda: Context(normalised(LOGITS)).mask(jnp.ones(4, bool)), [0, 1]),
    "allowed": (lambda: masked(True), [1, 0, 0, 0]),
    "forbidden": (lambda: masked(False), [0, 0, SHARES[2] / SHARES[2:].sum(), SHARES[3] / SHARES[2:].sum()]),
    "mask_of_what_is_left": (lambda: masked(False).context.mask(jnp.arange(4) == 2), [
        SHARES[3] / SHARES[2:].sum(), SHARES[2] / SHARES[2:].sum()]),
}  # fmt: skip
"""A distribution, and the probabilities of 0, 1, ..."""


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_probabilities_that_are_said(name):
    make, expected = CASES[name]
    expected, draws = np.asarray(expected, np.float64), 20_000

    @jax.jit
    def both(keys):
        one = make()
        logs = jnp.stack([one.log_prob(value) for value in jnp.arange(len(expected))])
        return logs, jax.vmap(one.draw)(keys)

    logs, drawn = both(jax.random.split(jax.random.key(0), draws))
    assert not np.isnan(logs).any()
    np.testing.assert_allclose(np.exp(logs), expected, rtol=1e-5, atol=1e-6)
    found = np.bincount(np.asarray(drawn, int), minlength=len(expected))[: len(expected)] / draws
    assert not found[expected == 0].any()
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) < 4 * error + 2 / draws).all()


def test_where_nothing_can_be_nothing_is_nan():
    nowhere = Categorical(jnp.full(4, -jnp.inf))
    assert 0 <= int(nowhere.draw(jax.random.key(0))) < 4
    assert float(nowhere.log_prob(2)) == -np.inf
    context = Context(normalised(LOGITS))
    context.mask(jnp.zeros(4, bool)).take(True)
    assert 0 <= int(context.next_token().draw(jax.random.key(0))) < 4
    assert float(context.next_token().log_prob(3)) == -np.inf
    assert float(context.mask(ALLOWED).log_prob(True)) == -np.inf
    np.testing.assert_array_equal(normalised(jnp.full(3, -jnp.inf)), np.full(3, -np.inf))
    np.testing.assert_array_equal(safe_log(jnp.asarray([-1.0, 0.0, 1.0])), [-np.inf, -np.inf, 0])
    assert float(Geometric(0.5).log_prob(0)) == -np.inf
    assert float(Geometric(0.5).log_prob(-3)) == -np.inf


def test_a_context_takes_one_token_a_step():
    context = Context(normalised(LOGITS))
    context.next_token().take(3)
    assert int(context.token) == 3
    with pytest.raises(UserError, match="one token a step"):
        context.next_token().take(0)
