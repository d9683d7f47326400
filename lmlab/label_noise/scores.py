"""Strength of every pair by members that were not trained on it, and what it makes of the pairs."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Params, Preferences
from lmlab.data.progress import advancing
from lmlab.evals.ranking import auc
from lmlab.label_noise.config import HeadConfig, LabelNoise
from lmlab.models.reward import FeatureHead, linear_head, mlp_head
from lmlab.objectives.reward import reward_pairs
from lmlab.objectives.strength import RATES, fit_noise, noise_rate, out_of_fold, preference_strength
from lmlab.objectives.treatments import Treatment, as_given, flip, lowest, posterior
from lmlab.train.members import new_members, shuffled_rows, train_members
from lmlab.train.step import make_step

Kind = Literal["incorrect", "ambiguous", "normal"]
KINDS: tuple[Kind, ...] = ("incorrect", "ambiguous", "normal")
_LEAST = 0.001
"""A noise rate of 0 counts as this, so that no label is certain."""
_SLICES = 20


@dataclass(frozen=True)
class Verdict:
    """What the ensemble says of every pair, [N] each."""

    mean_N: np.ndarray
    std_N: np.ndarray
    vote_N: np.ndarray
    target_N: np.ndarray
    """P(label is right | strength, noise rate)."""
    suspects_N: np.ndarray
    """bool: the kind "incorrect"."""
    ambiguous_N: np.ndarray
    """bool."""
    noise_rate: float
    """The most likely one, or the one that was given."""
    confident: float
    """The same by confident learning, which counts errors of the ensemble too."""
    agreement: float
    """The share of labels that members agree with which have not seen them."""
    planted: dict[str, float]
    """Of labels that were flipped on purpose: `auc`, and `precision` of as many pairs of lowest strength; or empty."""

    def kind_of(self, pair: int) -> Kind:
        """incorrect: a suspect; ambiguous: members disagree, or are against the label; normal: all are for it."""
        return "incorrect" if self.suspects_N[pair] else "ambiguous" if self.ambiguous_N[pair] else "normal"


def judge(features_N2D: np.ndarray, groups_N: np.ndarray, args: LabelNoise) -> Verdict:
    """Strength by an ensemble of the given labels; and by another one, some of whose labels are flipped on purpose.

    Raises:
        UserError: a strength that is not finite.
    """
    rng = np.random.default_rng(args.seed)
    count = len(features_N2D)
    planted_N = rng.permutation(count) < round(args.planted * count)
    labels = np.stack([np.zeros(count, bool), planted_N]) if planted_N.any() else np.zeros((1, count), bool)
    scores_LMN = cross_fitted(features_N2D, labels, groups_N, args, rng)
    strength = preference_strength(jnp.asarray(scores_LMN[0]))
    finite = np.isfinite(scores_LMN).all() and np.isfinite([strength.mean_N, strength.std_N]).all()
    check(bool(finite), "--head.rate", args.head.rate, "a rate at which heads can be trained; strength is not finite")
    mean_N = strength.mean_N
    scale, fitted = fit_noise(mean_N, [args.share] if args.share else RATES)
    rate = args.share or float(fitted)
    target_N = posterior(mean_N, max(rate, _LEAST), scale).targets_N
    suspects_N = np.asarray(lowest(mean_N, rate) & (mean_N < 0))
    unsure_N = np.asarray((strength.vote_N < 1) | (mean_N <= 0))
    found = _planted(scores_LMN[1], planted_N) if len(labels) > 1 else {}
    return Verdict(
        np.asarray(mean_N), np.asarray(strength.std_N), np.asarray(strength.vote_N), np.asarray(target_N), suspects_N,
        unsure_N & ~suspects_N, rate, float(noise_rate(jax.nn.sigmoid(mean_N))), float(jnp.mean(mean_N > 0)), found,
    )  # fmt: skip


def _planted(scores_MN: np.ndarray, planted_N: np.ndarray) -> dict[str, float]:
    strength_N = scores_MN.mean(axis=0)
    ranked_N = planted_N[np.argsort(strength_N)]
    return {"auc": auc(-strength_N, planted_N), "precision": float(ranked_N[: planted_N.sum()].mean())}


def cross_fitted(
    features_N2D: np.ndarray, wrong_LN: np.ndarray, groups_N: np.ndarray, args: LabelNoise, rng: np.random.Generator
) -> np.ndarray:  # fmt: skip
    """Differences [L, rounds, N] by members that did not see the pair, of L versions of the labels.

    wrong_LN: which labels each version turns round; its differences are those of its own labels. groups_N: as
    `group_pairs` numbers them; a group is in one fold.
    """
    count = len(features_N2D)
    folds_RN = deal_folds(groups_N, args.folds, args.rounds, rng)
    unseen_KN = (folds_RN[:, None] != np.arange(args.folds)[None, :, None]).reshape(-1, count)
    head = make_head(args.head, features_N2D.shape[-1])
    given = as_given(jnp.zeros((len(wrong_LN) * len(unseen_KN), count)))
    labels = flip(given.targets_N, jnp.asarray(np.repeat(wrong_LN, len(unseen_KN), axis=0)))
    params = train_heads(head, features_N2D, labels, np.tile(unseen_KN, (len(wrong_LN), 1)), args, rng)
    raw_KN = np.asarray(head_differences(head, params, jnp.asarray(features_N2D)))
    raw_LRFN = raw_KN.reshape(len(wrong_LN), args.rounds, args.folds, count)
    return np.stack([
        np.asarray(out_of_fold(jnp.asarray(raw_RFN), jnp.asarray(folds_RN))) * np.where(wrong_N, -1, 1)
        for raw_RFN, wrong_N in zip(raw_LRFN, wrong_LN, strict=True)
    ])  # fmt: skip


def deal_folds(groups_N: np.ndarray, folds: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each pair [rounds, N], the same for all pairs of a group; folds have equally many groups."""
    return np.stack([(rng.permutation(groups_N.max() + 1) % folds)[groups_N] for _ in range(rounds)])


def make_head(config: HeadConfig, width: int) -> FeatureHead:
    """The head that a config describes."""
    return linear_head(width) if config.kind == "linear" else mlp_head(width, config.hidden)


def train_heads(
    head: FeatureHead, features_N2D: np.ndarray, treated: Treatment, allowed_KN: np.ndarray, args: LabelNoise,
    rng: np.random.Generator,
) -> Params:  # fmt: skip
    """Parameters [K, ...] of members, trained in one program, each on the pairs that it may see; treated: [K, N]."""
    config = args.head
    rows = shuffled_rows(allowed_KN, config.epochs, min(config.batch, int(allowed_KN.sum(axis=1).min())), rng)
    rate = optax.linear_schedule(config.rate, 0.1 * config.rate, len(rows))
    tx = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.decay)
    step = make_step(reward_pairs(head.rewards), tx)
    states = new_members(head.init, tx, jax.random.split(key_for(jax.random.key(args.seed), "heads"), len(rows[0])))
    targets, margins, weights = (x_KN[..., None] for x_KN in treated)
    data: Any = Preferences(jnp.asarray(features_N2D), weights, targets, margins, None)  # type: ignore[arg-type]
    own: Any = Preferences(None, 0, 0, 0, None)  # type: ignore[arg-type]
    size = -(-len(rows) // _SLICES)
    with advancing(f"training {len(rows[0])} members", len(rows), "steps") as tell:
        for start in range(0, len(rows), size):
            states = train_members(step, states, data, jnp.asarray(rows[start : start + size]), own)
            tell(min(len(rows), start + size))
    return states.params


@partial(jax.jit, static_argnums=0)
def head_differences(head: FeatureHead, params: Params, features_N2D: Array) -> Array:
    """r(chosen) - r(rejected) [K, N] of members."""
    rewards_KN2 = jax.vmap(lambda params: head.rewards(params, features_N2D))(params)
    return rewards_KN2[..., 0] - rewards_KN2[..., 1]
