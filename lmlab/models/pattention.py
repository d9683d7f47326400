"""Attention of tokens to parameters: the Pattention of TokenFormer (arXiv 2410.23168, equation 5).

Keys are stored as [D, P] and values as [P, E], as the kernels of two linear maps are. On a mesh both are divided along
the parameter tokens P, which are never brought together: the norm of a token's scores is a sum of squares over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lmlab.core.sharding import constrain
from lmlab.core.types import Array
from lmlab.models.config import TokenFormerConfig
from lmlab.models.layers import INIT_STD, PROJECTION, named
from lmlab.models.projection import project

KEYS, VALUES = ("embed", "param_tokens"), ("param_tokens", "embed")
"""Logical axes."""
STACK = ("embed", "stack", "param_tokens")
"""Of the keys of several Pattentions that read the same tokens."""


def score_weights(scores: Array, tau: float, config: TokenFormerConfig) -> Array:
    """The weights of the parameter tokens (last axis) from their scores, float32 to float32 (equation 5).

    l2_norm_gelu: what gelu is given has the norm tau. The eps inside of the root makes scores of zero give zero, with
    a finite gradient (of tau / (2 eps)). gelu_l2_norm, softmax: the ablations; softmax is multiplied by tau^2.
    """
    if config.normalisation == "softmax":
        return jax.nn.softmax(scores, axis=-1) * tau**2
    gelu = lambda x: jax.nn.gelu(x, approximate=config.gelu == "tanh")
    scores = gelu(scores) if config.normalisation == "gelu_l2_norm" else scores
    squares = jnp.sum(jnp.square(scores), axis=-1, keepdims=True)
    scaled = scores * (jax.lax.rsqrt(squares + config.score_eps**2) * tau)
    return scaled if config.normalisation == "gelu_l2_norm" else gelu(scaled)


def attend_to_parameters(
    x_BTD: Array, keys_DP: Array, values_PE: Array, tau: float, config: TokenFormerConfig
) -> Array:
    """Pattention [B, T, D] -> [B, T, E] in the type of x; scores and their norm are float32."""
    return _mix(_scores(x_BTD, keys_DP, KEYS), values_PE, tau, config, x_BTD.dtype)


def _scores(x_BTD: Array, keys: Array, names: tuple[str, ...]) -> Array:
    scores = project(x_BTD, keys, names, 1, jnp.float32)
    return constrain(scores, ("batch", "length", *(name if name == "param_tokens" else None for name in names[1:])))


def _mix(scores_BTP: Array, values_PE: Array, tau: float, config: TokenFormerConfig, dtype: Any) -> Array:
    # Made again from the scores in the backward pass, which would else read five float32 arrays of their size. The
    # scores have no name by which `ExecutionConfig.remat` could keep them: nothing is as wide.
    weights_BTP = jax.checkpoint(score_weights, static_argnums=(1, 2))(scores_BTP, tau, config).astype(dtype)
    weights_BTP = constrain(weights_BTP, ("batch", "length", "param_tokens"))
    return checkpoint_name(project(weights_BTP, values_PE, VALUES, 1), PROJECTION)


class Pattention(nn.Module):
    """One attention to `tokens` parameter tokens, of the given tau^2."""

    config: TokenFormerConfig
    tokens: int
    reference: int

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, *] -> [B, T, D]."""
        keys_DP = self.param("keys", key_init(self.config, KEYS), (x_BTD.shape[-1], self.tokens))
        values_PD = self.param("values", value_init(self.config), (self.tokens, self.config.width))
        return attend_to_parameters(x_BTD, keys_DP, values_PD, self.reference**0.5, self.config)


class QueryKeyValue(nn.Module):
    """Three of them that read the same tokens, their scores in one product; each has a norm of its own."""

    config: TokenFormerConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> tuple[Array, Array, Array]:
        """[B, T, D] -> queries [B, T, N, H], keys and values [B, T, K, H]."""
        config, tokens = self.config, self.config.counts.qkv
        keys_D3P = self.param("keys", key_init(config, STACK), (x_BTD.shape[-1], 3, tokens))
        parts = jnp.split(_scores(x_BTD, keys_D3P, STACK), 3, axis=2)
        outputs = []
        for name, scores_BT1P, heads in zip(
            ("query", "key", "value"), parts, (config.attention.heads, config.kv_heads, config.kv_heads), strict=True
        ):
            values_PE = self.param(f"{name}_values", value_init(config), (tokens, heads * config.head_dim))
            out_BTE = _mix(scores_BT1P[:, :, 0], values_PE, config.references.qkv**0.5, config, x_BTD.dtype)
            outputs.append(out_BTE.reshape(*out_BTE.shape[:2], heads, config.head_dim))
        return outputs[0], outputs[1], outputs[2]


def key_init(config: TokenFormerConfig, names: tuple[str, ...]) -> Any:
    """Of [D, ...]. The function of a layer does not depend on the scale, the speed at which keys learn does."""
    if config.initialisation == "neox":
        return named(nn.initializers.normal(INIT_STD), names)
    return named(_truncated_normal, names)


def value_init(config: TokenFormerConfig) -> Any:
    """Of [P, E]."""
    if config.initialisation == "neox":
        return named(nn.initializers.normal(2 / (config.layers * config.width**0.5)), VALUES)
    return named(_truncated_normal, VALUES)


def _truncated_normal(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Of variance 1 / inputs; inputs are the first axis."""
    # Cut off at two deviations, a normal of deviation 1 has this one.
    std = shape[0] ** -0.5 / 0.87962566103423978
    return std * jax.random.truncated_normal(key, -2, 2, shape, dtype)
