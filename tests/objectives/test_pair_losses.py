"""Losses of pairs: by hand, at their optimum, against finite differences, and at the ends of float32."""

import json
import math
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.objectives import pair_losses as pl
from lmlab.objectives.pair_losses import PairScores, after, per_token

LOSSES = {
    "sigmoid": pl.sigmoid,
    "conservative": partial(pl.sigmoid, smoothing=0.2),
    "robust": partial(pl.robust, flips=0.2),
    "ipo": after(per_token, pl.ipo),
    "ipo_sums": pl.ipo,
    "hinge": pl.hinge,
    "exo_pair": partial(pl.exo_pair, smoothing=0.1),
    "nca_pair": pl.nca_pair,
    "bco_pair": partial(pl.bco_pair, shift=0.05),
    "sppo_hard": pl.sppo_hard,
    "apo_zero": pl.apo_zero,
    "apo_down": pl.apo_down,
    "aot": pl.aot,
    "aot_unpaired": pl.aot_unpaired,
    "discopop": pl.discopop,
    "length_normalised": after(per_token, pl.sigmoid),
    "forward_kl": after(partial(pl.diverging, pl.forward_kl), pl.sigmoid),
    "jensen_shannon": after(partial(pl.diverging, pl.jensen_shannon), pl.sigmoid),
    "alpha_divergence": after(partial(pl.diverging, partial(pl.alpha_divergence, alpha=0.5)), pl.sigmoid),
    "simpo": partial(pl.simpo, gamma=0.5),
    "cpo": pl.cpo,
    "orpo": pl.orpo,
    "reference_free": after(pl.without_reference, pl.sigmoid),
}
PAIRED = ("sigmoid", "conservative", "robust", "ipo_sums", "hinge", "exo_pair", "discopop")
"""Those of the difference of the log-ratios alone."""


def scores(*values, lengths=(4.0, 5.0)):
    return PairScores(*(jnp.asarray([value], jnp.float32) for value in (*values, *lengths)))


HAND = scores(-10.0, -12.0, -11.0, -11.5)
"""h_w = 1, h_l = -0.5, their difference 1.5; 4 and 5 tokens."""


def softplus(x):
    return math.log1p(math.exp(x))


def sg(x):
    return 1 / (1 + math.exp(-x))


# Written out from the papers for beta = 0.1: beta (h_w - h_l) = 0.15, beta h_w = 0.1, beta h_l = -0.05.
BY_HAND = {
    "sigmoid": 0.6209570,
    "conservative": 0.8 * softplus(-0.15) + 0.2 * softplus(0.15),
    "robust": (0.8 * softplus(-0.15) - 0.2 * softplus(0.15)) / 0.6,
    "ipo": (1 / 4 + 0.5 / 5 - 5) ** 2,
    "ipo_sums": (1.5 - 5) ** 2,
    "hinge": 0.85,
    "exo_pair": sg(0.15) * (math.log(sg(0.15)) - math.log(0.9)) + sg(-0.15) * (math.log(sg(-0.15)) - math.log(0.1)),
    "nca_pair": softplus(-0.1) + 0.5 * softplus(0.1) + 0.5 * softplus(-0.05),
    "bco_pair": softplus(-(0.1 - 0.05)) + softplus(-0.05 - 0.05),
    "sppo_hard": (1 - 5) ** 2 + (-0.5 + 5) ** 2,
    "apo_zero": 1 - sg(0.1) + sg(-0.05),
    "apo_down": sg(0.1) + 1 - sg(0.15),
    "aot": softplus(-0.15),
    "aot_unpaired": softplus(-0.15),
    "discopop": (1 - sg(3.0)) * softplus(-0.15) + sg(3.0) * math.exp(-0.15),
    "length_normalised": softplus(-0.1 * (1 / 4 + 0.5 / 5)),
    "forward_kl": softplus(-0.1 * ((1 - math.exp(-1)) - (1 - math.exp(0.5)))),
    "jensen_shannon": softplus(-0.1 * (math.log(sg(1.0)) - math.log(sg(-0.5)))),
    "alpha_divergence": softplus(-0.1 * ((math.exp(-0.5) - 1) / -0.5 - (math.exp(0.25) - 1) / -0.5)),
    "simpo": softplus(-(0.1 * (-10 / 4 + 12 / 5) - 0.5)),
    "cpo": softplus(-0.1 * 2),
    "orpo": 0.1 * softplus(
        -((-2.5 - math.log(1 - math.exp(-2.5))) - (-2.4 - math.log(1 - math.exp(-2.4))))
    ),
    "reference_free": softplus(-0.1 * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name):
    chex.assert_trees_all_close(
        LOSSES[name](HAND, 0.1), jnp.asarray([BY_HAND[name]], jnp.float32), atol=2e-6, rtol=2e-6
    )


def test_the_hand_case_of_dpo_is_the_paper_s():
    assert float(HAND.delta[0]) == 1.5
    assert float(pl.sigmoid(HAND, 0.1)[0]) == pytest.approx(math.log(1 + math.exp(-0.15)), abs=1e-7)


@pytest.mark.parametrize("name", PAIRED)
def test_what_is_added_to_both_log_ratios_changes_no_paired_loss(name):
    moved = HAND._replace(chosen=HAND.chosen + 3, rejected=HAND.rejected + 3)
    chex.assert_trees_all_close(LOSSES[name](moved, 0.3), LOSSES[name](HAND, 0.3), rtol=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_swapped_answers_turn_the_difference_round(name):
    swapped = PairScores(HAND[1], HAND[0], HAND[3], HAND[2], HAND[5], HAND[4])
    turned = pl._of_deltas(HAND, -HAND.delta)
    chex.assert_trees_all_close(LOSSES[name](swapped, 0.3), LOSSES[name](turned, 0.3), rtol=1e-6)


def random_scores(count, seed=0, size=3.0, lengths=True):
    rng = np.random.default_rng(seed)
    logprobs = [jnp.asarray(-10 + size * rng.standard_normal(count), jnp.float32) for _ in range(4)]
    sizes = rng.integers(1, 9, (2, count)) if lengths else np.ones((2, count))
    return PairScores(*logprobs, *(jnp.asarray(part, jnp.float32) for part in sizes))


def test_no_smoothing_is_dpo_and_no_flips_are_too():
    found = random_scores(50)
    plain = pl.sigmoid(found, 0.4)
    chex.assert_trees_all_equal(pl.sigmoid(found, 0.4, smoothing=0.0), plain)
    chex.assert_trees_all_close(pl.robust(found, 0.4, flips=0.0), plain, rtol=1e-6)


@pytest.mark.parametrize("flips", [0.1, 0.3, 0.45])
def test_the_robust_loss_averaged_over_flips_is_the_clean_loss(flips):
    found = random_scores(50)
    flipped = PairScores(found[1], found[0], found[3], found[2], found[5], found[4])
    mean = (1 - flips) * pl.robust(found, 0.4, flips) + flips * pl.robust(flipped, 0.4, flips)
    chex.assert_trees_all_close(mean, pl.sigmoid(found, 0.4), rtol=2e-4, atol=1e-5)


def test_ipo_is_least_at_half_over_beta():
    deltas = jnp.linspace(-10, 10, 2001)
    values = pl.ipo(pl._of_deltas(random_scores(2001), deltas), 0.1)
    assert float(deltas[jnp.argmin(values)]) == pytest.approx(5.0, abs=0.01)
    assert float(jnp.min(values)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64(True):
        found = PairScores(*(jnp.asarray(part, jnp.float64) for part in random_scores(6, size=0.5)))

        def loss(chosen, rejected):
            return jnp.sum(jnp.arange(1.0, 7.0) * LOSSES[name](found._replace(chosen=chosen, rejected=rejected), 0.7))

        slopes = jax.grad(loss, argnums=(0, 1))(found.chosen, found.rejected)
        for i in range(6):
            step = 1e-6 * jnp.eye(6)[i]
            for side, move in enumerate([(step, 0 * step), (0 * step, step)]):
                up = loss(found.chosen + move[0], found.rejected + move[1])
                down = loss(found.chosen - move[0], found.rejected - move[1])
                assert float(slopes[side][i]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("delta", [1e4, -1e4])
def test_losses_and_gradients_stay_finite_far_out(name, delta):
    far = scores(-1.0 + min(delta, 0), -1.0 - max(delta, 0), -1.0, -1.0)
    value, slopes = jax.value_and_grad(lambda s: jnp.sum(LOSSES[name](s, 1.0)))(far)
    chex.assert_tree_all_finite((value, slopes))


def test_orpo_is_finite_where_an_answer_is_certain():
    chex.assert_tree_all_finite(jax.value_and_grad(lambda s: jnp.sum(pl.orpo(s, 1.0)))(scores(0.0, -5.0, 0.0, 0.0)))


def test_optimal_transport_sorts_over_all_pairs():
    found = random_scores(6)
    policy, reference = np.asarray(found[0] - found[1]), np.asarray(found[2] - found[3])
    wanted = np.log1p(np.exp(-0.3 * (np.sort(policy) - np.sort(reference))))
    chex.assert_trees_all_close(pl.aot(found, 0.3), jnp.asarray(wanted), rtol=1e-5)
    ratios = np.sort(found.chosen_ratio) - np.sort(found.rejected_ratio)
    chex.assert_trees_all_close(pl.aot_unpaired(found, 0.3), jnp.asarray(np.log1p(np.exp(-0.3 * ratios))), rtol=1e-5)


def test_plackett_luce_of_two_is_dpo_and_of_three_the_product_of_choices():
    found = random_scores(20)
    ratios_2 = jnp.stack([found.chosen_ratio, found.rejected_ratio], axis=-1)
    chex.assert_trees_all_close(pl.plackett_luce(ratios_2, 0.3), pl.sigmoid(found, 0.3), rtol=2e-5)
    z = [0.3, -0.2, 1.1]
    first = math.exp(z[0]) / sum(map(math.exp, z))
    second = math.exp(z[1]) / (math.exp(z[1]) + math.exp(z[2]))
    ranked = pl.plackett_luce(jnp.asarray(z) / 0.5, 0.5)
    assert float(ranked) == pytest.approx(-math.log(first * second), rel=1e-6)


def test_kto_by_hand_and_its_anchor_has_no_gradient():
    ratios, mismatched = jnp.asarray([1.0, -0.5, 2.0]), jnp.asarray([0.4, -0.2, 0.7])
    weights = jnp.asarray([1.0, 1.0, 0.0])
    anchor = pl.kto_anchor(mismatched, weights, 0.5)
    assert float(anchor) == pytest.approx(0.5 * 0.1, rel=1e-6)
    assert float(pl.kto_anchor(-jnp.abs(mismatched), weights, 0.5)) == 0
    losses = pl.kto(ratios, jnp.asarray([True, False, True]), anchor, 0.5, (2.0, 3.0))
    wanted = [2 * (1 - sg(0.5 - 0.05)), 3 * (1 - sg(0.05 + 0.25)), 2 * (1 - sg(1.0 - 0.05))]
    chex.assert_trees_all_close(losses, jnp.asarray(wanted), rtol=1e-6)
    slope = jax.grad(lambda m: jnp.sum(pl.kto(ratios, jnp.ones(3, bool), pl.kto_anchor(m, weights, 0.5), 0.5)))
    chex.assert_trees_all_equal(slope(mismatched), jnp.zeros(3))


def test_descent_on_a_table_ends_at_the_policy_of_the_closed_form():
    """One prompt and six answers: the expected loss over all ordered pairs, labelled as Bradley and Terry say."""
    rng = np.random.default_rng(0)
    rewards, reference = jnp.asarray(rng.standard_normal(6)), jax.nn.log_softmax(jnp.asarray(rng.standard_normal(6)))
    beta = 0.5
    first, second = (
        jnp.asarray(part) for part in zip(*[(i, j) for i in range(6) for j in range(6) if i != j], strict=True)
    )
    weights = jax.nn.sigmoid(rewards[first] - rewards[second])

    def loss(logits):
        policy, ones = jax.nn.log_softmax(logits), jnp.ones(30)
        pairs = PairScores(policy[first], policy[second], reference[first], reference[second], ones, ones)
        return jnp.mean(weights * pl.sigmoid(pairs, beta))

    tx = optax.lbfgs()
    step = optax.value_and_grad_from_state(loss)

    def update(carry, _):
        logits, state = carry
        value, slope = step(logits, state=state)
        move, state = tx.update(slope, state, logits, value=value, grad=slope, value_fn=loss)
        return (logits + move, state), None

    start = reference, tx.init(reference)
    logits = jax.jit(lambda start: jax.lax.scan(update, start, length=100)[0][0])(start)
    optimum = jax.nn.softmax(reference + rewards / beta)
    assert float(0.5 * jnp.sum(jnp.abs(jax.nn.softmax(logits) - optimum))) < 1e-4
    # Not where it began, and not where the rewards alone would lead.
    assert float(0.5 * jnp.sum(jnp.abs(jax.nn.softmax(reference) - optimum))) > 0.1
    assert float(0.5 * jnp.sum(jnp.abs(jax.nn.softmax(rewards / beta) - optimum))) > 0.1


GOLDENS = json.loads((Path(__file__).parent / "trl_goldens.json").read_text())


@pytest.mark.parametrize("name", GOLDENS["losses"])
def test_losses_are_those_of_trl(name):
    inputs = PairScores(*(jnp.asarray(part, jnp.float32) for part in GOLDENS["scores"]))
    found = jnp.mean(TRL_NAMES[name](inputs, GOLDENS["beta"]))
    assert float(found) == pytest.approx(GOLDENS["losses"][name], rel=1e-5, abs=1e-5)


TRL_NAMES = {
    "sigmoid": pl.sigmoid, "hinge": pl.hinge, "ipo": after(per_token, pl.ipo), "nca_pair": pl.nca_pair,
    "exo_pair": partial(pl.exo_pair, smoothing=0.1), "robust": partial(pl.robust, flips=0.1),
    "bco_pair": pl.bco_pair, "sppo_hard": pl.sppo_hard, "aot": partial(pl.aot, smoothing=0.1),
    "aot_unpaired": partial(pl.aot_unpaired, smoothing=0.1), "apo_zero": pl.apo_zero, "apo_down": pl.apo_down,
    "discopop": pl.discopop, "sigmoid_norm": after(per_token, pl.sigmoid),
    "sigmoid/forward_kl": after(partial(pl.diverging, pl.forward_kl), pl.sigmoid),
    "sigmoid/js_divergence": after(partial(pl.diverging, pl.jensen_shannon), pl.sigmoid),
    "sigmoid/alpha_divergence": after(partial(pl.diverging, partial(pl.alpha_divergence, alpha=0.5)), pl.sigmoid),
    "cpo/sigmoid": pl.cpo, "cpo/simpo": partial(pl.simpo, gamma=0.5), "orpo/odds": pl.orpo,
}  # fmt: skip
