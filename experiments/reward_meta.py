"""MetaRM where the policy has moved: does a step towards spread help, and would any other step have helped as much?"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.results import say
from experiments.reward_pilot import BATCH, HEAD, WIDTH, World, adam, differences, draw_world
from lmlab.core.types import Array, Params, Preferences, Ratio
from lmlab.objectives.meta_reward import Direct, MetaBatch, along_gradient, answer_spread, at_random, meta_reward
from lmlab.objectives.reward import reward_pairs
from lmlab.train.members import new_members, shuffled_rows, train_members
from lmlab.train.step import Step, make_step, ratio_value

FLIPS, ANSWERS, MODELS = 0.1, 4, 6
"""Planted flips; answers of a prompt; models of an arm."""


@dataclass(frozen=True)
class Arm:
    """How the step before the gradient is made."""

    eta: float
    direct: Direct = field(default=along_gradient)
    shifted: bool = True
    """Whether the answers without labels come from where the policy has moved to."""
    second_order: bool = False


ARMS = {
    "eta 0": Arm(0.0),
    "eta 0.03": Arm(0.03),
    "eta 0.1": Arm(0.1),
    "eta 0.3": Arm(0.3),
    "eta 1": Arm(1.0),
    "eta 0.3, second order": Arm(0.3, second_order=True),
    "eta 0.3, answers not shifted": Arm(0.3, shifted=False),
    "eta 0.3, random direction": Arm(0.3, direct=at_random),
    "eta -0.3 (descent)": Arm(-0.3),
}


def spread(params: Params, answers_NSD: Array) -> Ratio:
    """J of answers that are all there."""
    rewards_NS = HEAD.rewards(params, answers_NSD)
    return answer_spread(rewards_NS, jnp.ones(rewards_NS.shape, bool))


def draw_answers(count: int, rng: np.random.Generator, shift: float) -> np.ndarray:
    """Answers [N, S, D] of prompts."""
    z = rng.normal(size=(count, ANSWERS, WIDTH)).astype(np.float32)
    z[..., :4] += shift
    return z


def draw_meta(seed: int, count: int) -> tuple[np.ndarray, dict[float, np.ndarray], np.random.Generator]:
    """Which labels [N, 1] are right, the answers without labels by their shift, and the stream that goes on."""
    # Not the stream of `draw_world`, which has the numbers of the test sets in it.
    rng = np.random.default_rng((seed, 1))
    right_N1 = rng.random((count, 1)) >= FLIPS
    return right_N1, {shift: draw_answers(count, rng, shift) for shift in (0.0, 1.5)}, rng


def train_arm(arm: Arm, worlds: Sequence[World], epochs: int) -> list[dict[str, float]]:
    """For each seed the means over the models of an arm, which begin and read alike in every arm."""
    tx = adam(epochs * (len(worlds[0].train_N2D) // BATCH))
    objective = reward_pairs(HEAD.rewards)
    objective = meta_reward(objective, spread, arm.eta, second_order=arm.second_order, direct=arm.direct)
    step = make_step(objective, tx)
    return [train_seed(arm, world, seed, epochs, tx, step) for seed, world in enumerate(worlds)]


def train_seed(
    arm: Arm, world: World, seed: int, epochs: int, tx: optax.GradientTransformation, step: Step
) -> dict[str, float]:  # fmt: skip
    """Means over the models of one seed."""
    count = len(world.train_N2D)
    right_N1, answers, rng = draw_meta(seed, count)
    targets = jnp.asarray(right_N1, jnp.float32)
    ones = jnp.ones_like(targets)
    pairs = Preferences(jnp.asarray(world.train_N2D), ones, targets, 0 * ones, None)  # type: ignore[arg-type]
    data = MetaBatch(pairs, jnp.asarray(answers[1.5 if arm.shifted else 0.0]))
    rows = shuffled_rows(np.ones((MODELS, count), bool), epochs, BATCH, rng)
    states = new_members(HEAD.init, tx, jax.random.split(jax.random.key(seed), MODELS))
    params = train_members(step, states, data, jnp.asarray(rows)).params
    found = measure(params, {name: jnp.asarray(z) for name, z in world.tests.items()}, draw_answers(count, rng, 1.5))
    return {name: float(jnp.mean(value)) for name, value in found.items()}


@jax.jit
def measure(params: Params, tests: dict[str, Array], answers_NSD: Array) -> dict[str, Array]:
    """Of every model: accuracy on both kinds of pairs, J of shifted answers, and the size of its rewards."""
    found = {f"accuracy, {name}": jnp.mean(differences(params, pairs) > 0, axis=1) for name, pairs in tests.items()}
    found["J, shifted"] = jax.vmap(lambda params: ratio_value(spread(params, answers_NSD)))(params)
    rms = lambda params: jnp.sqrt(jnp.mean(jnp.square(HEAD.rewards(params, tests["test"]))))
    found["rms of rewards"] = jax.vmap(rms)(params)
    return found


def run_meta(
    seeds: int, pairs: int, epochs: int, names: Sequence[str] = tuple(ARMS)
) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """By arm, what was measured for each seed."""
    worlds = [draw_world(seed, pairs) for seed in range(seeds)]
    result: dict[str, dict[str, list[float]]] = {}
    for name in names:
        say(f"MetaRM, {name}")
        rows = train_arm(ARMS[name], worlds, epochs)
        result[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return result
