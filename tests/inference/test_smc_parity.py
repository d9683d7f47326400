"""Resampling beside blackjax and particles, whole runs beside genlm-control. Skipped where these are not installed."""

import asyncio
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.inference.resampling import multinomial, residual, stratified, systematic
from lmlab.inference.smc import FeynmanKac, run, standard

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual}
SHARES = np.asarray([0.36, 0.23, 0.17, 0.11, 0.08, 0.05], np.float32)
"""Sorted, as ours are before they are drawn from: the spread of counts depends on the order."""
COUNT, DRAWS = 7, 4000


def offspring(places):
    """How often each candidate was drawn: [draws, C]."""
    return np.stack([np.bincount(one, minlength=len(SHARES)) for one in np.asarray(places)])


@pytest.fixture(scope="module")
def ours():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw = lambda scheme: jax.jit(jax.vmap(lambda key: scheme(key, jnp.asarray(SHARES), COUNT)))(keys)
    return {name: offspring(draw(scheme)) for name, scheme in SCHEMES.items()}


def same_moments(a, b):
    """Means and covariances of counts agree within four standard errors of both."""
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / DRAWS)
    assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 4 * error + 1e-6)
    products = lambda x: ((x - COUNT * SHARES)[:, :, None] * (x - COUNT * SHARES)[:, None]).reshape(DRAWS, -1)
    left, right = products(a), products(b)
    spread = np.sqrt((left.var(axis=0) + right.var(axis=0)) / DRAWS)
    assert np.all(np.abs(left.mean(axis=0) - right.mean(axis=0)) <= 4 * spread + 1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_offspring_has_the_moments_of_blackjax(name, ours):
    theirs = pytest.importorskip("blackjax.smc.resampling")
    with jax.numpy_rank_promotion("allow"):
        keys = jax.random.split(jax.random.key(1), DRAWS)
        draw = jax.jit(jax.vmap(lambda key: getattr(theirs, name)(key, jnp.asarray(SHARES), COUNT)))
        same_moments(ours[name], offspring(draw(keys)))


@pytest.mark.parametrize("name", SCHEMES)
def test_offspring_has_the_moments_of_particles(name, ours):
    theirs = pytest.importorskip("particles.resampling")
    np.random.seed(2)
    shares = SHARES.astype(float) / SHARES.sum(dtype=float)
    same_moments(ours[name], offspring([getattr(theirs, name)(shares, COUNT) for _ in range(DRAWS)]))


FIRST = np.log([0.4, 0.3, 0.2, 0.1])
NEXT = np.log([[0.1, 0.6, 0.2, 0.1], [0.4, 0.1, 0.2, 0.3], [0.3, 0.3, 0.2, 0.2]])
END, LONGEST = 3, 4
"""A chain over three symbols and an end; texts have fewer than LONGEST symbols before it."""


def log_row(text):
    return NEXT[text[-1]] if text else FIRST


def log_judgement(text):
    """The critic: no symbol twice in a row; every symbol 1 is liked."""
    if any(a == b for a, b in pairwise(text)):
        return -np.inf
    return 0.7 * sum(symbol == 1 for symbol in text)


def enumerate_posterior():
    """Exact weight of every text."""
    weights = {}
    for length in range(LONGEST):
        for text in product(range(3), repeat=length):
            logs = sum(log_row(text[:i])[symbol] for i, symbol in enumerate(text)) + log_row(text)[END]
            weights[text] = np.exp(logs + log_judgement(text))
    return weights


def chain():
    """The same as a Feynman-Kac model: its state is the last symbol, how many there are, and a number of the text."""
    start = END + 1
    table = jnp.asarray(np.vstack([NEXT, FIRST, FIRST]))

    def propose(params, key, state, children):
        last_P, count_P, _ = state
        rows_PV = table[last_P]
        keys_PK = jax.random.split(key, (len(last_P), children))
        draw = jax.vmap(jax.vmap(jax.random.categorical, in_axes=(0, None)))
        # A text that is full is ended, with the weight of its end: texts are those of fewer than LONGEST symbols.
        full_P1 = (count_P == LONGEST - 1)[:, None]
        token_PK = jnp.where(full_P1, END, draw(keys_PK, rows_PV))
        gain_PK = jnp.where(full_P1, rows_PV[:, END:], 0.0) + 0.7 * (token_PK == 1)
        return token_PK, jnp.where(token_PK == last_P[:, None], -jnp.inf, gain_PK)

    def commit(params, state, token_PK, parent_P, child_P, moving_P):
        last_P, count_P, code_P = take(state, parent_P)
        token_P = token_PK[parent_P, child_P]
        symbol_P = moving_P & (token_P != END)
        code_P = jnp.where(symbol_P, 4 * code_P + token_P + 1, code_P)
        return jnp.where(moving_P, token_P, last_P), count_P + symbol_P, code_P

    take = lambda state, rows_N: jax.tree.map(lambda x_P: x_P[rows_N], state)
    begin = lambda count: (jnp.full(count, start), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32))
    return FeynmanKac(propose, commit, done=lambda state: state[0] == END, take=take), begin


def code_of(text):
    """The number that `chain` gives a text."""
    return sum((symbol + 1) * 4**i for i, symbol in enumerate(reversed(text)))


RUNS, PARTICLES = 200, 20


def within_errors(estimates, exact):
    """Unbiased estimates have this mean."""
    estimates = np.asarray(estimates)
    assert abs(estimates.mean() - exact) <= 4 * estimates.std() / len(estimates) ** 0.5
    assert estimates.std() < 2 * exact  # and an estimate says something


def test_a_critic_means_what_it_means_to_genlm_control():
    exact = enumerate_posterior()
    total, favourite = sum(exact.values()), max((text for text in exact if text), key=exact.get)
    model, begin = chain()
    runs = jax.jit(jax.vmap(lambda key: run(model, standard(), {}, begin(PARTICLES), key, LONGEST)))(
        jax.random.split(jax.random.key(3), RUNS)
    )
    weights_RP = np.exp(runs.log_weight_P)
    within_errors(weights_RP.mean(axis=1), total)
    within_errors((weights_RP * (runs.state[2] == code_of(favourite))).mean(axis=1), exact[favourite])
    theirs = run_genlm_control()
    within_errors([np.exp(one.log_ml) for one in theirs], total)
    label = tuple(b"abc"[symbol : symbol + 1] for symbol in favourite)
    found = [
        np.exp(one.log_ml) * sum(p for text, p in one.posterior.items() if tuple(text[:-1]) == label) for one in theirs
    ]
    within_errors(found, exact[favourite])


def run_genlm_control():
    """Their sampler of the chain, with the critic."""
    control = pytest.importorskip("genlm.control")
    from genlm.control.sampler.token import DirectTokenSampler

    text_of = lambda context: tuple(b"abc".index(symbol) for symbol in context)

    class Chain(control.Potential):
        async def prefix(self, context):
            text = text_of(context)
            return float(sum(log_row(text[:i])[symbol] for i, symbol in enumerate(text)))

        async def complete(self, context):
            return await self.prefix(context) + float(log_row(text_of(context))[END])

        async def logw_next(self, context):
            return self.make_lazy_weights(np.asarray(log_row(text_of(context))))

    class Critic(control.Potential):
        async def prefix(self, context):
            return log_judgement(text_of(context))

        complete = prefix

    letters = [b"a", b"b", b"c"]

    async def all_runs():
        sampler = DirectTokenSampler(Chain(letters))
        settings = {"n_particles": PARTICLES, "ess_threshold": 0.5, "max_tokens": LONGEST}
        return [await sampler.smc(**settings, critic=Critic(letters)) for _ in range(RUNS)]

    np.random.seed(4)
    return asyncio.run(all_runs())
