"""How policies of the language with a known reward are measured, and the best that any policy could do."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.preferences_language import KINDS, logprobs, reward, sample
from lmlab.core.types import Array, Params, Preferences
from lmlab.models.lm import LM
from lmlab.objectives import pair_losses
from lmlab.objectives.dpo import dpo

SAMPLES = 2000
"""Answers that rewards and divergences are means of."""


def measure(lm: LM, params: Params, reference: Params) -> dict[str, list[float]]:
    """Mean reward of what a policy says, and its divergence KL(policy || reference), by seed."""
    kinds_B = jnp.arange(SAMPLES) % KINDS

    def one(params: Params, reference: Params) -> tuple[Array, Array]:
        answers = sample(lm, params, kinds_B, jax.random.key(7))
        ratios = logprobs(lm, params, kinds_B, answers) - logprobs(lm, reference, kinds_B, answers)
        return jnp.mean(reward(kinds_B, answers)), jnp.mean(ratios)

    rewards, divergences = jax.jit(jax.vmap(one))(params, reference)
    return {"reward": rewards.tolist(), "kl": divergences.tolist()}


def optima(lm: LM, reference: Params) -> list[dict[str, float]]:
    """Reward and divergence of reference * exp(reward / beta) / Z: averages over answers of the reference, reweighted.

    Means over seeds; strengths at which fewer than 200 answers carry the average are left out.
    """
    kinds_B = jnp.arange(32 * SAMPLES) % KINDS
    draw = jax.jit(lambda params: reward(kinds_B, sample(lm, params, kinds_B, jax.random.key(8))))
    rewards_SKN = jnp.stack([draw(jax.tree.map(lambda x, s=s: x[s], reference)).reshape(-1, KINDS).T
                             for s in range(len(jax.tree.leaves(reference)[0]))])  # fmt: skip
    points = []
    for beta in np.geomspace(0.2, 10, 40):
        weights = jax.nn.softmax(rewards_SKN / beta, axis=-1)
        if float(jnp.min(1 / jnp.sum(jnp.square(weights), axis=-1))) < 200:
            continue
        kl = jnp.sum(weights * jnp.log(jnp.maximum(weights * weights.shape[-1], 1e-30)), axis=-1)
        points.append({"beta": float(beta), "reward": float(jnp.mean(jnp.sum(weights * rewards_SKN, axis=-1))),
                       "kl": float(jnp.mean(kl))})  # fmt: skip
    return points


def accuracy(lm: LM, params: Params, held: Preferences) -> list[float]:
    """Share of held-out pairs in which the implicit reward prefers what the label prefers, by seed."""
    objective = dpo(lm, pair_losses.sigmoid, 0.1)
    ratio = jax.jit(jax.vmap(lambda params, batch: objective(params, batch, jax.random.key(0)).metrics["accuracy"]))
    found = ratio(params, held)
    return (found.sum / found.weight).tolist()
