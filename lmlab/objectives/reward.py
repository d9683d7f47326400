"""Reward modelling: one loss of reward differences, and the objective over pairs of answers (arXiv 2401.06080).

A pair has the difference d = r(preferred) - r(other). Every treatment of a label that may be wrong is a choice of the
target q, the probability that it is right, of the margin m, and of the weight of the pair: Bradley-Terry q = 1, m = 0;
label smoothing q = 1 - a; a flipped label q = 0, whose margin needs no new sign; `lmlab.objectives.treatments`.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.masking import masked_ratio
from lmlab.core.types import Array, Key, Objective, Params, Preferences, Terms

Rewards: TypeAlias = Callable[[Params, Any], Array]
"""`rewards(params, answers) -> rewards_BS` float32: of an `AnswerBatch` (`lmlab.models.reward`), or of any other pytree
that stands for answers."""


def preference_loss(differences: Array, targets: Array | float = 1.0, margins: Array | float = 0.0) -> Array:
    """-q log s(d - m) - (1 - q) log s(m - d), s the logistic function; its slope in d is s(d - m) - q.

    differences: d, float32. targets: q, in [0, 1], or beyond for `unbiased_targets`. margins: m, in units of the
    reward. Least at d = m + log(q / (1 - q)), where it is the entropy of q. Source: arXiv 2401.06080, section 2.
    """
    z = differences - margins
    return -targets * jax.nn.log_sigmoid(z) - (1 - targets) * jax.nn.log_sigmoid(-z)


def unbiased_targets(targets: Array | float, flips: float) -> Array | float:
    """Targets outside of [0, 1] under which the mean loss over labels flipped at this rate is that of clean labels.

    [(1 - e) l(d) - e l(-d)] / (1 - 2 e) of l = -log s is `preference_loss` with q = (1 - e) / (1 - 2 e) (arXiv
    2403.00409, equation 12). The loss has no lower bound: keep the rate low. flips: e, below 1/2.
    """
    return (targets - flips) / (1 - 2 * flips)


def reward_pairs(rewards: Rewards, *, center: float = 0.0, margin_scale: float = 1.0) -> Objective:
    """Objective: the mean of `preference_loss` over `Preferences`, with their weights, targets and margins.

    Args:
        rewards: of answers.
        center: coefficient of the mean of (r_chosen + r_rejected)^2, which keeps rewards near 0 (arXiv 2312.09244).
        margin_scale: factor of the margins, which are in the units of the rewards that they were read from.

    Metrics: `accuracy` (share of pairs with d > 0, whatever the margin; of d = 0: half), `margin` (mean of d), `reward`
    and `reward/square` over all answers.
    """

    def objective(params: Params, batch: Preferences, key: Key) -> Terms:
        del key
        rewards_BS, weights_BP = rewards(params, batch.answers), batch.weights_BP
        chosen_BP, rejected_BP = rewards_BS[:, 0::2], rewards_BS[:, 1::2]
        # What does not count may be anything, and so may its slope.
        margin_BP = jnp.where(weights_BP != 0, chosen_BP - rejected_BP, 0)
        loss_BP = preference_loss(margin_BP, batch.targets_BP, margin_scale * batch.margins_BP)
        losses = {"preference": masked_ratio(loss_BP, weights_BP)}
        if center:
            sum_BP = jnp.where(weights_BP != 0, chosen_BP + rejected_BP, 0)
            losses["center"] = masked_ratio(jnp.square(sum_BP), weights_BP)
        metrics = {"accuracy": masked_ratio((jnp.sign(margin_BP) + 1) / 2, weights_BP)}
        metrics["margin"] = masked_ratio(margin_BP, weights_BP)
        both_BS = jnp.repeat(weights_BP, 2, axis=1)
        metrics["reward"] = masked_ratio(rewards_BS, both_BS)
        metrics["reward/square"] = masked_ratio(jnp.square(rewards_BS), both_BS)
        scales: dict[str, Array | float] = {name: center if name == "center" else 1.0 for name in losses}
        return Terms(losses, scales, jax.lax.stop_gradient(metrics))

    return objective
