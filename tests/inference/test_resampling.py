"""Who goes on, and at what weight: every scheme against its definition, over all uniform numbers that it may draw."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.inference.resampling import (
    at_home,
    effective_size,
    log_total,
    multinomial,
    optimal,
    resampled,
    residual,
    shares,
    stratified,
    systematic,
    threshold,
)

SCHEMES = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual}
GRID = (jnp.arange(10_000) + 0.5) / 10_000
RNG = np.random.default_rng(0)
WEIGHTS = {
    "worked": [5, 3, 1, 1, 0, 0],
    "ties": [1, 1, 1, 1, 1, 1],
    "ties_at_the_threshold": [2, 2, 1, 1, 1, 1],
    "one_hot": [0, 0, 3, 0, 0, 0],
    "few_alive": [0, 2, 0, 0.5, 0, 0],
    "zeros": [3, 0, 1, 0, 2, 1.5],
    "dominated": [1e-6, 1, 2e-6, 1e-7, 3e-6, 0],
    "random": RNG.exponential(size=6),
    "spread": np.exp(3 * RNG.normal(size=6)),
    "dead": [0, 0, 0, 0, 0, 0],
    "tiny": 1e-30 * RNG.exponential(size=6),
}  # fmt: skip
"""Of six candidates, three of whom go on (of fewer: all). Not normalised."""


def logs(weights):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(np.asarray(weights, np.float64)), jnp.float32)


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(choose)`: what a choice gives in every case of WEIGHTS, for every uniform number of a fine grid."""
    # The key stands for the numbers that it would give.
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(): jnp.broadcast_to(key, shape))

    def draw(choose):
        grid = jax.jit(jax.vmap(jax.vmap(choose, (0, None)), (None, 0)))
        index_WGN, log_weight_WGN = map(np.asarray, grid(GRID, logs(list(WEIGHTS.values()))))
        weight_WGN = np.exp(log_weight_WGN.astype(np.float64))
        return zip(WEIGHTS, np.asarray(list(WEIGHTS.values()), float), index_WGN, weight_WGN, strict=True)

    return draw


def chances(weights, count):
    """min(1, c share) by bisection of its definition, in float64."""
    share = weights / max(weights.sum(), 1e-99)
    if np.sum(share > 0) <= count:
        return (share > 0).astype(float)
    low, high = 0.0, count / share[share > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if np.minimum(1, middle * share).sum() > count else (middle, high)
    return np.minimum(1, high * share)


def scales(weights_RC, count):
    """How many are kept for certain, and c."""
    kept, log_scale = jax.vmap(partial(threshold, count=count))(logs(weights_RC))
    return np.asarray(kept), np.exp(np.asarray(log_scale, np.float64))


@pytest.mark.parametrize(("candidates", "count"), [(4, 2), (15, 5), (60, 20), (6, 5), (9, 1)])
def test_the_threshold_leaves_as_many_as_there_are_places(candidates, count):
    weights_RC = np.exp(np.linspace(0.01, 4, 400)[:, None] * RNG.normal(size=(400, candidates)))
    kept, scale = scales(weights_RC, count)
    scaled_RC = scale[:, None] * weights_RC / weights_RC.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.minimum(1, scaled_RC).sum(axis=1), count, rtol=1e-6)
    assert ((scaled_RC > 1 + 1e-5).sum(axis=1) <= kept).all()
    assert ((scaled_RC > 1 - 1e-5).sum(axis=1) >= kept).all()
    assert len(np.unique(kept)) > min(count, 6) // 2


def test_the_threshold_is_the_number_of_places_where_no_share_fills_one():
    weights_RC = RNG.uniform(0.5, 0.9, (50, 12))  # Of 5: shares below 0.9 / (12 * 0.5) < 1 / 5.
    kept, scale = scales(weights_RC, 5)
    np.testing.assert_allclose(scale, 5, rtol=1e-6)
    assert not kept.any()


@pytest.mark.parametrize(
    ("weights", "count", "scale"),
    [
        ((0.5, 0.3, 0.1, 0.1), 2, 2),  # c_0 v_0 = 1 is not below 1, c_1 v_1 = .6 is
        ((1, 1, 1, 1), 3, 3),
        ((2, 1, 1), 2, 2),
        ((8, 1, 1), 2, 5),
        ((0, 0, 4), 2, np.inf),
        ((0, 3, 1), 2, np.inf),
        ((0, 0, 0), 2, np.inf),
    ],
)  # fmt: skip
def test_thresholds_by_hand(weights, count, scale):
    _, log_scale = threshold(logs(weights), count)
    np.testing.assert_allclose(np.exp(log_scale), scale, rtol=1e-6)


def test_optimal_resampling_over_all_uniform_numbers(drawn):
    count = 3
    for case, weights, index_GN, weight_GN in drawn(partial(optimal, count=count)):
        total, expected = weights.sum(), chances(weights, count)
        # Weight is conserved for every number, not on average; float32 writes the log of 1e-30 to a part in 1e5.
        np.testing.assert_allclose(weight_GN.sum(axis=1), total, rtol=1e-5, err_msg=case)
        some_GN = weight_GN > 0
        assert (some_GN.sum(axis=1) == min(count, np.sum(weights > 0))).all(), case
        assert (weights[index_GN[some_GN]] > 0).all(), case
        number_GC = np.stack([((index_GN == j) & some_GN).sum(axis=1) for j in range(6)], axis=1)
        assert number_GC.max() <= 1, case
        np.testing.assert_allclose(number_GC.mean(axis=0), expected, atol=2e-4, err_msg=case)
        after_C = [np.sum(weight_GN * (index_GN == j)) / len(GRID) for j in range(6)]
        np.testing.assert_allclose(after_C, weights, atol=1e-4 * total, err_msg=case)
        # Those kept for certain keep their weight.
        sure_GN = some_GN & (expected[index_GN] > 1 - 1e-9)
        np.testing.assert_allclose(weight_GN[sure_GN], weights[index_GN[sure_GN]], rtol=1e-5, err_msg=case)


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_choose_by_weight_in_expectation(name, drawn):
    for case, weights, index_GN, weight_GN in drawn(partial(resampled, SCHEMES[name])):
        np.testing.assert_allclose(weight_GN, weights.mean(), rtol=1e-5, err_msg=case)
        number_GC = (index_GN[:, :, None] == np.arange(6)).sum(axis=1)
        assert (number_GC.sum(axis=1) == 6).all(), case
        if case == "dead":
            continue
        expected_C = 6 * weights / weights.sum()
        # All numbers of one draw are the same point of the grid here, so each of them runs over all of it.
        np.testing.assert_allclose(number_GC.mean(axis=0), expected_C, atol=1e-3, err_msg=case)
        assert not number_GC[:, weights == 0].any(), case
        # Shares whose product with 6 is a whole number may be written as a little less or more.
        if name in ("systematic", "residual"):
            assert (number_GC >= np.floor(expected_C - 1e-5)).all(), case
        if name == "systematic":
            assert (number_GC <= np.ceil(expected_C + 1e-5)).all(), case


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_draw_places_apart_from_each_other(name):
    weights = np.asarray(WEIGHTS["random"], np.float64)
    keys = jax.random.split(jax.random.key(1), 20_000)
    index_GN = np.asarray(jax.jit(jax.vmap(lambda key: resampled(SCHEMES[name], key, logs(weights)).index_N))(keys))
    number_GC = (index_GN[:, :, None] == np.arange(6)).sum(axis=1)
    share_C = weights / weights.sum()
    expected_C, independent_C = 6 * share_C, 6 * share_C * (1 - share_C)
    spread_C = number_GC.var(axis=0)
    error_C = np.sqrt(np.maximum(spread_C, 1e-9) / len(keys))
    assert (np.abs(number_GC.mean(axis=0) - expected_C) < 4 * error_C + 1e-6).all()
    # The variance of independent draws, or less of those that are spread out.
    if name == "multinomial":
        np.testing.assert_allclose(spread_C, independent_C, rtol=0.04, atol=3e-3)
    else:
        assert spread_C.sum() < 0.6 * independent_C.sum()


def test_shares_and_sizes_of_populations_side_by_side():
    total_P, share_PN, size_P = jax.jit(lambda x: (log_total(x), shares(x), effective_size(x)))(
        jnp.concatenate([logs([[1, 3, 0], [0, 0, 0], [2, 2, 2]]), jnp.asarray([[-1e4, -1e4, -2e4]])])
    )
    np.testing.assert_allclose(np.exp(total_P), [4, 0, 6, 0], rtol=1e-6)
    np.testing.assert_allclose(total_P[3], np.log(2) - 1e4, rtol=1e-7)
    np.testing.assert_allclose(share_PN, [[0.25, 0.75, 0], [0, 0, 0], [1 / 3] * 3, [0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(size_P, [1.6, 0, 3, 2], rtol=1e-6)


@pytest.mark.parametrize("choose", [partial(optimal, count=3), *(partial(resampled, one) for one in SCHEMES.values())])
def test_candidates_in_another_order_are_chosen_alike(choose):
    log_weight_C, order_C = logs(WEIGHTS["spread"]), RNG.permutation(6)
    choose = jax.jit(choose)
    for key in jax.random.split(jax.random.key(2), 20):
        one, other = choose(key, log_weight_C), choose(key, log_weight_C[order_C])
        np.testing.assert_array_equal(order_C[other.index_N], one.index_N)
        np.testing.assert_allclose(other.log_weight_N, one.log_weight_N, rtol=1e-5)


def test_many_candidates_lose_nothing_to_rounding():
    count, choose = 4000, jax.jit(optimal, static_argnums=2)
    log_weight_C = jnp.asarray(RNG.normal(size=3 * count), jnp.float32).at[::7].set(-jnp.inf)
    for key in jax.random.split(jax.random.key(3), 5):
        index_N, log_weight_N = map(np.asarray, choose(key, log_weight_C, count))
        assert len(set(index_N.tolist())) == count
        assert (log_weight_N > -np.inf).all()
        assert (np.asarray(log_weight_C)[index_N] > -np.inf).all()
        np.testing.assert_allclose(log_total(log_weight_N), log_total(log_weight_C), atol=1e-4)


def test_children_take_the_places_of_their_parents():
    placed = jax.jit(at_home, static_argnums=1)
    for _ in range(30):
        parent_N = RNG.integers(0, 7, 7)
        order_N = np.asarray(placed(jnp.asarray(parent_N), 7))
        assert sorted(order_N) == list(range(7))
        home_N = parent_N[order_N]
        assert all(home_N[p] == p for p in set(parent_N.tolist()))
