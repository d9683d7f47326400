"""Preference strength on pairs whose true order is known: which flips does it find, and what do the cures bring?"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.results import say
from lmlab.core.types import Array, Params, Preferences
from lmlab.evals.ranking import auc
from lmlab.models.reward import mlp_head
from lmlab.objectives import treatments as cure
from lmlab.objectives.reward import reward_pairs, unbiased_targets
from lmlab.objectives.strength import fit_noise, noise_rate, out_of_fold, preference_strength
from lmlab.objectives.treatments import Treatment
from lmlab.train.members import new_members, shuffled_rows, train_members
from lmlab.train.step import Step, make_step

WIDTH, TRUE_HIDDEN, HIDDEN, BATCH = 16, 32, 64, 32
PEAK = 3e-3
MEMBERS, FOLDS, ROUNDS, MODELS = 10, 5, 4, 5
"""Members of the ensemble that sees all pairs; folds of the other one, and rounds of them; models of an arm."""
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Planted flips of the detection table."""
CURED_RATES = (0.0, 0.2, 0.4)
"""And of the table of cures."""
ALONE_RATES, ALONE_EPOCHS = (0.0, 0.2), 20
"""Of the models that see a tenth of the pairs alone."""
MARKS = (1, 5, 10, 20, 40)
"""Epochs after which all is measured."""
LEAST_RATE = 0.001
"""An estimated rate of 0 counts as this."""
STRENGTH_EPOCHS = 5
"""Epochs of the out-of-fold ensemble whose strength the cures are given."""
HEAD = mlp_head(WIDTH, HIDDEN)


class Truth(NamedTuple):
    """r*(z) = 3 v . tanh(1.5 A z + b)."""

    inner_DF: np.ndarray
    bias_F: np.ndarray
    outer_F: np.ndarray

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """True rewards [...] of z [..., D]."""
        return 3 * np.tanh(1.5 * z @ self.inner_DF + self.bias_F) @ self.outer_F


def draw_truth(rng: np.random.Generator) -> Truth:
    """A network with random weights, each sum of them of variance 1."""
    inner_DF = rng.normal(size=(WIDTH, TRUE_HIDDEN)) / np.sqrt(WIDTH)
    return Truth(inner_DF, rng.normal(size=TRUE_HIDDEN), rng.normal(size=TRUE_HIDDEN) / np.sqrt(TRUE_HIDDEN))


def draw_pairs(truth: Truth, count: int, rng: np.random.Generator, shift: float = 0.0) -> np.ndarray:
    """Pairs z [N, 2, D], the truly better answer first. shift: of the first four coordinates of all answers."""
    z = rng.normal(size=(count, 2, WIDTH))
    z[..., :4] += shift
    better = np.argsort(-truth(z), axis=1)
    return np.take_along_axis(z, better[..., None], axis=1).astype(np.float32)


@dataclass(frozen=True)
class World:
    """What one seed sees."""

    truth: Truth
    train_N2D: np.ndarray
    tests: dict[str, np.ndarray]
    rng: np.random.Generator


def draw_world(seed: int, pairs: int) -> World:
    """The same for the same seed."""
    rng = np.random.default_rng(seed)
    truth = draw_truth(rng)
    train = draw_pairs(truth, pairs, rng)
    tests = {"test": draw_pairs(truth, pairs, rng), "shifted": draw_pairs(truth, pairs, rng, 1.5)}
    return World(truth, train, tests, rng)


def differences(params: Params, pairs_N2D: Array) -> Array:
    """r(first) - r(second) [K, N] of members."""
    rewards = jax.vmap(lambda params: HEAD.rewards(params, pairs_N2D))(params)
    return rewards[..., 0] - rewards[..., 1]


measured_differences = jax.jit(differences)


def adam(steps: int) -> optax.GradientTransformation:
    """Adam whose rate falls to a tenth."""
    rate = optax.linear_schedule(PEAK, 0.1 * PEAK, steps)
    return optax.chain(optax.scale_by_adam(0.9, 0.95), optax.scale_by_learning_rate(rate))


@lru_cache
def training(steps: int) -> tuple[optax.GradientTransformation, Step]:
    """The same step for every seed, so that it is compiled once."""
    tx = adam(steps)
    return tx, make_step(reward_pairs(HEAD.rewards), tx)


def trained(
    pairs_N2D: np.ndarray, treated: Treatment, allowed_KN: np.ndarray, epochs: int, rng: np.random.Generator
) -> Iterator[tuple[int, Params]]:  # fmt: skip
    """Members after each epoch, from heads of their own, on treated labels [K, N] of pairs whose first is right."""
    rows = shuffled_rows(allowed_KN, epochs, BATCH, rng)
    steps = len(rows) // epochs
    tx, step = training(len(rows))
    states = new_members(HEAD.init, tx, jax.random.split(jax.random.key(int(rng.integers(2**31))), len(allowed_KN)))
    column = lambda x_KN: jnp.asarray(x_KN, jnp.float32)[..., None]
    targets, margins, weights = map(column, treated)
    data = Preferences(jnp.asarray(pairs_N2D), weights, targets, margins, None)  # type: ignore[arg-type]
    own = Preferences(None, 0, 0, 0, None)  # type: ignore[arg-type]
    for epoch in range(epochs):
        states = train_members(step, states, data, jnp.asarray(rows[epoch * steps : (epoch + 1) * steps]), own)
        yield epoch + 1, states.params


def detect(world: World, epochs: int) -> dict[str, Any]:
    """AUC of -mu for planted flips by rate and epoch, in-sample and out-of-fold; and the strength that cures are given.

    All rates and members train in one program: a flipped label is a target of 0.
    """
    count = len(world.train_N2D)
    flips_RN = np.stack([world.rng.random(count) < rate for rate in RATES])
    folds = np.stack([world.rng.permutation(count) % FOLDS for _ in range(ROUNDS)])
    unseen = np.concatenate([folds_N[None] != np.arange(FOLDS)[:, None] for folds_N in folds])
    found: dict[str, Any] = {f"{rate:g}": {} for rate in RATES}
    strengths: dict[str, np.ndarray] = {}
    for kind, allowed in {"in-sample": np.ones((MEMBERS, count), bool), "out-of-fold": unseen}.items():
        flips_KN = np.repeat(flips_RN, len(allowed), axis=0)
        given = cure.with_flips(cure.as_given(jnp.zeros(flips_KN.shape)), jnp.asarray(flips_KN))
        members = trained(world.train_N2D, given, np.tile(allowed, (len(RATES), 1)), epochs, world.rng)
        for epoch, params in members:
            if epoch not in MARKS and epoch != STRENGTH_EPOCHS:
                continue
            scores = np.asarray(measured_differences(params, world.train_N2D)).reshape(len(RATES), -1, count)
            for rate, flips_N, scores_MN in zip(RATES, flips_RN, scores, strict=True):
                labelled = scores_MN * np.where(flips_N, -1, 1)
                if kind == "out-of-fold":
                    labelled = np.asarray(out_of_fold(labelled.reshape(ROUNDS, FOLDS, -1), folds))
                strength = preference_strength(jnp.asarray(labelled))
                mine = _found(strength, labelled, flips_N, world)
                found[f"{rate:g}"].setdefault(kind, {})[str(epoch)] = mine
                if kind == "out-of-fold" and epoch == STRENGTH_EPOCHS:
                    strengths[f"{rate:g}"] = np.asarray(strength.mean_N)
    return {"found": found, "flips": dict(zip(found, flips_RN, strict=True)), "strength": strengths}


def _found(strength: Any, labelled_MN: np.ndarray, flips_N: np.ndarray, world: World) -> dict[str, Any]:
    """What the strength of one ensemble says of flips that are known."""
    mean_N, std_N = np.asarray(strength.mean_N), np.asarray(strength.std_N)
    gaps_N = -np.diff(world.truth(world.train_N2D.astype(np.float64)), axis=1)[:, 0]
    clear = gaps_N > np.median(gaps_N)
    tenths = np.array_split(np.argsort(mean_N), 10)
    # Without flips there is nothing to rank.
    ranked = {} if not flips_N.any() else {
        "auc": auc(-mean_N, flips_N),
        "auc of one member": float(np.mean([auc(-row_N, flips_N) for row_N in labelled_MN])),
        "auc of clear pairs": auc(-mean_N[clear], flips_N[clear]),
    }  # fmt: skip
    return ranked | {
        "below 0": float(np.mean(mean_N < 0)),
        "noise rate": float(fit_noise(strength.mean_N)[1]),
        "by confident learning": float(noise_rate(jax.nn.sigmoid(strength.mean_N))),
        "flips by tenth": [float(np.mean(flips_N[tenth])) for tenth in tenths],
        "std by tenth": [float(np.mean(std_N[tenth])) for tenth in tenths],
    }


def arms(mu: Array, flips_N: np.ndarray, scale: Array, rate: float) -> dict[str, Treatment]:
    """The treatments of given labels; scale, rate: estimated from the pairs themselves."""
    below, given = mu < 0, cure.as_given(mu)
    margins_N = cure.margin(mu).margins_N
    rate = max(rate, LEAST_RATE)
    return {
        "nothing": given,
        "true labels": cure.flip(mu, jnp.asarray(flips_N)),
        "flip lowest 10 %": cure.flip(mu, cure.lowest(mu, 0.1)),
        "flip lowest, estimated rate": cure.flip(mu, cure.lowest(mu, rate)),
        "flip mu < 0": cure.flip(mu, below),
        "drop mu < 0": cure.drop(mu, below),
        "smooth all, 0.2": cure.smooth(mu),
        "smooth mu < 0, 0.2": cure.smooth(mu, where="negative"),
        "margin mu": cure.margin(mu),
        "margin max(mu, 0)": cure.margin(mu, signed=False),
        "margin by grade": cure.rating_margin(mu),
        "smooth mu < 0 + margin": cure.smooth(mu, where="negative")._replace(margins_N=margins_N),
        "flip mu < 0 + margin": cure.flip(mu, below)._replace(margins_N=margins_N),
        "soft, s(mu)": cure.soft(mu),
        "posterior": cure.posterior(mu, rate, scale),
        "unbiased, estimated rate": given._replace(targets_N=unbiased_targets(given.targets_N, rate)),  # type: ignore[arg-type]
    }


def compare_cures(world: World, detected: dict[str, Any], epochs: int) -> dict[str, Any]:
    """Accuracy of each arm by rate, test set and epoch: the mean of its models."""
    count = len(world.train_N2D)
    result: dict[str, Any] = {}
    for rate in CURED_RATES:
        name = f"{rate:g}"
        flips_N, mu = detected["flips"][name], jnp.asarray(detected["strength"][name])
        scale, fitted = fit_noise(mu)
        given = arms(mu, flips_N, scale, float(fitted))
        treated = {arm: cure.with_flips(treatment, jnp.asarray(flips_N)) for arm, treatment in given.items()}
        stacked = Treatment(
            *(np.repeat(np.stack(part), MODELS, axis=0) for part in zip(*treated.values(), strict=True))
        )
        allowed = np.ones((len(treated) * MODELS, count), bool)
        result[name] = {arm: {} for arm in treated}
        for epoch, params in trained(world.train_N2D, stacked, allowed, epochs, world.rng):
            if epoch not in MARKS:
                continue
            for test, pairs in world.tests.items():
                scores_AN = np.asarray(measured_accuracy(params, pairs)).reshape(len(treated), MODELS).mean(axis=1)
                for arm, score in zip(treated, scores_AN.tolist(), strict=True):
                    result[name][arm].setdefault(test, {})[str(epoch)] = score
    return result


def learn_from_tenths(world: World, detected: dict[str, Any], epochs: int) -> dict[str, list[float]]:
    """Accuracy on clean pairs of models that saw one tenth of the pairs alone, by strength from the lowest; then of a
    tenth at random. With no flips, too: what the lowest tenth teaches is what the ensemble got wrong.
    """
    count = len(world.train_N2D)
    result = {}
    for rate in ALONE_RATES:
        name = f"{rate:g}"
        flips_N = detected["flips"][name]
        tenths = [
            *np.array_split(np.argsort(detected["strength"][name]), 10),
            world.rng.permutation(count)[: count // 10],
        ]
        allowed = np.stack([np.isin(np.arange(count), tenth) for tenth in tenths]).repeat(MODELS, axis=0)
        given = cure.with_flips(cure.as_given(jnp.zeros(allowed.shape)), jnp.asarray(flips_N))
        *_, (_, params) = trained(world.train_N2D, given, allowed, epochs, world.rng)
        scores = np.asarray(measured_accuracy(params, world.tests["test"]))
        result[name] = scores.reshape(-1, MODELS).mean(axis=1).tolist()
    return result


@jax.jit
def measured_accuracy(params: Params, pairs_N2D: Array) -> Array:
    """The share of pairs [K] whose first answer has the higher reward."""
    return jnp.mean(differences(params, pairs_N2D) > 0, axis=1)


def run_pilot(seeds: int, pairs: int, epochs: int) -> list[dict[str, Any]]:
    """Both tables of every seed."""
    result = []
    for seed in range(seeds):
        say(f"planted flips, seed {seed}")
        world = draw_world(seed, pairs)
        detected = detect(world, epochs)
        alone = learn_from_tenths(world, detected, min(epochs, ALONE_EPOCHS))
        cures = compare_cures(world, detected, epochs)
        result.append({"detection": detected["found"], "tenths alone": alone, "cures": cures})
    return result
