"""Sequential Monte Carlo on texts that can all be written down: unbiased whatever drives it, exact where it can be."""

from dataclasses import replace
from functools import cache

import chex
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
    log_twists,
    random_tables,
    starting,
    tables,
    text_weights,
    true_twists,
    weight_of,
)

from lmlab.core.errors import UserError
from lmlab.inference.resampling import log_total, multinomial, residual, stratified, systematic
from lmlab.inference.smc import FeynmanKac, advance, concluded, only, population, run, standard, steering

SCHEMES = (multinomial, stratified, systematic, residual)
DRIVERS = {
    **{f"steering_{n}_{k}": (steering(k), n) for n in (1, 2, 5) for k in (1, 3)},
    **{f"{scheme.__name__}_{threshold}_{n}": (standard(scheme, threshold), n)
       for scheme in SCHEMES for threshold, n in ((0.5, 5), (1.0, 2))},
    "stratified_1.0_5": (standard(stratified, 1.0), 5),
    "stratified_0.5_1": (standard(stratified, 0.5), 1),
    "never_5": (standard(threshold=0), 5),
    **{f"{scheme.__name__}_1.0_{n}": (standard(scheme, 1.0), n)
       for scheme in SCHEMES for n in (1, 5) if (scheme, n) != (stratified, 5)},
}  # fmt: skip
"""Which choice among the children, and how many particles."""
RUNS = 2000
TABLES = random_tables()
PROPOSALS = {
    "plain": replace(TABLES, log_twist_TV=NO_TWIST),
    "ahead": replace(TABLES, log_twist_TV=NO_TWIST, ahead=jnp.asarray(True)),
    "twisted": TABLES,
    "twisted_ahead": replace(TABLES, ahead=jnp.asarray(True)),
    "exact": replace(TABLES, log_twist_TV=true_twists(TABLES), ahead=jnp.asarray(True)),
}
WEIGHTS = np.asarray([weight_of(TABLES, text) for text in TEXTS])
Z = WEIGHTS.sum()


@cache
def many(name, runs=RUNS):
    """`many(name)(tables, key)`: all runs of a driver, one compilation for all tables."""
    driver, particles = DRIVERS[name]
    one = lambda tables, key: run(BIGRAMS, driver, tables, starting(particles), key, LONGEST)
    return jax.jit(lambda tables, key: jax.vmap(one, (None, 0))(tables, jax.random.split(key, runs)))


@cache
def drawn(name, proposal):
    """The runs, and of each how much of the mean weight each of TEXTS has."""
    key = jax.random.key(10 * list(DRIVERS).index(name) + list(PROPOSALS).index(proposal))
    found = many(name)(PROPOSALS[proposal], key)
    return found, text_weights(found.state.tokens_PT, found.state.length_P, found.log_weight_P)


@pytest.mark.parametrize("name", DRIVERS)
def test_the_mean_weight_is_unbiased_and_so_is_every_texts(name):
    for proposal in PROPOSALS:
        found, share_RX = drawn(name, proposal)
        np.testing.assert_allclose(np.exp(found.log_evidence), share_RX.sum(axis=1), rtol=1e-4, atol=1e-7)
        assert abs(errors(share_RX.sum(axis=1), Z)) < 3, proposal
        # Texts of a letter, of two, ...; those with a symbol 1 first; and each for itself, where it is not too rare.
        features_XH = np.stack(
            [*([len(text) == n for text in TEXTS] for n in range(1, LONGEST + 1)), [text[0] == 1 for text in TEXTS]], 1
        )
        assert np.abs(errors(share_RX @ features_XH, WEIGHTS @ features_XH)).max() < 3.5, proposal
        often_X = (share_RX > 0).mean(axis=0) > 0.05
        assert often_X.sum() >= 3
        assert np.abs(errors(share_RX, WEIGHTS)[often_X]).max() < 4.5, proposal  # of 900 such numbers
        assert not share_RX[:, WEIGHTS == 0].any()


@pytest.mark.parametrize("name", ["steering_2_3", "steering_5_3", "systematic_0.5_5"])
def test_ten_thousand_runs_have_no_bias(name):
    found = np.exp(many(name, 10_000)(PROPOSALS["ahead"], jax.random.key(99)).log_evidence)
    assert abs(errors(found, Z)) < 3
    assert 3 * found.std() / len(found) ** 0.5 < 0.03 * Z  # a bias of so much would be seen


@pytest.mark.parametrize("name", ["steering_5_3", "systematic_0.5_5", "systematic_1.0_2"])
def test_no_choice_changes_the_sum_of_weights_and_children_are_those_of_their_parents(name):
    found, _ = drawn(name, "twisted")
    history = jax.tree.map(np.asarray, found.history)
    before_RT, after_RT = (
        log_total(history.child_weight_TPK.reshape(RUNS, LONGEST, -1)),
        log_total(history.log_weight_TP),
    )
    made_RT = np.arange(LONGEST) < np.asarray(found.rounds)[:, None]
    np.testing.assert_allclose(np.where(made_RT, before_RT, 0), np.where(made_RT, after_RT, 0), atol=1e-5)
    # Some were drawn anew and some were not, so that both ways are seen.
    moved_R = (history.parent_TP != np.arange(history.parent_TP.shape[2])).any(axis=(1, 2))
    assert 0.1 < moved_R.mean() < (1 if name.endswith("5") else 1.01)
    # Whoever is there now has the tokens of its line of ancestors.
    for row in range(0, RUNS, 40):
        for particle in np.flatnonzero(np.asarray(found.log_weight_P[row]) > -np.inf):
            tokens, at = [], particle
            for t in reversed(range(int(found.rounds[row]))):
                child, parent = history.child_TP[row, t, at], history.parent_TP[row, t, at]
                tokens, at = [int(history.moves_TPK[row, t, parent, child]), *tokens], parent
            tokens = tokens[: tokens.index(END) + 1] if END in tokens else tokens
            length = int(found.state.length_P[row, particle])
            assert np.asarray(found.state.tokens_PT[row, particle, :length]).tolist() == tokens


@pytest.mark.parametrize("name", DRIVERS)
def test_the_true_future_as_a_twist_leaves_no_variance(name):
    found, _ = drawn(name, "exact")
    np.testing.assert_allclose(np.exp(found.log_evidence), Z, rtol=1e-5)


@pytest.mark.parametrize("name", ["steering_5_3", "systematic_0.5_5"])
def test_a_constant_potential_is_a_power_whatever_is_drawn(name):
    endless = np.broadcast_to(np.asarray([0.3, 0.7, 0.0]), (LONGEST, SYMBOLS, SYMBOLS))
    found = many(name)(tables(endless, np.full_like(endless, 0.6)), jax.random.key(0))
    np.testing.assert_allclose(found.log_evidence, LONGEST * np.log(0.6), rtol=1e-5)


def test_masked_decoding_forgets_what_the_mask_cost():
    # After a comes a with .1, after b with .9, and the second has to be a; the third ends the text.
    p = np.zeros((LONGEST, SYMBOLS, SYMBOLS))
    p[0, :, :2], p[1, 0], p[1, 1], p[2:, :, END] = 0.5, (0.1, 0.9, 0), (0.9, 0.1, 0), 1
    second = np.ones_like(p)
    second[1] = (1, 0, 0)
    for name in ("steering_1_1", "steering_5_1", "steering_5_3", "systematic_1.0_2"):
        found = many(name)(tables(p, second, ahead=True), jax.random.key(3))
        first_RP, weight_RP = np.asarray(found.state.tokens_PT[:, :, 0]), np.exp(found.log_weight_P)
        assert (np.asarray(found.state.tokens_PT[:, :, 1]) == 0).all()
        if name in ("steering_1_1", "steering_5_1"):  # Nobody was drawn anew.
            np.testing.assert_allclose(weight_RP, np.where(first_RP == 0, 0.1, 0.9), rtol=1e-5)
            # What masked decoding gives: every text counts as one.
            assert (first_RP == 0).mean() == pytest.approx(0.5, abs=0.04)
        mean_R, a_R = weight_RP.mean(axis=1), (weight_RP * (first_RP == 0)).mean(axis=1)
        assert abs(errors(mean_R, 0.5)) < 3
        assert abs(errors(a_R, 0.05)) < 3
        assert a_R.sum() / mean_R.sum() == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("name", ["steering_5_3", "systematic_0.5_5", "never_5"])
def test_where_all_are_dead_the_round_is_told_and_nothing_is_nan(name):
    potential = np.ones((LONGEST, SYMBOLS, SYMBOLS))
    potential[2] = 0
    endless = np.broadcast_to(np.asarray([0.3, 0.7, 0.0]), potential.shape)
    for ahead in (False, True):
        found = many(name)(tables(endless, potential, TABLES.log_twist_TV, ahead), jax.random.key(0))
        assert (found.rounds == 3).all()
        assert found.done_P.all()
        assert (found.log_evidence == -jnp.inf).all()
        np.testing.assert_array_equal(found.probabilities, np.zeros((RUNS, 5)))
        chex.assert_tree_all_finite(replace(found, log_weight_P=0.0, history=()))
        assert not np.isnan(found.history.log_weight_TP).any()
        np.testing.assert_array_equal(found.history.effective_T[:, 2:], 0)


def test_a_twist_that_nobody_is_chosen_by_changes_nothing():
    key = jax.random.key(9)
    twisted, plain = (many("never_5")(PROPOSALS[name], key) for name in ("twisted", "plain"))
    chex.assert_trees_all_equal(twisted.state.tokens_PT, plain.state.tokens_PT)
    np.testing.assert_allclose(twisted.log_weight_P, plain.log_weight_P, atol=1e-5)
    # And those that were cut short in the middle have it taken back.
    begun = population(BIGRAMS, standard(threshold=0), TABLES, starting(5), LONGEST)
    lent = advance(BIGRAMS, standard(threshold=0), TABLES, begun, key, 1)
    own, twist_TV = concluded(BIGRAMS, lent), log_twists(TABLES, jnp.zeros(5, jnp.int32))
    alive_P = np.asarray(lent.log_weight_P > -jnp.inf)
    going_P = alive_P & ~np.asarray(lent.done_P)
    expected = twist_TV[jnp.arange(5), lent.state.tokens_PT[:, 0]]
    assert going_P.any()
    np.testing.assert_allclose((lent.log_weight_P - own.log_weight_P)[going_P], expected[going_P], rtol=1e-4)


def test_rounds_in_several_calls_are_those_of_one_and_are_compiled_once():
    traced = []
    model = replace(BIGRAMS, propose=lambda *args: (traced.append(1), BIGRAMS.propose(*args))[1])
    driver, key = steering(3), jax.random.key(4)
    begin = lambda: population(model, driver, TABLES, starting(5), LONGEST)
    whole = advance(model, driver, TABLES, begin(), key, LONGEST)
    before, parts, done = len(traced), begin(), set()
    for until in (1, 2, 3, LONGEST + 9):
        parts = advance(model, driver, TABLES, parts, key, until)
        done.add(int(parts.done_P.sum()))
    chex.assert_trees_all_equal(parts, whole)
    # However many have finished, and whatever the potentials.
    assert len(done) > 1
    for seed in range(3):
        advance(model, driver, random_tables(seed), begin(), jax.random.key(seed), 2)
    assert len(traced) == before


def test_particles_in_another_order_end_as_they_would_have():
    # Each draws with a key of its own, which moves with it.
    def walk(params, key, state, children):
        del params, key
        keys_PK = jax.vmap(lambda key: jax.random.split(key, children))(state["key"])
        move_PK = state["x"][:, None] + jax.vmap(jax.vmap(jax.random.normal))(keys_PK)
        return {"x": move_PK, "key": keys_PK}, -jnp.square(move_PK) / 8

    def go(params, state, moves, parent_P, child_P, moving_P):
        del params, moving_P
        return jax.tree.map(lambda x_PK: x_PK[parent_P, child_P], moves)

    take = lambda state, rows_N: jax.tree.map(lambda x_P: x_P[rows_N], state)
    model = FeynmanKac(walk, go, done=lambda state: state["x"] > 2.5, take=take)
    keys, order = jax.random.split(jax.random.key(0), 6), jnp.asarray([3, 5, 0, 1, 4, 2])
    for driver in (steering(3), standard(systematic, 0.8)):
        ends = [
            run(model, driver, (), take({"x": jnp.zeros(6), "key": keys}, rows_N), jax.random.key(1), 5)
            for rows_N in (jnp.arange(6), order)
        ]
        one, other = (sorted(zip(end.log_weight_P.tolist(), end.state["x"].tolist(), strict=True)) for end in ends)
        np.testing.assert_allclose(one, other, rtol=1e-5)
        assert len({x for _, x in one}) > 2


def test_standard_draws_anew_below_its_threshold_only():
    log_weight_N = jnp.log(jnp.asarray([4.0, 1.0, 1.0, 1.0]))  # An effective size of 49 / 19 = 2.58 of 4.
    # Independent draws, since systematic ones of equal weights are the particles themselves.
    chosen = lambda threshold, log_weight_N: standard(multinomial, threshold).select(jax.random.key(0), log_weight_N, 4)
    for threshold, poor in ((0.0, False), (0.5, False), (0.64, False), (0.65, True), (1.0, True)):
        found = chosen(threshold, log_weight_N)
        expected = np.full(4, np.log(7 / 4)) if poor else log_weight_N
        np.testing.assert_allclose(found.log_weight_N, expected, rtol=1e-6)
    # Equal weights are left alone, however small they are; so are the dead.
    for same in (0.0, -777.5, -jnp.inf):
        found = chosen(1.0, jnp.full(4, same))
        np.testing.assert_array_equal(found.index_N, np.arange(4))
        np.testing.assert_array_equal(found.log_weight_N, np.full(4, same))


def test_a_part_of_the_particles_and_their_shares():
    found = run(BIGRAMS, steering(3), PROPOSALS["plain"], starting(5), jax.random.key(2), LONGEST)
    some = only(found, found.state.ended_P)
    np.testing.assert_allclose(some.probabilities.sum(), 1, rtol=1e-6)
    assert ((some.log_weight_P > -jnp.inf) == (found.state.ended_P & (found.log_weight_P > -jnp.inf))).all()
    assert 0 < int(found.state.ended_P.sum()) < 5


def test_bad_numbers_are_refused():
    with pytest.raises(UserError, match="children = 0: expected at least 1"):
        steering(0)
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="threshold"):
            standard(threshold=threshold)
