"""Reward models: one number for an answer, by a head on the state of its last token; and heads on given features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from lmlab.core.masking import answers_mask
from lmlab.core.rng import key_for
from lmlab.core.types import AnswerBatch, Array, Key, Params
from lmlab.models.lm import LM, Axes

REWARD = "reward"
"""Where the head lies, beside the parameters of the LM."""


class Features(Protocol):
    """`features(params, answers, inputs=None) -> features_BSD` float32."""

    def __call__(self, params: Params, answers: AnswerBatch, inputs: Array | None = None) -> Array:
        """The normed state of the last token of each answer; inputs: embeddings [B, T, D] in place of the tokens."""
        ...


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A language model with a scalar head. Equal only to itself, as an LM is."""

    lm: LM
    """It ignores the head."""
    init: Callable[[Key], Params]
    """`init(key) -> {**params of the LM, "reward": {"kernel": [D]}}`."""
    add_head: Callable[[Params, Key], Params]
    """`add_head(params, key)`: the parameters of a trained LM with a new head."""
    features: Features
    rewards: Callable[[Params, AnswerBatch], Array]
    """`rewards(params, answers) -> rewards_BS` float32; of an answer that is not there any number."""
    axes: Axes


def reward_model(lm: LM, start: Literal["zeros", "normal"] = "zeros") -> RewardModel:
    """A scalar head on any LM, in place of its unembedding (arXiv 2401.06080, section 2).

    The head has no bias, as a constant cancels in pairs. It reads and computes in float32 over a backbone of any type.
    start: zeros, under which the first loss is log 2 exactly; or normal with deviation 1 / sqrt(D + 1).
    """
    width = lm.config.width

    def add_head(params: Params, key: Key) -> Params:
        normal = jax.random.normal(key_for(key, REWARD), (width,)) / jnp.sqrt(width + 1)
        kernel_D = jnp.zeros((width,)) if start == "zeros" else normal
        return {**params, REWARD: {"kernel": kernel_D}}

    def features(params: Params, answers: AnswerBatch, inputs: Array | None = None) -> Array:
        hidden_BTD, _ = lm.apply(
            params, answers.tokens_BT if inputs is None else inputs, positions_BT=answers.positions_BT,
            segments_BT=answers.segments_BT, mask=answers_mask(answers, lm.config.attention.window),
        )  # fmt: skip
        last_BSD = jnp.take_along_axis(hidden_BTD, answers.ends_BS[..., None], axis=1)
        return last_BSD.astype(jnp.promote_types(last_BSD.dtype, jnp.float32))

    def rewards(params: Params, answers: AnswerBatch) -> Array:
        return linear_rewards(params[REWARD], features(params, answers))

    init = lambda key: add_head(lm.init(key), key)
    return RewardModel(lm, init, add_head, features, rewards, {**lm.axes, REWARD: {"kernel": ("embed",)}})


@dataclass(frozen=True, eq=False)
class FeatureHead:
    """Rewards of answers that are given as vectors, of a frozen model or of an encoder. Equal only to itself."""

    init: Callable[[Key], Params]
    rewards: Callable[[Params, Array], Array]
    """`rewards(params, features_BSD) -> rewards_BS`."""


def linear_rewards(params: Params, features_BSD: Array) -> Array:
    """Rewards [B, S] = features . kernel [D], in the type of the features."""
    return features_BSD @ params["kernel"].astype(features_BSD.dtype)


def linear_head(width: int) -> FeatureHead:
    """A head without hidden units, from zeros: all members of an ensemble begin alike."""
    return FeatureHead(lambda key: {"kernel": jnp.zeros((width,))}, linear_rewards)


def mlp_head(width: int, hidden: int) -> FeatureHead:
    """Rewards w . tanh(A f + b), from normal numbers of deviation 1 / sqrt(inputs)."""

    def init(key: Key) -> Params:
        first, second = jax.random.split(key)
        return {
            "inner": jax.random.normal(first, (width, hidden)) / jnp.sqrt(width),
            "bias": jnp.zeros((hidden,)),
            "kernel": jax.random.normal(second, (hidden,)) / jnp.sqrt(hidden),
        }

    def rewards(params: Params, features_BSD: Array) -> Array:
        # One product of matrices for both answers: under vmap over members it stays one a member.
        hidden_NF = jnp.tanh(features_BSD.reshape(-1, width) @ params["inner"] + params["bias"][None])
        return (hidden_NF @ params["kernel"]).reshape(features_BSD.shape[:-1])

    return FeatureHead(init, rewards)
