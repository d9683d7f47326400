"""Planted flips in pairs of digit strings, found and cured by reward models that are transformers."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.results import say
from experiments.reward_pilot import LEAST_RATE
from lmlab.core.types import Array, Key, Params, Preferences
from lmlab.data.answers import PairRows, preferences_of
from lmlab.data.preferences import EncodedPair
from lmlab.evals.ranking import auc
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.reward import reward_model
from lmlab.models.transformer import transformer
from lmlab.objectives import treatments as cure
from lmlab.objectives.contrastive import answer_rows, difference_rows, dropout_view, sim_cse, swav, with_contrast
from lmlab.objectives.reward import reward_pairs, unbiased_targets
from lmlab.objectives.strength import fit_noise, noise_rate, out_of_fold, preference_strength
from lmlab.objectives.treatments import Treatment
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.members import new_members, shuffled_rows, train_members
from lmlab.train.step import Step, make_step

ASK, END, TARGET = 10, 11, 7
"""Tokens beside the ten digits; the digit that is wanted."""
SHORTEST, LONGEST = 3, 8
LENGTH_COST = 0.1
FLIPS, FOLDS, MODELS, BATCH, PEAK = 0.2, 4, 2, 32, 2e-3
REWARDER = reward_model(
    transformer(TransformerConfig(vocab_size=12, layers=2, width=64, max_length=32, attention=AttentionConfig(heads=4)))
)


def true_reward(answer: np.ndarray) -> float:
    """How often the wanted digit stands in the answer, less a tenth of its length."""
    return float(np.sum(answer == TARGET)) - LENGTH_COST * len(answer)


def draw_answer(rng: np.random.Generator) -> np.ndarray:
    """Digits, of which the wanted one is frequent: their number matters more than the length."""
    length = rng.integers(SHORTEST, LONGEST + 1)
    return np.where(rng.random(length) < 0.2, TARGET, rng.integers(0, 10, length))


def draw_pair(rng: np.random.Generator) -> EncodedPair:
    """A prompt and two strings of digits, the better one first; never of equal reward."""
    while True:
        answers = sorted((draw_answer(rng), draw_answer(rng)), key=true_reward, reverse=True)
        if true_reward(answers[0]) > true_reward(answers[1]) + 1e-6:
            break
    first, second = (np.append(answer, END).astype(np.int32) for answer in answers)
    return EncodedPair("", np.asarray([ASK], np.int32), (first, second), 1.0, 0.0)


def draw_rows(count: int, rng: np.random.Generator) -> Preferences:
    """Pairs, one a row."""
    pairs = [draw_pair(rng) for _ in range(count)]
    width = LONGEST + 1
    rows = PairRows(pairs, np.arange(count), np.arange(count + 1), 1 + 2 * width, True, 1, 2 * width)
    return jax.tree.map(jnp.asarray, preferences_of(rows, range(count), count))


@jax.jit
def differences(params: Params, batch: Preferences) -> Array:
    """r(first) - r(second) [K, N] of members."""
    rewards_KN2 = jax.vmap(lambda params: REWARDER.rewards(params, batch.answers))(params)
    return rewards_KN2[..., 0] - rewards_KN2[..., 1]


PLAIN = reward_pairs(REWARDER.rewards)
VIEW = dropout_view(REWARDER.features, REWARDER.lm.embed)
OBJECTIVES = {
    "": PLAIN,
    "SimCSE": with_contrast(PLAIN, VIEW, answer_rows, lambda params, *views: sim_cse(*views), 1.0),
    "SwAV of differences": with_contrast(
        PLAIN, VIEW, difference_rows, lambda params, *views: swav(*views, params["prototypes"]), 0.5
    ),
}
"""Without and with a contrastive term, in the settings of the paper."""
CONTRASTS = tuple(name for name in OBJECTIVES if name)


def init(key: Key) -> Params:
    """Parameters for any of the objectives; those that one does not read stay."""
    return {**REWARDER.init(key), "prototypes": jax.random.normal(key, (20, REWARDER.lm.config.width))}


@lru_cache
def training(steps: int, contrast: str) -> tuple[optax.GradientTransformation, Step]:
    """The same step for every seed, so that it is compiled once."""
    axes = {**REWARDER.axes, "prototypes": ("vocab", "embed")}
    tx = build_optimizer(OptimConfig(schedule=ScheduleConfig(peak=PEAK, warmup=0.1)), axes, steps)
    return tx, make_step(OBJECTIVES[contrast], tx)


def trained(
    batch: Preferences, treated: Treatment, allowed_KN: np.ndarray, epochs: int, seed: int, contrast: str = ""
) -> Iterator[tuple[int, Params]]:  # fmt: skip
    """Members after each epoch, on treated labels [K, N] of pairs whose first answer is right."""
    rows = shuffled_rows(allowed_KN, epochs, BATCH, np.random.default_rng(seed))
    steps = len(rows) // epochs
    tx, step = training(len(rows), contrast)
    states = new_members(init, tx, jax.random.split(jax.random.key(seed), len(allowed_KN)))
    targets, margins, weights = (jnp.asarray(x_KN, jnp.float32)[..., None] for x_KN in treated)
    data = Preferences(batch.answers, weights, targets, margins, None)
    own: Any = Preferences(None, 0, 0, 0, None)  # type: ignore[arg-type]
    for epoch in range(epochs):
        states = train_members(step, states, data, jnp.asarray(rows[epoch * steps : (epoch + 1) * steps]), own)
        yield epoch + 1, states.params


def detect(batch: Preferences, flips_N: np.ndarray, epochs: int, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """AUC of -mu for planted flips in-sample and out-of-fold, and the strength out of fold."""
    rng = np.random.default_rng(seed)
    count = len(flips_N)
    folds = np.stack([rng.permutation(count) % FOLDS for _ in range(MODELS)])
    unseen = np.concatenate([folds_N[None] != np.arange(FOLDS)[:, None] for folds_N in folds])
    found, labelled = {}, np.zeros((0, count))
    for kind, allowed in {"in-sample": np.ones((MODELS, count), bool), "out-of-fold": unseen}.items():
        given = cure.with_flips(cure.as_given(jnp.zeros(allowed.shape)), jnp.asarray(flips_N))
        *_, (_, params) = trained(batch, given, allowed, epochs, seed)
        labelled = np.asarray(differences(params, batch)) * np.where(flips_N, -1, 1)
        if kind == "out-of-fold":
            labelled = np.asarray(out_of_fold(labelled.reshape(MODELS, FOLDS, count), folds))
        found[kind] = auc(-labelled.mean(axis=0), flips_N)
    mean_N = np.asarray(preference_strength(jnp.asarray(labelled)).mean_N)
    found["noise rate"] = float(fit_noise(jnp.asarray(mean_N))[1])
    found["by confident learning"] = float(noise_rate(jax.nn.sigmoid(jnp.asarray(mean_N))))
    return found, mean_N


def arms(mu: Array, flips_N: Array) -> dict[str, Treatment]:
    """The treatments of given labels that stood out on vectors."""
    scale, fitted = fit_noise(mu)
    given, rate = cure.as_given(mu), max(float(fitted), LEAST_RATE)
    return {
        "nothing": given,
        "true labels": cure.flip(mu, flips_N),
        "flip lowest, estimated rate": cure.flip(mu, cure.lowest(mu, rate)),
        "smooth all, 0.2": cure.smooth(mu),
        "margin mu": cure.margin(mu),
        "posterior": cure.posterior(mu, rate, scale),
        "unbiased, estimated rate": given._replace(targets_N=unbiased_targets(given.targets_N, rate)),
    }


def accuracies(
    batch: Preferences, test: Preferences, stacked: Treatment, names: list[str], epochs: int, seed: int,
    contrast: str = "",
) -> dict[str, list[float]]:  # fmt: skip
    """Accuracy on clean pairs after each epoch of each arm; stacked: [arms * MODELS, N]."""
    curves: dict[str, list[float]] = {name: [] for name in names}
    everything = np.ones(stacked.targets_N.shape, bool)
    for _, params in trained(batch, stacked, everything, epochs, seed, contrast):
        right = np.mean(np.asarray(differences(params, test)) > 0, axis=1).reshape(-1, MODELS).mean(axis=1)
        for name, value in zip(names, right.tolist(), strict=True):
            curves[name].append(value)
    return curves


def run_digits(seeds: int, pairs: int, epochs: int, contrasts: Sequence[str] = CONTRASTS) -> list[dict[str, Any]]:
    """Detection, and clean accuracy of each arm after every epoch, for every seed."""
    result = []
    for seed in range(seeds):
        say(f"digit strings, seed {seed}")
        rng = np.random.default_rng(seed)
        batch, test = draw_rows(pairs, rng), draw_rows(pairs, rng)
        flips_N = rng.random(pairs) < FLIPS
        found, mu = detect(batch, flips_N, max(1, epochs // 2), seed)
        treated = arms(jnp.asarray(mu), jnp.asarray(flips_N))
        flipped = [cure.with_flips(treatment, jnp.asarray(flips_N)) for treatment in treated.values()]
        stacked = Treatment(*(np.repeat(np.stack(part), MODELS, axis=0) for part in zip(*flipped, strict=True)))
        curves = accuracies(batch, test, stacked, list(treated), epochs, seed)
        for contrast in contrasts:
            nothing = jax.tree.map(lambda x: x[:MODELS], stacked)
            curves |= accuracies(batch, test, nothing, [contrast], epochs, seed, contrast)
        result.append({"detection": found, "accuracy": curves})
    return result
