"""A Feynman-Kac model by hand, without a language model: tables of what follows what, and all of its texts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmlab.core.types import Array
from lmlab.inference.distributions import draw_token
from lmlab.inference.smc import FeynmanKac

SYMBOLS, END, LONGEST = 3, 2, 4
TEXTS = [
    text
    for length in range(1, LONGEST + 1)
    for text in itertools.product(range(SYMBOLS), repeat=length)
    if END not in text[:-1] and (text[-1] == END or length == LONGEST)
]
"""Every text: it ends with END, or after LONGEST symbols."""


@struct.dataclass
class Chains:
    """P partial texts."""

    tokens_PT: Array
    length_P: Array
    ended_P: Array
    log_twist_P: Array


@struct.dataclass
class Tables:
    """What a text is about; of place t, after symbol u, the symbol v. Symbol 0 stands before the first."""

    log_p_TUV: Array
    log_potential_TUV: Array
    log_twist_TV: Array
    """A guess at the future of a text that has v at place t."""
    ahead: Array
    """Whether the proposal knows the potential and the twist of what it proposes."""


def starting(particles):
    count = jnp.zeros(particles, jnp.int32)
    return Chains(jnp.zeros((particles, LONGEST), jnp.int32), count, count > 0, jnp.zeros(particles))


def last(chains):
    at = jnp.maximum(chains.length_P - 1, 0)
    return jnp.where(chains.length_P > 0, chains.tokens_PT[jnp.arange(len(at)), at], 0)


def log_twists(tables, place_P):
    """[P, V]: none of a text that ends."""
    return jnp.where(jnp.arange(SYMBOLS) == END, 0, tables.log_twist_TV[place_P])


def propose(tables, key, chains, children):
    place_P = jnp.minimum(chains.length_P, LONGEST - 1)
    log_p_PV, log_g_PV = (x[place_P, last(chains)] for x in (tables.log_p_TUV, tables.log_potential_TUV))
    target_PV = log_p_PV + log_g_PV + log_twists(tables, place_P)
    log_q_PV = jax.nn.log_softmax(jnp.where(tables.ahead, target_PV, log_p_PV))
    keys_PK = jax.random.split(key, (len(place_P), children))
    token_PK = jax.vmap(jax.vmap(draw_token, (0, None)))(keys_PK, log_q_PV)
    gain_PV = jnp.where(target_PV > -jnp.inf, target_PV - log_q_PV - chains.log_twist_P[:, None], -jnp.inf)
    twist_PK, gain_PK = (jnp.take_along_axis(x_PV, token_PK, axis=1) for x_PV in (log_twists(tables, place_P), gain_PV))
    return (token_PK, twist_PK), gain_PK


def commit(tables, chains, moves, parent_P, child_P, moving_P):
    del tables
    old = take(chains, parent_P)
    token_P, twist_P = (x_PK[parent_P, child_P] for x_PK in moves)
    at = jnp.arange(len(parent_P)), jnp.where(moving_P, old.length_P, LONGEST)
    return Chains(
        old.tokens_PT.at[at].set(token_P, mode="drop"), old.length_P + moving_P,
        old.ended_P | (moving_P & (token_P == END)), jnp.where(moving_P, twist_P, old.log_twist_P),
    )  # fmt: skip


def take(chains, rows_N):
    return jax.tree.map(lambda x_P: x_P[rows_N], chains)


BIGRAMS = FeynmanKac(
    propose, commit, done=lambda chains: chains.ended_P | (chains.length_P >= LONGEST), take=take,
    twist=lambda chains: chains.log_twist_P, record=lambda moves: moves[0],
)  # fmt: skip


def random_tables(seed=0):
    """Potentials around 1, some of them 0, and twists that mean nothing."""
    rng = np.random.default_rng(seed)
    shape = LONGEST, SYMBOLS, SYMBOLS
    potential = np.exp(0.6 * rng.normal(size=shape)) * (rng.uniform(size=shape) > 0.15)
    return tables(rng.dirichlet([4, 4, 2], shape[:2]), potential, 0.7 * rng.normal(size=shape[:2]))


NO_TWIST = jnp.zeros((LONGEST, SYMBOLS))


def tables(p_TUV, potential_TUV, log_twist_TV=NO_TWIST, ahead=False):
    with np.errstate(divide="ignore"):
        logs = [jnp.asarray(np.log(x), jnp.float32) for x in (p_TUV, potential_TUV)]
    return Tables(*logs, jnp.asarray(log_twist_TV, jnp.float32), jnp.asarray(ahead))


def weight_of(tables, text):
    """p(text) times its potentials."""
    steps = zip(range(LONGEST), (0, *text), text, strict=False)
    log_p_TUV, log_g_TUV = np.asarray(tables.log_p_TUV, float), np.asarray(tables.log_potential_TUV, float)
    return float(np.exp(sum(log_p_TUV[step] + log_g_TUV[step] for step in steps)))


def true_twists(tables):
    """log of the mean over futures of their potentials, [T, V]."""
    step_TUV = np.exp(np.asarray(tables.log_p_TUV, float) + np.asarray(tables.log_potential_TUV, float))
    value_TV = np.ones((LONGEST, SYMBOLS))
    for t in reversed(range(LONGEST - 1)):
        after_V = np.where(np.arange(SYMBOLS) == END, 1, value_TV[t + 1])
        value_TV[t] = step_TUV[t + 1] @ after_V
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(value_TV), jnp.float32)


def text_weights(tokens_RPT, length_RP, log_weight_RP):
    """Of R populations: the part of the mean weight that each of TEXTS has, [R, X]."""
    number = lambda text: sum((symbol + 1) * (SYMBOLS + 1) ** t for t, symbol in enumerate(text))
    place = {number(text): i for i, text in enumerate(TEXTS)}
    weight_RP = np.exp(np.asarray(log_weight_RP, np.float64)) / np.shape(log_weight_RP)[1]
    digits_RPT = np.where(np.arange(LONGEST) < np.asarray(length_RP)[..., None], np.asarray(tokens_RPT) + 1, 0)
    number_RP = digits_RPT @ (SYMBOLS + 1) ** np.arange(LONGEST)
    sums_RX = np.zeros((len(weight_RP), len(TEXTS)))
    for row, particle in zip(*np.nonzero(weight_RP), strict=True):
        sums_RX[row, place[number_RP[row, particle]]] += weight_RP[row, particle]
    return sums_RX


def errors(samples_R, expected):
    """By how many standard errors the mean is off, of each column."""
    error = samples_R.std(axis=0) / len(samples_R) ** 0.5
    return (samples_R.mean(axis=0) - expected) / np.maximum(error, 1e-7)
